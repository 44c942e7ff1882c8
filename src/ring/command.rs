//! A ring for control commands: 80 bytes each, one at a time, with an end to patience.
//!
//! Not for data: a worker's ring has 64-byte entries, which hold 16 bytes of command.

use super::refused::{explain, locked};
use io_uring::{IoUring, opcode, squeue, types};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// How often a caller that waits is asked whether it still wants to.
const TICK: Duration = Duration::from_millis(100);

/// One command at a time.
const ENTRIES: u32 = 4;

/// An io_uring with 128-byte entries (`IORING_SETUP_SQE128`). Dropping it cancels what it still has in flight.
pub struct CommandRing {
    ring: IoUring<squeue::Entry128>,
    /// Numbers the commands, so that the late result of one is not taken for another's.
    count: u64,
}

impl CommandRing {
    /// Makes one for the calling thread.
    ///
    /// # Errors
    /// The kernel's, as for [`Uring::new`](super::Uring::new).
    pub fn new() -> io::Result<CommandRing> {
        let made = IoUring::builder().dontfork().build(ENTRIES);
        let ring = made.map_err(|error| explain(&error, 2 * locked(ENTRIES, 2 * ENTRIES)))?;
        Ok(CommandRing { ring, count: 0 })
    }

    /// Gives `file` the command `op` with the 80 bytes that `command` makes from the address of `payload`,
    /// and waits for its result, a number or a negated errno, which comes with the payload as the kernel left
    /// it. `go_on` is asked ten times a second; once it says no, the answer is `None`, and `payload` is
    /// leaked, since the kernel may still use it.
    ///
    /// # Errors
    /// When the ring does not take commands.
    pub fn run(
        &mut self,
        file: BorrowedFd<'_>,
        op: u32,
        payload: Box<[u8]>,
        command: impl FnOnce(u64) -> [u8; 80],
        mut go_on: impl FnMut() -> bool,
    ) -> io::Result<Option<(i32, Box<[u8]>)>> {
        // A raw pointer from here on: the kernel writes through it.
        let payload = Box::into_raw(payload);
        let bytes = command(payload.cast::<u8>() as u64);
        self.count += 1;
        let entry = opcode::UringCmd80::new(types::Fd(file.as_raw_fd()), op).cmd(bytes).build();
        // SAFETY: the payload is leaked until the result is there, and the file is borrowed while the entry is
        // taken in by the first `submit_with_args` below, from when on the kernel holds it itself.
        unsafe { self.ring.submission().push(&entry.user_data(self.count)) }.map_err(io::Error::other)?;
        let tick = types::Timespec::from(TICK);
        loop {
            match self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&tick)) {
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY) => {}
                    _ => return Err(error),
                },
            }
            let ours = self.ring.completion().find(|cqe| cqe.user_data() == self.count);
            if let Some(cqe) = ours {
                // SAFETY: it was a box until above, and the kernel is through with it.
                return Ok(Some((cqe.result(), unsafe { Box::from_raw(payload) })));
            }
            if !go_on() {
                return Ok(None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_file_without_commands_says_so() {
        let mut ring = CommandRing::new().unwrap();
        let file = tempfile::tempfile().unwrap();
        for _ in 0..20 {
            let (result, payload) =
                ring.run(file.as_fd(), 1, Box::new([7; 8]), |_| [0; 80], || true).unwrap().unwrap();
            assert_eq!((result, &*payload), (-libc::EOPNOTSUPP, [7; 8].as_slice()));
        }
    }
}
