//! A volume whose size changes between requests, and while they are in flight.

use super::model::{once, settle};
use super::*;
use crate::engine::drain_epochs::DrainEpochs;
use crate::engine::{Exports, ResizeError, submit};
use crate::ring::Tasks;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

/// Nobody looks at the volume.
struct Nobody;

impl Exports for Nobody {
    fn can_resize(&self) -> Result<(), String> {
        Ok(())
    }

    fn resize(&self, _: u64) -> Result<(), String> {
        Ok(())
    }

    fn drain(&self) -> bool {
        true
    }
}

const LONG: Duration = Duration::from_secs(3600);

#[test]
fn requests_are_held_against_the_size_of_the_moment() {
    let null = NullConfig { size: Size(1 << 20), block_size: None };
    let volume = Volume::open("test", &VolumeConfig::Null(null)).unwrap();
    let core = Core::new(SimRing::new(1, Faults::default()));
    // As a worker has it: attached before, read-only here and not there.
    let channel = [false, true].map(|read_only| Rc::new(volume.attach(&core, read_only)));
    let reads = |sector| {
        let memory = mapping(512);
        [0, 1].map(|at| once(&core, &channel[at], transfer(Op::Read, sector, memory)))
    };
    assert_eq!((reads(2047), reads(2048)), ([Ok(()); 2], [Err(Errno::EIO); 2]));
    volume.resize(2 << 20, false, &Nobody).unwrap();
    assert_eq!((reads(2048), reads(4095), reads(4096)), ([Ok(()); 2], [Ok(()); 2], [Err(Errno::EIO); 2]));
    volume.resize(1 << 19, true, &Nobody).unwrap();
    assert_eq!((reads(1023), reads(1024)), ([Ok(()); 2], [Err(Errno::EIO); 2]));
}

/// Somebody else changes the size while we do.
struct Another<'a>(&'a Volume, Cell<bool>);

impl Exports for Another<'_> {
    fn can_resize(&self) -> Result<(), String> {
        let refused = self.0.resize(1 << 21, false, &Nobody).unwrap_err();
        assert!(matches!(refused, ResizeError::UnderWay), "{refused}");
        assert!(matches!(self.0.refresh(false, &Nobody), Err(ResizeError::UnderWay)));
        self.1.set(true);
        Ok(())
    }

    fn resize(&self, _: u64) -> Result<(), String> {
        Ok(())
    }

    fn drain(&self) -> bool {
        true
    }
}

/// A store that hangs holds the first; those that come after it do not wait.
#[test]
fn changes_of_size_do_not_queue_up() {
    let null = NullConfig { size: Size(1 << 20), block_size: None };
    let volume = Volume::open("test", &VolumeConfig::Null(null)).unwrap();
    let another = Another(&volume, Cell::new(false));
    volume.resize(1 << 22, false, &another).unwrap();
    assert!(another.1.get());
    volume.resize(1 << 23, false, &Nobody).unwrap();
}

#[test]
fn what_a_memory_volume_lost_comes_back_as_zeroes() {
    let size = Size(1 << 20);
    let volume =
        Volume::open("test", &VolumeConfig::Memory(MemoryConfig { size, block_size: None })).unwrap();
    let core = Core::new(SimRing::new(1, Faults::default()));
    let channel = Rc::new(volume.attach(&core, false));
    let memory = mapping(1 << 20);
    let (start, end) = ([7; 4096], [0; 4096]);
    for at in (0..1 << 20).step_by(4096) {
        put(memory, at, &start);
    }
    once(&core, &channel, transfer(Op::Write, 0, memory)).unwrap();
    volume.resize(1 << 19, true, &Nobody).unwrap();
    volume.resize(1 << 20, false, &Nobody).unwrap();
    once(&core, &channel, transfer(Op::Read, 0, memory)).unwrap();
    assert_eq!(get(memory, (1 << 19) - 4096, 4096), start);
    assert_eq!(get(memory, 1 << 19, 4096), end);
}

type Life = Pin<Box<dyn Future<Output = ()>>>;

/// A write at the old end is under way when the volume shrinks: it completes, later ones are refused, and a drain
/// lasts as long as it does.
#[test]
fn a_drain_waits_for_what_was_admitted() {
    for seed in 0..20 {
        let (file, _) = image("/tmp", 64 * 512);
        let volume = open(file.path(), false, None);
        let core = Core::new(SimRing::new(seed, Faults { delay: 90, ..Faults::default() }));
        // Nothing is carried out on the spot.
        core.ring().set_faults(Faults { delay: 90, no_nowait: true, ..Faults::default() });
        let channel = Rc::new(volume.attach(&core, false));
        let memory = mapping(512);
        let order = Rc::new(RefCell::new(Vec::new()));
        let mut tasks = Tasks::<SimRing, Life>::new(core.clone());
        let write = |name: &'static str| {
            let (channel, order) = (channel.clone(), order.clone());
            move |io| -> Life {
                Box::pin(async move {
                    // Must reach the disk, which a worker never waits for.
                    let mut request = transfer(Op::Write, 63, memory);
                    request.flags.fua = true;
                    let result = submit(&channel, &io, &Flusher::default(), &request).await;
                    order.borrow_mut().push((name, result));
                })
            }
        };
        tasks.add(write("admitted"));
        volume.geometry().capacity.set(32);
        tasks.add(|io| {
            let (channel, order) = (channel.clone(), order.clone());
            Box::pin(async move {
                assert!(channel.drain(&io, LONG).await);
                order.borrow_mut().push(("drained", Ok(())));
            })
        });
        tasks.add(write("late"));
        settle(&core, &mut tasks);
        let expected = [("late", Err(Errno::ENOSPC)), ("admitted", Ok(())), ("drained", Ok(()))];
        assert_eq!(*order.borrow(), expected, "seed {seed}");
    }
}

#[test]
fn new_requests_do_not_hold_a_drain_up_and_old_ones_do() {
    let core = Core::new(SimRing::new(1, Faults::default()));
    let drain_epochs = Rc::new(DrainEpochs::default());
    let pass = |limit| {
        let (drain_epochs, result) = (drain_epochs.clone(), Rc::new(Cell::new(None)));
        let mut tasks = Tasks::<SimRing, Life>::new(core.clone());
        let told = result.clone();
        tasks.add(|io| Box::pin(async move { told.set(Some(drain_epochs.pass(&io, limit).await)) }));
        (tasks, result)
    };
    let old = drain_epochs.enter();
    let (mut tasks, result) = pass(LONG);
    let new = drain_epochs.enter();
    assert_eq!(result.get(), None);
    drop(old);
    settle(&core, &mut tasks);
    assert_eq!(result.get(), Some(true), "although a new request is there");
    // Which the next drain waits for, and gives up on; the one after that still knows of it.
    for _ in 0..2 {
        let (mut tasks, result) = pass(Duration::from_millis(3));
        let newer = drain_epochs.enter();
        settle(&core, &mut tasks);
        assert_eq!(result.get(), Some(false));
        drop(newer);
    }
    drop(new);
    let (mut tasks, result) = pass(LONG);
    settle(&core, &mut tasks);
    assert_eq!(result.get(), Some(true));
}
