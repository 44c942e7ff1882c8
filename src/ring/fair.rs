//! Slots that wait for something scarce, served group by group in turn: one that brings many waiters makes its own
//! wait, and nobody else's.

#![forbid(unsafe_code)]

use std::collections::VecDeque;

/// First come, first served within a group; groups in rotation. Allocates nothing once it has been as long as it gets.
#[derive(Default)]
pub(super) struct FairQueue {
    /// Groups that have waiters, the next to be served first.
    lanes: VecDeque<Lane>,
    /// Memory of lanes that are over.
    spare: Vec<VecDeque<Waiter>>,
    /// Whose turn has come, and what each was given, until they take it.
    granted: Vec<(u32, u32)>,
}

struct Lane {
    group: usize,
    waiters: VecDeque<Waiter>,
}

/// A slot and what it will use, in units of whoever keeps the queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Waiter {
    pub slot: u32,
    pub cost: u32,
}

impl FairQueue {
    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.lanes.is_empty()
    }

    /// Adds a waiter to its group. A slot waits once at a time.
    pub fn push(&mut self, group: usize, waiter: Waiter) {
        if let Some(lane) = self.lanes.iter_mut().find(|lane| lane.group == group) {
            lane.waiters.push_back(waiter);
            return;
        }
        let mut waiters = self.spare.pop().unwrap_or_default();
        waiters.push_back(waiter);
        self.lanes.push_back(Lane { group, waiters });
    }

    /// Gives the next waiter `token`. It is to be woken, and [accepts](Self::accept) then.
    pub fn grant(&mut self, token: u32) -> Option<Waiter> {
        let mut lane = self.lanes.pop_front()?;
        let waiter = lane.waiters.pop_front();
        self.put_back(lane);
        let waiter = waiter?;
        self.granted.push((waiter.slot, token));
        Some(waiter)
    }

    /// What `slot` was given, once.
    pub fn accept(&mut self, slot: u32) -> Option<u32> {
        let at = self.granted.iter().position(|(granted, _)| *granted == slot)?;
        Some(self.granted.swap_remove(at).1)
    }

    /// Forgets a slot that does not wait any more. What it was given and has not taken is for somebody else.
    pub fn leave(&mut self, group: usize, slot: u32) -> Option<u32> {
        if let Some(at) = self.lanes.iter().position(|lane| lane.group == group)
            && let Some(mut lane) = self.lanes.remove(at)
        {
            lane.waiters.retain(|waiter| waiter.slot != slot);
            self.put_back(lane);
        }
        self.accept(slot)
    }

    /// Queues a group behind the others, if it has waiters left.
    fn put_back(&mut self, lane: Lane) {
        if lane.waiters.is_empty() {
            self.spare.push(lane.waiters);
        } else {
            self.lanes.push_back(lane);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(all: &[(usize, u32)]) -> FairQueue {
        let mut queue = FairQueue::default();
        all.iter().for_each(|(group, slot)| queue.push(*group, Waiter { slot: *slot, cost: 0 }));
        queue
    }

    fn order(queue: &mut FairQueue) -> Vec<u32> {
        std::iter::from_fn(|| queue.grant(0)).map(|waiter| waiter.slot).collect()
    }

    #[test]
    fn groups_take_turns_and_slots_keep_their_order() {
        let mut queue = waiting(&[(1, 10), (1, 11), (1, 12), (1, 13), (2, 20), (3, 30), (3, 31)]);
        assert_eq!(order(&mut queue), [10, 20, 30, 11, 31, 12, 13]);
        assert!(queue.is_empty());
    }

    #[test]
    fn a_grant_is_taken_once_and_by_its_slot() {
        let mut queue = waiting(&[(1, 10), (1, 11)]);
        assert_eq!(queue.accept(10), None, "it is not its turn");
        assert_eq!(queue.grant(7).map(|waiter| waiter.slot), Some(10));
        assert_eq!(queue.accept(11), None);
        assert_eq!((queue.accept(10), queue.accept(10)), (Some(7), None));
    }

    #[test]
    fn who_leaves_is_passed_over_and_its_grant_comes_back() {
        let mut queue = waiting(&[(1, 10), (1, 11), (2, 20)]);
        assert_eq!(queue.leave(1, 10), None);
        queue.grant(7);
        assert_eq!(queue.leave(2, 20), Some(7), "the group that was not looked through comes first");
        assert_eq!(order(&mut queue), [11]);
    }

    #[test]
    fn lanes_are_used_again() {
        let mut queue = FairQueue::default();
        for round in 0..100 {
            queue.push(round as usize, Waiter { slot: round, cost: 0 });
            assert_eq!(queue.grant(0).map(|waiter| waiter.slot), Some(round));
            assert_eq!(queue.accept(round), Some(0));
        }
        assert_eq!((queue.spare.len(), queue.granted.len()), (1, 0));
    }
}
