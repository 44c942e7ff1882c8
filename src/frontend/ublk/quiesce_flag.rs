//! How a queue is told to take no more requests.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};

/// One for a device and all its queues. A worker looks at it with each request; once it has done anything else that was
/// asked of it after the flag was set, it takes no more.
#[derive(Debug, Default)]
pub struct QuiesceFlag(AtomicBool);

impl QuiesceFlag {
    /// From now on, requests that come stay where they are: with us, but not looked at. The kernel gives them to the
    /// next server when we are gone.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was set.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
