//! A range of host memory that somebody else may be writing to.

/// A host memory range: `struct iovec` of `sys/uio.h`, which the kernel reads as it stands.
///
/// What it points at may be written by others (a guest, the kernel) at any time, so it is handed to the
/// kernel or copied, never borrowed.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Iovec {
    base: *mut u8,
    len: usize,
}

const _: () = {
    assert!(size_of::<Iovec>() == size_of::<libc::iovec>());
    assert!(align_of::<Iovec>() == align_of::<libc::iovec>());
};

impl Iovec {
    /// No bytes.
    pub const EMPTY: Iovec = Iovec { base: std::ptr::null_mut(), len: 0 };

    /// `len` bytes from `base` on. It is safe to copy what an `Iovec` names because making one is not.
    ///
    /// # Safety
    /// The bytes stay mapped, for reading and for whatever writing the request asks for, until the request
    /// that carries the range is complete; and no Rust reference to them is used meanwhile.
    pub unsafe fn new(base: *mut u8, len: usize) -> Iovec {
        Iovec { base, len }
    }

    /// One that nobody may follow.
    #[cfg(test)]
    pub(crate) fn nowhere(base: usize, len: usize) -> Iovec {
        Iovec { base: std::ptr::without_provenance_mut(base), len }
    }

    /// First byte.
    pub fn base(&self) -> *mut u8 {
        self.base
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it names no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Drops the first `count` bytes (at most all).
    pub fn advance(&mut self, count: usize) {
        let count = count.min(self.len);
        self.base = self.base.wrapping_add(count);
        self.len -= count;
    }

    /// Keeps the first `count` bytes (at most all) and returns the rest.
    pub fn split_off(&mut self, count: usize) -> Iovec {
        let mut rest = *self;
        rest.advance(count);
        self.len -= rest.len;
        rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitting_loses_nothing() {
        let mut bytes = [0u8; 10];
        for count in 0..12 {
            // SAFETY: never followed.
            let mut front = unsafe { Iovec::new(bytes.as_mut_ptr(), 10) };
            let rest = front.split_off(count);
            assert_eq!((front.len(), rest.len()), (count.min(10), 10 - count.min(10)));
            assert_eq!(front.base().wrapping_add(front.len()), rest.base());
        }
    }
}
