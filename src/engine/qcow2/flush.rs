//! Changes of tables brought to the image, in the order in which a power cut at any moment leaves it whole.
//!
//! 1. What the new entries point at becomes durable: data, copies, tables that are still empty. (That it is counted is
//!    durable since it was taken: see [`allocate`](super::allocate).)
//! 2. The changed slices of L2 tables are written, and the changed L1 entries. In whichever order these
//!    become durable, what they lead to is: a L2 table that is new reads zero where its slices have not come, and
//!    that is what there was before. Now the image is *saved*. It has all that was acknowledged, should this process be killed,
//!    and is whole, should the power go.
//! 3. They become durable, too. Only now nothing in the image points at what was given up in memory before 1.
//!
//! A request that has changed tables is over when the image is saved, a flush when all is durable. The requests that come
//! while it is being saved are saved together, with the next one: a first write costs its share of one `fdatasync(2)`. A flush
//! costs one, too, unless something is not saved.
//!
//! So a write that was not flushed may be gone after a power cut, with its whole cluster as it was before; one that was
//! flushed is there.
//!
//! When the store fails at one of these, it may have lost what an entry points at, and forgotten that: the kernel drops what it
//! could not write. So nothing more is written to the image then, and it stays as whole as it was.

#![forbid(unsafe_code)]

use super::cache::Spot;
use super::owner::Owner;
use super::refcounts::Refcounts;
use super::store_io::ImageOps;
use crate::block::Errno;
use crate::ring::{Io, Ring};
use std::collections::BTreeSet;
use std::ops::Range;

/// Slices with changes, after which the next one writes them all: 512 KiB of copies.
pub const MOST_DIRTY: usize = 128;

/// What is being written.
#[derive(Default)]
struct Changes {
    slices: Vec<(u64, Spot, Vec<u8>)>,
    /// Pieces of the L1 table, and which of its entries they are written for.
    l1: Vec<(u64, Vec<u8>)>,
    l1_entries: BTreeSet<usize>,
    unmapped: Vec<Range<u64>>,
}

impl<R: Ring> ImageOps<R> {
    /// Brings every write that completed before to stable storage, with what leads to it.
    pub async fn flush(&self, io: &Io<R>) -> Result<(), Errno> {
        if self.image.read_only {
            return Ok(());
        }
        if self.image.is_broken() {
            // What was written before cannot be vouched for.
            return Err(Errno::EIO);
        }
        if self.image.has_unwritten() {
            return self.write_back(io).await;
        }
        self.sync(io).await
    }

    /// Brings all changes of tables to stable storage, and all data before them.
    pub async fn write_back(&self, io: &Io<R>) -> Result<(), Errno> {
        let mut owner = Owner::of(io, &self.image).await?;
        self.write_changes(io, &mut owner).await?;
        self.sync(io).await?;
        self.image.state().unsynced = false;
        let epoch = self.image.pins.epoch();
        let unlinked = std::mem::take(&mut owner.unlinked);
        owner.given_up.extend(unlinked.into_iter().map(|range| (epoch, range)));
        self.give_back(io, &mut owner).await
    }

    /// Saves what has changed: a request that has changed something is over only then.
    pub async fn save(&self, io: &Io<R>) -> Result<(), Errno> {
        if !self.image.has_unsaved() {
            return Ok(());
        }
        let mut owner = Owner::of(io, &self.image).await?;
        // Whoever had it before may have saved this, too.
        if self.image.has_unsaved() { self.write_changes(io, &mut owner).await } else { Ok(()) }
    }

    async fn write_changes(&self, io: &Io<R>, owner: &mut Refcounts) -> Result<(), Errno> {
        if self.image.is_broken() {
            return Err(Errno::EIO);
        }
        let changes = Writing { ops: self, changes: Some(self.collect()) };
        self.image.state().unsynced = true;
        if let Err(errno) = changes.write(io).await {
            // An interrupted slot is nobody's loss: all of it is done again.
            if errno != Errno::ERESTART {
                self.image.give_up(format_args!("its tables cannot be written"));
            }
            return Err(errno);
        }
        owner.unlinked.extend(changes.done());
        Ok(())
    }

    /// Takes all changes that there are.
    fn collect(&self) -> Changes {
        let image = &*self.image;
        let mut state = image.state();
        state.writing = true;
        let mut slices = Vec::with_capacity(state.dirty.len());
        for spot in std::mem::take(&mut state.dirty) {
            let mut bytes = Vec::with_capacity(image.cache.slice() as usize);
            if let Some(tag) = image.cache.begin_write(spot, &mut bytes) {
                slices.push((tag, spot, bytes));
            }
        }
        slices.sort_unstable_by_key(|(tag, ..)| *tag);
        let l1_entries = std::mem::take(&mut state.dirty_l1);
        let l1 = self.l1_pieces(&l1_entries);
        Changes { slices, l1, l1_entries, unmapped: std::mem::take(&mut state.unmapped) }
    }

    /// Whole pieces of the L1 table with these entries: as they are now, and not as they will be when they are
    /// written, since what later ones point at is not durable by then.
    fn l1_pieces(&self, entries: &BTreeSet<usize>) -> Vec<(u64, Vec<u8>)> {
        let piece = self.image.layout.cluster().min(4096) as usize / 8;
        let mut firsts: Vec<usize> = entries.iter().map(|entry| entry / piece * piece).collect();
        firsts.dedup();
        let bytes = |first: usize| {
            let mut bytes = self.image.l1_bytes(first..first + piece);
            // The table is as long as its clusters, of which the rest is zero.
            bytes.resize(piece * 8, 0);
            (self.image.header.l1_offset + first as u64 * 8, bytes)
        };
        firsts.into_iter().map(bytes).collect()
    }
}

/// Changes on their way.
struct Writing<'a, R: Ring> {
    ops: &'a ImageOps<R>,
    changes: Option<Changes>,
}

impl<R: Ring> Writing<'_, R> {
    async fn write(&self, io: &Io<R>) -> Result<(), Errno> {
        let Some(changes) = &self.changes else { return Ok(()) };
        self.ops.sync(io).await?;
        let slices = changes.slices.iter().map(|(tag, _, bytes)| (*tag, bytes));
        for (offset, bytes) in slices.chain(changes.l1.iter().map(|(offset, bytes)| (*offset, bytes))) {
            self.ops.write_table(io, offset, &mut bytes.clone()).await?;
        }
        Ok(())
    }

    /// All is written: what nothing points at any more, once it is durable.
    fn done(mut self) -> Vec<Range<u64>> {
        let Some(changes) = self.changes.take() else { return Vec::new() };
        self.end(&changes, true);
        changes.unmapped
    }

    fn end(&self, changes: &Changes, written: bool) {
        let image = &*self.ops.image;
        let mut state = image.state();
        for (_, spot, _) in &changes.slices {
            if image.cache.end_write(*spot, written) && !state.dirty.contains(spot) {
                state.dirty.push(*spot);
            }
        }
        if !written {
            state.dirty_l1.extend(&changes.l1_entries);
            state.unmapped.extend(changes.unmapped.iter().cloned());
        }
        image.end_writing(&mut state);
    }
}

impl<R: Ring> Drop for Writing<'_, R> {
    fn drop(&mut self) {
        if let Some(changes) = self.changes.take() {
            self.end(&changes, false);
        }
    }
}
