//! The vocabulary every layer shares: what a request is, what a volume looks like, how an error is told.
//!
//! No I/O happens here, and an [`Iovec`] is only carried, never followed.

mod capacity;
mod data;
mod causes;
mod errno;
mod format;
mod geometry;
mod instance;
mod iovec;
mod limit;
mod request;
mod size;

pub use capacity::Capacity;
pub use causes::Causes;
pub use data::{Data, Front, Window};
pub use errno::Errno;
pub use format::Format;
pub use geometry::{DiscardLimits, Geometry, GeometryError};
pub use instance::Instance;
pub use iovec::Iovec;
pub use limit::limit_behind;
pub use request::{Flags, Op, Request, RequestSummary};
pub use size::{ParseSizeError, Size};

/// Bytes in a sector: 512 always, whatever the logical block size (virtio 1.3 section 5.2.4, `linux/blk_types.h`).
pub const SECTOR: u64 = 512;

/// In what a store is called, between a layer and what it stands on: `fault over file ...`. No other part of it has such a
/// word.
pub const OVER: &str = " over ";

/// `SECTOR == 1 << SECTOR_SHIFT`.
pub const SECTOR_SHIFT: u32 = 9;
