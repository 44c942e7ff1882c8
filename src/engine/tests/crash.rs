//! The power goes at any moment: what was promised to be on stable storage is there.
//!
//! Requests of several slots change the same sectors at once, with faults in between. Each sector keeps a history of
//! its changes, and with it which of them a cut may leave: the last one that is durable, or one that is not known to
//! have been over when that began.
//!
//! The store also loses writes that were acknowledged and are not stable, and tells one sync of it. Each slot is a client
//! of its own. Its flush that fails says that what was acknowledged before its end may be gone, and nothing else; its
//! flush that succeeds vouches for everything acknowledged since, and only if it has heard of each loss.

use super::*;
use crate::engine::config::{OnError, PolicyConfig};
use crate::engine::submit;
use crate::ring::{Io, Ring, Tasks};
use std::cell::RefCell;
use std::future::Future;

/// Sectors of the volume: few, so that requests meet.
const SECTORS: u64 = 24;
/// The most sectors of a request.
const MOST: u32 = 6;

/// A request of one slot.
#[derive(Clone, Debug)]
pub struct Step {
    op: Op,
    flags: Flags,
    sector: u64,
    sectors: u32,
}

fn step(all: u64) -> impl Strategy<Value = Step> {
    let op = prop_oneof![
        5 => Just(Op::Write),
        2 => Just(Op::Flush),
        1 => Just(Op::Discard),
        2 => Just(Op::WriteZeroes),
    ];
    let flags = (prop::bool::weighted(0.3), any::<bool>()).prop_map(|(fua, unmap)| Flags { fua, unmap });
    (op, flags, 0..all - u64::from(MOST), 1..=MOST).prop_map(|(op, flags, sector, sectors)| match op {
        Op::Flush => Step { op, flags: Flags::default(), sector: 0, sectors: 0 },
        Op::Write => Step { op, flags: Flags { unmap: false, ..flags }, sector, sectors },
        Op::Discard => Step { op, flags: Flags::default(), sector, sectors },
        _ => Step { op, flags, sector, sectors },
    })
}

/// What a few slots ask for, of a disk with so many sectors.
pub fn slots(sectors: u64) -> impl Strategy<Value = Vec<Vec<Step>>> {
    prop::collection::vec(prop::collection::vec(step(sectors), 1..16), 1..8)
}

/// One change of one sector.
struct Change {
    request: u64,
    /// What it makes of the sector; `None` for a discard, which may make anything of it.
    bytes: Option<[u8; 512]>,
    begun: u64,
    /// When it was acknowledged.
    ended: Option<u64>,
    durable: bool,
}

/// What happened, sector by sector. Time counts beginnings and ends.
pub struct History {
    sectors: Vec<Vec<Change>>,
    now: u64,
}

impl History {
    pub fn new(bytes: &[u8]) -> History {
        let first = |bytes: &[u8]| {
            let bytes = Some(bytes.try_into().unwrap());
            vec![Change { request: 0, bytes, begun: 0, ended: Some(0), durable: true }]
        };
        History { sectors: bytes.chunks_exact(512).map(first).collect(), now: 0 }
    }

    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// A request begins, and is called by the time of it. What it writes is its own.
    fn begin(&mut self, step: &Step) -> u64 {
        let request = self.tick();
        for number in step.range() {
            let bytes = match step.op {
                Op::Write => Some(pattern(request, number)),
                Op::WriteZeroes => Some([0; 512]),
                _ => None,
            };
            let change = Change { request, bytes, begun: request, ended: None, durable: false };
            self.sectors[number as usize].push(change);
        }
        request
    }

    /// It is acknowledged. `told`: when its client was last told of a loss.
    fn end(&mut self, request: u64, step: &Step, told: u64) {
        let now = self.tick();
        if step.op == Op::Flush {
            let changes = self.sectors.iter_mut().flatten();
            changes
                .filter(|change| change.ended.is_some_and(|ended| told < ended && ended < request))
                .for_each(|of| of.durable = true);
        }
        for number in step.range() {
            let changes = &mut self.sectors[number as usize];
            let change = changes.iter_mut().find(|change| change.request == request).unwrap();
            change.ended = Some(now);
            change.durable |= step.flags.fua;
        }
    }

    /// The power stays, and whoever worked is gone: what was acknowledged is there.
    pub fn killed(mut self) -> History {
        for change in self.sectors.iter_mut().flatten() {
            change.durable |= change.ended.is_some();
        }
        self
    }

    /// Holds against it what the cut has left.
    pub fn check(&self, left: &[u8]) {
        for (number, (changes, found)) in self.sectors.iter().zip(left.chunks_exact(512)).enumerate() {
            let newest_begin = changes.iter().filter(|of| of.durable).map(|of| of.begun).max().unwrap();
            let may_stay = |of: &&Change| of.ended.is_none_or(|ended| ended >= newest_begin);
            let explained = |of: &Change| of.bytes.is_none_or(|bytes| bytes == found);
            assert!(
                changes.iter().filter(may_stay).any(explained),
                "sector {number} has lost what was durable"
            );
        }
    }
}

impl Step {
    fn range(&self) -> std::ops::Range<u64> {
        self.sector..self.sector + u64::from(self.sectors)
    }
}

fn pattern(request: u64, sector: u64) -> [u8; 512] {
    Random(request << 32 | sector).bytes(512).try_into().unwrap()
}

async fn live(
    io: Io<SimRing>,
    core: Rc<Core<SimRing>>,
    volume: Rc<VolumeChannel<SimRing>>,
    history: Rc<RefCell<History>>,
    steps: Vec<Step>,
) {
    let memory = mapping(MOST as usize * 512);
    let flusher = Flusher::default();
    // When it was last told of a loss, and how many there had been by then.
    let (mut told, mut heard) = (0, 0);
    for step in steps {
        let called = history.borrow_mut().begin(&step);
        let losses = core.ring().losses();
        let iovecs = [memory.iovec(0, step.sectors as usize * 512)];
        let data = if step.op == Op::Write { Data::of(&iovecs) } else { Data::None };
        if step.op == Op::Write {
            let bytes: Vec<u8> = step.range().flat_map(|sector| pattern(called, sector)).collect();
            put(memory, 0, &bytes);
        }
        let Step { op, flags, sector, sectors } = step;
        let result = submit(&volume, &io, &flusher, &Request { op, flags, sector, sectors, data }).await;
        if result.is_ok() {
            assert!(op != Op::Flush || losses <= heard, "it vouches for what was lost, and never said so");
            history.borrow_mut().end(called, &step, told);
        } else if op == Op::Flush {
            (told, heard) = (history.borrow_mut().tick(), core.ring().losses());
        }
        // Any other that fails may have been done in part, now or never.
    }
}

/// Has all slots work on the volume at once, up to so many completions.
pub fn work_until_cut(
    core: &Rc<Core<SimRing>>,
    volume: &Rc<VolumeChannel<SimRing>>,
    history: &Rc<RefCell<History>>,
    slots: Vec<Vec<Step>>,
    cut_after: usize,
) {
    let mut tasks = Tasks::new(core.clone());
    for steps in slots {
        tasks.add(|io| live(io, core.clone(), volume.clone(), history.clone(), steps));
    }
    run_until_cut(core, &mut tasks, cut_after);
}

/// Runs everything up to so many completions.
fn run_until_cut<F: Future<Output = ()>>(
    core: &Core<SimRing>,
    tasks: &mut Tasks<SimRing, F>,
    mut left: usize,
) {
    let mut cqes = Vec::new();
    while tasks.run_ready() || core.in_flight() > 0 {
        core.ring().enter(core.in_flight() > 0).unwrap();
        core.ring().reap(&mut cqes);
        for cqe in cqes.drain(..) {
            if left == 0 {
                return;
            }
            left -= 1;
            tasks.complete(&cqe);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn what_was_promised_survives_a_power_cut(
        slots in slots(SECTORS),
        faults in faults(),
        seed: u64,
        retry: bool,
        cut_after in 0..120usize,
        written_back in 0..=100u8,
        lost in prop_oneof![Just(0), 1..40u8],
    ) {
        let (file, bytes) = image("/tmp", SECTORS as usize * 512);
        let on_error = if retry { OnError::Retry } else { OnError::Report };
        let policy = PolicyConfig { on_error, retry_for: None, required: None };
        let volume = open(file.path(), false, None).with_policy(policy);
        // Whole sectors.
        let faults = Faults { direct: Some((1, 512)), lost, ..faults };
        let core = Core::new(SimRing::new(seed, faults));
        let channel = Rc::new(volume.attach(&core, false));
        let history = Rc::new(RefCell::new(History::new(&bytes)));
        work_until_cut(&core, &channel, &history, slots, cut_after);
        core.ring().power_cut(written_back);
        history.borrow().check(&core.ring().contents().unwrap());
    }
}
