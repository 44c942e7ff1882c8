//! The VMM's event descriptors: what it kicks us by, and what we tell it through.
//!
//! Kicks are polled and never read, calls are the kernel's own ([`EventSignal`]): nothing that a VMM does with its
//! descriptors makes us wait.

#![forbid(unsafe_code)]

use crate::ring::EventSignal;
use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Checks that a descriptor of the VMM's is an eventfd. Any other kind could be readable for ever, which keeps a
/// worker busy.
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

/// The eventfd by which the driver of one vring is called.
pub struct CallFd {
    signal: RefCell<EventSignal>,
}

impl CallFd {
    /// Makes it ready. The descriptor may be closed then.
    ///
    /// # Errors
    /// When it is no eventfd, or the kernel has no memory or descriptors for it.
    pub fn new(file: &File) -> io::Result<CallFd> {
        check_eventfd(file)?;
        Ok(CallFd { signal: RefCell::new(EventSignal::new(file)?) })
    }

    /// Calls: one system call, which never waits.
    ///
    /// # Errors
    /// When the kernel has no memory: nobody was called.
    pub fn signal(&self) -> io::Result<()> {
        self.signal.borrow_mut().signal()
    }
}

/// Says through an error descriptor that something is wrong with a vring. For what is rare: a worker is busy with it
/// for 0.04 ms.
pub fn signal_error(file: &File) {
    if let Err(error) = EventSignal::new(file).and_then(|mut signal| signal.signal()) {
        log::debug!("error descriptor: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::EventFd;
    use std::os::fd::AsFd;

    #[test]
    fn only_an_eventfd_is_taken() {
        let event = EventFd::new().unwrap();
        let file = File::from(event.as_fd().try_clone_to_owned().unwrap());
        assert!(check_eventfd(&file).is_ok());
        let call = CallFd::new(&file).unwrap();
        drop(file);
        call.signal().unwrap();
        assert_eq!(event.read().unwrap(), 1, "without the descriptor it was made from");
        assert!(check_eventfd(&tempfile::tempfile().unwrap()).is_err());
        assert!(CallFd::new(&tempfile::tempfile().unwrap()).is_err());
    }
}
