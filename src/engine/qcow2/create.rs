//! New images: a header, the counts of its own clusters, and an empty L1 table.

#![forbid(unsafe_code)]

use super::header::{Compression, Header, HeaderError, MAX_L1_BYTES, in_range};
use super::refcounts::Refcounts;

/// What a new image is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// Bytes of the disk, a multiple of 512.
    pub size: u64,
    /// A cluster has `1 << cluster_bits` bytes: 9 to 21. QEMU's habit is 16.
    pub cluster_bits: u32,
    /// Each cluster in 32 parts that are mapped by themselves: from 14 cluster bits on.
    pub extended_l2: bool,
    /// Bits of a refcount, as a power of two: 0 to 6. QEMU's habit is 4.
    pub refcount_order: u32,
    /// What clusters are compressed with, by those who write compressed ones: we do not.
    pub compression: Compression,
    /// The name of what it stands on, and the format of that.
    pub backing: Option<(String, String)>,
}

impl Default for NewImage {
    fn default() -> NewImage {
        NewImage {
            size: 0,
            cluster_bits: 16,
            extended_l2: false,
            refcount_order: 4,
            compression: Compression::Zlib,
            backing: None,
        }
    }
}

/// Why there is no new image.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// It cannot be like that.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// Sectors are whole.
    #[error("a size of {0} bytes is no multiple of 512")]
    Size(u64),
    /// The L1 table has its limit.
    #[error("a size of {size} bytes takes larger clusters than {cluster} bytes")]
    TooLarge {
        /// Of the disk.
        size: u64,
        /// Of a cluster.
        cluster: u64,
    },
}

impl NewImage {
    /// All bytes of the image: a few clusters.
    ///
    /// # Errors
    /// See [`CreateError`].
    pub fn bytes(&self) -> Result<Vec<u8>, CreateError> {
        if !self.size.is_multiple_of(512) {
            return Err(CreateError::Size(self.size));
        }
        in_range("cluster_bits", self.cluster_bits.into(), 9, 21, "not 9 to 21")?;
        let (name, format) = self.backing.clone().unzip();
        let mut header = Header {
            version: 3,
            cluster_bits: self.cluster_bits,
            size: self.size,
            l1_offset: 0,
            l1_entries: 0,
            reftable_offset: 1 << self.cluster_bits,
            reftable_clusters: 1,
            refcount_order: self.refcount_order,
            extended_l2: self.extended_l2,
            compression: self.compression,
            dirty: false,
            corrupt: false,
            autoclear: 0,
            snapshots: 0,
            backing: name,
            backing_format: format,
        };
        let cluster = header.cluster();
        let l1_entries = header.l1_entries_for(self.size);
        if l1_entries > MAX_L1_BYTES / 8 {
            return Err(CreateError::TooLarge { size: self.size, cluster });
        }
        header.l1_entries = l1_entries as u32;
        // Any place will do for the first look: with an order that cannot be, nothing can be counted.
        header.l1_offset = cluster;
        header.check()?;
        let place = Place::of(&mut header);
        let mut bytes = header.bytes();
        in_range(
            "its header in bytes",
            bytes.len() as u64,
            0,
            cluster,
            "more than its first cluster has room for",
        )?;
        bytes.resize((place.all * cluster) as usize, 0);
        for number in 0..place.blocks {
            let at = (header.reftable_offset + number * 8) as usize;
            let block = (place.first_block + number) * cluster;
            bytes[at..at + 8].copy_from_slice(&block.to_be_bytes());
            let mut counts = Refcounts::new(&header, Vec::new(), None);
            let per_block = counts.per_block();
            counts.insert(0, vec![0; cluster as usize]);
            let counted = per_block.min(place.all.saturating_sub(number * per_block));
            (0..counted).for_each(|index| counts.set(index, 1));
            bytes[block as usize..][..cluster as usize].copy_from_slice(counts.block(0).unwrap_or_default());
        }
        Ok(bytes)
    }
}

/// Where its tables are, in clusters: the header, the refcount table, the blocks, the L1 table.
struct Place {
    first_block: u64,
    blocks: u64,
    all: u64,
}

impl Place {
    /// Finds places, and notes them in the header. The counts count themselves.
    fn of(header: &mut Header) -> Place {
        let cluster = header.cluster();
        let per_block = Refcounts::new(header, Vec::new(), None).per_block();
        let l1 = (u64::from(header.l1_entries) * 8).div_ceil(cluster);
        let (mut table, mut blocks) = (1, 1);
        loop {
            let all = 1 + table + blocks + l1;
            let (enough, table_enough) = (all.div_ceil(per_block), blocks.div_ceil(cluster / 8));
            if (enough, table_enough) <= (blocks, table) && table_enough <= table {
                header.reftable_clusters = table as u32;
                header.l1_offset = if l1 == 0 { 0 } else { (1 + table + blocks) * cluster };
                return Place { first_block: 1 + table, blocks, all };
            }
            (blocks, table) = (blocks.max(enough), table.max(table_enough));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(size: u64, cluster_bits: u32, refcount_order: u32) -> Result<Vec<u8>, CreateError> {
        NewImage { size, cluster_bits, refcount_order, ..NewImage::default() }.bytes()
    }

    #[test]
    fn it_is_what_it_says() {
        for (size, bits, order) in
            [(0, 16, 4), (1 << 40, 16, 4), (1 << 27, 9, 0), (1 << 31, 9, 6), (512, 21, 6)]
        {
            let bytes = image(size, bits, order).unwrap();
            let header = Header::parse(&bytes).unwrap();
            assert_eq!((header.size, header.cluster_bits, header.refcount_order), (size, bits, order));
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (size, bits, order, why) in [
            (513, 16, 4, "multiple of 512"),
            (1 << 40, 9, 4, "takes larger clusters than 512"),
            (0, 8, 4, "not 9 to 21"),
            (0, 22, 4, "not 9 to 21"),
            (0, 16, 7, "not 0 to 6"),
        ] {
            let error = image(size, bits, order).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        let extended = NewImage { cluster_bits: 13, extended_l2: true, ..NewImage::default() };
        assert!(extended.bytes().unwrap_err().to_string().contains("not 14 to 21"));
        let named = NewImage {
            cluster_bits: 9,
            backing: Some(("x".repeat(600), "raw".into())),
            ..NewImage::default()
        };
        assert!(named.bytes().unwrap_err().to_string().contains("room"));
    }
}
