//! A disk for oneself, while it is taken away.
//!
//! Mounts, swaps, the device mapper and their like claim a device (`O_EXCL` of `open(2)`; a disk's claim is one to its
//! partitions too). So where one of them has the disk we do not get it, however well hidden it is; and while we have it,
//! none of them can come. A process that merely opens the disk is neither seen nor kept away: that takes
//! `UBLK_F_SAFE_STOP_DEV`, of Linux 7.0.
//!
//! To be held no longer than needed. When the last one who has a disk open closes it, what others have written to its page
//! cache is written out: a server that was killed while it has the claim would have to serve itself.

#![forbid(unsafe_code)]

use super::thread::detached;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// A disk that nobody else can claim, until this is dropped.
#[derive(Debug)]
pub struct Claim(#[expect(dead_code, reason = "it is there to be closed")] File);

/// Claims the disk at `path`, which takes at most `limit`: the open may have to wait for a scan of its partitions, which
/// we serve.
///
/// # Errors
/// `EBUSY` when somebody has claimed it or one of its partitions; `TimedOut`; and whatever else keeps us from opening it,
/// which says nothing of others.
pub(super) fn claim(path: &Path, limit: Duration) -> io::Result<Claim> {
    let (sender, answer) = channel();
    let path = path.to_owned();
    let open = move || {
        let flags = libc::O_CLOEXEC | libc::O_EXCL;
        let file = File::options().read(true).custom_flags(flags).open(path);
        // If nobody waits any more, it is closed.
        let _ = sender.send(file.map(Claim));
    };
    detached("ringblk-claim", open)?;
    answer.recv_timeout(limit).unwrap_or_else(|error| match error {
        RecvTimeoutError::Timeout => Err(io::ErrorKind::TimedOut.into()),
        RecvTimeoutError::Disconnected => Err(io::Error::other("its thread has ended")),
    })
}

/// The same, while somebody looks at the disk for a moment: it is tried every `pause` for `patience`.
///
/// # Errors
/// As for [`claim`].
pub(super) fn claim_patiently(path: &Path, patience: Duration, pause: Duration) -> io::Result<Claim> {
    let end = Instant::now() + patience;
    loop {
        match claim(path, patience) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < end => {
                thread::sleep(pause);
            }
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;

    #[test]
    fn an_open_that_hangs_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        // Nobody writes to it, so that the open waits.
        let error = claim(&fifo, Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        // Lets the thread go.
        drop(File::options().read(true).write(true).open(&fifo).unwrap());
    }

    #[test]
    fn what_is_not_there_is_no_claim() {
        let error = claim(Path::new("/dev/ublkb1048575"), Duration::from_secs(60)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
