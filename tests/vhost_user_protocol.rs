//! Whatever a VMM changes while its guest works, no request is lost, none is done twice, and nothing touches memory
//! that the VMM has taken back: the drain and race rules, each under load.

mod common;

use common::client::Client;
use common::memory::{GuestMemory, Region};
use common::model::{Model, Op, Queue, Random};
use common::player::Played;
use common::profile::{PROFILES, Profile};
use common::queue::{Layout, RawQueue};
use common::ring::Ring;
use common::service::{Service, Setup};
use common::vmm::{BASE, EVENT_IDX, Vmm, everyday};
use common::{PATIENCE, eventually};
use nix::sys::signal::Signal;
use std::fs;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Duration;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES,
};

const MIB: u64 = 1 << 20;
const OK: u8 = 0;
/// Long enough for a request to be served on a busy machine, were it to be.
const A_WHILE: Duration = Duration::from_millis(100);

/// A file on a disk past the page cache: requests take their time, so that many are in flight.
fn slow_service(exports: &[&str]) -> Service {
    let setup = Setup::new();
    let image = setup.image(16 * MIB);
    fs::write(&image, vec![0x11; 16 * MIB as usize]).unwrap();
    let mut setup = setup.volume("root", &format!("file:{},direct=on", image.display()));
    for export in exports {
        setup = setup.vhost_user("root", export, "queues=2");
    }
    setup.args(["--workers", "2"]).start()
}

/// Offers a request in every slot from `first` on, half of them writes, and kicks.
fn load(queue: &mut RawQueue, first: usize) {
    load_slots(queue, first..queue.slots());
}

fn load_slots(queue: &mut RawQueue, slots: Range<usize>) {
    for slot in slots {
        let (sector, sectors) = (slot as u64 * 128, 64);
        if slot % 2 == 0 {
            queue.submit(slot, Op::Read { sector, sectors });
        } else {
            queue.put(slot, &vec![slot as u8; 64 * 512]);
            queue.submit(slot, Op::Write { sector, sectors });
        }
    }
    queue.kick();
}

/// Waits for all that is in flight; every one must have succeeded.
fn finish(queue: &mut RawQueue) {
    while queue.ring.in_flight() > 0 {
        assert!(queue.wait().iter().all(|(_, status)| *status == OK));
    }
}

#[test]
fn get_vring_base_leaves_nothing_in_flight() {
    let service = slow_service(&["a"]);
    let mut vmm = Vmm::connect(&service.path("a"));
    let mut queue = vmm.queue(0, 64, Layout::Plain, 16);
    let mut served = 0;
    for round in 0..40 {
        load(&mut queue, 0);
        if round % 2 == 1 {
            std::thread::sleep(Duration::from_micros(50 * round));
        }
        let base = vmm.frontend.get_vring_base(0).unwrap() as u16;
        // Taken and complete are the same: nothing is in flight.
        assert_eq!(queue.ring.used_idx(), base);
        served += usize::from(base.wrapping_sub(queue.ring.next_used));
        let done = queue.ring.reap();
        assert!(queue.settle(&done).iter().all(|(_, status)| *status == OK));
        // And nothing is touched any more: not the used ring, not the data of what was left.
        let rest = vmm.memory.get(BASE, 2 << 20);
        std::thread::sleep(Duration::from_millis(2));
        assert!(rest == vmm.memory.get(BASE, 2 << 20), "memory changed after the vring was stopped");
        // What was left is served when it goes on, without another kick than the one that is in the eventfd.
        assert_eq!(base, queue.ring.next_used);
        vmm.start(0, &queue.ring);
        queue.ring.kick.write(1).unwrap();
        finish(&mut queue);
    }
    assert!(served > 0, "every stop came before the first request: the test shows nothing");
}

#[test]
fn a_disabled_vring_takes_nothing() {
    let service = slow_service(&["a"]);
    let mut vmm = Vmm::connect(&service.path("a"));
    let mut queue = vmm.queue(0, 64, Layout::Plain, 16);
    for _ in 0..20 {
        load(&mut queue, 8);
        vmm.frontend.set_vring_enable(0, false).unwrap();
        // What it has taken is completed; then it rests, whatever else there is to do.
        let mut seen = queue.ring.used_idx();
        eventually("it comes to rest", || {
            std::thread::sleep(Duration::from_millis(20));
            seen == std::mem::replace(&mut seen, queue.ring.used_idx())
        });
        load_slots(&mut queue, 0..8);
        queue.ring.kick.write(1).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(queue.ring.used_idx(), seen, "a disabled vring was served");
        // Enabled again, it looks by itself.
        vmm.frontend.set_vring_enable(0, true).unwrap();
        finish(&mut queue);
    }
    // One that was never enabled is as good as not there.
    let mut other = vmm.idle_queue(16, Layout::Plain, 1);
    vmm.prepare(1, &other.ring);
    other.submit(0, Op::Flush);
    other.kick();
    assert_eq!(other.ring.wait(A_WHILE), []);
    vmm.frontend.set_vring_enable(1, true).unwrap();
    assert_eq!(other.wait(), [(0, OK)]);
}

#[test]
fn the_kick_descriptor_may_change_at_any_time() {
    let service = slow_service(&["a"]);
    for mask in [0, EVENT_IDX] {
        let memory = GuestMemory::new(BASE, 8 * MIB);
        let mut vmm = Vmm::connect_with(&service.path("a"), !EVENT_IDX | mask, memory);
        let mut queue = vmm.queue(0, 64, Layout::Plain, 16);
        for round in 0..50 {
            load(&mut queue, 8);
            let old = queue.ring.replace_kick();
            vmm.frontend.set_vring_kick(0, &queue.ring.kick).unwrap();
            // One that is only available, told of by nobody: the change itself has it seen.
            if round % 2 == 0 {
                queue.submit(0, Op::Flush);
                queue.ring.expose();
                let old = queue.ring.replace_kick();
                vmm.frontend.set_vring_kick(0, &queue.ring.kick).unwrap();
                drop(old);
            } else {
                queue.submit(0, Op::Flush);
                queue.kick();
            }
            finish(&mut queue);
            drop(old);
        }
    }
}

#[test]
fn the_call_descriptor_may_change_at_any_time() {
    let service = slow_service(&["a"]);
    for mask in [0, EVENT_IDX] {
        let memory = GuestMemory::new(BASE, 8 * MIB);
        let mut vmm = Vmm::connect_with(&service.path("a"), !EVENT_IDX | mask, memory);
        let mut queue = vmm.queue(0, 64, Layout::Plain, 16);
        for _ in 0..50 {
            load(&mut queue, 0);
            // Whatever was told on the old one is forgotten with it; the new one is told once at least.
            drop(queue.ring.replace_call());
            vmm.frontend.set_vring_call(0, &queue.ring.call).unwrap();
            finish(&mut queue);
        }
        load(&mut queue, 0);
        eventually("all are used", || queue.ring.used_idx() == queue.ring.next_avail);
        queue.ring.replace_call();
        vmm.frontend.set_vring_call(0, &queue.ring.call).unwrap();
        assert_eq!(queue.ring.call.read().unwrap(), 1, "a new call descriptor is signalled once");
        let done = queue.ring.reap();
        queue.settle(&done);
    }
}

#[test]
fn memory_comes_and_goes_under_load() {
    let regions = [
        Region { gpa: BASE, len: 4 * MIB, offset: 0 },
        Region { gpa: BASE + 64 * MIB, len: 4 * MIB, offset: 4 * MIB },
    ];
    let service = slow_service(&["a"]).may_complain();
    let memory = GuestMemory::with_regions(&regions);
    let mut vmm = Vmm::shake_hands(&service.path("a"), u64::MAX, memory);
    let infos = vmm.memory.infos();
    vmm.frontend.add_mem_region(&infos[0]).unwrap();
    let at = |bytes: u64| regions[0].gpa + bytes;
    // Two rings in the first region, with slots in the first and in the second.
    let memory = vmm.memory.clone();
    let event_idx = vmm.features & EVENT_IDX != 0;
    let mut first = RawQueue::new(Ring::new(&memory, at(0), 64, event_idx), Layout::Plain, at(MIB), 16);
    let mut second =
        RawQueue::new(Ring::new(&memory, at(MIB / 2), 64, event_idx), Layout::Plain, regions[1].gpa, 16);
    vmm.start(0, &first.ring);
    vmm.start(1, &second.ring);
    for _ in 0..20 {
        load(&mut first, 0);
        vmm.frontend.add_mem_region(&infos[1]).unwrap();
        load(&mut second, 0);
        vmm.frontend.remove_mem_region(&infos[1]).unwrap();
        // The acknowledgement says that no request is in flight there any more.
        let rest = memory.get(regions[1].gpa, 2 << 20);
        let done = second.ring.reap();
        assert!(second.settle(&done).iter().all(|(_, status)| *status == OK));
        finish(&mut first);
        assert!(rest == memory.get(regions[1].gpa, 2 << 20), "memory changed after it was taken away");
        // Whatever was not taken by then finds no memory, not even for its status: nothing is said of it, until the memory
        // is back.
        assert!(second.ring.reap().is_empty());
        vmm.frontend.add_mem_region(&infos[1]).unwrap();
        let done = second.ring.expect(16 - done.len());
        assert!(second.settle(&done).iter().all(|(_, status)| *status == OK));
        vmm.frontend.remove_mem_region(&infos[1]).unwrap();
    }
}

#[test]
fn a_new_memory_table_under_load() {
    let service = slow_service(&["a"]);
    let mut vmm = Vmm::connect(&service.path("a"));
    let infos = vmm.memory.infos();
    let half = infos[0].memory_size / 2;
    // The same memory, cut in one or two.
    let cut = [
        VhostUserMemoryRegionInfo { memory_size: half, ..infos[0] },
        VhostUserMemoryRegionInfo {
            guest_phys_addr: infos[0].guest_phys_addr + half,
            userspace_addr: infos[0].userspace_addr + half,
            memory_size: half,
            mmap_offset: half,
            ..infos[0]
        },
    ];
    let mut queue = vmm.queue(0, 64, Layout::Plain, 16);
    for round in 0..40 {
        load(&mut queue, 0);
        let table = if round % 2 == 0 { &cut[..] } else { &infos[..] };
        vmm.frontend.set_mem_table(table).unwrap();
        finish(&mut queue);
    }
    let mut model = Model::new(4, 0, 4096);
    queue.submit(0, Op::WriteZeroes { sector: 0, sectors: 4096, unmap: false });
    queue.kick();
    assert_eq!(queue.wait(), [(0, OK)]);
    model.exercise(&mut queue, 200);
}

#[test]
fn a_ring_may_move() {
    let service = slow_service(&["a"]);
    let mut vmm = Vmm::connect(&service.path("a"));
    let mut queue = vmm.queue(0, 64, Layout::Plain, 16);
    let mut other = vmm.take(Ring::bytes(64));
    for _ in 0..20 {
        load(&mut queue, 0);
        // The same addresses again, as QEMU does: nothing happens, and nothing is lost.
        vmm.frontend.set_vring_addr(0, &queue.ring.config()).unwrap();
        finish(&mut queue);
        vmm.frontend.get_vring_base(0).unwrap();
        let here = queue.ring.desc;
        queue.ring.relocate(other);
        other = here;
        vmm.start(0, &queue.ring);
    }
    // Its size, too.
    vmm.frontend.get_vring_base(0).unwrap();
    let mut queue = vmm.queue(0, 8, Layout::Joined, 4);
    load(&mut queue, 0);
    finish(&mut queue);
}

#[test]
fn addresses_may_come_last() {
    // With memory at guest address 0, where a ring without addresses would be.
    let service = slow_service(&["a"]);
    let mut vmm = Vmm::connect_with(&service.path("a"), u64::MAX, GuestMemory::new(0, 4 * MIB));
    vmm.take(MIB);
    let mut queue = vmm.idle_queue(64, Layout::Plain, 16);
    // Taken for an avail ring at 0, it is one where nothing is new: its index is 0.
    let mut canary = Random::new(8).bytes(MIB as usize);
    canary[2..4].fill(0);
    vmm.memory.write(0, &canary);
    queue.submit(0, Op::Flush);
    queue.ring.expose();
    vmm.frontend.set_vring_num(0, 64).unwrap();
    // A base that came after the addresses would be one for a vring that runs already, and take it back there.
    vmm.frontend.set_vring_base(0, 0).unwrap();
    vmm.frontend.set_vring_enable(0, true).unwrap();
    vmm.frontend.set_vring_call(0, &queue.ring.call).unwrap();
    vmm.frontend.set_vring_kick(0, &queue.ring.kick).unwrap();
    queue.ring.kick.write(1).unwrap();
    std::thread::sleep(A_WHILE);
    assert!(vmm.memory.get(0, MIB as usize) == canary, "memory that is no ring's was written");
    vmm.frontend.set_vring_addr(0, &queue.ring.config()).unwrap();
    assert_eq!(queue.wait(), [(0, OK)]);
}

#[test]
fn features_may_be_set_again() {
    let service = slow_service(&["a"]);
    let mut vmm = Vmm::connect(&service.path("a"));
    let mut queue = vmm.queue(0, 64, Layout::Plain, 16);
    for round in 0..10 {
        vmm.frontend.get_vring_base(0).unwrap();
        let features = if round % 2 == 0 { vmm.features & !EVENT_IDX } else { vmm.features };
        vmm.frontend.set_features(features).unwrap();
        queue.ring.event_idx = features & EVENT_IDX != 0;
        vmm.memory.half(queue.ring.avail).store(0, Ordering::Relaxed);
        vmm.start(0, &queue.ring);
        load(&mut queue, 0);
        finish(&mut queue);
    }
}

#[test]
fn a_vmm_leaves_with_requests_in_flight_and_comes_back() {
    let service = slow_service(&["a", "b"]);
    let (_b, mut witness) = everyday(&service.path("b"));
    for round in 0..30 {
        let mut vmm = Vmm::connect(&service.path("a"));
        let mut queues = [vmm.queue(0, 64, Layout::Plain, 16), vmm.queue(1, 64, Layout::Plain, 16)];
        queues.iter_mut().for_each(|queue| load(queue, 0));
        if round % 3 == 0 {
            queues.iter_mut().for_each(finish);
        }
        drop(vmm);
        // At once, by this VMM's memory or another kind of VMM.
        if round % 2 == 0 {
            let client = Client::connect(&service.path("a"), true);
            let mut queue = client.queues(1, 64, 16).remove(0);
            queue.submit(0, Op::Read { sector: 128, sectors: 1 });
            queue.kick();
            assert_eq!(queue.wait(), [(0, OK)]);
        }
        assert_eq!(witness.one(Op::Flush, &[]).0, OK);
    }
}

#[test]
fn a_hundred_connections_leave_nothing_behind() {
    let service = slow_service(&["a"]);
    let connect = || {
        let mut vmm = Vmm::connect(&service.path("a"));
        let mut queue = vmm.queue(0, 256, Layout::Plain, 16);
        load(&mut queue, 0);
        finish(&mut queue);
        load(&mut queue, 0);
    };
    let measure = || {
        service.await_free("a");
        // The last descriptors are closed by the ring in its own time.
        std::thread::sleep(A_WHILE);
        (service.descriptors() + service.polls(), service.mappings(), service.anonymous_kib())
    };
    (0..10).for_each(|_| connect());
    let before = measure();
    // The workers' mailboxes are always polled, so they show that polls are counted.
    assert!(service.polls() >= 2);
    (0..100).for_each(|_| connect());
    let after = measure();
    assert!(after.0 <= before.0, "descriptors: {} became {}", before.0, after.0);
    assert!(after.1 <= before.1 + 4, "mappings: {} became {}", before.1, after.1);
    assert!(after.2 <= before.2 + 512, "memory: {} KiB became {} KiB", before.2, after.2);
    assert!(after.2 <= 16 << 10, "{} KiB of memory for one export", after.2);
}

/// Sectors of the disk that VMMs are tried on.
const SECTORS: u64 = 16 << 11;

fn played(profile: &'static Profile, service: &Service) -> Played {
    let mut guest = Played::new(profile, &service.path("a"), profile.queues);
    let capacity = guest.vmm.connection().unwrap().capacity();
    assert_eq!(capacity, SECTORS, "{}: the capacity", profile.name);
    guest
}

/// A guest at work.
trait Work {
    fn work(&mut self, seed: u64);
}

impl Work for Played {
    /// Writes, flushes, reads back; discards and zeroes where the driver may.
    fn work(&mut self, seed: u64) {
        let may = |feature: u32| self.vmm.features & 1 << feature != 0;
        assert!(may(VIRTIO_BLK_F_FLUSH));
        let (discards, zeroes) = (may(VIRTIO_BLK_F_DISCARD), may(VIRTIO_BLK_F_WRITE_ZEROES));
        let name = self.vmm.profile.name;
        for (index, queue) in self.queues.iter_mut().enumerate() {
            let (sector, data) = (64 * index as u64, Random::new(seed + index as u64).bytes(8192));
            assert_eq!(queue.write(sector, &data), OK, "{name}: a write");
            assert_eq!(queue.one(Op::Flush, &[]).0, OK, "{name}: a flush");
            assert!(queue.read(sector, 16) == (OK, data), "{name}: what was written is not there");
            if discards {
                assert_eq!(queue.one(Op::Discard { sector, sectors: 8 }, &[]).0, OK, "{name}: a discard");
            }
            if zeroes {
                let op = Op::WriteZeroes { sector, sectors: 8, unmap: true };
                assert_eq!(queue.one(op, &[]).0, OK, "{name}: zeroes");
                assert!(queue.read(sector, 8) == (OK, vec![0; 4096]), "{name}: zeroes are not");
            }
            assert_eq!(queue.one(Op::GetId, &[]).0, OK, "{name}: an identity");
        }
    }
}

#[test]
fn each_vmm_works_as_it_speaks() {
    let service = slow_service(&["a"]);
    for profile in PROFILES {
        let mut guest = played(profile, &service);
        guest.work(1);
        // The guest resets its device, and its driver goes on where it was.
        let bases = guest.vmm.reset().unwrap();
        assert_eq!(
            bases,
            guest.vmm.used(),
            "{}: something is in flight in a vring that stopped",
            profile.name
        );
        guest.vmm.start().unwrap();
        guest.work(3);
        // The VMM dies, and another one begins.
        drop(guest);
        played(profile, &service).work(5);
    }
}

#[test]
fn each_vmm_that_comes_back_is_served_on() {
    for profile in PROFILES.iter().filter(|profile| profile.again.is_some()) {
        let setup = Setup::new();
        let image = setup.image(SECTORS * 512);
        let setup = setup.volume("root", &format!("file:{}", image.display()));
        let mut service = setup.vhost_user("root", "a", "queues=2").start();
        let mut guest = played(profile, &service);
        guest.work(1);
        // The connection alone, then the service, first as planned and then not. The ring has wrapped by then.
        guest.vmm.disconnect();
        guest.vmm.reconnect(&service.path("a"), PATIENCE).unwrap();
        guest.work(2);
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            service.restart(signal);
            guest.vmm.reconnect(&service.path("a"), PATIENCE).unwrap();
            (0..20).for_each(|seed| guest.work(seed));
        }
    }
}

#[test]
fn the_configuration_space() {
    let service =
        Setup::new().volume("root", "memory:8M").vhost_user("root", "a", "queues=3,queue-size=128").start();
    let mut vmm = Vmm::connect(&service.path("a"));
    let whole = vmm.config(0, 256);
    let word = |at: usize| u32::from_le_bytes(whole[at..at + 4].try_into().unwrap());
    assert_eq!((word(0), word(4)), (8 << 20 >> 9, 0), "capacity");
    assert_eq!((word(8), word(12), word(20)), (0, 126, 512), "size_max, seg_max, blk_size");
    assert_eq!((whole[34], whole[35]), (3, 0), "num_queues");
    assert!(whole[60..].iter().all(|byte| *byte == 0));
    for (offset, len) in [(0, 1), (0, 60), (0, 64), (8, 4), (20, 4), (32, 1), (100, 50), (255, 1), (1, 255)] {
        assert_eq!(vmm.config(offset, len), &whole[offset as usize..][..len], "{len} bytes at {offset}");
    }
}

#[test]
fn the_write_cache_can_be_turned_off() {
    let service = slow_service(&["a"]);
    let mut vmm = Vmm::connect(&service.path("a"));
    assert_ne!(vmm.features & (1 << VIRTIO_BLK_F_CONFIG_WCE | 1 << VIRTIO_BLK_F_FLUSH), 0);
    let mut queue = vmm.queue(0, 64, Layout::Plain, 16);
    let before = vmm.config(0, 256);
    assert_eq!(before[32], 1);
    for on in [0, 1, 0] {
        load(&mut queue, 0);
        vmm.set_config(32, &[on]);
        assert_eq!(vmm.config(32, 1), [on]);
        finish(&mut queue);
        assert_eq!(queue.write(0, &[on; 512]), OK);
    }
    // Nothing else can be written, nor anything else than 0 and 1.
    for (offset, bytes) in [(0, &[9u8; 8][..]), (20, &[0, 2, 0, 0]), (32, &[2]), (32, &[1, 1]), (255, &[1])] {
        vmm.set_config(offset, bytes);
    }
    let mut wanted = before;
    wanted[32] = 0;
    assert_eq!(vmm.config(0, 256), wanted);
    assert_eq!(queue.one(Op::Flush, &[]).0, OK);
}

#[test]
fn an_idle_export_uses_no_cpu() {
    let service = slow_service(&["a", "b"]);
    let (_a, mut queue) = everyday(&service.path("a"));
    let (_b, mut other) = everyday(&service.path("b"));
    load(&mut queue, 0);
    load(&mut other, 0);
    finish(&mut queue);
    finish(&mut other);
    std::thread::sleep(A_WHILE);
    let before = service.cpu_ticks();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(service.cpu_ticks(), before, "ticks of 10 ms used while idle");
    // And it is there at once when needed.
    assert_eq!(queue.read(0, 1).0, OK);
}
