//! The whole client, over a real ring, against the server of [`server`].

#![forbid(unsafe_code)]

mod bench;
mod server;

use super::handshake::Blocks;
use super::protocol::*;
use super::{Error, NbdStore};
use crate::block::{Data, Errno, Flags, Geometry, Op, Request};
use crate::engine::config::{NbdConfig, OnError, PolicyConfig, VolumeConfig};
use crate::engine::node::Leaf;
use crate::engine::{Flusher, Flushers, Volume, submit};
use bench::*;
use server::{ALL_FLAGS, Fault, Manners, Server};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

fn manners() -> Manners {
    Manners {
        flags: ALL_FLAGS,
        size: 4 << 20,
        blocks: Blocks { minimum: 1, preferred: 4096, maximum: 1 << 20 },
        structured: true,
        fragment: false,
        reorder: false,
        drop_one_in: 0,
        refuse_one_in: 0,
        seed: 1,
    }
}

const ABLE: Abilities = Abilities { refusals: false, zeroes: true, discard: true };

fn opened(server: &Server, reconnect: u64) -> (NbdStore, Geometry) {
    NbdStore::open(&config(&server.uri(), reconnect)).unwrap()
}

#[test]
fn every_kind_of_server_agrees_with_the_model() {
    for seed in 0..8u64 {
        let dir = tempfile::tempdir().unwrap();
        let refusals = seed % 4 == 3;
        let manners = Manners {
            structured: seed & 1 == 0,
            fragment: seed & 2 != 0,
            reorder: seed & 4 != 0,
            refuse_one_in: if refusals { 10 } else { 0 },
            seed,
            ..manners()
        };
        let server = Server::start(dir.path(), manners);
        let mut bench = Bench::new();
        let ops = bench.attach(&opened(&server, 0).0);
        bench.until("four connections", || server.shared.present.load(SeqCst) == 4);
        let models = crowd(&mut bench, &ops, 60, Abilities { refusals, ..ABLE });
        assert!(*server.shared.disk.lock().unwrap() == models.concat(), "seed {seed}");
        bench.finish(ops);
        assert_eq!(server.shared.accepted.load(SeqCst), 4, "and none of them was lost");
    }
}

#[test]
fn a_flaky_server_is_not_noticed_with_reconnect() {
    for seed in 0..4u64 {
        let dir = tempfile::tempdir().unwrap();
        // Connections that go, of a server that stays: its cache is not lost, and with several connections one
        // that vouches for it mostly remains. So no flushes here but those of FUA, natively done.
        let manners = Manners {
            structured: seed & 1 == 0,
            fragment: true,
            reorder: seed & 2 != 0,
            drop_one_in: 15,
            flags: ALL_FLAGS & !NBD_FLAG_SEND_FLUSH,
            seed,
            ..manners()
        };
        let server = Server::start(dir.path(), manners);
        let mut bench = Bench::new();
        let ops = bench.attach(&opened(&server, 60).0);
        let models = crowd(&mut bench, &ops, 40, ABLE);
        assert!(*server.shared.disk.lock().unwrap() == models.concat(), "seed {seed}");
        assert!(server.shared.accepted.load(SeqCst) > 8, "it was flaky");
        bench.finish(ops);
    }
}

#[test]
fn one_connection_where_the_server_allows_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ALL_FLAGS & !NBD_FLAG_CAN_MULTI_CONN;
    let server = Server::start(dir.path(), Manners { flags, ..manners() });
    let asked = NbdConfig { connections: Some(8), ..config(&server.uri(), 0) };
    let (volume, _) = NbdStore::open(&asked).unwrap();
    assert!(!volume.multi_conn());
    let mut bench = Bench::new();
    let first = bench.attach(&volume);
    let second = bench.attach(&volume);
    bench.write(&first, 4096, &[5; 512], false).unwrap();
    assert_eq!(bench.read(&second, 4096, 512).unwrap(), [5; 512]);
    drop(first);
    assert_eq!(bench.read(&second, 4096, 512).unwrap(), [5; 512], "one user's end is not the other's");
    bench.rest(Duration::from_millis(50));
    assert_eq!(server.shared.accepted.load(SeqCst), 1, "that of open is used");
    bench.finish(second);
    let deadline = Instant::now() + LONG;
    while server.shared.good_byes.load(SeqCst) == 0 {
        assert!(Instant::now() < deadline, "no good-bye");
    }
}

#[test]
fn the_geometry_is_what_the_server_says() {
    let dir = tempfile::tempdir().unwrap();
    let blocks = Blocks { minimum: 1024, preferred: 65536, maximum: 10_000 };
    let flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_READ_ONLY;
    let server = Server::start(dir.path(), Manners { size: 10_000, flags, blocks, ..manners() });
    let (volume, geometry) = opened(&server, 0);
    assert_eq!((geometry.bytes(), geometry.logical_block, geometry.physical_block), (9216, 1024, 4096));
    assert_eq!(geometry.io_min, 65536);
    assert!(geometry.read_only && !geometry.volatile_cache && geometry.discard.is_none());
    assert_eq!(volume.remote.max_payload(&blocks), 9216);
    let server_says = |change: &dyn Fn(&mut Manners)| {
        change(&mut server.shared.manners.lock().unwrap());
        NbdStore::open(&config(&server.uri(), 0)).map(|(_, geometry)| geometry)
    };
    let all = server_says(&|manners| *manners = Manners { flags: ALL_FLAGS, ..self::manners() }).unwrap();
    assert!(!all.read_only && all.volatile_cache);
    assert_eq!(all.discard.unwrap().granularity, 4096);
    let asked = NbdConfig { read_only: true, ..config(&server.uri(), 0) };
    assert!(NbdStore::open(&asked).unwrap().1.read_only);
    let none = server_says(&|manners| manners.size = 0);
    assert!(matches!(none, Err(Error::Geometry(_))), "{none:?}");
    let huge = server_says(&|manners| manners.size = u64::MAX);
    assert!(matches!(huge, Err(Error::Geometry(_))), "{huge:?}");
    let coarse =
        server_says(&|manners| manners.blocks = Blocks { minimum: 8192, preferred: 8192, maximum: 8192 });
    assert!(matches!(coarse, Err(Error::Blocks { .. })), "{coarse:?}");
    let tiny = server_says(&|manners| manners.blocks = Blocks { minimum: 1, preferred: 1, maximum: 511 });
    assert!(matches!(tiny, Err(Error::Blocks { .. })), "{tiny:?}");
}

#[test]
fn large_requests_are_split_and_long_lists_too() {
    let dir = tempfile::tempdir().unwrap();
    let blocks = Blocks { minimum: 1, preferred: 4096, maximum: 70_000 };
    let server = Server::start(dir.path(), Manners { blocks, ..manners() });
    let mut bench = Bench::new();
    let ops = bench.attach(&opened(&server, 0).0);
    let bytes: Vec<u8> = (0..1 << 20).map(|n: u32| (n ^ n >> 8 ^ n >> 16) as u8).collect();
    let (user, expected) = (ops.clone(), bytes.clone());
    bench.run(|io| async move {
        for pieces in [1, 7, 3000, 40_000] {
            write(&user, &io, 4096, &expected, pieces, false).await.unwrap();
            assert!(read(&user, &io, 4096, expected.len(), pieces).await.unwrap() == expected);
        }
    });
    assert!(server.shared.disk.lock().unwrap()[4096..][..1 << 20] == bytes);
    assert_eq!(server.shared.longest.load(SeqCst), 70_000 / 512 * 512);
    bench.finish(ops);
}

#[test]
fn a_server_without_write_zeroes_leaves_them_to_the_engine() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ALL_FLAGS & !NBD_FLAG_SEND_WRITE_ZEROES & !NBD_FLAG_SEND_FUA;
    let server = Server::start(dir.path(), Manners { flags, ..manners() });
    let mut bench = Bench::new();
    let ops = bench.attach(&opened(&server, 0).0);
    let user = ops.clone();
    let answer = bench.run(|io| async move { user.write_zeroes(&io, 0, 512, true).await });
    assert_eq!(answer, Err(Errno::EOPNOTSUPP));
    bench.write(&ops, 0, &[1; 512], true).unwrap();
    assert_eq!(server.shared.flushes.load(SeqCst), 1, "FUA by flush");
    assert_eq!(server.shared.stable.lock().unwrap()[..512], [1; 512]);
    bench.finish(ops);
}

/// Everything a server may do to a request in flight, without reconnecting.
#[test]
fn a_broken_connection_fails_what_is_in_flight_and_heals() {
    let data = |cookie: u64, offset: u64, length: usize| {
        let payload = [offset.to_be_bytes().to_vec(), vec![1; length]].concat();
        tests::structured(cookie, true, NBD_REPLY_TYPE_OFFSET_DATA, &payload)
    };
    let faults = [
        Fault::Cut(0),
        Fault::Cut(7),
        Fault::Cut(20),
        Fault::Cut(1000),
        Fault::Vanish,
        Fault::WrongCookie,
        Fault::Error(NBD_ESHUTDOWN),
        Fault::Say(vec![0xff; 100]),
        Fault::Say(vec![0; 100_000]),
        Fault::Say(tests::simple(0, 0)),
        Fault::Say(data(u64::MAX, 0, 4096)),
        Fault::Say(data(1 << 32, 1 << 20, 4096)),
        Fault::Say(tests::structured(1 << 32, true, 77, &[])),
    ];
    for structured in [true, false] {
        for fault in &faults {
            let dir = tempfile::tempdir().unwrap();
            let flags = ALL_FLAGS & !NBD_FLAG_CAN_MULTI_CONN;
            let server = Server::start(dir.path(), Manners { flags, structured, ..manners() });
            let mut bench = Bench::new();
            let ops = bench.attach(&opened(&server, 0).0);
            bench.write(&ops, 0, &[3; 8192], true).unwrap();
            server.fault(fault.clone());
            assert_eq!(bench.read(&ops, 0, 8192).err(), Some(Errno::EIO), "{fault:?}");
            bench.until_back(&ops);
            assert!(bench.read(&ops, 0, 8192).unwrap() == [3; 8192], "{fault:?}");
            bench.finish(ops);
        }
    }
}

#[test]
fn errors_of_the_server_are_passed_on_and_the_connection_stays() {
    let dir = tempfile::tempdir().unwrap();
    let server =
        Server::start(dir.path(), Manners { flags: ALL_FLAGS & !NBD_FLAG_CAN_MULTI_CONN, ..manners() });
    let mut bench = Bench::new();
    let ops = bench.attach(&opened(&server, 0).0);
    for (error, errno) in [(NBD_EPERM, libc::EPERM), (NBD_EIO, libc::EIO), (NBD_ENOMEM, libc::ENOMEM)] {
        server.fault(Fault::Error(error));
        assert_eq!(bench.read(&ops, 0, 512).unwrap_err().raw(), errno);
        server.fault(Fault::Error(error));
        assert_eq!(bench.write(&ops, 0, &[1; 512], false).unwrap_err().raw(), errno);
        server.fault(Fault::Error(error));
        assert_eq!(bench.flush(&ops).unwrap_err().raw(), errno);
    }
    assert_eq!(server.shared.accepted.load(SeqCst), 1);
    bench.finish(ops);
}

#[test]
fn without_reconnect_a_lost_server_fails_requests_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path(), manners());
    let mut bench = Bench::new();
    let ops = bench.attach(&opened(&server, 0).0);
    bench.write(&ops, 0, &[1; 512], true).unwrap();
    server.crash();
    let begun = Instant::now();
    let first = bench.read(&ops, 0, 512).unwrap_err();
    assert!(first == Errno::EIO || first == Errno::ENOTCONN, "{first}");
    bench.rest(Duration::from_millis(50));
    for _ in 0..100 {
        assert_eq!(bench.read(&ops, 0, 512), Err(Errno::ENOTCONN));
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "it waited");
    server.listen();
    bench.until_back(&ops);
    assert_eq!(bench.read(&ops, 0, 512).unwrap(), [1; 512]);
    bench.finish(ops);
}

#[test]
fn with_reconnect_requests_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path(), manners());
    let mut bench = Bench::new();
    let ops = bench.attach(&opened(&server, 60).0);
    bench.write(&ops, 0, &[1; 512], true).unwrap();
    // One in flight at the crash, one that comes afterwards.
    server.fault(Fault::Hang);
    let results = Rc::new(RefCell::new(Vec::new()));
    for round in 0..2 {
        let (user, results) = (ops.clone(), results.clone());
        bench.start(|io| async move {
            let result = write(&user, &io, 512 * (round + 1), &[7; 512], 1, true).await;
            results.borrow_mut().push(result);
        });
        bench.rest(Duration::from_millis(50));
        if round == 0 {
            server.crash();
            bench.rest(Duration::from_millis(50));
        }
    }
    assert_eq!(results.borrow().len(), 0);
    server.listen();
    bench.until("both writes", || results.borrow().len() == 2);
    assert_eq!(*results.borrow(), [Ok(()), Ok(())]);
    assert_eq!(bench.read(&ops, 0, 1536).unwrap(), [[1; 512], [7; 512], [7; 512]].concat());
    assert_eq!(bench.flush(&ops), Ok(()), "every write was FUA");
    bench.finish(ops);
}

/// Where connections are not waited for, the volume's policy is: also for a flush, which never left.
#[test]
fn a_policy_outlasts_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path(), manners());
    let volume = Volume::open("far", &VolumeConfig::Nbd(config(&server.uri(), 0))).unwrap();
    let policy = PolicyConfig { on_error: OnError::Retry, retry_for: Some(60), required: None };
    let volume = volume.with_policy(policy);
    let mut bench = Bench::new();
    let channel = Rc::new(volume.attach(&bench.core, false));
    let results = Rc::new(RefCell::new(Vec::new()));
    let begin = |bench: &mut Bench, op: Op| {
        let (channel, results) = (channel.clone(), results.clone());
        bench.start(move |io| async move {
            let sectors = if op == Op::Flush { 0 } else { 8 };
            let (flags, data) = (Flags::default(), Data::None);
            let request = Request { op, flags, sector: 0, sectors, data };
            let result = submit(&channel, &io, &Flusher::default(), &request).await;
            results.borrow_mut().push(result);
        });
    };
    begin(&mut bench, Op::WriteZeroes);
    begin(&mut bench, Op::Flush);
    bench.until("requests before the crash", || results.borrow().len() == 2);
    begin(&mut bench, Op::Flush);
    bench.until("a flush before the crash", || results.borrow().len() == 3);
    server.crash();
    // Until the loss is noticed.
    bench.rest(Duration::from_millis(300));
    begin(&mut bench, Op::WriteZeroes);
    begin(&mut bench, Op::Flush);
    bench.until("requests that wait", || volume.policy_state().waiting == 2);
    server.listen();
    bench.until("requests after the restart", || results.borrow().len() == 5);
    assert_eq!(*results.borrow(), [Ok(()); 5]);
}

#[test]
fn patience_ends() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path(), manners());
    let mut bench = Bench::new();
    let ops = bench.attach(&opened(&server, 1).0);
    bench.write(&ops, 0, &[1; 512], true).unwrap();
    server.crash();
    let begun = Instant::now();
    assert!(bench.read(&ops, 0, 512).is_err());
    let waited = begun.elapsed();
    assert!(waited > Duration::from_millis(800) && waited < Duration::from_secs(20), "{waited:?}");
    let begun = Instant::now();
    assert_eq!(bench.read(&ops, 0, 512), Err(Errno::ENOTCONN));
    assert!(begun.elapsed() < Duration::from_millis(500), "patience is over until the server is back");
    server.listen();
    bench.until_back(&ops);
    bench.finish(ops);
}

#[test]
fn a_server_that_always_hangs_up_is_not_asked_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), manners());
    let mut bench = Bench::new();
    let ops = bench.attach(&opened(&server, 1).0);
    server.shared.manners.lock().unwrap().drop_one_in = 1;
    let begun = Instant::now();
    assert_eq!(bench.write(&ops, 0, &[1; 512], false), Err(Errno::EIO));
    let waited = begun.elapsed();
    assert!(waited >= Duration::from_secs(1) && waited < Duration::from_secs(20), "{waited:?}");
    let accepted = server.shared.accepted.load(SeqCst);
    assert!(accepted < 60, "{accepted} connections in {waited:?}");
    bench.finish(ops);
}

/// The rule of unflushed writes, in a crash that really loses what was not flushed.
#[test]
fn no_flush_succeeds_over_lost_writes() {
    for connections in [1, 4] {
        let dir = tempfile::tempdir().unwrap();
        let mut server = Server::start(dir.path(), manners());
        let asked = NbdConfig { connections: Some(connections), ..config(&server.uri(), 60) };
        let (volume, _) = NbdStore::open(&asked).unwrap();
        let mut bench = Bench::new();
        let ops = bench.attach(&volume);
        bench.write(&ops, 0, &[1; 512], false).unwrap();
        bench.flush(&ops).unwrap();
        // Nothing owed: a restart is no reason to fail.
        server.crash();
        server.listen();
        assert_eq!(bench.read(&ops, 0, 512).unwrap(), [1; 512]);
        assert_eq!(bench.flush(&ops), Ok(()));
        // Acknowledged, not flushed, lost.
        bench.write(&ops, 0, &[2; 512], false).unwrap();
        server.crash();
        server.listen();
        assert_eq!(bench.read(&ops, 0, 512).unwrap(), [1; 512], "the write is lost");
        bench.write(&ops, 512, &[3; 512], false).unwrap();
        assert_eq!(volume.losses().epoch(), 0);
        assert_eq!(bench.flush(&ops), Err(Errno::EIO));
        assert_eq!(volume.losses().epoch(), 1, "everybody else is told");
        assert_eq!(bench.flush(&ops), Ok(()), "the store tells once");
        assert_eq!(volume.losses().epoch(), 1);
        bench.finish(ops);
    }
}

/// Through two exports of one worker, whose server crashes: each hears of it, and neither twice.
#[test]
fn every_export_hears_of_lost_writes() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path(), manners());
    let volume = Volume::open("far", &VolumeConfig::Nbd(config(&server.uri(), 60))).unwrap();
    let mut bench = Bench::new();
    let exports = [0, 1].map(|_| Rc::new(Flushers::new(&volume, 2)));
    let channel = Rc::new(volume.attach(&bench.core, false));
    let mut ask = |op: Op, flushers: &Rc<Flushers>, queue: usize| {
        let (channel, flushers) = (channel.clone(), flushers.clone());
        bench.run(move |io| async move {
            let (flags, sectors) = (Flags::default(), if op == Op::Flush { 0 } else { 8 });
            let request = Request { op, flags, sector: 0, sectors, data: Data::None };
            submit(&channel, &io, flushers.queue(queue), &request).await
        })
    };
    ask(Op::WriteZeroes, &exports[0], 0).unwrap();
    server.crash();
    server.listen();
    for flushers in &exports {
        for queue in [0, 1] {
            assert_eq!(ask(Op::Flush, flushers, queue), Err(Errno::EIO), "queue {queue}");
            assert_eq!(ask(Op::Flush, flushers, queue), Ok(()), "queue {queue}");
        }
    }
    let late = Rc::new(Flushers::new(&volume, 1));
    assert_eq!(ask(Op::Flush, &late, 0), Ok(()), "an export that was made afterwards has lost nothing");
}

/// A flush that waits for the server when its queue stops is made again: it has told nobody of a loss that another
/// export was told of meanwhile.
#[test]
fn a_flush_that_is_put_off_has_told_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path(), manners());
    let volume = Volume::open("far", &VolumeConfig::Nbd(config(&server.uri(), 60))).unwrap();
    let mut bench = Bench::new();
    let (first, second) = (Rc::new(Flushers::new(&volume, 1)), Rc::new(Flushers::new(&volume, 1)));
    let channel = Rc::new(volume.attach(&bench.core, false));
    let flush = |flushers: &Rc<Flushers>| {
        let (channel, flushers) = (channel.clone(), flushers.clone());
        move |io| async move {
            let data = Data::None;
            let request = Request { op: Op::Flush, flags: Flags::default(), sector: 0, sectors: 0, data };
            submit(&channel, &io, flushers.queue(0), &request).await
        }
    };
    let (user, flags) = (channel.clone(), Flags::default());
    let whose = first.clone();
    let write = move |io| async move {
        let request = Request { op: Op::WriteZeroes, flags, sector: 0, sectors: 8, data: Data::None };
        submit(&user, &io, whose.queue(0), &request).await
    };
    bench.run(write).unwrap();
    server.crash();
    server.listen();
    assert_eq!(bench.run(flush(&second)), Err(Errno::EIO), "the write is lost, and somebody else is told");
    server.crash();
    bench.rest(Duration::from_millis(300));
    let (put_off, result) = (flush(&first), Rc::new(Cell::new(None)));
    let give = result.clone();
    let slot = bench.start(|io| async move { give.set(Some(put_off(io).await)) });
    bench.rest(Duration::from_millis(50));
    bench.core.interrupt(slot);
    bench.until("the interrupted one", || result.get().is_some());
    assert_eq!(result.get(), Some(Err(Errno::ERESTART)));
    server.listen();
    assert_eq!(bench.run(flush(&first)), Err(Errno::EIO));
    assert_eq!(bench.run(flush(&first)), Ok(()));
}

/// A flush in flight when the server crashes is sent again only if nothing was at stake.
#[test]
fn a_flush_in_flight_at_the_crash_fails() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path(), manners());
    let mut bench = Bench::new();
    let ops = bench.attach(&opened(&server, 60).0);
    bench.write(&ops, 0, &[1; 512], false).unwrap();
    for expected in [Err(Errno::EIO), Ok(())] {
        server.fault(Fault::Hang);
        let (user, result) = (ops.clone(), Rc::new(Cell::new(None)));
        let give = result.clone();
        bench.start(|io| async move { give.set(Some(user.flush(&io).await)) });
        bench.rest(Duration::from_millis(100));
        server.crash();
        server.listen();
        bench.until("the flush", || result.get().is_some());
        assert_eq!(result.get(), Some(expected));
    }
    bench.finish(ops);
}

/// One connection of four goes, the server stays: another one vouches for what it had.
#[test]
fn a_connection_that_remains_vouches_for_the_lost_one() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), manners());
    let mut bench = Bench::new();
    let ops = bench.attach(&opened(&server, 60).0);
    let shared = server.shared.clone();
    bench.until("four connections", || shared.present.load(SeqCst) == 4);
    bench.rest(Duration::from_millis(100));
    bench.write(&ops, 0, &[1; 512], false).unwrap();
    server.fault(Fault::Vanish);
    bench.read(&ops, 0, 512).unwrap();
    bench.until("the fifth connection", || shared.accepted.load(SeqCst) == 5);
    bench.rest(Duration::from_millis(100));
    for _ in 0..8 {
        assert_eq!(bench.flush(&ops), Ok(()));
    }
    assert_eq!(server.shared.stable.lock().unwrap()[..512], [1; 512]);
    bench.finish(ops);
}

#[test]
fn another_export_behind_the_address_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path(), manners());
    let (volume, _) = opened(&server, 1);
    let mut bench = Bench::new();
    let ops = bench.attach(&volume);
    bench.read(&ops, 0, 512).unwrap();
    server.crash();
    for change in [
        |manners: &mut Manners| manners.size = 2 << 20,
        |manners: &mut Manners| manners.flags |= NBD_FLAG_READ_ONLY,
    ] {
        change(&mut server.shared.manners.lock().unwrap());
        server.listen();
        assert!(matches!(volume.remote.connect(LONG), Err(Error::Changed(_))));
        assert!(bench.read(&ops, 0, 512).is_err());
        server.crash();
        *server.shared.manners.lock().unwrap() = manners();
    }
    server.listen();
    bench.until_back(&ops);
    bench.finish(ops);
}

struct Nobody;

impl crate::engine::Exports for Nobody {
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

#[test]
fn a_server_that_comes_back_with_more_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let mut server =
        Server::start(dir.path(), Manners { flags: ALL_FLAGS & !NBD_FLAG_SEND_FUA, ..manners() });
    let volume = Volume::open("far", &VolumeConfig::Nbd(config(&server.uri(), 60))).unwrap();
    let (to, told) = std::sync::mpsc::channel();
    volume.tell_growth(to);
    let crate::engine::driver::AnyStore::Nbd(nbd) = &volume.store else { panic!("another store") };
    let mut bench = Bench::new();
    let ops = bench.attach(nbd);
    bench.write(&ops, 0, &[1; 512], true).unwrap();
    assert!(matches!(volume.refresh(false, &Nobody), Ok(same) if same.from == same.to));
    assert!(matches!(volume.resize(8 << 20, true, &Nobody), Err(crate::engine::ResizeError::Fixed(_))));
    server.crash();
    server.grow(8 << 20);
    {
        let mut manners = server.shared.manners.lock().unwrap();
        manners.flags = ALL_FLAGS | 0x4000;
        manners.blocks = Blocks { minimum: 1, preferred: 65536, maximum: 4 << 20 };
    }
    server.listen();
    assert_eq!(bench.read(&ops, 0, 512).unwrap(), [1; 512]);
    assert_eq!(told.recv_timeout(LONG).as_deref(), Ok("far"));
    assert_eq!(volume.geometry().bytes(), 4 << 20);
    assert_eq!(volume.catch_up(&Nobody).unwrap().to, 8 << 20);
    assert_eq!(volume.geometry().bytes(), 8 << 20);
    bench.write(&ops, (8 << 20) - 512, &[2; 512], true).unwrap();
    // What was taken is served from then on.
    server.crash();
    server.shared.manners.lock().unwrap().size = 4 << 20;
    server.listen();
    assert!(matches!(nbd.remote.connect(LONG), Err(Error::Changed(_))));
    let refused = volume.refresh(false, &Nobody);
    assert!(matches!(refused, Err(crate::engine::ResizeError::Shrinks { .. })), "{refused:?}");
    assert_eq!(volume.refresh(true, &Nobody).unwrap().to, 4 << 20);
    assert_eq!(bench.read(&ops, 0, 512).unwrap(), [1; 512]);
    bench.finish(ops);
}

#[test]
fn what_only_we_relied_on_may_go() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path(), manners());
    let mut bench = Bench::new();
    let ops = bench.attach(&opened(&server, 60).0);
    bench.write(&ops, 0, &[1; 512], true).unwrap();
    server.crash();
    {
        let mut manners = server.shared.manners.lock().unwrap();
        manners.flags = ALL_FLAGS & !NBD_FLAG_SEND_FUA & !NBD_FLAG_SEND_WRITE_ZEROES;
        manners.blocks.maximum = 70_000;
        manners.structured = false;
    }
    server.listen();
    let flushes = server.shared.flushes.load(SeqCst);
    bench.write(&ops, 0, &[4; 1 << 20], true).unwrap();
    assert_eq!(server.shared.flushes.load(SeqCst), flushes + 1, "FUA by one flush");
    assert!(server.shared.stable.lock().unwrap()[..1 << 20] == [4; 1 << 20]);
    assert!(server.shared.longest.load(SeqCst) <= 70_000);
    assert!(bench.read(&ops, 0, 1 << 20).unwrap() == [4; 1 << 20]);
    let user = ops.clone();
    let answer = bench.run(|io| async move { user.write_zeroes(&io, 0, 512, true).await });
    assert_eq!(answer, Err(Errno::EOPNOTSUPP), "the engine writes them");
    bench.finish(ops);
}

/// Nobody was told of a cache, so nobody flushes it.
#[test]
fn a_cache_that_was_not_there_is_written_through() {
    for fua in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let flags = ALL_FLAGS & !NBD_FLAG_SEND_FLUSH & !NBD_FLAG_SEND_FUA;
        let mut server = Server::start(dir.path(), Manners { flags, ..manners() });
        let (volume, geometry) = opened(&server, 60);
        assert!(!geometry.volatile_cache);
        let mut bench = Bench::new();
        let ops = bench.attach(&volume);
        bench.write(&ops, 0, &[1; 512], true).unwrap();
        assert_eq!((bench.flush(&ops), server.shared.flushes.load(SeqCst)), (Ok(()), 0));
        server.crash();
        let flags = if fua { ALL_FLAGS } else { ALL_FLAGS & !NBD_FLAG_SEND_FUA };
        server.shared.manners.lock().unwrap().flags = flags;
        server.listen();
        bench.write(&ops, 0, &[5; 512], false).unwrap();
        assert_eq!(server.shared.stable.lock().unwrap()[..512], [5; 512]);
        let user = ops.clone();
        bench.run(|io| async move { user.write_zeroes(&io, 0, 512, true).await }).unwrap();
        assert_eq!(server.shared.stable.lock().unwrap()[..512], [0; 512]);
        assert_eq!(bench.flush(&ops), Ok(()));
        bench.finish(ops);
    }
}

#[test]
fn a_request_that_is_abandoned_takes_only_its_connection_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), manners());
    let mut bench = Bench::new();
    let ops = bench.attach(&opened(&server, 60).0);
    bench.read(&ops, 0, 512).unwrap();
    server.fault(Fault::Hang);
    let user = ops.clone();
    let slot = bench.start(|io| async move {
        read(&user, &io, 0, 512, 1).await.unwrap();
    });
    bench.rest(Duration::from_millis(50));
    assert!(bench.tasks.is_alive(slot));
    bench.tasks.remove(slot);
    for _ in 0..20 {
        bench.read(&ops, 0, 512).unwrap();
    }
    bench.finish(ops);
}

#[test]
fn giving_up_fails_what_a_silent_server_has() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), manners());
    let mut bench = Bench::new();
    let ops = bench.attach(&opened(&server, 60).0);
    bench.read(&ops, 0, 512).unwrap();
    server.fault(Fault::Hang);
    let (user, said) = (ops.clone(), Rc::new(Cell::new(None)));
    let told = said.clone();
    bench.start(|io| async move {
        told.set(Some(read(&user, &io, 0, 512, 1).await.map(drop)));
    });
    bench.rest(Duration::from_millis(50));
    assert_eq!(said.get(), None);
    ops.abandon();
    bench.rest(Duration::from_millis(50));
    assert_eq!(said.get(), Some(Err(Errno::EIO)));
    assert_eq!(bench.read(&ops, 0, 512), Err(Errno::ENOTCONN));
    bench.finish(ops);
}

/// It has a request, and says nothing.
#[test]
fn a_silent_server_is_hung_up_on() {
    for structured in [true, false] {
        for connections in [1, 4] {
            let dir = tempfile::tempdir().unwrap();
            let server = Server::start(dir.path(), Manners { structured, ..manners() });
            let asked =
                NbdConfig { timeout: 1, connections: Some(connections), ..config(&server.uri(), 120) };
            let mut bench = Bench::new();
            let ops = bench.attach(&NbdStore::open(&asked).unwrap().0);
            bench.write(&ops, 0, &[1; 8192], true).unwrap();
            // The answer to what is asked again must not be the old one's.
            for fault in [Fault::Hang, Fault::Late(Duration::from_millis(2500)), Fault::Hang] {
                let before = server.shared.accepted.load(SeqCst);
                server.fault(fault);
                let begun = Instant::now();
                assert!(bench.read(&ops, 0, 8192).unwrap() == [1; 8192]);
                let took = begun.elapsed();
                assert!(took >= Duration::from_secs(1), "{took:?}");
                let shared = server.shared.clone();
                bench.until("another connection", || shared.accepted.load(SeqCst) > before);
                assert_eq!(bench.write(&ops, 512, &[1; 512], true), Ok(()));
            }
            bench.finish(ops);
        }
    }
}

#[test]
fn without_reconnect_a_silent_server_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), manners());
    let mut bench = Bench::new();
    let asked = NbdConfig { timeout: 1, ..config(&server.uri(), 0) };
    let ops = bench.attach(&NbdStore::open(&asked).unwrap().0);
    bench.read(&ops, 0, 512).unwrap();
    server.fault(Fault::Hang);
    assert_eq!(bench.read(&ops, 0, 512), Err(Errno::EIO));
    bench.until_back(&ops);
    assert_eq!(bench.read(&ops, 0, 512).unwrap(), [0; 512]);
    bench.finish(ops);
}

/// A lost answer is noticed although others come; and answers that are slow, but come, are no reason to hang up.
#[test]
fn one_answer_that_is_lost_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ALL_FLAGS & !NBD_FLAG_CAN_MULTI_CONN;
    let server = Server::start(dir.path(), Manners { flags, ..manners() });
    let mut bench = Bench::new();
    let asked = NbdConfig { timeout: 2, ..config(&server.uri(), 120) };
    let ops = bench.attach(&NbdStore::open(&asked).unwrap().0);
    // Each takes less than the limit, all together more.
    let slow = Rc::new(Cell::new(0));
    for _ in 0..12 {
        server.fault(Fault::Late(Duration::from_millis(300)));
        let (user, slow) = (ops.clone(), slow.clone());
        bench.start(|io| async move {
            read(&user, &io, 0, 512, 1).await.unwrap();
            slow.set(slow.get() + 1);
        });
    }
    bench.until("slow answers", || slow.get() == 12);
    assert_eq!(server.shared.accepted.load(SeqCst), 1);
    server.fault(Fault::Hang);
    let (user, ended) = (ops.clone(), Rc::new(Cell::new(false)));
    let end = ended.clone();
    bench.start(|io| async move {
        read(&user, &io, 0, 512, 1).await.unwrap();
        end.set(true);
    });
    let deadline = Instant::now() + LONG;
    while !ended.get() {
        assert!(Instant::now() < deadline, "it is waited for without end");
        bench.read(&ops, 0, 512).unwrap();
    }
    assert_eq!(server.shared.accepted.load(SeqCst), 2);
    bench.finish(ops);
}

#[test]
fn silence_in_the_handshake_is_bounded_by_the_time_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("silent");
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let uri = format!("nbd+unix:///?socket={}", path.display());
    let begun = Instant::now();
    let refused = NbdStore::open(&NbdConfig { timeout: 1, ..config(&uri, 60) }).unwrap_err();
    assert!(matches!(refused, Error::Io(_)), "{refused}");
    assert!(begun.elapsed() < Duration::from_secs(8));
}

/// A request that waits for a connection is not to wait any more when its slot is interrupted. One that the server has
/// is waited for until the server is hung up on.
#[test]
fn interrupted_requests_do_not_wait_for_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path(), manners());
    let mut bench = Bench::new();
    let ops = bench.attach(&opened(&server, 60).0);
    bench.read(&ops, 0, 512).unwrap();
    let results = Rc::new(RefCell::new(Vec::new()));
    let begin = |bench: &mut Bench| {
        let (user, results) = (ops.clone(), results.clone());
        bench.start(|io| async move {
            let result = read(&user, &io, 0, 512, 1).await.map(drop);
            results.borrow_mut().push(result);
        })
    };
    server.fault(Fault::Hang);
    let silent = begin(&mut bench);
    bench.rest(Duration::from_millis(50));
    ops.hang_up();
    bench.rest(Duration::from_millis(50));
    assert!(results.borrow().is_empty(), "nobody is interrupted, so nobody is hung up on");
    bench.core.interrupt(silent);
    bench.rest(Duration::from_millis(50));
    assert!(results.borrow().is_empty(), "the server has it");
    ops.hang_up();
    bench.until("the silent server's end", || results.borrow().len() == 1);
    server.crash();
    // Until the loss is noticed.
    bench.rest(Duration::from_millis(300));
    let (waits, other) = (begin(&mut bench), begin(&mut bench));
    bench.rest(Duration::from_millis(50));
    assert_eq!(results.borrow().len(), 1, "they wait for a connection");
    bench.core.interrupt(waits);
    bench.until("the interrupted one", || results.borrow().len() == 2);
    assert_eq!(*results.borrow(), [Err(Errno::ERESTART); 2]);
    assert!(bench.tasks.is_alive(other));
    server.listen();
    bench.until("the other", || results.borrow().len() == 3);
    assert_eq!(results.borrow()[2], Ok(()));
    bench.finish(ops);
}
