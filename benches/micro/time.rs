//! How long a case takes.

use super::cases::Case;
use std::time::{Duration, Instant};

/// Nanoseconds for one request.
pub struct Time {
    pub min: f64,
    pub median: f64,
}

const SAMPLES: usize = 101;
/// Long enough that reading the clock does not show, short enough that most samples meet no interrupt.
const SAMPLE: Duration = Duration::from_millis(5);

/// Runs it for half a second, after as many batches as bring it into its steady state.
pub fn measure(case: &Case) -> Time {
    let mut run = (case.make)();
    let mut batches = 0u32;
    let start = Instant::now();
    while start.elapsed() < 10 * SAMPLE {
        run.batch();
        batches += 1;
    }
    let each = (batches / 10).max(1);
    let mut samples: Vec<f64> = (0..SAMPLES)
        .map(|_| {
            let start = Instant::now();
            (0..each).for_each(|_| run.batch());
            start.elapsed().as_nanos() as f64 / f64::from(each) / f64::from(case.requests)
        })
        .collect();
    samples.sort_by(f64::total_cmp);
    Time { min: samples[0], median: samples[SAMPLES / 2] }
}
