//! Leaky buckets, as QEMU's `util/throttle.c` has them, on atomics: any number of workers, no lock.
//!
//! A bucket's level leaks at a rate. Whoever finds it below its size may pass, whatever its own size, and adds what it costs;
//! so the level may stand above the size, and then everybody waits until it does not. Nothing that was added is taken away.
//!
//! The level is kept as the time at which it will be empty (GCRA's "theoretical arrival time"), so that it leaks by itself.
//! Time is counted in [ticks](TICKS) of a fraction of a nanosecond: what rounding costs is below a hundredth of a percent for
//! 512 bytes at 100 GB/s, and nobody is ever charged too little.
//!
//! Several workers that look at the same moment may all find room, and each adds its own: the level then stands above the size
//! by a request for each, and the rate is what was asked for all the same.

#![forbid(unsafe_code)]

use super::config::Rate;
use std::sync::atomic::{AtomicU64, Ordering};

/// Ticks in a nanosecond. 64 bits of them are nine years.
pub const TICKS: u64 = 64;

/// Ticks in a second.
const SECOND: f64 = 1e9 * TICKS as f64;

/// What is allowed at once where no bursts are: a tenth of a second's units, as in QEMU. Without it a client would wait for
/// every other request.
const LEAST_ROOM: f64 = 0.1 * SECOND;

/// Room beyond this (two years) is as good as no end, and cannot overflow.
const MOST_ROOM: f64 = (u64::MAX / 4) as f64;

/// One level with its rate.
#[derive(Debug, Default)]
struct Meter {
    /// When the level will be zero, in ticks.
    empty_at: AtomicU64,
    /// Ticks that a unit takes to leak, as the bits of an `f64`; 0: nothing is metered.
    ticks_per_unit: AtomicU64,
    /// The size, in ticks.
    room: AtomicU64,
}

impl Meter {
    /// From now on so many units a second, and so many ticks' worth at once.
    fn set(&self, rate: u64, room: f64) {
        let ticks = if rate == 0 { 0.0 } else { SECOND / rate as f64 };
        let room = room.min(MOST_ROOM) as u64;
        let before = self.ticks_per_unit.swap(ticks.to_bits(), Ordering::Relaxed);
        // What did not change goes on from its level; what did begins anew, as in QEMU.
        if self.room.swap(room, Ordering::Relaxed) != room || before != ticks.to_bits() {
            self.empty_at.store(0, Ordering::Relaxed);
        }
    }

    /// The tick at which the next may pass; 0 where nothing is metered.
    fn opens_at(&self) -> u64 {
        if self.ticks_per_unit.load(Ordering::Relaxed) == 0 {
            return 0;
        }
        self.empty_at.load(Ordering::Relaxed).saturating_sub(self.room.load(Ordering::Relaxed))
    }

    /// Adds `units` at tick `now`. What they take to leak, in ticks.
    fn add(&self, now: u64, units: f64) -> u64 {
        let ticks = f64::from_bits(self.ticks_per_unit.load(Ordering::Relaxed));
        if ticks == 0.0 {
            return 0;
        }
        // Saturates: a request of many gigabytes at a byte a second.
        let cost = (units * ticks).ceil() as u64;
        let fill = |empty_at: u64| Some(empty_at.max(now).saturating_add(cost));
        // It never fails: `fill` always has a value.
        let _ = self.empty_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fill);
        cost
    }
}

/// What one [`Rate`] takes: its long run, and a burst's.
#[derive(Debug, Default)]
pub struct Bucket {
    sustained: Meter,
    burst: Meter,
}

impl Bucket {
    /// Limits to `rate` from now on.
    pub fn set(&self, rate: Rate) {
        let Rate { avg, max, length } = rate;
        let length = length.max(1);
        let room = match max {
            0 => LEAST_ROOM,
            _ => max as f64 * length as f64 / avg as f64 * SECOND,
        };
        self.sustained.set(avg, room);
        // A burst of a second may come all at once.
        self.burst.set(if length > 1 { max } else { 0 }, LEAST_ROOM);
    }

    /// The tick at which the next may pass; in the past where it may now.
    pub fn opens_at(&self) -> u64 {
        self.sustained.opens_at().max(self.burst.opens_at())
    }

    /// Adds `units` at tick `now`, of one that passes. What they take to leak in the long run, in ticks.
    pub fn add(&self, now: u64, units: f64) -> u64 {
        self.burst.add(now, units);
        self.sustained.add(now, units)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000 * TICKS;

    fn bucket(avg: u64, max: u64, length: u64) -> Bucket {
        let bucket = Bucket::default();
        bucket.set(Rate { avg, max, length });
        bucket
    }

    /// Units that pass within `seconds`, each as soon as it may.
    fn passes(bucket: &Bucket, from: u64, seconds: u64, unit: f64) -> f64 {
        let (mut now, mut count) = (from, 0.0);
        loop {
            now = now.max(bucket.opens_at());
            if now >= from + seconds * S {
                return count;
            }
            bucket.add(now, unit);
            count += unit;
        }
    }

    #[test]
    fn a_rate_and_a_tenth_of_a_second_at_once() {
        let bucket = bucket(1000, 0, 0);
        let at_once = (0..).take_while(|_| bucket.opens_at() <= S && bucket.add(S, 1.0) > 0).count();
        assert_eq!(at_once, 101, "what is not above its size is let through");
        assert!((passes(&bucket, S, 10, 1.0) - 10_000.0).abs() <= 1.0);
    }

    #[test]
    fn a_burst_of_a_second_comes_at_once_and_a_longer_one_at_its_rate() {
        let short = bucket(100, 1000, 1);
        let at_once = (0..).take_while(|_| short.opens_at() <= S && short.add(S, 1.0) > 0).count();
        assert_eq!(at_once, 1001);
        let long = bucket(100, 1000, 5);
        // 100 at once, then 1000 a second while the 5000 that it has room for fill, which leak at 100 a second.
        let first = passes(&long, S, 1, 1.0);
        assert!((first - 1100.0).abs() <= 2.0, "{first}");
        let burst = first + passes(&long, 2 * S, 9, 1.0);
        assert!((burst - 6000.0).abs() <= 2.0, "{burst}: 5000 and what leaked in 10 s");
        let after = passes(&long, 11 * S, 10, 1.0);
        assert!((after - 1000.0).abs() <= 2.0, "{after}");
    }

    #[test]
    fn what_is_larger_than_all_that_fits_passes_and_is_waited_for() {
        let bucket = bucket(1000, 0, 0);
        assert!(bucket.opens_at() <= S);
        bucket.add(S, 1_000_000.0);
        assert_eq!(bucket.opens_at(), S + 1000 * S - S / 10);
    }

    #[test]
    fn nothing_overflows() {
        const MOST: u64 = 1_000_000_000_000_000;
        for (avg, max, length) in [(1, 0, 0), (1, 1000, MOST / 1000), (MOST, MOST, 1), (1, MOST, 1)] {
            let bucket = bucket(avg, max, length);
            for _ in 0..10 {
                bucket.add(u64::MAX / 2, u64::MAX as f64);
                bucket.opens_at();
            }
        }
    }

    #[test]
    fn another_rate_begins_anew_and_the_same_goes_on() {
        let bucket = bucket(10, 0, 0);
        bucket.add(S, 100.0);
        bucket.set(Rate { avg: 10, max: 0, length: 0 });
        assert!(bucket.opens_at() > 10 * S);
        bucket.set(Rate { avg: 20, max: 0, length: 0 });
        assert_eq!(bucket.opens_at(), 0);
        bucket.set(Rate::default());
        assert_eq!((bucket.add(S, 1.0), bucket.opens_at()), (0, 0));
    }

    #[test]
    fn threads_together_do_not_pass_more() {
        let bucket = bucket(1_000_000, 0, 0);
        let now = AtomicU64::new(S);
        let passed: u64 = std::thread::scope(|scope| {
            let work = || {
                let mut passed = 0;
                loop {
                    let at = now.fetch_add(S / 100_000, Ordering::Relaxed);
                    if at >= 2 * S {
                        return passed;
                    }
                    while bucket.opens_at() <= at {
                        bucket.add(at, 1.0);
                        passed += 1;
                    }
                }
            };
            (0..4)
                .map(|_| scope.spawn(work))
                .collect::<Vec<_>>()
                .into_iter()
                .map(|of| of.join().unwrap())
                .sum()
        });
        // A second's, the tenth that it has room for, and one for each thread.
        assert!((1_000_000..=1_100_100).contains(&passed), "{passed}");
    }
}
