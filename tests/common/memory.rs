//! A guest's memory: one memfd, shown to the service in regions.

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use std::ffi::c_void;
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU16;

use vhost::VhostUserMemoryRegionInfo;

/// The VMM's own addresses of guest memory differ from the guest's by this, so that mixing them up shows.
pub const VMM_OFFSET: u64 = 0x7a00_0000_0000;

/// A range of guest addresses and where in the file it is.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// First guest address.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// In the file.
    pub offset: u64,
}

/// A memfd that is mapped here whole.
pub struct GuestMemory {
    file: File,
    base: NonNull<c_void>,
    len: usize,
    regions: Vec<Region>,
}

// SAFETY: the mapping may be used from any thread; what the threads do with its bytes is between them.
unsafe impl Send for GuestMemory {}
// SAFETY: as above.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// One region of `len` bytes from guest address `gpa` on.
    pub fn new(gpa: u64, len: u64) -> GuestMemory {
        GuestMemory::with_regions(&[Region { gpa, len, offset: 0 }])
    }

    /// Any regions; the file is as long as they need.
    pub fn with_regions(regions: &[Region]) -> GuestMemory {
        let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
        let len = regions.iter().map(|region| region.offset + region.len).max().unwrap();
        file.set_len(len).unwrap();
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let size = NonZeroUsize::new(len as usize).unwrap();
        // SAFETY: a new mapping of our own file, at an address of the kernel's choice.
        let base = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, &file, 0) }.unwrap();
        GuestMemory { file, base, len: len as usize, regions: regions.to_vec() }
    }

    /// Takes the memory away. Whoever touches it now, in this process too, gets a SIGBUS.
    pub fn cut(&self) {
        self.file.set_len(0).unwrap();
    }

    /// What the protocol says of region `index`.
    pub fn info(&self, index: usize) -> VhostUserMemoryRegionInfo {
        let Region { gpa, len, offset } = self.regions[index];
        VhostUserMemoryRegionInfo {
            guest_phys_addr: gpa,
            memory_size: len,
            userspace_addr: gpa + VMM_OFFSET,
            mmap_offset: offset,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// All regions.
    pub fn infos(&self) -> Vec<VhostUserMemoryRegionInfo> {
        (0..self.regions.len()).map(|index| self.info(index)).collect()
    }

    /// The memfd.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Our address of `gpa`, and how many bytes of its region are left there.
    fn host(&self, gpa: u64) -> (*mut u8, usize) {
        let region = self.regions.iter().find(|region| gpa.wrapping_sub(region.gpa) < region.len);
        let region = region.unwrap_or_else(|| panic!("the test's own address {gpa:#x} is not guest memory"));
        let skip = gpa - region.gpa;
        let host = self.base.as_ptr().cast::<u8>().wrapping_add((region.offset + skip) as usize);
        (host, (region.len - skip) as usize)
    }

    /// Our address of `len` bytes in one region.
    pub fn ptr(&self, gpa: u64, len: usize) -> *mut u8 {
        let (host, left) = self.host(gpa);
        assert!(len <= left);
        host
    }

    /// Copies in, across regions.
    pub fn write(&self, mut gpa: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (host, left) = self.host(gpa);
            let part = left.min(bytes.len());
            // SAFETY: `part` bytes of the mapping; nobody holds a reference into it.
            unsafe { host.copy_from(bytes.as_ptr(), part) };
            bytes = &bytes[part..];
            gpa += part as u64;
        }
    }

    /// Copies out, across regions.
    pub fn read(&self, mut gpa: u64, mut bytes: &mut [u8]) {
        while !bytes.is_empty() {
            let (host, left) = self.host(gpa);
            let part = left.min(bytes.len());
            // SAFETY: as in `write`.
            unsafe { host.copy_to(bytes.as_mut_ptr(), part) };
            bytes = &mut bytes[part..];
            gpa += part as u64;
        }
    }

    /// Copies out `len` bytes.
    pub fn get(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(gpa, &mut bytes);
        bytes
    }

    /// A 16-bit field that the other side changes.
    pub fn half(&self, gpa: u64) -> &AtomicU16 {
        let at = self.ptr(gpa, 2).cast::<AtomicU16>();
        assert!(at.is_aligned());
        // SAFETY: aligned, mapped as long as we live, and an atomic may change behind our back.
        unsafe { &*at }
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and nothing borrows from it any more.
        unsafe { munmap(self.base, self.len) }.unwrap();
    }
}
