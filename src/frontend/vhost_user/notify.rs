//! The VMM's event descriptors: what it kicks us by, and what we tell it through.

#![forbid(unsafe_code)]

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

/// Checks that a descriptor of the VMM's is an eventfd. Any other kind could be readable for ever, which keeps a
/// worker busy, or block a write.
///
/// # Errors
/// `InvalidInput` when it is not.
pub fn check_eventfd(file: &File) -> io::Result<()> {
    let target = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    if target.as_os_str() == "anon_inode:[eventfd]" {
        return Ok(());
    }
    let message = format!("{} is not an eventfd", target.display());
    Err(io::Error::new(io::ErrorKind::InvalidInput, message))
}

/// An eventfd of the VMM's that we write to. The worker must never wait on it.
#[derive(Clone)]
pub struct CallFd {
    file: Arc<File>,
    /// It has `O_NONBLOCK`. We do not set it ourselves: the flag belongs to the description, which the VMM
    /// shares with us.
    nonblocking: bool,
}

impl CallFd {
    /// Takes the descriptor over.
    ///
    /// # Errors
    /// When it is no eventfd.
    pub fn new(file: File) -> io::Result<CallFd> {
        check_eventfd(&file)?;
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
        Ok(CallFd { file: Arc::new(file), nonblocking: flags.contains(OFlag::O_NONBLOCK) })
    }

    /// Adds one to the counter: one system call, two where the VMM made its descriptor blocking. A counter
    /// that is full says what it has to say already, so it is left.
    pub fn signal(&self) {
        if !self.nonblocking {
            let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)];
            if !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1)) {
                return;
            }
        }
        if let Err(error) = (&*self.file).write(&1u64.to_ne_bytes())
            && error.kind() != io::ErrorKind::WouldBlock
        {
            log::debug!("call descriptor: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::{EfdFlags, EventFd};

    #[test]
    fn a_full_counter_never_blocks_us() {
        for flags in [EfdFlags::empty(), EfdFlags::EFD_NONBLOCK] {
            let event = EventFd::from_flags(flags).unwrap();
            event.write(u64::MAX - 1).unwrap();
            let call = CallFd::new(File::from(event.as_fd().try_clone_to_owned().unwrap())).unwrap();
            call.signal();
            assert_eq!(event.read().unwrap(), u64::MAX - 1);
            call.signal();
            assert_eq!(event.read().unwrap(), 1);
        }
    }
}
