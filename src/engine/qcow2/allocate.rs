//! Clusters taken and given back.
//!
//! What a crash may leave is a cluster that is counted and not used, never one that is used and not counted. So:
//!
//! - Clusters are taken a batch at a time: they are counted, the counts are written, and only then are they the image's
//!   [reserve](super::image::State::reserve), from which writes take what they need without waiting for the store. All of a
//!   reserve reads zero. The counts, and the zeroes, are durable before anything in the image points there: what is written
//!   before tables are is made durable before that ([`flush`](super::flush)).
//! - A cluster is given up when no entry in memory points at it. Once no entry on stable storage does
//!   ([`flush`](super::flush)), and every request is over that began before that, its count goes down, its blocks go back to the
//!   file system, and only then may it be taken again, which makes it read zero once more.

#![forbid(unsafe_code)]

use super::entry::Layout;
use super::owner::Owner;
use super::refcounts::Refcounts;
use super::store_io::ImageOps;
use crate::block::Errno;
use crate::engine::node::Leaf;
use crate::ring::{Io, Ring};
use std::ops::Range;

/// Bytes of clusters that are taken at once. Few in tests, so that they come to the end of them.
const BATCH: u64 = if cfg!(test) { 8 << 10 } else { 4 << 20 };

/// The most clusters at once.
const MOST: u64 = 1024;

impl<R: Ring> ImageOps<R> {
    /// At most `count` clusters in a row from the reserve, which is filled up where it is empty: their numbers.
    pub async fn take_clusters(&self, io: &Io<R>, count: u64) -> Result<Range<u64>, Errno> {
        loop {
            if let Some(taken) = self.take_reserved(count) {
                return Ok(taken);
            }
            let mut owner = Owner::of(io, &self.image).await?;
            // Somebody else may have filled it meanwhile.
            if let Some(taken) = self.take_reserved(count) {
                return Ok(taken);
            }
            self.give_back(io, &mut owner).await?;
            let batch = (BATCH >> self.image.layout.cluster_bits).clamp(count.min(MOST), MOST);
            let taken = self.allocate(io, &mut owner, batch).await?;
            self.image.state().reserve.push(taken);
        }
    }

    fn take_reserved(&self, count: u64) -> Option<Range<u64>> {
        let mut state = self.image.state();
        let first = state.reserve.first_mut()?;
        let taken = first.start..first.end.min(first.start + count);
        first.start = taken.end;
        if first.is_empty() {
            state.reserve.remove(0);
        }
        Some(taken)
    }

    /// Counts at most `most` free clusters in a row, and makes them read zero.
    async fn allocate(&self, io: &Io<R>, owner: &mut Refcounts, most: u64) -> Result<Range<u64>, Errno> {
        let found = self.find(io, owner, most).await?;
        let layout = self.image.layout;
        for cluster in found.clone() {
            owner.set(cluster, 1);
        }
        owner.first_free = found.end;
        self.write_counts(io, owner).await?;
        self.zero_clusters(io, found.clone(), layout).await?;
        Ok(found)
    }

    async fn zero_clusters(&self, io: &Io<R>, clusters: Range<u64>, layout: Layout) -> Result<(), Errno> {
        let (from, to) = (clusters.start << layout.cluster_bits, clusters.end << layout.cluster_bits);
        self.write_zeroes(io, from, to - from).await
    }

    /// Free clusters in a row, at most `most`, all counted by one block that is in memory.
    async fn find(&self, io: &Io<R>, owner: &mut Refcounts, most: u64) -> Result<Range<u64>, Errno> {
        loop {
            let (per_block, from) = (owner.per_block(), owner.first_free);
            let index = from / per_block;
            let end = ((index + 1) * per_block).min(owner.fixed.unwrap_or(u64::MAX));
            if from >= end {
                return Err(Errno::ENOSPC);
            }
            match owner.table.get(index as usize) {
                None => {
                    self.grow_table(io, owner).await?;
                    continue;
                }
                Some(0) => self.add_block(io, owner, index).await?,
                Some(_) => self.load_block(io, owner, index).await?,
            }
            let first = (owner.first_free..end).find(|cluster| owner.get(*cluster) == 0);
            let Some(first) = first else {
                owner.first_free = end;
                continue;
            };
            let taken = (first..end.min(first + most)).find(|cluster| owner.get(*cluster) != 0);
            return Ok(first..taken.unwrap_or(end.min(first + most)));
        }
    }

    /// Has a block in memory that there is.
    async fn load_block(&self, io: &Io<R>, owner: &mut Refcounts, index: u64) -> Result<(), Errno> {
        if !owner.has(index) {
            self.make_room(io, owner).await?;
            let offset = self.block_at(owner, index)?;
            let bytes = self.read_table(io, offset, owner.block_bytes()).await?;
            owner.insert(index, bytes);
        }
        owner.touch(index);
        Ok(())
    }

    fn block_at(&self, owner: &Refcounts, index: u64) -> Result<u64, Errno> {
        let layout = self.image.layout;
        let offset = owner.table.get(index as usize).copied().unwrap_or(0);
        if offset == 0 || offset & (layout.cluster() - 1) != 0 || offset >= self.image.file_end() {
            self.image.give_up(format_args!("its refcount table points at {offset:#x}"));
            return Err(Errno::EIO);
        }
        Ok(offset)
    }

    async fn make_room(&self, io: &Io<R>, owner: &mut Refcounts) -> Result<(), Errno> {
        while let Some(excess) = owner.excess() {
            self.write_counts(io, owner).await?;
            owner.remove(excess);
        }
        Ok(())
    }

    /// Writes all changes of blocks; they are durable after the next flush.
    async fn write_counts(&self, io: &Io<R>, owner: &mut Refcounts) -> Result<(), Errno> {
        while let Some((index, range, bytes)) = owner.next_dirty() {
            let mut bytes = bytes.to_vec();
            let offset = self.block_at(owner, index)? + range.start as u64;
            self.write_table(io, offset, &mut bytes).await?;
            owner.written(index);
        }
        Ok(())
    }

    /// Makes a block where there is none, so that all that it counts is free: it is in the first of these clusters.
    async fn add_block(&self, io: &Io<R>, owner: &mut Refcounts, index: u64) -> Result<(), Errno> {
        self.make_room(io, owner).await?;
        let cluster = owner.first_free;
        owner.insert(index, vec![0; owner.block_bytes()]);
        owner.set(cluster, 1);
        owner.touch(index);
        let offset = cluster << self.image.layout.cluster_bits;
        let done = self.link_block(io, owner, index, offset).await;
        match done {
            Ok(()) => owner.first_free = cluster + 1,
            // What is there of it is not known.
            Err(_) => owner.remove(index),
        }
        done
    }

    async fn link_block(
        &self,
        io: &Io<R>,
        owner: &mut Refcounts,
        index: u64,
        offset: u64,
    ) -> Result<(), Errno> {
        let mut bytes = owner.block(index).unwrap_or_default().to_vec();
        self.write_table(io, offset, &mut bytes).await?;
        self.sync(io).await?;
        let entry = index as usize;
        owner.table[entry] = offset;
        if let Err(errno) = self.write_table_entries(io, owner, entry).await {
            // Whether the image has it is not known; that it is used twice is worse than that it is lost.
            owner.table[entry] = 0;
            self.image.give_up(format_args!("its refcount table cannot be written"));
            return Err(errno);
        }
        owner.written(index);
        Ok(())
    }

    /// Writes the piece of the refcount table with this entry, durably.
    async fn write_table_entries(&self, io: &Io<R>, owner: &Refcounts, entry: usize) -> Result<(), Errno> {
        let piece = owner.block_bytes().min(4096) / 8;
        let first = entry / piece * piece;
        let entries = &owner.table[first..owner.table.len().min(first + piece)];
        let mut bytes: Vec<u8> = entries.iter().flat_map(|offset| offset.to_be_bytes()).collect();
        self.write_table(io, owner.table_offset + first as u64 * 8, &mut bytes).await?;
        self.sync(io).await
    }

    /// Makes the refcount table larger: a new one, with the blocks that count it, behind everything that the old one counts.
    async fn grow_table(&self, io: &Io<R>, owner: &mut Refcounts) -> Result<(), Errno> {
        let layout = self.image.layout;
        let (per_block, old) = (owner.per_block(), owner.table.len() as u64);
        let start = old * per_block;
        let entries_per_cluster = layout.cluster() / 8;
        // Half as large again, and one cluster at least.
        let clusters = (old / entries_per_cluster * 3 / 2).max(old / entries_per_cluster + 1);
        // The blocks count themselves too.
        let blocks = (1..).find(|blocks| blocks * per_block >= blocks + clusters).unwrap_or(1);
        let table_bytes = clusters << layout.cluster_bits;
        let fits = table_bytes <= super::header::MAX_REFTABLE_BYTES;
        if !fits || owner.fixed.is_some_and(|fixed| start + blocks + clusters > fixed) {
            return Err(Errno::ENOSPC);
        }
        let mut table = owner.table.clone();
        table.resize((clusters * entries_per_cluster) as usize, 0);
        for number in 0..blocks {
            let mut one = Refcounts::new(&self.image.header, Vec::new(), None);
            one.insert(0, vec![0; owner.block_bytes()]);
            let used = (blocks + clusters - number * per_block).min(per_block);
            (0..used).for_each(|cluster| one.set(cluster, 1));
            let mut counts = one.block(0).unwrap_or_default().to_vec();
            let offset = (start + number) << layout.cluster_bits;
            self.write_table(io, offset, &mut counts).await?;
            table[(old + number) as usize] = offset;
        }
        let offset = (start + blocks) << layout.cluster_bits;
        let mut bytes: Vec<u8> = table.iter().flat_map(|offset| offset.to_be_bytes()).collect();
        self.write_table(io, offset, &mut bytes).await?;
        self.sync(io).await?;
        // Its place and its clusters, 12 bytes of one sector: both or none.
        let piece = layout.cluster().min(4096) as usize;
        let mut head = self.read_table(io, 0, piece).await?;
        head[48..56].copy_from_slice(&offset.to_be_bytes());
        head[56..60].copy_from_slice(&(clusters as u32).to_be_bytes());
        let written = match self.write_table(io, 0, &mut head).await {
            Ok(()) => self.sync(io).await,
            Err(errno) => Err(errno),
        };
        if let Err(errno) = written {
            self.image.give_up(format_args!("its header cannot be written"));
            return Err(errno);
        }
        let old_table = owner.table_offset..owner.table_offset + old * 8;
        self.image.moved(&old_table);
        owner.given_up.push((self.image.pins.epoch(), old_table));
        (owner.table, owner.table_offset) = (table, offset);
        Ok(())
    }

    /// Counts clusters down that were given up, as far as nobody uses them any more.
    pub async fn give_back(&self, io: &Io<R>, owner: &mut Refcounts) -> Result<(), Errno> {
        if owner.given_up.is_empty() {
            return Ok(());
        }
        let epoch = self.image.pins.advance();
        let layout = self.image.layout;
        while let Some(at) = owner.given_up.iter().position(|(since, _)| since + 2 <= epoch) {
            let (_, range) = owner.given_up.swap_remove(at);
            for offset in (range.start..range.end).step_by(layout.cluster() as usize) {
                let cluster = offset >> layout.cluster_bits;
                let index = cluster / owner.per_block();
                self.load_block(io, owner, index).await?;
                match owner.get(cluster) {
                    0 => {
                        self.image
                            .give_up(format_args!("its cluster at {offset:#x} is used and not counted"));
                        return Err(Errno::EIO);
                    }
                    1 => {
                        // What it holds is nobody's: one that cannot be punched is as free.
                        let _ = self.file.discard(io, offset, layout.cluster()).await;
                        owner.set(cluster, 0);
                        owner.first_free = owner.first_free.min(cluster);
                    }
                    count => owner.set(cluster, count - 1),
                }
            }
        }
        Ok(())
    }
}
