//! Slices of L2 tables in memory: looked at without a lock, changed under one.
//!
//! A slice is 4 KiB of a table (or all of a smaller one), known by its place in the image. The cache is set-associative, with
//! eight slices to a set, and bounded: [`BYTES_PER_SLICE`] for each. Who looks reads a sequence number before and after
//! (a seqlock), so that it never sees half of a change, nor the entries of another slice; a look costs a hash and some loads,
//! and writes nothing but, seldom, the mark that the slice is of use.
//!
//! Which slices may be dropped, which have changes that are not in the image, and which are being written there, is said by
//! their [`State`], which changes under the image's lock alone.

#![forbid(unsafe_code)]

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering, fence};

/// Slices in a set.
const WAYS: usize = 8;

/// The most bytes of a slice.
pub const SLICE: u64 = 4096;

/// What each takes, all in all.
pub const BYTES_PER_SLICE: u64 = SLICE + 64;

/// Looks at a slice that somebody changes all the while.
const ATTEMPTS: u32 = 16;

/// What is known of a slice's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// There is none in this place.
    Empty = 0,
    /// Somebody reads it.
    Loading = 1,
    /// As in the image.
    Clean = 2,
    /// Changed.
    Dirty = 3,
    /// Being written to the image.
    Writing = 4,
    /// That, and changed meanwhile.
    WritingDirty = 5,
}

impl State {
    fn of(raw: u8) -> State {
        match raw {
            1 => State::Loading,
            2 => State::Clean,
            3 => State::Dirty,
            4 => State::Writing,
            5 => State::WritingDirty,
            _ => State::Empty,
        }
    }
}

/// The slices of one image.
pub struct Cache {
    sets: Box<[OnceLock<Box<[Way; WAYS]>>]>,
    /// Words of 8 bytes in a slice.
    words: usize,
}

/// The place of one slice.
#[derive(Default)]
struct Way {
    /// Odd while it changes.
    sequence: AtomicU64,
    /// Where the slice is in the image; 0: nothing to be seen.
    tag: AtomicU64,
    state: AtomicU8,
    /// Looked at since the last search for one to drop.
    used: AtomicBool,
    words: OnceLock<Box<[AtomicU64]>>,
}

/// Which place of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spot {
    set: usize,
    way: usize,
}

impl Cache {
    /// For slices of so many bytes each, at most [`SLICE`]; as many as `bytes` of memory take, and a set at least. No memory
    /// for a slice before it is there.
    pub fn new(slice: u64, bytes: u64) -> Cache {
        let slices = (bytes / BYTES_PER_SLICE).max(1) as usize;
        let sets = slices.div_ceil(WAYS).next_power_of_two();
        Cache { sets: (0..sets).map(|_| OnceLock::new()).collect(), words: (slice / 8) as usize }
    }

    /// Bytes in a slice.
    pub fn slice(&self) -> u64 {
        self.words as u64 * 8
    }

    /// `N` words of the slice at `tag`, from `at` on. `None`: it has to be [loaded](Self::reserve) first.
    pub fn read<const N: usize>(&self, tag: u64, at: usize) -> Option<[u64; N]> {
        let set = self.sets[self.set_of(tag)].get()?;
        for way in set.iter() {
            for _ in 0..ATTEMPTS {
                let sequence = way.sequence.load(Ordering::Acquire);
                if way.tag.load(Ordering::Relaxed) != tag {
                    break;
                }
                let Some(words) = way.words.get() else { break };
                let mut found = [0; N];
                for (into, word) in found.iter_mut().zip(&words[at..at + N]) {
                    *into = word.load(Ordering::Relaxed);
                }
                fence(Ordering::Acquire);
                if sequence & 1 == 0 && way.sequence.load(Ordering::Relaxed) == sequence {
                    if !way.used.load(Ordering::Relaxed) {
                        way.used.store(true, Ordering::Relaxed);
                    }
                    return Some(found);
                }
                std::hint::spin_loop();
            }
        }
        None
    }

    fn set_of(&self, tag: u64) -> usize {
        let mixed = (tag / self.slice()).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 32) as usize & (self.sets.len() - 1)
    }

    fn way(&self, spot: Spot) -> Option<&Way> {
        self.sets[spot.set].get().map(|set| &set[spot.way])
    }

    // All that follows is called under the image's lock.

    /// Where the slice is, if it is there or somebody loads it.
    pub fn find(&self, tag: u64) -> Option<(Spot, State)> {
        let set = self.set_of(tag);
        let ways = self.sets[set].get()?;
        let way = ways.iter().position(|way| way.tag.load(Ordering::Relaxed) == tag)?;
        Some((Spot { set, way }, State::of(ways[way].state.load(Ordering::Relaxed))))
    }

    /// A place for the slice, which is not there. Another that is clean may go for it. `None`: all of the set have changes
    /// that are not in the image, or are being read or written.
    pub fn reserve(&self, tag: u64) -> Option<Spot> {
        let set = self.set_of(tag);
        let ways = self.sets[set].get_or_init(Box::default);
        let is = |way: &Way, state| State::of(way.state.load(Ordering::Relaxed)) == state;
        let empty = ways.iter().position(|way| is(way, State::Empty));
        // The first round spares those that were of use since the last one, the second none: who looks meanwhile may mark all.
        let idle =
            || ways.iter().position(|way| is(way, State::Clean) && !way.used.swap(false, Ordering::Relaxed));
        let clean = || ways.iter().position(|way| is(way, State::Clean));
        let way = empty.or_else(idle).or_else(clean)?;
        // Odd until it is loaded: nobody is to read what was there before as if it were this one's.
        ways[way].sequence.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::Release);
        ways[way].tag.store(tag, Ordering::Relaxed);
        ways[way].state.store(State::Loading as u8, Ordering::Relaxed);
        Some(Spot { set, way })
    }

    /// The slice's words have come: from now on they can be looked at. `None`: they have not, and the place is free.
    pub fn loaded(&self, spot: Spot, bytes: Option<&[u8]>) {
        let Some(way) = self.way(spot) else { return };
        let words = way.words.get_or_init(|| (0..self.words).map(|_| AtomicU64::new(0)).collect());
        match bytes {
            Some(bytes) => {
                for (word, bytes) in words.iter().zip(bytes.chunks_exact(8)) {
                    let bytes = bytes.try_into().unwrap_or_default();
                    word.store(u64::from_be_bytes(bytes), Ordering::Relaxed);
                }
                way.state.store(State::Clean as u8, Ordering::Relaxed);
            }
            None => {
                way.tag.store(0, Ordering::Relaxed);
                way.state.store(State::Empty as u8, Ordering::Relaxed);
            }
        }
        way.used.store(true, Ordering::Relaxed);
        // It was odd since it was reserved.
        way.sequence.fetch_add(1, Ordering::Release);
    }

    /// Changes words of a slice that is there. True where it had no changes before.
    pub fn write<const N: usize>(&self, spot: Spot, at: usize, new: [u64; N]) -> bool {
        let Some(way) = self.way(spot) else { return false };
        self.change(way, |words| {
            for (word, new) in words[at..at + N].iter().zip(new) {
                word.store(new, Ordering::Relaxed);
            }
        });
        let before = State::of(way.state.load(Ordering::Relaxed));
        let (after, first) = match before {
            State::Writing => (State::WritingDirty, true),
            State::Clean => (State::Dirty, true),
            other => (other, false),
        };
        way.state.store(after as u8, Ordering::Relaxed);
        first
    }

    fn change(&self, way: &Way, change: impl FnOnce(&[AtomicU64])) {
        let words = way.words.get_or_init(|| (0..self.words).map(|_| AtomicU64::new(0)).collect());
        way.sequence.fetch_add(1, Ordering::Relaxed);
        // Who reads a word of the change sees the odd number, too.
        fence(Ordering::Release);
        change(words);
        way.sequence.fetch_add(1, Ordering::Release);
    }

    /// The bytes that are to be written to the image now, and where; its changes count as written from now on.
    pub fn begin_write(&self, spot: Spot, into: &mut Vec<u8>) -> Option<u64> {
        let way = self.way(spot)?;
        let words = way.words.get()?;
        into.extend(words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_be_bytes()));
        way.state.store(State::Writing as u8, Ordering::Relaxed);
        Some(way.tag.load(Ordering::Relaxed))
    }

    /// The bytes are in the image, or are not. True where there are (other) changes that have to be written.
    pub fn end_write(&self, spot: Spot, written: bool) -> bool {
        let Some(way) = self.way(spot) else { return false };
        let dirty = !written || State::of(way.state.load(Ordering::Relaxed)) == State::WritingDirty;
        let state = if dirty { State::Dirty } else { State::Clean };
        way.state.store(state as u8, Ordering::Relaxed);
        dirty
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    fn bytes(words: impl Iterator<Item = u64>) -> Vec<u8> {
        words.flat_map(u64::to_be_bytes).collect()
    }

    fn load(cache: &Cache, tag: u64) -> Option<Spot> {
        let spot = cache.reserve(tag)?;
        assert_eq!(cache.read::<1>(tag, 0), None, "not yet");
        cache.loaded(spot, Some(&bytes((0..cache.words as u64).map(|at| tag + at))));
        Some(spot)
    }

    #[test]
    fn what_is_loaded_is_there_until_others_need_the_room() {
        let cache = Cache::new(4096, 0);
        for number in 1..=8 {
            load(&cache, number * 4096).unwrap();
        }
        assert_eq!(cache.read(8192, 511), Some([8192 + 511]));
        assert_eq!(cache.read(8192, 2), Some([8194, 8195]));
        assert_eq!(cache.read::<1>(9 * 4096, 0), None);
        load(&cache, 9 * 4096).unwrap();
        let there = (1..=9).filter(|number| cache.find(number * 4096).is_some());
        assert_eq!(there.count(), 8);
    }

    #[test]
    fn changes_are_not_dropped_before_they_are_written() {
        let cache = Cache::new(4096, 0);
        for number in 1..=8 {
            let spot = load(&cache, number * 4096).unwrap();
            assert!(cache.write(spot, 3, [number]));
            assert!(!cache.write(spot, 4, [number]), "it has changes already");
        }
        assert_eq!(cache.reserve(9 * 4096), None);
        let (spot, state) = cache.find(4096).unwrap();
        assert_eq!(state, State::Dirty);
        let mut out = Vec::new();
        assert_eq!(cache.begin_write(spot, &mut out), Some(4096));
        assert_eq!((out.len(), out[31], out[39]), (4096, 1, 1));
        assert_eq!(cache.reserve(9 * 4096), None, "not while it is being written");
        assert!(cache.write(spot, 3, [77]), "a change of the meantime counts");
        assert!(cache.end_write(spot, true));
        cache.begin_write(spot, &mut out);
        assert!(cache.end_write(spot, false), "it was not written");
        cache.begin_write(spot, &mut out);
        assert!(!cache.end_write(spot, true));
        load(&cache, 9 * 4096).unwrap();
        assert_eq!(cache.find(4096), None);
    }

    #[test]
    fn one_that_could_not_be_loaded_is_not_there() {
        let cache = Cache::new(512, 0);
        let spot = cache.reserve(512).unwrap();
        assert_eq!(cache.find(512).unwrap().1, State::Loading);
        cache.loaded(spot, None);
        assert_eq!((cache.find(512), cache.read::<1>(512, 0)), (None, None));
        load(&cache, 512).unwrap();
        assert_eq!(cache.read(512, 1), Some([513]));
    }

    /// Entries of two words that are always equal, changed and dropped all the while: nobody sees halves, nor another's.
    #[test]
    fn nobody_sees_half_of_a_change() {
        const TAGS: u64 = 20;
        let (cache, lock) = (Cache::new(512, 0), Mutex::new(()));
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut seen = 0;
                    while !over.load(Ordering::Relaxed) {
                        for tag in 1..=TAGS {
                            if let Some([a, b]) = cache.read(tag * 512, 6) {
                                assert_eq!(a, b);
                                assert_eq!(a % 32, tag, "another's");
                                seen += 1;
                            }
                        }
                    }
                    assert!(seen > 0);
                });
            }
            // A writer that fails ends the readers too.
            struct Ends<'a>(&'a AtomicBool);
            impl Drop for Ends<'_> {
                fn drop(&mut self) {
                    self.0.store(true, Ordering::Relaxed);
                }
            }
            let _ends = Ends(&over);
            for round in 0..20_000u64 {
                let tag = round % TAGS + 1;
                let _locked = lock.lock().unwrap();
                let spot = match cache.find(tag * 512) {
                    Some((spot, _)) => spot,
                    None => {
                        let spot = cache.reserve(tag * 512).unwrap();
                        cache.loaded(spot, Some(&bytes(std::iter::repeat_n(tag, 64))));
                        spot
                    }
                };
                let value = round * 32 + tag;
                cache.write(spot, 6, [value, value]);
                cache.begin_write(spot, &mut Vec::new());
                assert!(!cache.end_write(spot, true));
            }
        });
    }
}
