//! Volumes held against a byte array.
//!
//! A [`Plan`] gives each slot a share of the disk that is its own, and a list of operations on it. All slots
//! run at once, so the array says at any time what every sector must read as, whatever the ring does with the
//! order; a flush concerns the shares of all.

use crate::block::{Data, Errno, Flags, Iovec, Op, Request};
use crate::engine::{Flusher, VolumeChannel, submit};
use crate::ring::sim::{Faults, Random, SimRing, get, put};
use crate::ring::{Core, Io, Kind, Mapping, Ring, Tasks, Uring};
use proptest::prelude::*;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;

/// One operation of a slot, on blocks of its share.
#[derive(Clone, Debug)]
pub struct Step {
    pub op: Op,
    pub flags: Flags,
    /// First block and number of blocks; brought into the share where they reach past it.
    pub at: usize,
    pub blocks: usize,
    /// Where the data is cut into ranges, in parts of 2^16 of its length.
    pub cuts: Vec<u16>,
    /// Cuts are at multiples of it.
    pub unit: usize,
    /// The ranges start this far from a page's start.
    pub skew: usize,
}

/// Each slot's operations.
pub type Plan = Vec<Vec<Step>>;

/// Blocks in a slot's share. An odd number: shares start in the middle of pages.
pub const SHARE: usize = 37;

fn step() -> impl Strategy<Value = Step> {
    let op = prop_oneof![
        3 => Just(Op::Read),
        4 => Just(Op::Write),
        2 => Just(Op::Flush),
        1 => Just(Op::Discard),
        2 => Just(Op::WriteZeroes),
    ];
    let skew = prop_oneof![3 => Just(0), 1 => Just(1), 1 => Just(8), 1 => Just(512)];
    let unit = prop_oneof![2 => Just(512), 1 => Just(1), 1 => Just(4096)];
    let flags = (any::<bool>(), any::<bool>()).prop_map(|(fua, unmap)| Flags { fua, unmap });
    let cuts = prop::collection::vec(any::<u16>(), 0..4);
    (op, flags, 0..SHARE, 0..12usize, cuts, unit, skew).prop_map(
        |(op, flags, at, blocks, cuts, unit, skew)| Step { op, flags, at, blocks, cuts, unit, skew },
    )
}

/// A few slots with a few operations each.
pub fn plan() -> impl Strategy<Value = Plan> {
    prop::collection::vec(prop::collection::vec(step(), 0..12), 1..5)
}

/// Every mix of faults, each of them often absent.
pub fn faults() -> impl Strategy<Value = Faults> {
    let often = || prop_oneof![2 => Just(0u8), 1 => 1..70u8];
    let seldom = || prop_oneof![3 => Just(0u8), 1 => 1..40u8];
    let transient = (often(), seldom(), seldom());
    let errors = (seldom(), seldom(), seldom());
    let order = (often(), often(), any::<bool>());
    let lacks = (any::<bool>(), any::<bool>(), any::<bool>());
    (transient, errors, order, lacks).prop_map(
        |((short, again, interrupted), (io_error, no_space, sync_error), order, lacks)| {
            let (no_punch, no_zero_range, no_nowait) = lacks;
            Faults {
                short,
                again,
                interrupted,
                io_error,
                no_space,
                sync_error,
                lost: 0,
                delay: order.0,
                stale: order.1,
                reorder: order.2,
                no_punch,
                no_zero_range,
                no_discard: false,
                busy_discard: false,
                busy_fallocate: false,
                no_nowait,
                direct: None,
            }
        },
    )
}

/// What a test wants to know of a ring besides.
pub trait Tested: Ring {
    /// What a power cut would leave of the volume, where that can be known.
    fn stable(&self) -> Option<Vec<u8>>;
}

impl Tested for SimRing {
    fn stable(&self) -> Option<Vec<u8>> {
        SimRing::stable(self)
    }
}

impl Tested for Uring {
    fn stable(&self) -> Option<Vec<u8>> {
        None
    }
}

/// The byte array, and how far it can be relied on, sector by sector.
pub struct Model {
    bytes: Vec<u8>,
    sectors: Vec<Sector>,
    /// Flushes that failed. What is written while one fails may be lost without another word.
    failed_flushes: u32,
    /// Flushes that have not ended.
    flushing: u32,
    /// Makes the contents of every write different.
    writes: u32,
}

#[derive(Clone, Copy)]
struct Sector {
    /// After a failed write or a discard it may read as anything.
    undefined: bool,
    /// Written and acknowledged: the next flush makes it stable.
    acknowledged: bool,
    /// Changes begun.
    version: u32,
}

/// Everything the slots of one run share.
pub struct Run<R: Ring> {
    pub volume: VolumeChannel<R>,
    pub model: RefCell<Model>,
    /// All slots are of one queue.
    flusher: Flusher,
    faults: Faults,
    /// A null volume keeps nothing.
    keeps: bool,
    /// The volume's bytes, of those of its store.
    view: Box<dyn Fn(Vec<u8>) -> Vec<u8>>,
    /// A store that fails once may have requests fail that have nothing to do with it.
    gives_up: bool,
    done: Cell<usize>,
}

impl<R: Tested> Run<R> {
    /// A run on a volume that holds `bytes`.
    pub fn new(volume: VolumeChannel<R>, bytes: Vec<u8>, faults: Faults, keeps: bool) -> Run<R> {
        let sector = Sector { undefined: false, acknowledged: true, version: 0 };
        let sectors = vec![sector; bytes.len() / 512];
        let model = RefCell::new(Model { bytes, sectors, failed_flushes: 0, flushing: 0, writes: 0 });
        let flusher = Flusher::default();
        let view = Box::new(|store| store);
        Run { volume, model, flusher, faults, keeps, view, gives_up: false, done: Cell::new(0) }
    }

    /// The same where the volume begins so many bytes into its store.
    pub fn after(self, front: usize) -> Run<R> {
        self.seen(move |mut store| store.split_off(front))
    }

    /// The same where `view` gives the volume's bytes of its store's.
    pub fn seen(self, view: impl Fn(Vec<u8>) -> Vec<u8> + 'static) -> Run<R> {
        Run { view: Box::new(view), ..self }
    }

    /// The same where a store that fails once is not trusted any more.
    pub fn giving_up(self) -> Run<R> {
        Run { gives_up: true, ..self }
    }

    /// What a power cut would leave of the volume, where that can be known.
    fn stable(&self, io: &Io<R>) -> Option<Vec<u8>> {
        io.core().ring().stable().map(&self.view)
    }

    /// Carries `plan` out, checking every step, and then reads everything back, through a ring that makes no
    /// faults if the caller saw to it in `calm`.
    pub fn run(self, core: &Rc<Core<R>>, plan: &Plan, calm: impl Fn(&R)) {
        let run = Rc::new(self);
        let mut tasks = Tasks::new(core.clone());
        let life = |io, run, slot, steps| async move { Run::live(&io, run, slot, steps).await };
        for (slot, steps) in plan.iter().enumerate() {
            tasks.add(|io| life(io, run.clone(), slot, steps.clone()));
        }
        settle(core, &mut tasks);
        calm(core.ring());
        let whole = (0..plan.len()).map(|slot| {
            (slot, vec![Step { blocks: SHARE, at: 0, ..Step::plain(Op::Read) }, Step::plain(Op::Flush)])
        });
        for (slot, steps) in whole {
            tasks.add(|io| life(io, run.clone(), slot, steps));
        }
        settle(core, &mut tasks);
        let steps = plan.iter().map(Vec::len).sum::<usize>() + 2 * plan.len();
        assert_eq!(run.done.get(), steps, "each request ends once");
    }

    async fn live(io: &Io<R>, run: Rc<Run<R>>, slot: usize, steps: Vec<Step>) {
        for step in steps {
            match step.op {
                Op::Flush => run.flush(io).await,
                Op::Read | Op::Write => run.transfer(io, slot, &step).await,
                Op::Discard | Op::WriteZeroes => run.clear(io, slot, &step).await,
            }
            run.done.set(run.done.get() + 1);
        }
    }

    /// The bytes a step of `slot` is about.
    fn range(&self, slot: usize, step: &Step) -> std::ops::Range<usize> {
        let block = self.volume.geometry().logical_block as usize;
        let blocks = step.blocks.min(SHARE - step.at);
        let start = (slot * SHARE + step.at) * block;
        start..start + blocks * block
    }

    async fn transfer(&self, io: &Io<R>, slot: usize, step: &Step) {
        let range = self.range(slot, step);
        let lengths = step.lengths(range.len());
        // Each range with a page of its own, at least, around it.
        let places: Vec<(usize, usize)> = lengths
            .iter()
            .scan(4096, |at, len| {
                let place = (*at + step.skew, *len);
                *at += (step.skew + len).next_multiple_of(4096) + 4096;
                Some(place)
            })
            .collect();
        let end = places.last().map_or(0, |(at, len)| at + len);
        let memory = Mapping::anonymous(end.next_multiple_of(4096) + 4096).unwrap();
        let mut expected = vec![0xa5; memory.len()];
        if step.op == Op::Write {
            let payload = self.model.borrow_mut().begin_write(range.clone());
            lay_out(&payload, &places, &mut expected);
        }
        put(&memory, 0, &expected);
        let epoch = self.model.borrow().failed_flushes;
        let iovecs: Vec<Iovec<'_>> = places.iter().map(|(at, len)| memory.iovec(*at, *len)).collect();
        let result = submit(&self.volume, io, &self.flusher, &request(step, &range, Data::of(&iovecs))).await;
        self.check(step, range.len(), result);

        let mut found = get(&memory, 0, memory.len());
        if step.op == Op::Write {
            let payload: Vec<u8> = collect(&expected, &places);
            self.model.borrow_mut().end(range.clone(), epoch, result.is_ok().then_some(&payload));
            if step.flags.fua && result.is_ok() {
                let stable = self.stable(io);
                assert!(stable.is_none_or(|stable| stable[range] == payload), "FUA: {step:?}");
            }
        } else if result.is_ok() && self.keeps {
            self.model.borrow().check_read(range, &collect(&found, &places));
        }
        if step.op == Op::Read && self.keeps {
            // What was read has been looked at, and a read that fails may leave anything there.
            lay_out(&vec![0; places.iter().map(|place| place.1).sum()], &places, &mut found);
            lay_out(&vec![0; places.iter().map(|place| place.1).sum()], &places, &mut expected);
        }
        assert!(found == expected, "memory around the data, or a write's own, was changed: {step:?}");
    }

    async fn clear(&self, io: &Io<R>, slot: usize, step: &Step) {
        let range = self.range(slot, step);
        self.model.borrow_mut().begin(range.clone());
        let epoch = self.model.borrow().failed_flushes;
        let flushes = step.op == Op::WriteZeroes && step.flags.fua;
        self.model.borrow_mut().flushing += u32::from(flushes);
        let result = submit(&self.volume, io, &self.flusher, &request(step, &range, Data::None)).await;
        self.check(step, range.len(), result);
        let zeroes = vec![0; range.len()];
        let zeroed = step.op == Op::WriteZeroes && result.is_ok();
        let mut model = self.model.borrow_mut();
        model.end(range.clone(), epoch, zeroed.then_some(&zeroes));
        if flushes && model.end_flush(result) && model.failed_flushes == epoch {
            let stable = self.stable(io);
            assert!(stable.is_none_or(|stable| stable[range] == zeroes), "FUA: {step:?}");
        }
    }

    async fn flush(&self, io: &Io<R>) {
        let before = self.model.borrow().sectors.clone();
        let step = Step::plain(Op::Flush);
        self.model.borrow_mut().flushing += 1;
        let result = submit(&self.volume, io, &self.flusher, &request(&step, &(0..0), Data::None)).await;
        self.check(&step, 0, result);
        let mut model = self.model.borrow_mut();
        if model.end_flush(result)
            && let Some(stable) = self.stable(io)
        {
            model.check_stable(&before, &stable);
        }
    }

    /// A result must be one that the faults explain.
    fn check(&self, step: &Step, len: usize, result: Result<(), Errno>) {
        let Faults { io_error, no_space, sync_error, no_punch, .. } = self.faults;
        let changes = matches!(step.op, Op::Write | Op::Discard | Op::WriteZeroes);
        let syncs = step.op == Op::Flush || step.flags.fua;
        let fails = io_error > 0 || no_space > 0 || sync_error > 0;
        let explained = match result {
            result if self.gives_up => match result {
                Ok(()) => true,
                Err(Errno::EIO | Errno::ENOSPC) => fails,
                Err(_) => false,
            },
            Ok(()) => step.op != Op::Discard || len == 0 || !no_punch,
            // A sync also tells what an earlier one, or a durable write, was told.
            Err(Errno::EIO) => io_error > 0 || (sync_error > 0 || no_space > 0) && syncs,
            Err(Errno::ENOSPC) => no_space > 0 && changes,
            Err(Errno::EOPNOTSUPP) => no_punch && step.op == Op::Discard,
            Err(_) => false,
        };
        assert!(explained, "{result:?} for {step:?}");
    }
}

impl Model {
    /// A change begins. The range is undefined until it has ended.
    fn begin(&mut self, range: std::ops::Range<usize>) {
        for sector in &mut self.sectors[range.start / 512..range.end / 512] {
            sector.version += 1;
            sector.undefined = true;
            sector.acknowledged = false;
        }
    }

    /// Begins a write, and says what it is to write.
    fn begin_write(&mut self, range: std::ops::Range<usize>) -> Vec<u8> {
        self.begin(range.clone());
        self.writes += 1;
        Random(u64::from(self.writes)).bytes(range.len())
    }

    /// A change that began with `epoch` failed flushes ends; the range now holds `bytes`, or is undefined.
    fn end(&mut self, range: std::ops::Range<usize>, epoch: u32, bytes: Option<&Vec<u8>>) {
        let Some(bytes) = bytes else { return };
        for sector in &mut self.sectors[range.start / 512..range.end / 512] {
            sector.undefined = false;
            sector.acknowledged = epoch == self.failed_flushes;
        }
        self.bytes[range].copy_from_slice(bytes);
    }

    /// A flush ends. Whether it keeps its promise: when another flush is under way, the store's one error may
    /// have been told to that one already. What a failed flush should have written is never promised again.
    fn end_flush(&mut self, result: Result<(), Errno>) -> bool {
        self.flushing -= 1;
        if result.is_err() {
            self.failed_flushes += 1;
            for sector in &mut self.sectors {
                sector.acknowledged = false;
            }
        }
        result.is_ok() && self.flushing == 0
    }

    fn check_read(&self, range: std::ops::Range<usize>, found: &[u8]) {
        let sectors = range.start / 512..;
        for (number, found) in sectors.zip(found.chunks_exact(512)) {
            let expected = &self.bytes[number * 512..][..512];
            assert!(self.sectors[number].undefined || found == expected, "sector {number} reads wrong");
        }
    }

    /// A flush that saw the sectors as `before` ended: what was acknowledged then is stable now.
    fn check_stable(&self, before: &[Sector], stable: &[u8]) {
        for (number, (now, before)) in self.sectors.iter().zip(before).enumerate() {
            let promised = now.acknowledged && before.acknowledged && now.version == before.version;
            let range = number * 512..(number + 1) * 512;
            assert!(!promised || stable[range.clone()] == self.bytes[range], "sector {number} is not stable");
        }
    }
}

impl Step {
    pub fn plain(op: Op) -> Step {
        Step { op, flags: Flags::default(), at: 0, blocks: 1, cuts: Vec::new(), unit: 512, skew: 0 }
    }

    /// The lengths of the ranges that `len` bytes are cut into. Some may be empty.
    fn lengths(&self, len: usize) -> Vec<usize> {
        let mut cuts: Vec<usize> =
            self.cuts.iter().map(|cut| ((len * *cut as usize) >> 16) / self.unit * self.unit).collect();
        cuts.extend([0, len]);
        cuts.sort_unstable();
        cuts.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }
}

fn request<'a>(step: &Step, range: &std::ops::Range<usize>, data: Data<'a>) -> Request<'a> {
    let (sector, sectors) = (range.start as u64 / 512, range.len() as u32 / 512);
    Request { op: step.op, flags: step.flags, sector, sectors, data }
}

/// Spreads `bytes` over the places.
fn lay_out(bytes: &[u8], places: &[(usize, usize)], memory: &mut [u8]) {
    let mut rest = bytes;
    for (at, len) in places {
        let (part, left) = rest.split_at(*len);
        memory[*at..][..*len].copy_from_slice(part);
        rest = left;
    }
}

/// What is at the places.
fn collect(memory: &[u8], places: &[(usize, usize)]) -> Vec<u8> {
    places.iter().flat_map(|(at, len)| &memory[*at..][..*len]).copied().collect()
}

/// Runs everything to its end.
pub fn settle<R: Ring, F: Future<Output = ()>>(core: &Rc<Core<R>>, tasks: &mut Tasks<R, F>) {
    let mut cqes = Vec::new();
    while tasks.run_ready() || core.in_flight() > 0 {
        core.ring().enter(core.in_flight() > 0).unwrap();
        core.ring().reap(&mut cqes);
        for cqe in cqes.drain(..) {
            match cqe.user_data.kind() {
                // Of a cancel.
                Some(Kind::Nobody) => {}
                kind => {
                    assert_eq!(kind, Some(Kind::Slot));
                    tasks.complete(&cqe);
                }
            }
        }
    }
}

/// Carries one request out alone.
pub fn once<R: Ring>(
    core: &Rc<Core<R>>,
    volume: &Rc<VolumeChannel<R>>,
    request: Request<'static>,
) -> Result<(), Errno> {
    let result = Rc::new(Cell::new(None));
    let mut tasks = Tasks::new(core.clone());
    tasks.add(|io| {
        let (volume, result, request) = (volume.clone(), result.clone(), request);
        async move { result.set(Some(submit(&volume, &io, &Flusher::default(), &request).await)) }
    });
    settle(core, &mut tasks);
    result.get().unwrap()
}
