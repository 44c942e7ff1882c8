//! A volume that stores nothing: what is left of a request's cost is ours and the frontend's.
//!
//! A write is forgotten, and a read leaves the data as it is: what comes back is whatever the buffer held.
//! For measuring only.

use super::backend::Backend;
use crate::block::{Data, Errno};
use crate::ring::{Io, Ring};

/// Nothing to keep.
pub struct Null;

impl<R: Ring> Backend<R> for Null {
    async fn read(&self, _: &Io<R>, _: Data<'_>, _: u64, _: u64) -> Result<(), Errno> {
        Ok(())
    }

    async fn write(&self, _: &Io<R>, _: Data<'_>, _: u64, _: u64, _: bool) -> Result<(), Errno> {
        Ok(())
    }

    async fn flush(&self, _: &Io<R>) -> Result<(), Errno> {
        Ok(())
    }

    async fn discard(&self, _: &Io<R>, _: u64, _: u64) -> Result<(), Errno> {
        Ok(())
    }

    async fn write_zeroes(&self, _: &Io<R>, _: u64, _: u64, _: bool) -> Result<(), Errno> {
        Ok(())
    }
}
