//! A vring between a driver that writes its rings by hand and a disk in memory.

pub(crate) mod driver;
mod killed;
mod notified;
mod stopped;
mod unusable;

use super::queue::IDLE_PASSES;
use super::*;
use crate::ring::Kind;
use crate::ring::sim::Faults;
use driver::{Driver, Event, PATTERN, SECTORS, Seen, Worker, device};
use proptest::prelude::*;
use std::io;
use std::os::fd::AsRawFd;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const FEATURES: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_BLK_F_FLUSH;

fn pair(size: u16, event_idx: bool) -> (Driver, Worker) {
    let driver = Driver::new(size, event_idx, 0);
    let worker = Worker::new(driver.setup(device(), FEATURES), 1, Faults::default());
    assert!(driver.call.take(), "nobody knows what it was told before");
    (driver, worker)
}

/// One request from its start to its end: status and bytes written.
fn alone(
    driver: &mut Driver,
    worker: &mut Worker,
    kind: u32,
    sector: u64,
    data: &[u8],
    room: usize,
) -> (u8, u32) {
    let head = driver.add(kind, sector, data, room, false).unwrap();
    worker.settle();
    let done = driver.harvest();
    assert_eq!(done.len(), 1);
    assert_eq!(done[0].0, head);
    (driver.status(head), done[0].1)
}

/// Makes some requests available.
fn flushes(driver: &mut Driver, count: usize) {
    for _ in 0..count {
        driver.add(FLUSH, 0, &[], 0, false).unwrap();
    }
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn each_kind_of_request_is_answered() {
    let (mut driver, mut worker) = pair(16, false);
    let head = driver.add(IN, 3, &[], 1024, false).unwrap();
    worker.settle();
    assert_eq!(driver.harvest(), [(head, 1025)]);
    assert_eq!(driver.status(head), OK);
    assert_eq!(driver.data(head, 1024), PATTERN[3 * 512..5 * 512]);

    assert_eq!(alone(&mut driver, &mut worker, OUT, 9, &[0xab; 512], 0), (OK, 1));
    let now = worker.core.ring().contents().unwrap();
    assert_eq!(now[9 * 512..10 * 512], [0xab; 512]);
    assert_ne!(worker.core.ring().stable().unwrap(), now);
    assert_eq!(alone(&mut driver, &mut worker, FLUSH, 0, &[], 0), (OK, 1));
    assert_eq!(worker.core.ring().stable().unwrap(), now);

    assert_eq!(alone(&mut driver, &mut worker, IN, SECTORS, &[], 512), (IOERR, 1));
    assert_eq!(alone(&mut driver, &mut worker, IN, u64::MAX, &[], 512), (IOERR, 1));
    assert_eq!(alone(&mut driver, &mut worker, IN, 0, &[], 511), (IOERR, 1));
    assert_eq!(alone(&mut driver, &mut worker, 77, 0, &[], 0), (UNSUPP, 1));
    assert_eq!(alone(&mut driver, &mut worker, 1 << 31, 0, &[], 512), (UNSUPP, 1));
}

#[test]
fn the_device_says_its_name() {
    let (mut driver, mut worker) = pair(16, false);
    for (room, told) in [(20, 20), (100, 20), (5, 5)] {
        let head = driver.add(GET_ID, 0, &[], room, false).unwrap();
        worker.settle();
        assert_eq!(driver.harvest(), [(head, told + 1)]);
        assert_eq!(driver.status(head), OK);
        assert_eq!(driver.data(head, told as usize), b"a-volume\0\0\0\0\0\0\0\0\0\0\0\0"[..told as usize]);
    }
    assert_eq!(worker.seen(), []);
}

#[test]
fn ranges_are_carried_out_one_by_one() {
    let (mut driver, mut worker) = pair(16, false);
    let plain = Flags::default();
    let three = [range(1, 2, 0), range(10, 1, 0), range(20, 5, 0)].concat();
    assert_eq!(alone(&mut driver, &mut worker, DISCARD, 0, &three, 0), (OK, 1));
    let all: [Seen; 3] =
        [(Op::Discard, plain, 1, 2), (Op::Discard, plain, 10, 1), (Op::Discard, plain, 20, 5)];
    assert_eq!(worker.seen(), all);

    let unmap = Flags { unmap: true, fua: false };
    let bad = [range(30, 1, 1), range(SECTORS, 1, 0), range(40, 1, 0)].concat();
    assert_eq!(alone(&mut driver, &mut worker, WRITE_ZEROES, 0, &bad, 0), (IOERR, 1));
    let some: [Seen; 2] = [(Op::WriteZeroes, unmap, 30, 1), (Op::WriteZeroes, plain, SECTORS, 1)];
    assert_eq!(worker.seen(), some, "it stops at the first error");
    let now = worker.core.ring().contents().unwrap();
    assert_eq!(now[30 * 512..31 * 512], [0; 512]);
    assert_eq!(now[40 * 512..41 * 512], PATTERN[40 * 512..41 * 512]);
    // The tag's leftovers do not come back.
    assert_eq!(alone(&mut driver, &mut worker, IN, 50, &[], 512), (OK, 513));
    assert_eq!(worker.seen().len(), 1);
}

#[test]
fn without_a_cache_every_write_is_durable() {
    let (flush, wce) = (1 << VIRTIO_BLK_F_FLUSH, 1 << VIRTIO_BLK_F_CONFIG_WCE);
    for (features, writeback, durable) in
        [(0, true, true), (flush, true, false), (flush | wce, true, false), (flush | wce, false, true)]
    {
        let device = device();
        device.set_writeback(writeback);
        let mut driver = Driver::new(16, false, 0);
        let mut worker = Worker::new(driver.setup(device, features), 1, Faults::default());
        assert_eq!(alone(&mut driver, &mut worker, OUT, 5, &[1; 512], 0), (OK, 1));
        assert_eq!(worker.seen(), [(Op::Write, Flags { fua: durable, unmap: false }, 5, 1)]);
        let ring = worker.core.ring();
        assert_eq!(ring.stable() == ring.contents(), durable, "{features:#x} {writeback}");
        alone(&mut driver, &mut worker, WRITE_ZEROES, 0, &range(1, 1, 0), 0);
        assert_eq!(worker.seen()[0].1.fua, durable);
        alone(&mut driver, &mut worker, IN, 0, &[], 512);
        assert!(!worker.seen()[0].1.fua);
    }
}

/// The vring takes nothing more, says so, and still completes what it had.
fn breaks(size: u16, how: impl Fn(&mut Driver)) {
    let mut driver = Driver::new(size, false, u16::MAX - 1);
    let faults = Faults { delay: 50, ..Faults::default() };
    let mut worker = Worker::new(driver.setup(device(), FEATURES), 1, faults);
    let head = driver.add(IN, 0, &[], 512, true).unwrap();
    assert!(worker.pass());
    assert_eq!(worker.vring.in_flight(), 1);
    how(&mut driver);
    assert!(!driver.err.take());
    worker.settle();
    assert!(driver.err.take(), "the VMM is told");
    assert_eq!(driver.harvest(), [(head, 513)]);
    assert_eq!(driver.status(head), OK);
    let before = worker.vring.next_avail();
    driver.offer(1 % size);
    worker.settle();
    assert_eq!((worker.vring.next_avail(), worker.vring.in_flight()), (before, 0));
    assert!(worker.vring.arm_kick(), "nothing to stay awake for");
}

#[test]
fn a_driver_that_breaks_its_rings_is_not_followed() {
    for size in [2, 16, 256] {
        // The head that is in flight.
        breaks(size, |driver| driver.offer(size - 1));
        breaks(size, |driver| driver.offer(size));
        breaks(size, |driver| driver.offer(u16::MAX));
        breaks(size, |driver| driver.move_avail(driver.avail.wrapping_add(size + 1)));
        breaks(size, |driver| driver.move_avail(driver.avail.wrapping_sub(1)));
    }
}

#[test]
fn a_disabled_or_stopped_vring_completes_and_takes_nothing() {
    for stop in [false, true] {
        let (mut driver, mut worker) = pair(16, false);
        worker.core.ring().set_faults(Faults { delay: 90, ..Faults::default() });
        let first = driver.add(IN, 0, &[], 512, false).unwrap();
        worker.pass();
        assert_eq!(worker.vring.in_flight(), 1);
        if stop {
            worker.vring.stop()
        } else {
            worker.vring.enable(false)
        }
        let second = driver.add(IN, 0, &[], 512, false).unwrap();
        worker.settle();
        assert_eq!(driver.harvest(), [(first, 513)]);
        assert_eq!((worker.vring.in_flight(), worker.vring.next_avail()), (0, 1));
        worker.vring.enable(true);
        worker.settle();
        assert_eq!(driver.harvest(), if stop { vec![] } else { vec![(second, 513)] });
    }
}

#[test]
fn a_new_call_descriptor_is_signalled_at_once() {
    let (mut driver, mut worker) = pair(16, false);
    let call = Event::new();
    worker.vring.set_call(Some(call.call()));
    assert!(call.take());
    alone(&mut driver, &mut worker, FLUSH, 0, &[], 0);
    assert!(call.take() && !driver.call.take());
    worker.vring.set_call(None);
    alone(&mut driver, &mut worker, FLUSH, 0, &[], 0);
    assert!(!call.take());
}

#[test]
fn calls_are_made_when_they_are_wanted() {
    for start in [0, u16::MAX - 2, u16::MAX] {
        // With EVENT_IDX: at the completion that was asked for, and at no other.
        let mut driver = Driver::new(16, true, start);
        let mut worker = Worker::new(driver.setup(device(), FEATURES), 1, Faults::default());
        assert!(driver.call.take(), "at the start");
        driver.want_call(Some(start.wrapping_add(2)));
        for called in [false, false, true, false, false] {
            alone(&mut driver, &mut worker, FLUSH, 0, &[], 0);
            assert_eq!(driver.call.take(), called, "from {start}");
        }
        // Several at once that pass it: one call.
        driver.want_call(Some(driver.seen.wrapping_add(1)));
        flushes(&mut driver, 4);
        worker.settle();
        assert_eq!(driver.harvest().len(), 4);
        assert!(driver.call.take());
    }
    let (mut driver, mut worker) = pair(16, false);
    for wanted in [true, false, true] {
        driver.want_call(wanted.then_some(0));
        alone(&mut driver, &mut worker, FLUSH, 0, &[], 0);
        assert_eq!(driver.call.take(), wanted, "NO_INTERRUPT");
    }
}

/// Takes the next request as its slot would: its tag.
fn take(vring: &Vring, state: &mut TagState) -> Option<u16> {
    let tag = vring.poll()?;
    let head = vring.take(tag)?;
    vring.accept(tag, head, state);
    Some(tag)
}

#[test]
fn a_pass_takes_part_of_what_waits() {
    let taken = |waiting: usize, sectors: u64| {
        let (mut driver, worker) = pair(64, true);
        for _ in 0..waiting {
            driver.add(IN, 0, &[], (sectors * SECTOR) as usize, false).unwrap();
        }
        std::iter::from_fn(|| {
            worker.vring.publish();
            let mut tags = 0;
            while take(&worker.vring, &mut TagState::default()).is_some() {
                tags += 1;
            }
            (tags > 0).then_some(tags)
        })
        .collect::<Vec<_>>()
    };
    assert_eq!(taken(3, 1), [3]);
    assert_eq!(taken(10, 1), [5, 5]);
    assert_eq!(taken(20, 1), [8, 8, 4]);
    assert_eq!(taken(12, 1), [6, 6]);
    assert_eq!(taken(12, 32), [4, 4, 4], "64 KiB");
}

#[test]
fn a_call_waits_until_half_is_done_or_nothing_comes() {
    let (mut driver, worker) = pair(16, true);
    driver.want_call(Some(driver.seen));
    flushes(&mut driver, 8);
    let mut state = TagState::default();
    let mut done = |count: usize| {
        for _ in 0..count {
            let tag = take(&worker.vring, &mut state).unwrap();
            Source::<crate::ring::sim::SimRing>::complete(&*worker.vring, tag, &mut state, Ok(()));
        }
    };
    let told = |driver: &Driver| {
        let news = worker.vring.publish();
        worker.vring.maybe_signal(news);
        driver.call.take()
    };
    done(1);
    assert!(!told(&driver), "one of eight");
    done(3);
    assert!(told(&driver), "four of eight");
    driver.want_call(Some(worker.vring.published.get()));
    done(1);
    assert!(!told(&driver), "one of four");
    assert!(told(&driver), "and nothing more came");
    assert_eq!(driver.harvest().len(), 5);
}

#[test]
fn a_vring_without_requests_asks_for_a_kick_after_a_while() {
    let (mut driver, worker) = pair(16, true);
    let idle = || {
        for _ in 0..IDLE_PASSES {
            assert!(!worker.vring.try_idle());
            worker.vring.publish();
            assert_eq!(worker.vring.poll(), None);
        }
    };
    idle();
    assert!(worker.vring.try_idle());
    assert!(!worker.vring.try_idle(), "once");
    idle();
    flushes(&mut driver, 1);
    assert!(!worker.vring.try_idle(), "there is a request");
    worker.vring.publish();
    assert!(take(&worker.vring, &mut TagState::default()).is_some());
    for _ in 0..2 * IDLE_PASSES {
        worker.vring.publish();
        assert!(!worker.vring.try_idle(), "one is in flight");
    }
}

#[test]
fn kicks_are_asked_for_only_before_sleep() {
    for event_idx in [false, true] {
        for start in [0, u16::MAX - 1] {
            let mut driver = Driver::new(16, event_idx, start);
            let mut worker = Worker::new(driver.setup(device(), FEATURES), 1, Faults::default());
            assert!(worker.vring.arm_kick());
            driver.add(FLUSH, 0, &[], 0, false);
            assert!(driver.must_kick(start), "it sleeps");
            assert!(!worker.vring.arm_kick(), "there is a request");
            worker.settle();
            driver.add(FLUSH, 0, &[], 0, false);
            assert!(!driver.must_kick(driver.avail.wrapping_sub(1)), "it is awake: {event_idx} {start}");
            worker.settle();
            assert!(worker.vring.arm_kick());
            flushes(&mut driver, 3);
            assert!(driver.must_kick(driver.avail.wrapping_sub(3)));
            assert_eq!(driver.used_flags(), 0, "with EVENT_IDX it is never anything else");
        }
    }
}

#[test]
fn a_kick_is_a_completion_until_it_is_disarmed() {
    let (driver, worker) = pair(16, false);
    let (ring, mut seen) = (worker.core.ring(), Vec::new());
    let data = UserData::new(Kind::Kick, 3, 0);
    worker.vring.start(&worker.core, data);
    ring.enter(false).unwrap();
    ring.signal(worker.vring.setup.kick.as_raw_fd());
    ring.reap(&mut seen);
    assert!(seen.len() == 1 && seen[0].more && worker.vring.kicked(&worker.core, seen[0].user_data, true));
    assert!(!worker.vring.kicked(&worker.core, UserData::new(Kind::Kick, 2, 0), false));
    worker.vring.close(&worker.core);
    ring.enter(true).unwrap();
    ring.reap(&mut seen);
    assert!(seen.iter().any(|cqe| cqe.user_data == data && cqe.result == -libc::ECANCELED && !cqe.more));
    drop(driver);
}

#[test]
fn areas_that_are_not_the_guests_are_refused() {
    let driver = Driver::new(16, true, 0);
    let refused = |change: &dyn Fn(&mut VringSetup)| {
        let mut setup = driver.setup(device(), FEATURES);
        change(&mut setup);
        Vring::new(setup).is_err_and(|error| error.kind() == io::ErrorKind::InvalidInput)
    };
    assert!(!refused(&|_| {}));
    for size in [0, 3, 48, 40000] {
        assert!(refused(&|setup| setup.size = size), "size {size}");
    }
    for at in [u64::MAX, u64::MAX - 15, 1 << 40, 8, 1] {
        assert!(refused(&|setup| setup.desc_table = at), "descriptors at {at:#x}");
        assert!(at == 8 || refused(&|setup| setup.avail_ring = at), "avail at {at:#x}");
        assert!(at == 8 || refused(&|setup| setup.used_ring = at), "used at {at:#x}");
    }
    assert!(refused(&|setup| setup.used_ring = 2));
}

/// A request of the random test, and what is to come of it.
#[derive(Clone, Debug)]
enum DriverRequest {
    Read(u64, u32),
    Write(u64, u32),
    Flush,
    Id,
    Unknown,
    PastTheEnd,
}

fn wish() -> impl Strategy<Value = DriverRequest> {
    prop_oneof![
        4 => (0..200u64, 1..8u32).prop_map(|(sector, sectors)| DriverRequest::Read(sector, sectors)),
        3 => (0..8u64, 1..8u32).prop_map(|(sector, sectors)| DriverRequest::Write(300 + sector, sectors)),
        1 => Just(DriverRequest::Flush),
        1 => Just(DriverRequest::Id),
        1 => Just(DriverRequest::Unknown),
        1 => Just(DriverRequest::PastTheEnd),
    ]
}

impl DriverRequest {
    fn add(&self, driver: &mut Driver, indirect: bool) -> Option<u16> {
        match *self {
            DriverRequest::Read(sector, sectors) => {
                driver.add(IN, sector, &[], sectors as usize * 512, indirect)
            }
            DriverRequest::Write(sector, sectors) => {
                driver.add(OUT, sector, &vec![0x33; sectors as usize * 512], 0, indirect)
            }
            DriverRequest::Flush => driver.add(FLUSH, 0, &[], 0, indirect),
            DriverRequest::Id => driver.add(GET_ID, 0, &[], 20, indirect),
            DriverRequest::Unknown => driver.add(99, 0, &[], 0, indirect),
            DriverRequest::PastTheEnd => driver.add(IN, SECTORS - 1, &[], 1024, indirect),
        }
    }

    fn check(&self, driver: &Driver, head: u16, written: u32) {
        let expected = match *self {
            DriverRequest::Read(sector, sectors) => {
                let (start, len) = (sector as usize * 512, sectors as usize * 512);
                assert!(driver.data(head, len) == PATTERN[start..start + len], "{self:?}");
                (OK, sectors * 512 + 1)
            }
            DriverRequest::Write(..) | DriverRequest::Flush => (OK, 1),
            DriverRequest::Id => (OK, 21),
            DriverRequest::Unknown => (UNSUPP, 1),
            DriverRequest::PastTheEnd => (IOERR, 1),
        };
        assert_eq!((driver.status(head), written), expected, "{self:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Both sides sleep whenever the rules let them, and wake only when they are told; whoever moves next is
    /// drawn. Every request ends once, with what it asked for, and nobody sleeps for ever.
    #[test]
    fn no_request_and_no_wake_up_is_lost(
        wishes in prop::collection::vec((wish(), any::<bool>()), 1..120),
        log2_size in 0..=8u32,
        event_idx: bool,
        start in prop_oneof![Just(0u16), u16::MAX - 60..=u16::MAX, any::<u16>()],
        delay in 0..90u8,
        stale in 0..50u8,
        seed: u64,
    ) {
        let mut driver = Driver::new(1 << log2_size, event_idx, start);
        let faults = Faults { delay, stale, reorder: true, ..Faults::default() };
        let mut worker = Worker::new(driver.setup(device(), FEATURES), seed, faults);
        let mut random = crate::ring::sim::Random(seed);
        let mut wishes = wishes.into_iter();
        let mut waiting = wishes.next();
        let mut asked = std::collections::HashMap::new();
        let (mut driver_sleeps, mut worker_sleeps) = (false, false);
        while waiting.is_some() || driver.in_flight() > 0 {
            // Wakes the worker: a kick or a completion; the driver: a call.
            worker_sleeps &= !driver.kick.take() && worker.core.in_flight() == 0;
            driver_sleeps &= !driver.call.take();
            let lost = worker_sleeps && driver_sleeps;
            prop_assert!(!lost, "both sleep, with {} requests in flight", driver.in_flight());
            if driver_sleeps || !worker_sleeps && random.percent(50) {
                if !worker.pass() {
                    worker_sleeps = worker.vring.arm_kick();
                }
                continue;
            }
            driver.want_call(None);
            for (head, written) in driver.harvest() {
                let wish: DriverRequest = asked.remove(&head).unwrap();
                wish.check(&driver, head, written);
            }
            let old = driver.avail;
            for _ in 0..random.below(6) {
                let Some((wish, indirect)) = waiting.take() else { break };
                match wish.add(&mut driver, indirect) {
                    Some(head) => {
                        prop_assert!(asked.insert(head, wish).is_none());
                        waiting = wishes.next();
                    }
                    None => {
                        waiting = Some((wish, indirect));
                        break;
                    }
                }
            }
            if driver.must_kick(old) && driver.avail != old {
                driver.kick.ring();
            }
            if driver.in_flight() > 0 && random.percent(70) {
                // Ask for a call at the next completion, and look once more.
                driver.want_call(Some(driver.seen));
                driver_sleeps = !driver.anything();
            }
        }
        prop_assert_eq!(worker.vring.in_flight(), 0);
        prop_assert_eq!(worker.vring.next_avail(), driver.avail);
        prop_assert!(!driver.err.take());
    }
}
