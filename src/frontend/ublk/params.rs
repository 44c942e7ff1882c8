//! A volume's geometry as the kernel wants it: `struct ublk_params` of `linux/ublk_cmd.h`.
//!
//! libublk 0.4.8 has that struct too, but its one ends before the DMA alignment, and its padding lies where the
//! kernel looks for it. So this is ours.

#![forbid(unsafe_code)]

use crate::block::{Geometry, SECTOR};
use libublk::sys::{self, ublk_param_basic, ublk_param_discard};

/// A device's parameters. Once it has started they cannot be changed, but for its size.
#[derive(Clone, Debug)]
pub(super) struct Params {
    basic: ublk_param_basic,
    discard: Option<ublk_param_discard>,
    /// A mask: the alignment less one.
    dma: Option<u32>,
}

impl Params {
    /// For a device that shows `geometry`, with requests of at most `max_io` bytes.
    pub fn new(geometry: &Geometry, max_io: u32, zero_copy: bool) -> Params {
        let logical = geometry.logical_block.trailing_zeros();
        let physical = geometry.physical_block.trailing_zeros().max(logical);
        let mut attrs = 0;
        if geometry.read_only {
            attrs |= sys::UBLK_ATTR_READ_ONLY;
        }
        if geometry.volatile_cache {
            // Without the first no flush ever comes, and the second counts only with it.
            attrs |= sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA;
        }
        let basic = ublk_param_basic {
            attrs,
            logical_bs_shift: logical as u8,
            physical_bs_shift: physical as u8,
            io_min_shift: hint(geometry.io_min, physical),
            io_opt_shift: hint(geometry.io_opt, physical),
            max_sectors: max_io / SECTOR as u32,
            dev_sectors: geometry.sectors(),
            ..Default::default()
        };
        // The client's pages go to the store as they are, so the store's alignment is the client's. The kernel
        // would ask for 4 bytes. A page is the most it takes.
        let alignment = geometry.dma_alignment.next_power_of_two().clamp(4, 4096);
        Params { basic, discard: discard(geometry), dma: zero_copy.then_some(alignment - 1) }
    }

    /// As the kernel reads it: fields in order, without the last one (segment limits), which we do not set. A
    /// kernel that knows fewer fields takes those it knows.
    pub fn bytes(&self) -> Box<[u8]> {
        let basic = &self.basic;
        let discard = self.discard.unwrap_or_default();
        let mut types = sys::UBLK_PARAM_TYPE_BASIC;
        for (there, kind) in [
            (self.discard.is_some(), sys::UBLK_PARAM_TYPE_DISCARD),
            (self.dma.is_some(), sys::UBLK_PARAM_TYPE_DMA_ALIGN),
        ] {
            types |= if there { kind } else { 0 };
        }
        let mut bytes = Vec::with_capacity(LEN);
        let mut put = |field: &[u8]| bytes.extend_from_slice(field);
        put(&(LEN as u32).to_ne_bytes());
        put(&types.to_ne_bytes());
        put(&basic.attrs.to_ne_bytes());
        put(&[basic.logical_bs_shift, basic.physical_bs_shift, basic.io_opt_shift, basic.io_min_shift]);
        put(&basic.max_sectors.to_ne_bytes());
        put(&basic.chunk_sectors.to_ne_bytes());
        put(&basic.dev_sectors.to_ne_bytes());
        put(&basic.virt_boundary_mask.to_ne_bytes());
        put(&discard.discard_alignment.to_ne_bytes());
        put(&discard.discard_granularity.to_ne_bytes());
        put(&discard.max_discard_sectors.to_ne_bytes());
        put(&discard.max_write_zeroes_sectors.to_ne_bytes());
        put(&discard.max_discard_segments.to_ne_bytes());
        put(&discard.reserved0.to_ne_bytes());
        // Device numbers, which are the kernel's to tell, and zones.
        put(&[0; DMA - DEVT]);
        put(&self.dma.unwrap_or(0).to_ne_bytes());
        put(&[0; 4]);
        bytes.into()
    }

    /// What the kernel wrote; `None` for too few bytes. Fields that we never set are not looked at.
    pub fn read(bytes: &[u8]) -> Option<Params> {
        let byte = |at: usize| bytes.get(at).copied();
        let half = |at: usize| Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        let word = |at: usize| Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        let long = |at: usize| Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        let types = word(4)?;
        let basic = ublk_param_basic {
            attrs: word(8)?,
            logical_bs_shift: byte(12)?,
            physical_bs_shift: byte(13)?,
            io_opt_shift: byte(14)?,
            io_min_shift: byte(15)?,
            max_sectors: word(16)?,
            chunk_sectors: word(20)?,
            dev_sectors: long(24)?,
            virt_boundary_mask: long(32)?,
        };
        let discard = ublk_param_discard {
            discard_alignment: word(40)?,
            discard_granularity: word(44)?,
            max_discard_sectors: word(48)?,
            max_write_zeroes_sectors: word(52)?,
            max_discard_segments: half(56)?,
            reserved0: half(58)?,
        };
        Some(Params {
            basic,
            discard: (types & sys::UBLK_PARAM_TYPE_DISCARD != 0).then_some(discard),
            dma: if types & sys::UBLK_PARAM_TYPE_DMA_ALIGN != 0 { Some(word(DMA)?) } else { None },
        })
    }

    /// Capacity in sectors.
    pub fn sectors(&self) -> u64 {
        self.basic.dev_sectors
    }

    /// What a device with these parameters has that one with the parameters `wanted` would not have: name, what it
    /// has, what is wanted. The size is not among it, because it alone can be changed.
    pub fn differences(&self, wanted: &Params) -> Vec<(&'static str, u64, u64)> {
        let names = [
            "attributes (read-only, cache)",
            "logical block",
            "physical block",
            "preferred request",
            "least request",
            "largest request in sectors",
            "discard granularity",
            "largest discard in sectors",
            "largest write-zeroes in sectors",
            "data alignment",
        ];
        let values = |params: &Params| {
            let (basic, discard) = (&params.basic, params.discard.unwrap_or_default());
            let size = |shift: u8| 1 << shift.min(63);
            [
                basic.attrs.into(),
                size(basic.logical_bs_shift),
                size(basic.physical_bs_shift),
                size(basic.io_opt_shift),
                size(basic.io_min_shift),
                basic.max_sectors.into(),
                discard.discard_granularity.into(),
                discard.max_discard_sectors.into(),
                discard.max_write_zeroes_sectors.into(),
                params.dma.map_or(0, |mask| u64::from(mask) + 1),
            ]
        };
        let (own, wanted) = (values(self), values(wanted));
        let all = names.into_iter().zip(own.into_iter().zip(wanted));
        all.filter(|(_, (own, wanted))| own != wanted)
            .map(|(name, (own, wanted))| (name, own, wanted))
            .collect()
    }
}

/// Offsets in `struct ublk_params`.
const DEVT: usize = 60;
const DMA: usize = 108;

/// Bytes that we send and read: up to and with the DMA alignment.
pub(super) const LEN: usize = DMA + size_of::<sys::ublk_param_dma_align>();

const _: () = {
    use std::mem::offset_of;
    assert!(offset_of!(sys::ublk_params, basic) == 8 && size_of::<ublk_param_basic>() == 32);
    assert!(offset_of!(sys::ublk_params, discard) == 40 && size_of::<ublk_param_discard>() == 20);
    assert!(offset_of!(sys::ublk_params, devt) == DEVT);
    assert!(offset_of!(sys::ublk_params, zoned) + size_of::<sys::ublk_param_zoned>() == DMA);
    assert!(LEN == 116);
};

/// Limits of discard and write-zeroes, which share a struct. `None` where there is neither.
fn discard(geometry: &Geometry) -> Option<ublk_param_discard> {
    if geometry.read_only || (geometry.discard.is_none() && geometry.max_write_zeroes == 0) {
        return None;
    }
    let blocks = geometry.logical_block / SECTOR as u32;
    let whole = |sectors: u32| sectors / blocks * blocks;
    let limits = geometry.discard;
    Some(ublk_param_discard {
        // The kernel refuses 0 even where there is no discard.
        discard_granularity: limits.map_or(0, |limits| limits.granularity).max(geometry.logical_block),
        max_discard_sectors: limits.map_or(0, |limits| whole(limits.max_sectors)),
        max_write_zeroes_sectors: whole(geometry.max_write_zeroes),
        // The driver takes no other number.
        max_discard_segments: 1,
        ..Default::default()
    })
}

/// A preferred size as a power of two: the largest that divides it, since that is as far as a shift goes;
/// the physical block where the store has no preference (a shift of 0 would say "one byte").
fn hint(bytes: u32, physical: u32) -> u8 {
    let shift = if bytes == 0 { 0 } else { bytes.trailing_zeros() };
    shift.max(physical) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::DiscardLimits;

    fn geometry() -> Geometry {
        Geometry { volatile_cache: true, dma_alignment: 512, ..Geometry::new(1 << 30, 512).unwrap() }
    }

    #[test]
    fn size_and_blocks() {
        let geometry = Geometry { logical_block: 4096, physical_block: 16384, ..geometry() };
        let basic = Params::new(&geometry, 512 << 10, false).basic;
        assert_eq!(basic.dev_sectors, 1 << 21);
        assert_eq!((basic.logical_bs_shift, basic.physical_bs_shift), (12, 14));
        assert_eq!(basic.max_sectors, 1024);
    }

    #[test]
    fn preferred_sizes_are_powers_of_two_and_never_a_byte() {
        for (bytes, shift) in [(0, 9), (512, 9), (4096, 12), (1 << 20, 20), (192 << 10, 16), (1, 9)] {
            assert_eq!(hint(bytes, 9), shift, "{bytes}");
        }
        let basic = Params::new(&Geometry { physical_block: 4096, ..geometry() }, 4096, false).basic;
        assert_eq!((basic.io_min_shift, basic.io_opt_shift), (12, 12));
    }

    #[test]
    fn attributes() {
        let attrs = |geometry: Geometry| Params::new(&geometry, 4096, false).basic.attrs;
        assert_eq!(attrs(geometry()), sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA);
        assert_eq!(attrs(Geometry { volatile_cache: false, ..geometry() }), 0);
        let read_only = Geometry { read_only: true, volatile_cache: false, ..geometry() };
        assert_eq!(attrs(read_only), sys::UBLK_ATTR_READ_ONLY);
    }

    #[test]
    fn discard_is_what_the_store_can_do() {
        let limits = DiscardLimits { granularity: 4096, max_sectors: 1000 };
        let with = discard(&Geometry { discard: Some(limits), ..geometry() }).unwrap();
        assert_eq!((with.discard_granularity, with.max_discard_sectors), (4096, 1000));
        assert_eq!(with.max_discard_segments, 1);

        let without = discard(&Geometry { max_write_zeroes: 100, ..geometry() }).unwrap();
        assert_eq!((without.max_discard_sectors, without.max_write_zeroes_sectors), (0, 100));
        assert_ne!(without.discard_granularity, 0, "refused by the kernel");

        assert!(discard(&Geometry { max_write_zeroes: 0, ..geometry() }).is_none());
        assert!(discard(&Geometry { read_only: true, discard: Some(limits), ..geometry() }).is_none());
    }

    #[test]
    fn limits_are_whole_blocks() {
        let limits = DiscardLimits { granularity: 512, max_sectors: u32::MAX };
        let base = Geometry::new(1 << 30, 4096).unwrap();
        let params = discard(&Geometry { discard: Some(limits), max_write_zeroes: 1001, ..base }).unwrap();
        assert_eq!((params.max_discard_sectors % 8, params.max_write_zeroes_sectors), (0, 1000));
        assert_eq!(params.discard_granularity, 4096, "never below the block");
    }

    #[test]
    fn alignment_is_a_mask_and_for_zero_copy_alone() {
        assert_eq!(Params::new(&geometry(), 4096, false).dma, None);
        for (alignment, mask) in [(0, 3), (1, 3), (4, 3), (512, 511), (4096, 4095), (1 << 20, 4095)] {
            let params = Params::new(&Geometry { dma_alignment: alignment, ..geometry() }, 4096, true);
            assert_eq!(params.dma, Some(mask), "{alignment}");
        }
    }

    #[test]
    fn what_was_sent_is_read_back_and_told_from_others() {
        let limits = DiscardLimits { granularity: 4096, max_sectors: 1000 };
        let geometry = Geometry { discard: Some(limits), ..geometry() };
        let sent = Params::new(&geometry, 512 << 10, true);
        let read = Params::read(&sent.bytes()).unwrap();
        assert!(read.differences(&sent).is_empty());
        assert_eq!(read.sectors(), 1 << 21);
        assert!(Params::read(&sent.bytes()[..100]).is_none());

        let differences = |geometry: &Geometry, zero_copy| {
            let other = Params::new(geometry, 512 << 10, zero_copy);
            read.differences(&other).iter().map(|(name, ..)| *name).collect::<Vec<_>>()
        };
        assert_eq!(differences(&geometry, false), ["data alignment"]);
        let grown = Geometry { discard: Some(limits), ..Geometry::new(2 << 30, 512).unwrap() };
        let grown = Geometry { volatile_cache: true, dma_alignment: 512, ..grown };
        assert!(differences(&grown, true).is_empty(), "the size may change");
        let other = Geometry { discard: None, physical_block: 4096, ..geometry.clone() };
        let found = differences(&other, true);
        assert!(
            found.contains(&"physical block") && found.contains(&"largest discard in sectors"),
            "{found:?}"
        );
        assert!(!found.contains(&"logical block"), "{found:?}");
        let read_only = Geometry { read_only: true, ..geometry };
        assert!(differences(&read_only, true).contains(&"attributes (read-only, cache)"));
    }

    #[test]
    fn fields_are_where_the_kernel_reads_them() {
        let limits = DiscardLimits { granularity: 4096, max_sectors: 1000 };
        let geometry = Geometry { discard: Some(limits), max_write_zeroes: 77, ..geometry() };
        let bytes = Params::new(&geometry, 4096, true).bytes();
        let number = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((bytes.len(), number(0)), (116, 116));
        let types = sys::UBLK_PARAM_TYPE_DISCARD | sys::UBLK_PARAM_TYPE_DMA_ALIGN;
        assert_eq!(number(4), sys::UBLK_PARAM_TYPE_BASIC | types);
        assert_eq!(bytes[12..16], [9, 9, 9, 9]);
        assert_eq!((number(16), number(24)), (8, 1 << 21), "max_sectors, dev_sectors");
        assert_eq!((number(44), number(48), number(52)), (4096, 1000, 77));
        assert_eq!(bytes[56..60], [1u16.to_ne_bytes(), [0, 0]].concat());
        assert_eq!(number(108), 511);

        let bytes =
            Params::new(&Geometry { max_write_zeroes: 0, discard: None, ..geometry }, 4096, false).bytes();
        assert_eq!(u32::from_ne_bytes(bytes[4..8].try_into().unwrap()), sys::UBLK_PARAM_TYPE_BASIC);
    }
}
