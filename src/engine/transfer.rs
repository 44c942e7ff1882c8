//! Reads and writes finished: short ones resumed, refused ones tried again. Once, for every volume.

use super::Attached;
use super::backend::Backend;
use crate::block::{Data, Errno, Iovec};
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
pub(super) enum By {
    /// The kernel, asked through the ring.
    Ring,
    /// This thread ([`Ring::carry_out`]).
    Us,
}

/// The most the kernel moves in one call (`MAX_RW_COUNT` of `linux/fs.h`, for 4 KiB pages).
const MAX_RW: u64 = 0x7fff_f000;

/// The most ranges the kernel takes in one call (`UIO_MAXIOV`).
const MAX_IOVECS: usize = 1024;

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
    by: By,
    file: Target,
    direction: Direction,
    data: &mut Data<'_>,
    len: u64,
    offset: u64,
) -> Result<(), Errno> {
    let mut done = 0;
    let mut retries = 0;
    loop {
        let sqe = match data {
            Data::None => return Err(Errno::EINVAL),
            Data::Registered { index } => fixed(file, direction, *index, done, len, offset),
            Data::Iovecs(iovecs) => vector(file, direction, iovecs, offset + done),
        };
        let result = match by {
            By::Ring => io.submit(&sqe).await,
            By::Us => io.carry_out(&sqe),
        };
        match Errno::split(result) {
            Ok(0) => return Err(if direction == Direction::Read { Errno::EIO } else { Errno::ENOSPC }),
            Ok(count) => {
                retries = 0;
                done += u64::from(count);
                if done >= len {
                    return Ok(());
                }
                if let Data::Iovecs(iovecs) = data {
                    advance(iovecs, count as usize);
                }
            }
            Err(Errno::EAGAIN | Errno::EINTR) if retries < MAX_RETRIES => retries += 1,
            Err(errno) => return Err(errno),
        }
    }
}

fn fixed(file: Target, direction: Direction, index: u16, skip: u64, len: u64, offset: u64) -> Sqe {
    let (offset, len) = (offset + skip, (len - skip).min(MAX_RW) as u32);
    match direction {
        Direction::Read => Sqe::ReadFixed { file, index, skip, len, offset },
        Direction::Write { rw_flags } => Sqe::WriteFixed { file, index, skip, len, offset, rw_flags },
    }
}

/// One range goes without a vector, which the kernel would have to copy and check.
pub(super) fn vector(file: Target, direction: Direction, iovecs: &[Iovec], offset: u64) -> Sqe {
    match (direction, iovecs) {
        (Direction::Read, [one]) => {
            Sqe::Read { file, addr: one.base(), len: (one.len() as u64).min(MAX_RW) as u32, offset }
        }
        (Direction::Write { rw_flags }, [one]) => Sqe::Write {
            file,
            addr: one.base(),
            len: (one.len() as u64).min(MAX_RW) as u32,
            offset,
            rw_flags,
        },
        (Direction::Read, many) => {
            Sqe::Readv { file, iovecs: many.as_ptr(), count: many.len().min(MAX_IOVECS) as u32, offset }
        }
        (Direction::Write { rw_flags }, many) => {
            let count = many.len().min(MAX_IOVECS) as u32;
            Sqe::Writev { file, iovecs: many.as_ptr(), count, offset, rw_flags }
        }
    }
}

/// Drops the first `count` bytes of the ranges, and the ranges that are used up.
pub(super) fn advance(iovecs: &mut &mut [Iovec], mut count: usize) {
    let mut used = 0;
    for iovec in iovecs.iter_mut() {
        let step = iovec.len().min(count);
        iovec.advance(step);
        count -= step;
        if !iovec.is_empty() {
            break;
        }
        used += 1;
    }
    *iovecs = &mut std::mem::take(iovecs)[used..];
}

/// The ranges of the first `count` bytes.
pub(super) fn front(iovecs: &[Iovec], mut count: usize) -> impl Iterator<Item = Iovec> {
    let cut = move |iovec: &Iovec| {
        let mut part = *iovec;
        part.split_off(count);
        count -= part.len();
        part
    };
    iovecs.iter().map(cut).filter(|part| !part.is_empty())
}

/// Writes zeroes the long way, a MiB at a time.
pub(super) async fn write_zeroes<R: Ring>(
    volume: &Attached<R>,
    io: &Io<R>,
    offset: u64,
    len: u64,
) -> Result<(), Errno> {
    let mut done = 0;
    while done < len {
        let mut iovecs = [Iovec::EMPTY; 16];
        let mut step = 0;
        for iovec in &mut iovecs {
            *iovec = zeroes(len - done - step);
            step += iovec.len() as u64;
        }
        volume.write(io, &mut Data::Iovecs(&mut iovecs), step, offset + done, false).await?;
        done += step;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::Mapping;

    #[test]
    fn advancing_keeps_what_is_left() {
        let bytes = Mapping::anonymous(30).unwrap();
        for count in 0..=30 {
            let mut store = [bytes.iovec(0, 10), bytes.iovec(10, 0), bytes.iovec(10, 20)];
            let mut iovecs = &mut store[..];
            advance(&mut iovecs, count);
            assert_eq!(iovecs.iter().map(Iovec::len).sum::<usize>(), 30 - count);
            if count < 30 {
                assert_eq!(iovecs[0].base(), bytes.as_ptr().wrapping_add(count));
                assert!(!iovecs[0].is_empty());
            }
        }
    }
}
