//! The checkpoint: every request of every frontend passes here, on the way in and on the way out.
//!
//! What a volume need not know is settled here once: bounds, alignment, read-only, and the emulation of
//! write-zeroes where the store has no such thing.

use super::backend::Backend;
use super::{Attached, transfer};
use crate::block::{Data, Errno, Op, Request, SECTOR};
use crate::ring::{Io, Ring};

/// Carries `request` out, wholly or with the error that stopped it.
///
/// # Errors
/// `EROFS` for a change to a read-only export, `ENOSPC` for a write and `EIO` for anything else past the
/// end (what the kernel's own block layer answers), `EINVAL` for a range that is not on logical blocks,
/// `EOPNOTSUPP` for a discard where there is none; otherwise what the volume says.
pub async fn execute<R: Ring>(
    volume: &Attached<R>,
    io: &Io<R>,
    request: &mut Request<'_>,
) -> Result<(), Errno> {
    admit(volume, request)?;
    let (offset, len, flags) = (request.sector * SECTOR, request.len(), request.flags);
    match request.op {
        Op::Read if len == 0 => Ok(()),
        Op::Read => volume.read(io, &mut request.data, len, offset).await,
        Op::Write if len == 0 => Ok(()),
        Op::Write => volume.write(io, &mut request.data, len, offset, flags.fua).await,
        Op::Flush => volume.flush(io).await,
        Op::Discard if len == 0 => Ok(()),
        Op::Discard => volume.discard(io, offset, len).await,
        Op::WriteZeroes if len == 0 => Ok(()),
        Op::WriteZeroes => {
            match volume.write_zeroes(io, offset, len, flags.unmap).await {
                Err(Errno::EOPNOTSUPP) => transfer::write_zeroes(volume, io, offset, len).await?,
                other => other?,
            }
            if flags.fua { volume.flush(io).await } else { Ok(()) }
        }
    }
}

/// Refuses what no volume should see. Costs a handful of comparisons.
fn admit<R: Ring>(volume: &Attached<R>, request: &Request<'_>) -> Result<(), Errno> {
    let geometry = volume.geometry();
    let changes = matches!(request.op, Op::Write | Op::Discard | Op::WriteZeroes);
    if changes && geometry.read_only {
        return Err(Errno::EROFS);
    }
    if request.op == Op::Discard && geometry.discard.is_none() {
        return Err(Errno::EOPNOTSUPP);
    }
    if !geometry.contains(request.sector, request.sectors) {
        return Err(if changes { Errno::ENOSPC } else { Errno::EIO });
    }
    if !geometry.aligned(request.sector, request.sectors) {
        return Err(Errno::EINVAL);
    }
    debug_assert!(
        match &request.data {
            Data::None => !matches!(request.op, Op::Read | Op::Write) || request.is_empty(),
            Data::Iovecs(iovecs) =>
                iovecs.iter().map(|iovec| iovec.len() as u64).sum::<u64>() == request.len(),
            Data::Registered { .. } => volume.takes_registered(),
        },
        "the frontend's data does not fit its request: {request:?}"
    );
    Ok(())
}
