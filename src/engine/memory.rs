//! A volume in this process's memory: fast, and gone with it.

use super::backend::Backend;
use crate::block::{Data, DiscardLimits, Errno, Geometry, GeometryError, Iovec};
use crate::ring::{Io, Mapping, PASS_WORK, Ring};
use std::io;
use std::sync::Arc;

/// Memory shared by all workers. Two requests that race for the same bytes leave a mixture, as on a disk.
#[derive(Clone)]
pub struct Memory {
    mapping: Arc<Mapping>,
}

/// Bytes copied at one go. A request may have any number of them, and they are copied on the worker's own time, which
/// others wait for.
const SLICE: usize = PASS_WORK as usize;

/// Bytes given back at one go, up to a multiple of this: 0.2 ms where their pages are small. A huge page goes whole.
const ZERO_SLICE: u64 = 2 << 20;

/// What giving back a page costs, in bytes that could have been copied: 1 us.
const MADVISE: u64 = 16 << 10;

/// The most that a discard or write-zeroes covers.
const MAX_ZERO_SECTORS: u32 = (64 << 20) / 512;

/// The shape of a memory volume.
///
/// # Errors
/// See [`Geometry::new`].
pub(super) fn geometry(bytes: u64, logical_block: u32) -> Result<Geometry, GeometryError> {
    let mut geometry = Geometry::new(bytes, logical_block)?;
    // Whole pages go back to the system.
    geometry.discard = Some(DiscardLimits { granularity: 4096, max_sectors: MAX_ZERO_SECTORS });
    geometry.max_write_zeroes = MAX_ZERO_SECTORS;
    Ok(geometry)
}

impl Memory {
    /// Reserves `bytes`; memory is used as blocks are written.
    ///
    /// # Errors
    /// `ENOMEM` where the address space does not suffice.
    pub fn new(bytes: u64) -> io::Result<Memory> {
        let len = usize::try_from(bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        Ok(Memory { mapping: Arc::new(Mapping::anonymous(len)?) })
    }

    /// Bytes that were reserved, whatever the volume shows of them.
    pub fn len(&self) -> u64 {
        self.mapping.len() as u64
    }

    /// Gives the bytes from `start` to `end` back: they read zero from now on. Nothing if there are none.
    ///
    /// # Panics
    /// When `end` is past what was reserved.
    pub fn forget(&self, start: u64, end: u64) {
        if start < end {
            self.mapping.zero(start as usize, (end - start) as usize);
        }
    }
}

/// Has `copy` do its work on `iovecs`, of `len` bytes together, from `offset` on: in turns, so that others get theirs.
async fn in_slices<R: Ring>(
    io: &Io<R>,
    data: Data<'_>,
    len: u64,
    offset: u64,
    copy: impl Fn(usize, Iovec),
) -> Result<(), Errno> {
    let Data::Iovecs(window) = data else { return Err(Errno::EINVAL) };
    let mut at = offset as usize;
    if len <= SLICE as u64 {
        io.turn(len as u32).await;
        window.iter().for_each(|part| {
            copy(at, part);
            at += part.len();
        });
        return Ok(());
    }
    let mut left = 0;
    for mut rest in window.iter() {
        while !rest.is_empty() {
            if left == 0 {
                io.turn(PASS_WORK).await;
                left = SLICE;
            }
            let mut part = rest;
            rest = part.split_off(left);
            copy(at, part);
            at += part.len();
            left -= part.len();
        }
    }
    Ok(())
}

impl Memory {
    /// Makes a range read zero, in turns.
    async fn zero<R: Ring>(&self, io: &Io<R>, offset: u64, len: u64) -> Result<(), Errno> {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let next = (at + 1).next_multiple_of(ZERO_SLICE).min(end);
            io.turn((next - at).clamp(MADVISE, PASS_WORK.into()) as u32).await;
            self.mapping.zero(at as usize, (next - at) as usize);
            at = next;
        }
        Ok(())
    }
}

impl<R: Ring> Backend<R> for Memory {
    async fn read(&self, io: &Io<R>, data: Data<'_>, len: u64, offset: u64) -> Result<(), Errno> {
        in_slices(io, data, len, offset, |at, part| self.mapping.scatter(at, &[part])).await
    }

    async fn write(&self, io: &Io<R>, data: Data<'_>, len: u64, offset: u64, _: bool) -> Result<(), Errno> {
        in_slices(io, data, len, offset, |at, part| self.mapping.gather(at, &[part])).await
    }

    async fn flush(&self, _: &Io<R>) -> Result<(), Errno> {
        Ok(())
    }

    async fn discard(&self, io: &Io<R>, offset: u64, len: u64) -> Result<(), Errno> {
        self.zero(io, offset, len).await
    }

    async fn write_zeroes(&self, io: &Io<R>, offset: u64, len: u64, _: bool) -> Result<(), Errno> {
        self.zero(io, offset, len).await
    }
}
