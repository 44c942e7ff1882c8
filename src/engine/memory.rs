//! A volume in this process's memory: fast, and gone with it.

use super::backend::Backend;
use crate::block::{Data, DiscardLimits, Errno, Geometry, GeometryError};
use crate::ring::{Io, Mapping, Ring};
use std::io;
use std::sync::Arc;

/// Memory shared by all workers. Two requests that race for the same bytes leave a mixture, as on a disk.
#[derive(Clone)]
pub struct Memory {
    mapping: Arc<Mapping>,
}

/// The most a discard or write-zeroes covers at once: zeroing happens on the worker's own time.
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
}

impl<R: Ring> Backend<R> for Memory {
    async fn read(&self, _: &Io<R>, data: &mut Data<'_>, _: u64, offset: u64) -> Result<(), Errno> {
        let Data::Iovecs(iovecs) = data else { return Err(Errno::EINVAL) };
        self.mapping.scatter(offset as usize, iovecs);
        Ok(())
    }

    async fn write(&self, _: &Io<R>, data: &mut Data<'_>, _: u64, offset: u64, _: bool) -> Result<(), Errno> {
        let Data::Iovecs(iovecs) = data else { return Err(Errno::EINVAL) };
        self.mapping.gather(offset as usize, iovecs);
        Ok(())
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
