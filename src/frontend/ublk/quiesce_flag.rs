//! How a queue is told to take no more requests, or to hold none back.

#![forbid(unsafe_code)]

use crate::frontend::LimitWait;
use std::sync::atomic::{AtomicBool, Ordering};

/// One for a device and all its queues. A worker looks at it with each request; once it has done anything else that was
/// asked of it after the flag was set, it takes no more.
#[derive(Debug, Default)]
pub struct QuiesceFlag {
    set: AtomicBool,
    unlimited: AtomicBool,
}

impl QuiesceFlag {
    /// From now on, requests that come stay where they are: with us, but not looked at. The kernel gives them to the
    /// next server when we are gone. The same goes for those that wait for limits.
    pub fn set(&self) {
        self.set.store(true, Ordering::Relaxed);
    }

    /// Whether it was set.
    pub fn is_set(&self) -> bool {
        self.set.load(Ordering::Relaxed)
    }

    /// From now on no request waits for limits: the device goes, and the kernel waits for all that it has given us. Those that
    /// wait have to be told.
    pub fn lift_limits(&self) {
        self.unlimited.store(true, Ordering::Relaxed);
    }

    /// What a request does that is beyond its limits.
    pub fn limit_wait(&self) -> LimitWait {
        if self.unlimited.load(Ordering::Relaxed) {
            LimitWait::Lifted
        } else if self.is_set() {
            LimitWait::ForEver
        } else {
            LimitWait::UntilAdmitted
        }
    }
}
