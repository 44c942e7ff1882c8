//! A range of host memory that somebody else may be writing to.

use std::marker::PhantomData;

/// A range of host memory that stays mapped for `'m`: `struct iovec` of `sys/uio.h`, which the kernel reads as it stands.
///
/// What it points at may be written by others (a guest, the kernel) at any time, so it is handed to the
/// kernel or copied, never borrowed.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Iovec<'m> {
    base: *mut u8,
    len: usize,
    mapped: PhantomData<&'m ()>,
}

const _: () = {
    assert!(size_of::<Iovec>() == size_of::<libc::iovec>());
    assert!(align_of::<Iovec>() == align_of::<libc::iovec>());
};

impl<'m> Iovec<'m> {
    /// No bytes.
    pub const EMPTY: Iovec<'static> = Iovec { base: std::ptr::null_mut(), len: 0, mapped: PhantomData };

    /// `len` bytes from `base` on. It is safe to copy what an `Iovec` names because making one is not.
    ///
    /// # Safety
    /// For all of `'m` the bytes stay mapped, for reading and for whatever writing is asked of the range, and no Rust
    /// reference to them is used. Whoever gives a `'m` longer than the compiler would (a guest's memory, a tag's buffer)
    /// promises the rest: until whatever request carries the range is complete.
    pub unsafe fn new(base: *mut u8, len: usize) -> Iovec<'m> {
        Iovec { base, len, mapped: PhantomData }
    }

    /// All of `bytes`, which are nobody else's meanwhile.
    pub fn of(bytes: &'m mut [u8]) -> Iovec<'m> {
        Iovec { base: bytes.as_mut_ptr(), len: bytes.len(), mapped: PhantomData }
    }

    /// One that nobody may follow.
    #[cfg(test)]
    pub(crate) fn nowhere(base: usize, len: usize) -> Iovec<'m> {
        Iovec { base: std::ptr::without_provenance_mut(base), len, mapped: PhantomData }
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
    pub fn split_off(&mut self, count: usize) -> Iovec<'m> {
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
