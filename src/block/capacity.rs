//! A volume's size, which may change while it is served.

#![forbid(unsafe_code)]

use super::SECTOR;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The capacity of a volume, in sectors of 512 bytes. A clone is the same capacity: the volume, its workers and
/// its exports each hold one, and all of them see a change at their next look.
///
/// A look is a relaxed load, so a worker may act upon the old value for a moment after a change. Who changes it
/// takes care that both values are good for as long: `engine::resize` says how.
#[derive(Clone)]
pub struct Capacity {
    sectors: Arc<AtomicU64>,
}

impl Capacity {
    /// Of so many sectors.
    pub fn new(sectors: u64) -> Capacity {
        Capacity { sectors: Arc::new(AtomicU64::new(sectors)) }
    }

    /// As it is now.
    pub fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Relaxed)
    }

    /// The same in bytes.
    pub fn bytes(&self) -> u64 {
        self.sectors() * SECTOR
    }

    /// Changes it for all who share it.
    pub fn set(&self, sectors: u64) {
        self.sectors.store(sectors, Ordering::Relaxed);
    }
}

impl fmt::Debug for Capacity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} sectors", self.sectors())
    }
}

/// Two capacities are equal while they have the same number of sectors, shared or not.
impl PartialEq for Capacity {
    fn eq(&self, other: &Capacity) -> bool {
        self.sectors() == other.sectors()
    }
}

impl Eq for Capacity {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_share_one_value() {
        let capacity = Capacity::new(8);
        let shared = capacity.clone();
        capacity.set(9);
        assert_eq!((shared.sectors(), shared.bytes()), (9, 9 * 512));
        assert_eq!(shared, Capacity::new(9));
    }
}
