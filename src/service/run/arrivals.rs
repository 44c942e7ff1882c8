//! What comes up, and a stop that comes meanwhile.

#![forbid(unsafe_code)]

use super::lock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

/// Counts what is being started. A stop closes them: then nothing more begins, what has begun sees that it may
/// [give up](Arrivals::closed), and is waited for. So no lock is held by anything that takes long, and nothing is
/// started that a stop does not know of.
#[derive(Default)]
pub(super) struct Arrivals {
    closed: AtomicBool,
    under_way: Mutex<usize>,
    arrived: Condvar,
}

/// Something that is being started; over when this is dropped. What came of it is the service's by then, or undone.
pub(super) struct Arrival(Arc<Arrivals>);

impl Arrivals {
    /// Something begins to come up. `None`: nothing may any more.
    pub fn begin(self: &Arc<Self>) -> Option<Arrival> {
        let mut under_way = lock(&self.under_way);
        if self.closed.load(Ordering::Relaxed) {
            return None;
        }
        *under_way += 1;
        Some(Arrival(self.clone()))
    }

    /// Whether it would be better to give up.
    pub fn closed(&self) -> &AtomicBool {
        &self.closed
    }

    /// From now on nothing begins to come up.
    pub fn close(&self) {
        // Whoever has just begun has been counted.
        let _under_way = lock(&self.under_way);
        self.closed.store(true, Ordering::Relaxed);
    }

    /// Waits until nothing is under way any more. Whether that is so by `deadline`.
    pub fn settle(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self.arrived.wait_timeout_while(lock(&self.under_way), left, |count| *count > 0);
        *waited.unwrap_or_else(PoisonError::into_inner).0 == 0
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        *lock(&self.0.under_way) -= 1;
        self.0.arrived.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn a_stop_waits_for_what_has_begun_and_lets_nothing_begin() {
        let arrivals = Arc::new(Arrivals::default());
        assert!(arrivals.settle(Instant::now()), "there is nothing");
        let (first, second) = (arrivals.begin().unwrap(), arrivals.begin().unwrap());
        assert!(!arrivals.closed().load(Ordering::Relaxed));
        // At once, whatever is under way.
        arrivals.close();
        assert!(arrivals.closed().load(Ordering::Relaxed));
        assert!(arrivals.begin().is_none());
        drop(first);
        assert!(!arrivals.settle(Instant::now() + Duration::from_millis(10)), "one is left");
        thread::scope(|scope| {
            let (tell, told) = channel();
            let arrivals = &arrivals;
            scope.spawn(move || tell.send(arrivals.settle(Instant::now() + Duration::from_secs(600))));
            assert!(told.recv_timeout(Duration::from_millis(10)).is_err());
            drop(second);
            assert!(told.recv().unwrap());
        });
        assert!(arrivals.begin().is_none());
    }
}
