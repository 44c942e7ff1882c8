//! How long a worker looks for more before it sleeps.
//!
//! A guest that has just had an answer often has the next request ready within microseconds, and a wake-up
//! through an eventfd costs tens of them on both sides. So after work a worker looks at its rings for a while
//! first. The while tunes itself, as the kernel's halt polling does: it grows when a kick ends a short sleep, which
//! looking would have saved, and shrinks to nothing when kicks take long. How long the store takes changes nothing.
//! So a worker without requests, or with one now and then, does not look at all.

use std::time::{Duration, Instant};

/// The first while, and the least.
const LEAST: Duration = Duration::from_micros(4);

/// The self-tuning budget of one worker.
pub(super) struct BusyPoll {
    most: Duration,
    budget: Duration,
    /// Since when there has been nothing to do.
    idle_since: Option<Instant>,
    /// Since when it has slept, if a guest could have been expected to bring work.
    asleep_since: Option<Instant>,
}

impl BusyPoll {
    /// At most `most` at a time; zero never looks.
    pub fn up_to(most: Duration) -> BusyPoll {
        BusyPoll { most, budget: Duration::ZERO, idle_since: None, asleep_since: None }
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
            self.adjust(since.elapsed());
        }
    }

    /// A guest brought work after so long.
    fn adjust(&mut self, time: Duration) {
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
    fn the_budget_grows_after_short_sleeps_and_ends_after_long_ones() {
        let mut busy_poll = BusyPoll::up_to(MOST);
        assert!(!busy_poll.look_again());
        for _ in 0..10 {
            busy_poll.adjust(Duration::from_micros(20));
            assert!(busy_poll.budget <= MOST);
        }
        assert_eq!(busy_poll.budget, MOST);
        assert!(busy_poll.look_again());
        for _ in 0..10 {
            busy_poll.adjust(Duration::from_secs(1));
        }
        assert!(!busy_poll.look_again());
    }

    #[test]
    fn only_a_sleep_in_which_a_guest_was_expected_counts() {
        let mut busy_poll = BusyPoll::up_to(Duration::from_secs(3600));
        busy_poll.sleeps(false);
        busy_poll.kicked();
        assert!(!busy_poll.look_again());
        busy_poll.sleeps(true);
        busy_poll.kicked();
        assert!(busy_poll.look_again());
        let budget = busy_poll.budget;
        busy_poll.kicked();
        assert_eq!(busy_poll.budget, budget, "one sleep, one lesson");
    }

    #[test]
    fn polling_ends_with_the_budget() {
        let mut busy_poll = BusyPoll::up_to(MOST);
        busy_poll.adjust(Duration::ZERO);
        assert!(busy_poll.look_again());
        std::thread::sleep(MOST);
        assert!(!busy_poll.look_again());
    }

    #[test]
    fn a_limit_of_zero_never_polls() {
        let mut busy_poll = BusyPoll::up_to(Duration::ZERO);
        busy_poll.adjust(Duration::ZERO);
        assert!(!busy_poll.look_again());
    }
}
