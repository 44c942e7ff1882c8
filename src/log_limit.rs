//! Log lines that a client can cause: each kind is limited, so that no client fills a disk or hides what others say.

#![forbid(unsafe_code)]

use log::Level;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines of a kind that may come at once.
const BURST: u32 = 16;

/// For each further line of that kind.
const INTERVAL: Duration = Duration::from_secs(10);

/// For filters: the lines are of all modules.
const TARGET: &str = "ringblk";

/// The lines about one subject, an export say, limited for each kind of line: [`BURST`] at once, then one every
/// [`INTERVAL`]. A line says how many of its kind were left out before it.
///
/// A lock is taken for each line, no memory after the first of a kind: for what is rare unless somebody makes it
/// frequent.
#[derive(Debug)]
pub struct LogLimit {
    subject: String,
    /// One for each kind seen, of which the source has a few.
    kinds: Mutex<Vec<Kind>>,
}

#[derive(Debug)]
struct Kind {
    name: &'static str,
    budget: Budget,
}

/// A token bucket.
#[derive(Debug)]
struct Budget {
    /// Lines that may come now.
    left: u32,
    /// Since when `left` has not grown.
    since: Instant,
    /// Lines left out since the last one.
    dropped: u64,
}

impl Budget {
    fn new(now: Instant) -> Budget {
        Budget { left: BURST, since: now, dropped: 0 }
    }

    /// Whether a line may come, and how many were left out before it.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let earned = now.saturating_duration_since(self.since).as_nanos() / INTERVAL.as_nanos();
        let earned = u32::try_from(earned).unwrap_or(u32::MAX);
        if earned >= BURST - self.left {
            (self.left, self.since) = (BURST, now);
        } else {
            self.left += earned;
            self.since += INTERVAL * earned;
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Some(std::mem::take(&mut self.dropped))
            }
            None => {
                self.dropped += 1;
                None
            }
        }
    }
}

impl LogLimit {
    /// Lines that begin with `subject`.
    pub fn new(subject: impl Into<String>) -> LogLimit {
        LogLimit { subject: subject.into(), kinds: Mutex::default() }
    }

    /// An error, unless there were too many lines of `kind`.
    pub fn error(&self, kind: &'static str, message: fmt::Arguments<'_>) {
        self.line(Level::Error, kind, message);
    }

    /// As [`error`](Self::error), a warning.
    pub fn warn(&self, kind: &'static str, message: fmt::Arguments<'_>) {
        self.line(Level::Warn, kind, message);
    }

    /// As [`error`](Self::error), an information.
    pub fn info(&self, kind: &'static str, message: fmt::Arguments<'_>) {
        self.line(Level::Info, kind, message);
    }

    fn line(&self, level: Level, kind: &'static str, message: fmt::Arguments<'_>) {
        let subject = &self.subject;
        match self.admit(kind, Instant::now()) {
            Some(0) => log::log!(target: TARGET, level, "{subject}: {message}"),
            Some(dropped) => {
                log::log!(target: TARGET, level, "{subject}: {message} ({dropped} lines like it were left out)")
            }
            None => {}
        }
    }

    /// Whether a line of `kind` may come, and how many were left out before it.
    fn admit(&self, kind: &'static str, now: Instant) -> Option<u64> {
        let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        let index = kinds.iter().position(|known| known.name == kind).unwrap_or_else(|| {
            kinds.push(Kind { name: kind, budget: Budget::new(now) });
            kinds.len() - 1
        });
        kinds[index].budget.take(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_one_line_in_each_interval() {
        let (limit, start) = (LogLimit::new("a"), Instant::now());
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        for _ in 0..BURST {
            assert_eq!(limit.admit("storm", start), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(limit.admit("storm", at(9)), None);
        }
        // Another kind has a budget of its own.
        assert_eq!(limit.admit("other", at(9)), Some(0));
        assert_eq!(limit.admit("storm", at(10)), Some(1000));
        assert_eq!(limit.admit("storm", at(10)), None);
        assert_eq!(limit.admit("storm", at(19)), None);
        assert_eq!(limit.admit("storm", at(20)), Some(2));
        // What was not used is saved, up to a burst.
        let later = at(10_000);
        assert_eq!((0..100).filter(|_| limit.admit("storm", later).is_some()).count(), BURST as usize);
    }

    #[test]
    fn a_second_of_anything_makes_few_lines() {
        let (limit, start) = (LogLimit::new("a"), Instant::now());
        let lines = (0..100_000).filter(|step| {
            let now = start + Duration::from_micros(10 * step);
            limit.admit("storm", now).is_some()
        });
        assert_eq!(lines.count(), BURST as usize);
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_earns_nothing() {
        let start = Instant::now() + INTERVAL * 100;
        let mut budget = Budget::new(start);
        let lines = (0..100).filter(|step| budget.take(start - INTERVAL * *step).is_some());
        assert_eq!(lines.count(), BURST as usize);
    }
}
