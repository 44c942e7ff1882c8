//! One set of limits: of one volume, or of all that name the same group.

#![forbid(unsafe_code)]

use super::bucket::Bucket;
use super::config::{Knob, LimitsChange, LimitsConfig};
use super::turns::{Lane, Turns};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// See the module.
#[derive(Debug, Default)]
pub struct Group {
    name: Option<String>,
    config: Mutex<LimitsConfig>,
    limited: AtomicBool,
    buckets: [Bucket; 6],
    iops_size: AtomicU64,
    /// No limit concerns reads and writes together.
    apart: AtomicBool,
    pub turns: Turns,
}

/// What a request takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    pub write: bool,
    pub bytes: u64,
}

impl Cost {
    /// The buckets that it is in.
    fn knobs(self) -> [Knob; 4] {
        match self.write {
            false => [Knob::IopsTotal, Knob::BpsTotal, Knob::IopsRead, Knob::BpsRead],
            true => [Knob::IopsTotal, Knob::BpsTotal, Knob::IopsWrite, Knob::BpsWrite],
        }
    }
}

impl Group {
    /// With these limits.
    pub fn new(config: LimitsConfig) -> Group {
        let group = Group { name: config.group.clone(), ..Group::default() };
        group.set(&config);
        *group.lock() = config;
        group
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, LimitsConfig> {
        // A poisoned lock means that a thread panicked between two whole values.
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, config: &LimitsConfig) {
        for (bucket, knob) in self.buckets.iter().zip(Knob::ALL) {
            bucket.set(config.rate(knob));
        }
        let together = [Knob::IopsTotal, Knob::BpsTotal].iter().any(|knob| config.rate(*knob).avg > 0);
        self.apart.store(!together, Ordering::Relaxed);
        self.iops_size.store(config.iops_size(), Ordering::Relaxed);
        self.limited.store(config.is_limited(), Ordering::Relaxed);
    }

    /// What the volumes that share it call it; `None` for the set of one volume.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// As they are now.
    pub fn config(&self) -> LimitsConfig {
        self.lock().clone()
    }

    /// Changes what is named. Whoever waits has to be told, to look again.
    ///
    /// # Errors
    /// The key that is wrong then, and why; nothing is changed.
    pub fn change(&self, change: &LimitsChange) -> Result<LimitsConfig, (&'static str, String)> {
        let mut config = self.lock();
        let changed = config.changed(change)?;
        self.set(&changed);
        config.clone_from(&changed);
        Ok(changed)
    }

    /// Whether anything is limited at all.
    pub fn is_limited(&self) -> bool {
        self.limited.load(Ordering::Relaxed)
    }

    /// Where such a request waits.
    pub fn lane(&self, cost: Cost) -> Lane {
        usize::from(cost.write && self.apart.load(Ordering::Relaxed))
    }

    /// The tick at which the limits have room for such a request; in the past where they have.
    pub fn opens_at(&self, cost: Cost) -> u64 {
        cost.knobs().iter().map(|knob| self.buckets[*knob as usize].opens_at()).max().unwrap_or(0)
    }

    /// Counts a request that goes at tick `now`. The longest that a limit takes for it, in ticks.
    pub fn add(&self, now: u64, cost: Cost) -> u64 {
        let (size, bytes) = (self.iops_size.load(Ordering::Relaxed), cost.bytes as f64);
        let operations = if size > 0 && cost.bytes > size { bytes / size as f64 } else { 1.0 };
        let add = |knob: &Knob| {
            let units = if knob.counts_operations() { operations } else { bytes };
            self.buckets[*knob as usize].add(now, units)
        };
        cost.knobs().iter().map(add).max().unwrap_or(0)
    }
}
