//! A store in trouble: what becomes of the requests, and what is said about them. The store is a file whose end is cut
//! off, which fails every read there and allows every write.

mod common;

use common::eventually;
use common::model::{Op, Queue};
use common::queue::{Layout, RawQueue};
use common::service::{Service, Setup};
use common::vmm::{Vmm, everyday};
use nix::sys::signal::Signal;
use ringblk::service::client::Client;
use std::fs::{File, OpenOptions};
use std::time::Duration;
use vhost::VhostBackend;

const MIB: u64 = 1 << 20;
const OK: u8 = 0;
const IOERR: u8 = 1;

/// A sector that is lost with the file's end.
const LOST: u64 = 4 * MIB / 512;

/// A service of one volume with two workers, and its file.
fn served(options: &str) -> (Service, File) {
    let setup = Setup::new().args(["--workers", "2", "--slow-after", "1"]);
    let image = setup.image(8 * MIB);
    let file = OpenOptions::new().write(true).open(&image).unwrap();
    let volume = format!("file:{},{options}", image.display());
    (setup.volume("root", &volume).door("root", "a", "queues=2").start().may_complain(), file)
}

fn begin(queue: &mut RawQueue, slot: usize, op: Op) {
    queue.submit(slot, op);
    queue.kick();
}

const READ: Op = Op::Read { sector: LOST, sectors: 8 };

fn await_waiting(service: &Service, waiting: usize) {
    eventually("requests wait", || service.status().volumes[0].waiting == waiting);
}

fn await_log(service: &Service, words: &[&str]) {
    let said = |line: &str| words.iter().all(|word| line.contains(word));
    eventually(&format!("the log says {words:?}"), || service.log().lines().any(said));
}

#[test]
fn all_queues_wait_and_are_told_of() {
    let (service, file) = served("on-error=stop");
    let mut vmm = Vmm::connect(&service.path("a"));
    let mut queues = [vmm.queue(0, 64, Layout::Plain, 4), vmm.queue(1, 64, Layout::Plain, 4)];
    file.set_len(0).unwrap();
    begin(&mut queues[0], 0, READ);
    await_waiting(&service, 1);
    begin(&mut queues[1], 0, Op::Write { sector: 0, sectors: 1 });
    begin(&mut queues[1], 1, Op::Flush);
    await_waiting(&service, 3);
    assert_eq!(file.metadata().unwrap().len(), 0, "the write waits");
    await_log(&service, &["vring 0: tag 0: read of 8 sectors at sector 8192: not done", "resume root"]);
    await_log(&service, &["vring 1: tag 0: write of 1 sectors at sector 0: not done", "resume root"]);
    let client = Client::new(service.control());
    assert_eq!(client.resume("root", false).unwrap().requests, 3);
    let mut done = queues[1].wait();
    while done.len() < 2 {
        done.extend(queues[1].wait());
    }
    done.sort_unstable();
    assert_eq!(done, [(0, OK), (1, OK)], "on the other worker");
    await_waiting(&service, 1);
    file.set_len(8 * MIB).unwrap();
    assert_eq!(client.resume("root", false).unwrap().requests, 1);
    assert_eq!(queues[0].wait(), [(0, OK)]);
    let status = service.status().volumes.remove(0);
    assert_eq!((&*status.policy, status.paused, status.waiting), ("stop", false, 0));
    let log = service.log();
    assert_eq!(
        log.matches("requests wait until `ringblk resume root`").count(),
        2,
        "once for each stop:\n{log}"
    );
}

#[test]
fn what_comes_back_in_time_is_never_missed() {
    let (service, file) = served("on-error=retry,retry-for=25");
    let (_vmm, mut queue) = everyday(&service.path("a"));
    file.set_len(0).unwrap();
    begin(&mut queue, 0, READ);
    await_waiting(&service, 1);
    assert!(!service.status().volumes[0].paused);
    assert_eq!(queue.write(0, &[7; 512]), OK, "others do not wait");
    await_log(&service, &["volume root: read of 8 sectors at sector 8192, tag 0", "tried again for 25 s"]);
    file.set_len(8 * MIB).unwrap();
    assert_eq!(queue.wait(), [(0, OK)]);
    await_waiting(&service, 0);
}

#[test]
fn what_does_not_come_back_is_reported() {
    for options in ["on-error=report", "on-error=retry,retry-for=1"] {
        let (service, file) = served(options);
        let (_vmm, mut queue) = everyday(&service.path("a"));
        file.set_len(0).unwrap();
        assert_eq!(queue.read(LOST, 8).0, IOERR);
        assert_eq!(service.status().volumes[0].waiting, 0);
    }
}

/// A request that waits may have any of the guest's memory in the kernel: nothing that takes it away is answered before.
#[test]
fn a_stop_or_a_memory_change_waits_for_what_waits() {
    for stops in [true, false] {
        let (service, file) = served("on-error=stop");
        let (vmm, mut queue) = everyday(&service.path("a"));
        file.set_len(0).unwrap();
        begin(&mut queue, 0, READ);
        await_waiting(&service, 1);
        let asked = std::thread::spawn(move || {
            match stops {
                true => assert_eq!(vmm.frontend.get_vring_base(0).unwrap(), 1),
                false => drop(vmm.frontend.set_mem_table(&vmm.memory.infos()).unwrap()),
            }
            vmm
        });
        std::thread::sleep(Duration::from_millis(300));
        assert!(!asked.is_finished() && queue.ring.used_idx() == 0);
        Client::new(service.control()).resume("root", true).unwrap();
        let _vmm = asked.join().unwrap();
        assert_eq!(queue.ring.used_idx(), 1, "it was complete before the answer");
        assert_eq!(queue.wait(), [(0, IOERR)]);
    }
}

/// The memory of a VMM that is gone is not let go of before its requests are over.
#[test]
fn a_drain_waits_and_says_for_what() {
    let (service, file) = served("on-error=stop");
    let mut service = service.ends_with(1);
    let (vmm, mut queue) = everyday(&service.path("a"));
    file.set_len(0).unwrap();
    begin(&mut queue, 0, READ);
    await_waiting(&service, 1);
    drop((vmm, queue));
    await_log(&service, &["still waiting for its requests", "volume root: 1 wait for `ringblk resume root`"]);
    service.signal(Signal::SIGTERM);
    await_log(
        &service,
        &["stopping: volume root: 1 wait for", "read of 8 sectors at sector 8192, tag 0: Input/output"],
    );
    assert_eq!(service.status().volumes[0].waiting, 1);
    // Who insists on an end has one.
    service.signal(Signal::SIGTERM);
    service.wait();
    assert!(service.log().contains("resumed: 1 requests fail"), "{}", service.log());
}
