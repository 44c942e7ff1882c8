//! Zeroes and discards: clusters given back, and marked to read zero where something lies below.

#![forbid(unsafe_code)]

use super::channel::Qcow2Channel;
use super::entry::{Entry, Place};
use super::write::Claim;
use crate::block::{Data, Errno};
use crate::engine::node::Leaf;
use crate::ring::{Io, Ring, zeroes};

/// What a look and a change of an entry take of a worker's time, in copies of bytes.
const STEP_WORK: u32 = 16 << 10;

impl<R: Ring> Qcow2Channel<R> {
    /// Makes the range read zero. With `unmap` its clusters go back to the image.
    pub(super) async fn zero(&self, io: &Io<R>, offset: u64, len: u64, unmap: bool) -> Result<(), Errno> {
        if !self.image().layout.zero_flag {
            // The edge writes them.
            return Err(Errno::EOPNOTSUPP);
        }
        let layout = self.image().layout;
        let unit = layout.unit();
        let end = offset + len;
        let mut at = offset;
        while at < end {
            // A range may have very many clusters.
            io.turn(STEP_WORK).await;
            let (place, step) = self.look(io, at, end - at).await?;
            let whole = at.is_multiple_of(unit) && step >= unit;
            match place {
                Place::Zero => at += step,
                Place::Below if !self.has_below(at) => at += step,
                Place::At(host) if !unmap && self.is_own_at(at) => {
                    let step = step.min(layout.cluster() - (at & (layout.cluster() - 1)));
                    self.ops.file.write_zeroes(io, host, step, false).await?;
                    at += step;
                }
                _ if whole => {
                    let step = (step & !(unit - 1)).min(layout.cluster() - (at & (layout.cluster() - 1)));
                    if !self.unmap(io, at, step, true).await? {
                        self.write_some_zeroes(io, at, step).await?;
                    }
                    at += step;
                }
                _ => {
                    let step = (unit - (at & (unit - 1))).min(end - at).min(step);
                    self.write_some_zeroes(io, at, step).await?;
                    at += step;
                }
            }
        }
        Ok(())
    }

    /// Gives back the clusters that lie wholly in the range. Where something lies below, they read zero from then on: a
    /// discard never shows again what was there before.
    pub(super) async fn discard(&self, io: &Io<R>, offset: u64, len: u64) -> Result<(), Errno> {
        let layout = self.image().layout;
        let unit = layout.unit();
        let end = (offset + len) & !(unit - 1);
        let mut at = offset.next_multiple_of(unit);
        while at < end {
            // A range may have very many clusters.
            io.turn(STEP_WORK).await;
            let (place, step) = self.look(io, at, end - at).await?;
            let step = step.min(layout.cluster() - (at & (layout.cluster() - 1)));
            match place {
                Place::At(_) | Place::Packed { .. } if layout.zero_flag || !self.has_below(at) => {
                    self.unmap(io, at, step & !(unit - 1), self.has_below(at)).await?;
                }
                _ => {}
            }
            at += step;
        }
        Ok(())
    }

    fn is_own_at(&self, offset: u64) -> bool {
        let image = self.image();
        let entry = image.slot(offset).ok().flatten().and_then(|slot| image.entry(slot));
        entry.is_some_and(|entry| image.layout.is_own(entry))
    }

    async fn write_some_zeroes(&self, io: &Io<R>, offset: u64, len: u64) -> Result<(), Errno> {
        let mut done = 0;
        while done < len {
            let part = [zeroes(len - done)];
            let step = part[0].len() as u64;
            self.write(io, Data::of(&part), step, offset + done, false).await?;
            done += step;
        }
        Ok(())
    }

    /// Takes whole units of one cluster away, which read zero then, or (`marked`: not) what a cluster reads that is nowhere.
    /// False where they cannot go without the rest of their cluster.
    async fn unmap(&self, io: &Io<R>, offset: u64, len: u64, marked: bool) -> Result<bool, Errno> {
        let (image, layout) = (self.image(), self.image().layout);
        let number = offset >> layout.cluster_bits;
        let _claim = Claim::of(io, image, number..number + 1).await?;
        if image.state().dirty.len() >= super::flush::MOST_DIRTY {
            self.ops.write_back(io).await?;
        }
        loop {
            let slot = self.slot_of(io, offset).await?;
            let mut state = image.state();
            let Some(old) = image.entry(slot) else { continue };
            let start = number << layout.cluster_bits;
            let parts = layout.whole_parts(offset - start..offset + len - start);
            let Some((new, freed)) = without(layout, old, parts, marked) else { return Ok(false) };
            if !image.set_entry(&mut state, slot, new) {
                continue;
            }
            if freed {
                state.unmapped.push(layout.holds(old));
            }
            return Ok(true);
        }
    }
}

/// The entry without these parts, and whether its cluster is free then. `None`: as it is.
fn without(layout: super::entry::Layout, old: Entry, parts: u32, marked: bool) -> Option<(Entry, bool)> {
    let held = !layout.holds(old).is_empty();
    if !layout.extended {
        let new = if marked { layout.zero() } else { Entry::default() };
        return (parts & 1 == 1).then_some((new, held));
    }
    let (here, zero) = (old.bitmap as u32, (old.bitmap >> 32) as u32);
    if layout.packed(old).is_some() {
        // A compressed cluster goes as a whole, or not.
        return (parts == u32::MAX).then_some((layout.zero(), true));
    }
    let (here_after, zero_after) = (here & !parts, zero | parts);
    if here_after == 0 {
        let bitmap = u64::from(zero_after) << 32;
        return Some((Entry { word: 0, bitmap }, held));
    }
    let host = layout.host(old)?;
    Some((Entry { word: old.word, ..layout.at(host, here_after, zero_after) }, false))
}
