//! Why a volume could not be opened, or changed in size.

#![forbid(unsafe_code)]

use super::{file, nbd, qcow2};
use crate::block::GeometryError;
use std::io;

/// The most volumes that stand one on the other. Each costs a request an allocation, and the stack a few frames.
pub const MAX_DEPTH: usize = 32;

/// Why a volume could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// See [`file::Error`].
    #[error("volume {name}: {path}")]
    File {
        /// Of the volume.
        name: String,
        /// Of the file.
        path: String,
        /// What was wrong with it.
        source: file::Error,
    },
    /// See [`nbd::Error`].
    #[error("volume {name}: {uri}")]
    Nbd {
        /// Of the volume.
        name: String,
        /// Of the server.
        uri: String,
        /// What was wrong with it.
        source: nbd::Error,
    },
    /// See [`qcow2::Error`].
    #[error("volume {name}: {path}")]
    Qcow2 {
        /// Of the volume.
        name: String,
        /// Of the image.
        path: String,
        /// What was wrong with it.
        source: qcow2::Error,
    },
    /// A size or block size that no disk can have.
    #[error("volume {name}")]
    Geometry {
        /// Of the volume.
        name: String,
        /// What was wrong with it.
        source: GeometryError,
    },
    /// The store's blocks are larger than its clients are to be told.
    #[error("volume {name}: physical-block={asked}: its logical block has {needed} bytes")]
    PhysicalBlock {
        /// Of the volume.
        name: String,
        /// As configured.
        asked: u32,
        /// The logical block.
        needed: u32,
    },
    /// What it stands on cannot be.
    #[error("volume {name}")]
    Graph {
        /// Of the volume.
        name: String,
        /// What was wrong with it.
        source: GraphError,
    },
    /// A volume that it stands on could not be opened.
    #[error("volume {name} stands on another")]
    Base {
        /// Of the volume that was to be opened.
        name: String,
        /// Of the other one.
        source: Box<OpenError>,
    },
    /// No memory.
    #[error("volume {name}: {bytes} bytes of memory cannot be reserved")]
    Memory {
        /// Of the volume.
        name: String,
        /// Asked for.
        bytes: u64,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Why a volume cannot stand on what it names.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GraphError {
    /// Nobody of that name.
    #[error("there is no volume {0:?}")]
    Missing(String),
    /// It stands on itself, over these.
    #[error("a circle: {}", .0.join(" stands on "))]
    Circle(Vec<String>),
    /// More than [`MAX_DEPTH`].
    #[error("more than {MAX_DEPTH} volumes stand one on the other")]
    Deep,
}

/// Why the size of a volume did not change.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// It is served read-only.
    #[error("the volume is read-only")]
    ReadOnly,
    /// A size that ends within a block.
    #[error("{bytes} bytes are not whole blocks of {block}")]
    Unaligned {
        /// Asked for.
        bytes: u64,
        /// The volume's logical block.
        block: u32,
    },
    /// No size for a disk.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// What lies beyond the new end would be lost, or is lost already.
    #[error(
        "it would shrink from {from} to {to} bytes, and a file system on it lose its end: that must be forced"
    )]
    Shrinks {
        /// Bytes there are.
        from: u64,
        /// Bytes there would be.
        to: u64,
    },
    /// Such a volume cannot have another size.
    #[error("{0}")]
    Fixed(&'static str),
    /// An export cannot show another size. Nothing has changed.
    #[error("{0}")]
    Export(String),
    /// The volume has grown, but an export goes on showing the old size.
    #[error("the volume has {to} bytes now, but not everybody sees them: {reason}")]
    Untold {
        /// Bytes now.
        to: u64,
        /// Which export, and why.
        reason: String,
    },
    /// Another change has not ended. Nothing has changed.
    #[error("another change of its size is under way: its store may not answer")]
    UnderWay,
    /// It cannot be cut yet. Nothing has changed.
    #[error("requests beyond the new end do not complete")]
    Busy,
    /// A server offers more than the connections have that are in use. Nothing has changed.
    #[error(
        "its server offers {asked} bytes to new connections, and those in use have {offered}: \
         restart either for the rest"
    )]
    Connections {
        /// Bytes that a new connection has.
        asked: u64,
        /// Bytes that all the others have.
        offered: u64,
    },
    /// The store does not do it. Nothing has changed.
    #[error("{what}: {source}")]
    Store {
        /// What was asked of it.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}
