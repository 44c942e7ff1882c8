//! What every kind of volume can do.

use crate::block::{Data, Errno};
use crate::ring::{Io, Ring};

/// The operations of a volume as one worker uses it.
///
/// [`execute`](super::execute()) has checked every argument: ranges lie inside the volume on logical blocks,
/// `data` holds exactly `len` bytes, a read-only volume sees no write. An operation is complete or failed
/// when it returns: none of them is ever short.
///
/// `EOPNOTSUPP` from [`write_zeroes`](Backend::write_zeroes) means "write them yourself", and `execute` does.
pub trait Backend<R: Ring> {
    /// Fills `data` with `len` bytes from `offset`.
    async fn read(&self, io: &Io<R>, data: Data<'_>, len: u64, offset: u64) -> Result<(), Errno>;

    /// Stores `len` bytes of `data` at `offset`; with `fua` on stable storage before it returns.
    async fn write(&self, io: &Io<R>, data: Data<'_>, len: u64, offset: u64, fua: bool) -> Result<(), Errno>;

    /// Brings every write that completed before to stable storage.
    async fn flush(&self, io: &Io<R>) -> Result<(), Errno>;

    /// Gives the range back; what it holds afterwards is undefined.
    async fn discard(&self, io: &Io<R>, offset: u64, len: u64) -> Result<(), Errno>;

    /// Makes the range read zero, and only with `unmap` gives its blocks back.
    async fn write_zeroes(&self, io: &Io<R>, offset: u64, len: u64, unmap: bool) -> Result<(), Errno>;
}
