//! A store in trouble: what becomes of the requests, and what is said about them. The store is a file whose end is cut
//! off, which fails every read there and allows every write.

mod common;

use common::model::{Op, Queue};
use common::queue::{Layout, RawQueue};
use common::service::{Service, Setup};
use common::vmm::{Vmm, everyday};
use common::{PATIENCE, eventually};
use ringblk::service::client::Client;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::time::Instant;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

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
    (setup.volume("root", &volume).vhost_user("root", "a", "queues=2").start().may_complain(), file)
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

/// Nothing that a VMM asks for waits for a store. What it knows to go on with goes on; the rest fails.
#[test]
fn a_vmm_never_waits_for_what_waits() {
    for policy in ["on-error=stop", "on-error=retry,retry-for=3600"] {
        for stops in [true, false] {
            let (service, file) = served(policy);
            let (mut vmm, mut queue) = everyday(&service.path("a"));
            file.set_len(0).unwrap();
            begin(&mut queue, 0, READ);
            await_waiting(&service, 1);
            if stops {
                assert_eq!(vmm.frontend.get_vring_base(0).unwrap(), 1);
                assert_eq!(queue.ring.used_idx(), 1, "it was complete before the answer");
                assert_eq!(queue.wait(), [(0, IOERR)]);
                await_waiting(&service, 0);
                continue;
            }
            // Whatever changes about a vring that runs.
            vmm.frontend.set_mem_table(&vmm.memory.infos()).unwrap();
            await_waiting(&service, 1);
            vmm.frontend.set_vring_kick(0, &queue.ring.kick).unwrap();
            vmm.frontend.set_vring_err(0, &queue.ring.err).unwrap();
            vmm.frontend.set_vring_call(0, &queue.ring.call).unwrap();
            vmm.frontend.set_vring_enable(0, false).unwrap();
            await_waiting(&service, 1);
            assert_eq!(queue.ring.used_idx(), 0, "it is neither done nor failed");
            vmm.frontend.set_vring_enable(0, true).unwrap();
            file.set_len(8 * MIB).unwrap();
            if policy == "on-error=stop" {
                Client::new(service.control()).resume("root", false).unwrap();
            }
            assert_eq!(queue.wait(), [(0, OK)]);
            assert_eq!(queue.write(0, &[7; 512]), OK, "and the next");
        }
    }
}

/// A guest that turns its cache off waits for a flush, and no longer than a moment for a store that is stopped.
#[test]
fn a_change_of_the_cache_does_not_wait_for_what_waits() {
    let (service, file) = served("on-error=stop");
    let (mut vmm, mut queue) = everyday(&service.path("a"));
    file.set_len(0).unwrap();
    begin(&mut queue, 0, READ);
    await_waiting(&service, 1);
    vmm.set_config(32, &[0]);
    assert_eq!(vmm.config(32, 1), [0]);
    await_waiting(&service, 1);
}

/// A VMM that is gone, and the next one.
#[test]
fn what_waits_holds_up_no_other_vmm() {
    let (service, file) = served("on-error=stop");
    let (vmm, mut queue) = everyday(&service.path("a"));
    file.set_len(0).unwrap();
    begin(&mut queue, 0, READ);
    await_waiting(&service, 1);
    drop((vmm, queue));
    let (_vmm, mut queue) = everyday(&service.path("a"));
    await_waiting(&service, 0);
    file.set_len(8 * MIB).unwrap();
    Client::new(service.control()).resume("root", false).unwrap();
    assert_eq!(queue.read(LOST, 8).0, OK);
}

/// Where the VMM keeps notes, the next service carries out what waited.
#[test]
fn what_waits_outlives_a_stop_in_the_notes() {
    let (service, file) = served("on-error=stop");
    let image = format!("/proc/self/fd/{}", file.as_raw_fd());
    let image = std::fs::read_link(image).unwrap();
    let mut vmm = Vmm::connect_with_notes(&service.path("a"));
    let info = VhostUserInflight { num_queues: 1, queue_size: 64, ..Default::default() };
    let (info, notes) = vmm.frontend.get_inflight_fd(&info).unwrap();
    vmm.frontend.set_inflight_fd(&info, notes.as_raw_fd()).unwrap();
    let mut queue = vmm.queue(0, 64, Layout::Plain, 4);
    file.set_len(0).unwrap();
    begin(&mut queue, 0, READ);
    await_waiting(&service, 1);
    let begun = Instant::now();
    service.stop();
    assert!(begun.elapsed() < PATIENCE / 2, "{:?}", begun.elapsed());
    assert_eq!(queue.ring.used_idx(), 0, "it did not fail");

    File::create(&image).unwrap().set_len(8 * MIB).unwrap();
    let setup = Setup::new().volume("root", &format!("file:{}", image.display())).vhost_user("root", "a", "");
    let service = setup.start();
    let memory = vmm.memory.clone();
    let mut vmm = Vmm::connect_sharing(&service.path("a"), memory);
    vmm.frontend.set_inflight_fd(&info, notes.as_raw_fd()).unwrap();
    vmm.start(0, &queue.ring);
    assert_eq!(queue.wait(), [(0, OK)]);
    drop(service);
    std::fs::remove_file(image).unwrap();
}

/// A stop waits for no store either, and says what it leaves.
#[test]
fn a_stop_ends_while_requests_wait() {
    for policy in ["on-error=stop", "on-error=retry,retry-for=3600"] {
        let (service, file) = served(policy);
        let (vmm, mut queue) = everyday(&service.path("a"));
        file.set_len(0).unwrap();
        begin(&mut queue, 0, READ);
        await_waiting(&service, 1);
        let begun = Instant::now();
        service.stop();
        assert!(begun.elapsed() < PATIENCE / 2, "{:?}", begun.elapsed());
        // Without notes nobody else would ever carry it out.
        assert_eq!(queue.wait(), [(0, IOERR)]);
        drop(vmm);
    }
}
