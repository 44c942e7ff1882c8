//! What a VMM says of its vrings and of the configuration space: nothing is acknowledged that is not done, nothing that
//! is refused changes anything, and no repetition fills the log.

mod common;

use common::memory::{GuestMemory, VMM_OFFSET};
use common::model::{Op, Queue};
use common::queue::Layout;
use common::service::{Service, Setup};
use common::vmm::{BASE, Vmm, everyday};
use common::wire::{NEED_REPLY, VERSION, Wire, code, halves, message, words};
use common::{PATIENCE, eventually};
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vmm_sys_util::eventfd::EventFd;

const MIB: u64 = 1 << 20;
const OK: u8 = 0;

/// Doors `a` and `b` to a volume in memory, on one worker; two queues of 256.
fn service() -> Service {
    let setup = Setup::new().args(["--workers", "1"]).volume("root", "memory:32M");
    let options = "queues=2,queue-size=256";
    setup.vhost_user("root", "a", options).vhost_user("root", "b", options).start().may_complain()
}

/// Its log says why each VMM was dropped, up to this many at once.
const AT_ONCE: usize = 12;

#[test]
fn what_cannot_be_is_refused() {
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let (pipe, _end) = UnixStream::pair().unwrap();
    let null = File::open("/dev/null").unwrap();
    let event = &[event.as_raw_fd()][..];
    let (pipe, null) = (&[pipe.as_raw_fd()][..], &[null.as_raw_fd()][..]);
    let at = BASE + VMM_OFFSET;
    let address = |index: u32, flags: u32, desc: u64, used: u64, avail: u64| {
        [halves(&[index, flags]), words(&[desc, used, avail, 0])].concat()
    };
    let good = |index, flags| address(index, flags, at, at + 4096, at + 8192);
    let config = |offset: u32, size: u32, flags: u32, bytes: usize| {
        [halves(&[offset, size, flags]), vec![0; bytes]].concat()
    };
    type Case<'a> = (&'a str, u32, Vec<u8>, &'a [RawFd]);
    let cases: Vec<Case<'_>> = vec![
        ("SET_VRING_NUM: a size of 0 is no power of two", code::SET_VRING_NUM, halves(&[0, 0]), &[]),
        ("a size of 100 is", code::SET_VRING_NUM, halves(&[0, 100]), &[]),
        ("a size of 255 is", code::SET_VRING_NUM, halves(&[0, 255]), &[]),
        (
            "a size of 512 is more than the 256 of the export: give it queue-size=512",
            code::SET_VRING_NUM,
            halves(&[0, 512]),
            &[],
        ),
        ("a size of 65536 is", code::SET_VRING_NUM, halves(&[0, 1 << 16]), &[]),
        ("a size of 65792 is", code::SET_VRING_NUM, halves(&[0, (1 << 16) + 256]), &[]),
        ("a size of 2147483648 is", code::SET_VRING_NUM, halves(&[0, 1 << 31]), &[]),
        ("SET_VRING_NUM: vring 2, of 2", code::SET_VRING_NUM, halves(&[2, 64]), &[]),
        ("SET_VRING_NUM: vring 256, of 2", code::SET_VRING_NUM, halves(&[256, 64]), &[]),
        ("SET_VRING_BASE: index 65536 has", code::SET_VRING_BASE, halves(&[0, 1 << 16]), &[]),
        ("SET_VRING_BASE: vring 2, of 2", code::SET_VRING_BASE, halves(&[2, 0]), &[]),
        ("SET_VRING_ENABLE: 2 is neither", code::SET_VRING_ENABLE, halves(&[0, 2]), &[]),
        ("SET_VRING_ENABLE: vring 4294967295", code::SET_VRING_ENABLE, halves(&[u32::MAX, 1]), &[]),
        ("SET_VRING_ADDR: vring 2, of 2", code::SET_VRING_ADDR, good(2, 0), &[]),
        ("flags 0x1 were not offered", code::SET_VRING_ADDR, good(0, 1), &[]),
        ("flags 0x2 were not offered", code::SET_VRING_ADDR, good(0, 2), &[]),
        (
            "its descriptor table at 0x10 is in none",
            code::SET_VRING_ADDR,
            address(0, 0, 16, at + 4096, at + 8192),
            &[],
        ),
        (
            "its used ring at 0x7a0000500000 is in none",
            code::SET_VRING_ADDR,
            address(0, 0, at, at + 4 * MIB, at + 8192),
            &[],
        ),
        (
            "its avail ring at guest address 0x102001 is no",
            code::SET_VRING_ADDR,
            address(0, 0, at, at + 4096, at + 8193),
            &[],
        ),
        (
            "its descriptor table at guest address 0x100008 is no",
            code::SET_VRING_ADDR,
            address(0, 0, at + 8, at + 4096, at + 8192),
            &[],
        ),
        (
            "its used ring at guest address 0x101002 is no",
            code::SET_VRING_ADDR,
            address(0, 0, at, at + 4098, at + 8192),
            &[],
        ),
        (
            "SET_VRING_KICK: without a descriptor a vring has to be polled",
            code::SET_VRING_KICK,
            words(&[0x100]),
            &[],
        ),
        ("SET_VRING_KICK: without its descriptor", code::SET_VRING_KICK, words(&[0]), &[]),
        ("SET_VRING_CALL: without its descriptor", code::SET_VRING_CALL, words(&[0]), &[]),
        ("SET_VRING_KICK: with a descriptor, and it says", code::SET_VRING_KICK, words(&[0x100]), event),
        ("SET_VRING_CALL: with a descriptor, and it says", code::SET_VRING_CALL, words(&[0x101]), event),
        ("SET_VRING_KICK: 0x200 has bits", code::SET_VRING_KICK, words(&[0x200]), event),
        ("SET_VRING_ERR: 0x100000000 has bits", code::SET_VRING_ERR, words(&[1 << 32]), event),
        ("SET_VRING_KICK: vring 2, of 2", code::SET_VRING_KICK, words(&[2]), event),
        ("SET_VRING_ERR: vring 255, of 2", code::SET_VRING_ERR, words(&[0x1ff]), &[]),
        ("SET_VRING_KICK: socket", code::SET_VRING_KICK, words(&[0]), pipe),
        ("SET_VRING_CALL: /dev/null is not an eventfd", code::SET_VRING_CALL, words(&[0]), null),
        ("SET_VRING_ERR: /dev/null is not an eventfd", code::SET_VRING_ERR, words(&[0]), null),
        ("features 0x1 were not offered", code::SET_FEATURES, words(&[1 << 30 | 1]), &[]),
        ("SET_CONFIG: 8 bytes of configuration, and 4 come", code::SET_CONFIG, config(0, 8, 1, 4), &[]),
        ("SET_CONFIG: 1 bytes at 4096", code::SET_CONFIG, config(4096, 1, 1, 1), &[]),
        ("SET_CONFIG: flags 0x4 mean nothing", code::SET_CONFIG, config(32, 1, 4, 1), &[]),
        ("SET_CONFIG: 8 bytes at 4294967295", code::SET_CONFIG, config(u32::MAX, 8, 1, 8), &[]),
    ];
    let memory = GuestMemory::new(BASE, 4 * MIB);
    for some in cases.chunks(AT_ONCE) {
        let service = service();
        let (_vmm, mut witness) = everyday(&service.path("b"));
        for (why, code, body, fds) in some {
            let mut wire = Wire::greeted(&service.path("a"));
            let table = words(&[1, BASE, 4 * MIB, BASE + VMM_OFFSET, 0]);
            wire.send(&message(code::SET_MEM_TABLE, NEED_REPLY, &table), &[memory.fd()]);
            assert_eq!(wire.answer(), Some(0));
            wire.send(&message(*code, NEED_REPLY, body), fds);
            assert_eq!(wire.answer(), Some(1), "{why}");
            assert!(wire.hangs_up(PATIENCE), "{why}");
            eventually(why, || service.log().contains(why));
            assert_eq!(witness.one(Op::Flush, &[]).0, OK, "{why}");
        }
    }
    // Questions are answered or the VMM is dropped.
    let service = service();
    let questions: [(&str, u32, Vec<u8>); 5] = [
        ("GET_VRING_BASE: vring 2, of 2", code::GET_VRING_BASE, halves(&[2, 0])),
        ("GET_CONFIG: 9 bytes of configuration, and 8 come", code::GET_CONFIG, config(0, 9, 0, 8)),
        ("GET_CONFIG: 8 bytes at 4090", code::GET_CONFIG, config(4090, 8, 0, 8)),
        ("GET_CONFIG: flags 0x80000000", code::GET_CONFIG, config(0, 8, 1 << 31, 8)),
        ("GET_MAX_MEM_SLOTS without its protocol feature", code::GET_MAX_MEM_SLOTS, vec![]),
    ];
    for (why, code, body) in questions {
        let mut wire = match code {
            code::GET_MAX_MEM_SLOTS => Wire::connect(&service.path("a")),
            _ => Wire::greeted(&service.path("a")),
        };
        wire.send(&message(code, VERSION, &body), &[]);
        assert_eq!(wire.answer(), None, "{why}");
        eventually(why, || service.log().contains(why));
    }
    // And addresses before there is memory.
    let mut wire = Wire::greeted(&service.path("a"));
    wire.send(&message(code::SET_VRING_ADDR, NEED_REPLY, &good(0, 0)), &[]);
    assert_eq!(wire.answer(), Some(1));
    eventually("why", || service.log().contains("there is no memory yet"));
}

#[test]
fn what_may_be_is_done() {
    let service = service();
    let mut vmm = Vmm::connect(&service.path("a"));
    // The base of a vring that never ran, and one that was set.
    assert_eq!(vmm.frontend.get_vring_base(1).unwrap(), 0);
    vmm.frontend.set_vring_base(1, 65535).unwrap();
    assert_eq!(vmm.frontend.get_vring_base(1).unwrap(), 65535);
    // Every size there is, with a call descriptor and without.
    for size in [2, 4, 64, 256] {
        let mut queue = vmm.queue(0, size, Layout::Joined, 1);
        assert_eq!(queue.write(1, &[size as u8; 512]), OK);
        assert_eq!(queue.read(1, 1), (OK, vec![size as u8; 512]));
        vmm.frontend.get_vring_base(0).unwrap();
    }
}

#[test]
fn the_configuration_space_from_any_place_on() {
    // With a cache, so that there is something to write.
    let setup = Setup::new();
    let image = setup.image(32 * MIB);
    let service =
        setup.volume("root", &format!("file:{}", image.display())).vhost_user("root", "a", "").start();
    let service = service.may_complain();
    let mut vmm = Vmm::connect(&service.path("a"));
    let whole = vmm.config(0, 256);
    assert_eq!(whole[..8], (32 * MIB / 512).to_le_bytes());
    for (offset, len) in
        [(0, 60), (0, 256), (8, 40), (32, 1), (59, 1), (60, 8), (200, 100), (255, 1), (0, 1000)]
    {
        let mut wanted: Vec<u8> = whole.iter().copied().skip(offset).collect();
        wanted.resize(len, 0);
        // From 0x100 on as well: Cloud Hypervisor up to 50 asks there.
        assert_eq!(vmm.config(offset as u32, len), wanted, "{len} at {offset}");
        if offset < 200 {
            assert_eq!(vmm.config(offset as u32 + 0x100, len), wanted, "{len} at {offset} from 0x100 on");
        }
    }
    for offset in [0x200, 0x800, 4088] {
        assert_eq!(vmm.config(offset, 8), [0; 8], "where no field is");
    }
    // The same place is written to.
    for (offset, on) in [(32, 0), (0x120, 1), (0x120, 0), (32, 1)] {
        vmm.set_config(offset, &[on]);
        assert_eq!((vmm.config(32, 1), vmm.config(0x120, 1)), (vec![on], vec![on]));
    }
    // What is not to be written is not.
    for (offset, bytes) in
        [(0, vec![0xff; 60]), (0x100, vec![0xff; 8]), (32, vec![2]), (33, vec![1]), (3000, vec![1])]
    {
        vmm.set_config(offset, &bytes);
        assert_eq!(vmm.config(0, 256), whole);
    }
}

#[test]
fn an_owner_that_is_reset_has_no_vring_that_works() {
    let service = service();
    let mut vmm = Vmm::connect(&service.path("a"));
    let mut queue = vmm.queue(0, 64, Layout::Plain, 4);
    assert_eq!(queue.one(Op::Flush, &[]).0, OK);
    vmm.frontend.reset_owner().unwrap();
    queue.submit(0, Op::Flush);
    queue.ring.expose();
    queue.ring.kick.write(1).unwrap();
    assert!(queue.ring.wait(Duration::from_millis(50)).is_empty(), "it was disabled");
    // It begins anew, and goes on.
    vmm.frontend.set_owner().unwrap();
    vmm.frontend.set_features(vmm.features).unwrap();
    vmm.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(queue.ring.expect(1).len(), 1);
}

/// Lines that the log gets while `act` is repeated for a second, and more often than a burst of lines is long.
fn lines(service: &Service, mut act: impl FnMut()) -> usize {
    let before = service.log().lines().count();
    let (start, mut count) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_secs(1) || count < 30 {
        act();
        count += 1;
    }
    // Of what the service has said so far all is there by the time that it answers something else.
    service.status();
    std::thread::sleep(Duration::from_millis(50));
    service.log().lines().count() - before
}

#[test]
fn no_message_fills_the_log() {
    let service = service();
    let mut vmm = Vmm::connect(&service.path("a"));
    let ring = vmm.ring(64);
    vmm.start(0, &ring);
    let flags = VhostUserConfigFlags::WRITABLE;
    let most = 20;
    // What is acknowledged and of no use: a read-only field, a value that means nothing.
    for (offset, bytes) in [(0, &[0xff; 60][..]), (32, &[7]), (0x100, &[1; 8])] {
        let told = lines(&service, || vmm.frontend.set_config(offset, flags, bytes).unwrap());
        assert!(told <= most, "{told} lines from SET_CONFIG at {offset}");
    }
    // A vring that cannot start, because its rings reach beyond memory, again and again.
    let end = BASE + 8 * MIB - 4096;
    let mut far = ring.config();
    far.desc_table_addr = end + VMM_OFFSET + 4096 - 16;
    let told = lines(&service, || {
        vmm.frontend.set_vring_addr(0, &far).unwrap();
        vmm.frontend.set_vring_addr(0, &ring.config()).unwrap();
    });
    assert!(told <= most, "{told} lines from SET_VRING_ADDR");
    vmm.frontend.set_vring_addr(0, &far).unwrap();
    let told = lines(&service, || drop(vmm.frontend.set_mem_table(&vmm.memory.infos()).unwrap()));
    assert!(told <= most, "{told} lines from SET_MEM_TABLE");
    let told = lines(&service, || vmm.frontend.set_vring_kick(0, &ring.kick).unwrap());
    assert!(told <= most, "{told} lines from SET_VRING_KICK");
    drop(vmm);
    for nonsense in [vec![0xff; 12], message(code::SET_VRING_NUM, VERSION, &halves(&[0, 3]))] {
        let told = lines(&service, || {
            let mut wire = Wire::connect(&service.path("a"));
            wire.send(&nonsense, &[]);
            wire.hangs_up(PATIENCE);
        });
        // Of two kinds: one connects, one is dropped.
        assert!(told <= 2 * most, "{told} lines from VMMs that talk nonsense");
    }
    // The other export's lines are not left out for it.
    let (vmm, _queue) = everyday(&service.path("b"));
    eventually("the witness is told of", || {
        service.log().contains(&format!("{}: a VMM connects", service.path("b").display()))
    });
    drop(vmm);
}
