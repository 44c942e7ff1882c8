//! What was acknowledged and not yet flushed: so that no flush succeeds over lost data.
//!
//! A server may keep acknowledged writes in memory until a flush. When it crashes they are gone, and the server
//! that we find after reconnecting knows nothing of them: its flush succeeds. So who may vouch for what is
//! counted here, once for a volume, whichever workers and exports use it:
//!
//! - Each loss of a connection starts a new *epoch*. A write belongs to the epoch in which it was **sent**, a
//!   connection to the epoch in which it was **made**.
//! - A flush may go over a connection only if that is no younger than the oldest unflushed write. Such a
//!   connection was there before the server that took the write was seen to fail, and is still there; so its
//!   server is the same one, or shares its cache, which is what `NBD_FLAG_CAN_MULTI_CONN` promises.
//! - Where the worker that flushes has no such connection left, the writes may be lost. The flush fails with
//!   `EIO`, they count as settled, and every other user of the volume hears of it
//!   ([`losses`](crate::engine::losses)).
//!
//! A write belongs to the epoch it was sent in and not to that of its acknowledgement, because acknowledgements
//! from a dead server may still lie in one socket when another one has already told its death.
//!
//! Not recorded: FUA writes, which are stable when acknowledged, and trims, whose loss harms nobody.
//!
//! Not seen: a server that is replaced between the first connection and the others, before any loss was
//! noticed. That takes a crash in the moments after the start.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What one volume has to flush.
#[derive(Debug, Default)]
pub struct UnflushedWrites {
    /// Losses of connections so far.
    epoch: AtomicU64,
    writes: Mutex<Writes>,
}

#[derive(Debug, Default)]
struct Writes {
    /// Writes acknowledged so far, those of a later moment having higher numbers.
    acknowledged: u64,
    /// Of each epoch with unflushed writes, the last of them; epochs in order.
    unflushed: Vec<(u64, u64)>,
}

/// What a flush has to cover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlushPoint {
    /// Writes up to this one.
    upto: u64,
    /// Era of the oldest; `None` when there is none.
    pub oldest: Option<u64>,
}

impl FlushPoint {
    /// Whether a connection made in `epoch` can vouch for it.
    pub fn covered_by(&self, epoch: u64) -> bool {
        self.oldest.is_none_or(|oldest| epoch <= oldest)
    }
}

impl UnflushedWrites {
    /// The most epochs told apart; the oldest two become one beyond that, which errs on the safe side.
    const MOST_EPOCHS: usize = 64;

    /// Now.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// A connection was lost.
    pub fn lost_connection(&self) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
    }

    /// A write sent in `epoch` was acknowledged. To be called before its request completes.
    pub fn acknowledge(&self, epoch: u64) {
        let mut writes = self.writes();
        writes.acknowledged += 1;
        let number = writes.acknowledged;
        let at = writes.unflushed.partition_point(|&(theirs, _)| theirs < epoch);
        match writes.unflushed.get_mut(at) {
            Some((theirs, last)) if *theirs == epoch => *last = number,
            _ => writes.unflushed.insert(at, (epoch, number)),
        }
        if writes.unflushed.len() > UnflushedWrites::MOST_EPOCHS {
            let (_, last) = writes.unflushed.remove(1);
            writes.unflushed[0].1 = writes.unflushed[0].1.max(last);
        }
    }

    /// What a flush that is sent now has to cover.
    pub fn flush_point(&self) -> FlushPoint {
        let writes = self.writes();
        FlushPoint { upto: writes.acknowledged, oldest: writes.unflushed.first().map(|&(epoch, _)| epoch) }
    }

    /// It is settled: a flush up to it succeeded, or nobody can vouch for it and everybody was told.
    pub fn flushed(&self, flush_point: FlushPoint) {
        self.writes().unflushed.retain(|&(_, last)| last > flush_point.upto);
    }

    fn writes(&self) -> MutexGuard<'_, Writes> {
        // Nothing in here panics half-way; and a list that was dropped would be worse than these.
        self.writes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_settles_what_came_before_it() {
        let unflushed = UnflushedWrites::default();
        assert_eq!(unflushed.flush_point().oldest, None);
        unflushed.acknowledge(0);
        let flush_point = unflushed.flush_point();
        assert_eq!(flush_point.oldest, Some(0));
        unflushed.acknowledge(0);
        unflushed.flushed(flush_point);
        assert_eq!(unflushed.flush_point().oldest, Some(0), "the second write came after the flush was sent");
        unflushed.flushed(unflushed.flush_point());
        assert_eq!(unflushed.flush_point().oldest, None);
    }

    #[test]
    fn only_an_old_connection_vouches_for_an_old_write() {
        let unflushed = UnflushedWrites::default();
        unflushed.acknowledge(unflushed.epoch());
        unflushed.lost_connection();
        assert!(unflushed.flush_point().covered_by(0));
        assert!(!unflushed.flush_point().covered_by(unflushed.epoch()));
        unflushed.acknowledge(unflushed.epoch());
        assert!(!unflushed.flush_point().covered_by(1), "the new write does not hide the old one");
        unflushed.flushed(unflushed.flush_point());
        unflushed.acknowledge(1);
        assert!(unflushed.flush_point().covered_by(1));
    }

    #[test]
    fn a_late_acknowledgement_belongs_to_its_own_era() {
        let unflushed = UnflushedWrites::default();
        unflushed.lost_connection();
        unflushed.acknowledge(1);
        unflushed.acknowledge(0);
        assert_eq!(unflushed.flush_point().oldest, Some(0));
    }

    #[test]
    fn the_list_stays_short_and_strict() {
        let unflushed = UnflushedWrites::default();
        for epoch in 0..10_000 {
            unflushed.acknowledge(epoch);
        }
        assert!(unflushed.writes().unflushed.len() <= UnflushedWrites::MOST_EPOCHS);
        assert_eq!(unflushed.flush_point().oldest, Some(0));
        unflushed.flushed(unflushed.flush_point());
        assert_eq!(unflushed.flush_point().oldest, None);
    }
}
