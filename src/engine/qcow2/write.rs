//! Writes: in place where the disk has a cluster of its own, else into a new one.
//!
//! In place there is no lock and no copy. A first write claims its clusters, takes as many from the reserve, brings there what
//! they had before and it does not cover, and only when all that is written makes the tables point at them: whoever reads
//! meanwhile sees what was before. See [`flush`](super::flush) for when the image hears of it.

#![forbid(unsafe_code)]

use super::channel::Qcow2Channel;
use super::entry::{Entry, Place};
use super::flush::MOST_DIRTY;
use super::image::{Image, Slot};
use crate::block::{Data, Errno};
use crate::engine::node::Leaf;
use crate::engine::until::until;
use crate::ring::{Io, Pool, Ring};
use std::ops::Range;

/// Clusters that one step of a request takes at most.
const STEP: u64 = 64;

/// Clusters that are being changed, until it is dropped.
pub(super) struct Claim<'a> {
    image: &'a Image,
    clusters: Range<u64>,
}

impl<'a> Claim<'a> {
    /// Waits for whoever has one of them.
    pub async fn of<R: Ring>(io: &Io<R>, image: &'a Image, clusters: Range<u64>) -> Result<Claim<'a>, Errno> {
        until(io, || image.state().claims.take(&clusters).then_some(())).await?;
        Ok(Claim { image, clusters })
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.image.state().claims.release(&self.clusters);
    }
}

/// Clusters of the reserve that nothing points at yet. Whoever fails gives them back: something may be written there.
struct Taken<'a> {
    image: &'a Image,
    clusters: Range<u64>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if !self.clusters.is_empty() {
            let bits = self.image.layout.cluster_bits;
            self.image.state().unmapped.push(self.clusters.start << bits..self.clusters.end << bits);
        }
    }
}

/// What a first write does to a row of clusters.
struct Plan {
    /// Bytes of the disk that the clusters are to have afterwards, and the request does not cover all of.
    span: Range<u64>,
    /// What each had before.
    old: Vec<Entry>,
    /// All are in one cluster that is there already, at this offset; else in new ones.
    existing: Option<u64>,
    /// New clusters read zero, and so do the bytes before: nothing has to be copied.
    blank: bool,
}

impl<R: Ring> Qcow2Channel<R> {
    /// Stores `data` at `offset`; with `fua` on stable storage before it returns.
    pub(super) async fn write(
        &self,
        io: &Io<R>,
        data: Data<'_>,
        len: u64,
        offset: u64,
        fua: bool,
    ) -> Result<(), Errno> {
        let mut durable = fua && !self.image().has_unwritten();
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let (place, step) = self.look(io, at, len - done).await?;
            if let Place::At(host) = place
                && let Some(step) = self.own(at, step)
            {
                self.ops.file.write(io, data.part(done, step), step, host, durable).await?;
                // The last cluster of a file may be cut off.
                self.image().grown(host + step);
                done += step;
                continue;
            }
            durable = false;
            done += Box::pin(self.first_write(io, data.part(done, len - done), len - done, at)).await?;
        }
        // What was written to a cluster before its entry was durable takes a flush.
        if fua && (!durable || self.image().has_unwritten()) {
            return self.ops.flush(io).await;
        }
        // One whose entry is not in the image is lost with us, whoever wrote there first.
        self.ops.save(io).await
    }

    /// How many of the `len` bytes from `offset` on are in clusters that are the disk's own to write to. `None`: not even the
    /// first, or the slice has gone meanwhile.
    fn own(&self, offset: u64, len: u64) -> Option<u64> {
        let image = self.image();
        let cluster = image.layout.cluster();
        let mut own = 0;
        while own < len {
            let slot = image.slot(offset + own).ok()??;
            let entry = image.entry(slot);
            if !entry.is_some_and(|entry| image.layout.is_own(entry)) {
                break;
            }
            own += (cluster - ((offset + own) & (cluster - 1))).min(len - own);
        }
        (own > 0).then_some(own)
    }

    /// Writes to clusters that the disk has not, or not whole, as far as one step goes: the bytes that it has done, none where
    /// somebody else was faster.
    pub(super) async fn first_write(
        &self,
        io: &Io<R>,
        data: Data<'_>,
        len: u64,
        offset: u64,
    ) -> Result<u64, Errno> {
        let (image, bits) = (self.image(), self.image().layout.cluster_bits);
        if image.state().dirty.len() >= MOST_DIRTY {
            self.ops.write_back(io).await?;
        }
        // One step stays in one slice.
        let first = offset >> bits;
        let row = image.cache.slice() / 8 / image.layout.words() as u64;
        let last = (offset + len).div_ceil(1 << bits).min((first / row + 1) * row).min(first + STEP);
        let claim = Claim::of(io, image, first..last).await?;
        let slot = self.slot_of(io, offset).await?;
        let wanted = offset..(offset + len).min(last << bits);
        let Some(plan) = self.plan(slot, wanted.clone())? else { return Ok(0) };
        let (host, taken) = match plan.existing {
            Some(host) => (host, None),
            None => {
                let clusters = self.ops.take_clusters(io, plan.old.len() as u64).await?;
                (clusters.start << bits, Some(Taken { image, clusters }))
            }
        };
        let count = taken.as_ref().map_or(1, |taken| taken.clusters.end - taken.clusters.start);
        let end = wanted.end.min((first + count) << bits);
        // The byte of the disk that the first byte of the first cluster is.
        let origin = first << bits;
        let to_host = |at: u64| host + (at - origin);
        let span = plan.span.start..plan.span.end.min((first + count) << bits);
        if !plan.blank || plan.existing.is_some() {
            self.copy_up(io, span.start..offset, to_host(span.start)).await?;
            self.copy_up(io, end..span.end, to_host(end)).await?;
        }
        let done = end - offset;
        self.ops.file.write(io, data.part(0, done), done, to_host(offset), false).await?;
        image.grown(to_host(end));
        self.link(io, slot, &plan, (span, offset..end), host, count).await?;
        if let Some(taken) = taken {
            // They are the disk's now.
            #[expect(clippy::mem_forget, reason = "they are in use")]
            std::mem::forget(taken);
        }
        drop(claim);
        Ok(done)
    }

    /// The slot of the entry for `offset`, whose table is made where there is none.
    pub(super) async fn slot_of(&self, io: &Io<R>, offset: u64) -> Result<Slot, Errno> {
        let image = self.image();
        loop {
            match image.slot(offset) {
                Err(()) => return Err(Errno::EIO),
                Ok(Some(slot)) if image.entry(slot).is_some() => return Ok(slot),
                Ok(Some(slot)) => self.ops.load(io, slot.tag).await?,
                Ok(None) => {
                    let clusters = self.ops.take_clusters(io, 1).await?;
                    let mut state = image.state();
                    let (index, _) = image.index(offset);
                    if image.table(index) == Some(0) {
                        image.set_table(&mut state, index, clusters.start << image.layout.cluster_bits);
                    } else {
                        // Somebody else was faster, and this one reads zero still.
                        state.reserve.push(clusters);
                    }
                }
            }
        }
    }

    /// What is to be done for `wanted`, whose clusters are claimed. `None`: nothing, the first is the disk's own by now.
    fn plan(&self, slot: Slot, wanted: Range<u64>) -> Result<Option<Plan>, Errno> {
        let (image, layout) = (self.image(), self.image().layout);
        let (bits, unit) = (layout.cluster_bits, layout.unit());
        let first = wanted.start >> bits;
        let mut plan = Plan { span: 0..0, old: Vec::new(), existing: None, blank: true };
        for number in first..wanted.end.div_ceil(1 << bits) {
            let at = slot.at + (number - first) as usize * layout.words();
            let Some(entry) = image.entry(Slot { at, ..slot }) else { break };
            let cluster = number << bits..(number + 1) << bits;
            let part = wanted.start.max(cluster.start)..wanted.end.min(cluster.end);
            let within = part.start - cluster.start..part.end - cluster.start;
            let touched = layout.touched_parts(within);
            if layout.is_own(entry) && (!layout.extended || entry.bitmap as u32 & touched == touched) {
                break;
            }
            let units = part.start & !(unit - 1)..part.end.next_multiple_of(unit);
            // A cluster that is partly there is a step of its own; so is one whose other parts have to move.
            let (span, alone) = match (layout.holds(entry).is_empty(), layout.is_own(entry)) {
                (true, _) => (units, false),
                (false, true) => (units, true),
                (false, false) => (cluster.clone(), layout.extended),
            };
            if alone && !plan.old.is_empty() {
                break;
            }
            // What is there already of the first unit, or the last, is not copied: others may be writing to it.
            let is_here = |at: u64| {
                let unit = layout.touched_parts(at - cluster.start..at - cluster.start + 1);
                layout.is_own(entry) && entry.bitmap as u32 & unit != 0
            };
            if plan.old.is_empty() {
                plan.span.start = if is_here(part.start) { part.start } else { span.start };
            }
            plan.span.end = if is_here(part.end - 1) { part.end } else { span.end };
            plan.blank &= self.reads_zero(entry, &cluster);
            plan.existing = (alone && layout.is_own(entry)).then(|| layout.host(entry)).flatten();
            plan.old.push(entry);
            if alone {
                break;
            }
        }
        Ok((!plan.old.is_empty()).then_some(plan))
    }

    /// Whether a cluster with this entry reads zero as a whole.
    fn reads_zero(&self, entry: Entry, cluster: &Range<u64>) -> bool {
        let layout = self.image().layout;
        match (layout.place(entry, 0), layout.extended) {
            (Some(Place::Below), false) => !self.has_below(cluster.start),
            (Some(Place::Zero), false) => true,
            (_, false) => false,
            (_, true) => entry.bitmap as u32 == 0 && entry.word == 0 && !self.has_below(cluster.start),
        }
    }

    /// Brings what the disk reads at `from` to `host` in the image.
    async fn copy_up(&self, io: &Io<R>, from: Range<u64>, host: u64) -> Result<(), Errno> {
        let mut at = from.start;
        while at < from.end {
            let step = (from.end - at).min(Pool::<R>::BYTES as u64);
            let buffer = self.ops.copies.take(io).await?;
            let whole = [buffer.iovec(step as usize)];
            Box::pin(self.read(io, Data::of(&whole), step, at)).await?;
            self.ops.file.write(io, Data::of(&whole), step, host + (at - from.start), false).await?;
            self.image().grown(host + (at - from.start) + step);
            at += step;
        }
        Ok(())
    }

    /// Has the tables point at what was written: `count` clusters from `host` on.
    async fn link(
        &self,
        io: &Io<R>,
        slot: Slot,
        plan: &Plan,
        (span, data): (Range<u64>, Range<u64>),
        host: u64,
        count: u64,
    ) -> Result<(), Errno> {
        let (image, layout) = (self.image(), self.image().layout);
        let origin = span.start >> layout.cluster_bits << layout.cluster_bits;
        loop {
            {
                let mut state = image.state();
                if image.entry(slot).is_some() {
                    for (number, old) in plan.old.iter().take(count as usize).enumerate() {
                        let start = origin + ((number as u64) << layout.cluster_bits);
                        let part =
                            span.start.max(start) - start..span.end.min(start + layout.cluster()) - start;
                        let data =
                            data.start.max(start) - start..data.end.min(start + layout.cluster()) - start;
                        // What the request touches of its first and last unit is whole now: the rest was copied, or was there.
                        let here = layout.whole_parts(part) | layout.touched_parts(data);
                        let (before, zero) = match (plan.existing, layout.holds(*old).is_empty()) {
                            (Some(_), _) | (None, true) => (old.bitmap as u32, (old.bitmap >> 32) as u32),
                            // All of it has moved.
                            (None, false) => (0, 0),
                        };
                        let at = host + ((number as u64) << layout.cluster_bits);
                        let entry = layout.at(at, before | here, zero);
                        let place = Slot { at: slot.at + number * layout.words(), ..slot };
                        image.set_entry(&mut state, place, entry);
                        let holds = layout.holds(*old);
                        if plan.existing.is_none() && !holds.is_empty() {
                            state.unmapped.push(holds);
                        }
                    }
                    return Ok(());
                }
            }
            self.ops.load(io, slot.tag).await?;
        }
    }
}
