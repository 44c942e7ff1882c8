//! Where a request's bytes are: a value, which anybody may use again, or a part of it.

#![forbid(unsafe_code)]

use super::Iovec;

/// Where a request's bytes are.
#[derive(Clone, Copy, Debug)]
pub enum Data<'a> {
    /// The request carries none (flush, discard, write-zeroes).
    None,
    /// Ranges in guest or ublk memory.
    Iovecs(Window<'a>),
    /// A registered buffer of the worker's ring, which holds exactly the request's pages (ublk zero copy).
    Registered {
        /// Index in the ring's buffer table.
        index: u16,
        /// Bytes of it that come before ours.
        skip: u64,
    },
}

impl<'a> Data<'a> {
    /// All bytes of the ranges, in their order.
    pub fn of(iovecs: &'a [Iovec<'a>]) -> Data<'a> {
        Data::Iovecs(Window::new(iovecs))
    }

    /// What is left without the first `count` bytes. For ranges, costs a walk over those that go.
    pub fn after(self, count: u64) -> Data<'a> {
        match self {
            Data::None => Data::None,
            Data::Iovecs(window) => Data::Iovecs(window.after(count)),
            Data::Registered { index, skip } => Data::Registered { index, skip: skip + count },
        }
    }

    /// The `len` bytes from `at` on. How long a registered buffer is, its request says.
    pub fn part(self, at: u64, len: u64) -> Data<'a> {
        match self {
            Data::Iovecs(window) => Data::Iovecs(window.part(at, len)),
            other => other.after(at),
        }
    }
}

/// Some bytes of a list of ranges: without the first few of its first range, and the last few of its last one.
#[derive(Clone, Copy, Debug)]
pub struct Window<'a> {
    iovecs: &'a [Iovec<'a>],
    /// Bytes of the first range that are not ours.
    skip: usize,
    /// Bytes of the last range that are not ours.
    spare: usize,
}

/// What a window begins with.
#[derive(Clone, Copy, Debug)]
pub enum Front<'a> {
    /// A range, or a part of one.
    One(Iovec<'a>),
    /// Ranges as they are in memory: more than one, or none.
    Many(&'a [Iovec<'a>]),
}

impl<'a> Window<'a> {
    /// All of the ranges.
    pub fn new(iovecs: &'a [Iovec<'a>]) -> Window<'a> {
        Window { iovecs, skip: 0, spare: 0 }
    }

    /// Bytes. Costs a walk.
    pub fn len(&self) -> u64 {
        self.iter().map(|iovec| iovec.len() as u64).sum()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its ranges, the first and the last cut to what is ours; some may be empty.
    pub fn iter(&self) -> impl Iterator<Item = Iovec<'a>> + use<'a> {
        let Window { iovecs, skip, spare } = *self;
        iovecs.iter().enumerate().map(move |(index, iovec)| {
            let mut iovec = *iovec;
            if index + 1 == iovecs.len() {
                iovec.split_off(iovec.len().saturating_sub(spare));
            }
            if index == 0 {
                iovec.advance(skip);
            }
            iovec
        })
    }

    /// The ranges that it lies in, and how many bytes of the first one come before it.
    pub fn as_raw(&self) -> (&'a [Iovec<'a>], usize) {
        (self.iovecs, self.skip)
    }

    /// As much of its beginning as one operation of the kernel takes without a copy of the list: all of it, unless it
    /// begins or ends within a range.
    pub fn front(&self) -> Front<'a> {
        match self.iovecs {
            [one] => {
                let mut one = *one;
                one.split_off(one.len().saturating_sub(self.spare));
                one.advance(self.skip);
                Front::One(one)
            }
            [first, ..] if self.skip > 0 => {
                let mut first = *first;
                first.advance(self.skip);
                Front::One(first)
            }
            [before @ .., _] if self.spare > 0 => match before {
                [one] => Front::One(*one),
                many => Front::Many(many),
            },
            all => Front::Many(all),
        }
    }

    /// What is left without the first `count` bytes; empty ranges go with them.
    pub fn after(self, count: u64) -> Window<'a> {
        let Window { mut iovecs, mut skip, spare } = self;
        let mut count = count;
        while let [first, rest @ ..] = iovecs {
            let end = if rest.is_empty() { first.len().saturating_sub(spare) } else { first.len() };
            let here = end.saturating_sub(skip) as u64;
            if count < here {
                return Window { iovecs, skip: skip + count as usize, spare };
            }
            count -= here;
            (iovecs, skip) = (rest, 0);
        }
        Window::new(&[])
    }

    /// The first `count` bytes, at most all. Of one that begins with a byte.
    fn upto(self, count: u64) -> Window<'a> {
        let mut left = count;
        for (index, iovec) in self.iter().enumerate() {
            if iovec.len() as u64 >= left {
                let over = iovec.len() - left as usize;
                let last = index + 1 == self.iovecs.len();
                let spare = if last { self.spare + over } else { over };
                return Window { iovecs: &self.iovecs[..=index], skip: self.skip, spare };
            }
            left -= iovec.len() as u64;
        }
        self
    }

    /// The `len` bytes from `at` on, or those of them that there are.
    pub fn part(self, at: u64, len: u64) -> Window<'a> {
        self.after(at).upto(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Ranges over bytes that are never followed, each a gap after the one before it; and each byte's address.
    fn ranges(lengths: &[usize]) -> (Vec<Iovec<'static>>, Vec<usize>) {
        let (mut iovecs, mut bytes, mut at) = (Vec::new(), Vec::new(), 4096);
        for len in lengths {
            iovecs.push(Iovec::nowhere(at, *len));
            bytes.extend(at..at + len);
            at += len + 7;
        }
        (iovecs, bytes)
    }

    fn addresses<'m>(iovecs: impl IntoIterator<Item = Iovec<'m>>) -> Vec<usize> {
        let of = |iovec: Iovec| iovec.base().addr()..iovec.base().addr() + iovec.len();
        iovecs.into_iter().flat_map(of).collect()
    }

    proptest! {
        /// Whatever is cut from what: the bytes are those of the list, by whichever way they are asked for.
        #[test]
        fn a_part_has_the_bytes_that_it_says(
            lengths in prop::collection::vec(0..6usize, 0..8),
            cuts in prop::collection::vec((0..20u64, 0..40u64), 0..4),
        ) {
            let (iovecs, mut bytes) = ranges(&lengths);
            let mut window = Window::new(&iovecs);
            for (at, len) in cuts {
                window = window.part(at, len);
                let from = bytes.len().min(at as usize);
                bytes = bytes[from..bytes.len().min(from + len as usize)].to_vec();
                prop_assert_eq!(addresses(window.iter()), &bytes[..]);
                prop_assert_eq!(window.len(), bytes.len() as u64);
            }
            // As a transfer goes through it: front by front, and not always all of one.
            for share in [1, 2] {
                let (mut rest, mut left) = (window, &bytes[..]);
                while !left.is_empty() {
                    let front = match rest.front() {
                        Front::One(one) => addresses([one]),
                        Front::Many(many) => addresses(many.iter().copied()),
                    };
                    prop_assert!(left.starts_with(&front));
                    prop_assert!(!front.is_empty() || matches!(rest.front(), Front::One(_)), "a front without bytes");
                    let count = front.len().div_ceil(share);
                    rest = rest.after(count as u64);
                    left = &left[count..];
                }
                prop_assert!(rest.is_empty());
            }
        }
    }
}
