//! Memory that the kernel reads and writes: page-aligned, mapped apart from the heap.

use crate::block::Iovec;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

/// A mapping of this process. An anonymous one is zero, and no memory until it is touched: reserving much
/// costs nothing.
///
/// Its bytes may be written by the kernel and by several threads at once, as a disk's may; so they are copied
/// in and out and never borrowed.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread.
unsafe impl Send for Mapping {}
// SAFETY: no reference to the bytes is ever made; who copies what when is up to the users, as on a disk.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of zeroes, readable and writable.
    ///
    /// # Errors
    /// The kernel's, `ENOMEM` mostly.
    pub fn anonymous(len: usize) -> io::Result<Mapping> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        Mapping::map(len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    }

    /// As [`anonymous`](Self::anonymous), but in pages of the smallest size, for a mapping of which few bytes here and
    /// there are touched: elsewhere the kernel may make 2 MiB resident, and clear them, at a touch.
    ///
    /// # Errors
    /// The kernel's, `ENOMEM` mostly.
    pub fn sparse(len: usize) -> io::Result<Mapping> {
        let mapping = Mapping::anonymous(len)?;
        // SAFETY: the mapping's own range; the advice changes no byte of it. A kernel without huge pages refuses it.
        unsafe { libc::madvise(mapping.base.as_ptr().cast(), len, libc::MADV_NOHUGEPAGE) };
        Ok(mapping)
    }

    /// Keeps all of it in memory, for as long as it is mapped.
    ///
    /// # Errors
    /// `ENOMEM` or `EPERM` where so much may not be locked.
    pub fn lock(&self) -> io::Result<()> {
        // SAFETY: the mapping's own range, of which no byte is changed.
        let result = unsafe { libc::mlock(self.base.as_ptr().cast(), self.len) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Makes all of it resident.
    ///
    /// # Errors
    /// When there is not so much memory.
    pub fn populate(&self) -> io::Result<()> {
        // SAFETY: as in `lock`.
        let result = unsafe { libc::madvise(self.base.as_ptr().cast(), self.len, libc::MADV_POPULATE_WRITE) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Bytes of it that are in memory.
    ///
    /// # Errors
    /// The kernel's.
    pub fn resident(&self) -> io::Result<usize> {
        const PAGE: usize = 4096;
        let mut pages = vec![0u8; self.len.div_ceil(PAGE)];
        // SAFETY: the mapping's own range, and a byte of ours for each of its pages.
        let result = unsafe { libc::mincore(self.base.as_ptr().cast(), self.len, pages.as_mut_ptr()) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(pages.iter().filter(|page| **page & 1 == 1).count() * PAGE)
    }

    /// Maps `len` bytes of `fd` from `offset`, shared and read-only.
    ///
    /// # Errors
    /// The kernel's.
    pub fn shared_read(fd: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Mapping> {
        Mapping::map(len, libc::PROT_READ, libc::MAP_SHARED, fd.as_raw_fd(), offset as libc::off_t)
    }

    /// Maps `len` bytes of `fd` from `offset`, shared, readable and writable.
    ///
    /// # Errors
    /// The kernel's.
    pub fn shared(fd: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Mapping> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        Mapping::map(len, prot, libc::MAP_SHARED, fd.as_raw_fd(), offset as libc::off_t)
    }

    fn map(len: usize, prot: i32, flags: i32, fd: i32, offset: libc::off_t) -> io::Result<Mapping> {
        // SAFETY: without MAP_FIXED (no caller passes it) the kernel chooses an address that overlaps nothing.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, fd, offset) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Mapping { base, len })
    }

    /// First byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Bytes; never 0.
    #[allow(clippy::len_without_is_empty, reason = "the kernel makes no empty mapping")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// `len` bytes from `offset` on.
    ///
    /// # Panics
    /// When the range reaches past the end of the mapping.
    pub fn iovec(&self, offset: usize, len: usize) -> Iovec<'_> {
        // SAFETY: inside the mapping, which is borrowed for as long, and there are no references into one.
        unsafe { Iovec::new(self.range(offset, len), len) }
    }

    /// Copies from `offset` on into the ranges.
    ///
    /// # Panics
    /// When the ranges together reach past the end of the mapping.
    pub fn scatter(&self, offset: usize, iovecs: &[Iovec<'_>]) {
        self.scatter_each(offset, iovecs.iter().copied());
    }

    /// The same for ranges that come one by one.
    pub(super) fn scatter_each<'m>(&self, offset: usize, iovecs: impl Iterator<Item = Iovec<'m>>) {
        let mut at = offset;
        for iovec in iovecs {
            let from = self.range(at, iovec.len());
            // SAFETY: `range` checked ours, the promise of `Iovec::new` covers the other.
            unsafe { std::ptr::copy(from, iovec.base(), iovec.len()) };
            at += iovec.len();
        }
    }

    /// Copies bytes from `offset` on out, to be looked at.
    ///
    /// # Panics
    /// When the range reaches past the end of the mapping.
    pub fn copy_out(&self, offset: usize, into: &mut [u8]) {
        // SAFETY: `into` is ours alone until we return, and nothing keeps the range.
        let range = unsafe { Iovec::new(into.as_mut_ptr(), into.len()) };
        self.scatter(offset, &[range]);
    }

    /// Copies bytes to `offset` on.
    ///
    /// # Panics
    /// When the range reaches past the end of the mapping.
    pub fn copy_in(&self, offset: usize, from: &[u8]) {
        let to = self.range(offset, from.len());
        // SAFETY: `range` checked ours, which no reference leads into, so the two do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
    }

    /// Copies from the ranges to `offset` on.
    ///
    /// # Panics
    /// As for [`scatter`](Self::scatter).
    pub fn gather(&self, offset: usize, iovecs: &[Iovec<'_>]) {
        self.gather_each(offset, iovecs.iter().copied());
    }

    /// The same for ranges that come one by one.
    pub(super) fn gather_each<'m>(&self, offset: usize, iovecs: impl Iterator<Item = Iovec<'m>>) {
        let mut at = offset;
        for iovec in iovecs {
            let to = self.range(at, iovec.len());
            // SAFETY: as in `scatter`.
            unsafe { std::ptr::copy(iovec.base(), to, iovec.len()) };
            at += iovec.len();
        }
    }

    /// Makes `len` bytes from `offset` on zero, giving whole pages back to the system. For an anonymous
    /// mapping only; one `madvise(2)` when the range has a whole page.
    ///
    /// # Panics
    /// When the range reaches past the end of the mapping.
    pub fn zero(&self, offset: usize, len: usize) {
        const PAGE: usize = 4096;
        let start = self.range(offset, len);
        let (first, last) = (offset.next_multiple_of(PAGE), (offset + len) & !(PAGE - 1));
        // SAFETY: `range` checked all of it, and the whole pages lie within it. MADV_DONTNEED on a private
        // anonymous mapping makes them read zero.
        unsafe {
            if first < last
                && libc::madvise(self.as_ptr().add(first).cast(), last - first, libc::MADV_DONTNEED) == 0
            {
                std::ptr::write_bytes(start, 0, first - offset);
                std::ptr::write_bytes(self.as_ptr().add(last), 0, offset + len - last);
            } else {
                std::ptr::write_bytes(start, 0, len);
            }
        }
    }

    /// The address of `offset`, of which `len` bytes on are inside.
    fn range(&self, offset: usize, len: usize) -> *mut u8 {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.len),
            "{offset}+{len} is outside a mapping of {}",
            self.len
        );
        self.as_ptr().wrapping_add(offset)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by mmap with this length, and unmapped once. No kernel I/O names it any more: the
        // contract of `ring`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// 64 KiB of zeroes, aligned for O_DIRECT. In .bss: no memory until a store needs it.
#[repr(align(4096))]
struct Zeroes([u8; Zeroes::LEN]);

impl Zeroes {
    const LEN: usize = 1 << 16;
}

static ZEROES: Zeroes = Zeroes([0; Zeroes::LEN]);

/// Up to `len` bytes of zeroes to write from; fewer where `len` is more than there are.
pub fn zeroes(len: u64) -> Iovec<'static> {
    let len = len.min(Zeroes::LEN as u64) as usize;
    // SAFETY: a static is always mapped. Only writes are given it, and a write only reads it.
    unsafe { Iovec::new(ZEROES.0.as_ptr().cast_mut(), len) }
}

/// Makes a range zero.
pub fn clear(iovec: Iovec<'_>) {
    // SAFETY: what an iovec names may be written to for as long as it is borrowed: the promise of `Iovec::new`.
    unsafe { std::ptr::write_bytes(iovec.base(), 0, iovec.len()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn halves(bytes: &mut [u8], at: usize) -> [Iovec<'_>; 2] {
        let (a, b) = bytes.split_at_mut(at);
        // SAFETY: used while `bytes` lives, and not through it meanwhile.
        unsafe { [Iovec::new(a.as_mut_ptr(), a.len()), Iovec::new(b.as_mut_ptr(), b.len())] }
    }

    #[test]
    fn gather_and_scatter_are_each_others_inverse() {
        let mut from: Vec<u8> = (0..100).collect();
        let mut to = vec![0u8; 100];
        let mapping = Mapping::anonymous(200).unwrap();
        mapping.gather(50, &halves(&mut from, 37));
        mapping.scatter(50, &halves(&mut to, 61));
        assert_eq!(from, to);
    }

    #[test]
    fn zeroing_touches_its_range_alone() {
        for (offset, len) in [(0, 16384), (1, 3), (100, 9000), (4096, 4096), (4095, 4098)] {
            let mapping = Mapping::anonymous(16384).unwrap();
            mapping.gather(0, &halves(&mut [7; 16384], 0));
            mapping.zero(offset, len);
            let mut bytes = vec![1u8; 16384];
            mapping.scatter(0, &halves(&mut bytes, 0));
            for (at, byte) in bytes.iter().enumerate() {
                let inside = (offset..offset + len).contains(&at);
                assert_eq!(*byte, if inside { 0 } else { 7 }, "byte {at} of {offset}+{len}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "outside a mapping")]
    fn a_copy_past_the_end_is_caught() {
        let mut bytes = [0u8; 10];
        Mapping::anonymous(100).unwrap().scatter(95, &halves(&mut bytes, 5));
    }
}
