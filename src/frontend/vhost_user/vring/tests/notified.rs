//! Who is told when, and in which order memory is read and written.

#![forbid(unsafe_code)]

use super::driver::{AVAIL, Driver, Event, USED, device};
use super::*;
use crate::frontend::vhost_user::atomic::traced::{Access, Ordering, observed};
use crate::ring::Core;
use crate::ring::sim::SimRing;
use std::collections::VecDeque;
use std::rc::Rc;

/// A vring whose requests are completed by hand, oldest first.
pub struct ByHand {
    pub vring: Vring,
    taken: VecDeque<(u16, TagState)>,
}

impl ByHand {
    pub fn new(setup: VringSetup) -> ByHand {
        ByHand { vring: Vring::new(setup).unwrap(), taken: VecDeque::new() }
    }

    /// Takes what a pass may. How many there were.
    pub fn take(&mut self) -> usize {
        let before = self.taken.len();
        loop {
            let mut state = TagState::default();
            let Some(tag) = super::take(&self.vring, &mut state) else { break };
            self.taken.push_back((tag, state));
        }
        self.taken.len() - before
    }

    pub fn take_all(&mut self) {
        while self.take() > 0 {
            self.vring.publish();
        }
    }

    pub fn complete(&mut self, count: usize, result: Result<(), Errno>) {
        for _ in 0..count {
            let (tag, mut state) = self.taken.pop_front().unwrap();
            Source::<SimRing>::complete(&self.vring, tag, &mut state, result);
        }
    }

    pub fn taken_reversed(&mut self) {
        self.taken.make_contiguous().reverse();
    }

    /// As a worker does it once in each pass.
    pub fn publish(&self) {
        let news = self.vring.publish();
        self.vring.maybe_signal(news);
    }
}

fn by_hand(size: u16, event_idx: bool) -> (Driver, ByHand) {
    let driver = Driver::new(size, event_idx, 0);
    let vring = ByHand::new(driver.setup(device(), FEATURES));
    assert!(driver.call.take());
    (driver, vring)
}

/// Nobody knows what the driver was told by whoever served it before.
#[test]
fn a_vring_that_starts_calls_once() {
    for event_idx in [false, true] {
        for enabled in [false, true] {
            let mut driver = Driver::new(16, event_idx, 0);
            flushes(&mut driver, 2);
            // It sleeps until it is called, whatever is made of its wishes.
            driver.want_call(Some(7));
            let setup = || VringSetup { enabled, ..driver.setup(device(), FEATURES) };
            let vring = ByHand::new(setup());
            assert_eq!(driver.call.count(), 1, "{event_idx} {enabled}");
            // The descriptor may come later.
            let late = ByHand::new(VringSetup { call: None, ..setup() });
            assert_eq!(driver.call.count(), 0);
            late.vring.set_call(Some(driver.call.call()));
            assert_eq!(driver.call.count(), 1);
            // Or be replaced.
            let other = Event::new();
            vring.vring.set_call(Some(other.call()));
            assert_eq!((driver.call.count(), other.count()), (0, 1));
        }
    }
}

/// The driver polls through many completions while others are always left, and then sleeps.
#[test]
fn completions_that_were_not_told_are_not_forgotten() {
    for event_idx in [false, true] {
        for rounds in [100, 4095, 4096, 4097, 8189, 8190, 8191, 8192, 8193, 16384] {
            let (mut driver, mut vring) = by_hand(256, event_idx);
            driver.want_call(None);
            flushes(&mut driver, 48);
            vring.take_all();
            for _ in 0..rounds {
                vring.complete(8, Ok(()));
                vring.publish();
                assert_eq!(driver.harvest().len(), 8);
                flushes(&mut driver, 8);
                assert_eq!(vring.take(), 8);
            }
            driver.call.take();
            driver.want_call(Some(driver.seen));
            assert!(!driver.anything());
            vring.complete(8, Ok(()));
            vring.publish();
            vring.publish();
            assert!(driver.call.take(), "after {rounds} rounds, EVENT_IDX: {event_idx}");
        }
    }
}

#[test]
fn a_kick_is_listened_for_again_when_the_poll_has_ended() {
    let (driver, vring) = by_hand(16, false);
    let (core, mut seen) = (Core::new(SimRing::new(1, Faults::default())), Vec::new());
    let ring = core.ring();
    let data = UserData::new(Kind::Kick, 3, 0);
    let fd = vring.vring.setup.kick.as_raw_fd();
    vring.vring.start(&core, data);
    for more in [true, false, false, true, false] {
        ring.enter(false).unwrap();
        if more {
            ring.signal(fd)
        } else {
            ring.signal_last(fd)
        }
        ring.reap(&mut seen);
        assert_eq!(seen.iter().map(|cqe| (cqe.user_data, cqe.more)).collect::<Vec<_>>(), [(data, more)]);
        assert!(vring.vring.kicked(&core, seen[0].user_data, seen[0].more));
        seen.clear();
    }
    drop(driver);
}

/// What the vring does in `steps`, with the guest's addresses in place of ours.
fn accesses(driver: &Driver, steps: impl FnOnce()) -> Vec<(char, u64, Option<Ordering>)> {
    let seen: Rc<RefCell<Vec<Access>>> = Rc::default();
    let into = seen.clone();
    observed(move |access| into.borrow_mut().push(access), steps);
    let guest = |at: usize| (at as u64).wrapping_sub(driver.host(0));
    let seen = seen.take().into_iter();
    seen.map(|access| match access {
        Access::Load(at, order) => ('r', guest(at), Some(order)),
        Access::Store(at, order) => ('w', guest(at), Some(order)),
        Access::Fence(order) => ('f', 0, Some(order)),
    })
    .collect()
}

const FENCE: (char, u64, Option<Ordering>) = ('f', 0, Some(Ordering::SeqCst));

/// Whether `first` comes before `second`, and both do.
fn in_order(
    seen: &[(char, u64, Option<Ordering>)],
    first: (char, u64, Option<Ordering>),
    second: (char, u64, Option<Ordering>),
) {
    let at = |wanted| seen.iter().position(|one| *one == wanted);
    let both = at(first).zip(at(second));
    assert!(both.is_some_and(|(first, second)| first < second), "{first:x?}, {second:x?}: {seen:x?}");
}

/// x86 keeps loads in order and stores too, and others do not: so it is not what happens that is looked at, but what
/// was asked for.
#[test]
fn memory_is_accessed_in_the_order_that_the_standard_demands() {
    use Ordering::{Acquire, Relaxed, Release, SeqCst};
    for event_idx in [false, true] {
        let (mut driver, mut vring) = by_hand(16, event_idx);
        let size = 16;
        let (avail_idx, head) = (AVAIL + 2, AVAIL + 4);
        let (avail_flags, used_event) = (AVAIL, AVAIL + 4 + 2 * size);
        let (used_flags, used_idx, element) = (USED, USED + 2, USED + 4);
        let avail_event = USED + 4 + 8 * size;

        // Section 2.7.14: what the driver wrote is read after its index.
        flushes(&mut driver, 2);
        let seen = accesses(&driver, || {
            vring.take();
        });
        in_order(&seen, ('r', avail_idx, Some(Acquire)), ('r', head, Some(Relaxed)));

        // Section 2.7.8.2: what we wrote is written before our index; and whether the driver wants a call is read when
        // it can see that. Section 2.7.7.2 has no rule of its own: it is the driver's fence that ours meets.
        driver.want_call(Some(driver.seen));
        let seen = accesses(&driver, || {
            vring.complete(2, Ok(()));
            vring.publish();
        });
        in_order(&seen, ('w', element, Some(Relaxed)), ('w', used_idx, Some(Release)));
        in_order(&seen, ('w', element + 12, Some(Relaxed)), ('w', used_idx, Some(Release)));
        in_order(&seen, ('w', used_idx, Some(Release)), FENCE);
        let wish = if event_idx { used_event } else { avail_flags };
        in_order(&seen, FENCE, ('r', wish, Some(Relaxed)));
        assert!(driver.call.take());

        // The same the other way around: we ask for a kick, and look once more.
        let seen = accesses(&driver, || assert!(vring.vring.arm_kick()));
        let wish = if event_idx { avail_event } else { used_flags };
        in_order(&seen, ('w', wish, Some(Relaxed)), FENCE);
        in_order(&seen, FENCE, ('r', avail_idx, Some(Acquire)));
        assert_eq!(seen.iter().filter(|(kind, ..)| *kind == 'f').count(), 1);
        assert_eq!(seen.iter().find(|(kind, ..)| *kind == 'f').unwrap().2, Some(SeqCst));
    }
}
