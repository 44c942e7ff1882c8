//! How a queue is told to take no more requests.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};

/// One device's, for all its queues. A worker looks at it with each request; once it has done anything else that was
/// asked of it after the brake was pulled, it takes no more.
#[derive(Debug, Default)]
pub struct Brake(AtomicBool);

impl Brake {
    /// From now on, requests that come stay where they are: with us, but not looked at. The kernel gives them to the
    /// next server when we are gone.
    pub fn pull(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was pulled.
    pub fn is_pulled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
