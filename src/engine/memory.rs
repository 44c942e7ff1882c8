//! A volume in this process's memory: fast, and gone with it.

use super::backend::Backend;
use crate::block::{Data, DiscardLimits, Errno, Geometry, GeometryError, Iovec};
use crate::ring::{Io, Mapping, Ring};
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Memory shared by all workers. Two requests that race for the same bytes leave a mixture, as on a disk.
#[derive(Clone)]
pub struct Memory {
    mapping: Arc<Mapping>,
}

/// Bytes copied at one go, some 50 us. A request may have any number of them, and they are copied on the worker's own
/// time, which others wait for.
const SLICE: usize = 256 << 10;

/// The most a discard or write-zeroes covers at once, for the same reason.
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

/// Has `copy` do its work on `iovecs`, of `len` bytes together, from `offset` on: at one go when it is little, and else
/// with pauses in which the worker sees to its other requests.
async fn in_slices<R: Ring>(
    io: &Io<R>,
    data: &Data<'_>,
    len: u64,
    offset: u64,
    copy: impl Fn(usize, &[Iovec]),
) -> Result<(), Errno> {
    let Data::Iovecs(iovecs) = data else { return Err(Errno::EINVAL) };
    let mut at = offset as usize;
    if len <= SLICE as u64 {
        copy(at, iovecs);
        return Ok(());
    }
    let mut left = SLICE;
    for iovec in iovecs.iter() {
        let mut rest = *iovec;
        while !rest.is_empty() {
            if left == 0 {
                io.sleep(Duration::ZERO).await;
                left = SLICE;
            }
            let mut part = rest;
            rest = part.split_off(left);
            copy(at, &[part]);
            at += part.len();
            left -= part.len();
        }
    }
    Ok(())
}

impl<R: Ring> Backend<R> for Memory {
    async fn read(&self, io: &Io<R>, data: &mut Data<'_>, len: u64, offset: u64) -> Result<(), Errno> {
        in_slices(io, data, len, offset, |at, iovecs| self.mapping.scatter(at, iovecs)).await
    }

    async fn write(
        &self,
        io: &Io<R>,
        data: &mut Data<'_>,
        len: u64,
        offset: u64,
        _: bool,
    ) -> Result<(), Errno> {
        in_slices(io, data, len, offset, |at, iovecs| self.mapping.gather(at, iovecs)).await
    }

    async fn flush(&self, _: &Io<R>) -> Result<(), Errno> {
        Ok(())
    }

    async fn discard(&self, _: &Io<R>, offset: u64, len: u64) -> Result<(), Errno> {
        self.mapping.zero(offset as usize, len as usize);
        Ok(())
    }

    async fn write_zeroes(&self, _: &Io<R>, offset: u64, len: u64, _: bool) -> Result<(), Errno> {
        self.mapping.zero(offset as usize, len as usize);
        Ok(())
    }
}
