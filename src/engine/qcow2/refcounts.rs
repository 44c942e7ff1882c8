//! How often each cluster of an image is used: the refcount table and its blocks, and which clusters are free.
//!
//! One request at a time has this, across its waits for the store ([`Owner`](super::owner::Owner)); what it does to the image in which order is
//! said in [`allocate`](super::allocate).

#![forbid(unsafe_code)]

use super::header::Header;
use std::collections::BTreeMap;
use std::ops::Range;

/// Bytes of blocks that are kept in memory, but for the one that is at work.
const KEPT: usize = 1 << 20;

/// The counts of one image.
pub struct Refcounts {
    /// A count has `1 << order` bits.
    order: u32,
    cluster_bits: u32,
    /// Offsets of blocks; 0 where there is none, and all that it would count is free.
    pub table: Vec<u64>,
    /// Where the table is in the image.
    pub table_offset: u64,
    blocks: BTreeMap<u64, Block>,
    /// No cluster before this one is free.
    pub first_free: u64,
    /// The clusters that there can be, where the store does not grow.
    pub fixed: Option<u64>,
    /// Offsets of clusters that nothing points at any more in the image, which is not durable.
    pub unlinked: Vec<Range<u64>>,
    /// Those where it is, and since which epoch.
    pub given_up: Vec<(u64, Range<u64>)>,
}

/// One block.
struct Block {
    bytes: Vec<u8>,
    /// Bytes with changes that are not in the image.
    dirty: Option<Range<usize>>,
    /// For dropping the oldest.
    used: u64,
}

impl Refcounts {
    /// Of an image with this table, in a store that cannot grow past `fixed` bytes.
    pub fn new(header: &Header, table: Vec<u64>, fixed: Option<u64>) -> Refcounts {
        Refcounts {
            order: header.refcount_order,
            cluster_bits: header.cluster_bits,
            table,
            table_offset: header.reftable_offset,
            blocks: BTreeMap::new(),
            first_free: 1,
            fixed: fixed.map(|bytes| bytes >> header.cluster_bits),
            unlinked: Vec::new(),
            given_up: Vec::new(),
        }
    }

    /// Clusters that one block counts.
    pub fn per_block(&self) -> u64 {
        (8 << self.cluster_bits) >> self.order
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> usize {
        1 << self.cluster_bits
    }

    /// Whether the block is in memory.
    pub fn has(&self, index: u64) -> bool {
        self.blocks.contains_key(&index)
    }

    /// A block has come from the image, or is a new one.
    pub fn insert(&mut self, index: u64, bytes: Vec<u8>) {
        self.blocks.insert(index, Block { bytes, dirty: None, used: 0 });
    }

    /// The block that is to be dropped for another: its changes have to be written first.
    pub fn excess(&self) -> Option<u64> {
        let most = (KEPT >> self.cluster_bits).max(2);
        let oldest = || self.blocks.iter().min_by_key(|(_, block)| block.used).map(|(index, _)| *index);
        if self.blocks.len() >= most { oldest() } else { None }
    }

    pub fn remove(&mut self, index: u64) {
        self.blocks.remove(&index);
    }

    /// A block that is in memory.
    pub fn block(&self, index: u64) -> Option<&[u8]> {
        self.blocks.get(&index).map(|block| &*block.bytes)
    }

    /// Blocks with changes, of which the next is to be written: its number, and which of its bytes.
    pub fn next_dirty(&self) -> Option<(u64, Range<usize>, &[u8])> {
        let (index, block) = self.blocks.iter().find(|(_, block)| block.dirty.is_some())?;
        // Whole pieces, for direct I/O.
        let piece = self.block_bytes().min(4096);
        let dirty = block.dirty.clone()?;
        let whole = dirty.start / piece * piece..dirty.end.next_multiple_of(piece);
        Some((*index, whole.clone(), &block.bytes[whole]))
    }

    pub fn written(&mut self, index: u64) {
        if let Some(block) = self.blocks.get_mut(&index) {
            block.dirty = None;
        }
    }

    /// The count of a cluster, whose block is in memory.
    pub fn get(&self, cluster: u64) -> u64 {
        let Some(block) = self.blocks.get(&(cluster / self.per_block())) else { return 0 };
        let index = (cluster % self.per_block()) as usize;
        match self.order {
            0..3 => {
                let bits = 1 << self.order;
                let byte = block.bytes[index * bits / 8];
                u64::from(byte >> (index * bits % 8)) & ((1 << bits) - 1)
            }
            order => {
                let len = 1 << (order - 3);
                block.bytes[index * len..][..len].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
            }
        }
    }

    /// Sets it.
    pub fn set(&mut self, cluster: u64, count: u64) {
        let (per_block, order) = (self.per_block(), self.order);
        let Some(block) = self.blocks.get_mut(&(cluster / per_block)) else { return };
        let index = (cluster % per_block) as usize;
        let bytes = match order {
            0..3 => {
                let bits = 1 << order;
                let (at, shift) = (index * bits / 8, index * bits % 8);
                let mask = ((1u16 << bits) - 1) as u8;
                block.bytes[at] = block.bytes[at] & !(mask << shift) | (count as u8 & mask) << shift;
                at..at + 1
            }
            order => {
                let len = 1 << (order - 3);
                let at = index * len;
                block.bytes[at..at + len].copy_from_slice(&count.to_be_bytes()[8 - len..]);
                at..at + len
            }
        };
        block.dirty = Some(match block.dirty.take() {
            None => bytes,
            Some(before) => before.start.min(bytes.start)..before.end.max(bytes.end),
        });
    }

    /// Says that a block is of use.
    pub fn touch(&mut self, index: u64) {
        let latest = self.blocks.values().map(|block| block.used).max().unwrap_or(0);
        if let Some(block) = self.blocks.get_mut(&index) {
            block.used = latest + 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(order: u32) -> Refcounts {
        let mut counts = Refcounts {
            order,
            cluster_bits: 9,
            table: vec![0; 4],
            table_offset: 512,
            blocks: BTreeMap::new(),
            first_free: 1,
            fixed: None,
            unlinked: Vec::new(),
            given_up: Vec::new(),
        };
        counts.insert(0, vec![0; 512]);
        counts
    }

    #[test]
    fn counts_of_every_width() {
        for order in 0..=6 {
            let mut counts = counts(order);
            let most = if order == 6 { u64::MAX } else { (1 << (1 << order)) - 1 };
            assert_eq!(counts.per_block(), 4096 >> order);
            for cluster in [0, 1, 7, 13, counts.per_block() - 1] {
                counts.set(cluster, most);
                assert_eq!(counts.get(cluster), most, "{order}");
                assert_eq!(counts.get(cluster ^ 2), 0, "its neighbours");
                counts.set(cluster, 1);
                assert_eq!(counts.get(cluster), 1);
                counts.set(cluster, 0);
            }
        }
        // As in the image: big-endian.
        let mut counts = counts(4);
        counts.set(3, 0x0102);
        assert_eq!(counts.next_dirty().unwrap().2[6..8], [1, 2]);
    }

    #[test]
    fn what_changed_is_written_once() {
        let mut counts = counts(4);
        assert!(counts.next_dirty().is_none());
        counts.set(9, 1);
        counts.set(3, 1);
        let (index, bytes, _) = counts.next_dirty().unwrap();
        assert_eq!((index, bytes), (0, 0..512), "whole pieces");
        counts.written(0);
        assert!(counts.next_dirty().is_none());
    }
}
