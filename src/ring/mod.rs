//! The only owner of io_uring.
//!
//! A [`Ring`] takes [`Sqe`]s and gives [`Cqe`]s back. [`Core`] turns one pair into one `await`: a slot
//! submits an operation and is polled again when its completion comes, found by the slot number in
//! `user_data`. [`Tasks`] keeps the futures. Everything here belongs to one thread; nothing is locked.
//!
//! Two rings exist: [`Uring`], the kernel's, and (in tests) `SimRing`, an in-memory one with seeded faults.
//! Which one is used is a type parameter, so the choice costs nothing.
//!
//! Contracts:
//! - Exactly one completion per submission, except multishot polls ([`Cqe::more`]).
//! - Memory that a submission names stays valid until its completion. An [`Sqe`] borrows what it names; what waits for
//!   its completion keeps the borrow, and ends the process where it is dropped before ([`Io::submit`]). [`Tasks`] leaks a
//!   future that waits for the kernel rather than free what the kernel may write. Nobody else forgets a value
//!   (`clippy::mem_forget` holds it).

mod buffer;
mod clock;
mod command;
mod core;
#[cfg(test)]
pub mod sim;
mod fair;
mod file_size;
mod flusher;
mod locked;
mod message;
mod pool;
mod refused;
mod runtime;
mod signal;
mod sqe;
mod task;
mod uring;

pub use self::core::{Core, Io, PASS_WORK, Park};
pub use buffer::{Mapping, clear, zeroes};
pub use command::CommandRing;
pub use file_size::ignore_file_size_signal;
pub use flusher::set_io_flusher;
pub use locked::{NotLocked, is_locked, lock_process, use_stack};
pub use message::{Message, MessageRanges};
pub use pool::{Buffer, Pool};
pub use runtime::runtime;
pub use signal::EventSignal;
pub use sqe::{Cqe, DriverCommand, Kind, Sqe, Target, UserData};
pub use task::Tasks;
pub use uring::{Setup, Uring};

use std::io;
use std::os::fd::RawFd;

/// A submission and a completion queue.
pub trait Ring: 'static {
    /// Queues `sqe`. It never fails: what does not fit the submission queue now goes in at the next
    /// [`enter`](Ring::enter). No system call unless the queue is full.
    ///
    /// # Safety
    /// What `sqe` borrows stays borrowed until its completion has been reaped, whatever the compiler thinks; and nobody
    /// takes another completion for it: no other submission that is under way has the same `user_data`.
    unsafe fn push(&self, sqe: &Sqe<'_>, user_data: UserData);

    /// Submits what was pushed and, with `wait`, sleeps until there is at least one completion to reap.
    /// One system call, or none where nothing was pushed and none was asked for.
    ///
    /// # Errors
    /// Only those that leave the ring unusable. `EINTR`, `EBUSY` and `EAGAIN` are not: they return `Ok`
    /// and what was not taken goes in at the next call.
    fn enter(&self, wait: bool) -> io::Result<()>;

    /// Appends the completions that are there to `into`. No system call.
    fn reap(&self, into: &mut Vec<Cqe>);

    /// Carries a read or a write out before it returns, on this thread: one system call, which may block. For stores
    /// whose every operation the kernel would hand to a thread of its own (io-wq) because it cannot try it without
    /// blocking; such a hand-over costs more than most of the operations.
    ///
    /// The result is a count or a negated errno: `EINVAL` for anything but a read or a write of a plain descriptor.
    fn submit_sync(&self, sqe: &Sqe<'_>) -> i32;

    /// Nanoseconds on the clock that [`Sqe::Timeout`] goes by, the same for the rings of all threads.
    fn now(&self) -> u64 {
        clock::monotonic()
    }

    /// Enters `fd` into the ring's file table, which saves each operation a reference count. Where there is
    /// no table, or no place left in it, the plain descriptor serves. The caller keeps `fd` open until
    /// [`release`](Ring::release).
    fn register(&self, fd: RawFd) -> Target {
        Target::Fd(fd)
    }

    /// Takes a file out of the table; a plain descriptor is left alone.
    fn release(&self, file: Target) {
        let _ = file;
    }
}
