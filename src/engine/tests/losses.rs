//! Writes that were acknowledged and lost: everybody who flushes hears of it, once, whoever the store told.

use super::*;
use crate::engine::losses::Losses;
use crate::engine::{Flushers, QueueStart, submit};
use crate::ring::{Io, Ring, Tasks};
use std::cell::Cell;

const LOSING: Faults = Faults { sync_error: 100, ..NONE };
const NONE: Faults = Faults {
    short: 0,
    again: 0,
    interrupted: 0,
    io_error: 0,
    no_space: 0,
    sync_error: 0,
    lost: 0,
    delay: 0,
    stale: 0,
    reorder: false,
    no_punch: false,
    no_zero_range: false,
    no_discard: false,
    busy_discard: false,
    busy_fallocate: false,
    no_nowait: false,
    direct: None,
};

/// A file volume over a simulated ring, and so many exports of it with two queues each.
struct World {
    core: Rc<Core<SimRing>>,
    volume: Volume,
    channel: Rc<VolumeChannel<SimRing>>,
    exports: Vec<Rc<Flushers>>,
}

type Outcome = Rc<Cell<Option<Result<(), Errno>>>>;

impl World {
    fn new(seed: u64, exports: usize) -> World {
        let (file, _) = image("/tmp", 64 * 512);
        let volume = open(file.path(), false, None);
        let core = Core::new(SimRing::new(seed, NONE));
        let channel = Rc::new(volume.attach(&core, false));
        let exports = (0..exports).map(|_| Rc::new(Flushers::new(&volume, 2))).collect();
        World { core, volume, channel, exports }
    }

    fn losses(&self) -> &Losses {
        let AnyStore::File(file) = &self.volume.store else { panic!("a file") };
        file.losses()
    }

    /// What becomes of requests that are made at the same time, each by a queue of an export.
    fn together(&self, requests: &[(usize, usize, Op, bool)]) -> Vec<Result<(), Errno>> {
        let mut tasks = Tasks::new(self.core.clone());
        let outcomes: Vec<Outcome> = requests.iter().map(|_| Outcome::default()).collect();
        for (&(export, queue, op, fua), outcome) in requests.iter().zip(&outcomes) {
            let (channel, flushers, outcome) =
                (self.channel.clone(), self.exports[export].clone(), outcome.clone());
            tasks.add(|io: Io<SimRing>| async move {
                let memory = mapping(512);
                let iovecs = [memory.iovec(0, 512)];
                let data = if op == Op::Write { Data::of(&iovecs) } else { Data::None };
                let flags = Flags { fua, unmap: false };
                let sectors = if op == Op::Flush { 0 } else { 1 };
                let request = Request { op, flags, sector: 7, sectors, data };
                outcome.set(Some(submit(&channel, &io, flushers.queue(queue), &request).await));
            });
        }
        settle(&self.core, &mut tasks);
        outcomes.iter().map(|outcome| outcome.get().unwrap()).collect()
    }

    fn flush(&self, export: usize, queue: usize) -> Result<(), Errno> {
        self.together(&[(export, queue, Op::Flush, false)])[0]
    }

    /// Every queue of every export fails one flush, and succeeds afterwards.
    fn all_hear_once(&self, but: Option<(usize, usize)>) {
        for export in 0..self.exports.len() {
            for queue in [0, 1] {
                let told = but == Some((export, queue));
                let expected = if told { Ok(()) } else { Err(Errno::EIO) };
                assert_eq!(self.flush(export, queue), expected, "export {export}, queue {queue}");
                assert_eq!(self.flush(export, queue), Ok(()), "export {export}, queue {queue}: told once");
            }
        }
    }
}

#[test]
fn a_loss_is_told_to_every_queue_of_every_export() {
    let world = World::new(1, 3);
    world.core.ring().set_faults(LOSING);
    assert_eq!(world.flush(1, 0), Err(Errno::EIO));
    world.core.ring().set_faults(NONE);
    world.all_hear_once(Some((1, 0)));
}

/// It is answered with an error that may be of other writes; and that it failed tells its client only of itself.
#[test]
fn a_loss_that_a_durable_write_was_told_of_is_no_secret() {
    for op in [Op::Write, Op::WriteZeroes] {
        let world = World::new(2, 2);
        world.core.ring().set_faults(if op == Op::Write { Faults { io_error: 100, ..NONE } } else { LOSING });
        assert_eq!(world.together(&[(0, 0, op, true)]), [Err(Errno::EIO)]);
        world.core.ring().set_faults(NONE);
        world.all_hear_once(None);
    }
}

/// A write that fails and was not to be durable was never acknowledged: nothing is lost.
#[test]
fn a_write_that_fails_is_no_loss() {
    let world = World::new(3, 1);
    world.core.ring().set_faults(Faults { io_error: 100, ..NONE });
    assert_eq!(world.together(&[(0, 0, Op::Write, false)]), [Err(Errno::EIO)]);
    world.core.ring().set_faults(NONE);
    assert_eq!(world.flush(0, 0), Ok(()));
}

/// The store tells one of several syncs that are under way at once, and that may be the last to come back.
#[test]
fn syncs_that_overlap_fail_together() {
    let mut failed = 0;
    for seed in 0..300 {
        let world = World::new(seed, 2);
        let faults = Faults { sync_error: 25, io_error: 10, delay: 80, reorder: true, ..NONE };
        world.core.ring().set_faults(faults);
        let outcomes = world.together(&[
            (0, 0, Op::Flush, false),
            (0, 1, Op::Flush, false),
            (0, 0, Op::Write, true),
            (1, 0, Op::Flush, false),
            (1, 0, Op::Flush, false),
            (1, 1, Op::Write, true),
        ]);
        assert!(outcomes.iter().all(|outcome| *outcome == outcomes[0]), "seed {seed}: {outcomes:?}");
        failed += usize::from(outcomes[0].is_err());
    }
    assert!((50..290).contains(&failed), "{failed} of 300 were to tell");
}

fn begin(vmm: u64) -> QueueStart {
    QueueStart { vmm, at: 0, noted: false, doubtful: false }
}

impl World {
    /// A write is lost, and a request that is no flush is told.
    fn lose(&self) {
        self.core.ring().set_faults(LOSING);
        assert_eq!(self.together(&[(0, 0, Op::WriteZeroes, true)]), [Err(Errno::EIO)]);
        self.core.ring().set_faults(NONE);
    }

    fn start(&self, queue: usize, start: QueueStart) -> bool {
        self.exports[0].start(&self.volume, queue, start)
    }

    fn stop(&self, queue: usize, at: u16) {
        self.exports[0].stop(queue, at);
    }

    fn flush_both(&self) -> [Result<(), Errno>; 2] {
        [self.flush(0, 0), self.flush(0, 1)]
    }
}

const LOST: [Result<(), Errno>; 2] = [Err(Errno::EIO); 2];

#[test]
fn a_new_vmms_driver_has_lost_nothing() {
    let world = World::new(4, 1);
    world.start(0, begin(1));
    world.lose();
    world.stop(0, 9);
    // It goes on where its rings are: the same driver as before, whatever stopped in between.
    world.start(0, QueueStart { at: 9, ..begin(1) });
    assert_eq!(world.flush(0, 0), Err(Errno::EIO));
    // Another queue of the same driver begins: it must hear of the first one's writes.
    world.start(1, begin(1));
    assert_eq!(world.flush(0, 1), Err(Errno::EIO));
    world.lose();
    world.stop(0, 10);
    world.stop(1, 1);
    // All of them begin, of another VMM.
    world.start(0, begin(2));
    world.start(1, begin(2));
    assert_eq!(world.flush_both(), [Ok(()); 2]);
    world.lose();
    assert_eq!(world.flush_both(), LOST);
}

/// A queue that nobody has used stands at its beginning, whoever its driver is: after a change of memory, a stop of the
/// machine, a reconnect.
#[test]
fn an_idle_queue_that_starts_again_is_no_new_driver() {
    for (vmm, noted) in [(1, false), (2, false), (2, true)] {
        let world = World::new(7, 1);
        world.start(0, begin(1));
        world.start(1, begin(1));
        world.lose();
        world.stop(0, 0);
        world.stop(1, 5);
        world.start(0, QueueStart { noted, ..begin(vmm) });
        world.start(1, QueueStart { at: 5, noted, ..begin(vmm) });
        assert_eq!(world.flush_both(), LOST, "VMM {vmm}, noted: {noted}");
    }
    // The service was killed: only the notes tell.
    let world = World::new(8, 1);
    world.lose();
    world.start(0, QueueStart { noted: true, ..begin(1) });
    assert_eq!(world.flush_both(), LOST);
    // One that takes another's place is proven by the queue that began anew.
    let world = World::new(9, 1);
    world.start(0, begin(1));
    world.start(1, begin(1));
    world.stop(0, 0);
    world.stop(1, 5);
    world.lose();
    world.start(0, begin(2));
    world.start(1, begin(2));
    assert_eq!(world.flush_both(), [Ok(()); 2]);
}

/// A guest that reboots, or wakes up, has its driver begin anew. What it was not told of it still hears, and what one of
/// its queues was told of it does not hear again.
#[test]
fn a_driver_answers_for_the_one_before_it() {
    for told in [false, true] {
        let world = World::new(10, 1);
        world.start(0, begin(1));
        world.start(1, begin(1));
        world.lose();
        if told {
            assert_eq!(world.flush(0, 1), Err(Errno::EIO));
        }
        world.stop(0, 7);
        world.stop(1, 5);
        world.start(0, begin(1));
        world.start(1, begin(1));
        assert_eq!(world.flush_both(), if told { [Ok(()); 2] } else { LOST });
    }
}

/// The service's own flush at a change of the cache mode: it fails if the client has not heard of a loss, and does not
/// count as telling it.
#[test]
fn a_flush_on_behalf_of_a_client_tells_it_nothing() {
    let mut world = World::new(5, 1);
    world.core.ring().set_faults(LOSING);
    assert_eq!(world.flush(0, 1), Err(Errno::EIO));
    world.core.ring().set_faults(NONE);
    world.exports.push(Rc::new(world.exports[0].on_behalf()));
    assert_eq!(world.flush(1, 0), Err(Errno::EIO), "queue 0 has not heard of it");
    world.exports.truncate(1);
    assert_eq!(world.flush(0, 0), Err(Errno::EIO));
    world.exports.push(Rc::new(world.exports[0].on_behalf()));
    assert_eq!(world.flush(1, 0), Ok(()));
}

/// A process before this one has acknowledged writes of which nobody knows what became.
#[test]
fn a_doubt_is_told_once_to_each_queue() {
    let mut world = World::new(6, 1);
    let doubtful = QueueStart { at: 3, doubtful: true, ..begin(1) };
    assert!(!world.start(0, QueueStart { at: 0, ..doubtful }), "a driver that begins has written nothing");
    assert_eq!(world.flush(0, 0), Ok(()));
    world.stop(0, 3);
    assert!(!world.start(0, doubtful), "this process served it before");
    assert!(world.start(1, doubtful));
    world.exports.push(Rc::new(world.exports[0].on_behalf()));
    assert_eq!(world.flush(1, 0), Err(Errno::EIO), "nobody was told, and what is in doubt stays so");
    world.exports.truncate(1);
    for queue in [0, 1] {
        assert_eq!(world.flush(0, queue), Err(Errno::EIO));
        assert_eq!(world.flush(0, queue), Ok(()));
    }
}

/// A sync of another client may be with a server that does not answer.
#[test]
fn a_flush_that_stops_does_not_wait_for_others() {
    for op in [Op::Flush, Op::Write] {
        let world = World::new(11, 1);
        let other = world.losses().begin();
        let (mut tasks, outcome) = (Tasks::new(world.core.clone()), Outcome::default());
        let (channel, flushers, give) = (world.channel.clone(), world.exports[0].clone(), outcome.clone());
        let slot = tasks.add(|io: Io<SimRing>| async move {
            let memory = mapping(512);
            let iovecs = [memory.iovec(0, 512)];
            let data = if op == Op::Write { Data::of(&iovecs) } else { Data::None };
            let (flags, sectors) = (Flags { fua: true, unmap: false }, u32::from(op == Op::Write));
            let request = Request { op, flags, sector: 7, sectors, data };
            give.set(Some(submit(&channel, &io, flushers.queue(0), &request).await));
        });
        let mut pass = || {
            let mut cqes = Vec::new();
            tasks.run_ready();
            world.core.ring().enter(world.core.in_flight() > 0).unwrap();
            world.core.ring().reap(&mut cqes);
            cqes.drain(..).for_each(|cqe| tasks.complete(&cqe));
        };
        (0..100).for_each(|_| pass());
        assert_eq!(outcome.get(), None, "it waits for the other");
        // Not at once: it succeeded, and the other may end in a moment.
        world.core.interrupt(slot);
        (0..100).for_each(|_| pass());
        assert_eq!(outcome.get(), None, "it gives up too early");
        (0..2000).for_each(|_| pass());
        assert_eq!(outcome.get(), Some(Err(Errno::ERESTART)));
        drop(other);
        let expected = world.flush(0, 0);
        assert_eq!(expected, Ok(()), "there was no loss");
    }
}

/// The store has a write, loses it and tells somebody, and only then do we acknowledge it: after all that anybody was told.
#[test]
fn a_write_that_is_late_is_not_vouched_for() {
    for (op, late) in
        [(Op::WriteZeroes, true), (Op::Write, true), (Op::WriteZeroes, false), (Op::Discard, true)]
    {
        let world = World::new(12, 1);
        let losses = world.losses();
        let lose = || {
            losses.report();
            [0, 1].into_iter().for_each(|queue| world.exports[0].queue(queue).hear(losses.epoch()));
        };
        let (mut tasks, outcome) = (Tasks::new(world.core.clone()), Outcome::default());
        if !late {
            lose();
        }
        let (channel, flushers, give) = (world.channel.clone(), world.exports[0].clone(), outcome.clone());
        tasks.add(|io: Io<SimRing>| async move {
            let memory = mapping(512);
            let iovecs = [memory.iovec(0, 512)];
            let data = if op == Op::Write { Data::of(&iovecs) } else { Data::None };
            let request = Request { op, flags: Flags::default(), sector: 7, sectors: 1, data };
            give.set(Some(submit(&channel, &io, flushers.queue(0), &request).await));
        });
        if late {
            assert!(outcome.get().is_none(), "{op}: the store has it");
            lose();
        }
        settle(&world.core, &mut tasks);
        assert_eq!(outcome.get(), Some(Ok(())));
        let expected = if late && op != Op::Discard { Err(Errno::EIO) } else { Ok(()) };
        assert_eq!(world.flush_both(), [expected; 2], "{op}, late: {late}");
        assert_eq!(world.flush_both(), [Ok(()); 2], "told once");
    }
}
