//! What we remember of a guest for whoever serves it next, beside the specification's notes: one number of 64 bits in the
//! space that aligning each queue's part leaves at its end. No other backend looks there, and a new region has zeroes.

#![forbid(unsafe_code)]

use crate::block::Instance;

/// A mark as it is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueMark(u64);

/// It was made by us.
const VALID: u64 = 1 << 63;
/// The driver chose write-through.
const WRITE_THROUGH: u64 = 1 << 62;
/// A write was acknowledged, and no flush since, by a server whose number is in the other bits.
const UNFLUSHED: u64 = 1 << 61;
const INSTANCE: u64 = UNFLUSHED - 1;

const _: () = assert!(INSTANCE == (1 << Instance::BITS) - 1);

impl QueueMark {
    /// As it was found.
    pub fn from_raw(raw: u64) -> QueueMark {
        QueueMark(raw)
    }

    /// As it is stored.
    pub fn raw(self) -> u64 {
        self.0
    }

    /// The cache mode that the driver runs with: whether it is writeback. `None` in a region that another backend has left,
    /// or that is new.
    pub fn writeback(self) -> Option<bool> {
        (self.0 & VALID != 0).then_some(self.0 & WRITE_THROUGH == 0)
    }

    /// The same with another cache mode.
    pub fn with_writeback(self, on: bool) -> QueueMark {
        QueueMark(if on { self.0 & !WRITE_THROUGH } else { self.0 | WRITE_THROUGH } | VALID)
    }

    /// Whether writes are not flushed.
    pub fn is_unflushed(self) -> bool {
        self.0 & UNFLUSHED != 0
    }

    /// The same with a write that is not flushed, which `instance` keeps. An earlier one that is not flushed either counts
    /// for more.
    pub fn with_unflushed(self, instance: u64) -> QueueMark {
        if self.is_unflushed() { self } else { QueueMark(self.0 | VALID | UNFLUSHED | instance & INSTANCE) }
    }

    /// The same when everything is flushed.
    pub fn with_flushed(self) -> QueueMark {
        QueueMark(self.0 & !(UNFLUSHED | INSTANCE) | VALID)
    }

    /// Whether a flush that the server's present run (`instance`) carries out may not vouch for writes that an earlier
    /// process acknowledged.
    pub fn is_doubtful(self, instance: u64) -> bool {
        let same = self.0 & INSTANCE == instance && instance != Instance::UNKNOWN;
        self.0 & VALID == 0 || self.is_unflushed() && !same
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_keeps_its_parts_apart() {
        let mark = QueueMark::default();
        assert_eq!(mark.writeback(), None);
        assert!(mark.is_doubtful(7), "nobody knows");
        let mark = mark.with_writeback(false).with_unflushed(u64::MAX);
        assert_eq!((mark.writeback(), mark.is_unflushed()), (Some(false), true));
        assert!(!mark.is_doubtful(INSTANCE) && mark.is_doubtful(7));
        let mark = mark.with_writeback(true);
        assert_eq!((mark.writeback(), mark.is_unflushed()), (Some(true), true));
        let mark = mark.with_flushed();
        assert_eq!(mark, QueueMark::default().with_writeback(true));
        assert!(!mark.is_doubtful(7) && !mark.is_doubtful(Instance::UNKNOWN));
    }

    #[test]
    fn the_oldest_write_counts() {
        let mark = QueueMark::default().with_unflushed(3).with_unflushed(4);
        assert!(!mark.is_doubtful(3) && mark.is_doubtful(4));
        assert!(QueueMark::default().with_unflushed(Instance::UNKNOWN).is_doubtful(Instance::UNKNOWN));
    }
}
