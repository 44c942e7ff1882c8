//! What becomes of requests that the store fails.

use super::*;
use crate::engine::config::{OnError, PolicyConfig};
use crate::engine::submit;
use crate::ring::{Kind, Ring, Tasks};
use std::cell::RefCell;
use std::fs::File;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

fn retry(seconds: u64) -> PolicyConfig {
    PolicyConfig { on_error: OnError::Retry, retry_for: Some(seconds), required: None }
}

fn stop() -> PolicyConfig {
    PolicyConfig { on_error: OnError::Stop, retry_for: None, required: None }
}

/// As [`small`](super::small), with a policy.
fn with_policy(config: PolicyConfig, faults: Faults) -> (Rc<Core<SimRing>>, Rc<VolumeChannel<SimRing>>) {
    let (file, _) = image("/tmp", 64 * 512);
    let volume = open(file.path(), false, None).with_policy(config);
    let core = Core::new(SimRing::new(1, faults));
    let channel = Rc::new(volume.attach(&core, false));
    (core, channel)
}

const DAY: u64 = PolicyConfig::MAX_RETRY_FOR;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    /// A store that fails now and then is one that never fails: nothing is lost or mixed up on the way.
    #[test]
    fn what_is_tried_again_succeeds(
        plan in plan(), faults in faults(), seed: u64, io_error in 1..60u8, no_space in 0..40u8
    ) {
        let bytes_and = |len| image("/tmp", len);
        let (file, bytes) = bytes_and(plan.len() * SHARE * 512);
        let volume = open(file.path(), false, None).with_policy(retry(DAY));
        let told = Faults { io_error: 0, no_space: 0, sync_error: 0, ..faults };
        let core = Core::new(SimRing::new(seed, Faults { io_error, no_space, ..told }));
        // The run takes an error that its faults do not explain for a bug.
        Run::new(volume.attach(&core, false), bytes, told, true).run(&core, &plan, |ring| calm(ring, None));
        prop_assert_eq!((volume.policy_state().waiting, volume.policy_state().paused), (0, false));
    }
}

#[test]
fn a_registered_buffer_begins_again() {
    let faults = Faults { io_error: 60, short: 50, ..Faults::default() };
    let (core, volume) = with_policy(retry(DAY), faults);
    let bytes = core.ring().contents().unwrap();
    let memory = mapping(8192);
    let index = core.ring().add_buffer(memory.iovec(0, 8192));
    let data = || Data::Registered { index, skip: 0 };
    assert_eq!(once(&core, &volume, Request { data: data(), ..request(Op::Read, 3, 16) }), Ok(()));
    assert_eq!(get(memory, 0, 8192), bytes[3 * 512..19 * 512]);
    let other = Random(5).bytes(8192);
    put(memory, 0, &other);
    assert_eq!(once(&core, &volume, Request { data: data(), ..request(Op::Write, 30, 16) }), Ok(()));
    assert_eq!(core.ring().contents().unwrap()[30 * 512..46 * 512], other);
}

#[test]
fn attempts_end_with_the_time() {
    let memory = mapping(4096);
    for (config, attempts) in [(PolicyConfig::default(), 1..=1), (retry(1), 4..=5), (retry(30), 16..=24)] {
        let (core, volume) = with_policy(config, Faults { io_error: 100, ..Faults::default() });
        assert_eq!(once(&core, &volume, transfer(Op::Read, 0, memory)), Err(Errno::EIO));
        let reads = core.ring().count(|sqe| matches!(sqe, Sqe::Read { .. }));
        assert!(attempts.contains(&reads), "{reads} for {config:?}");
    }
}

#[test]
fn what_would_never_succeed_is_told_at_once() {
    // A store that wants aligned ranges, and is not known to.
    let faults = Faults { direct: Some((1, 4096)), no_punch: true, ..Faults::default() };
    let memory = mapping(512);
    for config in [retry(30), stop()] {
        let (core, volume) = with_policy(config, faults);
        assert_eq!(once(&core, &volume, transfer(Op::Read, 1, memory)), Err(Errno::EINVAL));
        assert_eq!(once(&core, &volume, request(Op::Discard, 0, 8)), Err(Errno::EOPNOTSUPP));
        assert_eq!(once(&core, &volume, transfer(Op::Read, 64, memory)), Err(Errno::EIO), "past the end");
        assert_eq!(once(&core, &volume, transfer(Op::Write, 64, memory)), Err(Errno::ENOSPC), "past the end");
    }
}

/// The kernel tells of writes that are lost once: the next flush would succeed, and hide the loss.
#[test]
fn a_failed_sync_is_never_tried_again() {
    let memory = mapping(4096);
    for config in [retry(30), stop()] {
        let (core, volume) = with_policy(config, Faults { sync_error: 100, ..Faults::default() });
        assert_eq!(once(&core, &volume, request(Op::Flush, 0, 0)), Err(Errno::EIO));
        assert_eq!(core.ring().count(is_sync), 1);
        let flags = Flags { fua: true, unmap: false };
        let durable = Request { flags, ..transfer(Op::Write, 0, memory) };
        assert_eq!(once(&core, &volume, durable), Err(Errno::EIO));
        assert_eq!((core.ring().count(is_write), core.ring().count(is_sync)), (1, 2));
        // One that fails as a write, not as a flush, is.
        core.ring().set_faults(Faults { no_space: 70, ..Faults::default() });
        let (core, volume) = with_policy(retry(DAY), Faults { no_space: 70, ..Faults::default() });
        put(memory, 0, &[0x31; 4096]);
        let durable = Request { flags, ..transfer(Op::Write, 8, memory) };
        assert_eq!(once(&core, &volume, durable), Ok(()));
        let dsync =
            |sqe: &Sqe<'_>| matches!(sqe, Sqe::Write { rw_flags, .. } if *rw_flags & libc::RWF_DSYNC != 0);
        assert_eq!((core.ring().count(dsync), core.ring().count(is_sync)), (0, 1));
        assert_eq!(core.ring().stable().unwrap()[4096..8192], [0x31; 4096]);
    }
}

type Any = Pin<Box<dyn Future<Output = ()>>>;

/// What became of requests, by their sectors.
type Ended = Vec<(u64, Result<(), Errno>)>;

/// A volume that stops, on a file whose end can be cut off, and what became of the requests.
struct World {
    file: File,
    memory: &'static Mapping,
    volume: Arc<Volume>,
    core: Rc<Core<Uring>>,
    channel: Rc<VolumeChannel<Uring>>,
    tasks: Tasks<Uring, Any>,
    ended: Rc<RefCell<Ended>>,
}

const LEN: u64 = 64 * 512;

impl World {
    fn new() -> World {
        let (file, _) = image("/tmp", LEN as usize);
        let volume = Arc::new(open(file.path(), false, None).with_policy(stop()));
        let core = Core::new(uring());
        let channel = Rc::new(volume.attach(&core, false));
        let (tasks, ended) = (Tasks::new(core.clone()), Rc::default());
        let memory = mapping(512);
        World { file: file.into_file(), memory, volume, core, channel, tasks, ended }
    }

    fn begin(&mut self, op: Op, sector: u64) -> u32 {
        let request = match op {
            Op::Flush => request(op, sector, 0),
            _ => transfer(op, sector, self.memory),
        };
        let (channel, ended) = (self.channel.clone(), self.ended.clone());
        self.tasks.add(|io| {
            Box::pin(async move {
                let result = submit(&channel, &io, &Flusher::default(), &request).await;
                ended.borrow_mut().push((sector, result));
            })
        })
    }

    /// Goes on until so many requests have ended, and so many wait. What ended since the last call.
    fn until(&mut self, ended: usize, waiting: usize) -> Ended {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut cqes = Vec::new();
        loop {
            self.tasks.run_ready();
            self.core.ring().enter(false).unwrap();
            self.core.ring().reap(&mut cqes);
            let slots = cqes.drain(..).filter(|cqe| cqe.user_data.kind() == Some(Kind::Slot));
            slots.for_each(|cqe| self.tasks.complete(&cqe));
            let state = self.volume.policy_state();
            if self.ended.borrow().len() == ended && state.waiting == waiting {
                assert_eq!(state.paused, waiting > 0);
                let mut ended = self.ended.take();
                ended.sort_by_key(|(sector, _)| *sector);
                return ended;
            }
            assert!(Instant::now() < deadline, "{:?} ended, {state:?}", self.ended.borrow());
        }
    }
}

#[test]
fn requests_wait_until_the_store_is_well_again() {
    let mut world = World::new();
    world.file.set_len(0).unwrap();
    world.begin(Op::Read, 40);
    assert_eq!(world.until(0, 1), []);
    // Neither a flush nor what would succeed goes past those that wait; what is refused does.
    world.begin(Op::Flush, 2);
    world.begin(Op::Write, 3);
    world.begin(Op::Read, 64);
    assert_eq!(world.until(1, 3), [(64, Err(Errno::EIO))]);
    assert_eq!(world.file.metadata().unwrap().len(), 0, "the write has not touched the store");
    let why = world.volume.pending_reason().unwrap();
    assert!(why.contains("ringblk resume test") && why.contains("sector 40"), "{why}");

    // Not well yet: what can be done is done, and the other waits again.
    let volume = world.volume.clone();
    let resumed = std::thread::spawn(move || volume.resume(false));
    assert_eq!(world.until(2, 1), [(2, Ok(())), (3, Ok(()))]);
    assert_eq!(resumed.join().unwrap(), 3);
    assert!(world.channel.waits_for(0).contains("resume"), "{}", world.channel.waits_for(0));

    world.file.set_len(LEN).unwrap();
    assert_eq!(world.volume.resume(false), 1);
    assert_eq!(world.until(1, 0), [(40, Ok(()))]);
    assert_eq!((world.volume.resume(false), world.volume.pending_reason()), (0, None));
}

#[test]
fn requests_that_are_given_up_fail_with_their_error() {
    let mut world = World::new();
    world.file.set_len(0).unwrap();
    world.begin(Op::Read, 1);
    world.until(0, 1);
    world.begin(Op::Write, 2);
    world.until(0, 2);
    assert_eq!(world.volume.resume(true), 2);
    assert_eq!(world.until(2, 0), [(1, Err(Errno::EIO)), (2, Err(Errno::EIO))]);
    // The next one stops the volume again.
    world.begin(Op::Read, 1);
    world.until(0, 1);
    // Nothing waits after this.
    world.channel.abandon();
    assert_eq!(world.until(1, 0), [(1, Err(Errno::EIO))]);
    world.begin(Op::Read, 1);
    assert_eq!(world.until(1, 0), [(1, Err(Errno::EIO))]);
}

/// Whoever waits in a slot that is interrupted waits no more; the others do.
#[test]
fn who_is_interrupted_does_not_wait() {
    let mut world = World::new();
    world.file.set_len(0).unwrap();
    world.begin(Op::Read, 1);
    world.until(0, 1);
    world.begin(Op::Write, 2);
    let flush = world.begin(Op::Flush, 3);
    world.begin(Op::Read, 4);
    world.until(0, 4);
    for slot in [0, flush] {
        world.core.interrupt(slot);
    }
    // A flush covers what is complete, so it goes past those that wait.
    assert_eq!(world.until(2, 2), [(1, Err(Errno::ERESTART)), (3, Ok(()))]);
    world.file.set_len(LEN).unwrap();
    world.volume.resume(false);
    assert_eq!(world.until(2, 0), [(2, Ok(())), (4, Ok(()))]);
}

#[test]
fn attempts_end_when_their_slot_is_interrupted() {
    let (core, volume) = with_policy(retry(DAY), Faults { io_error: 100, ..Faults::default() });
    let (memory, result) = (mapping(512), Rc::new(RefCell::new(None)));
    let ended = result.clone();
    let mut tasks = Tasks::new(core.clone());
    let slot = tasks.add(|io| async move {
        *ended.borrow_mut() =
            Some(submit(&volume, &io, &Flusher::default(), &transfer(Op::Read, 0, memory)).await);
    });
    core.ring().enter(true).unwrap();
    let mut cqes = Vec::new();
    core.ring().reap(&mut cqes);
    cqes.iter().for_each(|cqe| tasks.complete(cqe));
    assert!(result.borrow().is_none(), "it pauses");
    core.interrupt(slot);
    settle(&core, &mut tasks);
    assert_eq!(*result.borrow(), Some(Err(Errno::ERESTART)));
}

/// A volume that became smaller while a request waited.
#[test]
fn what_waits_is_checked_again() {
    let mut world = World::new();
    world.file.set_len(0).unwrap();
    world.begin(Op::Read, 60);
    world.until(0, 1);
    world.file.set_len(LEN).unwrap();
    world.volume.geometry().capacity.set(32);
    world.volume.resume(false);
    assert_eq!(world.until(1, 0), [(60, Err(Errno::EIO))]);
    assert_eq!(world.volume.policy_state().waiting, 0, "it is refused, not failed by the store");
}
