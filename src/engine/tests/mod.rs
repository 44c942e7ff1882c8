//! The volumes against a byte array, over the simulated ring and over the kernel's ring.

mod bounds;
pub(super) mod crash;
pub(super) mod layers;
mod losses;
pub(super) mod model;
mod policy;
mod resize;

use super::config::{FileConfig, MemoryConfig, NullConfig, VolumeConfig};
use super::driver::AnyStore;
use super::{Flusher, OpenError, Volume, VolumeChannel, file};
use crate::block::{Data, Errno, Flags, Op, Request, Size};
use crate::ring::sim::{Faults, Random, SimRing, get, put};
use crate::ring::{Core, Mapping, Pool, Setup, Sqe, Uring};
use libc::{FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE};
pub(super) use model::settle;
use model::{Run, SHARE, Tested, faults, once, plan};
use proptest::prelude::*;
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use tempfile::NamedTempFile;

/// A file of `len` bytes that are not zero.
fn image(dir: &str, len: usize) -> (NamedTempFile, Vec<u8>) {
    let file = NamedTempFile::new_in(dir).unwrap();
    let bytes = Random(len as u64).bytes(len);
    std::fs::write(file.path(), &bytes).unwrap();
    (file, bytes)
}

/// Where file systems do direct I/O.
const DISK: &str = env!("CARGO_MANIFEST_DIR");

/// A file system that does not tell its alignment, so that a page is assumed: as on a disk of 4 KiB sectors.
const COARSE: &str = "/dev/shm";

/// Where the file system has no direct I/O, what comes is buffered, and asks of us what direct I/O would.
fn open(path: &Path, direct: bool, block_size: Option<u32>) -> Volume {
    let config =
        FileConfig { path: path.into(), direct, read_only: false, lock: true, format: None, block_size };
    match Volume::open("test", &VolumeConfig::File(config.clone())) {
        Err(OpenError::File { source: file::Error::NoDirect, .. }) => {
            let config = FileConfig { direct: false, ..config };
            let mut volume = Volume::open("test", &VolumeConfig::File(config)).unwrap();
            if let AnyStore::File(file) = volume.store {
                volume.store = AnyStore::File(file.pretend_direct());
                volume.geometry.dma_alignment = 512;
            }
            volume
        }
        other => other.unwrap(),
    }
}

fn uring() -> Uring {
    Uring::new(Setup { entries: 8, completions: 64, ..Setup::default() }).unwrap()
}

/// A file volume of 64 sectors over a simulated ring, opened and attached.
fn small(faults: Faults) -> (Rc<Core<SimRing>>, Rc<VolumeChannel<SimRing>>) {
    let (file, _) = image("/tmp", 64 * 512);
    let volume = open(file.path(), false, None);
    let core = Core::new(SimRing::new(1, faults));
    let channel = Rc::new(volume.attach(&core, false));
    (core, channel)
}

pub(super) fn request(op: Op, sector: u64, sectors: u32) -> Request<'static> {
    Request { op, flags: Flags::default(), sector, sectors, data: Data::None }
}

/// A read or write of the whole of `memory`, which is leaked: a test has little.
/// Memory of requests that have no end.
pub(super) fn mapping(len: usize) -> &'static Mapping {
    Box::leak(Box::new(Mapping::anonymous(len).unwrap()))
}

pub(super) fn transfer(op: Op, sector: u64, memory: &'static Mapping) -> Request<'static> {
    let iovecs = vec![memory.iovec(0, memory.len())].leak();
    Request { data: Data::of(iovecs), ..request(op, sector, memory.len() as u32 / 512) }
}

/// Memory is copied on the worker's own time: a request of any size leaves some of it to the others.
#[test]
fn a_large_transfer_of_memory_lets_others_pass() {
    const LEN: usize = 3 << 20;
    let config = MemoryConfig { size: Size(LEN as u64), block_size: None };
    let volume = Volume::open("test", &VolumeConfig::Memory(config)).unwrap();
    let core = Core::new(SimRing::new(1, Faults::default()));
    let channel = Rc::new(volume.attach(&core, false));
    let bytes = Random(5).bytes(LEN);
    let (from, to, small) = (mapping(LEN), mapping(LEN), mapping(512));
    put(from, 0, &bytes);
    let order: Rc<RefCell<Vec<&str>>> = Rc::default();
    let mut tasks = crate::ring::Tasks::new(core.clone());
    for (name, op, memory) in [("large", Op::Write, &from), ("small", Op::Read, &small)] {
        let (channel, order, request) = (channel.clone(), order.clone(), transfer(op, 0, memory));
        tasks.add(|io| async move {
            super::submit(&channel, &io, &Flusher::default(), &request).await.unwrap();
            order.borrow_mut().push(name);
        });
    }
    settle(&core, &mut tasks);
    assert_eq!(*order.borrow(), ["small", "large"]);
    assert_eq!(once(&core, &channel, transfer(Op::Read, 0, to)), Ok(()));
    assert!(get(to, 0, LEN) == bytes);
}

fn is_sync(sqe: &Sqe<'_>) -> bool {
    matches!(sqe, Sqe::Fdatasync { .. })
}

fn is_write(sqe: &Sqe<'_>) -> bool {
    matches!(sqe, Sqe::Write { .. } | Sqe::Writev { .. })
}

fn is_fallocate(sqe: &Sqe<'_>, flag: i32) -> bool {
    matches!(sqe, Sqe::Fallocate { mode, .. } if mode & flag != 0)
}

/// The ring that makes no more faults.
fn calm(ring: &SimRing, direct: Option<(usize, usize)>) {
    ring.set_faults(Faults { direct, ..Faults::default() });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn a_buffered_file_keeps_what_it_was_given(plan in plan(), faults in faults(), seed: u64, coarse: bool) {
        let block = if coarse { 4096 } else { 512 };
        let (file, bytes) = image("/tmp", plan.len() * SHARE * block);
        let volume = open(file.path(), false, Some(block as u32));
        let core = Core::new(SimRing::new(seed, faults));
        let run = Run::new(volume.attach(&core, false), bytes.clone(), faults, true);
        run.run(&core, &plan, |ring| calm(ring, None));
        prop_assert_eq!(std::fs::read(file.path()).unwrap(), bytes, "the file itself is not the simulated ring's");
    }

    /// The simulated ring refuses what the kernel would: ranges at the wrong address or of the wrong length.
    #[test]
    fn a_direct_file_keeps_what_it_was_given(plan in plan(), faults in faults(), seed: u64, coarse: bool) {
        let (file, bytes) = image(if coarse { COARSE } else { DISK }, plan.len() * SHARE * 4096);
        let volume = open(file.path(), true, None);
        let geometry = volume.geometry();
        let bytes = bytes[..plan.len() * SHARE * geometry.logical_block as usize].to_vec();
        let direct = Some((geometry.dma_alignment as usize, geometry.logical_block as usize));
        let core = Core::new(SimRing::new(seed, Faults { direct, ..faults }));
        let run = Run::new(volume.attach(&core, false), bytes, faults, true);
        run.run(&core, &plan, |ring| calm(ring, direct));
    }

    #[test]
    fn memory_keeps_what_it_was_given(plan in plan(), seed: u64) {
        let len = plan.len() * SHARE * 512;
        let size = Size(len as u64);
        let volume = Volume::open("test", &VolumeConfig::Memory(MemoryConfig { size, block_size: None })).unwrap();
        let core = Core::new(SimRing::new(seed, Faults::default()));
        let run = Run::new(volume.attach(&core, false), vec![0; len], Faults::default(), true);
        run.run(&core, &plan, |_| {});
        prop_assert_eq!(core.ring().count(|_| true), 0);
    }

    #[test]
    fn null_completes_and_touches_nothing(plan in plan(), seed: u64) {
        let len = plan.len() * SHARE * 512;
        let size = Size(len as u64);
        let volume = Volume::open("test", &VolumeConfig::Null(NullConfig { size, block_size: None })).unwrap();
        let core = Core::new(SimRing::new(seed, Faults::default()));
        // It discards nothing, and says so.
        let faults = Faults { no_punch: true, ..Faults::default() };
        Run::new(volume.attach(&core, false), vec![0; len], faults, false).run(&core, &plan, |_| {});
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_kernels_ring_agrees_with_the_double(plan in plan(), direct: bool) {
        let (file, bytes) = image(DISK, plan.len() * SHARE * 4096);
        let volume = open(file.path(), direct, None);
        let bytes = bytes[..plan.len() * SHARE * volume.geometry().logical_block as usize].to_vec();
        let core = Core::new(uring());
        let run = Run::new(volume.attach(&core, false), bytes, Faults::default(), true);
        run.run(&core, &plan, |_| {});
    }
}

/// Requests that no volume may see: each with its error.
fn refused<R: Tested>(core: &Rc<Core<R>>, volume: &Rc<VolumeChannel<R>>) {
    let sectors = volume.geometry().sectors();
    let block = volume.geometry().logical_block / 512;
    let memory = mapping(block as usize * 512);
    for at in [sectors, sectors - 1, u64::MAX, u64::MAX / 512, 1 << 63] {
        // The last sector alone is past the end for a block of more.
        let at = if at == sectors - 1 { at - u64::from(block) + 2 } else { at };
        assert_eq!(once(core, volume, transfer(Op::Read, at, memory)), Err(Errno::EIO), "{at}");
        assert_eq!(once(core, volume, transfer(Op::Write, at, memory)), Err(Errno::ENOSPC), "{at}");
        for op in [Op::Discard, Op::WriteZeroes] {
            assert_eq!(once(core, volume, request(op, at, block)), Err(Errno::ENOSPC), "{op:?} {at}");
            assert_eq!(once(core, volume, request(op, 0, u32::MAX)), Err(Errno::ENOSPC), "{op:?}");
        }
    }
    if block > 1 {
        for op in [Op::Discard, Op::WriteZeroes] {
            assert_eq!(once(core, volume, request(op, 1, block)), Err(Errno::EINVAL), "{op:?}");
            assert_eq!(once(core, volume, request(op, 0, 1)), Err(Errno::EINVAL), "{op:?}");
        }
        assert_eq!(once(core, volume, transfer(Op::Read, 1, memory)), Err(Errno::EINVAL));
        assert_eq!(once(core, volume, transfer(Op::Write, 1, memory)), Err(Errno::EINVAL));
    }
}

#[test]
fn impossible_requests_are_refused_before_anything_is_submitted() {
    for block in [512, 4096] {
        let (file, _) = image("/tmp", 64 * 4096);
        let volume = open(file.path(), false, Some(block));
        let core = Core::new(SimRing::new(1, Faults::default()));
        refused(&core, &Rc::new(volume.attach(&core, false)));
        let read_only = Rc::new(volume.attach(&core, true));
        let memory = mapping(4096);
        for op in [Op::Discard, Op::WriteZeroes] {
            assert_eq!(once(&core, &read_only, request(op, 0, 8)), Err(Errno::EROFS));
        }
        assert_eq!(once(&core, &read_only, transfer(Op::Write, 0, memory)), Err(Errno::EROFS));
        assert_eq!(core.ring().count(|_| true), 0);
        assert_eq!(once(&core, &read_only, transfer(Op::Read, 0, memory)), Ok(()));
        assert_eq!(once(&core, &read_only, request(Op::Flush, 0, 0)), Ok(()));
    }
}

#[test]
fn a_failed_flush_is_told_and_not_tried_again() {
    let (core, volume) = small(Faults { sync_error: 100, ..Faults::default() });
    let memory = mapping(4096);
    put(memory, 0, &[0x77; 4096]);
    assert_eq!(once(&core, &volume, transfer(Op::Write, 0, memory)), Ok(()));
    assert_eq!(once(&core, &volume, request(Op::Flush, 0, 0)), Err(Errno::EIO));
    assert_eq!(core.ring().count(is_sync), 1);
    let zeroes = Request { flags: Flags { fua: true, unmap: false }, ..request(Op::WriteZeroes, 0, 8) };
    assert_eq!(once(&core, &volume, zeroes), Err(Errno::EIO), "FUA is a flush here");
    assert_eq!(core.ring().count(is_sync), 2);
}

#[test]
fn a_power_cut_loses_what_was_not_flushed_and_nothing_else() {
    let (core, volume) = small(Faults { short: 50, again: 20, ..Faults::default() });
    let memory = mapping(4096);
    let write = |sector, byte, fua| {
        put(memory, 0, &[byte; 4096]);
        let flags = Flags { fua, unmap: false };
        let write = Request { flags, ..transfer(Op::Write, sector, memory) };
        assert_eq!(once(&core, &volume, write), Ok(()));
    };
    let before = core.ring().contents().unwrap();
    write(0, 1, false);
    assert_eq!(once(&core, &volume, request(Op::Flush, 0, 0)), Ok(()));
    write(8, 2, false);
    write(16, 3, true);
    core.ring().power_cut(0);
    let read = |sector| {
        assert_eq!(once(&core, &volume, transfer(Op::Read, sector, memory)), Ok(()));
        get(memory, 0, 4096)
    };
    assert_eq!(read(0), [1; 4096]);
    assert_eq!(read(8), before[4096..8192]);
    assert_eq!(read(16), [3; 4096]);
}

#[test]
fn zeroes_are_written_where_the_store_has_no_call_for_it() {
    const LEN: usize = (5 << 19) + 4096;
    let (file, _) = image("/tmp", LEN);
    let volume = open(file.path(), false, None);
    for (unmap, no_zero_range, zero_ranges) in [(true, false, 1), (true, true, 1), (false, true, 1)] {
        let core = Core::new(SimRing::new(1, Faults { no_punch: true, no_zero_range, ..Faults::default() }));
        let channel = Rc::new(volume.attach(&core, false));
        let flags = Flags { fua: true, unmap };
        let zeroes = Request { flags, ..request(Op::WriteZeroes, 1, (LEN / 512 - 2) as u32) };
        assert_eq!(once(&core, &channel, zeroes), Ok(()));
        let stable = core.ring().stable().unwrap();
        assert!(stable[512..LEN - 512].iter().all(|byte| *byte == 0));
        let original = std::fs::read(file.path()).unwrap();
        assert_eq!((&stable[..512], &stable[LEN - 512..]), (&original[..512], &original[LEN - 512..]));
        // A MiB each.
        assert_eq!(core.ring().count(is_write), if no_zero_range { 3 } else { 0 });
        assert_eq!(core.ring().count(|sqe| is_fallocate(sqe, FALLOC_FL_ZERO_RANGE)), zero_ranges);
        assert_eq!(core.ring().count(|sqe| is_fallocate(sqe, FALLOC_FL_PUNCH_HOLE)), usize::from(unmap));
    }
}

#[test]
fn blocks_are_given_back_only_when_that_was_asked_for() {
    let (core, volume) = small(Faults::default());
    assert_eq!(once(&core, &volume, request(Op::WriteZeroes, 0, 8)), Ok(()));
    assert_eq!(core.ring().count(|sqe| is_fallocate(sqe, FALLOC_FL_PUNCH_HOLE)), 0);
    let unmap = Request { flags: Flags { fua: false, unmap: true }, ..request(Op::WriteZeroes, 0, 8) };
    assert_eq!(once(&core, &volume, unmap), Ok(()));
    assert_eq!(core.ring().count(|sqe| is_fallocate(sqe, FALLOC_FL_PUNCH_HOLE)), 1);
    assert_eq!(core.ring().count(|_| true), 2);
}

#[test]
fn a_file_that_only_says_again_is_given_up() {
    let (core, volume) = small(Faults { again: 100, ..Faults::default() });
    let memory = mapping(4096);
    assert_eq!(once(&core, &volume, transfer(Op::Read, 0, memory)), Err(Errno::EAGAIN));
    assert!(core.ring().count(|_| true) > 1, "not at once");
}

#[test]
fn a_request_costs_one_submission() {
    let (core, volume) = small(Faults::default());
    let memory = mapping(8192);
    for op in [Op::Read, Op::Write] {
        assert_eq!(once(&core, &volume, transfer(op, 0, memory)), Ok(()));
        let iovecs = vec![memory.iovec(0, 512), memory.iovec(4096, 1024)].leak();
        let two = Request { data: Data::of(iovecs), ..request(op, 0, 3) };
        assert_eq!(once(&core, &volume, two), Ok(()));
    }
    assert_eq!(core.ring().count(|_| true), 4);
}

/// Where the kernel would only hand a write to a thread of its own; but not one that waits for the disk.
#[test]
fn a_write_that_cannot_be_tried_is_carried_out_here() {
    let (core, volume) = small(Faults { no_nowait: true, short: 50, ..Faults::default() });
    let memory = mapping(8192);
    let bytes = Random(7).bytes(8192);
    put(memory, 0, &bytes);
    for _ in 0..10 {
        assert_eq!(once(&core, &volume, transfer(Op::Write, 1, memory)), Ok(()));
    }
    assert_eq!(core.ring().count(|_| true), 0);
    assert_eq!(core.ring().contents().unwrap()[512..512 + 8192], bytes);
    assert_ne!(core.ring().stable().unwrap()[512..512 + 8192], bytes);
    let fua = Flags { fua: true, unmap: false };
    let durable = Request { flags: fua, ..transfer(Op::Write, 1, memory) };
    assert_eq!(once(&core, &volume, durable), Ok(()));
    assert!(core.ring().count(is_write) > 0);
    assert_eq!(core.ring().stable().unwrap()[512..512 + 8192], bytes);
}

/// Direct I/O goes straight to memory that the store can take, and through a buffer otherwise.
#[test]
fn direct_io_bounces_only_what_it_must() {
    let (file, bytes) = image(DISK, 64 * 4096);
    let volume = open(file.path(), true, Some(4096));
    let (memory, unit) = (volume.geometry().dma_alignment as usize, 512);
    let core = Core::new(SimRing::new(1, Faults { direct: Some((memory, unit)), ..Faults::default() }));
    let channel = Rc::new(volume.attach(&core, false));
    let buffer = mapping(16384);
    let read = |cuts: &[(usize, usize)]| {
        let iovecs = cuts.iter().map(|(at, len)| buffer.iovec(*at, *len)).collect::<Vec<_>>().leak();
        let request = Request { data: Data::of(iovecs), ..request(Op::Read, 8, 8) };
        assert_eq!(once(&core, &channel, request), Ok(()), "{cuts:?}");
        let found: Vec<u8> = cuts.iter().flat_map(|(at, len)| get(buffer, *at, *len)).collect();
        assert_eq!(found, bytes[4096..8192], "{cuts:?}");
        let ours = buffer.as_ptr().addr()..buffer.as_ptr().addr() + buffer.len();
        core.ring().count(|sqe| match sqe {
            Sqe::Read { range, .. } => !ours.contains(&range.base().addr()),
            _ => false,
        })
    };
    assert_eq!(read(&[(4096, 4096)]), 0);
    assert_eq!(read(&[(0, 2048), (8192, 2048)]), 0);
    assert_eq!(read(&[(1, 4096)]), 1);
    assert_eq!(read(&[(0, 100), (8192, 3996)]), 2);
}

/// A guest that names one page many times over asks for more than there is memory for.
#[test]
fn a_bounce_takes_no_more_memory_than_it_needs() {
    const LEN: usize = 3 << 20;
    let (file, bytes) = image(DISK, LEN);
    let volume = open(file.path(), true, Some(4096));
    let direct = Some((volume.geometry().dma_alignment as usize, 512));
    let core = Core::new(SimRing::new(1, Faults { direct, short: 30, ..Faults::default() }));
    let channel = Rc::new(volume.attach(&core, false));
    let memory = mapping(LEN + 8192);
    // A third of the ranges are empty, and none starts or ends where the parts do.
    let cuts = || {
        let ends = (1..LEN).step_by(700_001).chain([LEN]);
        let mut at = 0;
        ends.flat_map(|end| {
            let start = std::mem::replace(&mut at, end);
            let middle = (start + end) / 2;
            [(start, middle), (middle, middle), (middle, end)]
        })
        .map(|(start, end)| memory.iovec(start + 1, end - start))
        .collect::<Vec<_>>()
        .leak()
    };
    let all = |op| Request { data: Data::of(cuts()), ..request(op, 0, (LEN / 512) as u32) };
    assert_eq!(once(&core, &channel, all(Op::Read)), Ok(()));
    assert!(get(memory, 1, LEN) == bytes);
    assert_eq!(get(memory, 0, 1), [0]);
    let other = Random(99).bytes(LEN);
    put(memory, 1, &other);
    assert_eq!(once(&core, &channel, all(Op::Write)), Ok(()));
    assert!(core.ring().contents().unwrap() == other);
    let large = |sqe: &Sqe<'_>| {
        let most = Pool::<SimRing>::BYTES as u32;
        matches!(sqe, Sqe::Read { range, .. } | Sqe::Write { range, .. } if range.len() > most as usize)
    };
    assert_eq!(core.ring().count(large), 0);
}

#[test]
fn registered_buffers_are_filled_and_stored_whole() {
    let (core, volume) = small(Faults { short: 70, again: 30, interrupted: 20, ..Faults::default() });
    let bytes = core.ring().contents().unwrap();
    let memory = mapping(8192);
    let index = core.ring().add_buffer(memory.iovec(0, 8192));
    let data = || Data::Registered { index, skip: 0 };
    assert_eq!(once(&core, &volume, Request { data: data(), ..request(Op::Read, 3, 16) }), Ok(()));
    assert_eq!(get(memory, 0, 8192), bytes[3 * 512..19 * 512]);
    put(memory, 0, &[0x55; 8192]);
    assert_eq!(once(&core, &volume, Request { data: data(), ..request(Op::Write, 30, 16) }), Ok(()));
    let now = core.ring().contents().unwrap();
    assert_eq!(now[30 * 512..46 * 512], [0x55; 8192]);
    assert_eq!((&now[..30 * 512], &now[46 * 512..]), (&bytes[..30 * 512], &bytes[46 * 512..]));
}

#[test]
fn a_file_that_lost_its_end_gives_an_error() {
    let (file, _) = image("/tmp", 8 * 512);
    let volume = open(file.path(), false, None);
    let core = Core::new(uring());
    let channel = Rc::new(volume.attach(&core, false));
    file.as_file().set_len(1000).unwrap();
    let memory = mapping(2048);
    assert_eq!(once(&core, &channel, transfer(Op::Read, 0, memory)), Err(Errno::EIO));
    assert_eq!(once(&core, &channel, transfer(Op::Read, 4, memory)), Err(Errno::EIO));
}
