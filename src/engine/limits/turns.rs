//! Whose turn it is among queues that wait for the same limits.
//!
//! Start-time fair queueing: each queue counts the time that the limits took for its requests, and who has had less goes first.
//! A queue that shares its volume's part with others of that volume counts more for each request, so that every volume of a
//! group has the same, however many queues it has. Who was away does not save up for later: it begins where the others are, but
//! for a [credit](CREDIT).
//!
//! Nobody is waited for for long: where the limits have had room for some time ([`GRACE`]), because the one whose turn it is has
//! a worker that is held up, anybody goes. That costs no throughput, since there is room for twice as much.

#![forbid(unsafe_code)]

use super::bucket::TICKS;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const MILLISECOND: u64 = 1_000_000 * TICKS;

/// How far a queue may get ahead of one that waits, so that workers need not take turns request by request.
const LEAD: u64 = 2 * MILLISECOND;

/// What a queue keeps that did not use its part, because its worker was held up for a moment.
const CREDIT: u64 = 100 * MILLISECOND;

/// How long there may be room before it is anybody's: half of what a bucket has at the least.
const GRACE: u64 = 50 * MILLISECOND;

/// Reads and writes that no limit concerns together wait apart.
pub type Lane = usize;

/// One volume among those that share limits.
#[derive(Debug, Default)]
pub struct Member {
    /// Queues of its that wait now.
    waiting: AtomicU32,
    /// Nanoseconds that its queues have waited so far, all together.
    pub throttled: AtomicU64,
}

/// One queue.
#[derive(Debug, Default)]
pub struct Party {
    pub member: Arc<Member>,
    /// The lane that it waits in, from 1; 0: it does not wait.
    waits_in: AtomicU8,
    /// What the limits took for it, in ticks, in each lane.
    used: [AtomicU64; 2],
}

type Parties = Arc<[Arc<Party>]>;

/// All that share a set of limits.
#[derive(Debug, Default)]
pub struct Turns {
    parties: Mutex<Parties>,
    /// Changes with `parties`.
    version: AtomicU64,
    waiting: AtomicUsize,
    /// Where the last to go began, in ticks of use.
    reached: [AtomicU64; 2],
}

/// One worker's copy of the list: it is locked only when somebody came or went.
#[derive(Debug, Default)]
pub struct Peers {
    version: u64,
    parties: Parties,
}

impl Turns {
    fn lock(&self) -> MutexGuard<'_, Parties> {
        self.parties.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Arc<Party>>)) {
        let mut parties = self.lock();
        let mut list = parties.to_vec();
        change(&mut list);
        *parties = list.into();
        self.version.fetch_add(1, Ordering::Release);
    }

    /// A queue of this volume comes.
    pub fn join(&self, member: &Arc<Member>) -> Arc<Party> {
        let party = Arc::new(Party { member: member.clone(), ..Party::default() });
        self.change(|list| list.push(party.clone()));
        party
    }

    /// It goes, and does not wait any more.
    pub fn part(&self, party: &Arc<Party>) {
        self.go_on(party);
        self.change(|list| list.retain(|other| !Arc::ptr_eq(other, party)));
    }

    /// It waits from now on, in this lane.
    pub fn wait(&self, party: &Party, lane: Lane) {
        if party.waits_in.swap(lane as u8 + 1, Ordering::Relaxed) == 0 {
            party.member.waiting.fetch_add(1, Ordering::Relaxed);
            self.waiting.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// It does not wait any more.
    pub fn go_on(&self, party: &Party) {
        if party.waits_in.swap(0, Ordering::Relaxed) != 0 {
            party.member.waiting.fetch_sub(1, Ordering::Relaxed);
            self.waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Where its use stands, or would if it had not been away.
    fn stands_at(&self, party: &Party, lane: Lane) -> u64 {
        let reached = self.reached[lane].load(Ordering::Relaxed);
        party.used[lane].load(Ordering::Relaxed).max(reached.saturating_sub(CREDIT))
    }

    /// Whether a queue may go, now that the limits have had room for so many ticks: no other one waits in its lane that has had
    /// less. Costs a comparison when nobody else waits, and otherwise a look at each queue.
    pub fn may_go(&self, party: &Arc<Party>, lane: Lane, open_for: u64, peers: &mut Peers) -> bool {
        let own = usize::from(party.waits_in.load(Ordering::Relaxed) != 0);
        if open_for >= GRACE || self.waiting.load(Ordering::Relaxed) <= own {
            return true;
        }
        if peers.version != self.version.load(Ordering::Acquire) {
            let parties = self.lock();
            *peers = Peers { version: self.version.load(Ordering::Relaxed), parties: parties.clone() };
        }
        let least = self.stands_at(party, lane).saturating_sub(LEAD);
        let waits = |other: &Party| usize::from(other.waits_in.load(Ordering::Relaxed)) == lane + 1;
        let mut others = peers.parties.iter().filter(|other| !Arc::ptr_eq(other, party));
        !others.any(|other| waits(other) && self.stands_at(other, lane) < least)
    }

    /// Counts what the limits took for a request that goes.
    pub fn count(&self, party: &Party, lane: Lane, ticks: u64) {
        let begin = self.stands_at(party, lane);
        let own = u32::from(party.waits_in.load(Ordering::Relaxed) == 0);
        let share = party.member.waiting.load(Ordering::Relaxed) + own;
        let used = begin.saturating_add(ticks.saturating_mul(share.max(1).into()));
        // Only the queue's own worker writes it.
        party.used[lane].store(used, Ordering::Relaxed);
        self.reached[lane].fetch_max(begin, Ordering::Relaxed);
    }
}
