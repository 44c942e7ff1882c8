//! How commands reach a worker that may be asleep in its ring.

use super::Command;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Mutex;

/// Commands, and an eventfd that is readable when there are some.
pub(super) struct Mailbox {
    commands: Mutex<Vec<Command>>,
    event: EventFd,
}

impl Mailbox {
    pub fn new() -> io::Result<Mailbox> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Mailbox { commands: Mutex::default(), event })
    }

    /// Any thread's side. Two system calls at most.
    pub fn post(&self, command: Command) {
        self.lock().push(command);
        // It fails only when 2^64 - 2 posts are unread, and then it is readable already.
        let _ = self.event.write(1);
    }

    /// The worker's side: what came since the last time. The eventfd is emptied first, so nothing that is
    /// posted after the look goes unnoticed.
    pub fn take(&self) -> Vec<Command> {
        let _ = self.event.read();
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Command>> {
        // A poisoned lock means that a thread panicked while it pushed to a Vec; the Vec is whole.
        self.commands.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl AsRawFd for Mailbox {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_fd().as_raw_fd()
    }
}
