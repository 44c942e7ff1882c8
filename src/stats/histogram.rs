//! Times, counted by how long they are: exact to a quarter, from a microsecond to a minute.

#![forbid(unsafe_code)]

use super::Count;
use serde::{Deserialize, Serialize};

/// Buckets of one octave; a power of two.
const PARTS: u32 = 4;
const PART_BITS: u32 = PARTS.trailing_zeros();

/// What is shorter than 2 to this power, in nanoseconds, is not told apart.
const LEAST_BITS: u32 = 10;

/// What is as long as 2 to this power, in nanoseconds, is not told apart either: 69 s.
const MOST_BITS: u32 = 36;

/// One below the least, those between, one for all that is longer.
const BUCKETS: usize = ((MOST_BITS - LEAST_BITS) * PARTS) as usize + 2;

/// Written by one thread, read by any: see [`Count`].
#[derive(Debug)]
pub struct Histogram {
    buckets: [Count; BUCKETS],
    nanoseconds: Count,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { buckets: std::array::from_fn(|_| Count::default()), nanoseconds: Count::default() }
    }
}

/// The bucket that a time belongs to.
#[inline]
fn bucket(nanoseconds: u64) -> usize {
    if nanoseconds < 1 << LEAST_BITS {
        return 0;
    }
    let octave = nanoseconds.ilog2();
    if octave >= MOST_BITS {
        return BUCKETS - 1;
    }
    // The bits after the first one say which part of the octave it is.
    let part = (nanoseconds >> (octave - PART_BITS)) as u32 & (PARTS - 1);
    ((octave - LEAST_BITS) * PARTS + part) as usize + 1
}

/// The first time that is too long for a bucket, in nanoseconds; `None` for the last.
fn end(bucket: usize) -> Option<u64> {
    if bucket == BUCKETS - 1 {
        return None;
    }
    let (octave, part) = (bucket as u32 / PARTS + LEAST_BITS, bucket as u64 % u64::from(PARTS));
    Some((u64::from(PARTS) + part) << (octave - PART_BITS))
}

impl Histogram {
    /// Counts a time. By one thread at a time.
    #[inline]
    pub fn record(&self, nanoseconds: u64) {
        self.buckets[bucket(nanoseconds)].add(1);
        self.nanoseconds.add(nanoseconds);
    }

    /// Adds what was counted so far to `times`.
    pub fn add_to(&self, times: &mut Times) {
        times.nanoseconds += self.nanoseconds.get();
        times.buckets.resize(BUCKETS, 0);
        times.buckets.iter_mut().zip(&self.buckets).for_each(|(sum, bucket)| *sum += bucket.get());
    }
}

/// Times that were counted, of one or several [histograms](Histogram).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Sparse", try_from = "Sparse")]
pub struct Times {
    buckets: Vec<u64>,
    nanoseconds: u64,
}

impl Times {
    /// How many.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// All of them together, in nanoseconds.
    pub fn nanoseconds(&self) -> u64 {
        self.nanoseconds
    }

    /// And others.
    pub fn add(&mut self, others: &Times) {
        self.nanoseconds += others.nanoseconds;
        self.buckets.resize(BUCKETS, 0);
        self.buckets.iter_mut().zip(&others.buckets).for_each(|(sum, other)| *sum += other);
    }

    /// Those that came after `before` was taken of the same.
    pub fn since(&self, before: &Times) -> Times {
        let old = before.buckets.iter().copied().chain(std::iter::repeat(0));
        let buckets = self.buckets.iter().zip(old).map(|(now, old)| now.saturating_sub(old)).collect();
        Times { buckets, nanoseconds: self.nanoseconds.saturating_sub(before.nanoseconds) }
    }

    /// A time that the `share` of them (0 to 1) do not exceed, at most a quarter too long, in nanoseconds; `None` where there
    /// are none, or where it is longer than is told apart.
    pub fn quantile(&self, share: f64) -> Option<u64> {
        let count = self.count();
        let rank = ((count as f64 * share).ceil() as u64).clamp(1, count.max(1));
        let mut seen = 0;
        let found = self.buckets.iter().position(|in_bucket| {
            seen += in_bucket;
            seen >= rank
        });
        found.filter(|_| count > 0).and_then(end)
    }

    /// How many are shorter than each power of two of nanoseconds that is told apart, and the power: what a Prometheus
    /// histogram shows.
    pub fn octaves(&self) -> impl Iterator<Item = (u64, u64)> {
        let mut seen = 0;
        let ends = (0..BUCKETS).map(|bucket| {
            seen += self.buckets.get(bucket).copied().unwrap_or(0);
            (end(bucket), seen)
        });
        let ends: Vec<_> = ends.collect();
        ends.into_iter()
            .filter_map(|(end, count)| Some((end?, count)))
            .filter(|(end, _)| end.is_power_of_two())
    }
}

/// As others are told: the buckets that are not empty, each by the first time that is too long for it.
#[derive(Serialize, Deserialize)]
struct Sparse {
    nanoseconds: u64,
    buckets: Vec<(Option<u64>, u64)>,
}

impl From<Times> for Sparse {
    fn from(times: Times) -> Sparse {
        let buckets = times.buckets.iter().enumerate().filter(|(_, count)| **count > 0);
        let buckets = buckets.map(|(at, count)| (end(at), *count)).collect();
        Sparse { nanoseconds: times.nanoseconds, buckets }
    }
}

impl TryFrom<Sparse> for Times {
    type Error = String;

    fn try_from(sparse: Sparse) -> Result<Times, String> {
        let mut times = Times { buckets: vec![0; BUCKETS], nanoseconds: sparse.nanoseconds };
        for (told, count) in sparse.buckets {
            let at = told.map_or(BUCKETS - 1, |end| bucket(end.saturating_sub(1)));
            if end(at) != told {
                return Err(format!("no bucket ends at {told:?}"));
            }
            times.buckets[at] = count;
        }
        Ok(times)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_bucket_begins_where_the_one_before_it_ends() {
        assert_eq!((bucket(0), bucket(1023), bucket(1024)), (0, 0, 1));
        for at in 0..BUCKETS - 1 {
            let end = end(at).unwrap();
            assert_eq!((bucket(end - 1), bucket(end)), (at, at + 1));
        }
        assert_eq!((end(BUCKETS - 1), bucket(u64::MAX)), (None, BUCKETS - 1));
    }

    #[test]
    fn nothing_has_no_quantile() {
        assert_eq!(Times::default().quantile(0.5), None);
        let histogram = Histogram::default();
        histogram.record(u64::MAX / 2);
        let mut times = Times::default();
        histogram.add_to(&mut times);
        assert_eq!((times.count(), times.quantile(0.5)), (1, None), "longer than is told apart");
    }

    proptest! {
        #[test]
        fn quantiles_are_a_quarter_too_long_at_most(
            mut times in prop::collection::vec(1u64..1 << 36, 1..200),
            share in 0.0..=1.0f64,
        ) {
            let (one, other) = (Histogram::default(), Histogram::default());
            for (at, time) in times.iter().enumerate() {
                if at % 2 == 0 { one.record(*time) } else { other.record(*time) }
            }
            let (mut all, mut second) = (Times::default(), Times::default());
            one.add_to(&mut all);
            other.add_to(&mut second);
            all.add(&second);
            prop_assert_eq!(all.count(), times.len() as u64);
            prop_assert_eq!(all.nanoseconds(), times.iter().sum::<u64>());
            times.sort_unstable();
            let rank = ((times.len() as f64 * share).ceil() as usize).clamp(1, times.len());
            let (real, told) = (times[rank - 1], all.quantile(share).unwrap());
            prop_assert!(told > real && told <= (real + real / 4 + 1).max(1024), "{} {}", real, told);
            for (end, count) in all.octaves() {
                prop_assert_eq!(count, times.iter().filter(|time| **time < end).count() as u64);
            }
            prop_assert_eq!(all.since(&second).count(), times.len() as u64 - second.count());
            let told = serde_json::to_string(&all).unwrap();
            prop_assert_eq!(serde_json::from_str::<Times>(&told).unwrap(), all);
        }
    }
}
