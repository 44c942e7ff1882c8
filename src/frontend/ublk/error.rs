//! Why there is no device, and what to do.

#![forbid(unsafe_code)]

use super::name::NameError;
use super::support::{NoZeroCopy, Unavailable};
use crate::block::Errno;
use std::fmt;
use std::io;
use std::time::Duration;

/// A step in a device's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// `UBLK_U_CMD_ADD_DEV`.
    Add,
    /// `UBLK_U_CMD_START_DEV`.
    Start,
    /// `UBLK_U_CMD_STOP_DEV`.
    Stop,
    /// `UBLK_U_CMD_DEL_DEV`.
    Delete,
}

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no ublk to be used.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// Zero copy was asked for.
    #[error("zero-copy=on is not possible")]
    ZeroCopy(#[from] NoZeroCopy),
    /// The stable name is not free.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The kernel said no.
    #[error("the kernel refused to {verb} the device{}: {errno}", hint(*.verb, *.errno, *.id))]
    Refused {
        /// To do what.
        verb: Verb,
        /// Its answer.
        errno: Errno,
        /// The number that was asked for.
        id: Option<u32>,
    },
    /// The kernel said nothing.
    #[error("the kernel did not {verb} the device in {} s", .after.as_secs())]
    TimedOut {
        /// What was asked.
        verb: Verb,
        /// Waited for so long.
        after: Duration,
    },
    /// No thread for the control side, or it ended.
    #[error("the device's control thread")]
    Thread(#[source] io::Error),
    /// A worker could not take a queue.
    #[error("queue {queue}")]
    Queue {
        /// Its number.
        queue: u16,
        /// Why.
        source: io::Error,
    },
    /// The kernel waits for fetches that it has refused.
    #[error("queue {queue}: the kernel refused its fetches; the log says why")]
    Fetch {
        /// Its number, from 0.
        queue: usize,
    },
}

/// What an errno means for a command, where that is known.
fn hint(verb: Verb, errno: Errno, id: Option<u32>) -> String {
    match (verb, errno.raw(), id) {
        (Verb::Add, libc::EPERM, _) => " (it wants CAP_SYS_ADMIN: run as root)".into(),
        (Verb::Add, libc::EACCES, _) => {
            " (its character device /dev/ublkcN cannot be opened: run as root)".into()
        }
        (Verb::Add, libc::EEXIST, Some(id)) => format!(
            " (number {id} is taken by a running device, by one whose server died, or by one that is gone and \
             still open somewhere: choose another, or leave the choice to the kernel)"
        ),
        (Verb::Add, libc::EINVAL, _) => " (max-io must be whole pages)".into(),
        _ => String::new(),
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verb::Add => "add",
            Verb::Start => "start",
            Verb::Stop => "stop",
            Verb::Delete => "delete",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_say_what_to_do() {
        let told = |verb, raw, id| Error::Refused { verb, errno: Errno::new(raw), id }.to_string();
        assert!(told(Verb::Add, libc::EPERM, None).contains("CAP_SYS_ADMIN"));
        assert!(told(Verb::Add, libc::EEXIST, Some(7)).contains("number 7 is taken"));
        assert!(told(Verb::Start, libc::EIO, None).starts_with("the kernel refused to start the device: "));
    }
}
