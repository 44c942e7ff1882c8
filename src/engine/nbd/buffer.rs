//! Memory on the way in, and ranges of a request's memory.

#![forbid(unsafe_code)]

use crate::block::Iovec;
use crate::ring::Mapping;
use std::cell::Cell;
use std::io;

/// Bytes received ahead. A reply's head mostly comes with other heads and with the start of its data; what of
/// the data is in here is copied, the rest goes where it belongs. Four replies to reads of 4 KiB fit: one
/// receive, and a copy that costs less than another one. A large read copies little of itself.
const AHEAD: usize = 17 << 10;

/// Bytes of zero, for holes.
const ZEROES: usize = 64 << 10;

/// A stream's bytes between the kernel and whoever they are for.
#[derive(Debug)]
pub struct Buffer {
    /// [`AHEAD`] bytes of the stream, then [`ZEROES`] that nobody ever writes.
    mapping: Mapping,
    start: Cell<usize>,
    end: Cell<usize>,
}

impl Buffer {
    /// An empty one.
    ///
    /// # Errors
    /// The kernel's, when there is no memory.
    pub fn new() -> io::Result<Buffer> {
        let mapping = Mapping::anonymous(AHEAD + ZEROES)?;
        Ok(Buffer { mapping, start: Cell::new(0), end: Cell::new(0) })
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.start.set(0);
        self.end.set(0);
    }

    /// Bytes that are here.
    pub fn len(&self) -> usize {
        self.end.get() - self.start.get()
    }

    /// Copies the first bytes out, leaving them here. Gives how many: fewer than asked for when there are no more.
    pub fn peek(&self, into: &mut [u8]) -> usize {
        let count = into.len().min(self.len());
        self.mapping.copy_out(self.start.get(), &mut into[..count]);
        count
    }

    /// Drops the first bytes, at most what is here.
    pub fn consume(&self, count: usize) {
        self.start.set(self.start.get() + count.min(self.len()));
    }

    /// Moves the first bytes to where they belong: no more than is here.
    pub fn take(&self, into: Iovec<'_>) {
        self.mapping.scatter(self.start.get(), &[into]);
        self.consume(into.len());
    }

    /// Writes zeroes.
    pub fn zero(&self, mut into: Iovec<'_>) {
        while !into.is_empty() {
            let rest = into.split_off(ZEROES);
            self.mapping.scatter(AHEAD, &[into]);
            into = rest;
        }
    }

    /// Where the next bytes of the stream go: somewhere, as long as less than half is in use.
    pub fn space(&self) -> Iovec<'_> {
        if self.start.get() > AHEAD / 2 || self.len() == 0 {
            let len = self.len();
            self.mapping.scatter(self.start.get(), &[self.mapping.iovec(0, len)]);
            self.start.set(0);
            self.end.set(len);
        }
        let end = self.end.get();
        self.mapping.iovec(end, AHEAD - end)
    }

    /// So many bytes have come into the [`space`](Self::space).
    pub fn filled(&self, count: usize) {
        self.end.set((self.end.get() + count).min(AHEAD));
    }
}

/// The ranges of `len` bytes of `iovecs`, `skip` bytes in; none of them empty.
pub fn window<'m>(iovecs: &[Iovec<'m>], skip: usize, len: usize) -> impl Iterator<Item = Iovec<'m>> {
    let (mut skip, mut left) = (skip, len);
    let parts = iovecs.iter().map_while(move |iovec| {
        let mut part = *iovec;
        part.advance(skip);
        skip -= iovec.len() - part.len();
        part.split_off(left);
        let more = left > 0;
        left -= part.len();
        more.then_some(part)
    });
    parts.filter(|part| !part.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_stream_passes_through_in_order() {
        let buffer = Buffer::new().unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(AHEAD as u64).unwrap();
        let source = Mapping::shared_read(file.as_fd(), 0, AHEAD).unwrap();
        let target = Mapping::anonymous(AHEAD).unwrap();
        let (mut next_in, mut next_out) = (0u8, 0u8);
        for round in 1..2000usize {
            let mut space = buffer.space();
            let count = space.len().min(round * 37 % 5000);
            space.split_off(count);
            let fresh: Vec<u8> = (0..count).map(|n| next_in.wrapping_add(n as u8)).collect();
            next_in = next_in.wrapping_add(count as u8);
            file.write_all_at(&fresh, 0).unwrap();
            source.scatter(0, &[space]);
            buffer.filled(count);
            let wanted = (round * 91 % 6000).min(buffer.len());
            let mut peeked = [0; 32];
            let head = buffer.peek(&mut peeked);
            assert_eq!(head, buffer.len().min(32));
            buffer.take(target.iovec(0, wanted));
            let mut got = vec![0; wanted];
            target.copy_out(0, &mut got);
            for (n, byte) in got.iter().enumerate() {
                assert_eq!(*byte, next_out.wrapping_add(n as u8));
            }
            assert!(head == 0 || peeked[0] == next_out);
            next_out = next_out.wrapping_add(wanted as u8);
        }
    }

    #[test]
    fn zeroes_are_zero() {
        let buffer = Buffer::new().unwrap();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 200_000], 0).unwrap();
        let sevens = Mapping::shared_read(file.as_fd(), 0, 200_000).unwrap();
        sevens.scatter(0, &[buffer.space()]);
        let target = Mapping::anonymous(200_000).unwrap();
        sevens.scatter(0, &[target.iovec(0, 200_000)]);
        buffer.zero(target.iovec(1, 199_998));
        let mut bytes = vec![1; 200_000];
        target.copy_out(0, &mut bytes);
        assert!(bytes[1..199_999].iter().all(|byte| *byte == 0));
        assert_eq!((bytes[0], bytes[199_999]), (7, 7));
    }

    #[test]
    fn a_window_is_what_was_asked_for() {
        let memory = Mapping::anonymous(30).unwrap();
        let base = memory.as_ptr();
        let iovecs = [memory.iovec(0, 10), memory.iovec(10, 0), memory.iovec(10, 15), memory.iovec(25, 5)];
        for skip in 0..=30 {
            for len in 0..=30 - skip {
                let mut next = base.wrapping_add(skip);
                for part in window(&iovecs, skip, len) {
                    assert!(!part.is_empty() && part.base() == next);
                    next = next.wrapping_add(part.len());
                }
                assert_eq!(next, base.wrapping_add(skip + len));
            }
        }
    }
}
