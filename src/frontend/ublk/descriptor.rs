//! What the kernel asks for: `ublksrv_io_desc` of `linux/ublk_cmd.h`, checked.

#![forbid(unsafe_code)]

use crate::block::{Errno, Flags, Op, SECTOR};
use libublk::sys;

/// The kernel's descriptor of one request. The kernel rewrites it for each request of the tag, so it is
/// copied once and then looked at.
pub type Descriptor = sys::ublksrv_io_desc;

const _: () = assert!(size_of::<Descriptor>() == 24 && align_of::<Descriptor>() == 8);

/// A descriptor that holds what it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// What to do.
    pub op: Op,
    /// How.
    pub flags: Flags,
    /// First sector.
    pub sector: u64,
    /// Sectors; 0 for flush.
    pub sectors: u32,
    /// Bytes of data that go with it: 0 for all but reads and writes. At most `max_io`.
    pub bytes: u32,
}

impl Asked {
    /// Reads `descriptor`, for a queue whose buffers hold `max_io` bytes. Bounds of the volume are not
    /// looked at: the engine does that for every frontend.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for an operation that was never offered (zones, write-same), `EIO` for more data than a
    /// buffer holds, which the kernel was told not to send.
    pub fn read(descriptor: &Descriptor, max_io: u32) -> Result<Asked, Errno> {
        let Descriptor { op_flags, nr_sectors: sectors, start_sector: sector, .. } = *descriptor;
        let op = match op_flags & 0xff {
            sys::UBLK_IO_OP_READ => Op::Read,
            sys::UBLK_IO_OP_WRITE => Op::Write,
            // A flush has no place: what the kernel writes there is left over.
            sys::UBLK_IO_OP_FLUSH => {
                let flags = Flags::default();
                return Ok(Asked { op: Op::Flush, flags, sector: 0, sectors: 0, bytes: 0 });
            }
            sys::UBLK_IO_OP_DISCARD => Op::Discard,
            sys::UBLK_IO_OP_WRITE_ZEROES => Op::WriteZeroes,
            _ => return Err(Errno::EOPNOTSUPP),
        };
        let flags = Flags {
            fua: op != Op::Read && op_flags & sys::UBLK_IO_F_FUA != 0,
            unmap: op == Op::WriteZeroes && op_flags & sys::UBLK_IO_F_NOUNMAP == 0,
        };
        let bytes = match op {
            Op::Read | Op::Write => u32::try_from(u64::from(sectors) * SECTOR)
                .ok()
                .filter(|bytes| *bytes <= max_io)
                .ok_or(Errno::EIO)?,
            _ => 0,
        };
        Ok(Asked { op, flags, sector, sectors, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAX_IO: u32 = 512 << 10;

    fn descriptor(op_flags: u32, sectors: u32, sector: u64) -> Descriptor {
        Descriptor { op_flags, nr_sectors: sectors, start_sector: sector, addr: 0 }
    }

    #[test]
    fn every_operation_is_told_apart() {
        for (code, op, bytes) in
            [(0, Op::Read, 4096), (1, Op::Write, 4096), (3, Op::Discard, 0), (5, Op::WriteZeroes, 0)]
        {
            let asked = Asked::read(&descriptor(code, 8, 77), MAX_IO).unwrap();
            assert_eq!((asked.op, asked.sector, asked.sectors, asked.bytes), (op, 77, 8, bytes));
            assert!(!asked.flags.fua);
        }
        for code in [4, 6, 10, 11, 12, 13, 14, 15, 18, 255] {
            assert_eq!(Asked::read(&descriptor(code, 8, 0), MAX_IO), Err(Errno::EOPNOTSUPP), "{code}");
        }
    }

    #[test]
    fn a_flush_has_no_range() {
        let asked = Asked::read(&descriptor(2 | sys::UBLK_IO_F_FUA, 9, u64::MAX), MAX_IO).unwrap();
        assert_eq!(asked, Asked { op: Op::Flush, flags: Flags::default(), sector: 0, sectors: 0, bytes: 0 });
    }

    #[test]
    fn flags_belong_to_their_operations() {
        let flags = |op_flags| Asked::read(&descriptor(op_flags, 8, 0), MAX_IO).unwrap().flags;
        assert!(flags(1 | 1 << 13).fua, "UBLK_IO_F_FUA is bit 13");
        assert!(!flags(1 << 13).fua, "a read has none");
        assert!(flags(5).unmap, "zeroes may be holes unless told otherwise");
        assert!(!flags(5 | 1 << 15).unmap, "UBLK_IO_F_NOUNMAP is bit 15");
        assert!(!flags(1).unmap);
        assert_eq!(flags(1 | 0x700), Flags::default(), "fail-fast is no business of ours");
    }

    #[test]
    fn more_data_than_a_buffer_holds_is_refused() {
        assert_eq!(Asked::read(&descriptor(0, 1024, 0), MAX_IO).unwrap().bytes, MAX_IO);
        for sectors in [1025, 1 << 23, u32::MAX] {
            assert_eq!(Asked::read(&descriptor(1, sectors, 0), MAX_IO), Err(Errno::EIO));
        }
        // A discard carries no data, however long it is.
        assert_eq!(Asked::read(&descriptor(3, u32::MAX, 0), MAX_IO).unwrap().sectors, u32::MAX);
    }

    proptest! {
        #[test]
        fn no_descriptor_gets_past_its_buffer(op_flags: u32, sectors: u32, sector: u64, pages in 1u32..8192) {
            if let Ok(asked) = Asked::read(&descriptor(op_flags, sectors, sector), pages * 4096) {
                prop_assert!(asked.bytes <= pages * 4096);
                if matches!(asked.op, Op::Read | Op::Write) {
                    prop_assert_eq!(u64::from(asked.bytes), u64::from(asked.sectors) * SECTOR);
                }
            }
        }
    }
}
