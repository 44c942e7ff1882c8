//! What a volume looks like from outside: what ublk's parameters and virtio-blk's config space are made from.

#![forbid(unsafe_code)]

use super::{Capacity, Instance, SECTOR};

/// Limits of discard or write-zeroes on a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardLimits {
    /// The unit the store gives back, in bytes; at least the logical block.
    pub granularity: u32,
    /// The most sectors in one request.
    pub max_sectors: u32,
}

/// Shape and abilities of a volume. All but the capacity stays as it is while the volume is open; clones share the
/// capacity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// See [`Capacity`].
    pub capacity: Capacity,
    /// Smallest addressable unit in bytes: a power of two, 512 to 4096.
    pub logical_block: u32,
    /// Smallest unit written without read-modify-write, in bytes: a power of two, at least `logical_block`.
    pub physical_block: u32,
    /// Preferred smallest request in bytes, 0 where the store does not say.
    pub io_min: u32,
    /// Preferred request in bytes, 0 where the store does not say.
    pub io_opt: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// Acknowledged writes may be lost until flushed.
    pub volatile_cache: bool,
    /// The volatile cache is another program's, whose crash loses it: which run of that program. `None` where it is this
    /// machine's kernel's.
    pub server: Option<Instance>,
    /// `None`: discard is refused.
    pub discard: Option<DiscardLimits>,
    /// The most sectors in one write-zeroes.
    pub max_write_zeroes: u32,
    /// Bytes a buffer's address must be a multiple of for the store to take it without a copy.
    pub dma_alignment: u32,
}

/// Why a geometry cannot be served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// Not even one logical block.
    #[error("{bytes} bytes are less than one logical block of {logical_block}")]
    Empty {
        /// Size found.
        bytes: u64,
        /// Logical block asked for.
        logical_block: u32,
    },
    /// Not a power of two from 512 to 4096, or larger than the physical block.
    #[error("logical block size {0} is not one of 512, 1024, 2048, 4096")]
    LogicalBlock(u32),
    /// More than a block device can hold.
    #[error("{0} bytes are more than a block device can have")]
    TooLarge(u64),
}

impl Geometry {
    /// The largest capacity in bytes: Linux counts a device's bytes in an `i64` (`loff_t`).
    pub const MAX_BYTES: u64 = i64::MAX as u64 & !(SECTOR - 1);

    /// A volume of `bytes` (rounded down to whole logical blocks) with no other abilities.
    ///
    /// # Errors
    /// When the block size is not usable, or nothing is left after rounding.
    pub fn new(bytes: u64, logical_block: u32) -> Result<Geometry, GeometryError> {
        if !logical_block.is_power_of_two() || !(512..=4096).contains(&logical_block) {
            return Err(GeometryError::LogicalBlock(logical_block));
        }
        if bytes > Geometry::MAX_BYTES {
            return Err(GeometryError::TooLarge(bytes));
        }
        let whole = bytes & !(u64::from(logical_block) - 1);
        if whole == 0 {
            return Err(GeometryError::Empty { bytes, logical_block });
        }
        Ok(Geometry {
            capacity: Capacity::new(whole / SECTOR),
            logical_block,
            physical_block: logical_block,
            io_min: 0,
            io_opt: 0,
            read_only: false,
            volatile_cache: false,
            server: None,
            discard: None,
            max_write_zeroes: u32::MAX / 512,
            dma_alignment: 1,
        })
    }

    /// Capacity in sectors of 512 bytes, as it is now.
    pub fn sectors(&self) -> u64 {
        self.capacity.sectors()
    }

    /// Capacity in bytes, as it is now.
    pub fn bytes(&self) -> u64 {
        self.capacity.bytes()
    }

    /// Whether `sectors` from `sector` on lie inside the volume. Hostile values cannot overflow it.
    pub fn contains(&self, sector: u64, sectors: u32) -> bool {
        sector.checked_add(u64::from(sectors)).is_some_and(|end| end <= self.sectors())
    }

    /// Whether the range starts and ends on logical blocks.
    pub fn aligned(&self, sector: u64, sectors: u32) -> bool {
        let mask = u64::from(self.logical_block) / SECTOR - 1;
        (sector | u64::from(sectors)) & mask == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ragged_tail_is_left_out() {
        let geometry = Geometry::new(4096 + 700, 512).unwrap();
        assert_eq!(geometry.sectors(), 9);
        assert_eq!(Geometry::new(4096 + 700, 4096).unwrap().sectors(), 8);
    }

    #[test]
    fn unusable_shapes_are_refused() {
        assert_eq!(Geometry::new(511, 512), Err(GeometryError::Empty { bytes: 511, logical_block: 512 }));
        for block in [0, 1, 256, 513, 8192] {
            assert_eq!(Geometry::new(1 << 20, block), Err(GeometryError::LogicalBlock(block)));
        }
        assert_eq!(Geometry::new(u64::MAX, 512), Err(GeometryError::TooLarge(u64::MAX)));
    }

    #[test]
    fn ranges_do_not_overflow() {
        let geometry = Geometry::new(1 << 20, 512).unwrap();
        assert!(geometry.contains(2047, 1));
        assert!(!geometry.contains(2048, 1));
        assert!(geometry.contains(2048, 0));
        assert!(!geometry.contains(u64::MAX, u32::MAX));
    }

    #[test]
    fn alignment_counts_both_ends() {
        let geometry = Geometry::new(1 << 20, 4096).unwrap();
        assert!(geometry.aligned(8, 16));
        assert!(!geometry.aligned(4, 8));
        assert!(!geometry.aligned(8, 4));
    }
}
