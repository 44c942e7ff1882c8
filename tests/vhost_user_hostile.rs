//! A guest or VMM that breaks the rules harms itself: its own request, vring or connection fails, and everything else
//! is served as before.

mod common;

use common::memory::{GuestMemory, VMM_OFFSET};
use common::model::{Op, Queue, Random};
use common::queue::{Layout, RawQueue, UNTOUCHED};
use common::ring::{INDIRECT, NEXT, Segment, Used, WRITE};
use common::service::{Service, Setup};
use common::vmm::{BASE, Vmm, everyday};
use common::wire::{NEED_REPLY, VERSION, Wire, code, halves, message, words};
use common::{PATIENCE, eventually};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vmm_sys_util::eventfd::EventFd;

const MIB: u64 = 1 << 20;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;

/// Two exports to a volume: `a` for the culprit, `b` for a witness who must not notice.
struct Scene {
    service: Service,
    _vmm: Vmm,
    witness: RawQueue,
}

impl Scene {
    fn set() -> Scene {
        let setup = Setup::new().args(["--workers", "1"]);
        // Past the page cache, so that a request is in flight for a while.
        let image = setup.image(8 * MIB);
        let setup = setup.volume("root", &format!("file:{},direct=on", image.display()));
        let service = setup
            .vhost_user("root", "a", "queues=2,queue-size=256")
            .vhost_user("root", "b", "")
            .start()
            .may_complain();
        let (vmm, witness) = everyday(&service.path("b"));
        Scene { service, _vmm: vmm, witness }
    }

    fn socket(&self) -> std::path::PathBuf {
        self.service.path("a")
    }

    /// The witness is served, and the culprit's socket opens for the next one.
    fn unharmed(&mut self, after: &str) {
        assert_eq!(self.witness.write(8, &[8; 512]), OK, "{after}");
        assert_eq!(self.witness.read(8, 1), (OK, vec![8; 512]), "{after}");
        let (_vmm, mut queue) = everyday(&self.socket());
        assert_eq!(queue.read(8, 1), (OK, vec![8; 512]), "{after}");
    }
}

/// What a chain's parts are, by number.
struct Parts {
    /// A header that reads sector 0.
    read: Segment,
    /// A header that writes sector 0.
    write: Segment,
    data: Segment,
    status: Segment,
}

fn parts(queue: &RawQueue) -> Parts {
    let memory = &queue.ring.memory;
    let at = queue.data(0);
    let mut header = [0; 32];
    header[16] = 1;
    memory.write(at - 64, &header);
    memory.write(at, &[UNTOUCHED; 1024]);
    let segment = |addr, len, write| Segment { addr, len, write };
    Parts {
        read: segment(at - 64, 16, false),
        write: segment(at - 48, 16, false),
        data: segment(at, 512, true),
        status: segment(at + 512, 1, true),
    }
}

#[test]
fn malformed_chains_are_answered_and_harm_nobody() {
    let mut scene = Scene::set();
    let (mut vmm, mut queue) = everyday(&scene.socket());
    assert_eq!(queue.write(0, &[0x33; 512]), OK);
    let Parts { read, write, data, status } = parts(&queue);
    let out = |segment: Segment| Segment { write: false, ..segment };
    let empty = |segment: Segment| Segment { len: 0, ..segment };
    let at = |addr: u64, segment: Segment| Segment { addr, ..segment };
    let end = BASE + 8 * MIB;
    // Chain, and its status: `None` where there is no place for one, so that the queue is given up.
    let chains: &[(&str, &[Segment], Option<u8>)] = &[
        ("nothing to write", &[read], None),
        ("nothing to write, with data", &[write, out(data)], None),
        ("no header", &[status], Some(IO_ERROR)),
        ("a writable header", &[Segment { write: true, ..read }, data, status], Some(IO_ERROR)),
        ("half a header", &[Segment { len: 15, ..read }, data, status], Some(IO_ERROR)),
        ("only empty descriptors", &[empty(read), empty(status)], None),
        ("an empty status", &[read, empty(status)], None),
        ("readable after writable", &[read, data, out(status), status], Some(IO_ERROR)),
        ("data to a read", &[read, out(data), status], Some(IO_ERROR)),
        ("data from a write", &[write, data, status], Some(IO_ERROR)),
        ("no data to a write", &[write, status], Some(IO_ERROR)),
        ("a header outside memory", &[at(end, read), data, status], Some(IO_ERROR)),
        ("data outside memory", &[read, at(end - 511, data), status], Some(IO_ERROR)),
        ("data below memory", &[read, at(0, data), status], Some(IO_ERROR)),
        ("a status outside memory", &[read, data, at(end, status)], None),
        ("data that wraps around", &[read, at(u64::MAX - 100, data), status], Some(IO_ERROR)),
        ("4 GiB of data", &[read, Segment { len: u32::MAX, ..data }, status], Some(IO_ERROR)),
        ("2 GiB of data", &[write, Segment { len: 1 << 31, ..out(data) }, status], Some(IO_ERROR)),
    ];
    for (what, chain, wanted) in chains {
        parts(&queue);
        // As Linux leaves it from the request before: whoever is not told anything takes the request for done.
        queue.ring.memory.write(status.addr, &[OK]);
        queue.ring.add(chain);
        queue.ring.publish();
        match wanted {
            Some(wanted) => {
                let used = queue.ring.expect(1)[0];
                assert_eq!((queue.ring.memory.get(status.addr, 1)[0], used.len), (*wanted, 1), "{what}");
                assert_eq!(
                    queue.ring.memory.get(data.addr, 512),
                    [UNTOUCHED; 512],
                    "{what}: data was written"
                );
            }
            None => {
                given_up(&mut queue, what);
                assert_eq!(
                    queue.ring.memory.get(data.addr, 512),
                    [UNTOUCHED; 512],
                    "{what}: data was written"
                );
                drop((vmm, queue));
                (vmm, queue) = everyday(&scene.socket());
            }
        }
        assert_eq!(queue.read(0, 1), (OK, vec![0x33; 512]), "{what}: the volume was changed");
    }
    drop(vmm);
    scene.unharmed("malformed chains");
}

/// The queue takes nothing more, which its error descriptor says, and completes nothing.
fn given_up(queue: &mut RawQueue, what: &str) {
    eventually("the error descriptor is signalled", || queue.ring.err.read().is_ok());
    assert!(queue.ring.reap().is_empty(), "{what}: a completion without a status");
}

/// Offers the chain at `head` that was built by hand, and waits for its end.
fn by_hand(queue: &mut RawQueue, head: u16) -> Used {
    queue.ring.offer(head);
    queue.ring.publish();
    queue.ring.expect(1)[0]
}

#[test]
fn malformed_descriptor_tables() {
    let mut scene = Scene::set();
    let (mut vmm, mut queue) = everyday(&scene.socket());
    let Parts { read, data, status, .. } = parts(&queue);
    let table = queue.data(1);
    // Descriptors from 60 on: the ring's own requests use the low ones.
    let ring = |queue: &RawQueue, index, segment: Segment, flags, next| {
        queue.ring.descriptor(queue.ring.desc, index, segment.addr, segment.len, flags, next);
    };
    let indirect = |queue: &RawQueue, len: u32, flags| {
        let segment = Segment { addr: table, len, write: false };
        ring(queue, 60, segment, flags, 61);
    };
    let fill = |queue: &RawQueue| {
        queue.ring.descriptor(table, 0, read.addr, 16, NEXT, 1);
        queue.ring.descriptor(table, 1, data.addr, 512, NEXT | WRITE, 2);
        queue.ring.descriptor(table, 2, status.addr, 1, WRITE, 0);
    };
    type Build<'a> = (&'a str, &'a dyn Fn(&RawQueue));
    let cases: &[Build<'_>] = &[
        ("a descriptor that follows itself", &|queue| ring(queue, 60, read, NEXT, 60)),
        ("a loop of two", &|queue| {
            ring(queue, 60, read, NEXT, 61);
            ring(queue, 61, data, NEXT | WRITE, 60);
        }),
        ("a writable loop", &|queue| {
            ring(queue, 60, read, NEXT, 61);
            ring(queue, 61, data, NEXT | WRITE, 61);
        }),
        ("a next outside the table", &|queue| ring(queue, 60, read, NEXT, 64)),
        ("a next far outside the table", &|queue| ring(queue, 60, read, NEXT, u16::MAX)),
        ("an indirect table of no descriptors", &|queue| indirect(queue, 0, INDIRECT)),
        ("an indirect table of half a descriptor", &|queue| indirect(queue, 24, INDIRECT)),
        ("an indirect table that goes on", &|queue| indirect(queue, 48, INDIRECT | NEXT)),
        ("an indirect table of a million descriptors", &|queue| indirect(queue, 16 << 20, INDIRECT)),
        ("an indirect table that is cut short", &|queue| {
            fill(queue);
            indirect(queue, 32, INDIRECT);
        }),
        ("an indirect table outside memory", &|queue| {
            ring(queue, 60, Segment { addr: BASE + 8 * MIB - 16, len: 48, write: false }, INDIRECT, 0);
        }),
        ("an indirect table in an indirect table", &|queue| {
            queue.ring.descriptor(table, 0, table, 48, INDIRECT, 0);
            indirect(queue, 48, INDIRECT);
        }),
        ("an indirect table that loops", &|queue| {
            queue.ring.descriptor(table, 0, read.addr, 16, NEXT, 0);
            indirect(queue, 48, INDIRECT);
        }),
    ];
    for (what, build) in cases {
        parts(&queue);
        build(&queue);
        queue.ring.offer(60);
        queue.ring.publish();
        given_up(&mut queue, what);
        assert_eq!(queue.ring.memory.get(data.addr, 512), [UNTOUCHED; 512], "{what}");
        drop((vmm, queue));
        (vmm, queue) = everyday(&scene.socket());
        assert_eq!(queue.read(0, 1).0, OK, "{what}");
    }
    // The same, well formed, works: the cases failed for the reasons given.
    parts(&queue);
    fill(&queue);
    indirect(&queue, 48, INDIRECT);
    assert_eq!(by_hand(&mut queue, 60), Used { head: 60, len: 513 });
    assert_eq!(queue.ring.memory.get(status.addr, 1), [OK]);
    drop(vmm);
    scene.unharmed("malformed descriptor tables");
}

#[test]
fn a_broken_ring_stops_and_its_neighbour_does_not() {
    let mut scene = Scene::set();
    for case in ["index", "head", "twice"] {
        let mut vmm = Vmm::connect(&scene.socket());
        let mut broken = vmm.queue(0, 16, Layout::Plain, 4);
        let mut neighbour = vmm.queue(1, 16, Layout::Plain, 4);
        assert_eq!(broken.one(Op::Flush, &[]).0, OK);
        match case {
            "index" => broken.ring.next_avail = broken.ring.next_avail.wrapping_add(17),
            "head" => broken.ring.offer(16),
            _ => {
                // Both in one batch, so that the first is in flight when the second is seen.
                broken.submit(0, Op::Read { sector: 0, sectors: 128 });
                let head = broken.ring.memory.get(broken.ring.avail + 4 + 2, 2)[0];
                broken.ring.offer(head.into());
            }
        }
        broken.ring.expose();
        broken.ring.kick.write(1).unwrap();
        eventually("the error descriptor is signalled", || broken.ring.err.read().is_ok());
        // The request that was in flight completes, and nothing else.
        broken.ring.expect(usize::from(case == "twice"));
        assert!(broken.ring.wait(Duration::from_millis(50)).is_empty());
        assert_eq!(neighbour.one(Op::Flush, &[]).0, OK, "{case}");
        // It can be stopped and set up again like any other.
        vmm.frontend.get_vring_base(0).unwrap();
        let mut again = vmm.queue(0, 16, Layout::Plain, 4);
        assert_eq!(again.one(Op::Flush, &[]).0, OK, "{case}");
        drop((vmm, neighbour));
        scene.unharmed(case);
    }
}

#[test]
fn random_rings_crash_nothing() {
    let mut scene = Scene::set();
    let mut random = Random::new(77);
    for _ in 0..60 {
        let mut vmm = Vmm::connect_with(&scene.socket(), u64::MAX, GuestMemory::new(BASE, MIB));
        let size = 16;
        let mut ring = vmm.ring(size);
        vmm.start(0, &ring);
        // Addresses and lengths that hit memory now and then, flags of all kinds.
        for table in [ring.desc, BASE + MIB / 2] {
            for index in 0..size {
                let addr = BASE + random.below(MIB + 8192);
                let len = [0, 1, 15, 16, 48, 512, 4096, u32::MAX][random.below(8) as usize];
                ring.descriptor(table, index, addr, len, random.below(8) as u16, random.below(18) as u16);
            }
        }
        for _ in 0..random.below(20) {
            ring.offer(random.below(17) as u16);
        }
        ring.publish();
        ring.kick.write(1).unwrap();
        ring.wait(Duration::from_millis(5));
        // Whatever came of it, it can be stopped.
        vmm.frontend.get_vring_base(0).unwrap();
    }
    scene.unharmed("random rings");
}

#[test]
fn rings_where_there_is_no_memory() {
    let mut scene = Scene::set();
    // In turn: the descriptor table, the driver area, the device area; misaligned, cut off by the end, far away.
    for area in 0..3 {
        for shift in [1, 8 * MIB - 64, 1 << 40] {
            let mut vmm = Vmm::connect(&scene.socket());
            let ring = vmm.ring(256);
            let mut config = ring.config();
            match area {
                0 => config.desc_table_addr += shift,
                1 => config.avail_ring_addr += shift,
                _ => config.used_ring_addr += shift,
            }
            vmm.frontend.set_vring_num(0, 256).unwrap();
            // Either this is refused, or the ring never starts and its error descriptor says so.
            let taken = vmm.frontend.set_vring_addr(0, &config).is_ok();
            if taken {
                vmm.frontend.set_vring_err(0, &ring.err).unwrap();
                vmm.frontend.set_vring_kick(0, &ring.kick).unwrap();
                eventually("the error descriptor is signalled", || ring.err.read().is_ok());
            }
            drop(vmm);
            scene.unharmed(&format!("area {area} moved by {shift:#x}"));
        }
    }
}

#[test]
fn settings_out_of_range() {
    let mut scene = Scene::set();
    let body = |index: u32, value: u32| halves(&[index, value]);
    let cases: &[(&str, u32, Vec<u8>)] = &[
        ("no descriptors", code::SET_VRING_NUM, body(0, 0)),
        ("more descriptors than offered", code::SET_VRING_NUM, body(0, 512)),
        ("65536 descriptors", code::SET_VRING_NUM, body(0, 65536)),
        ("a queue that is not there", code::SET_VRING_NUM, body(2, 16)),
        ("the last queue of all", code::SET_VRING_NUM, body(u32::MAX, 16)),
        ("half enabled", code::SET_VRING_ENABLE, body(0, 2)),
        ("enabling a queue that is not there", code::SET_VRING_ENABLE, body(7, 1)),
        ("features that were not offered", code::SET_FEATURES, words(&[u64::MAX])),
        ("packed rings", code::SET_FEATURES, words(&[1 << 34 | 1 << 32 | 1 << 30])),
        ("a second owner", code::SET_OWNER, vec![]),
        ("addresses before memory", code::SET_VRING_ADDR, words(&[0, 0, 0, 0, 0])),
    ];
    for (what, code, body) in cases {
        let mut wire = Wire::greeted(&scene.socket());
        wire.send(&message(*code, NEED_REPLY, body), &[]);
        // Refused by an answer or by hanging up.
        assert_ne!(wire.answer(), Some(0), "{what}");
        drop(wire);
        scene.unharmed(what);
    }
}

#[test]
fn sizes_that_are_no_power_of_two_are_not_served() {
    let mut scene = Scene::set();
    for size in [3, 12, 255] {
        let mut vmm = Vmm::connect(&scene.socket());
        let mut ring = vmm.ring(size);
        if vmm.frontend.set_vring_num(0, size).is_ok() {
            let _ = vmm.frontend.set_vring_addr(0, &ring.config());
            let _ = vmm.frontend.set_vring_enable(0, true);
            let _ = vmm.frontend.set_vring_kick(0, &ring.kick);
            ring.kick.write(1).unwrap();
            ring.expose();
        }
        assert!(ring.wait(Duration::from_millis(20)).is_empty());
        drop(vmm);
        scene.unharmed("a size that is no power of two");
    }
}

fn memfd(len: u64) -> File {
    let file = File::from(memfd_create(c"short", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

#[test]
fn memory_that_is_not_there() {
    let mut scene = Scene::set();
    let file = memfd(MIB);
    // Guest address, length, VMM address, offset.
    let regions: &[(&str, [u64; 4])] = &[
        ("a region larger than its file", [BASE, 2 * MIB, BASE, 0]),
        ("a region past the end of its file", [BASE, MIB, BASE, MIB]),
        ("an offset at the end of the world", [BASE, MIB, BASE, u64::MAX - 4095]),
        ("a length that wraps around", [BASE, !4095, BASE, 4096]),
        ("a region of nothing", [BASE, 0, BASE, 0]),
        ("an address that wraps around", [!4095, MIB, BASE, 0]),
        ("a VMM address that wraps around", [BASE, MIB, !4095, 0]),
        ("more addresses than a process has", [BASE, 1 << 46, BASE, 0]),
    ];
    for (what, region) in regions {
        let single = [&[0][..], region].concat();
        let table = [&[1][..], region].concat();
        for (code, body) in [(code::ADD_MEM_REG, single), (code::SET_MEM_TABLE, table)] {
            let mut wire = Wire::greeted(&scene.socket());
            wire.send(&message(code, NEED_REPLY, &words(&body)), &[file.as_raw_fd()]);
            assert_ne!(wire.answer(), Some(0), "{what}");
            drop(wire);
            scene.unharmed(what);
        }
    }
    // The same, with nothing wrong, is taken.
    let mut wire = Wire::greeted(&scene.socket());
    let body = words(&[0, BASE, MIB, BASE + VMM_OFFSET, 0]);
    wire.send(&message(code::ADD_MEM_REG, NEED_REPLY, &body), &[file.as_raw_fd()]);
    assert_eq!(wire.answer(), Some(0));
    // Another one over it is not.
    wire.send(&message(code::ADD_MEM_REG, NEED_REPLY, &body), &[file.as_raw_fd()]);
    assert_ne!(wire.answer(), Some(0));
    drop(wire);
    scene.unharmed("overlapping regions");
}

#[test]
fn a_file_cut_short_under_a_request_is_an_error() {
    // The data is in a region whose file is cut after it was shown; rings and headers stay.
    let mut scene = Scene::set();
    let memory = GuestMemory::new(BASE, 4 * MIB);
    let mut vmm = Vmm::connect_with(&scene.socket(), u64::MAX, memory);
    let file = memfd(MIB);
    let gpa = BASE + 64 * MIB;
    let info = VhostUserMemoryRegionInfo {
        guest_phys_addr: gpa,
        memory_size: MIB,
        userspace_addr: gpa + VMM_OFFSET,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    vmm.frontend.add_mem_region(&info).unwrap();
    let mut queue = vmm.queue(0, 16, Layout::Plain, 2);
    file.set_len(0).unwrap();
    let Parts { read, data, status, .. } = parts(&queue);
    queue.ring.add(&[read, Segment { addr: gpa, ..data }, status]);
    queue.ring.publish();
    queue.ring.expect(1);
    assert_eq!(queue.ring.memory.get(status.addr, 1), [IO_ERROR]);
    drop(vmm);
    scene.unharmed("a file cut short");
}

#[test]
fn memory_taken_away_under_us_costs_the_vmm_its_connection() {
    // What a worker touches itself: the rings, a request's header, its status byte.
    for what in ["rings", "header", "status"] {
        let mut scene = Scene::set();
        let mut vmm = Vmm::connect_with(&scene.socket(), u64::MAX, GuestMemory::new(BASE, 4 * MIB));
        let other = GuestMemory::new(BASE + 64 * MIB, MIB);
        vmm.frontend.add_mem_region(&other.info(0)).unwrap();
        let mut queue = vmm.queue(0, 16, Layout::Plain, 2);
        let Parts { read, data, status, .. } = parts(&queue);
        let elsewhere = |segment: Segment| Segment { addr: BASE + 64 * MIB, ..segment };
        match what {
            "header" => queue.ring.add(&[elsewhere(read), data, status]),
            "status" => queue.ring.add(&[read, data, elsewhere(status)]),
            _ => queue.ring.add(&[read, data, status]),
        };
        let kick = queue.ring.kick.try_clone().unwrap();
        if what == "rings" {
            queue.ring.memory.cut();
        } else {
            queue.ring.expose();
            other.cut();
        }
        eventually(what, || {
            kick.write(1).unwrap();
            scene.service.log().contains("it took away memory that it had shown us")
        });
        drop((queue, vmm));
        scene.unharmed(what);
    }
}

#[test]
fn nonsense_on_the_socket() {
    let mut scene = Scene::set();
    let many: Vec<File> = (0..64).map(|_| memfd(4096)).collect();
    let fds: Vec<RawFd> = many.iter().map(AsRawFd::as_raw_fd).collect();
    let mut random = Random::new(4);
    let noise = random.bytes(4096);
    let no_body = |code, flags| message(code, flags, &[]);
    let cases: Vec<(&str, Vec<u8>, &[RawFd])> = vec![
        ("noise", noise, &[]),
        ("zeroes", vec![0; 4096], &[]),
        ("an unknown request", no_body(1000, NEED_REPLY), &[]),
        ("request 0", no_body(0, NEED_REPLY), &[]),
        ("version 0", no_body(code::GET_FEATURES, 0), &[]),
        ("version 2", no_body(code::GET_FEATURES, 2), &[]),
        ("a reply", no_body(code::GET_FEATURES, VERSION | 4), &[]),
        ("a body of 4 GiB", [1, VERSION, u32::MAX].iter().flat_map(|word| word.to_le_bytes()).collect(), &[]),
        ("a body too short", message(code::SET_FEATURES, NEED_REPLY, &[1, 2, 3]), &[]),
        ("a body too long", message(code::SET_FEATURES, NEED_REPLY, &[0; 64]), &[]),
        ("a table of too many regions", message(code::SET_MEM_TABLE, NEED_REPLY, &words(&[300])), &[]),
        (
            "a table without descriptors",
            message(code::SET_MEM_TABLE, NEED_REPLY, &words(&[1, 0, 0, 0, 0])),
            &[],
        ),
        ("descriptors nobody asked for", no_body(code::GET_FEATURES, VERSION), &fds[..2]),
        ("a flood of descriptors", message(code::SET_MEM_TABLE, NEED_REPLY, &words(&[1])), &fds),
        ("a kick that is a file", message(code::SET_VRING_KICK, NEED_REPLY, &words(&[99])), &fds[..1]),
        ("two kicks", message(code::SET_VRING_KICK, NEED_REPLY, &words(&[0])), &fds[..2]),
        ("an in-flight buffer that was not offered", message(code::GET_INFLIGHT_FD, VERSION, &[0; 24]), &[]),
        ("a log that was not offered", message(code::SET_LOG_BASE, NEED_REPLY, &words(&[0, 0])), &fds[..1]),
        ("the base of no vring", message(code::GET_VRING_BASE, VERSION, &halves(&[77, 0])), &[]),
    ];
    let before = scene.service.descriptors();
    for (what, bytes, fds) in cases {
        for greeted in [false, true] {
            let socket = scene.socket();
            let mut wire = if greeted { Wire::greeted(&socket) } else { Wire::connect(&socket) };
            wire.send(&bytes, fds);
            // Nothing answers with success; some wait for the rest of a message that never comes.
            wire.hangs_up(Duration::from_millis(10));
            drop(wire);
            scene.unharmed(what);
        }
    }
    scene.service.await_free("a");
    eventually("descriptors are closed", || scene.service.descriptors() <= before);
}

#[test]
fn a_kick_that_is_no_eventfd_harms_nobody() {
    let mut scene = Scene::set();
    let (pipe, _other_end) = UnixStream::pair().unwrap();
    let file = memfd(4096);
    for fd in [file.as_raw_fd(), pipe.as_raw_fd()] {
        let mut vmm = Vmm::connect(&scene.socket());
        let queue = vmm.queue(0, 16, Layout::Plain, 2);
        // SAFETY: a descriptor of its own for the EventFd to close.
        let odd = unsafe { EventFd::from_raw_fd(libc::dup(fd)) };
        let _ = vmm.frontend.set_vring_kick(0, &odd);
        let _ = vmm.frontend.set_vring_call(0, &odd);
        drop(queue);
        let before = scene.service.cpu_ticks();
        std::thread::sleep(Duration::from_millis(300));
        let ticks = scene.service.cpu_ticks() - before;
        assert!(ticks < 10, "a worker spins on a descriptor that is always readable: {ticks} ticks of 30");
        drop(vmm);
        scene.unharmed("a kick that is no eventfd");
    }
}

#[test]
fn one_that_says_nothing_keeps_only_itself_waiting() {
    let mut scene = Scene::set();
    // Half a header, and silence.
    let wire = Wire::connect(&scene.socket());
    wire.send(&[1, 0, 0, 0, 1], &[]);
    assert_eq!(scene.witness.one(Op::Flush, &[]).0, OK);
    assert_eq!(scene.service.status().exports.len(), 2);
    drop(wire);
    scene.unharmed("half a message");
    // A storm of connections that end as they begin.
    for _ in 0..200 {
        drop(Wire::connect(&scene.socket()));
    }
    scene.unharmed("a storm of connections");
    // The service ends whoever is silent.
    let mut silent = Wire::connect(&scene.socket());
    drop(scene.service);
    assert!(silent.hangs_up(PATIENCE));
}
