//! The commonest chains, read straight: a header, the data, a status, each descriptor in one memory region. Nearly all
//! requests are that; whatever else there is in one, [`parse`](super::parse()) reads it from its beginning.

#![forbid(unsafe_code)]

use super::{Chain, HEADER, MAX_SEGMENTS, Parsed, Scratch};
use crate::block::{Op, SECTOR, SECTOR_SHIFT};
use crate::frontend::vhost_user::memory::DescriptorTable;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// Reads such a chain. `None` for any other, of which nothing is kept. It reads every descriptor once, and costs less than
/// half of what the general way does.
#[inline]
pub(super) fn straight<'m>(
    mut table: DescriptorTable<'m>,
    head: u16,
    indirect: bool,
    scratch: &mut Scratch<'m>,
) -> Option<Chain<'m>> {
    let memory = table.memory();
    let mut descriptor = table.get(head)?;
    if descriptor.flags() == INDIRECT {
        let len = descriptor.len() as usize;
        if !indirect || !len.is_multiple_of(size_of::<Descriptor>()) {
            return None;
        }
        table = memory.table(descriptor.addr().0, u16::try_from(len / size_of::<Descriptor>()).ok()?);
        descriptor = table.get(0)?;
    }
    if descriptor.flags() != NEXT || descriptor.len() as usize != HEADER {
        return None;
    }
    let [kind, sector] = memory.words(descriptor.addr().0)?;
    // The header's first 32 bits; those after them are a priority, which nobody here minds.
    let (op, data_flags) = match u64::from_le(kind) as u32 {
        VIRTIO_BLK_T_IN => (Op::Read, NEXT | WRITE),
        VIRTIO_BLK_T_OUT => (Op::Write, NEXT),
        _ => return None,
    };
    scratch.iovecs.clear();
    scratch.ranges.clear();
    // At most MAX_SEGMENTS lengths of 32 bits: no overflow.
    let mut bytes = 0;
    loop {
        descriptor = table.get(descriptor.next())?;
        let len = u64::from(descriptor.len());
        if descriptor.flags() != data_flags {
            break;
        }
        if len == 0 || scratch.iovecs.len() == MAX_SEGMENTS {
            return None;
        }
        scratch.iovecs.push(memory.whole(descriptor.addr().0, len)?);
        bytes += len;
    }
    if descriptor.flags() != WRITE || descriptor.len() != 1 || bytes == 0 || !bytes.is_multiple_of(SECTOR) {
        return None;
    }
    let status = memory.whole(descriptor.addr().0, 1)?;
    let sectors = u32::try_from(bytes >> SECTOR_SHIFT).ok()?;
    let data = 0..scratch.iovecs.len();
    Some(Chain { status, request: Parsed::Transfer { op, sector: u64::from_le(sector), sectors, data } })
}
