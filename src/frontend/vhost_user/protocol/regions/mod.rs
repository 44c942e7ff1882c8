//! The memory a VMM shows us, checked before it is mapped: what is let pass can be mapped, replaced and unmapped whole,
//! and translates each address to at most one place.

use super::super::backing::Backing;
use super::super::budget::{Charge, MOST_BYTES, MemoryShare};
use super::Message;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use vhost::vhost_user::message::{FrontendReq, VhostUserMemory, VhostUserMemoryRegion};
use vm_memory::ByteValued;

/// Guest addresses, the VMM's, offsets and lengths are multiples of this: bytes in a page of the smallest size.
const PAGE: u64 = 4096;

/// Which memory a VMM shows.
#[derive(Clone, Debug)]
pub struct Regions {
    held: Vec<Region>,
    /// What it may have.
    share: Arc<MemoryShare>,
}

/// One region, as a VMM names it when it takes it away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Region {
    /// First guest address.
    guest: u64,
    /// First address of the VMM's own.
    user: u64,
    /// Bytes; never 0.
    bytes: u64,
}

/// What a VMM would show after a message.
#[derive(Debug)]
pub struct Change {
    /// All of it.
    pub regions: Regions,
    /// The addresses set aside for what is new, by guest address.
    pub charges: Vec<(u64, Charge)>,
}

impl Regions {
    /// None, of a VMM that may have so much.
    pub fn none(share: Arc<MemoryShare>) -> Regions {
        Regions { held: Vec::new(), share }
    }

    /// How many there may be.
    pub fn slots(&self) -> usize {
        self.share.slots()
    }

    /// What it would show after `message`, whose table is put in order; `None` for a message that is not about memory.
    ///
    /// # Errors
    /// Why the message must not be carried out.
    pub fn after(&self, message: &mut Message) -> Result<Option<Change>, String> {
        let (mut held, new) = match message.request {
            FrontendReq::SET_MEM_TABLE => {
                let table = take_table(message)?;
                let mut new = Vec::with_capacity(table.len());
                for (region, file) in &table {
                    new.push(checked(region, file)?);
                }
                put_table(message, table);
                (Vec::new(), new)
            }
            FrontendReq::ADD_MEM_REG => {
                let file = message.descriptors.first().ok_or("without a descriptor")?;
                (self.held.clone(), vec![checked(&single(&message.body), file)?])
            }
            FrontendReq::REM_MEM_REG => {
                let gone = ranges(&single(&message.body))?;
                let mut held = self.held.clone();
                let at = held.iter().position(|region| *region == gone);
                held.swap_remove(at.ok_or_else(|| format!("{gone}: there is none such"))?);
                (held, Vec::new())
            }
            _ => return Ok(None),
        };
        held.extend_from_slice(&new);
        let (count, slots) = (held.len(), self.slots());
        if count > slots {
            return Err(format!("{count} regions, of {slots} memory slots"));
        }
        let bytes = held.iter().fold(0, |all: u64, region| all.saturating_add(region.bytes));
        if bytes > MOST_BYTES {
            return Err(format!("{bytes} bytes of memory are more than {MOST_BYTES}"));
        }
        held.sort_unstable_by_key(|region| region.guest);
        if let Some(two) = held.windows(2).find(|two| two[0].guest + two[0].bytes > two[1].guest) {
            return Err(format!("{} and {} overlap", two[0], two[1]));
        }
        // The VMM's own addresses may overlap: a ring is where the first region has it.
        let mut charges = Vec::with_capacity(new.len());
        for region in new {
            charges.push((region.guest, self.share.charge(region.bytes)?));
        }
        Ok(Some(Change { regions: Regions { held, share: self.share.clone() }, charges }))
    }

    /// The guest address of what the VMM has at `user`; `None` where it has shown no memory.
    pub fn guest_address(&self, user: u64) -> Option<u64> {
        let region = self.held.iter().find(|region| user.wrapping_sub(region.user) < region.bytes)?;
        Some(region.guest + (user - region.user))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}

impl std::fmt::Display for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "region at {:#x} of {} bytes", self.guest, self.bytes)
    }
}

const HEAD: usize = size_of::<VhostUserMemory>();
const ENTRY: usize = size_of::<VhostUserMemoryRegion>();

/// A table's regions with their files, out of the message, in the order of their guest addresses: vm-memory takes no
/// other, and the protocol asks for none.
fn take_table(message: &mut Message) -> Result<Vec<(VhostUserMemoryRegion, OwnedFd)>, String> {
    let (head, table) = message.body.split_at_checked(HEAD).ok_or("too short")?;
    let count = head.first_chunk().map_or(0, |count| u32::from_ne_bytes(*count)) as usize;
    let (bytes, files) = (table.len(), message.descriptors.len());
    if bytes != count * ENTRY || files != count {
        return Err(format!("{count} regions in {bytes} bytes with {files} descriptors"));
    }
    let regions = table.chunks_exact(ENTRY).map(region);
    let mut table: Vec<_> = regions.zip(message.descriptors.drain(..)).collect();
    table.sort_by_key(|(region, _)| region.guest_phys_addr);
    Ok(table)
}

/// The way back.
fn put_table(message: &mut Message, table: Vec<(VhostUserMemoryRegion, OwnedFd)>) {
    message.body.truncate(HEAD);
    for (region, file) in table {
        message.body.extend_from_slice(region.as_slice());
        message.descriptors.push(file);
    }
}

/// A region in a table.
fn region(bytes: &[u8]) -> VhostUserMemoryRegion {
    let mut region = VhostUserMemoryRegion::default();
    region.as_mut_slice().copy_from_slice(bytes);
    region
}

/// A region that comes alone, after 64 bits of padding.
fn single(body: &[u8]) -> VhostUserMemoryRegion {
    region(&body[body.len() - ENTRY..])
}

/// A region whose addresses make sense.
fn ranges(region: &VhostUserMemoryRegion) -> Result<Region, String> {
    let (guest, bytes) = (region.guest_phys_addr, region.memory_size);
    let (user, offset) = (region.user_addr, region.mmap_offset);
    let ours = Region { guest, user, bytes };
    if bytes == 0 {
        return Err(format!("{ours}: nothing in it"));
    }
    for (what, from) in [("guest", guest), ("VMM", user), ("file", offset)] {
        if from.checked_add(bytes).is_none() {
            return Err(format!("{ours}: its {what} addresses wrap around from {from:#x}"));
        }
    }
    Ok(ours)
}

/// A region that can be mapped: by its file too.
fn checked(region: &VhostUserMemoryRegion, file: &OwnedFd) -> Result<Region, String> {
    let ours = ranges(region)?;
    let (offset, bytes) = (region.mmap_offset, ours.bytes);
    let backing = Backing::of(file).map_err(|error| format!("{ours}: {error}"))?;
    // Where it begins, ours is aligned as the guest's are. Part of a huge page cannot be unmapped nor replaced; of any
    // other the kernel takes the rest along, and some VMMs (libblkio) show as much as they need.
    for (what, value, unit) in [
        ("guest address", ours.guest, PAGE),
        ("VMM address", ours.user, PAGE),
        ("offset in its file", offset, backing.page.max(PAGE)),
        ("length", bytes, if backing.huge { backing.page } else { 1 }),
    ] {
        if !value.is_multiple_of(unit) {
            return Err(format!("{ours}: its {what} of {value:#x} is no multiple of a page, {unit} bytes"));
        }
    }
    // Touching what is missing would be a SIGBUS.
    if offset + bytes > backing.bytes {
        return Err(format!("{ours}: it starts at {offset} in a file of {}", backing.bytes));
    }
    Ok(ours)
}

#[cfg(test)]
mod tests;
