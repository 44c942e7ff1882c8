//! The regions that are guarded, in a table that a signal handler can read at any moment: it never waits, and never
//! takes a part of one region for a part of another.
//!
//! A place is used again and again. So it has a version, which is odd while the place changes: a reader that finds an
//! odd one, or another afterwards than before, has seen nothing. Places are added and never taken away.

#![forbid(unsafe_code)]

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Places that are made at once: the regions of a dozen everyday VMMs.
const CHUNK: usize = 128;

/// A guarded region as the handler sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub start: usize,
    /// Bytes; 0 for none.
    pub len: usize,
    /// Bytes in a page of the file behind it.
    pub page: usize,
    /// The VMM's connection.
    pub socket: RawFd,
}

/// Where a region is entered.
#[derive(Default)]
pub struct RegionSlot {
    version: AtomicUsize,
    start: AtomicUsize,
    len: AtomicUsize,
    page: AtomicUsize,
    socket: AtomicI32,
    /// Some of it was taken away.
    lost: AtomicBool,
    /// How often it was replaced.
    repairs: AtomicUsize,
}

impl RegionSlot {
    /// Enters a region, or none. By one thread at a time.
    fn write(&self, region: Region) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version.wrapping_add(1), Ordering::Relaxed);
        // Nobody sees what follows without the odd version.
        fence(Ordering::Release);
        self.start.store(region.start, Ordering::Relaxed);
        self.len.store(region.len, Ordering::Relaxed);
        self.page.store(region.page, Ordering::Relaxed);
        self.socket.store(region.socket, Ordering::Relaxed);
        self.lost.store(false, Ordering::Relaxed);
        self.repairs.store(0, Ordering::Relaxed);
        self.version.store(version.wrapping_add(2), Ordering::Release);
    }

    /// The region, if it was one and the same all the time that it was read.
    fn read(&self) -> Option<Region> {
        let version = self.version.load(Ordering::Acquire);
        if !version.is_multiple_of(2) {
            return None;
        }
        let region = Region {
            start: self.start.load(Ordering::Relaxed),
            len: self.len.load(Ordering::Relaxed),
            page: self.page.load(Ordering::Relaxed),
            socket: self.socket.load(Ordering::Relaxed),
        };
        // What was read is not newer than the version that is read now.
        fence(Ordering::Acquire);
        (self.version.load(Ordering::Relaxed) == version).then_some(region)
    }

    /// Whether some of it was taken away.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Some of it was taken away. How often that was said before.
    pub fn lose(&self) -> usize {
        self.lost.store(true, Ordering::Release);
        self.repairs.fetch_add(1, Ordering::Relaxed)
    }
}

struct Chunk {
    places: [RegionSlot; CHUNK],
    next: OnceLock<Box<Chunk>>,
}

/// The table. Regions in it do not overlap.
pub struct RegionTable {
    first: OnceLock<Box<Chunk>>,
    free: Mutex<Vec<&'static RegionSlot>>,
}

impl RegionTable {
    pub const fn new() -> RegionTable {
        RegionTable { first: OnceLock::new(), free: Mutex::new(Vec::new()) }
    }

    /// Enters a region.
    pub fn add(&'static self, region: Region) -> &'static RegionSlot {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let place = free.pop().unwrap_or_else(|| {
            let mut next = &self.first;
            while let Some(chunk) = next.get() {
                next = &chunk.next;
            }
            // The lock is ours, so that nobody else has set it meanwhile.
            let chunk = next.get_or_init(|| {
                Box::new(Chunk {
                    places: std::array::from_fn(|_| RegionSlot::default()),
                    next: OnceLock::new(),
                })
            });
            free.extend(&chunk.places[1..]);
            &chunk.places[0]
        });
        place.write(region);
        place
    }

    /// Takes the region of `place` out. The handler knows it no longer.
    pub fn remove(&'static self, place: &'static RegionSlot) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        place.write(Region { start: 0, len: 0, page: 0, socket: -1 });
        free.push(place);
    }

    /// The region that address `at` is in. For signal handlers: it takes no lock and no memory.
    pub fn find(&'static self, at: usize) -> Option<(&'static RegionSlot, Region)> {
        let mut next = &self.first;
        while let Some(chunk) = next.get() {
            let found = chunk.places.iter().find_map(|place| {
                let region = place.read()?;
                (at.wrapping_sub(region.start) < region.len).then_some((place, region))
            });
            if found.is_some() {
                return found;
            }
            next = &chunk.next;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;
    use std::time::{Duration, Instant};

    fn table() -> &'static RegionTable {
        Box::leak(Box::new(RegionTable::new()))
    }

    fn region(start: usize, len: usize) -> Region {
        Region { start, len, page: 4096, socket: start as RawFd }
    }

    #[test]
    fn a_region_is_found_from_its_first_byte_to_its_last() {
        let table = table();
        assert!(table.find(0).is_none());
        let places: Vec<_> = (1..1000).map(|at| table.add(region(at << 20, 4096))).collect();
        for at in 1..1000 {
            let found = |address| table.find(address).map(|(_, region)| region.start >> 20);
            assert_eq!(found(at << 20), Some(at));
            assert_eq!(found((at << 20) + 4095), Some(at));
            assert_eq!(found((at << 20) - 1), None);
            assert_eq!(found((at << 20) + 4096), None);
        }
        for place in places {
            assert_eq!(place.lose(), 0);
            table.remove(place);
        }
        assert!((1..1000).all(|at| table.find(at << 20).is_none()));
        assert!(!table.add(region(1 << 20, 1)).is_lost(), "a place keeps nothing of the region before");
    }

    #[test]
    fn places_are_used_again() {
        let table = table();
        let first = table.add(region(1 << 20, 4096));
        for _ in 0..4 * CHUNK {
            table.remove(table.add(region(2 << 20, 4096)));
        }
        table.remove(first);
        let chunks = std::iter::successors(table.first.get(), |chunk| chunk.next.get()).count();
        assert_eq!(chunks, 1);
    }

    /// One thread enters small regions and large ones in turn, two look addresses up as the handler does: one that is
    /// always covered, and one that only the start of a small region together with the length of a large one covers.
    #[test]
    fn no_region_is_made_of_two() {
        const SMALL: usize = 1 << 30;
        const LARGE: usize = 1 << 40;
        const LONG: usize = 1 << 35;
        let table = table();
        let stays = table.add(region(1 << 50, 4096));
        let over = AtomicBool::new(false);
        let looks = AtomicU64::new(0);
        let start = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        looks.fetch_add(1, Ordering::Relaxed);
                        let found = table.find((1 << 50) + 17).map(|(place, region)| (place.read(), region));
                        assert_eq!(found, Some((Some(region(1 << 50, 4096)), region(1 << 50, 4096))));
                        let torn = table.find(SMALL + 4096).map(|(_, region)| region);
                        if torn.is_some() {
                            over.store(true, Ordering::Relaxed);
                        }
                        assert_eq!(torn, None);
                        if let Some((_, found)) = table.find(LARGE) {
                            assert_eq!(found, region(LARGE, LONG));
                        }
                    }
                });
            }
            while !over.load(Ordering::Relaxed) && start.elapsed() < Duration::from_secs(2) {
                for _ in 0..1000 {
                    table.remove(table.add(region(SMALL, 4096)));
                    table.remove(table.add(region(LARGE, LONG)));
                }
            }
            over.store(true, Ordering::Relaxed);
        });
        assert!(looks.into_inner() > 0);
        table.remove(stays);
    }
}
