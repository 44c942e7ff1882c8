//! How a vring ends, and what becomes of the requests that would not end by themselves.
//!
//! A request that the kernel has is waited for in any case: its memory must not go away under it. One that waits for
//! its store to come back may wait for ever, and nobody is to wait with it.

#![forbid(unsafe_code)]

use super::Vring;
use crate::frontend::Queue;

/// Why a vring stops, and so what becomes of the requests that wait for their store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopMode {
    /// It goes on at once, with other settings: they go on with it.
    Restart,
    /// The VMM asked for it (GET_VRING_BASE), and will take what was not completed for lost: they fail.
    Quiesce,
    /// The VMM is gone, or we are. Where they are noted they stay so, and whoever comes next carries them out again;
    /// otherwise they fail.
    Disconnect,
}

/// What a vring that has stopped leaves behind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stopped {
    /// Where the next request would be taken from.
    pub next_avail: u16,
    /// Heads that were taken and not completed, the first first: for [`VringSetup`](super::VringSetup).
    pub unfinished: Vec<u16>,
}

impl Vring {
    /// Requests of a vring that has stopped are not to wait for their store any more. The worker sees to those that do
    /// ([`Core::interrupt`](crate::ring::Core::interrupt)).
    pub fn interrupt(&self, mode: StopMode) {
        self.stop();
        self.interrupted.set(Some(mode));
        if self.keeps() {
            // In the order in which they would have been taken.
            let mut again = self.resubmit.take();
            again.reverse();
            let last = self.next_sequence();
            self.unfinished.borrow_mut().extend(again.into_iter().map(|head| (last, head)));
        }
    }

    /// Whether it was [interrupted](Self::interrupt).
    pub fn is_interrupted(&self) -> bool {
        self.interrupted.get().is_some()
    }

    /// Whether requests that were interrupted are kept for whoever comes next, and do not fail.
    pub(super) fn keeps(&self) -> bool {
        match self.interrupted.get() {
            Some(StopMode::Restart) => true,
            Some(StopMode::Disconnect) => self.inflight_log.is_some(),
            Some(StopMode::Quiesce) | None => false,
        }
    }

    /// Forgets a request without completing it. Where it is noted as in flight, it stays so.
    pub(super) fn keep(&self, tag: u16, head: u16) {
        let sequence = self.end(tag, head);
        self.unfinished.borrow_mut().push((sequence, head));
    }

    /// What it leaves behind, once nothing is in flight.
    pub fn stopped(&self) -> Stopped {
        let mut unfinished = self.unfinished.take();
        let now = self.sequence.get();
        // The first is the one that was taken longest ago: the count wraps.
        unfinished.sort_by_key(|(sequence, _)| std::cmp::Reverse(now.wrapping_sub(*sequence)));
        let unfinished = unfinished.into_iter().map(|(_, head)| head).collect();
        Stopped { next_avail: self.next_avail.get(), unfinished }
    }
}
