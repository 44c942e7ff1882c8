//! The relay in front of the protocol: what it answers itself, what it refuses, and whom a VMM can keep waiting.

mod common;

use common::memory::VMM_OFFSET;
use common::model::Op;
use common::queue::{Layout, RawQueue};
use common::service::{Service, Setup};
use common::vmm::{BASE, Vmm, everyday};
use common::wire::{NEED_REPLY, VERSION, Wire, code, halves, message, words};
use common::{PATIENCE, eventually, readable};
use nix::sys::memfd::{MFdFlags, memfd_create};
use ringblk::service::client::Client;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

const MIB: u64 = 1 << 20;
const OK: u8 = 0;
const INFLIGHT: u64 = 1 << 12;
const BACKEND_REQ: u64 = 1 << 5;

/// Exports `a` and `b` to a volume in memory, on one worker.
fn setup() -> Setup {
    let setup = Setup::new().args(["--workers", "1"]).volume("root", "memory:32M");
    setup.vhost_user("root", "a", "queues=2,queue-size=256").vhost_user("root", "b", "queues=2")
}

fn memfd(len: u64) -> File {
    let file = File::from(memfd_create(c"odd", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

/// Waits until the service has said so.
fn says(service: &Service, what: &str) {
    eventually(&format!("the log says '{what}'"), || service.log().contains(what));
}

fn shape(queues: u16, size: u16) -> VhostUserInflight {
    VhostUserInflight::new(0, 0, queues, size)
}

#[test]
fn notes_of_requests_in_flight_are_kept_by_the_vmm() {
    let service = setup().start();
    let mut vmm = Vmm::connect_with_notes(&service.path("a"));
    let (region, file) = vmm.frontend.get_inflight_fd(&shape(2, 64)).unwrap();
    assert_eq!((region.mmap_offset, region.num_queues, region.queue_size), (0, 2, 64));
    assert_eq!(file.metadata().unwrap().len(), region.mmap_size);
    let notes = |at: u64, len: usize| {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    };
    // To a vring that runs already.
    let mut queue = vmm.queue(0, 64, Layout::Plain, 16);
    vmm.frontend.set_inflight_fd(&region, file.as_raw_fd()).unwrap();
    for round in 0..100 {
        assert_eq!(queue.write(round, &[round as u8; 512]), OK);
    }
    // Version 1 for 64 descriptors, as many requests used as there were, and none in flight.
    assert_eq!(notes(8, 4), [1, 0, 64, 0]);
    assert_eq!(notes(14, 2), [100, 0]);
    assert!((0..64).all(|head| notes(16 + 16 * head, 1) == [0]));
    // The same region again, as QEMU gives it at each start of the device, in the middle of things.
    vmm.frontend.set_inflight_fd(&region, file.as_raw_fd()).unwrap();
    assert_eq!(queue.write(100, &[100; 512]), OK);
    drop(vmm);
    // To the next session, with the same ring.
    let mut vmm = Vmm::connect_with_notes(&service.path("a"));
    vmm.frontend.set_inflight_fd(&region, file.as_raw_fd()).unwrap();
    let mut queue = vmm.queue(0, 64, Layout::Plain, 16);
    assert_eq!(queue.read(100, 1), (OK, vec![100; 512]));
    // One without notes is served as ever.
    drop(vmm);
    let (_vmm, mut queue) = everyday(&service.path("a"));
    assert_eq!(queue.read(99, 1), (OK, vec![99; 512]));
}

#[test]
fn in_flight_regions_of_the_wrong_shape() {
    let service = setup().start().may_complain();
    let socket = service.path("a");
    let short = memfd(4096);
    let body = |bytes: u64, offset: u64, queues: u32, size: u32| {
        [words(&[bytes, offset]), halves(&[size << 16 | queues, 0])].concat()
    };
    let asked: &[(&str, u32, u32)] =
        &[("no queues", 0, 64), ("no size", 2, 0), ("too many", 3, 64), ("too large", 2, 512)];
    for (what, queues, size) in asked {
        let mut wire = Wire::greeted_with(&socket, INFLIGHT);
        wire.send(&message(code::GET_INFLIGHT_FD, VERSION, &body(0, 0, *queues, *size)), &[]);
        assert_eq!(wire.answer(), None, "{what}");
    }
    let given: &[(&str, Vec<u8>, &[RawFd])] = &[
        ("a file that may shrink", body(4096, 0, 2, 64), &[short.as_raw_fd()]),
        ("more than the file", body(1 << 20, 0, 2, 64), &[short.as_raw_fd()]),
        ("an offset far away", body(4096, !4095, 2, 64), &[short.as_raw_fd()]),
        ("no file", body(4096, 0, 2, 64), &[]),
        ("two files", body(4096, 0, 2, 64), &[short.as_raw_fd(); 2]),
        ("half a body", words(&[4096]), &[short.as_raw_fd()]),
    ];
    for (what, body, fds) in given {
        let mut wire = Wire::greeted_with(&socket, INFLIGHT);
        wire.send(&message(code::SET_INFLIGHT_FD, NEED_REPLY, body), fds);
        assert_ne!(wire.answer(), Some(0), "{what}");
        assert!(wire.hangs_up(PATIENCE), "{what}");
        let (_vmm, mut queue) = everyday(&socket);
        assert_eq!(queue.one(Op::Flush, &[]).0, OK, "{what}");
    }
    // A region of ours, cut to fewer queues than it is said to have.
    let mut vmm = Vmm::connect_with_notes(&socket);
    let (mut region, file) = vmm.frontend.get_inflight_fd(&shape(1, 64)).unwrap();
    region.num_queues = 2;
    vmm.frontend.set_inflight_fd(&region, file.as_raw_fd()).unwrap_err();
    drop(vmm);
    says(&service, "SET_INFLIGHT_FD: in-flight region");
    // Without its feature there is no such request.
    let mut wire = Wire::greeted(&socket);
    wire.send(&message(code::GET_INFLIGHT_FD, VERSION, &body(0, 0, 1, 64)), &[]);
    assert_eq!(wire.answer(), None);
    says(&service, "GET_INFLIGHT_FD without its protocol feature");
}

#[test]
fn a_new_size_is_told_to_whoever_listens() {
    let service = setup().start();
    let mut vmm = Vmm::connect_with_notes(&service.path("a"));
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    vmm.frontend.set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    // One that gave no socket, whose relay waits for the rest of a message.
    let (_b, _queue) = everyday(&service.path("b"));
    let resize = |bytes| Client::new(service.control()).resize("root", bytes, true).unwrap();
    resize(16 * MIB);
    let mut notice = [0; 12];
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    ours.read_exact(&mut notice).unwrap();
    assert_eq!(notice.as_slice(), message(2, VERSION, &[]));
    assert_eq!(vmm.config(0, 8), (16 * MIB / 512).to_le_bytes());
    says(&service, "the VMM cannot be told of the new size");
    // One that does not read does not hold up the service, nor its own disk.
    let mut queue = vmm.queue(0, 64, Layout::Plain, 4);
    for round in 0..1000 {
        resize((16 + round % 2) * MIB);
    }
    assert_eq!(queue.one(Op::Flush, &[]).0, OK);
    assert_eq!(vmm.config(0, 8), (17 * MIB / 512).to_le_bytes());
    // The socket is the session's, and goes with it.
    drop(vmm);
    ours.read_to_end(&mut Vec::new()).unwrap();
}

#[test]
fn a_notice_does_not_wait_for_a_message_that_is_half_there() {
    let service = setup().start().may_complain();
    let wire = Wire::greeted_with(&service.path("a"), BACKEND_REQ);
    let (ours, theirs) = UnixStream::pair().unwrap();
    wire.send(&message(code::SET_BACKEND_REQ_FD, VERSION, &[]), &[theirs.as_raw_fd()]);
    wire.send(&message(code::SET_VRING_NUM, VERSION, &halves(&[0, 64]))[..15], &[]);
    let start = Instant::now();
    let mut bytes = 16 * MIB;
    eventually("the notice", || {
        Client::new(service.control()).resize("root", bytes, true).unwrap();
        bytes ^= MIB;
        readable(ours.as_fd(), Duration::ZERO)
    });
    assert!(start.elapsed() < Duration::from_secs(4));
    // What is no Unix socket is not taken.
    let mut wire = Wire::greeted_with(&service.path("b"), BACKEND_REQ);
    wire.send(&message(code::SET_BACKEND_REQ_FD, NEED_REPLY, &[]), &[memfd(1).as_raw_fd()]);
    assert_ne!(wire.answer(), Some(0));
    says(&service, "SET_BACKEND_REQ_FD: its descriptor is not a connected Unix socket");
}

#[test]
fn a_refusal_names_the_door_and_the_reason() {
    let service = setup().start().may_complain();
    let socket = service.path("a");
    let file = memfd(MIB);
    let dir = File::open("/proc").unwrap();
    let region = |at: u64, len: u64, user: u64| words(&[0, at, len, user, 0]);
    let good = region(BASE, MIB, BASE + VMM_OFFSET);
    type Case<'a> = (&'a str, u32, Vec<u8>, &'a [RawFd]);
    let cases: &[Case<'_>] = &[
        ("VMM addresses wrap around", code::ADD_MEM_REG, region(BASE, MIB, !4095), &[file.as_raw_fd()]),
        ("guest addresses wrap around", code::REM_MEM_REG, region(!4095, MIB, BASE), &[]),
        ("in a file of 1048576", code::ADD_MEM_REG, region(BASE, 2 * MIB, BASE), &[file.as_raw_fd()]),
        ("not in a regular file", code::ADD_MEM_REG, good.clone(), &[dir.as_raw_fd()]),
        ("nothing in it", code::ADD_MEM_REG, region(BASE, 0, BASE), &[file.as_raw_fd()]),
        ("ADD_MEM_REG with 2 descriptors", code::ADD_MEM_REG, good.clone(), &[file.as_raw_fd(); 2]),
        ("ADD_MEM_REG with 16 bytes", code::ADD_MEM_REG, words(&[0, 0]), &[file.as_raw_fd()]),
        ("protocol features 0x2 were not offered", code::SET_PROTOCOL_FEATURES, words(&[2]), &[]),
        ("SET_VRING_NUM: vring 9, of 2", code::SET_VRING_NUM, halves(&[9, 64]), &[]),
        ("request 6 was not offered", code::SET_LOG_BASE, words(&[1, 0]), &[file.as_raw_fd()]),
    ];
    for (why, code, body, fds) in cases {
        let mut wire = Wire::greeted(&socket);
        wire.send(&message(*code, NEED_REPLY, body), fds);
        assert_ne!(wire.answer(), Some(0), "{why}");
        assert!(wire.hangs_up(PATIENCE), "{why}");
        says(&service, why);
        let log = service.log();
        let lines: Vec<_> = log.lines().filter(|line| line.contains(why)).collect();
        assert_eq!(lines.len(), 1, "{why}: {log}");
        assert!(
            lines[0].contains(&format!("vhost-user:{}: the VMM is dropped", socket.display())),
            "{}",
            lines[0]
        );
    }
}

#[test]
fn a_flood_of_descriptors_is_closed() {
    let service = setup().start().may_complain();
    let (_vmm, mut witness) = everyday(&service.path("b"));
    let files: Vec<File> = (0..253).map(|_| memfd(4096)).collect();
    let fds: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let before = service.descriptors();
    // So few to spare that one message brings more than there may be.
    let limit = Command::new("prlimit")
        .args(["--pid", &service.pid().to_string(), &format!("--nofile={}", before + 16)])
        .status();
    assert!(limit.unwrap().success());
    for count in [1, 2, 31, 32, 33, 253].into_iter().cycle().take(60) {
        let mut wire = Wire::connect(&service.path("a"));
        wire.send(&message(code::SET_MEM_TABLE, VERSION, &words(&[u64::MAX; 5])), &fds[..count]);
        assert!(wire.hangs_up(PATIENCE));
        assert_eq!(witness.one(Op::Flush, &[]).0, OK);
    }
    service.await_free("a");
    eventually("they are closed", || service.descriptors() <= before);
}

/// Requests that a witness completes in a while.
fn rate(witness: &mut RawQueue) -> usize {
    let start = Instant::now();
    let mut done = 0;
    while start.elapsed() < Duration::from_millis(300) {
        assert_eq!(witness.one(Op::Flush, &[]).0, OK);
        done += 1;
    }
    done
}

/// Whether the witness is served as `before`, but for what a busy machine does to anybody: one whose worker waited for
/// somebody else would get nothing done at all.
fn unhindered(witness: &mut RawQueue, before: usize) -> bool {
    (0..10).any(|_| rate(witness) > before / 4)
}

#[test]
fn a_vmm_that_stalls_is_given_up_and_delays_nobody() {
    let service = setup().start().may_complain();
    let (_vmm, mut witness) = everyday(&service.path("b"));
    let before = rate(&mut witness);
    let start = Instant::now();
    // Half a header; a body that comes byte by byte; answers that are not taken.
    let mut wire = Wire::greeted(&service.path("a"));
    wire.send(&[1, 0, 0, 0, 1], &[]);
    assert!(unhindered(&mut witness, before));
    assert!(wire.hangs_up(PATIENCE));
    assert!(start.elapsed() > Duration::from_secs(4));
    says(&service, "half a message, and no more within 5s");
    let wire = Wire::greeted(&service.path("a"));
    let bytes = message(code::SET_CONFIG, VERSION, &[0; 4000]);
    let start = Instant::now();
    let mut next = bytes.chunks(1);
    while service.log().matches("half a message").count() < 2 {
        assert!(start.elapsed() < PATIENCE);
        wire.send(next.next().unwrap(), &[]);
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(wire);
    let wire = Wire::greeted(&service.path("a"));
    wire.0.set_nonblocking(true).unwrap();
    let question = message(code::GET_CONFIG, VERSION, &[&halves(&[0, 256, 0])[..], &[0; 256]].concat());
    let start = Instant::now();
    while !service.log().contains("it did not take an answer within 5s") {
        assert!(start.elapsed() < PATIENCE);
        wire.send(&question, &[]);
    }
    assert!(unhindered(&mut witness, before));
    let (_vmm, mut queue) = everyday(&service.path("a"));
    assert_eq!(queue.one(Op::Flush, &[]).0, OK);
}

#[test]
fn a_storm_of_connections_delays_nobody() {
    let service = setup().start().may_complain();
    let (_vmm, mut witness) = everyday(&service.path("b"));
    let before = rate(&mut witness);
    let socket = service.path("a");
    let over = AtomicBool::new(false);
    let connections = AtomicUsize::new(0);
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let wire = Wire::connect(&socket);
                wire.send(&message(code::GET_FEATURES, VERSION, &[]), &[]);
                connections.fetch_add(1, Ordering::Relaxed);
            }
        });
        assert!(unhindered(&mut witness, before));
        over.store(true, Ordering::Relaxed);
    });
    let sessions = service.log().matches("a: a VMM connects").count();
    let most = start.elapsed().as_millis() as usize / 10 + 1;
    assert!(sessions <= most, "{sessions} sessions in the time of {most}");
    assert!(connections.into_inner() > sessions);
    // The queue is worked off, and whoever stays is served.
    let (_vmm, mut queue) = everyday(&socket);
    assert_eq!(queue.one(Op::Flush, &[]).0, OK);
}

#[test]
fn a_second_vmm_waits_and_the_log_says_so() {
    let service = setup().start();
    let socket = service.path("a");
    let (first, mut queue) = everyday(&socket);
    let us = format!("pid {}, uid {}", std::process::id(), nix::unistd::getuid());
    says(&service, &format!("{}: a VMM connects: {us}", socket.display()));
    let mut second = Wire::connect(&socket);
    second.send(&message(code::GET_FEATURES, VERSION, &[]), &[]);
    says(&service, &format!("{}: another VMM connects and waits: {us}", socket.display()));
    assert!(!readable(second.0.as_fd(), Duration::from_millis(100)));
    assert_eq!(queue.one(Op::Flush, &[]).0, OK);
    drop(first);
    assert!(second.answer().is_some_and(|features| features != 0));
}
