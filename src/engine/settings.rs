//! What the settings of several drivers have in common.

#![forbid(unsafe_code)]

use crate::block::{Geometry, Size};

/// Logical block where neither the user nor the store cares, in bytes.
pub(super) const DEFAULT_BLOCK: u32 = 512;

/// A setting that is on unless it is switched off.
pub(super) fn yes() -> bool {
    true
}

pub(super) fn check_block_size(block_size: Option<u32>) -> Result<(), (&'static str, String)> {
    match block_size {
        None | Some(512 | 4096) => Ok(()),
        Some(other) => Err(("block-size", format!("must be 512 or 4096, not {other}"))),
    }
}

pub(super) fn check_size(size: Size, block_size: Option<u32>) -> Result<(), (&'static str, String)> {
    check_block_size(block_size)?;
    let block = u64::from(block_size.unwrap_or(512));
    let reason = match size.bytes() {
        0 => "must be more than zero".to_owned(),
        bytes if bytes > Geometry::MAX_BYTES => {
            format!("{size} is more than a block device can have")
        }
        bytes if !bytes.is_multiple_of(block) => {
            format!("{bytes} bytes are not whole blocks of {block} bytes")
        }
        _ => return Ok(()),
    };
    Err(("size", reason))
}
