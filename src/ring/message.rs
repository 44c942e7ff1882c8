//! What `sendmsg(2)` and `recvmsg(2)` are given.

use crate::block::Iovec;
use std::cell::UnsafeCell;
use std::marker::PhantomData;

/// A list for the ranges of one message after the other, which allocates no more than the longest one needs.
#[derive(Debug, Default)]
pub struct MessageRanges(Vec<libc::iovec>);

// SAFETY: what the list holds between two messages is never followed.
unsafe impl Send for MessageRanges {}

impl MessageRanges {
    /// A message of these ranges, in the place of the one before. The kernel takes at most 1024 (`UIO_MAXIOV`).
    pub fn message<'a>(&'a mut self, ranges: impl Iterator<Item = Iovec<'a>>) -> Message<'a> {
        self.0.clear();
        self.0
            .extend(ranges.map(|range| libc::iovec { iov_base: range.base().cast(), iov_len: range.len() }));
        Message {
            header: UnsafeCell::new(libc::msghdr {
                msg_name: std::ptr::null_mut(),
                msg_namelen: 0,
                msg_iov: self.0.as_mut_ptr(),
                msg_iovlen: self.0.len(),
                msg_control: std::ptr::null_mut(),
                msg_controllen: 0,
                msg_flags: 0,
            }),
            ranges: PhantomData,
        }
    }
}

/// Ranges without an address and without control data: `struct msghdr` of `sys/socket.h`, whose flags the kernel sets.
#[derive(Debug)]
pub struct Message<'a> {
    header: UnsafeCell<libc::msghdr>,
    ranges: PhantomData<Iovec<'a>>,
}

impl Message<'_> {
    pub(super) fn as_ptr(&self) -> *mut libc::msghdr {
        self.header.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_its_own_ranges_alone() {
        let mut ranges = MessageRanges::default();
        for (count, len) in [(3, 5), (0, 0), (1, 7)] {
            let message = ranges.message((0..count).map(|at| Iovec::nowhere(at * 100, len)));
            // SAFETY: the kernel does not have it.
            let header = unsafe { *message.as_ptr() };
            // SAFETY: the list is borrowed by the message.
            let list = unsafe { std::slice::from_raw_parts(header.msg_iov, header.msg_iovlen) };
            let found: Vec<_> = list.iter().map(|one| (one.iov_base.addr(), one.iov_len)).collect();
            assert_eq!(found, (0..count).map(|at| (at * 100, len)).collect::<Vec<_>>());
        }
    }
}
