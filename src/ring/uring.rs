//! The kernel's ring.

use super::refused::{explain, locked};
use super::runtime::usable;
use super::{Cqe, DriverCommand, Ring, Sqe, Target, UserData};
use crate::block::Iovec;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

/// Sizes of a worker's ring.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Submission entries; what exceeds them in one batch costs one more system call, nothing else.
    pub entries: u32,
    /// Completion entries. Admission keeps what is in flight below this; the kernel keeps what is not.
    pub completions: u32,
    /// Places in the registered buffer table (ublk zero copy); 0 for no table.
    pub buffers: u32,
    /// Places in the registered file table.
    pub files: u32,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup { entries: 1024, completions: 8192, buffers: 0, files: 256 }
    }
}

/// `BLOCK_URING_CMD_DISCARD`: `_IO(0x12, 0)` of `linux/blkdev.h`.
const BLOCK_URING_CMD_DISCARD: u32 = 0x1200;

/// Builds an opcode for whichever kind of file it is.
macro_rules! on {
    ($file:expr, |$fd:ident| $build:expr) => {
        match $file {
            Target::Fd(raw) => {
                let $fd = types::Fd(raw);
                $build.build()
            }
            Target::Fixed(index) => {
                let $fd = types::Fixed(index);
                $build.build()
            }
        }
    };
}

/// An io_uring that belongs to the thread that made it (`IORING_SETUP_SINGLE_ISSUER`).
pub struct Uring {
    ring: RefCell<IoUring>,
    /// What did not fit the submission queue: only ever filled when the kernel would not take more.
    backlog: RefCell<VecDeque<squeue::Entry>>,
    pushed: Cell<bool>,
    times: RefCell<Times>,
    free_files: RefCell<Vec<u32>>,
    free_buffers: RefCell<Vec<u16>>,
}

/// The times of what was pushed and is not taken yet: the kernel copies one when it takes its operation
/// (`IORING_FEAT_SUBMIT_STABLE`).
#[derive(Default)]
struct Times {
    #[expect(clippy::vec_box, reason = "the kernel is told where each is")]
    all: Vec<Box<types::Timespec>>,
    /// How many of them are in use.
    kept: usize,
}

impl Times {
    /// Keeps a time until everything that was pushed is taken. Allocates where never so many were kept before.
    fn keep(&mut self, time: Duration) -> *const types::Timespec {
        let time = types::Timespec::from(time);
        match self.all.get_mut(self.kept) {
            Some(place) => **place = time,
            None => self.all.push(Box::new(time)),
        }
        self.kept += 1;
        &raw const *self.all[self.kept - 1]
    }
}

impl Uring {
    /// Makes a ring for the calling thread.
    ///
    /// # Errors
    /// The kernel's, with the cause and the way out: io_uring is missing or forbidden, the kernel is older than 6.1, the
    /// limit on locked memory or on open files is too low.
    pub fn new(setup: Setup) -> io::Result<Uring> {
        Uring::made(setup).map_err(|error| explain(&error, locked(setup.entries, setup.completions)))
    }

    fn made(setup: Setup) -> io::Result<Uring> {
        // DEFER_TASKRUN delivers completions in batches on our own enter; with it the kernel says through
        // TASKRUN_FLAG when an enter that does not wait would still bring some.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_cqsize(setup.completions)
            .dontfork()
            .build(setup.entries)?;
        usable(&ring)?;
        if setup.files > 0 {
            ring.submitter().register_files_sparse(setup.files)?;
        }
        if setup.buffers > 0 {
            ring.submitter().register_buffers_sparse(setup.buffers)?;
        }
        let buffers = u16::try_from(setup.buffers).map_err(|_| io::ErrorKind::InvalidInput)?;
        Ok(Uring {
            ring: RefCell::new(ring),
            backlog: RefCell::default(),
            pushed: Cell::new(false),
            times: RefCell::default(),
            free_files: RefCell::new((0..setup.files).rev().collect()),
            free_buffers: RefCell::new((0..buffers).rev().collect()),
        })
    }

    /// Reserves `count` places in the buffer table, or `None` where there are not enough.
    pub fn reserve_buffers(&self, count: usize) -> Option<Vec<u16>> {
        let mut free = self.free_buffers.borrow_mut();
        let rest = free.len().checked_sub(count)?;
        Some(free.split_off(rest))
    }

    /// Gives reserved places back, when no submission names them any more.
    pub fn return_buffers(&self, places: &[u16]) {
        self.free_buffers.borrow_mut().extend_from_slice(places);
    }

    /// Moves the backlog into the submission queue as far as it goes.
    fn refill(&self, queue: &mut squeue::SubmissionQueue<'_>) {
        let mut backlog = self.backlog.borrow_mut();
        while let Some(entry) = backlog.front() {
            // SAFETY: what the entry names stays valid until its completion: the contract of `ring`.
            if unsafe { queue.push(entry) }.is_err() {
                return;
            }
            backlog.pop_front();
        }
    }

    /// The kernel's form of `sqe`.
    fn entry(&self, sqe: &Sqe<'_>) -> squeue::Entry {
        let bytes = |range: &Iovec<'_>| range.len().min(Sqe::MAX_RW) as u32;
        let count = |ranges: &[Iovec<'_>]| ranges.len().min(Sqe::MAX_RANGES) as u32;
        match *sqe {
            Sqe::Read { file, range, offset } => {
                on!(file, |fd| opcode::Read::new(fd, range.base(), bytes(&range)).offset(offset))
            }
            Sqe::Write { file, range, offset, rw_flags } => {
                on!(file, |fd| opcode::Write::new(fd, range.base(), bytes(&range))
                    .offset(offset)
                    .rw_flags(rw_flags))
            }
            Sqe::Readv { file, ranges, offset } => {
                on!(file, |fd| opcode::Readv::new(fd, ranges.as_ptr().cast(), count(ranges)).offset(offset))
            }
            Sqe::Writev { file, ranges, offset, rw_flags } => {
                on!(file, |fd| opcode::Writev::new(fd, ranges.as_ptr().cast(), count(ranges))
                    .offset(offset)
                    .rw_flags(rw_flags))
            }
            // A buffer registered by ublk starts at address 0 (`ublk_auto_buf_reg` in linux/ublk_cmd.h).
            Sqe::ReadFixed { file, index, skip, len, offset } => {
                on!(file, |fd| opcode::ReadFixed::new(fd, skip as *mut u8, len, index).offset(offset))
            }
            Sqe::WriteFixed { file, index, skip, len, offset, rw_flags } => {
                on!(file, |fd| opcode::WriteFixed::new(fd, skip as *const u8, len, index)
                    .offset(offset)
                    .rw_flags(rw_flags))
            }
            Sqe::Fdatasync { file } => {
                on!(file, |fd| opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC))
            }
            Sqe::Fallocate { file, mode, offset, len } => {
                on!(file, |fd| opcode::Fallocate::new(fd, len).offset(offset).mode(mode))
            }
            Sqe::BlockDiscard { file, offset, len } => {
                // The start goes in `addr`, the length in `addr3`, which is where the command bytes begin.
                let mut cmd = [0; 16];
                cmd[..8].copy_from_slice(&len.to_ne_bytes());
                on!(file, |fd| opcode::UringCmd16::new(fd, BLOCK_URING_CMD_DISCARD)
                    .cmd(cmd)
                    .addr(Some(offset)))
            }
            Sqe::Recvmsg { file, message, flags } => {
                on!(file, |fd| opcode::RecvMsg::new(fd, message.as_ptr()).flags(flags))
            }
            Sqe::Sendmsg { file, message, flags } => {
                on!(file, |fd| opcode::SendMsg::new(fd, message.as_ptr()).flags(flags))
            }
            Sqe::Recv { file, range, flags } => {
                on!(file, |fd| opcode::Recv::new(fd, range.base(), bytes(&range)).flags(flags))
            }
            Sqe::PollOnce { file } => on!(file, |fd| opcode::PollAdd::new(fd, libc::POLLIN as u32)),
            Sqe::PollMultishot { file } => {
                on!(file, |fd| opcode::PollAdd::new(fd, libc::POLLIN as u32).multi(true))
            }
            Sqe::Cancel { user_data } => opcode::AsyncCancel::new(user_data.raw()).build(),
            Sqe::Timeout { after } => {
                let mut times = self.times.borrow_mut();
                opcode::Timeout::new(times.keep(after)).build()
            }
            Sqe::Command { file, command: DriverCommand { op, cmd, addr } } => {
                on!(file, |fd| opcode::UringCmd16::new(fd, op).cmd(cmd).addr(Some(addr)))
            }
        }
    }
}

impl Ring for Uring {
    unsafe fn push(&self, sqe: &Sqe<'_>, user_data: UserData) {
        let entry = self.entry(sqe).user_data(user_data.raw());
        self.pushed.set(true);
        let mut backlog = self.backlog.borrow_mut();
        if backlog.is_empty() {
            let mut ring = self.ring.borrow_mut();
            // SAFETY: what the entry names stays valid until its completion: the contract of `ring`.
            if unsafe { ring.submission().push(&entry) }.is_ok() {
                return;
            }
            // Full: let the kernel take the batch. An error shows itself again at the next enter.
            let _ = ring.submit();
            // SAFETY: as above.
            if unsafe { ring.submission().push(&entry) }.is_ok() {
                return;
            }
        }
        backlog.push_back(entry);
    }

    fn enter(&self, wait: bool) -> io::Result<()> {
        let mut ring = self.ring.borrow_mut();
        let needed = {
            let mut queue = ring.submission();
            if self.pushed.get() {
                self.refill(&mut queue);
            }
            wait || !queue.is_empty() || queue.taskrun() || queue.cq_overflow()
        };
        if !needed {
            return Ok(());
        }
        // Asking for 0 completions still runs the deferred work: the crate sets GETEVENTS where the
        // kernel's flags ask for it, and `wait` always does.
        let result = ring.submitter().submit_and_wait(usize::from(wait));
        self.pushed.set(!self.backlog.borrow().is_empty() || !ring.submission().is_empty());
        if !self.pushed.get() {
            self.times.borrow_mut().kept = 0;
        }
        match result {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR | libc::EBUSY | libc::EAGAIN | libc::ETIME) => Ok(()),
                _ => Err(error),
            },
        }
    }

    fn reap(&self, into: &mut Vec<Cqe>) {
        let mut ring = self.ring.borrow_mut();
        into.extend(ring.completion().map(|cqe| Cqe {
            user_data: UserData::from_raw(cqe.user_data()),
            result: cqe.result(),
            more: cqueue::more(cqe.flags()),
        }));
    }

    fn submit_sync(&self, sqe: &Sqe<'_>) -> i32 {
        let one;
        let (fd, ranges, offset, write) = match *sqe {
            Sqe::Read { file: Target::Fd(fd), range, offset } => {
                one = [range];
                (fd, &one[..], offset, None)
            }
            Sqe::Write { file: Target::Fd(fd), range, offset, rw_flags } => {
                one = [range];
                (fd, &one[..], offset, Some(rw_flags))
            }
            Sqe::Readv { file: Target::Fd(fd), ranges, offset } => (fd, ranges, offset, None),
            Sqe::Writev { file: Target::Fd(fd), ranges, offset, rw_flags } => {
                (fd, ranges, offset, Some(rw_flags))
            }
            _ => return -libc::EINVAL,
        };
        let (iovecs, count) = (ranges.as_ptr().cast(), ranges.len().min(Sqe::MAX_RANGES) as i32);
        let offset = offset as libc::off_t;
        let done = match write {
            // SAFETY: `sqe` borrows what it names, and the kernel is done with it when it returns.
            None => unsafe { libc::preadv2(fd, iovecs, count, offset, 0) },
            // SAFETY: as above.
            Some(rw_flags) => unsafe { libc::pwritev2(fd, iovecs, count, offset, rw_flags) },
        };
        if done < 0 {
            return -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        }
        // At most MAX_RW_COUNT of linux/fs.h.
        done as i32
    }

    fn register(&self, fd: RawFd) -> Target {
        let Some(index) = self.free_files.borrow_mut().pop() else {
            return Target::Fd(fd);
        };
        match self.ring.borrow().submitter().register_files_update(index, &[fd]) {
            Ok(_) => Target::Fixed(index),
            Err(_) => {
                self.free_files.borrow_mut().push(index);
                Target::Fd(fd)
            }
        }
    }

    fn release(&self, file: Target) {
        if let Target::Fixed(index) = file {
            // -1 empties the place. It cannot fail for an index inside the table.
            let _ = self.ring.borrow().submitter().register_files_update(index, &[-1]);
            self.free_files.borrow_mut().push(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::Kind;
    use std::io::Write;
    use std::os::fd::AsRawFd;

    #[test]
    fn what_does_not_fit_waits_its_turn() {
        let ring = Uring::new(Setup { entries: 4, completions: 64, ..Setup::default() }).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 4096]).unwrap();
        let target = ring.register(file.as_raw_fd());
        let mut bytes = [0u8; 40];
        for (n, byte) in bytes.chunks_mut(1).enumerate() {
            let read = Sqe::Read { file: target, range: Iovec::of(byte), offset: n as u64 };
            // SAFETY: `bytes` is looked at when all completions are here.
            unsafe { ring.push(&read, UserData::new(Kind::Slot, 0, n as u32)) };
        }
        let mut seen = Vec::new();
        while seen.len() < 40 {
            ring.enter(true).unwrap();
            ring.reap(&mut seen);
        }
        assert!(seen.iter().all(|cqe| cqe.result == 1));
        let mut numbers: Vec<_> = seen.iter().map(|cqe| cqe.user_data.number()).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, (0..40).collect::<Vec<_>>());
        assert_eq!(bytes, [7; 40]);
    }

    #[test]
    fn what_is_carried_out_here_is_done_at_once() {
        let ring = Uring::new(Setup::default()).unwrap();
        let file = tempfile::tempfile().unwrap();
        let plain = Target::Fd(file.as_raw_fd());
        let mut bytes = *b"here and now";
        let write = Sqe::Write { file: plain, range: Iovec::of(&mut bytes), offset: 5, rw_flags: 0 };
        assert_eq!(ring.submit_sync(&write), 12);
        bytes.fill(0);
        let read = Sqe::Read { file: plain, range: Iovec::of(&mut bytes), offset: 10 };
        assert_eq!(ring.submit_sync(&read), 7, "short, at the end");
        assert_eq!(&bytes, b"and now\0\0\0\0\0");
        assert_eq!(ring.submit_sync(&Sqe::Fdatasync { file: plain }), -libc::EINVAL);
        let fixed = ring.register(file.as_raw_fd());
        assert_eq!(
            ring.submit_sync(&Sqe::Read { file: fixed, range: Iovec::EMPTY, offset: 0 }),
            -libc::EINVAL
        );
        let closed = Target::Fd(-1);
        assert_eq!(
            ring.submit_sync(&Sqe::Read { file: closed, range: Iovec::EMPTY, offset: 0 }),
            -libc::EBADF
        );
    }

    #[test]
    fn a_full_file_table_falls_back_to_descriptors() {
        let ring = Uring::new(Setup { files: 1, ..Setup::default() }).unwrap();
        let file = tempfile::tempfile().unwrap();
        let first = ring.register(file.as_raw_fd());
        assert_eq!(first, Target::Fixed(0));
        assert_eq!(ring.register(file.as_raw_fd()), Target::Fd(file.as_raw_fd()));
        ring.release(first);
        assert_eq!(ring.register(file.as_raw_fd()), Target::Fixed(0));
    }

    #[test]
    fn buffer_places_are_handed_out_once() {
        let ring = Uring::new(Setup { buffers: 8, ..Setup::default() }).unwrap();
        let places = ring.reserve_buffers(8).unwrap();
        assert_eq!(ring.reserve_buffers(1), None);
        ring.return_buffers(&places);
        assert!(ring.reserve_buffers(8).is_some());
    }
}
