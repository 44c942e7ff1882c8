//! What a copy reads from or writes to, once it is open.

#![forbid(unsafe_code)]

use std::io;
use std::ops::Range;
use std::rc::Rc;

use tokio_uring::buf::BoundedBuf;
use tokio_uring::fs::File;

use super::nbd::Export;
use crate::block::Op;

/// A file or device, or an export. Buffers go with each call and come back with its result: the kernel has them
/// meanwhile.
pub(super) enum End {
    File(File),
    Nbd(Rc<Export>),
}

impl End {
    /// Reads into `range` of the buffer, perhaps less.
    pub async fn read(
        &self,
        buffer: Vec<u8>,
        range: Range<usize>,
        offset: u64,
    ) -> (io::Result<usize>, Vec<u8>) {
        match self {
            End::File(file) => {
                let (result, slice) = file.read_at(buffer.slice(range), offset).await;
                (result, slice.into_inner())
            }
            End::Nbd(export) => export.transfer(Op::Read, buffer, range, offset).await,
        }
    }

    /// Writes `range` of the buffer, perhaps less.
    pub async fn write(
        &self,
        buffer: Vec<u8>,
        range: Range<usize>,
        offset: u64,
    ) -> (io::Result<usize>, Vec<u8>) {
        match self {
            End::File(file) => {
                let (result, slice) = file.write_at(buffer.slice(range), offset).submit().await;
                (result, slice.into_inner())
            }
            End::Nbd(export) => export.transfer(Op::Write, buffer, range, offset).await,
        }
    }

    /// Lets the store make zeroes of whole blocks: a device by giving the space back if it then reads as zeroes, else by
    /// writing them itself. `false` if it does neither.
    pub async fn zero(&self, start: u64, end: u64) -> bool {
        // Any failure is met again by the writes that follow, and reported there.
        let file = match self {
            End::File(file) => file,
            End::Nbd(export) => {
                let zeroed = export.zero(start, end).await;
                return zeroed.inspect_err(|error| log::debug!("zeroes at {start}..{end}: {error}")).is_ok();
            }
        };
        for mode in [libc::FALLOC_FL_PUNCH_HOLE, libc::FALLOC_FL_ZERO_RANGE] {
            let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
            match file.fallocate(start, end - start, mode).await {
                Ok(()) => return true,
                Err(error) => log::debug!("fallocate({mode:#x}) of {start}..{end}: {error}"),
            }
        }
        false
    }

    /// Brings what was written to stable storage.
    pub async fn flush(&self) -> io::Result<()> {
        match self {
            End::File(file) => file.sync_all().await,
            End::Nbd(export) => export.flush().await,
        }
    }
}
