//! One queue's way past its volume's limits, on the worker that serves it.

#![forbid(unsafe_code)]

use super::Limits;
use super::bucket::TICKS;
use super::group::Cost;
use super::turns::{Party, Peers};
use crate::block::Op;
use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The shortest wait, in nanoseconds: a fast disk's requests come in batches of as many as this allows, and not each with a timer
/// of its own. The limits lose nothing by it, since they have room for more.
const LEAST_WAIT: u64 = 500_000;

/// The longest: then it looks again, and the time that it has waited is counted.
const MOST_WAIT: u64 = 1_000_000_000;

/// See the module. All times are those of the ring, in nanoseconds.
pub struct Throttle {
    limits: Arc<Limits>,
    party: Arc<Party>,
    peers: RefCell<Peers>,
    waits: Cell<Option<Wait>>,
}

#[derive(Clone, Copy)]
struct Wait {
    /// Up to when it is counted.
    counted: u64,
    /// When to look again.
    until: u64,
}

impl Throttle {
    pub(super) fn new(limits: &Arc<Limits>) -> Throttle {
        let party = limits.group.turns.join(&limits.member);
        Throttle { limits: limits.clone(), party, peers: RefCell::default(), waits: Cell::new(None) }
    }

    /// Whether the queue has to ask: there are limits, or there were and it waits. One load where there are none.
    pub fn concerns(&self) -> bool {
        self.limits.group.is_limited() || self.waits.get().is_some()
    }

    /// When it is to ask again; `None` if nothing waits here.
    pub fn waits_until(&self) -> Option<u64> {
        self.waits.get().map(|wait| wait.until)
    }

    /// Lets a request go at `now`, and counts it; or has it wait until [`waits_until`](Self::waits_until).
    ///
    /// As in QEMU, a flush goes always. A write-zeroes is a write of all its bytes; a discard is a write operation of none, since
    /// a guest that trims its file system would otherwise wait for hours, with all that it asked for afterwards.
    pub fn admit(&self, now: u64, op: Op, bytes: u64) -> bool {
        let cost = match op {
            Op::Read => Cost { write: false, bytes },
            Op::Write | Op::WriteZeroes => Cost { write: true, bytes },
            Op::Discard => Cost { write: true, bytes: 0 },
            Op::Flush => return self.go(now),
        };
        let (group, tick) = (&self.limits.group, now.saturating_mul(TICKS));
        if !group.is_limited() {
            return self.go(now);
        }
        let (opens_at, lane) = (group.opens_at(cost), group.lane(cost));
        let turn = |open_for| group.turns.may_go(&self.party, lane, open_for, &mut self.peers.borrow_mut());
        if !tick.checked_sub(opens_at).is_some_and(turn) {
            let until = opens_at.div_ceil(TICKS).clamp(now + LEAST_WAIT, now + MOST_WAIT);
            self.count(now);
            group.turns.wait(&self.party, lane);
            self.waits.set(Some(Wait { counted: now, until }));
            return false;
        }
        let ticks = group.add(tick, cost);
        group.turns.count(&self.party, lane, ticks);
        self.go(now)
    }

    /// Nothing waits here any more.
    pub fn leave(&self, now: u64) {
        if self.waits.get().is_some() {
            self.go(now);
        }
    }

    /// Something has changed: what waits is to ask again at once.
    pub fn look_again(&self) {
        self.waits.set(self.waits.get().map(|wait| Wait { until: 0, ..wait }));
    }

    fn go(&self, now: u64) -> bool {
        self.count(now);
        self.limits.group.turns.go_on(&self.party);
        self.waits.set(None);
        true
    }

    /// Counts the time that it has waited.
    fn count(&self, now: u64) {
        if let Some(Wait { counted, .. }) = self.waits.get() {
            let waited = now.saturating_sub(counted);
            self.party.member.throttled.fetch_add(waited, Ordering::Relaxed);
        }
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.limits.group.turns.part(&self.party);
    }
}
