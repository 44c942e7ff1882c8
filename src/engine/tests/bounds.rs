//! What one guest may take of the worker's time and memory, and what one store may hold up.

use super::model::{once, settle};
use super::{DISK, image, is_write, mapping, open, request, small, transfer, uring};
use crate::block::{Data, Errno, Flags, Op, Request, Size};
use crate::engine::config::{MemoryConfig, VolumeConfig};
use crate::engine::{Flusher, Volume, VolumeChannel, submit};
use crate::ring::sim::{Faults, SimRing, get};
use crate::ring::{Core, Io, Mapping, PASS_WORK, Pool, Sqe, Tasks, Uring};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use tempfile::NamedTempFile;

/// A memory volume of so many bytes over a simulated ring, and slots on it: each carries `request` out and says its number.
struct Memories {
    core: Rc<Core<SimRing>>,
    volume: Rc<VolumeChannel<SimRing>>,
    done: Rc<RefCell<Vec<u32>>>,
}

impl Memories {
    fn new(len: u64) -> Memories {
        let config = MemoryConfig { size: Size(len), block_size: None };
        let volume = Volume::open("test", &VolumeConfig::Memory(config)).unwrap();
        let core = Core::new(SimRing::new(1, Faults::default()));
        Memories { volume: Rc::new(volume.attach(&core, false)), core, done: Rc::default() }
    }

    async fn slot(
        io: Io<SimRing>,
        (volume, done): (Rc<VolumeChannel<SimRing>>, Rc<RefCell<Vec<u32>>>),
        (export, number): (usize, u32),
        request: Request<'static>,
    ) {
        io.set_group(export);
        submit(&volume, &io, &Flusher::default(), &request).await.unwrap();
        done.borrow_mut().push(number);
    }
}

/// However many large requests one export has, of whatever kind: another one's small request waits for one slice.
#[test]
fn work_on_memory_is_shared_out_between_exports() {
    const LEN: usize = 8 << 20;
    for op in [Op::Read, Op::Write, Op::Discard, Op::WriteZeroes] {
        let Memories { core, volume, done } = Memories::new(LEN as u64);
        let (large, small) = (mapping(LEN), mapping(512));
        let mut tasks = Tasks::new(core.clone());
        let mut add = |export, number, request| {
            tasks.add(|io| Memories::slot(io, (volume.clone(), done.clone()), (export, number), request));
        };
        for number in 0..100 {
            let request = match op {
                Op::Read | Op::Write => transfer(op, 0, large),
                _ => request(op, 0, (LEN / 512) as u32),
            };
            add(1, number, request);
        }
        add(2, 1000, transfer(Op::Read, 0, small));
        let mut passes = 0;
        while done.borrow().is_empty() {
            tasks.run_ready();
            passes += 1;
        }
        assert_eq!(*done.borrow(), [1000], "{op:?}");
        assert!(passes <= 2, "{op:?}: {passes} passes");
        settle(&core, &mut tasks);
        assert_eq!(done.borrow().len(), 101);
    }
}

/// Little requests are work, too: so much of it in a pass, and no more.
#[test]
fn a_pass_has_an_end() {
    let Memories { core, volume, done } = Memories::new(8 << 20);
    let memory = mapping(64 << 10);
    let mut tasks = Tasks::new(core.clone());
    for number in 0..100 {
        let request = transfer(Op::Write, 0, memory);
        tasks.add(|io| {
            Memories::slot(io, (volume.clone(), done.clone()), (number as usize % 3, number), request)
        });
    }
    let each = (PASS_WORK / (64 << 10)) as usize;
    for pass in 1..100_usize.div_ceil(each) {
        assert_eq!(done.borrow().len(), pass * each);
        tasks.run_ready();
    }
    settle(&core, &mut tasks);
    let mut all = done.take();
    all.sort_unstable();
    assert_eq!(all, (0..100).collect::<Vec<_>>(), "each once");
}

/// The limits that both frontends offer are kept here, for both.
#[test]
fn more_than_was_offered_is_refused() {
    let memory = MemoryConfig { size: Size(1 << 30), block_size: None };
    let (file, _) = image("/tmp", 4096);
    file.as_file().set_len(3 << 30).unwrap();
    let volumes =
        [Volume::open("test", &VolumeConfig::Memory(memory)).unwrap(), open(file.path(), false, None)];
    for volume in volumes {
        let core = Core::new(uring());
        let channel = Rc::new(volume.attach(&core, false));
        let discard = volume.geometry().discard.unwrap().max_sectors;
        let zeroes = volume.geometry().max_write_zeroes;
        for (op, most) in [(Op::Discard, discard), (Op::WriteZeroes, zeroes)] {
            assert_eq!(once(&core, &channel, request(op, 0, most)), Ok(()), "{op:?}");
            assert_eq!(once(&core, &channel, request(op, 0, most + 1)), Err(Errno::EINVAL), "{op:?}");
            let unmap = Flags { fua: true, unmap: true };
            let longer = Request { flags: unmap, ..request(op, 8, most + 8) };
            assert_eq!(once(&core, &channel, longer), Err(Errno::EINVAL), "{op:?}");
        }
    }
}

/// Where a call that blocks would hold up another volume, only the kernel's threads make one.
#[test]
fn a_shared_worker_carries_out_nothing_itself() {
    let (core, volume) = small(Faults { no_nowait: true, ..Faults::default() });
    let memory = mapping(8192);
    core.set_shared(true);
    for _ in 0..10 {
        assert_eq!(once(&core, &volume, transfer(Op::Write, 1, memory)), Ok(()));
    }
    assert_eq!(core.ring().count(is_write), 10);
    core.set_shared(false);
    assert_eq!(once(&core, &volume, transfer(Op::Write, 1, memory)), Ok(()));
    assert_eq!(core.ring().count(is_write), 10, "alone it goes on as before");
}

/// Addresses of our own that transfers were made with, so far.
fn bounces(core: &Core<SimRing>, guest: &Mapping) -> BTreeSet<usize> {
    let ours = guest.as_ptr().addr()..guest.as_ptr().addr() + guest.len();
    let found = RefCell::new(BTreeSet::new());
    core.ring().count(|sqe| match sqe {
        Sqe::Read { range, .. } if !ours.contains(&range.base().addr()) => {
            found.borrow_mut().insert(range.base().addr())
        }
        Sqe::Write { range, .. } if !ours.contains(&range.base().addr()) => {
            found.borrow_mut().insert(range.base().addr())
        }
        _ => false,
    });
    found.into_inner()
}

/// Many guests, many misaligned requests: a few buffers, whatever goes wrong, and every byte in its place.
#[test]
fn misaligned_requests_share_a_few_buffers() {
    const LEN: usize = 300 << 10;
    const COUNT: usize = 64;
    let (file, bytes) = image(DISK, LEN);
    let volume = open(file.path(), true, Some(4096));
    let direct = Some((volume.geometry().dma_alignment as usize, 512));
    for seed in 0..10 {
        let faults = Faults { direct, short: 30, again: 20, delay: 50, reorder: true, ..Faults::default() };
        let core = Core::new(SimRing::new(seed, faults));
        let channel = Rc::new(volume.attach(&core, false));
        let memory = mapping(COUNT * (LEN + 1));
        let mut tasks = Tasks::new(core.clone());
        let done = Rc::new(RefCell::new(0));
        for number in 0..COUNT {
            let iovecs = vec![memory.iovec(number * (LEN + 1) + 1, LEN)].leak();
            let request = Request { data: Data::of(iovecs), ..request(Op::Read, 0, (LEN / 512) as u32) };
            let (channel, done) = (channel.clone(), done.clone());
            tasks.add(|io| async move {
                io.set_group(number % 3);
                submit(&channel, &io, &Flusher::default(), &request).await.unwrap();
                *done.borrow_mut() += 1;
            });
        }
        settle(&core, &mut tasks);
        assert_eq!(*done.borrow(), COUNT);
        (0..COUNT).for_each(|number| assert!(get(memory, number * (LEN + 1) + 1, LEN) == bytes));
        // A short transfer goes on within its buffer.
        let starts = |addr: &usize| addr / Pool::<SimRing>::BYTES;
        let used: BTreeSet<usize> = bounces(&core, memory).iter().map(starts).collect();
        assert!(used.len() <= Pool::<SimRing>::COUNT as usize + 1, "{used:?}");
    }
}

/// A store that never answers keeps its own buffers, and nobody else's.
#[test]
fn buffers_of_a_store_that_hangs_are_not_missed_elsewhere() {
    const LEN: usize = 64 << 10;
    let (hung, _) = image(DISK, LEN);
    let (good, _) = image(DISK, LEN);
    let core = Core::new(uring());
    let attach = |file: &NamedTempFile| Rc::new(open(file.path(), true, None).attach(&core, false));
    let (hung, good) = (attach(&hung), attach(&good));
    let memory = mapping(LEN + 1);
    let misaligned = || {
        let iovecs = vec![memory.iovec(1, LEN)].leak();
        Request { data: Data::of(iovecs), ..request(Op::Read, 0, (LEN / 512) as u32) }
    };
    let mut tasks = Tasks::new(core.clone());
    // Submitted, and not entered: as if the store did not answer.
    for volume in std::iter::repeat_n(&hung, 100).chain([&good]) {
        let (volume, request) = (volume.clone(), misaligned());
        tasks.add(|io| async move { submit(&volume, &io, &Flusher::default(), &request).await.unwrap() });
    }
    assert_eq!(core.in_flight(), Pool::<Uring>::COUNT as usize + 1);
    settle(&core, &mut tasks);
}
