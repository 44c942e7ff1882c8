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
//! Costs two uncontended locks for each sync (a flush, a durable write), next to what the store takes for one; other
//! requests never come here.

#![forbid(unsafe_code)]

use super::Volume;
use crate::block::Errno;
use crate::ring::{Io, Ring};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The first wait for syncs that overlap; each is twice as long as the one before it.
const FIRST_LOOK: Duration = Duration::from_micros(20);

/// The longest wait between two looks.
const LONGEST_LOOK: Duration = Duration::from_millis(1);

/// One volume's losses, shared by all workers.
#[derive(Debug, Default)]
pub(super) struct Losses {
    epoch: AtomicU64,
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

    /// The store told of lost writes. To be called while the [`Sync`] that it told is under way.
    pub fn report(&self) {
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
    /// `ERESTART` when the slot is interrupted: another sync may be with a server that does not answer.
    pub async fn settle<R: Ring>(&self, io: &Io<R>) -> Result<u64, Errno> {
        let limit = self.syncs().next;
        let mut look = FIRST_LOOK;
        while self.syncs().running.iter().any(|ticket| *ticket < limit) {
            if io.is_interrupted() {
                return Err(Errno::ERESTART);
            }
            io.rest_for(look).await;
            look = (look * 2).min(LONGEST_LOOK);
        }
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
    /// The epoch it last heard of, when a flush of its begins.
    pub(super) fn heard(&self) -> u64 {
        self.heard.load(Ordering::Relaxed)
    }

    /// It is told of all losses up to `epoch`, by a flush that fails; or they do not concern it.
    pub(super) fn hear(&self, epoch: u64) {
        self.heard.fetch_max(epoch, Ordering::Relaxed);
        self.doubtful.store(false, Ordering::Relaxed);
    }

    /// Its next flush fails: writes that an earlier process acknowledged to its client may be lost.
    fn doubt(&self) {
        self.doubtful.store(true, Ordering::Relaxed);
    }

    /// See [`doubt`](Self::doubt).
    pub(super) fn is_doubtful(&self) -> bool {
        self.doubtful.load(Ordering::Relaxed)
    }
}

/// The flushers of an export, one for each of its queues. They live as long as the export, however often its client
/// disconnects, stops its queues or starts them again.
#[derive(Debug)]
pub struct Flushers {
    queues: Box<[Flusher]>,
    /// Which of them have served since this process began.
    used: Box<[AtomicBool]>,
    running: AtomicUsize,
}

impl Flushers {
    /// Of a new export of `volume` with so many queues: losses before its time do not concern it.
    pub fn new(volume: &Volume, queues: u16) -> Flushers {
        let flushers = Flushers {
            queues: (0..queues).map(|_| Flusher::default()).collect(),
            used: (0..queues).map(|_| AtomicBool::default()).collect(),
            running: AtomicUsize::new(0),
        };
        flushers.renew(volume);
        flushers
    }

    /// Of queue `index`.
    ///
    /// # Panics
    /// When the export has no such queue.
    pub fn queue(&self, index: usize) -> &Flusher {
        &self.queues[index]
    }

    /// One that has heard of what all of these have heard of: for a flush on behalf of the client, which does not hear of how
    /// that ends.
    pub fn on_behalf(&self) -> Flushers {
        let heard = self.queues.iter().map(Flusher::heard).min().unwrap_or(0);
        let queues = [Flusher { heard: AtomicU64::new(heard), ..Flusher::default() }];
        Flushers { queues: queues.into(), used: Box::default(), running: AtomicUsize::new(0) }
    }

    /// Queue `index` of a virtual machine starts. At the beginning of its rings, and as the only one, it belongs to a driver
    /// that has written nothing yet: losses before its time do not concern it, on any queue.
    ///
    /// One that goes on may have been served by another process before. Where nobody can vouch for what that acknowledged
    /// (`doubtful`), the next flush of each queue fails. Whether that is so.
    ///
    /// # Panics
    /// When the export has no such queue.
    pub fn start(&self, volume: &Volume, index: usize, at_beginning: bool, doubtful: bool) -> bool {
        let first = self.running.fetch_add(1, Ordering::Relaxed) == 0;
        if at_beginning && first {
            self.renew(volume);
        }
        let doubt = !self.used[index].swap(true, Ordering::Relaxed) && !at_beginning && doubtful;
        if doubt {
            self.queues.iter().for_each(Flusher::doubt);
        }
        doubt
    }

    /// A queue has stopped.
    pub fn stop(&self) {
        self.running.fetch_sub(1, Ordering::Relaxed);
    }

    fn renew(&self, volume: &Volume) {
        let epoch = volume.losses().map_or(0, Losses::epoch);
        self.queues.iter().for_each(|flusher| flusher.hear(epoch));
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
