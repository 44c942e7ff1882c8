//! Losses of acknowledged writes: everybody who flushes a volume hears of each, whoever found it.
//!
//! A store tells of lost writes once. The kernel reports a failed write-back to one `fdatasync(2)` or `RWF_DSYNC` write of
//! an open file, which all workers and exports share; an NBD server reports it on one connection. The next flush succeeds
//! without the data. So whoever is told [reports](Losses::report) it here, in the volume's **epoch** of losses, and each
//! client of the volume has a [`Flusher`] that remembers which epoch it last heard of: its flush succeeds only if there was
//! no loss since.
//!
//! Two syncs may overlap, and the one that the store tells may be the one that we hear last. So a sync that succeeded
//! [settles](Losses::settle) before it is acknowledged: it waits for those that were with the store when it came back. One
//! that begins later cannot have been told in its place.
//!
//! A write may be lost before it is acknowledged, and the loss told while we still have it. Its acknowledgement would then
//! come after the loss that everybody heard of, and the next flush would vouch for it; so it [counts](Losses::count) as
//! another loss.
//!
//! Costs two uncontended locks for each sync (a flush, a durable write), next to what the store takes for one, and two loads
//! of a cache line that hardly ever changes for each write.

#![forbid(unsafe_code)]

use super::until::until;
use crate::block::Errno;
use crate::ring::{Io, Ring};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One volume's losses, shared by all workers.
#[derive(Debug, Default)]
pub(super) struct Losses {
    epoch: AtomicU64,
    /// What the store told; the epoch moves with each of these.
    reports: AtomicU64,
    syncs: Mutex<Syncs>,
}

/// Syncs that the store has.
#[derive(Debug, Default)]
struct Syncs {
    /// The ticket of the next one.
    next: u64,
    /// Tickets of those under way; at most one for each request in flight.
    running: Vec<u64>,
}

/// A sync under way, until it is dropped.
pub(super) struct Sync<'a> {
    losses: &'a Losses,
    ticket: u64,
}

impl Drop for Sync<'_> {
    fn drop(&mut self) {
        let ticket = self.ticket;
        self.losses.syncs().running.retain(|running| *running != ticket);
    }
}

impl Losses {
    /// Losses so far.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// How often the store told of lost writes.
    pub fn reports(&self) -> u64 {
        self.reports.load(Ordering::SeqCst)
    }

    /// The store told of lost writes. To be called while the [`Sync`] that it told is under way.
    pub fn report(&self) {
        self.reports.fetch_add(1, Ordering::SeqCst);
        self.epoch.fetch_add(1, Ordering::SeqCst);
    }

    /// Everybody hears of one more loss: of a write that was acknowledged after the store had told of it.
    pub fn count(&self) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
    }

    /// A flush or a durable write is handed to the store.
    pub fn begin(&self) -> Sync<'_> {
        let mut syncs = self.syncs();
        let ticket = syncs.next;
        syncs.next += 1;
        syncs.running.push(ticket);
        Sync { losses: self, ticket }
    }

    /// Waits until no sync is under way that has begun before the call, and says how many losses there are then. The
    /// caller's own must be over.
    ///
    /// # Errors
    /// `ERESTART` when the slot is interrupted, and the patience of [`until`] is over: another sync may be with a server that does not
    /// answer.
    pub async fn settle<R: Ring>(&self, io: &Io<R>) -> Result<u64, Errno> {
        let limit = self.syncs().next;
        // Where it is interrupted, its own part is done: where the others' come from a store that works, it is not to fail.
        until(io, || (!self.syncs().running.iter().any(|ticket| *ticket < limit)).then_some(())).await?;
        Ok(self.epoch())
    }

    fn syncs(&self) -> MutexGuard<'_, Syncs> {
        // Each change is one push or retain: nobody leaves one half done.
        self.syncs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One client of a volume that flushes: which losses it has heard of.
#[derive(Debug, Default)]
pub struct Flusher {
    heard: AtomicU64,
    /// Writes of its may have been lost before our time, of which nobody can know.
    doubtful: AtomicBool,
}

impl Flusher {
    /// One that has heard of all losses up to `epoch`.
    pub(super) fn new(epoch: u64, doubtful: bool) -> Flusher {
        Flusher { heard: AtomicU64::new(epoch), doubtful: AtomicBool::new(doubtful) }
    }

    /// The epoch it last heard of, when a flush of its begins.
    pub(super) fn heard(&self) -> u64 {
        self.heard.load(Ordering::Relaxed)
    }

    /// It is told of all losses up to `epoch`, by a flush that fails; or they do not concern it.
    pub(super) fn hear(&self, epoch: u64) {
        self.heard.fetch_max(epoch, Ordering::Relaxed);
        self.doubtful.store(false, Ordering::Relaxed);
    }

    /// Whether its next flush fails: writes that an earlier process acknowledged to its client may be lost.
    pub(super) fn set_doubtful(&self, doubtful: bool) {
        self.doubtful.store(doubtful, Ordering::Relaxed);
    }

    /// See [`set_doubtful`](Self::set_doubtful).
    pub(super) fn is_doubtful(&self) -> bool {
        self.doubtful.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_syncs_that_overlap_are_waited_for() {
        let losses = Losses::default();
        let first = losses.begin();
        let second = losses.begin();
        drop(second);
        assert_eq!(losses.syncs().running, [0]);
        drop(first);
        assert!(losses.syncs().running.is_empty());
        assert_eq!(losses.syncs().next, 2);
    }
}
