//! The end of an image's use: what was taken of it in advance goes back.

#![forbid(unsafe_code)]

use super::image::{Image, State};
use super::refcounts::Refcounts;
use crate::engine::file::plainly;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::PoisonError;

impl Image {
    /// Counts down what nothing points at: the reserve, and what was given up. Whoever is killed leaves it counted, which does
    /// no harm but takes room, and `ringblk image check --repair` counts it down. It takes no more writes.
    pub fn close(&self) {
        let owner = self.owner.lock().unwrap_or_else(PoisonError::into_inner).take();
        // One that a request still has is nobody's to close.
        let Some(mut owner) = owner else { return };
        // What the store lost it may have lost of the tables, too.
        if !self.refuse_writes() || self.file.losses().reports() > 0 {
            return;
        }
        let state = std::mem::take(&mut *self.state());
        if let Err(error) = plainly(self.file.file(), |file| self.give_all_back(file, &mut owner, state)) {
            log::warn!("{}: clusters that it took in advance stay counted: {error}", self.name);
        }
    }

    fn give_all_back(&self, file: &File, owner: &mut Refcounts, state: State) -> io::Result<()> {
        let bits = self.layout.cluster_bits;
        let mut free: Vec<Range<u64>> =
            state.reserve.iter().map(|clusters| clusters.start << bits..clusters.end << bits).collect();
        free.append(&mut owner.unlinked);
        free.extend(owner.given_up.drain(..).map(|(_, range)| range));
        if !self.has_unsaved() {
            free.extend(state.unmapped);
        }
        if free.is_empty() && owner.next_dirty().is_none() {
            return Ok(());
        }
        // Nothing durable points at them, either.
        file.sync_data()?;
        for cluster in free.iter().flat_map(|range| range.start >> bits..range.end >> bits) {
            self.load_plainly(file, owner, cluster / owner.per_block())?;
            let count = owner.get(cluster).checked_sub(1);
            let count = count.ok_or_else(|| io::Error::other("one is used and not counted"))?;
            owner.set(cluster, count);
        }
        write_plainly(file, owner)?;
        // The end of the file may be of them.
        let end = self.file_end();
        if let Some(last) = state.reserve.iter().find(|last| last.end << bits == end)
            && self.file.is_regular()
        {
            file.set_len(last.start << bits)?;
        }
        file.sync_data()
    }

    fn load_plainly(&self, file: &File, owner: &mut Refcounts, index: u64) -> io::Result<()> {
        if owner.has(index) {
            return Ok(());
        }
        if let Some(excess) = owner.excess() {
            write_plainly(file, owner)?;
            owner.remove(excess);
        }
        let mut bytes = vec![0; owner.block_bytes()];
        let block = owner.table.get(index as usize).copied().filter(|block| *block != 0);
        let block = block.ok_or_else(|| io::Error::other("one is counted nowhere"))?;
        file.read_exact_at(&mut bytes, block)?;
        owner.insert(index, bytes);
        Ok(())
    }
}

fn write_plainly(file: &File, owner: &mut Refcounts) -> io::Result<()> {
    while let Some((index, range, bytes)) = owner.next_dirty() {
        file.write_all_at(bytes, owner.table[index as usize] + range.start as u64)?;
        owner.written(index);
    }
    Ok(())
}
