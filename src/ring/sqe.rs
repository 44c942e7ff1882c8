//! What goes into a ring and what comes out, in our own words.
//!
//! The kernel's submission entry cannot be read back through the io-uring crate, so a test double could
//! not carry one out; this one it can. Turning it into the kernel's is a match the compiler folds into the
//! call where it is built.

use super::Message;
use crate::block::{Errno, Iovec};
use std::os::fd::RawFd;
use std::time::Duration;

/// A file an operation works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A descriptor: the kernel takes and drops a reference for each operation.
    Fd(RawFd),
    /// An index in the ring's file table: no reference counting.
    Fixed(u32),
}

/// One operation, and the memory that it names. Addresses are carried, never followed, until the ring carries the
/// operation out.
///
/// Every address in it comes from a type that borrows the memory, or that took a promise when it was made: safe code
/// cannot make one that names memory which is gone.
#[derive(Clone, Copy, Debug)]
pub enum Sqe<'a> {
    /// `pread(2)` into one range, of which [`MAX_RW`](Self::MAX_RW) bytes count.
    Read { file: Target, range: Iovec<'a>, offset: u64 },
    /// `pwritev2(2)` from one range with `RWF_*` flags, likewise.
    Write { file: Target, range: Iovec<'a>, offset: u64, rw_flags: i32 },
    /// `preadv(2)` into the first [`MAX_RANGES`](Self::MAX_RANGES) ranges.
    Readv { file: Target, ranges: &'a [Iovec<'a>], offset: u64 },
    /// `pwritev2(2)` with `RWF_*` flags, likewise.
    Writev { file: Target, ranges: &'a [Iovec<'a>], offset: u64, rw_flags: i32 },
    /// Read into a registered buffer, `skip` bytes in.
    ReadFixed { file: Target, index: u16, skip: u64, len: u32, offset: u64 },
    /// Write from a registered buffer, `skip` bytes in.
    WriteFixed { file: Target, index: u16, skip: u64, len: u32, offset: u64, rw_flags: i32 },
    /// `fdatasync(2)`.
    Fdatasync { file: Target },
    /// `fallocate(2)`.
    Fallocate { file: Target, mode: i32, offset: u64, len: u64 },
    /// Discard on a block device: `BLOCK_URING_CMD_DISCARD` of `linux/blkdev.h`, from Linux 6.12 on.
    BlockDiscard { file: Target, offset: u64, len: u64 },
    /// `recvmsg(2)` into the ranges, with `MSG_*` flags.
    Recvmsg { file: Target, message: &'a Message<'a>, flags: u32 },
    /// `sendmsg(2)` from the ranges, with `MSG_*` flags.
    Sendmsg { file: Target, message: &'a Message<'a>, flags: u32 },
    /// `recv(2)`.
    Recv { file: Target, range: Iovec<'a>, flags: i32 },
    /// One completion, when the file becomes readable.
    PollOnce { file: Target },
    /// A completion for each time the file becomes readable, until cancelled.
    PollMultishot { file: Target },
    /// Cancels what was submitted with `user_data`.
    Cancel { user_data: UserData },
    /// Completes with `-ETIME` after the time.
    Timeout { after: Duration },
    /// `IORING_OP_URING_CMD`: ublk's fetch and commit (`linux/ublk_cmd.h`).
    Command { file: Target, command: DriverCommand },
}

impl Sqe<'_> {
    /// The most bytes that the kernel moves in one call (`MAX_RW_COUNT` of `linux/fs.h`, for 4 KiB pages).
    pub const MAX_RW: usize = 0x7fff_f000;

    /// The most ranges that the kernel takes in one call (`UIO_MAXIOV` of `linux/uio.h`).
    pub const MAX_RANGES: usize = 1024;
}

/// What a driver is asked: 16 bytes of command and an address, of which `op` says what they mean.
#[derive(Clone, Copy, Debug)]
pub struct DriverCommand {
    pub(super) op: u32,
    pub(super) cmd: [u8; 16],
    pub(super) addr: u64,
}

impl DriverCommand {
    /// # Safety
    /// Memory whose address the driver finds in there is as [`Iovec::new`] has it, until the completion.
    pub unsafe fn new(op: u32, cmd: [u8; 16], addr: u64) -> DriverCommand {
        DriverCommand { op, cmd, addr }
    }
}

/// What a completion belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A slot's operation: polls that slot's future.
    Slot = 1,
    /// A source's kick descriptor is readable.
    Kick = 2,
    /// The worker's mailbox is readable.
    Mailbox = 3,
    /// Nobody waits for it (a cancel).
    Nobody = 4,
    /// A worker's timer: time to look for slow requests.
    SlowRequests = 5,
    /// A worker's timer: time to let requests go that waited for limits.
    Throttle = 6,
}

/// `kind (8 bits) | generation (24) | number (32)`: no pointer, and a completion that comes after its slot
/// was given to somebody else can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserData(u64);

impl UserData {
    /// The generation counter wraps at this.
    pub const GENERATIONS: u32 = 1 << 24;

    /// Packs the three. `generation` is taken modulo [`GENERATIONS`](Self::GENERATIONS).
    pub const fn new(kind: Kind, generation: u32, number: u32) -> UserData {
        let generation = (generation % Self::GENERATIONS) as u64;
        UserData((kind as u64) << 56 | generation << 32 | number as u64)
    }

    /// What it was made for; `None` for a number no `UserData` has.
    pub fn kind(self) -> Option<Kind> {
        match (self.0 >> 56) as u8 {
            1 => Some(Kind::Slot),
            2 => Some(Kind::Kick),
            3 => Some(Kind::Mailbox),
            4 => Some(Kind::Nobody),
            5 => Some(Kind::SlowRequests),
            6 => Some(Kind::Throttle),
            _ => None,
        }
    }

    /// Slot or source.
    pub fn number(self) -> u32 {
        self.0 as u32
    }

    /// See [`new`](Self::new).
    pub fn generation(self) -> u32 {
        (self.0 >> 32) as u32 % Self::GENERATIONS
    }

    /// As it stands in the ring.
    pub fn raw(self) -> u64 {
        self.0
    }

    /// As it came from the ring.
    pub fn from_raw(raw: u64) -> UserData {
        UserData(raw)
    }
}

/// A completion.
#[derive(Clone, Copy, Debug)]
pub struct Cqe {
    /// As submitted.
    pub user_data: UserData,
    /// A count, or a negated errno.
    pub result: i32,
    /// More completions of the same multishot submission follow.
    pub more: bool,
}

impl Cqe {
    /// See [`Errno::split`].
    pub fn outcome(&self) -> Result<u32, Errno> {
        Errno::split(self.result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_data_round_trips() {
        for kind in [Kind::Slot, Kind::Kick, Kind::Mailbox, Kind::Nobody, Kind::SlowRequests] {
            let data = UserData::new(kind, UserData::GENERATIONS - 1, u32::MAX);
            let back = UserData::from_raw(data.raw());
            assert_eq!(back.kind(), Some(kind));
            assert_eq!(back.generation(), UserData::GENERATIONS - 1);
            assert_eq!(back.number(), u32::MAX);
        }
        assert_eq!(UserData::from_raw(0).kind(), None);
    }

    #[test]
    fn the_generation_wraps_without_touching_its_neighbours() {
        let data = UserData::new(Kind::Slot, UserData::GENERATIONS, 7);
        assert_eq!((data.generation(), data.number()), (0, 7));
        assert_eq!(data.kind(), Some(Kind::Slot));
    }
}
