//! The runtime of what is no worker: the control API, and jobs on images.

use super::refused::{explain, locked};
use io_uring::IoUring;
use std::io;

/// Entries that `tokio-uring` asks for unless told otherwise.
const ENTRIES: u32 = 256;

/// Makes `tokio-uring`'s runtime for the calling thread.
///
/// # Errors
/// The cause and the way out, where io_uring cannot be had.
pub fn runtime() -> io::Result<tokio_uring::Runtime> {
    // That runtime panics where a ring can be made and not used.
    let probe = IoUring::new(2).and_then(|ring| usable(&ring));
    probe
        .and_then(|()| tokio_uring::Runtime::new(&tokio_uring::builder()))
        .map_err(|error| explain(&error, locked(ENTRIES, 2 * ENTRIES)))
}

/// Whether a ring can be used that could be made: a filter may forbid one and allow the other.
pub(super) fn usable<S, C>(ring: &IoUring<S, C>) -> io::Result<()>
where
    S: io_uring::squeue::EntryMarker,
    C: io_uring::cqueue::EntryMarker,
{
    // SAFETY: nothing is submitted, and there is no argument.
    unsafe { ring.submitter().enter::<libc::sigset_t>(0, 0, 0, None) }.map(drop)
}
