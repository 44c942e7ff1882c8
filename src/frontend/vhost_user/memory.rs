//! A VMM's memory as a worker sees it: guest addresses resolved to ours, and nothing else reachable.

use super::backing::Backing;
use super::budget::Charge;
use super::sigbus::Guard;
use crate::block::Iovec;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// A snapshot of the memory table. It keeps the mappings alive, so whatever resolves stays mapped as long as
/// it does.
#[derive(Clone)]
pub struct Memory {
    regions: Arc<[Region]>,
    /// Before the mappings, which they must not outlive. One for each region; none of memory that nobody takes away.
    guards: Arc<[Arc<Guard>]>,
    _mappings: Arc<GuestMemoryMmap<()>>,
}

#[derive(Clone, Copy)]
struct Region {
    /// First guest-physical address.
    start: u64,
    /// Bytes; never 0.
    len: u64,
    /// Where it is mapped here.
    host: *mut u8,
}

// SAFETY: the pointers are to shared mappings of the process, kept by `_mappings`. Nothing here follows them.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

/// Why a snapshot was refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Touching the missing part would be a SIGBUS.
    #[error("memory region at {start:#x}: {len} bytes from offset {offset}, but its file has {file} bytes")]
    BeyondFile {
        /// Guest address.
        start: u64,
        /// Claimed length.
        len: u64,
        /// Offset in the file.
        offset: u64,
        /// The file's length.
        file: u64,
    },
    /// The file cannot be asked.
    #[error("memory region at {start:#x}")]
    File {
        /// Guest address.
        start: u64,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// Too many regions.
    #[error("memory region at {start:#x} cannot be guarded")]
    Guard {
        /// Guest address.
        start: u64,
        /// Why.
        source: std::io::Error,
    },
    /// No host address.
    #[error("memory region at {start:#x} is not mapped")]
    NotMapped {
        /// Guest address.
        start: u64,
    },
}

impl Memory {
    /// Takes the table as it is now, of memory that nobody can take away.
    ///
    /// # Errors
    /// When a region reaches past the end of its file.
    pub fn new(mappings: Arc<GuestMemoryMmap<()>>) -> Result<Memory, MemoryError> {
        let regions = Memory::regions(&mappings)?;
        Ok(Memory { regions: regions.into(), guards: Arc::default(), _mappings: mappings })
    }

    /// Takes the table as it is now, of a VMM that is hung up on (by `socket`) when it takes memory away. What
    /// `before` holds already stays guarded as it is. `charges` are the addresses of what is new, by guest address.
    ///
    /// # Errors
    /// When a region reaches past the end of its file, or the kernel takes no signal handler.
    pub(super) fn guarded(
        mappings: Arc<GuestMemoryMmap<()>>,
        socket: &Arc<UnixStream>,
        before: Option<&Memory>,
        mut charges: Vec<(u64, Charge)>,
    ) -> Result<Memory, MemoryError> {
        let regions = Memory::regions(&mappings)?;
        let mut guards = Vec::with_capacity(regions.len());
        for region in &regions {
            if let Some(guard) = before.and_then(|before| before.guard(region)) {
                guards.push(guard);
                continue;
            }
            let Region { start, len, host } = *region;
            let charge = charges.iter().position(|(of, _)| *of == start).map(|at| charges.swap_remove(at).1);
            let page = page_size(&mappings, start).map_err(|source| MemoryError::File { start, source })?;
            let guard = Guard::new(host, len as usize, page, socket, charge)
                .map_err(|source| MemoryError::Guard { start, source })?;
            guards.push(Arc::new(guard));
        }
        Ok(Memory { regions: regions.into(), guards: guards.into(), _mappings: mappings })
    }

    /// The guard of a mapping that is in both tables: two at one address are one, as long as both tables are held.
    fn guard(&self, region: &Region) -> Option<Arc<Guard>> {
        let at = self.regions.iter().position(|held| held.host == region.host && held.len == region.len)?;
        self.guards.get(at).cloned()
    }

    /// Whether the VMM took some of it away.
    pub(super) fn is_lost(&self) -> bool {
        self.guards.iter().any(|guard| guard.is_lost())
    }

    /// What is mapped, by guest address.
    fn regions(mappings: &GuestMemoryMmap<()>) -> Result<Vec<Region>, MemoryError> {
        let mut regions = Vec::with_capacity(mappings.num_regions());
        for region in mappings.iter() {
            let (start, len) = (region.start_addr().0, region.len());
            if let Some(file) = region.file_offset() {
                let size =
                    file.file().metadata().map_err(|source| MemoryError::File { start, source })?.len();
                if file.start().checked_add(len).is_none_or(|end| end > size) {
                    return Err(MemoryError::BeyondFile { start, len, offset: file.start(), file: size });
                }
            }
            let host = mappings
                .get_host_address(GuestAddress(start))
                .map_err(|_| MemoryError::NotMapped { start })?;
            regions.push(Region { start, len, host });
        }
        regions.sort_by_key(|region| region.start);
        Ok(regions)
    }

    /// Our address of guest address `at`, and how many bytes from there on are contiguous, `len` at most.
    /// `None` where the guest has no memory. A guest has few regions, so the search is a short walk.
    fn contiguous(&self, at: u64, len: u64) -> Option<(*mut u8, u64)> {
        let region = self.regions.iter().find(|region| at.wrapping_sub(region.start) < region.len)?;
        let skip = at - region.start;
        Some((region.host.wrapping_add(skip as usize), len.min(region.len - skip)))
    }

    /// Our address of `len` bytes that lie in one region and start at a multiple of `align`: for the guest, whom the
    /// specification asks for that, and for us, who access it so.
    pub fn resolve(&self, at: u64, len: u64, align: u64) -> Option<*mut u8> {
        let (host, found) = self.contiguous(at, len)?;
        let aligned = at.is_multiple_of(align) && (host as u64).is_multiple_of(align);
        (found == len && aligned).then_some(host)
    }

    /// All of `len` bytes from `at` on, if they lie in one region.
    pub fn whole(&self, at: u64, len: u64) -> Option<Iovec<'_>> {
        let (base, found) = self.contiguous(at, len)?;
        // SAFETY: as in `split`.
        (found == len).then(|| unsafe { Iovec::new(base, found as usize) })
    }

    /// The two words of 64 bits at `at`, as they stand there, if they lie aligned in one region.
    pub fn words(&self, at: u64) -> Option<[u64; 2]> {
        let words = self.resolve(at, 16, 8)?.cast_const().cast::<u64>();
        // SAFETY: 16 bytes are mapped, and aligned for us too; volatile, for the guest may write to them meanwhile.
        Some(unsafe { [words.read_volatile(), words.add(1).read_volatile()] })
    }

    /// Resolves all of `len` bytes from `at` on, giving each region's part to `push`, which says whether it
    /// had room. False when it had not, or when the guest has no memory somewhere in the range.
    pub fn split<'m>(&'m self, mut at: u64, mut len: u64, mut push: impl FnMut(Iovec<'m>) -> bool) -> bool {
        while len > 0 {
            let Some((base, part)) = self.contiguous(at, len) else { return false };
            // SAFETY: `part` bytes from `base` on are mapped, by `_mappings`, for as long as this is; guest memory is never
            // borrowed.
            if !push(unsafe { Iovec::new(base, part as usize) }) {
                return false;
            }
            len -= part;
            let Some(next) = at.checked_add(part) else { return len == 0 };
            at = next;
        }
        true
    }
}

/// Bytes in a page of the file behind the region at guest address `start`.
fn page_size(mappings: &GuestMemoryMmap<()>, start: u64) -> std::io::Result<usize> {
    let region = mappings.find_region(GuestAddress(start));
    let file = region.and_then(GuestMemoryRegion::file_offset).ok_or(std::io::ErrorKind::InvalidInput)?;
    Ok(Backing::of(file.file())?.page as usize)
}

/// A descriptor table: the vring's own, or an indirect one.
#[derive(Clone, Copy)]
pub struct DescriptorTable<'m> {
    memory: &'m Memory,
    /// Where the guest has it.
    at: u64,
    /// Where we have it, when it lies in one region.
    host: Option<*const Descriptor>,
    /// Descriptors in it.
    len: u16,
}

impl Memory {
    /// The table of `len` descriptors at guest address `at`.
    pub fn table(&self, at: u64, len: u16) -> DescriptorTable<'_> {
        let bytes = u64::from(len) * size_of::<Descriptor>() as u64;
        let host = self.resolve(at, bytes, align_of::<Descriptor>() as u64);
        DescriptorTable { memory: self, at, host: host.map(|host| host.cast_const().cast()), len }
    }
}

impl<'m> DescriptorTable<'m> {
    /// Descriptors in it.
    pub fn len(&self) -> u16 {
        self.len
    }

    /// The memory that it is in.
    pub fn memory(&self) -> &'m Memory {
        self.memory
    }

    /// Reads descriptor `index`, once: a guest that changes it later changes nothing for us.
    /// `None` outside the table or the guest's memory.
    pub fn get(&self, index: u16) -> Option<Descriptor> {
        if index >= self.len {
            return None;
        }
        if let Some(host) = self.host {
            // SAFETY: the whole table resolved in `memory`, aligned, and `index` is inside; any bytes are a descriptor.
            return Some(unsafe { host.add(index as usize).read_volatile() });
        }
        self.get_in_pieces(index)
    }

    /// Reads a descriptor of a table that lies across regions, or is misaligned for us.
    #[cold]
    fn get_in_pieces(&self, index: u16) -> Option<Descriptor> {
        let at = self.at.checked_add(u64::from(index) * size_of::<Descriptor>() as u64)?;
        let mut bytes = [0; size_of::<Descriptor>()];
        let mut filled = 0;
        self.memory
            .split(at, bytes.len() as u64, |part| {
                filled += gather(&[part], &mut bytes[filled..]);
                true
            })
            .then(|| descriptor_from(bytes))
    }
}

fn descriptor_from(bytes: [u8; size_of::<Descriptor>()]) -> Descriptor {
    let mut descriptor = Descriptor::default();
    descriptor.as_mut_slice().copy_from_slice(&bytes);
    descriptor
}

/// Copies the ranges' first bytes out, until either side ends. How many there were. Byte by byte: the guest may write to
/// them meanwhile, which an ordinary copy must not meet. For what is short, and rare.
#[cold]
pub fn gather(from: &[Iovec<'_>], to: &mut [u8]) -> usize {
    let mut done = 0;
    for iovec in from {
        let count = iovec.len().min(to.len() - done);
        for (index, byte) in to[done..done + count].iter_mut().enumerate() {
            // SAFETY: `index` is below the range's length, all of which is mapped: the promise of `Iovec::new`.
            *byte = unsafe { iovec.base().add(index).read_volatile() };
        }
        done += count;
    }
    done
}

/// The bytes of a range that has just so many.
pub fn read<const N: usize>(from: &Iovec<'_>) -> Option<[u8; N]> {
    if from.len() != N {
        return None;
    }
    let mut bytes = [0; N];
    let words = from.base().cast_const().cast::<u64>();
    if words.is_aligned() && N.is_multiple_of(size_of::<u64>()) {
        // As every driver has it: two loads for a header, not sixteen.
        for (index, word) in bytes.chunks_exact_mut(size_of::<u64>()).enumerate() {
            // SAFETY: `N` bytes are mapped, the promise of `Iovec::new`; aligned, as was just seen.
            word.copy_from_slice(&unsafe { words.add(index).read_volatile() }.to_ne_bytes());
        }
    } else {
        gather(std::slice::from_ref(from), &mut bytes);
    }
    Some(bytes)
}

/// Writes a byte to a range that has room for it.
pub fn write_byte(byte: u8, to: &Iovec<'_>) {
    if !to.is_empty() {
        // SAFETY: the promise of `Iovec::new`.
        unsafe { to.base().write_volatile(byte) };
    }
}

/// Copies bytes into the ranges, until either side ends. How many there were. As [`gather`] does.
pub fn scatter(from: &[u8], to: &[Iovec<'_>]) -> usize {
    let mut done = 0;
    for iovec in to {
        let count = iovec.len().min(from.len() - done);
        for (index, byte) in from[done..done + count].iter().enumerate() {
            // SAFETY: as in `gather`.
            unsafe { iovec.base().add(index).write_volatile(*byte) };
        }
        done += count;
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use vm_memory::{FileOffset, GuestRegionMmap, MmapRegion};

    fn memory(ranges: &[(u64, usize)]) -> Memory {
        let ranges: Vec<_> = ranges.iter().map(|(at, len)| (GuestAddress(*at), *len)).collect();
        Memory::new(Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())).unwrap()
    }

    fn parts(memory: &Memory, at: u64, len: u64) -> Option<Vec<usize>> {
        let mut parts = Vec::new();
        memory
            .split(at, len, |iovec| {
                parts.push(iovec.len());
                true
            })
            .then_some(parts)
    }

    #[test]
    fn a_range_over_two_regions_is_split() {
        let memory = memory(&[(0x1000, 0x1000), (0x2000, 0x1000), (0x4000, 0x1000)]);
        assert_eq!(parts(&memory, 0x1800, 0x1000), Some(vec![0x800, 0x800]));
        assert_eq!(parts(&memory, 0x1000, 0x2000), Some(vec![0x1000, 0x1000]));
        assert_eq!(parts(&memory, 0x4fff, 1), Some(vec![1]));
        assert!(memory.resolve(0x1800, 0x1000, 1).is_none());
    }

    #[test]
    fn nothing_outside_resolves() {
        let memory = memory(&[(0x1000, 0x1000), (0x4000, 0x1000)]);
        for (at, len) in [
            (0, 1),
            (0xfff, 2),
            (0x1fff, 2),
            (0x4fff, 2),
            (u64::MAX, 1),
            (u64::MAX - 1, 16),
            (0x4000, u64::MAX),
        ] {
            assert_eq!(parts(&memory, at, len), None, "{at:#x}+{len:#x}");
            assert!(memory.resolve(at, len, 1).is_none(), "{at:#x}+{len:#x}");
        }
        assert!(memory.resolve(0x1001, 16, 1).is_some());
        assert!(memory.resolve(0x1001, 16, 2).is_none());
    }

    #[test]
    fn our_address_is_aligned_too() {
        // As a VMM has it whose regions begin at no page's beginning: aligned for the guest alone.
        let memory = memory(&[(0x1001, 0x1000)]);
        for (at, align) in [(0x1010, 16), (0x1002, 2), (0x1004, 4)] {
            assert!(memory.resolve(at, 16, align).is_none(), "{at:#x}");
            assert!(memory.resolve(at, 16, 1).is_some(), "{at:#x}");
            assert!(memory.resolve(at + 1, 16, align).is_none(), "{at:#x}: aligned for us alone");
        }
        assert!(memory.table(0x1010, 4).host.is_none(), "read piece by piece instead");
        assert!(memory.table(0x1010, 4).get(3).is_some());
    }

    #[test]
    fn a_mapping_has_one_guard_in_all_tables_that_it_is_in() {
        let memfd = || {
            let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
            let file = std::fs::File::from(nix::sys::memfd::memfd_create(c"guest", flags).unwrap());
            file.set_len(0x2000).unwrap();
            file
        };
        let region = |at: u64| {
            let mapping = MmapRegion::from_file(FileOffset::new(memfd(), 0), 0x2000).unwrap();
            GuestRegionMmap::new(mapping, GuestAddress(at)).unwrap()
        };
        let share = super::super::budget::MemoryBudget::of_process(1).share();
        let charge = |at: u64| (at, share.charge(0x2000).unwrap());
        let (socket, _vmm) = UnixStream::pair().unwrap();
        let socket = Arc::new(socket);
        let table = Arc::new(GuestMemoryMmap::from_regions(vec![region(0x10000), region(0x20000)]).unwrap());
        let first = Memory::guarded(table.clone(), &socket, None, vec![charge(0x20000), charge(0x10000)]);
        let first = first.unwrap();
        let wider = Arc::new(table.insert_region(Arc::new(region(0x8000))).unwrap());
        let second = Memory::guarded(wider.clone(), &socket, Some(&first), vec![charge(0x8000)]).unwrap();
        assert!(Arc::ptr_eq(&first.guards[0], &second.guards[1]));
        assert!(Arc::ptr_eq(&first.guards[1], &second.guards[2]));
        assert_eq!(share.used(), 0x6000);
        drop((first, table));
        assert_eq!(share.used(), 0x6000);
        // What a later table lacks is free when the last one with it is gone.
        let (narrower, _) = wider.remove_region(GuestAddress(0x10000), 0x2000).unwrap();
        let third = Memory::guarded(Arc::new(narrower), &socket, Some(&second), Vec::new()).unwrap();
        assert_eq!(share.used(), 0x6000);
        drop((second, wider));
        assert_eq!((share.used(), third.guards.len()), (0x4000, 2));
        // What is taken away stays so in every table.
        assert!(!third.is_lost());
        third._mappings.iter().next().unwrap().file_offset().unwrap().file().set_len(0).unwrap();
        let mut bytes = [1; 8];
        assert!(third.split(0x8000, 8, |part| gather(&[part], &mut bytes) == 8));
        assert_eq!((bytes, third.is_lost()), ([0; 8], true));
        drop(third);
        assert_eq!((share.used(), Arc::strong_count(&socket)), (0, 1));
    }

    #[test]
    fn a_region_larger_than_its_file_is_refused() {
        let file = std::fs::File::from(
            nix::sys::memfd::memfd_create(c"region", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap(),
        );
        file.set_len(0x1000).unwrap();
        let file = Arc::new(std::fs::File::from(file.as_fd().try_clone_to_owned().unwrap()));
        let region = |len| {
            // vm-memory looks at the file's length itself, so the file shrinks after the mapping.
            file.set_len(0x2000).unwrap();
            let mapping = MmapRegion::from_file(FileOffset::from_arc(file.clone(), 0), len).unwrap();
            file.set_len(0x1000).unwrap();
            let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
            Memory::new(Arc::new(GuestMemoryMmap::from_regions(vec![region]).unwrap()))
        };
        assert!(region(0x1000).is_ok());
        assert!(matches!(region(0x2000), Err(MemoryError::BeyondFile { file: 0x1000, .. })));
    }
}
