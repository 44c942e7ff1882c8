//! Who works on what: requests that change where a cluster is, and requests that still use where one was.

#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Clusters of the disk whose places are being changed: one request at a time for each. A few, looked through one by one.
#[derive(Debug, Default)]
pub struct Claims(Vec<Range<u64>>);

impl Claims {
    /// False where one of them is taken.
    pub fn take(&mut self, clusters: &Range<u64>) -> bool {
        let free = self.0.iter().all(|taken| taken.end <= clusters.start || clusters.end <= taken.start);
        if free {
            self.0.push(clusters.clone());
        }
        free
    }

    pub fn release(&mut self, clusters: &Range<u64>) {
        if let Some(at) = self.0.iter().position(|taken| taken == clusters) {
            self.0.swap_remove(at);
        }
    }
}

/// Workers that count for themselves; more share a place.
const CELLS: usize = 16;

/// Requests under way, in two groups: those that began in this epoch, and those of the one before it. A cluster that was
/// given up in an epoch is used by nobody any more when that epoch is two back.
///
/// Costs a request two atomic additions on a cache line that few workers share.
#[derive(Default)]
pub struct Pins {
    epoch: AtomicU64,
    cells: [Cell; CELLS],
}

/// A cache line, and the one that is fetched with it.
#[repr(align(128))]
#[derive(Default)]
struct Cell([AtomicU64; 2]);

/// A request under way.
pub struct Pin<'a>(&'a AtomicU64);

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

impl Pins {
    /// A request of this worker begins.
    pub fn enter(&self, worker: usize) -> Pin<'_> {
        let cell = &self.cells[worker % CELLS];
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let count = &cell.0[(epoch & 1) as usize];
            count.fetch_add(1, Ordering::SeqCst);
            let pin = Pin(count);
            // Otherwise it may have been overlooked: it stands with those of an epoch that is over.
            if self.epoch.load(Ordering::SeqCst) == epoch {
                return pin;
            }
        }
    }

    /// What is given up now is given up in this epoch.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Begins another epoch, if all requests of the one before this are over; which one it is now. For one at a time.
    pub fn advance(&self) -> u64 {
        let epoch = self.epoch();
        let before = ((epoch + 1) & 1) as usize;
        if self.cells.iter().all(|cell| cell.0[before].load(Ordering::SeqCst) == 0) {
            self.epoch.store(epoch + 1, Ordering::SeqCst);
        }
        self.epoch()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_is_one_requests_at_a_time() {
        let mut claims = Claims::default();
        assert!(claims.take(&(3..5)) && claims.take(&(5..6)) && claims.take(&(0..3)));
        for taken in [2..4, 4..5, 0..9, 5..6] {
            assert!(!claims.take(&taken), "{taken:?}");
        }
        claims.release(&(3..5));
        assert!(claims.take(&(3..4)) && claims.take(&(4..5)));
    }

    #[test]
    fn an_epoch_is_two_back_only_when_its_requests_are_over() {
        let pins = Pins::default();
        let (old, epoch) = (pins.enter(0), pins.epoch());
        assert_eq!(pins.advance(), epoch + 1);
        let young = pins.enter(17);
        assert_eq!(pins.advance(), epoch + 1, "the old one is under way");
        drop(old);
        assert_eq!(pins.advance(), epoch + 2);
        assert_eq!(pins.advance(), epoch + 2, "the young one is");
        drop(young);
        assert_eq!(pins.advance(), epoch + 3);
    }
}
