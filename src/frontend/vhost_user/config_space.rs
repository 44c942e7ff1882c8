//! The device's configuration space and features (virtio 1.3 sections 5.2.3 and 5.2.4).

#![forbid(unsafe_code)]

use super::request::MAX_RANGES;
use crate::block::{Geometry, SECTOR};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Bytes in the configuration space as a VMM may ask for it: the device's fields, then zeroes
/// (`VHOST_USER_MAX_CONFIG_SIZE`).
pub const CONFIG_SPACE: usize = 256;

/// Offset of `writeback`, the one field a driver may write.
pub const WRITEBACK: u32 = 32;

/// Where the fields begin for Cloud Hypervisor up to 50 (`VHOST_USER_CONFIG_OFFSET`), as they do in the registers of
/// virtio-mmio. For everybody else they begin at 0.
const MMIO_OFFSET: u32 = 0x100;

/// The place in the configuration space that a VMM means by `offset`.
pub fn offset(offset: u32) -> u32 {
    offset.checked_sub(MMIO_OFFSET).unwrap_or(offset)
}

/// Virtio features of a device with this geometry, without the vhost-user bit.
pub fn features(geometry: &Geometry) -> u64 {
    let mut bits = vec![
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_MQ,
    ];
    if geometry.volatile_cache {
        bits.extend([VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_CONFIG_WCE]);
    }
    if geometry.read_only {
        bits.push(VIRTIO_BLK_F_RO);
    } else {
        bits.push(VIRTIO_BLK_F_WRITE_ZEROES);
        if geometry.discard.is_some() {
            bits.push(VIRTIO_BLK_F_DISCARD);
        }
    }
    bits.into_iter().fold(0, |all, bit| all | 1 << bit)
}

/// Whether a driver that took `acked` decides about the write cache through `writeback`; otherwise it has
/// one exactly if it took FLUSH (section 5.2.6.2).
pub fn writeback(acked: u64, configured: bool) -> bool {
    if acked & 1 << VIRTIO_BLK_F_CONFIG_WCE != 0 { configured } else { acked & 1 << VIRTIO_BLK_F_FLUSH != 0 }
}

/// Whether the driver may use indirect descriptors.
pub fn indirect(acked: u64) -> bool {
    acked & 1 << VIRTIO_RING_F_INDIRECT_DESC != 0
}

/// The most data segments that are offered. A driver without indirect descriptors must find room for as many in its
/// vring, with a header and a status, and VMMs make vrings of 128 unless told otherwise. More are taken
/// ([`MAX_SEGMENTS`](super::request::MAX_SEGMENTS)): a guest that was offered them by an earlier version goes on.
const SEG_MAX: u32 = 126;

/// The most data segments in a request, where a chain may have so many descriptors.
pub fn seg_max(longest_chain: u16) -> u32 {
    u32::from(longest_chain.saturating_sub(2)).clamp(1, SEG_MAX)
}

/// `struct virtio_blk_config` of `linux/virtio_blk.h`, little-endian, zero-padded.
/// `longest_chain`: see [`seg_max`].
pub fn space(geometry: &Geometry, queues: u16, longest_chain: u16, writeback: bool) -> [u8; CONFIG_SPACE] {
    let mut space = [0; CONFIG_SPACE];
    let mut put = |offset: usize, bytes: &[u8]| space[offset..offset + bytes.len()].copy_from_slice(bytes);
    let blocks = |bytes: u32| bytes / geometry.logical_block;
    put(0, &geometry.sectors().to_le_bytes());
    put(12, &seg_max(longest_chain).to_le_bytes());
    put(20, &geometry.logical_block.to_le_bytes());
    // Topology: log2 of logical blocks in a physical one, offset of the first, then sizes in logical blocks.
    put(24, &[blocks(geometry.physical_block).max(1).ilog2() as u8, 0]);
    put(26, &u16::try_from(blocks(geometry.io_min)).unwrap_or(0).to_le_bytes());
    put(28, &blocks(geometry.io_opt).to_le_bytes());
    put(WRITEBACK as usize, &[u8::from(writeback)]);
    put(34, &queues.to_le_bytes());
    if let Some(discard) = geometry.discard {
        put(36, &discard.max_sectors.to_le_bytes());
        put(40, &(MAX_RANGES as u32).to_le_bytes());
        put(44, &(discard.granularity / SECTOR as u32).max(1).to_le_bytes());
    }
    put(48, &geometry.max_write_zeroes.to_le_bytes());
    put(52, &(MAX_RANGES as u32).to_le_bytes());
    put(56, &[1]);
    space
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::DiscardLimits;
    use virtio_bindings::virtio_blk::virtio_blk_config;

    fn geometry() -> Geometry {
        let mut geometry = Geometry::new(1 << 30, 512).unwrap();
        geometry.physical_block = 4096;
        geometry.io_min = 4096;
        geometry.io_opt = 65536;
        geometry.discard = Some(DiscardLimits { granularity: 4096, max_sectors: 1234 });
        geometry.max_write_zeroes = 4321;
        geometry
    }

    #[test]
    fn the_offsets_are_the_headers() {
        use std::mem::offset_of;
        assert_eq!(offset_of!(virtio_blk_config, seg_max), 12);
        assert_eq!(offset_of!(virtio_blk_config, blk_size), 20);
        assert_eq!(offset_of!(virtio_blk_config, physical_block_exp), 24);
        assert_eq!(offset_of!(virtio_blk_config, min_io_size), 26);
        assert_eq!(offset_of!(virtio_blk_config, opt_io_size), 28);
        assert_eq!(offset_of!(virtio_blk_config, wce), WRITEBACK as usize);
        assert_eq!(offset_of!(virtio_blk_config, num_queues), 34);
        assert_eq!(offset_of!(virtio_blk_config, max_discard_sectors), 36);
        assert_eq!(offset_of!(virtio_blk_config, discard_sector_alignment), 44);
        assert_eq!(offset_of!(virtio_blk_config, max_write_zeroes_sectors), 48);
        assert_eq!(offset_of!(virtio_blk_config, write_zeroes_may_unmap), 56);
    }

    #[test]
    fn the_space_tells_the_geometry() {
        let space = space(&geometry(), 4, 128, true);
        let word = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
        assert_eq!(word(0), 1 << 21);
        assert_eq!((word(12), word(20), space[24]), (126, 512, 3));
        assert_eq!((space[26], word(28), space[32], space[34]), (8, 128, 1, 4));
        assert_eq!((word(36), word(44), word(48), space[56]), (1234, 8, 4321, 1));
    }

    #[test]
    fn a_read_only_device_offers_no_change() {
        let mut geometry = geometry();
        geometry.read_only = true;
        let features = features(&geometry);
        assert_ne!(features & 1 << VIRTIO_BLK_F_RO, 0);
        assert_eq!(features & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES), 0);
    }

    #[test]
    fn the_cache_follows_what_was_agreed() {
        let flush = 1 << VIRTIO_BLK_F_FLUSH;
        let wce = 1 << VIRTIO_BLK_F_CONFIG_WCE;
        assert!(!writeback(0, true));
        assert!(writeback(flush, false));
        assert!(writeback(flush | wce, true));
        assert!(!writeback(flush | wce, false));
    }

    #[test]
    fn a_chain_fits_its_queue() {
        assert_eq!(seg_max(2), 1);
        assert_eq!(seg_max(128), 126);
        assert_eq!((seg_max(127), seg_max(129), seg_max(32768)), (125, 126, 126));
    }
}
