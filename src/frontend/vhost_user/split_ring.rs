//! The two areas of a split vring that driver and device talk through (virtio 1.3 sections 2.7.6 and 2.7.8),
//! read and written in place. Both are little-endian, and the other side may write at any time.

use super::atomic::{AtomicU16, AtomicU32, Ordering, fence};
use super::memory::Memory;

/// The driver area: flags, idx, ring\[size\], used_event; 16 bits each.
pub(super) struct Avail {
    base: *const AtomicU16,
    size: u16,
    /// Keeps it mapped.
    _memory: Memory,
}

/// The device area: flags and idx of 16 bits, ring\[size\] of two 32-bit words, avail_event of 16 bits.
pub(super) struct Used {
    base: *mut u8,
    size: u16,
    /// Keeps it mapped.
    _memory: Memory,
}

impl Avail {
    /// The area of a vring of `size` descriptors at guest address `at`, or `None` when it is misaligned or not
    /// all in one region.
    pub fn resolve(memory: &Memory, at: u64, size: u16) -> Option<Avail> {
        let base = memory.resolve(at, 2 * (u64::from(size) + 3), 2)?;
        Some(Avail { base: base.cast_const().cast(), size, _memory: memory.clone() })
    }

    fn word(&self, at: usize) -> &AtomicU16 {
        assert!(at < self.size as usize + 3);
        // SAFETY: `resolve` checked `size + 3` words; an atomic may change behind our back.
        unsafe { &*self.base.add(at) }
    }

    pub fn flags(&self) -> u16 {
        u16::from_le(self.word(0).load(Ordering::Relaxed))
    }

    /// Everything the driver wrote before it moved the index is visible after this.
    pub fn idx(&self) -> u16 {
        u16::from_le(self.word(1).load(Ordering::Acquire))
    }

    pub fn head(&self, at: u16) -> u16 {
        u16::from_le(self.word(2 + (at & (self.size - 1)) as usize).load(Ordering::Relaxed))
    }

    pub fn used_event(&self) -> u16 {
        u16::from_le(self.word(2 + self.size as usize).load(Ordering::Relaxed))
    }
}

impl Used {
    /// As [`Avail::resolve`].
    pub fn resolve(memory: &Memory, at: u64, size: u16) -> Option<Used> {
        Some(Used { base: memory.resolve(at, Used::len(size), 4)?, size, _memory: memory.clone() })
    }

    const fn len(size: u16) -> u64 {
        6 + 8 * size as u64
    }

    fn half(&self, at: usize) -> &AtomicU16 {
        assert!(at as u64 + 2 <= Used::len(self.size));
        // SAFETY: `resolve` checked the area, aligned to 4, and every `at` is even.
        unsafe { &*self.base.add(at).cast::<AtomicU16>() }
    }

    pub fn set_flags(&self, flags: u16) {
        self.half(0).store(flags.to_le(), Ordering::Relaxed);
    }

    pub fn idx(&self) -> u16 {
        u16::from_le(self.half(2).load(Ordering::Relaxed))
    }

    /// Everything written before is visible to a driver that sees the index.
    pub fn set_idx(&self, idx: u16) {
        self.half(2).store(idx.to_le(), Ordering::Release);
    }

    pub fn set(&self, at: u16, head: u16, written: u32) {
        let at = 4 + 8 * (at & (self.size - 1)) as usize;
        // SAFETY: inside the area that `resolve` checked, aligned to 4; an atomic may change behind our back.
        let element = unsafe { &*self.base.add(at).cast::<[AtomicU32; 2]>() };
        element[0].store(u32::from(head).to_le(), Ordering::Relaxed);
        element[1].store(written.to_le(), Ordering::Relaxed);
    }

    pub fn set_avail_event(&self, idx: u16) {
        self.half(4 + 8 * self.size as usize).store(idx.to_le(), Ordering::Relaxed);
    }

    /// What was written before is visible to the driver before we read what it writes next: the one order that neither
    /// [`set_idx`](Self::set_idx) nor [`Avail::idx`] gives.
    pub fn fence(&self) {
        fence(Ordering::SeqCst);
    }
}
