//! What time it is on a worker, and what it spent it on.

#![forbid(unsafe_code)]

use crate::stats::{Clock, Count, WorkerStats};
use std::cell::Cell;
use std::sync::Arc;

/// A worker's clock. A reading costs some 8 ns, so whoever can do with the [last one](Self::recent) takes that: whatever a
/// worker begins it begins right after something that it has timed.
pub(super) struct Meter {
    clock: Clock,
    recent: Cell<u64>,
    /// What was accounted for.
    since: Cell<u64>,
    stats: Arc<WorkerStats>,
}

impl Meter {
    pub fn new(stats: Arc<WorkerStats>) -> Meter {
        let clock = Clock::get();
        let now = clock.now();
        Meter { clock, recent: Cell::new(now), since: Cell::new(now), stats }
    }

    /// The time now, in nanoseconds.
    #[inline]
    pub fn read(&self) -> u64 {
        let now = self.clock.now();
        self.recent.set(now);
        now
    }

    /// The time when it was last read.
    #[inline]
    pub fn recent(&self) -> u64 {
        self.recent.get()
    }

    /// The time since this was last said was spent on that.
    #[inline]
    pub fn spent(&self, on: impl Fn(&WorkerStats) -> &Count) {
        let now = self.read();
        on(&self.stats).add(now.saturating_sub(self.since.replace(now)));
    }
}
