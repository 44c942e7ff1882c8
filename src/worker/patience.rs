//! How long a worker looks for more before it sleeps.
//!
//! A guest that has just had an answer often has the next request ready within microseconds, and a wake-up
//! through an eventfd costs tens of them on both sides. So after work a worker looks at its rings for a while
//! first. The while tunes itself, as the kernel's halt polling does: it grows when a kick ends a short sleep, which
//! looking would have saved, and shrinks to nothing when kicks take long. How long the store takes teaches nothing.
//! So a worker without requests, or with one now and then, does not look at all.

use std::time::{Duration, Instant};

/// The first while, and the least.
const LEAST: Duration = Duration::from_micros(4);

/// The self-tuning budget of one worker.
pub(super) struct Patience {
    most: Duration,
    budget: Duration,
    /// Since when there has been nothing to do.
    idle_since: Option<Instant>,
    /// Since when it has slept, if a guest could have been expected to bring work.
    asleep_since: Option<Instant>,
}

impl Patience {
    /// At most `most` at a time; zero never looks.
    pub fn up_to(most: Duration) -> Patience {
        Patience { most, budget: Duration::ZERO, idle_since: None, asleep_since: None }
    }

    /// There was something to do.
    pub fn worked(&mut self) {
        self.idle_since = None;
    }

    /// There was nothing to do: whether to look once more. Costs a reading of the clock (some 20 ns), and
    /// nothing while the budget is zero.
    pub fn look_again(&mut self) -> bool {
        if self.budget.is_zero() {
            return false;
        }
        let now = Instant::now();
        now.duration_since(*self.idle_since.get_or_insert(now)) < self.budget
    }

    /// The worker goes to sleep, and a guest may bring work soon.
    pub fn sleeps(&mut self, expecting: bool) {
        self.idle_since = None;
        self.asleep_since = expecting.then(Instant::now);
    }

    /// A guest brought work to a worker that did not look.
    pub fn kicked(&mut self) {
        if let Some(since) = self.asleep_since.take() {
            self.learn(since.elapsed());
        }
    }

    /// A guest brought work after so long.
    fn learn(&mut self, time: Duration) {
        self.budget = if time < self.most {
            (self.budget * 2).clamp(LEAST.min(self.most), self.most)
        } else if self.budget <= LEAST {
            Duration::ZERO
        } else {
            self.budget / 2
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Duration = Duration::from_micros(50);

    #[test]
    fn short_sleeps_teach_patience_and_long_ones_unteach_it() {
        let mut patience = Patience::up_to(MOST);
        assert!(!patience.look_again());
        for _ in 0..10 {
            patience.learn(Duration::from_micros(20));
            assert!(patience.budget <= MOST);
        }
        assert_eq!(patience.budget, MOST);
        assert!(patience.look_again());
        for _ in 0..10 {
            patience.learn(Duration::from_secs(1));
        }
        assert!(!patience.look_again());
    }

    #[test]
    fn only_a_guest_that_was_expected_teaches() {
        let mut patience = Patience::up_to(Duration::from_secs(3600));
        patience.sleeps(false);
        patience.kicked();
        assert!(!patience.look_again());
        patience.sleeps(true);
        patience.kicked();
        assert!(patience.look_again());
        let budget = patience.budget;
        patience.kicked();
        assert_eq!(patience.budget, budget, "one sleep, one lesson");
    }

    #[test]
    fn looking_ends() {
        let mut patience = Patience::up_to(MOST);
        patience.learn(Duration::ZERO);
        assert!(patience.look_again());
        std::thread::sleep(MOST);
        assert!(!patience.look_again());
    }

    #[test]
    fn none_is_none() {
        let mut patience = Patience::up_to(Duration::ZERO);
        patience.learn(Duration::ZERO);
        assert!(!patience.look_again());
    }
}
