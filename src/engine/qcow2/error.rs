//! Why a qcow2 image cannot be served.

#![forbid(unsafe_code)]

use super::header::HeaderError;
use crate::block::GeometryError;
use crate::engine::file;
use std::io;

/// Why a qcow2 image cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file.
    #[error(transparent)]
    File(file::Error),
    /// Its first cluster.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The kernel's answer.
    #[error("cannot be read")]
    Read(#[source] io::Error),
    /// A table that does not end before the file does.
    #[error("its {0} lies past its end: it is cut off, or damaged")]
    CutOff(&'static str),
    /// Two tables in one place.
    #[error(
        "two of its tables are in one place ({0:#x}): it is damaged, and can be read at most (read-only=on)"
    )]
    Overlap(u64),
    /// Direct I/O wants whole blocks.
    #[error("direct=on: its clusters are too small for the file system's blocks")]
    Direct,
    /// Likewise.
    #[error("direct=on: its {end} bytes are not whole blocks of {block} (truncate -s %{block} makes them)")]
    DirectEnd {
        /// Bytes of the file.
        end: u64,
        /// Of the file system.
        block: u32,
    },
    /// Somebody was killed at it who keeps no refcounts meanwhile.
    #[error(
        "was not closed as it should be, and its refcounts may be wrong: qemu-img check -r all mends them (read-only=on \
         goes without)"
    )]
    Dirty,
    /// Somebody found that out.
    #[error("is marked as damaged: qemu-img check -r all may mend it (read-only=on goes without)")]
    Corrupt,
    /// Clusters belong to them too.
    #[error(
        "has {0} internal snapshots, which we do not write beside (read-only=on reads the disk as it is now)"
    )]
    Snapshots(u32),
    /// Data that must be kept in step with every write.
    #[error(
        "has bitmaps or other data that every write would have to keep in step (qemu-img bitmap --remove; read-only=on \
         goes without)"
    )]
    Autoclear,
    /// Its header names what the configuration does not.
    #[error(
        "stands on {0:?}, and no base is configured: say which volume that is with base=NAME (the image's own word for it \
         is not followed, since whoever wrote the image chose it)"
    )]
    Base(String),
    /// What is written below would show above.
    #[error("its base must be read-only (read-only=on)")]
    WritableBase,
    /// What is read of it is smaller than what it reads.
    #[error("its base reads blocks of {block} bytes, and it has units of {unit}")]
    CoarseBase {
        /// Of the base.
        block: u32,
        /// Of the image.
        unit: u64,
    },
    /// No disk has that size.
    #[error(transparent)]
    Geometry(GeometryError),
    /// The other way round.
    #[error("stands on no other, and base={0} says it does")]
    NoBase(String),
}
