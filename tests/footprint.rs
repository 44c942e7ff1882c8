//! What the service takes when it has little to do: memory, and CPU. The bars are the release build's; the debug
//! build's program is larger, and gets that much more: `cargo test --release --test footprint -- --include-ignored --nocapture` for the figures.
//!
//! Memory is what is resident, without what a VMM shares with it (guest memory).

mod common;

use common::load::Load;
use common::memory::GuestMemory;
use common::ring::{Ring, Segment};
use common::service::{Service, Setup};
use common::vmm::{BASE, Vmm};
use ringblk::service::client::Client;
use std::fs;
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// In KiB.
const MOST_RESIDENT: u64 = if cfg!(debug_assertions) { 24 << 10 } else { 16 << 10 };
/// In KiB, for each export above the first.
const MOST_EACH: u64 = 1 << 10;
const MANY: usize = 64;

/// KiB in memory, without what is shared with VMMs.
fn resident_kib(service: &Service) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", service.pid())).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    };
    field("RssAnon:") + field("RssFile:")
}

/// CPU time so far, of all its threads that live, to the nanosecond.
fn cpu(service: &Service) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{}/task", service.pid())).unwrap();
    let nanos = tasks.map(|task| {
        // Time on a CPU, time waiting for one, slices.
        let stat = fs::read_to_string(task.unwrap().path().join("schedstat")).unwrap_or_default();
        stat.split_whitespace().next().map_or(0, |nanos| nanos.parse().unwrap())
    });
    Duration::from_nanos(nanos.sum())
}

#[test]
fn one_export_is_small_before_and_after() {
    for direct in ["off", "on"] {
        let setup = Setup::new();
        let image = setup.image(64 * MIB);
        let file = format!("file:{},direct={direct}", image.display());
        let service = setup.volume("a", &file).vhost_user("a", "a", "").start();
        let fresh = resident_kib(&service);
        assert!(fresh <= MOST_RESIDENT, "{fresh} KiB fresh");
        for connection in 0..100 {
            let depth = [1, 8, 32][connection % 3];
            let mut load =
                Load::connect(&service.path("a"), connection % 2 == 0, 128 << 10, depth, connection % 5 == 0);
            load.run(2 * depth as usize);
        }
        service.await_free("a");
        let after = resident_kib(&service);
        eprintln!("direct={direct}: {fresh} KiB fresh, {after} KiB after 100 connections");
        assert!(after <= MOST_RESIDENT, "{after} KiB after 100 connections, {fresh} KiB before");
    }
}

/// In KiB, above what it has without: the buffers of one volume on one worker, and what its slots take.
const MOST_BOUNCED: u64 = 4 << 10;

/// A guest whose every request lies where direct I/O cannot take it: it gets a few buffers, however many they are.
#[test]
fn misaligned_requests_are_little_memory() {
    const DEPTH: u16 = 512;
    const BYTES: u32 = 1 << 20;
    let setup = Setup::new().args(["--workers", "1"]);
    let image = setup.image(64 * MIB);
    fs::write(&image, vec![7; 64 << 20]).unwrap();
    let file = format!("file:{},direct=on", image.display());
    let service = setup.volume("a", &file).vhost_user("a", "a", "").start();
    let each = 4096;
    let memory = GuestMemory::new(BASE, Ring::bytes(DEPTH) + u64::from(DEPTH) * each + 2 * MIB);
    let mut vmm = Vmm::connect_with(&service.path("a"), u64::MAX, memory);
    let mut ring = vmm.ring(DEPTH);
    vmm.start(0, &ring);
    let data = vmm.take(2 * MIB) + 1;
    for request in 0..u64::from(DEPTH) {
        let at = vmm.take(each);
        vmm.memory.write(at + 8, &(request % 63 * 2048).to_le_bytes());
        let segment = |addr, len, write| Segment { addr, len, write };
        let chain = [segment(at, 16, false), segment(data, BYTES, true), segment(at + 16, 1, true)];
        ring.add_indirect(at + 32, &chain);
    }
    let before = resident_kib(&service);
    ring.publish();
    let (mut peak, mut done) = (before, 0);
    while done < usize::from(DEPTH) {
        done += ring.wait(common::PATIENCE).len();
        peak = peak.max(resident_kib(&service));
    }
    assert_eq!(vmm.memory.get(data, 4096), [7; 4096]);
    eprintln!("{before} KiB before, {peak} KiB with {DEPTH} misaligned requests");
    assert!(peak <= before + MOST_BOUNCED, "{peak} KiB, {before} KiB before");
}

/// A guest that brings more than there are slots for, while its store answers nothing: the rest waits in its ring, costs no
/// memory and no CPU, and comes to its turn.
#[test]
fn requests_beyond_the_slots_wait_in_the_ring() {
    const DEPTH: u16 = 16384;
    const REQUESTS: usize = 6000;
    const SLOTS: usize = 4096;
    let setup = Setup::new().args(["--workers", "1", "--slow-after", "0"]);
    let image = setup.image(8 * MIB);
    let file = format!("file:{},on-error=stop", image.display());
    let service = setup.volume("a", &file).vhost_user("a", "a", "queue-size=16384").start().may_complain();
    let memory = GuestMemory::new(BASE, Ring::bytes(DEPTH) + REQUESTS as u64 * 4096 + MIB);
    let mut vmm = Vmm::connect_with(&service.path("a"), u64::MAX, memory);
    let mut ring = vmm.ring(DEPTH);
    vmm.start(0, &ring);
    let data = vmm.take(4096);
    let store = fs::OpenOptions::new().write(true).open(&image).unwrap();
    store.set_len(0).unwrap();
    let segment = |addr, len, write| Segment { addr, len, write };
    for _ in 0..REQUESTS {
        let at = vmm.take(4096);
        // Of as many segments as a request can have.
        let parts =
            (0..248).map(|part| segment(data + 16 * part, if part == 0 { 496 + 512 } else { 16 }, true));
        let parts = parts.take(1 + (4096 - 1008) / 16);
        let chain: Vec<Segment> =
            [segment(at, 16, false)].into_iter().chain(parts).chain([segment(at + 16, 1, true)]).collect();
        let bytes: u32 = chain[1..chain.len() - 1].iter().map(|part| part.len).sum();
        assert!(bytes.is_multiple_of(512) && chain.len() <= 254, "{bytes} {}", chain.len());
        ring.add_indirect(at + 32, &chain);
    }
    let before = resident_kib(&service);
    ring.publish();
    let waiting = || service.status().volumes[0].waiting;
    common::eventually("as many wait as there are slots", || waiting() == SLOTS);
    std::thread::sleep(Duration::from_millis(200));
    let (used, time) = (cpu(&service), Duration::from_secs(2));
    std::thread::sleep(time);
    let used = cpu(&service) - used;
    assert!(used <= time / 100, "{used:?} of CPU while everything waits");
    assert_eq!(waiting(), SLOTS);
    let after = resident_kib(&service);
    eprintln!("{before} KiB before, {after} KiB with {SLOTS} requests in flight");
    assert!(after <= before + SLOTS as u64 * 10, "{after} KiB, {before} KiB before");
    store.set_len(8 * MIB).unwrap();
    Client::new(service.control()).resume("a", false).unwrap();
    ring.expect(REQUESTS);
}

/// A service of that many null volumes on one worker, and a VMM on each that has done some I/O.
fn many(count: usize) -> (Service, Vec<Load>) {
    let mut setup = Setup::new().args(["--workers", "1"]);
    for number in 0..count {
        let name = format!("v{number}");
        setup = setup.volume(&name, "null:1G").vhost_user(&name, &name, "");
    }
    let service = setup.start();
    let loads = (0..count).map(|number| {
        let mut load = Load::connect(&service.path(&format!("v{number}")), false, 4096, 32, false);
        load.run(320);
        load
    });
    let loads = loads.collect();
    (service, loads)
}

#[test]
fn an_export_more_is_little_memory() {
    let (one, _of_one) = many(1);
    let (all, _of_all) = many(MANY);
    let (first, rest) = (resident_kib(&one), resident_kib(&all));
    let each = rest.saturating_sub(first) / (MANY as u64 - 1);
    eprintln!("{first} KiB with 1 export, {rest} KiB with {MANY}: {each} KiB each");
    assert!(each <= MOST_EACH, "{each} KiB for each export above the first");
}

/// At most a thousandth of a core.
fn idle(time: Duration) {
    let (service, _loads) = many(MANY);
    // The looking after the last request ends.
    std::thread::sleep(Duration::from_millis(200));
    let before = cpu(&service);
    std::thread::sleep(time);
    let used = cpu(&service) - before;
    eprintln!("{used:?} of CPU in {time:?} with {MANY} idle exports");
    assert!(used <= time / 1000, "{used:?} of CPU in {time:?}");
}

#[test]
fn many_idle_exports_use_no_cpu() {
    idle(Duration::from_secs(3));
}

#[test]
#[ignore = "takes a minute"]
fn many_idle_exports_use_no_cpu_for_a_minute() {
    idle(Duration::from_secs(60));
}

/// CPU of the service for each of so many requests.
fn cost(service: &Service, load: &mut Load) -> f64 {
    const REQUESTS: usize = 1_000_000;
    let before = cpu(service);
    load.run(REQUESTS);
    (cpu(service) - before).as_nanos() as f64 / REQUESTS as f64
}

#[test]
#[ignore = "a measurement: wants a quiet machine with 2 CPUs"]
fn idle_exports_do_not_make_the_others_dearer() {
    let (one, mut of_one) = many(1);
    let (all, mut of_all) = many(MANY);
    let mut ratios = Vec::new();
    for _ in 0..11 {
        let (alone, among) = (cost(&one, &mut of_one[0]), cost(&all, &mut of_all[MANY / 2]));
        eprintln!("{alone:.0} ns alone, {among:.0} ns among {MANY}");
        ratios.push(among / alone);
    }
    ratios.sort_by(f64::total_cmp);
    let median = ratios[ratios.len() / 2];
    eprintln!("{median:.3} times");
    assert!(median <= 1.1, "{median:.3} times the cost among {MANY}");
}
