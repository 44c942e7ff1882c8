//! Which reads and writes the worker carries out itself.
//!
//! io_uring first tries an operation without waiting (`IOCB_NOWAIT`). Some files cannot be asked that way: tmpfs for
//! everything, ext4 and block devices for buffered writes. Each such operation goes to a thread of the kernel's
//! (io-wq), one at a time for a file, at one to two microseconds on top of the one that the copy into the page cache
//! takes. A plain system call on the worker's own thread is faster by 1.4 times and more, but may block: in a page
//! fault, on a journal, when the kernel holds writers back because too much is dirty.
//!
//! So the worker does them itself as long as they are quick, and leaves them to the kernel for a hundred times as long
//! as one of them took too long: what a store can make a worker wait is a hundredth of its time at the most.

use crate::block::Errno;
use std::cell::Cell;
use std::time::{Duration, Instant};

/// The largest transfer that is carried out here, in bytes.
const MOST: u64 = 256 << 10;

/// The longest that a transfer may take before it counts as blocked: this, and a microsecond for each KiB.
const QUICK: Duration = Duration::from_micros(100);

/// How many times as long as a blocked transfer took, none is carried out here.
const BLOCKED_BACKOFF: u32 = 100;

/// What one worker knows of one file.
#[derive(Debug)]
pub(super) struct Inline {
    reads: bool,
    /// Not known before the first write.
    writes: Cell<Option<bool>>,
    not_before: Cell<Option<Instant>>,
}

impl Inline {
    /// `reads`: reads cannot be tried without waiting. `writes`: nor can writes, where that is known.
    pub fn new(reads: bool, writes: Option<bool>) -> Inline {
        Inline { reads, writes: Cell::new(writes), not_before: Cell::new(None) }
    }

    /// When a read of so many bytes begins, if it is to be carried out here.
    pub fn read(&self, len: u64) -> Option<Instant> {
        if self.reads { self.begin(len) } else { None }
    }

    /// As [`read`](Self::read), for a write. `attempt` writes without waiting (`RWF_NOWAIT`); the first write asks it
    /// whether the file can do so.
    pub fn write(&self, len: u64, attempt: impl FnOnce() -> i32) -> Option<Instant> {
        let here = self.writes.get().unwrap_or_else(|| {
            let unable = Errno::split(attempt()) == Err(Errno::EOPNOTSUPP);
            self.writes.set(Some(unable));
            unable
        });
        if here { self.begin(len) } else { None }
    }

    /// Costs a reading of the clock, some 20 ns.
    fn begin(&self, len: u64) -> Option<Instant> {
        if len > MOST {
            return None;
        }
        let now = Instant::now();
        if self.not_before.get().is_some_and(|until| now < until) {
            return None;
        }
        self.not_before.set(None);
        Some(now)
    }

    /// A transfer of so many bytes took so long.
    pub fn record(&self, len: u64, time: Duration) {
        if time > QUICK + Duration::from_micros(len >> 10) {
            self.not_before.set(Some(Instant::now() + time * BLOCKED_BACKOFF));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_write_asks() {
        let unable = Inline::new(false, None);
        assert!(unable.write(4096, || -libc::EOPNOTSUPP).is_some());
        assert!(unable.write(4096, || panic!("asked twice")).is_some());
        assert!(unable.write(MOST + 1, || panic!("asked twice")).is_none());
        for answer in [4096, -libc::EAGAIN, -libc::EIO] {
            let able = Inline::new(false, None);
            assert!(able.write(4096, || answer).is_none(), "{answer}");
            assert!(able.write(4096, || panic!("asked twice")).is_none());
        }
        assert!(unable.read(4096).is_none());
        assert!(Inline::new(true, None).read(4096).is_some());
    }

    #[test]
    fn what_blocks_is_left_alone_for_a_while() {
        let inline = Inline::new(true, Some(true));
        inline.record(64 << 10, QUICK + Duration::from_micros(64));
        assert!(inline.read(4096).is_some(), "the time for so much");
        inline.record(4096, 2 * QUICK);
        assert!(inline.read(4096).is_none() && inline.write(4096, || 0).is_none());
        std::thread::sleep(2 * QUICK * BLOCKED_BACKOFF);
        assert!(inline.read(4096).is_some());
    }
}
