//! Which run of another program keeps writes that were acknowledged and not flushed.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A number for the run of the server behind a volume that is connected now; clones share it. What a server has not
/// flushed is lost when it crashes, and one that is started in its place has another number: so whoever outlives both can
/// tell whether a flush vouches for a write.
#[derive(Clone, Debug, Default)]
pub struct Instance(Arc<AtomicU64>);

impl Instance {
    /// Bits of a number.
    pub const BITS: u32 = 61;

    /// Of a server whose runs cannot be told apart.
    pub const UNKNOWN: u64 = 0;

    /// The number now, or [`UNKNOWN`](Self::UNKNOWN).
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// A connection was made to this run.
    pub fn set(&self, number: u64) {
        self.0.store(number & ((1 << Instance::BITS) - 1), Ordering::Relaxed);
    }
}

/// Equal while they name the same run, shared or not.
impl PartialEq for Instance {
    fn eq(&self, other: &Instance) -> bool {
        self.get() == other.get()
    }
}

impl Eq for Instance {}
