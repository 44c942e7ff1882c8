//! What a file or block device can do, asked of the kernel once, when it is opened.

use super::Error;
use crate::block::DiscardLimits;
use rustix::io::{ReadWriteFlags, preadv2};
use std::fs::{self, File};
use std::io::{self, IoSliceMut, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Which calls give blocks back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `fallocate(2)`: holes and zero ranges.
    Regular,
    /// Discard as a ring command, zeroes by `fallocate(2)`.
    BlockDevice,
}

/// What [`probe`](Store::probe) found.
#[derive(Debug)]
pub(super) struct Store {
    pub kind: Kind,
    pub bytes: u64,
    /// The finest transfer: 512 for buffered I/O on a file.
    pub logical_block: u32,
    pub physical_block: u32,
    pub io_min: u32,
    pub io_opt: u32,
    pub memory_alignment: u32,
    pub discard: Option<DiscardLimits>,
    pub max_write_zeroes: u32,
    /// A read cannot be tried without waiting.
    pub reads_wait: bool,
}

/// A fallocate over more than this would hold a journal transaction, and its completion, for too long.
const MAX_FILE_RANGE_SECTORS: u32 = (1 << 30) / 512;

impl Store {
    pub fn probe(file: &File, direct: bool) -> Result<Store, Error> {
        let io = |what| move |source| Error::Io { what, source };
        let metadata = file.metadata().map_err(io("its metadata cannot be read"))?;
        let (memory, offset) = if direct { direct_alignment(file)? } else { (1, 512) };
        let reads_wait = !direct && reads_wait(file);
        if metadata.file_type().is_block_device() {
            let bytes = size(file).map_err(io("its size cannot be found"))?;
            return Ok(Store { reads_wait, ..Store::device(metadata.rdev(), bytes, memory, offset) });
        }
        if !metadata.file_type().is_file() {
            return Err(Error::Kind);
        }
        // st_blksize is the file system's favourite, not a limit: a 512-byte sector image stays one on a
        // file system of 4 KiB blocks.
        let block = u32::try_from(metadata.blksize()).unwrap_or(4096);
        let block = if block.is_power_of_two() { block.clamp(512, 65536) } else { 4096 };
        Ok(Store {
            kind: Kind::Regular,
            bytes: metadata.len(),
            logical_block: offset,
            physical_block: block.max(offset),
            io_min: block.max(offset),
            io_opt: 0,
            memory_alignment: memory,
            discard: Some(DiscardLimits {
                granularity: block.max(offset),
                max_sectors: MAX_FILE_RANGE_SECTORS,
            }),
            max_write_zeroes: MAX_FILE_RANGE_SECTORS,
            reads_wait,
        })
    }

    fn device(rdev: u64, bytes: u64, memory: u32, offset: u32) -> Store {
        let queue = queue_directory(rdev);
        let number = |name: &str| queue.as_deref().and_then(|dir| read_number(&dir.join(name)));
        let small = |name: &str, least: u32| {
            number(name).and_then(|n| u32::try_from(n).ok()).unwrap_or(least).max(least)
        };
        let logical_block = small("logical_block_size", 512).max(offset);
        let physical_block = small("physical_block_size", logical_block);
        let sectors = |bytes: u64| u32::try_from(bytes / 512).unwrap_or((u32::MAX / 512) & !7);
        let max_discard = number("discard_max_bytes").unwrap_or(0);
        Store {
            kind: Kind::BlockDevice,
            bytes,
            logical_block,
            physical_block,
            io_min: small("minimum_io_size", 0),
            io_opt: small("optimal_io_size", 0),
            memory_alignment: memory,
            discard: (max_discard > 0).then(|| DiscardLimits {
                granularity: small("discard_granularity", logical_block),
                max_sectors: sectors(max_discard),
            }),
            max_write_zeroes: MAX_FILE_RANGE_SECTORS,
            reads_wait: false,
        }
    }
}

/// Bytes in a regular file or a block device, now.
pub(super) fn size(mut file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if metadata.file_type().is_block_device() { file.seek(SeekFrom::End(0)) } else { Ok(metadata.len()) }
}

/// Whether the file cannot be read without waiting, so that io_uring hands each read to a thread (`FMODE_NOWAIT` of
/// `linux/fs.h`; tmpfs has none).
fn reads_wait(file: &File) -> bool {
    let mut byte = [0];
    let attempt = preadv2(file, &mut [IoSliceMut::new(&mut byte)], 0, ReadWriteFlags::NOWAIT);
    attempt == Err(rustix::io::Errno::OPNOTSUPP)
}

/// Memory and offset alignment of direct I/O (`STATX_DIOALIGN`, Linux 6.1): 0 means it does not work.
fn direct_alignment(file: &File) -> Result<(u32, u32), Error> {
    use rustix::fs::{AtFlags, StatxFlags, statx};
    let found = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        .map_err(|errno| Error::Io { what: "its alignment cannot be read", source: errno.into() })?;
    if found.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        // The file system does not tell. A page is what has always worked.
        return Ok((4096, 4096));
    }
    match (found.stx_dio_mem_align, found.stx_dio_offset_align) {
        (0, _) | (_, 0) => Err(Error::NoDirect),
        // The kernel also wants each range's length to be a multiple of the offset alignment.
        (memory, offset) => Ok((memory.max(4), offset.max(512))),
    }
}

/// `/sys/dev/block/MAJOR:MINOR/queue`, which a partition has at its disk's.
fn queue_directory(rdev: u64) -> Option<PathBuf> {
    let device = format!("/sys/dev/block/{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let device = fs::canonicalize(device).ok()?;
    let own = device.join("queue");
    if own.is_dir() { Some(own) } else { Some(device.parent()?.join("queue")) }
}

fn read_number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}
