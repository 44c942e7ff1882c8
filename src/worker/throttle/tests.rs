//! Workers in virtual time, each on a ring in memory: vrings with guests that always have another request, and slots that wait
//! as a ublk queue's do.

#![forbid(unsafe_code)]

use super::*;
use crate::block::{Data, Errno, Flags, Op};
use crate::engine::config::{MemoryConfig, VolumeConfig};
use crate::engine::limits::LimitsConfig;
use crate::engine::{Flushers, Volume, VolumeChannel, submit};
use crate::frontend::ublk::QuiesceFlag;
use crate::frontend::vhost_user::driver::{Driver, device};
use crate::frontend::vhost_user::{Stopped, Vring, VringSetup};
use crate::ring::Tasks;
use crate::ring::sim::{Faults, SimRing};
use std::collections::BTreeMap;
use std::pin::Pin;

const SECOND: u64 = 1_000_000_000;
const IN: u32 = 0;
const OUT: u32 = 1;
const DEPTH: usize = 16;

type Slot = Pin<Box<dyn Future<Output = ()>>>;

/// Limits of volumes by name.
fn limits<const N: usize>(volumes: [(&str, &str); N]) -> [Arc<Limits>; N] {
    let config = |json| serde_json::from_str::<LimitsConfig>(json).unwrap();
    let configs: BTreeMap<_, _> =
        volumes.iter().map(|(name, json)| ((*name).to_owned(), config(json))).collect();
    let limits = Limits::of(&configs);
    volumes.map(|(name, _)| limits[name].clone())
}

fn change(limits: &Limits, json: &str) {
    limits.change(&serde_json::from_str(json).unwrap()).unwrap();
}

/// A vring with its guest.
struct Guest {
    driver: Driver,
    vring: Rc<Vring>,
    admission: Rc<Admission>,
    volume: Rc<VolumeChannel<SimRing>>,
    flushers: Arc<Flushers>,
    slots: Vec<u32>,
    /// What it asks for again and again: a kind and bytes.
    repeats: Option<(u32, usize)>,
    done: u64,
}

struct Worker {
    core: Rc<Core<SimRing>>,
    tasks: Tasks<SimRing, Slot>,
    timer: ThrottleTimer,
    guests: Vec<Guest>,
}

impl Worker {
    fn new() -> Worker {
        let core = Core::new(SimRing::new(1, Faults::default()));
        core.ring().advance(SECOND);
        Worker { tasks: Tasks::new(core.clone()), core, timer: ThrottleTimer::new(), guests: Vec::new() }
    }

    fn guest(&mut self, limits: &Arc<Limits>, repeats: Option<(u32, usize)>) -> usize {
        let driver = Driver::new(128, false, 0);
        let setup = driver.setup(device(), 0);
        self.start(driver, setup, limits, repeats)
    }

    fn start(
        &mut self,
        driver: Driver,
        setup: VringSetup,
        limits: &Arc<Limits>,
        repeats: Option<(u32, usize)>,
    ) -> usize {
        let config: MemoryConfig = serde_json::from_str(r#"{"size": 262144}"#).unwrap();
        let volume = Arc::new(Volume::open("a", &VolumeConfig::Memory(config)).unwrap());
        let guest = Guest {
            driver,
            vring: Rc::new(Vring::new(setup).unwrap()),
            admission: Rc::new(self.timer.admission(limits)),
            flushers: Arc::new(Flushers::new(&volume, 1)),
            volume: Rc::new(volume.attach(&self.core, false)),
            slots: Vec::new(),
            repeats,
            done: 0,
        };
        self.guests.push(guest);
        self.guests.len() - 1
    }

    /// What a worker's loop does in a pass. Whether there was anything.
    fn pass(&mut self) -> bool {
        let mut cqes = Vec::new();
        self.core.ring().reap(&mut cqes);
        let mut worked = !cqes.is_empty();
        for cqe in &cqes {
            match cqe.user_data.kind() {
                Some(Kind::Slot) => self.tasks.complete(cqe),
                Some(Kind::Throttle) if self.timer.expired(cqe.user_data) => {}
                _ => {}
            }
        }
        worked |= self.tasks.run_ready();
        for guest in &mut self.guests {
            let news = guest.vring.begin_pass();
            guest.done += guest.driver.harvest().len() as u64;
            while let Some((kind, bytes)) = guest.repeats.filter(|_| guest.driver.in_flight() < DEPTH) {
                let data = vec![0xab; if kind == OUT { bytes } else { 0 }];
                guest.driver.add(kind, 8, &data, if kind == IN { bytes } else { 0 }, false).unwrap();
            }
            worked |= news;
            while let Some(tag) = guest.admission.poll(&*guest.vring, self.core.ring(), || true) {
                worked = true;
                match guest.slots.get(usize::from(tag)) {
                    Some(slot) => self.tasks.poll(*slot),
                    None => {
                        let (vring, volume, flushers) =
                            (guest.vring.clone(), guest.volume.clone(), guest.flushers.clone());
                        let serve = |io| Box::pin(serve(io, vring, volume, flushers, tag)) as Slot;
                        guest.slots.push(self.tasks.add(serve));
                    }
                }
            }
        }
        let dues = self.guests.iter().filter_map(|guest| guest.admission.due());
        self.timer.arm(&self.core, dues);
        self.core.ring().enter(false).unwrap();
        worked
    }

    fn settle(&mut self) {
        while self.pass() {}
    }

    fn limits_changed(&self) {
        self.guests.iter().for_each(|guest| guest.admission.look_again(&self.core));
    }
}

async fn serve(
    io: Io<SimRing>,
    vring: Rc<Vring>,
    volume: Rc<VolumeChannel<SimRing>>,
    flushers: Arc<Flushers>,
    tag: u16,
) {
    let mut state = <Vring as Source<SimRing>>::State::default();
    while let Some(request) = vring.next(&io, tag, &mut state).await {
        let result = submit(&volume, &io, flushers.queue(0), &request).await;
        Source::<SimRing>::complete(&*vring, tag, &mut state, result);
    }
}

/// Lets all of them work until so much time is over. What each guest got done, worker by worker.
fn run(workers: &mut [Worker], seconds: u64) -> Vec<u64> {
    let end = workers[0].core.ring().now() + seconds * SECOND;
    workers.iter_mut().flat_map(|worker| &mut worker.guests).for_each(|guest| guest.done = 0);
    loop {
        workers.iter_mut().for_each(Worker::settle);
        let next = workers.iter().filter_map(|worker| worker.core.ring().next_timeout()).min();
        let Some(next) = next.filter(|next| *next < end) else { break };
        workers.iter().for_each(|worker| worker.core.ring().advance(next));
    }
    workers.iter().for_each(|worker| worker.core.ring().advance(end));
    workers.iter_mut().for_each(Worker::settle);
    workers.iter().flat_map(|worker| &worker.guests).map(|guest| guest.done).collect()
}

#[track_caller]
fn within(value: u64, percent: f64, of: f64) {
    let off = (value as f64 - of).abs();
    assert!(off <= of * percent / 100.0, "{value} is not within {percent} % of {of}");
}

#[test]
fn a_vring_gets_what_its_limits_allow() {
    for (numbers, request, expected) in [
        (r#"{"iops-total": 1000}"#, (IN, 4096), 10_000.0),
        (r#"{"iops-read": 1000}"#, (IN, 512), 10_000.0),
        (r#"{"iops-write": 100}"#, (OUT, 4096), 1000.0),
        (r#"{"bps-total": 4096000}"#, (OUT, 4096), 10_000.0),
        (r#"{"bps-read": 1024000}"#, (IN, 2048), 5000.0),
        (r#"{"bps-write": 1024000}"#, (OUT, 512), 20_000.0),
        (r#"{"iops-total": 1000, "iops-size": 1024}"#, (IN, 4096), 2500.0),
        (r#"{"iops-total": 10, "iops-total-max": 1000, "iops-total-max-length": 30}"#, (IN, 512), 10_000.0),
    ] {
        let [of] = limits([("a", numbers)]);
        let mut workers = [Worker::new()];
        workers[0].guest(&of, Some(request));
        run(&mut workers, 1);
        within(run(&mut workers, 10)[0], 1.0, expected);
        assert!((9_000..=11_000).contains(&of.throttled().as_millis()), "{numbers}: {:?}", of.throttled());
    }
}

#[test]
fn what_waits_stays_in_the_ring() {
    let [of] = limits([("a", r#"{"iops-total": 10}"#)]);
    let mut worker = Worker::new();
    let guest = worker.guest(&of, None);
    for _ in 0..30 {
        worker.guests[guest].driver.add(IN, 0, &[], 512, false).unwrap();
    }
    worker.settle();
    let Guest { driver, vring, admission, .. } = &worker.guests[guest];
    // Two were below the size of the bucket.
    assert_eq!((vring.in_flight(), vring.next_avail(), driver.in_flight()), (0, 2, 28));
    assert!(vring.is_held() && admission.waits() && !vring.expects_more() && !vring.try_idle());
    assert_eq!(worker.guests[guest].slots.len(), 1, "those that wait have none");
}

#[test]
fn those_beside_it_do_not_wait() {
    let [slow, fast] = limits([("slow", r#"{"iops-total": 10}"#), ("fast", "{}")]);
    let mut worker = Worker::new();
    worker.guest(&slow, Some((IN, 512)));
    let other = worker.guest(&fast, None);
    worker.settle();
    let before = worker.core.ring().now();
    for _ in 0..1000 {
        worker.guests[other].driver.add(OUT, 0, &[7; 512], 0, false).unwrap();
        worker.settle();
    }
    assert_eq!(worker.guests[other].done, 1000);
    assert_eq!(worker.core.ring().now(), before, "no time has passed");
    assert_eq!(worker.guests[0].done, 2);
    assert_eq!(fast.throttled(), Duration::ZERO);
    let timers = worker.core.ring().count(|sqe| matches!(sqe, Sqe::Timeout { .. }));
    assert_eq!(timers, 1, "one, as long as nothing changes");
}

/// What a VMM does that stops the vring, and goes on with it elsewhere.
#[test]
fn a_stop_does_not_wait_and_the_next_one_goes_on() {
    let [of] = limits([("a", r#"{"iops-total": 10}"#)]);
    let mut worker = Worker::new();
    let guest = worker.guest(&of, None);
    for _ in 0..20 {
        worker.guests[guest].driver.add(IN, 0, &[], 512, false).unwrap();
    }
    worker.settle();
    let Guest { driver, vring, done, .. } = worker.guests.remove(guest);
    vring.stop();
    assert_eq!((vring.in_flight(), done), (0, 2));
    assert_eq!(vring.stopped(), Stopped { next_avail: 2, unfinished: vec![] });
    let setup = VringSetup { next_avail: 2, ..driver.setup(device(), 0) };
    let mut workers = [Worker::new()];
    workers[0].start(driver, setup, &of, None);
    assert_eq!(run(&mut workers, 10), [18]);
    assert_eq!(workers[0].guests[0].driver.in_flight(), 0);
}

#[test]
fn a_pause_is_no_wait_for_limits() {
    let [of, other] = limits([("a", r#"{"iops-total": 10, "group": "g"}"#), ("b", r#"{"group": "g"}"#)]);
    let mut workers = [Worker::new()];
    workers[0].guest(&of, Some((IN, 512)));
    run(&mut workers, 1);
    assert!(workers[0].guests[0].admission.waits());
    workers[0].guests[0].vring.enable(false);
    run(&mut workers, 2);
    assert_eq!(run(&mut workers, 5), [0]);
    assert!(!workers[0].guests[0].admission.waits(), "it would be waited for by the others of its group");
    assert!(workers[0].core.ring().next_timeout().is_none());
    workers[0].guest(&other, Some((IN, 512)));
    run(&mut workers, 1);
    within(run(&mut workers, 10)[1], 2.0, 100.0);
    workers[0].guests[0].vring.enable(true);
    run(&mut workers, 1);
    run(&mut workers, 10).iter().for_each(|done| within(*done, 5.0, 50.0));
}

#[test]
fn limits_that_are_taken_off_or_raised_hold_nobody() {
    let [of] = limits([("a", r#"{"iops-total": 1}"#)]);
    let mut worker = Worker::new();
    let guest = worker.guest(&of, None);
    for _ in 0..40 {
        worker.guests[guest].driver.add(IN, 0, &[], 512, false).unwrap();
    }
    worker.settle();
    assert_eq!(worker.guests[guest].done, 1);
    change(&of, r#"{"iops-total": 100}"#);
    worker.limits_changed();
    worker.settle();
    assert_eq!(worker.guests[guest].done, 12, "a tenth of a second's, and one");
    change(&of, r#"{"iops-total": 0}"#);
    worker.limits_changed();
    worker.settle();
    assert_eq!(worker.guests[guest].done, 40);
    assert_eq!(worker.core.ring().now(), SECOND);
    let Guest { vring, admission, .. } = &worker.guests[guest];
    assert!(!vring.is_held() && !admission.waits());
    // And put on again while it runs.
    change(&of, r#"{"iops-total": 100}"#);
    worker.guests[guest].repeats = Some((IN, 512));
    let mut workers = [worker];
    run(&mut workers, 1);
    within(run(&mut workers, 10)[0], 1.0, 1000.0);
}

#[test]
fn workers_together_do_not_exceed_the_limit() {
    let [of] = limits([("a", r#"{"iops-total": 3000, "bps-total": "1G"}"#)]);
    let mut workers = [Worker::new(), Worker::new(), Worker::new()];
    for worker in &mut workers {
        worker.guest(&of, Some((IN, 512)));
    }
    run(&mut workers, 1);
    let done = run(&mut workers, 10);
    within(done.iter().sum(), 1.0, 30_000.0);
    done.iter().for_each(|each| within(*each, 5.0, 10_000.0));
}

#[test]
fn volumes_of_a_group_share_alike_on_all_workers() {
    let [a, b, c] = limits([
        ("a", r#"{"iops-total": 3000, "group": "g"}"#),
        ("b", r#"{"group": "g"}"#),
        ("c", r#"{"iops-total": 3000, "group": "g"}"#),
    ]);
    let mut workers = [Worker::new(), Worker::new()];
    workers[0].guest(&a, Some((IN, 512)));
    workers[0].guest(&b, Some((OUT, 4096)));
    workers[1].guest(&b, Some((IN, 512)));
    workers[1].guest(&b, Some((IN, 512)));
    workers[1].guest(&c, Some((OUT, 512)));
    run(&mut workers, 1);
    let done = run(&mut workers, 10);
    within(done.iter().sum(), 1.0, 30_000.0);
    for of in [done[0], done[1..4].iter().sum(), done[4]] {
        within(of, 5.0, 10_000.0);
    }
}

/// A guest that shows a small request and would have a large one carried out, elsewhere.
#[test]
fn what_is_let_in_is_what_was_looked_at() {
    let [of] = limits([("a", r#"{"bps-total": 5120}"#)]);
    let mut worker = Worker::new();
    let guest = worker.guest(&of, None);
    let driver = &mut worker.guests[guest].driver;
    driver.add(IN, 0, &[], 4096, false).unwrap();
    let head = driver.add(OUT, 3, &[0x11; 512], 0, false).unwrap();
    let at = driver.avail;
    let other = driver.add(OUT, 100, &[0x22; 4096], 0, false).unwrap();
    worker.settle();
    assert!(worker.guests[guest].vring.is_held());
    let driver = &mut worker.guests[guest].driver;
    // Its sector, and the ring's element.
    driver.put(driver.area(head) + 8, &77u64.to_le_bytes());
    driver.put(crate::frontend::vhost_user::driver::AVAIL + 4 + 2 * u64::from(at - 1), &other.to_le_bytes());
    worker.core.ring().advance(60 * SECOND);
    worker.settle();
    let driver = &worker.guests[guest].driver;
    assert_eq!((driver.status(head), driver.status(other)), (0, 0));
    change(&of, r#"{"bps-total": 0}"#);
    worker.limits_changed();
    for (sector, byte) in [(3, 0x11), (77, 0), (100, 0x22)] {
        let head = worker.guests[guest].driver.add(IN, sector, &[], 512, false).unwrap();
        worker.settle();
        assert_eq!(worker.guests[guest].driver.data(head, 512), vec![byte; 512], "sector {sector}");
    }
}

/// A source as a ublk queue is one, of which only that is asked where its requests wait.
#[derive(Default)]
struct Delivered(QuiesceFlag);

impl Source<SimRing> for Delivered {
    type State = ();

    async fn next<'a>(&'a self, _: &Io<SimRing>, _: u16, (): &'a mut ()) -> Option<Request<'a>> {
        None
    }

    fn complete(&self, _: u16, (): &mut (), _: Result<(), Errno>) {}

    fn limit_wait(&self) -> Option<LimitWait> {
        Some(self.0.limit_wait())
    }
}

/// Slots as those of a ublk queue: each has a request from the start.
struct Tags {
    core: Rc<Core<SimRing>>,
    tasks: Tasks<SimRing, Slot>,
    timer: ThrottleTimer,
    admission: Rc<Admission>,
    source: Rc<Delivered>,
    gone: Rc<RefCell<Vec<usize>>>,
    slots: Vec<u32>,
}

impl Tags {
    fn new(limits: &Arc<Limits>, count: usize) -> Tags {
        let core = Core::new(SimRing::new(1, Faults::default()));
        core.ring().advance(SECOND);
        let timer = ThrottleTimer::new();
        let (admission, source, gone) =
            (Rc::new(timer.admission(limits)), Rc::<Delivered>::default(), Rc::default());
        let mut tags =
            Tags { tasks: Tasks::new(core.clone()), core, timer, admission, source, gone, slots: vec![] };
        for tag in 0..count {
            let (admission, source, gone) = (tags.admission.clone(), tags.source.clone(), tags.gone.clone());
            let slot = tags.tasks.add(|io| {
                Box::pin(async move {
                    let request = Request {
                        op: Op::Write,
                        flags: Flags::default(),
                        sector: 0,
                        sectors: 8,
                        data: Data::None,
                    };
                    admission.pass(&io, &*source, &request).await;
                    gone.borrow_mut().push(tag);
                    pending().await
                }) as Slot
            });
            tags.slots.push(slot);
        }
        tags
    }

    /// Until nothing is due before `end`.
    fn run(&mut self, end: u64) {
        loop {
            let mut cqes = Vec::new();
            self.core.ring().reap(&mut cqes);
            if cqes.iter().any(|cqe| self.timer.expired(cqe.user_data)) {
                self.admission.wake(&self.core);
            }
            self.tasks.run_ready();
            self.timer.arm(&self.core, self.admission.due().into_iter());
            self.core.ring().enter(false).unwrap();
            match self.core.ring().next_timeout().filter(|next| *next <= end) {
                Some(next) => self.core.ring().advance(next),
                None => return,
            }
        }
    }
}

#[test]
fn slots_go_in_their_order_and_at_their_rate() {
    let [of] = limits([("a", r#"{"iops-write": 100}"#)]);
    let mut tags = Tags::new(&of, 128);
    tags.run(SECOND + SECOND / 100);
    assert_eq!(tags.gone.borrow().len(), 12, "a tenth of a second's, one, and that of this moment");
    tags.run(2 * SECOND);
    assert_eq!(*tags.gone.borrow(), (0..111).collect::<Vec<_>>());
    tags.run(3 * SECOND);
    assert_eq!(tags.gone.borrow().len(), 128);
    assert!(!tags.admission.waits() && tags.core.ring().next_timeout().is_none());
}

#[test]
fn slots_of_a_device_that_goes_do_not_wait() {
    let [of] = limits([("a", r#"{"iops-write": 1}"#)]);
    let mut tags = Tags::new(&of, 128);
    tags.run(SECOND);
    assert_eq!(tags.gone.borrow().len(), 1);
    tags.source.0.lift_limits();
    tags.admission.look_again(&tags.core);
    tags.run(SECOND);
    assert_eq!(*tags.gone.borrow(), (0..128).collect::<Vec<_>>());
    assert!(!tags.admission.waits());
}

#[test]
fn slots_of_a_device_that_is_handed_over_never_go() {
    let [of] = limits([("a", r#"{"iops-write": 100}"#)]);
    let mut tags = Tags::new(&of, 128);
    tags.run(SECOND);
    let gone = tags.gone.borrow().len();
    tags.source.0.set();
    tags.run(100 * SECOND);
    change(&of, r#"{"iops-write": 0}"#);
    tags.admission.look_again(&tags.core);
    tags.run(200 * SECOND);
    assert_eq!(tags.gone.borrow().len(), gone);
    assert!(!tags.admission.waits(), "others of its group do not wait for it");
}

#[test]
fn slots_go_on_when_limits_are_taken_off() {
    let [of] = limits([("a", r#"{"iops-write": 1}"#)]);
    let mut tags = Tags::new(&of, 8);
    tags.run(SECOND);
    change(&of, r#"{"iops-write": 0}"#);
    tags.admission.look_again(&tags.core);
    tags.run(SECOND);
    assert_eq!(*tags.gone.borrow(), (0..8).collect::<Vec<_>>());
}

#[test]
fn a_slot_that_ends_gives_its_place_up() {
    let [of] = limits([("a", r#"{"iops-write": 1}"#)]);
    let mut tags = Tags::new(&of, 4);
    tags.run(SECOND);
    let first = tags.slots[1];
    tags.tasks.remove(first);
    tags.run(5 * SECOND);
    assert_eq!(*tags.gone.borrow(), [0, 2, 3]);
}
