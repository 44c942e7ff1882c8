//! Faults as a client meets them.

use super::*;
use crate::block::{Data, Flags, Size};
use crate::engine::config::{MemoryConfig, PolicyConfig, TopologyConfig, VolumeConfig};
use crate::engine::tests::settle;
use crate::engine::{Flushers, Opener, Volume, VolumeChannel, submit};
use crate::ring::sim::{Faults, SimRing, get, put};
use crate::ring::{Core, Mapping, Tasks};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

const SECTORS: u32 = 64;

/// A memory volume with faults on it, and a client of it.
struct World {
    core: Rc<Core<SimRing>>,
    volume: Volume,
    channel: Rc<VolumeChannel<SimRing>>,
    flushers: Rc<Flushers>,
}

impl World {
    fn new(settings: &str) -> World {
        let mut fault: serde_json::Value = serde_json::from_str(settings).unwrap();
        fault["base"] = "below".into();
        let fault = VolumeConfig::from_driver("fault", fault).unwrap();
        fault.check().unwrap();
        let memory = MemoryConfig { size: Size(u64::from(SECTORS) * 512), block_size: None };
        let volumes = BTreeMap::from([("below".into(), VolumeConfig::Memory(memory)), ("top".into(), fault)]);
        let opener = Opener::new("top", &volumes, PolicyConfig::default(), TopologyConfig::default());
        let volume = opener.unwrap().open(Duration::MAX).unwrap();
        let core = Core::new(SimRing::new(1, Faults::default()));
        let channel = Rc::new(volume.attach(&core, false));
        let flushers = Rc::new(Flushers::new(&volume, 2));
        World { core, volume, channel, flushers }
    }

    fn request(&self, op: Op, sector: u64, sectors: u32, byte: u8) -> (Result<(), Errno>, Vec<u8>) {
        self.submit(Request { op, flags: Flags::default(), sector, sectors, data: Data::None }, byte, 0)
    }

    /// Carries `request` out for a queue, with memory of its length full of `byte`, and says what that holds afterwards.
    fn submit(&self, request: Request<'static>, byte: u8, queue: usize) -> (Result<(), Errno>, Vec<u8>) {
        let result = Rc::new(Cell::new(None));
        let found = Rc::new(RefCell::new(Vec::new()));
        let mut tasks = Tasks::new(self.core.clone());
        let (channel, flushers) = (self.channel.clone(), self.flushers.clone());
        let (told, shown) = (result.clone(), found.clone());
        tasks.add(|io| async move {
            let len = request.len() as usize;
            let memory = Mapping::anonymous(len.max(512)).unwrap();
            put(&memory, 0, &vec![byte; len]);
            let iovecs = [memory.iovec(0, len)];
            let moves = matches!(request.op, Op::Read | Op::Write);
            let data = if moves { Data::of(&iovecs) } else { Data::None };
            let request = Request { data, ..request };
            told.set(Some(submit(&channel, &io, flushers.queue(queue), &request).await));
            *shown.borrow_mut() = get(&memory, 0, len);
        });
        settle(&self.core, &mut tasks);
        (result.get().unwrap(), found.take())
    }

    fn flush(&self, queue: usize) -> Result<(), Errno> {
        let flush =
            Request { op: Op::Flush, flags: Flags::default(), sector: 0, sectors: 0, data: Data::None };
        self.submit(flush, 0, queue).0
    }

    /// What the volume holds, with the faults switched off for the look.
    fn contents(&self) -> Vec<u8> {
        assert_eq!(switch(&self.volume, false), 1);
        let (result, found) = self.request(Op::Read, 0, SECTORS, 0);
        result.unwrap();
        assert_eq!(switch(&self.volume, true), 1);
        found
    }
}

#[test]
fn faults_are_of_their_operation_and_place() {
    let world = World::new(r#"{"errors": "100%", "operations": "write+discard", "from": 4096, "to": "8K"}"#);
    for (op, sector, sectors, expected) in [
        (Op::Write, 0, 8, Ok(())),
        (Op::Write, 7, 2, Err(Errno::EIO)),
        (Op::Write, 15, 8, Err(Errno::EIO)),
        (Op::Write, 16, 8, Ok(())),
        (Op::Read, 8, 8, Ok(())),
        (Op::Discard, 8, 8, Err(Errno::EIO)),
        (Op::WriteZeroes, 8, 8, Ok(())),
    ] {
        assert_eq!(world.request(op, sector, sectors, 1).0, expected, "{op} {sector}");
    }
    assert_eq!(world.flush(0), Ok(()));
    let world = World::new(r#"{"errors": "100%", "operations": "flush", "to": 512}"#);
    assert_eq!(world.flush(0), Err(Errno::EIO), "a flush has no place");
    let world = World::new(r#"{"errors": "100%", "error": "no-space"}"#);
    assert_eq!(world.request(Op::Write, 0, 1, 1).0, Err(Errno::ENOSPC));
}

#[test]
fn a_switch_takes_the_faults_away_and_brings_them_back() {
    let world = World::new(r#"{"errors": "100%", "enabled": false}"#);
    assert_eq!(world.request(Op::Read, 0, 1, 0).0, Ok(()));
    assert_eq!(switch(&world.volume, true), 1);
    assert_eq!(world.request(Op::Read, 0, 1, 0).0, Err(Errno::EIO));
    assert_eq!(switch(&world.volume, false), 1);
    assert_eq!(world.request(Op::Read, 0, 1, 0).0, Ok(()));
    assert_eq!(world.volume.switch("other", true), 0);
}

/// Over many requests the rate is what was asked for, and the same seed has the same victims.
#[test]
fn chances_are_kept_and_repeat() {
    let victims = |seed: u32, chance: &str| {
        let world = World::new(&format!(r#"{{"errors": "{chance}", "seed": {seed}}}"#));
        let fails = |_| world.request(Op::Read, 0, 1, 0).0.is_err();
        (0..4000).map(fails).collect::<Vec<bool>>()
    };
    let rate = |victims: &[bool]| victims.iter().filter(|fails| **fails).count();
    let quarter = victims(7, "25%");
    assert!((900..1100).contains(&rate(&quarter)), "{}", rate(&quarter));
    assert_eq!(victims(7, "25%"), quarter);
    assert_ne!(victims(8, "25%"), quarter);
    assert_eq!((rate(&victims(7, "0%")), rate(&victims(7, "100%"))), (0, 4000));
}

#[test]
fn a_torn_write_leaves_its_beginning() {
    let world = World::new(r#"{"torn-writes": "100%"}"#);
    let mut lengths = Vec::new();
    for byte in 1..=40 {
        assert_eq!(world.request(Op::Write, 0, 16, byte).0, Err(Errno::EIO));
        let found = world.contents();
        let whole = found.iter().take_while(|found| **found == byte).count();
        assert_eq!(whole % 512, 0, "a sector is never torn");
        assert!(whole < 16 * 512 && !found[whole..].contains(&byte));
        lengths.push(whole);
    }
    lengths.sort_unstable();
    lengths.dedup();
    assert!(lengths.len() > 5, "{lengths:?}");
}

#[test]
fn a_short_read_fails_with_its_beginning() {
    let world = World::new(r#"{"short-reads": "100%", "enabled": false}"#);
    assert_eq!(world.request(Op::Write, 0, 16, 3).0, Ok(()));
    switch(&world.volume, true);
    let (result, found) = world.request(Op::Read, 0, 16, 9);
    assert_eq!(result, Err(Errno::EIO));
    let whole = found.iter().take_while(|found| **found == 3).count();
    assert!(whole % 512 == 0 && whole < 16 * 512 && found[whole..].iter().all(|byte| *byte == 9));
}

#[test]
fn a_lost_write_is_told_once_to_whoever_flushes() {
    let world = World::new(r#"{"lost-writes": "100%"}"#);
    assert!(world.volume.geometry().volatile_cache, "or nobody would flush");
    assert_eq!(world.request(Op::Write, 0, 1, 5).0, Ok(()));
    assert_eq!(world.contents()[0], 0, "it was not stored");
    for queue in [0, 1] {
        assert_eq!(world.flush(queue), Err(Errno::EIO));
        assert_eq!(world.flush(queue), Ok(()));
    }
    let flags = Flags { fua: true, unmap: false };
    let durable = Request { op: Op::Write, flags, sector: 1, sectors: 1, data: Data::None };
    assert_eq!(world.submit(durable, 6, 0).0, Ok(()));
    assert_eq!(world.contents()[512], 6, "FUA means stored");
}

#[test]
fn a_late_request_is_carried_out() {
    let world = World::new(r#"{"delays": "100%", "delay": 20}"#);
    assert_eq!(world.request(Op::Write, 3, 1, 7).0, Ok(()));
    assert_eq!(world.contents()[3 * 512], 7);
}

/// What frees a request that is to be late by ten minutes, and what becomes of it then.
#[test]
fn a_late_request_is_let_go() {
    type Free = fn(&World, u32);
    let frees: [(Free, Result<(), Errno>); 3] = [
        (|world, _| assert_eq!(switch(&world.volume, false), 1), Ok(())),
        (|world, _| world.channel.abandon(), Err(Errno::EIO)),
        (|world, slot| world.core.interrupt(slot), Err(Errno::EIO)),
    ];
    for (number, (free, expected)) in frees.into_iter().enumerate() {
        let world = World::new(r#"{"delays": "100%", "delay": 600000, "errors": "100%"}"#);
        let result = Rc::new(Cell::new(None));
        let mut tasks = Tasks::new(world.core.clone());
        let (channel, flushers, told) = (world.channel.clone(), world.flushers.clone(), result.clone());
        let slot = tasks.add(|io| async move {
            let op = Op::Discard;
            let request = Request { op, flags: Flags::default(), sector: 0, sectors: 8, data: Data::None };
            told.set(Some(submit(&channel, &io, flushers.queue(0), &request).await));
        });
        let mut cqes = Vec::new();
        let mut turn = || {
            while tasks.run_ready() {}
            world.core.ring().enter(world.core.in_flight() > 0).unwrap();
            world.core.ring().reap(&mut cqes);
            cqes.drain(..).for_each(|cqe| tasks.complete(&cqe));
        };
        // A second each, for which the ring has nothing else to do.
        (0..30).for_each(|_| turn());
        assert_eq!(result.get(), None, "{number}");
        free(&world, slot);
        (0..5).for_each(|_| turn());
        assert_eq!(result.get(), Some(expected), "{number}");
    }
}

#[test]
fn chances_are_written_as_percentages() {
    for (text, millionths) in
        [("0%", 0), ("100%", 1_000_000), ("0.0001%", 1), ("12.5%", 125_000), ("007%", 70_000)]
    {
        let chance: Chance = text.parse().unwrap();
        assert_eq!(chance.per_million(), millionths, "{text}");
        assert_eq!(chance.to_string().parse(), Ok(chance));
    }
    for text in
        ["", "1", "%", "-1%", "101%", "100.1%", "1.%", ".5%", "0.00001%", "1e1%", "+1%", "1 %", "9999%"]
    {
        assert!(text.parse::<Chance>().is_err(), "{text}");
    }
}

#[test]
fn settings_are_checked() {
    let read = |json: &str| {
        let mut json = serde_json::Deserializer::from_str(json);
        VolumeConfig::from_driver("fault", &mut json).map_err(|error| error.to_string())
    };
    for json in [r#"{"base": "a", "operations": "read+flash"}"#, r#"{"base": "a", "operations": ""}"#] {
        let error = read(json).unwrap_err();
        assert!(error.contains("write-zeroes"), "{error}");
    }
    for (json, key) in [
        (r#"{"base": "a", "delay": 0}"#, "delay"),
        (r#"{"base": "a", "delay": 600001}"#, "delay"),
        (r#"{"base": "a", "from": "1M", "to": "1M"}"#, "to"),
    ] {
        assert_eq!(read(json).unwrap().check().unwrap_err().0, key);
    }
    let shown = read(r#"{"base": "a", "errors": "0.5%", "lost-writes": "1%", "enabled": false}"#).unwrap();
    assert_eq!(shown.to_string(), "fault:a, errors 0.5%, lost-writes 1%, switched off");
    let shown = r#"{"base": "a", "errors": "1%", "error": "no-space", "delays": "2%", "delay": 7, "seed": 3,
        "operations": "write+read", "from": "1M", "to": 8192000}"#;
    assert_eq!(
        read(shown).unwrap().to_string(),
        "fault:a, errors 1%, delays 2%, delay 7 ms, error no-space, operations read+write, from 1M, to 8000K, seed 3"
    );
    for (json, words) in [
        (r#"{"base": "a", "errors": 0.5}"#, "a chance in quotes such as \"0.5%\""),
        (r#"{"base": "a", "torn-writes": null}"#, "a chance in quotes such as \"0.5%\""),
        (r#"{"base": "a", "operations": ["read"]}"#, "operations in quotes such as \"read+write\""),
    ] {
        let error = read(json).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
    assert_eq!(FaultConfig::NAME, "fault");
}
