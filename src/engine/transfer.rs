//! Reads and writes finished: short ones resumed, refused ones tried again. Once, for every volume.

use super::driver::AnyChannel;
use crate::block::{Data, Errno, Flags, Front, Iovec, Op, Request, SECTOR, Window};
use crate::ring::{Io, Ring, Sqe, Target, zeroes};

/// Which way the bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Direction {
    /// From the file into the data.
    Read,
    /// From the data into the file, with `RWF_*` flags.
    Write { rw_flags: i32 },
}

/// Who carries it out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Via {
    /// The kernel, asked through the ring.
    Ring,
    /// This thread ([`Ring::submit_sync`]).
    Inline,
}

/// In a row, without a byte moved. The kernel says `EAGAIN` when it is short of memory for a moment; a file
/// that says nothing else is broken, and its error is passed on.
const MAX_RETRIES: u32 = 1000;

/// Moves exactly `len` bytes between `file` at `offset` and `data`. One submission where nothing goes wrong.
///
/// # Errors
/// `EIO` when the file ends too early (somebody truncated it), `ENOSPC` when a write moves nothing, and
/// whatever the kernel says.
pub(super) async fn exactly<R: Ring>(
    io: &Io<R>,
    by: Via,
    file: Target,
    direction: Direction,
    data: Data<'_>,
    len: u64,
    offset: u64,
) -> Result<(), Errno> {
    let (mut rest, mut done) = (data, 0);
    let mut retries = 0;
    loop {
        let sqe = match rest {
            Data::None => return Err(Errno::EINVAL),
            Data::Registered { index, skip } => {
                fixed(file, direction, index, skip, len - done, offset + done)
            }
            Data::Iovecs(window) => vector(file, direction, window, offset + done),
        };
        let result = match by {
            Via::Ring => io.submit(&sqe).await,
            Via::Inline => io.submit_sync(&sqe),
        };
        match Errno::split(result) {
            Ok(0) => return Err(if direction == Direction::Read { Errno::EIO } else { Errno::ENOSPC }),
            Ok(count) => {
                retries = 0;
                done += u64::from(count);
                if done >= len {
                    return Ok(());
                }
                rest = rest.after(count.into());
            }
            Err(Errno::EAGAIN | Errno::EINTR) if retries < MAX_RETRIES => retries += 1,
            Err(errno) => return Err(errno),
        }
    }
}

fn fixed(file: Target, direction: Direction, index: u16, skip: u64, len: u64, offset: u64) -> Sqe<'static> {
    let len = len.min(Sqe::MAX_RW as u64) as u32;
    match direction {
        Direction::Read => Sqe::ReadFixed { file, index, skip, len, offset },
        Direction::Write { rw_flags } => Sqe::WriteFixed { file, index, skip, len, offset, rw_flags },
    }
}

/// One range goes without a vector, which the kernel would have to copy and check.
pub(super) fn vector<'a>(file: Target, direction: Direction, window: Window<'a>, offset: u64) -> Sqe<'a> {
    match (direction, window.front()) {
        (Direction::Read, Front::One(range)) => Sqe::Read { file, range, offset },
        (Direction::Write { rw_flags }, Front::One(range)) => Sqe::Write { file, range, offset, rw_flags },
        (Direction::Read, Front::Many(ranges)) => Sqe::Readv { file, ranges, offset },
        (Direction::Write { rw_flags }, Front::Many(ranges)) => {
            Sqe::Writev { file, ranges, offset, rw_flags }
        }
    }
}

/// Writes the zeroes of `request` the long way, a MiB at a time.
pub(super) async fn write_zeroes<R: Ring>(
    channel: &AnyChannel<R>,
    io: &Io<R>,
    request: &Request<'_>,
) -> Result<(), Errno> {
    let mut done = 0;
    while done < request.len() {
        let mut iovecs = [Iovec::EMPTY; 16];
        let mut step = 0;
        for iovec in &mut iovecs {
            *iovec = zeroes(request.len() - done - step);
            step += iovec.len() as u64;
        }
        let write = Request {
            op: Op::Write,
            flags: Flags::default(),
            sector: request.sector + done / SECTOR,
            sectors: (step / SECTOR) as u32,
            data: Data::of(&iovecs),
        };
        channel.perform(io, &write, false).await?;
        done += step;
    }
    Ok(())
}
