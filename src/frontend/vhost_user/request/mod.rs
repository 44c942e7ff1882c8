//! From a descriptor chain to a request (virtio 1.3 sections 2.7 and 5.2.6).
//!
//! Everything in guest memory is read once and believed never. A driver may lay a chain out as it likes: the
//! 16 bytes of header over several descriptors, empty descriptors, a status byte at the end of a data buffer.
//! So a chain is first resolved to ranges of our memory, readable ones and then writable ones, and the header
//! and the status byte are cut off these.

#![forbid(unsafe_code)]

mod straight;

use super::memory::{DescriptorTable, gather, read};
use crate::block::{Iovec, Op, SECTOR_SHIFT};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::desc::split::Descriptor;

/// The most data segments in a request: more than any driver of our time sends.
pub const MAX_SEGMENTS: usize = 254;

/// The most ranges in one discard or write-zeroes.
pub const MAX_RANGES: usize = 16;

/// Ranges of our memory a chain may resolve to: its segments, header and status, and some room for segments
/// that lie across two memory regions.
const MAX_IOVECS: usize = MAX_SEGMENTS + 2 + 8;

/// `VIRTIO_BLK_S_*`: the status byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Failed.
    IoErr = 1,
    /// Unknown or impossible.
    Unsupported = 2,
}

/// One range of a discard or write-zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First sector.
    pub sector: u64,
    /// Sectors.
    pub sectors: u32,
    /// Give the blocks back.
    pub unmap: bool,
}

/// A tag's memory for chains, which are in a guest's memory that stays for `'m`. It grows to the longest one seen, and is
/// then used again and again.
#[derive(Default)]
pub struct Scratch<'m> {
    /// The chain's ranges; [`Parsed::Transfer`] says which are data.
    pub iovecs: Vec<Iovec<'m>>,
    /// The ranges of a discard or write-zeroes, last first.
    pub ranges: Vec<Range>,
}

/// A request that made sense.
#[derive(Debug)]
pub enum Parsed {
    /// Read or write.
    Transfer {
        /// Which.
        op: Op,
        /// First sector.
        sector: u64,
        /// Sectors, as many as the data has room for.
        sectors: u32,
        /// The data within [`Scratch::iovecs`].
        data: std::ops::Range<usize>,
    },
    /// Flush.
    Flush,
    /// Discard or write-zeroes of all of [`Scratch::ranges`].
    Ranges(Op),
    /// The device's name goes into these of [`Scratch::iovecs`].
    GetId(std::ops::Range<usize>),
}

/// A chain that made sense.
#[derive(Debug)]
pub struct Chain<'m> {
    /// One byte for the status.
    pub status: Iovec<'m>,
    /// What it asks for.
    pub request: Parsed,
}

/// Reads the chain that starts at descriptor `head` of `table`. The cost is one read of each descriptor, a
/// walk over the guest's few memory regions for each, and no allocation once `scratch` has grown.
///
/// # Errors
/// What its driver is to be told, at its [`status_byte`], of one that cannot be carried out.
#[inline]
pub fn parse<'m>(
    table: DescriptorTable<'m>,
    head: u16,
    indirect: bool,
    scratch: &mut Scratch<'m>,
) -> Result<Chain<'m>, Status> {
    match straight::straight(table, head, indirect, scratch) {
        Some(chain) => Ok(chain),
        None => parse_any(table, head, indirect, scratch),
    }
}

/// Reads a chain of any layout.
// On its own, the compiler keeps its loop in registers: 8 instructions for each segment.
#[inline(never)]
fn parse_any<'m>(
    table: DescriptorTable<'m>,
    head: u16,
    indirect: bool,
    scratch: &mut Scratch<'m>,
) -> Result<Chain<'m>, Status> {
    scratch.iovecs.clear();
    scratch.ranges.clear();
    let readable = resolve(table, head, indirect, &mut scratch.iovecs).ok_or(Status::IoErr)?;
    // The status is the last writable byte, whatever else that descriptor holds.
    let last = scratch.iovecs[readable..].last_mut().ok_or(Status::IoErr)?;
    let status = last.split_off(last.len() - 1);
    Ok(Chain { status, request: understand(readable, scratch)? })
}

/// Resolves a chain to the ranges of its non-empty descriptors. How many of them are readable; the rest is
/// writable. `None` for a chain that is too long, loops, leaves the table or the guest's memory, has a
/// readable descriptor after a writable one, or nests indirect tables.
fn resolve<'m>(
    mut table: DescriptorTable<'m>,
    head: u16,
    indirect: bool,
    iovecs: &mut Vec<Iovec<'m>>,
) -> Option<usize> {
    let memory = table.memory();
    let mut index = head;
    let mut in_indirect = false;
    let mut readable = 0;
    let mut writable = false;
    // A loop in the chain runs into this bound, too.
    for _ in 0..MAX_IOVECS {
        let descriptor = table.get(index)?;
        if descriptor.refers_to_indirect_table() {
            let len = descriptor.len() as usize;
            let count = len / size_of::<Descriptor>();
            let whole = len.is_multiple_of(size_of::<Descriptor>()) && count > 0;
            if !indirect || in_indirect || descriptor.has_next() || !whole {
                return None;
            }
            table = memory.table(descriptor.addr().0, u16::try_from(count).ok()?);
            (index, in_indirect) = (0, true);
            continue;
        }
        if descriptor.is_write_only() {
            writable = true;
        } else if writable {
            return None;
        }
        let fits = memory.split(descriptor.addr().0, u64::from(descriptor.len()), |iovec| {
            iovecs.push(iovec);
            iovecs.len() <= MAX_IOVECS
        });
        if !fits {
            return None;
        }
        if !writable {
            readable = iovecs.len();
        }
        if !descriptor.has_next() {
            return Some(readable);
        }
        index = descriptor.next();
    }
    None
}

/// Where the status of a chain goes that [`parse`] refuses. Its end is looked for whatever is wrong on the way; `None`
/// where it cannot be reached, so that nothing can be told.
#[cold]
pub fn status_byte(table: DescriptorTable<'_>, head: u16) -> Option<Iovec<'_>> {
    let place = status_place(table, head)?;
    let mut status = None;
    table.memory().split(place, 1, |byte| {
        status = Some(byte);
        true
    });
    status
}

/// The guest's address of a chain's status byte: the last of its last writable descriptor.
///
/// `None` where there is none, or where it is not clear which one it is: the chain loops, leaves its table, or its table
/// is not in the guest's memory; an indirect table has another one in it, or a descriptor after it; or the last
/// descriptor of all is writable and empty, and may well have been meant for the status.
fn status_place(mut table: DescriptorTable<'_>, head: u16) -> Option<u64> {
    // A chain is no longer than its vring (virtio 1.3 section 2.7.5.3.1), even where it is too long for us; and one
    // that loops runs into this bound.
    let bound = usize::from(table.len()).max(MAX_IOVECS) + 1;
    let (mut index, mut in_indirect, mut last) = (head, false, None);
    for _ in 0..bound {
        let descriptor = table.get(index)?;
        let (at, len, writable) =
            (descriptor.addr().0, u64::from(descriptor.len()), descriptor.is_write_only());
        if descriptor.refers_to_indirect_table() {
            if in_indirect || descriptor.has_next() {
                return None;
            }
            let count = len / size_of::<Descriptor>() as u64;
            table = table.memory().table(at, u16::try_from(count).unwrap_or(u16::MAX));
            (index, in_indirect) = (0, true);
            continue;
        }
        if writable && len > 0 {
            last = at.checked_add(len - 1);
        }
        if !descriptor.has_next() {
            return last.filter(|_| !writable || len > 0);
        }
        index = descriptor.next();
    }
    None
}

/// The header: `struct virtio_blk_outhdr`.
const HEADER: usize = 16;

fn understand(readable: usize, scratch: &mut Scratch<'_>) -> Result<Parsed, Status> {
    let iovecs = &mut scratch.iovecs;
    let (header, first) = header(&mut iovecs[..readable]).ok_or(Status::IoErr)?;
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let [.., s0, s1, s2, s3, s4, s5, s6, s7] = header;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    // Ranges that the header or the status used up stand at the edges, and the status's only when it had a
    // descriptor of its own.
    let mut end = iovecs.len();
    if iovecs[end - 1].is_empty() {
        end -= 1;
    }
    let (out, into) = (first..readable, readable..end);
    match kind {
        VIRTIO_BLK_T_IN if out.is_empty() => transfer(Op::Read, sector, into, iovecs),
        VIRTIO_BLK_T_OUT if into.is_empty() => transfer(Op::Write, sector, out, iovecs),
        VIRTIO_BLK_T_FLUSH => Ok(Parsed::Flush),
        VIRTIO_BLK_T_GET_ID if out.is_empty() => Ok(Parsed::GetId(into)),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if into.is_empty() => {
            let op = if kind == VIRTIO_BLK_T_DISCARD { Op::Discard } else { Op::WriteZeroes };
            ranges(op, &iovecs[out], &mut scratch.ranges)?;
            Ok(Parsed::Ranges(op))
        }
        VIRTIO_BLK_T_IN
        | VIRTIO_BLK_T_OUT
        | VIRTIO_BLK_T_GET_ID
        | VIRTIO_BLK_T_DISCARD
        | VIRTIO_BLK_T_WRITE_ZEROES => Err(Status::IoErr),
        _ => Err(Status::Unsupported),
    }
}

/// Cuts the header off a chain's readable ranges: it, and the index of the first range that is left. `None` where they are
/// too short.
fn header(readable: &mut [Iovec<'_>]) -> Option<([u8; HEADER], usize)> {
    // As all drivers send it: a descriptor of its own.
    if let Some(header) = readable.first().and_then(read) {
        return Some((header, 1));
    }
    let mut header = [0; HEADER];
    let whole = gather(readable, &mut header) == HEADER;
    whole.then(|| (header, cut(readable, HEADER)))
}

/// Drops the first `count` bytes of the ranges. The index of the first one that is left.
fn cut(iovecs: &mut [Iovec<'_>], mut count: usize) -> usize {
    for (index, iovec) in iovecs.iter_mut().enumerate() {
        let step = iovec.len().min(count);
        iovec.advance(step);
        count -= step;
        if !iovec.is_empty() {
            return index;
        }
    }
    iovecs.len()
}

fn transfer(
    op: Op,
    sector: u64,
    data: std::ops::Range<usize>,
    iovecs: &[Iovec<'_>],
) -> Result<Parsed, Status> {
    // At most MAX_IOVECS lengths of 32 bits: no overflow.
    let bytes: u64 = iovecs[data.clone()].iter().map(|iovec| iovec.len() as u64).sum();
    let sectors = u32::try_from(bytes >> SECTOR_SHIFT).map_err(|_| Status::IoErr)?;
    if u64::from(sectors) << SECTOR_SHIFT != bytes || bytes == 0 {
        return Err(Status::IoErr);
    }
    Ok(Parsed::Transfer { op, sector, sectors, data })
}

/// `struct virtio_blk_discard_write_zeroes`, some of them.
fn ranges(op: Op, from: &[Iovec<'_>], ranges: &mut Vec<Range>) -> Result<(), Status> {
    const LEN: usize = 16;
    let bytes: usize = from.iter().map(Iovec::len).sum();
    if bytes == 0 || !bytes.is_multiple_of(LEN) || bytes / LEN > MAX_RANGES {
        return Err(Status::IoErr);
    }
    let mut copy = [0; LEN * MAX_RANGES];
    gather(from, &mut copy);
    for range in copy[..bytes].chunks_exact(LEN) {
        let word = |at: usize| u32::from_le_bytes([range[at], range[at + 1], range[at + 2], range[at + 3]]);
        let unmap = match (op, word(12)) {
            (_, 0) => false,
            (Op::WriteZeroes, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) => true,
            // A discard with a flag, or a flag of the future.
            _ => return Err(Status::Unsupported),
        };
        let sector = u64::from(word(4)) << 32 | u64::from(word(0));
        ranges.push(Range { sector, sectors: word(8), unmap });
    }
    ranges.reverse();
    Ok(())
}

#[cfg(test)]
mod tests;
