//! A histogram of latencies.

/// Latencies in nanoseconds, to about 3 %: 32 buckets for each power of two.
pub struct Histogram {
    buckets: Vec<u64>,
    pub max: u64,
}

impl Histogram {
    const STEPS: u32 = 5;

    pub fn new() -> Histogram {
        Histogram { buckets: vec![0; 64 << Self::STEPS], max: 0 }
    }

    pub fn add(&mut self, nanos: u64) {
        let shift = (64 - Self::STEPS - 1).saturating_sub(nanos.leading_zeros());
        let index = ((u64::from(shift)) << Self::STEPS) + (nanos >> shift);
        self.buckets[index as usize] += 1;
        self.max = self.max.max(nanos);
    }

    /// The value that this part of all is not above, in microseconds.
    pub fn quantile(&self, part: f64) -> f64 {
        let all: u64 = self.buckets.iter().sum();
        let mut left = (all as f64 * part).ceil() as u64;
        for (index, count) in self.buckets.iter().enumerate() {
            if *count >= left {
                let shift = (index >> Self::STEPS).saturating_sub(1);
                let base = (index - (shift << Self::STEPS)) as u64;
                // The bucket's middle.
                return ((base << shift) + (1 << shift) / 2) as f64 / 1e3;
            }
            left -= count;
        }
        self.max as f64 / 1e3
    }
}
