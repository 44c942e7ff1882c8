//! A failed request, as the kernel would tell it.

#![forbid(unsafe_code)]

use std::fmt;
use std::io;

/// A positive Linux errno. Zero and negative values cannot be made: success is `Ok(())`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(i32);

impl Errno {
    /// I/O error: the backing store failed, or said something that makes no sense.
    pub const EIO: Errno = Errno(libc::EIO);
    /// The request is malformed or misaligned.
    pub const EINVAL: Errno = Errno(libc::EINVAL);
    /// The volume cannot do this operation.
    pub const EOPNOTSUPP: Errno = Errno(libc::EOPNOTSUPP);
    /// A write to a read-only volume.
    pub const EROFS: Errno = Errno(libc::EROFS);
    /// Past the end of the volume for a write, or no room in the backing store.
    pub const ENOSPC: Errno = Errno(libc::ENOSPC);
    /// Try again: the kernel had no room for the request just now.
    pub const EAGAIN: Errno = Errno(libc::EAGAIN);
    /// Memory that is named is not there.
    pub const EFAULT: Errno = Errno(libc::EFAULT);
    /// Someone else is using it just now.
    pub const EBUSY: Errno = Errno(libc::EBUSY);
    /// A signal came first.
    pub const EINTR: Errno = Errno(libc::EINTR);
    /// The store behind the volume is gone.
    pub const ENOTCONN: Errno = Errno(libc::ENOTCONN);
    /// Nobody answered in time.
    pub const ETIMEDOUT: Errno = Errno(libc::ETIMEDOUT);
    /// The time is over.
    pub const ETIME: Errno = Errno(libc::ETIME);
    /// Not carried out, and to be carried out again: its queue stops while it waits for its store. From no store.
    pub const ERESTART: Errno = Errno(libc::ERESTART);
    /// No memory, or no room in a kernel table.
    pub const ENOMEM: Errno = Errno(libc::ENOMEM);

    /// From a positive errno; anything else (a peer that says "error 0") becomes `EIO`.
    pub fn new(raw: i32) -> Errno {
        if raw > 0 { Errno(raw) } else { Errno::EIO }
    }

    /// Splits an io_uring result: `n >= 0` is a count, `n < 0` is a negated errno.
    pub fn split(result: i32) -> Result<u32, Errno> {
        u32::try_from(result).map_err(|_| Errno::new(result.saturating_neg()))
    }

    /// The positive number.
    pub fn raw(self) -> i32 {
        self.0
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({}: {self})", self.0)
    }
}

impl std::error::Error for Errno {}

impl From<Errno> for io::Error {
    fn from(errno: Errno) -> io::Error {
        io::Error::from_raw_os_error(errno.0)
    }
}

impl From<io::Error> for Errno {
    /// An error without an errno of its own becomes `EIO`.
    fn from(error: io::Error) -> Errno {
        Errno::new(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_a_count_or_an_error() {
        assert_eq!(Errno::split(4096), Ok(4096));
        assert_eq!(Errno::split(0), Ok(0));
        assert_eq!(Errno::split(-libc::EIO), Err(Errno::EIO));
        assert_eq!(Errno::split(i32::MIN).map_err(|e| e.raw() > 0), Err(true));
    }

    #[test]
    fn success_is_not_an_errno() {
        assert_eq!(Errno::new(0), Errno::EIO);
        assert_eq!(Errno::new(-5), Errno::EIO);
    }
}
