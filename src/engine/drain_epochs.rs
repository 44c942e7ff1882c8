//! When every request that was admitted before a moment is over.
//!
//! A shrinking volume must know: a write admitted under the old size, carried out after the store was cut, would
//! make the store grow again. Nothing waits for anything while requests are served: each is counted in the
//! generation that it came in, by this worker alone, and whoever needs to know starts a new generation and waits
//! until the old one is empty.

use crate::ring::{Io, Ring};
use std::cell::Cell;
use std::time::{Duration, Instant};

/// Between two looks at whether the old generation is empty.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Requests of one worker at one volume, by generation.
#[derive(Default)]
pub(super) struct DrainEpochs {
    /// The generation that requests enter now: 0 or 1.
    generation: Cell<usize>,
    admitted: [Cell<u32>; 2],
}

/// A request that was admitted, until it is over.
pub(super) struct EpochGuard<'a> {
    count: &'a Cell<u32>,
}

impl Drop for EpochGuard<'_> {
    fn drop(&mut self) {
        self.count.set(self.count.get() - 1);
    }
}

impl DrainEpochs {
    /// Counts a request for as long as the answer lives.
    pub fn enter(&self) -> EpochGuard<'_> {
        let count = &self.admitted[self.generation.get()];
        count.set(count.get() + 1);
        EpochGuard { count }
    }

    /// Waits until every request is over that was admitted before the call. False when that takes longer than
    /// `limit`.
    pub async fn pass<R: Ring>(&self, io: &Io<R>, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        // What an earlier call gave up on comes first: requests may only enter a generation that is empty.
        let spare = 1 - self.generation.get();
        if !self.empties(spare, io, deadline).await {
            return false;
        }
        self.generation.set(spare);
        self.empties(1 - spare, io, deadline).await
    }

    async fn empties<R: Ring>(&self, generation: usize, io: &Io<R>, deadline: Instant) -> bool {
        while self.admitted[generation].get() > 0 {
            if Instant::now() >= deadline {
                return false;
            }
            io.sleep(POLL_INTERVAL).await;
        }
        true
    }
}
