//! The memory that a VMM shows: what is refused leaves nothing behind, what is taken is shared out fairly, and what is
//! taken away again costs nobody but its VMM.

mod common;

use common::eventually;
use common::memory::{GuestMemory, Region, VMM_OFFSET};
use common::model::{Op, Random};
use common::queue::{Layout, RawQueue};
use common::ring::Ring;
use common::service::{Service, Setup};
use common::trial::{run_trials, trial};
use common::vmm::{BASE, Vmm, everyday};
use common::wire::{NEED_REPLY, VERSION, Wire, code, halves, message, words};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::{self, File};
use std::os::fd::{AsRawFd, RawFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vmm_sys_util::eventfd::EventFd;

const MIB: u64 = 1 << 20;
const OK: u8 = 0;
const HUGE: u64 = 2 * MIB;
/// Name of every memfd that a test shows, to be found among the service's mappings.
const NAME: &std::ffi::CStr = c"shown-memory";
const MFD_HUGE_SHIFT: u32 = 26;

fn main() -> ExitCode {
    let trials = vec![
        trial("what_is_refused_leaves_nothing_behind", huge_pages(), |()| refused()),
        trial("rings_on_huge_pages_of_which_none_is_left", no_huge_page(), rings_without_pages),
        trial("notes_on_huge_pages_are_refused", huge_pages(), |()| notes_on_huge_pages()),
        trial("a_table_in_any_order_is_served", Ok(()), |()| any_order()),
        trial("regions_come_and_go_under_requests", Ok(()), |()| come_and_go()),
        trial("every_vmm_has_the_slots_it_was_offered", Ok(()), |()| slots_for_all()),
        trial("a_storm_of_tables_and_truncations", Ok(()), |()| storm()),
    ];
    run_trials(trials)
}

fn memfd(flags: MFdFlags, len: u64) -> Result<File, String> {
    let fd = memfd_create(NAME, MFdFlags::MFD_CLOEXEC | flags).map_err(|error| error.to_string())?;
    let file = File::from(fd);
    file.set_len(len).map_err(|error| error.to_string())?;
    Ok(file)
}

fn small(len: u64) -> File {
    memfd(MFdFlags::empty(), len).unwrap()
}

fn huge(len: u64) -> File {
    memfd(MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB, len).unwrap()
}

/// Files of huge pages can be made; none need be free.
fn huge_pages() -> Result<(), String> {
    memfd(MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB, HUGE).map(drop)
}

/// A size of huge pages of which none can be had.
fn no_huge_page() -> Result<u64, String> {
    let pools = fs::read_dir("/sys/kernel/mm/hugepages").map_err(|error| error.to_string())?;
    for pool in pools.flatten() {
        let read = |what: &str| fs::read_to_string(pool.path().join(what)).unwrap_or_default();
        let name = pool.file_name().into_string().unwrap_or_default();
        let kib = name.trim_start_matches("hugepages-").trim_end_matches("kB").parse::<u64>();
        let none = read("free_hugepages").trim() == "0" && read("nr_overcommit_hugepages").trim() == "0";
        if let (Ok(kib), true) = (kib, none) {
            return Ok(kib << 10);
        }
    }
    Err("there are free huge pages of every size".into())
}

/// Two exports to a volume: `a` for the culprit, `b` for a witness who must not notice.
struct Scene {
    service: Service,
    _vmm: Vmm,
    witness: RawQueue,
}

impl Scene {
    fn set() -> Scene {
        let setup = Setup::new().args(["--workers", "1"]).volume("root", "memory:32M");
        let service =
            setup.vhost_user("root", "a", "queues=2").vhost_user("root", "b", "").start().may_complain();
        let (vmm, witness) = everyday(&service.path("b"));
        Scene { service, _vmm: vmm, witness }
    }

    fn unharmed(&mut self, after: &str) {
        assert_eq!(self.witness.write(8, &[8; 512]), OK, "{after}");
        assert_eq!(self.witness.read(8, 1), (OK, vec![8; 512]), "{after}");
    }

    /// Waits until export `a` has no VMM, and asserts that nothing is left of the last one.
    fn nothing_left(&self, after: &str, descriptors: usize) {
        self.service.await_free("a");
        let maps = || fs::read_to_string(format!("/proc/{}/maps", self.service.pid())).unwrap();
        eventually(&format!("{after}: its memory is unmapped"), || !maps().contains("shown-memory"));
        eventually(&format!("{after}: its files are closed"), || self.service.descriptors() <= descriptors);
    }
}

/// Memory, by `ADD_MEM_REG` and `SET_MEM_TABLE`, after another region that is in order.
fn refused() {
    let mut scene = Scene::set();
    scene.service.await_free("a");
    let descriptors = scene.service.descriptors();
    let disk = scene.service.path("on-a-disk");
    fs::write(&disk, vec![0; MIB as usize]).unwrap();
    let file = |of: &File| of.try_clone().unwrap();
    let (page, large) = (small(16 * MIB), huge(16 * MIB));
    let sealed = memfd(MFdFlags::MFD_ALLOW_SEALING, MIB).unwrap();
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    fcntl(&sealed, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
    let read_only = File::open(format!("/proc/self/fd/{}", page.as_raw_fd())).unwrap();
    // What, guest address, length, VMM address, offset, file.
    let cases: &[(&str, [u64; 4], File)] = &[
        ("part of a huge page", [BASE, MIB, BASE, 0], file(&large)),
        ("one and a half huge pages", [BASE, 3 * MIB, BASE, 0], file(&large)),
        ("an odd part of huge pages", [BASE, HUGE + 4096, BASE, 0], file(&large)),
        ("a huge page from its middle on", [BASE, HUGE, BASE, MIB], file(&large)),
        ("more huge pages than the file has", [BASE, 18 * MIB, BASE, 0], file(&large)),
        ("an odd guest address", [BASE + 1, MIB, BASE, 0], file(&page)),
        ("a guest address within a page", [BASE + 512, MIB, BASE, 0], file(&page)),
        ("an odd guest address of huge pages", [BASE + 1, HUGE, BASE, 0], file(&large)),
        ("an odd VMM address", [BASE, MIB, BASE + 8, 0], file(&page)),
        ("an odd offset", [BASE, MIB, BASE, 8], file(&page)),
        ("over the other region", [0x1000, MIB, BASE, 0], file(&page)),
        ("inside the other region", [0x2000, 4096, BASE, 0], file(&page)),
        ("larger than its file", [BASE, 32 * MIB, BASE, 0], file(&page)),
        ("a file that must not be written", [BASE, MIB, BASE, 0], sealed),
        ("a descriptor that must not be written", [BASE, MIB, BASE, 0], read_only),
        ("a file of a process", [BASE, 4096, BASE, 0], File::open("/proc/self/status").unwrap()),
        (
            "a device",
            [BASE, 4096, BASE, 0],
            File::options().read(true).write(true).open("/dev/zero").unwrap(),
        ),
    ];
    let other = [0, 64 << 10, VMM_OFFSET, 0];
    for (what, region, file) in cases {
        for table in [false, true] {
            let mut wire = Wire::greeted(&scene.service.path("a"));
            let fds = [page.as_raw_fd(), file.as_raw_fd()];
            let ask = |wire: &mut Wire, code: u32, body: &[u64], fds: &[RawFd]| {
                wire.send(&message(code, NEED_REPLY, &words(body)), fds);
                wire.answer()
            };
            let answer = if table {
                ask(&mut wire, code::SET_MEM_TABLE, &[&[2], &other[..], region].concat(), &fds)
            } else {
                let taken = ask(&mut wire, code::ADD_MEM_REG, &[&[0], &other[..]].concat(), &fds[..1]);
                assert_eq!(taken, Some(0), "the other region");
                ask(&mut wire, code::ADD_MEM_REG, &[&[0], &region[..]].concat(), &fds[1..])
            };
            assert_ne!(answer, Some(0), "{what} is taken");
            drop(wire);
            scene.nothing_left(what, descriptors);
        }
        scene.unharmed(what);
    }
    // What the files would be good for, were there nothing wrong.
    let mut wire = Wire::greeted(&scene.service.path("a"));
    for (region, file) in [([0, BASE, MIB, BASE, 0], &page), ([0, 1 << 30, HUGE, 1 << 30, HUGE], &large)] {
        wire.send(&message(code::ADD_MEM_REG, NEED_REPLY, &words(&region)), &[file.as_raw_fd()]);
        assert_eq!(wire.answer(), Some(0));
    }
    // Taken away, whole; and what was never there, or is no more.
    let region = [0, BASE, MIB, BASE, 0];
    wire.send(&message(code::REM_MEM_REG, NEED_REPLY, &words(&region)), &[]);
    assert_eq!(wire.answer(), Some(0));
    wire.send(&message(code::REM_MEM_REG, NEED_REPLY, &words(&region)), &[]);
    assert_ne!(wire.answer(), Some(0));
    drop(wire);
    scene.nothing_left("a region that is taken away twice", descriptors);
    // Of a file on a disk, if the directory is on one, the log says what it is.
    let kind = fs::read_to_string("/proc/mounts").unwrap();
    let tmp_is_memory = kind.lines().any(|line| line.contains(" /tmp tmpfs"));
    let mut wire = Wire::greeted(&scene.service.path("a"));
    let on_disk = File::options().read(true).write(true).open(&disk).unwrap();
    let region = [0, BASE, MIB, BASE, 0];
    wire.send(&message(code::ADD_MEM_REG, NEED_REPLY, &words(&region)), &[on_disk.as_raw_fd()]);
    assert_eq!(wire.answer() == Some(0), tmp_is_memory);
    drop(wire);
    scene.nothing_left("a file on a disk", descriptors);
    scene.unharmed("refusals");
    fs::remove_file(&disk).unwrap();
}

/// Whole huge pages, none of which can be had: the first touch of a ring is a SIGBUS. Its VMM is hung up on.
fn rings_without_pages(size: u64) {
    let mut scene = Scene::set();
    scene.service.await_free("a");
    let descriptors = scene.service.descriptors();
    let flags = MFdFlags::from_bits_retain(size.trailing_zeros() << MFD_HUGE_SHIFT);
    let file = memfd(MFdFlags::MFD_HUGETLB | flags, size).unwrap();
    let socket = scene.service.path("a");
    let mut wire = Wire::greeted(&socket);
    wire.send(
        &message(code::ADD_MEM_REG, NEED_REPLY, &words(&[0, size, size, size, 0])),
        &[file.as_raw_fd()],
    );
    assert_eq!(wire.answer(), Some(0));
    let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
    wire.send(&message(code::SET_VRING_NUM, VERSION, &halves(&[0, 64])), &[]);
    let address = [halves(&[0, 0]), words(&[size, size + 8192, size + 4096, 0])].concat();
    wire.send(&message(code::SET_VRING_ADDR, VERSION, &address), &[]);
    wire.send(&message(code::SET_VRING_CALL, VERSION, &words(&[0])), &[call.as_raw_fd()]);
    wire.send(&message(code::SET_VRING_KICK, VERSION, &words(&[0])), &[kick.as_raw_fd()]);
    wire.send(&message(code::SET_VRING_ENABLE, VERSION, &halves(&[0, 1])), &[]);
    assert!(wire.hangs_up(common::PATIENCE));
    eventually("the log says why", || scene.service.log().contains("took away memory that it had shown us"));
    scene.nothing_left("huge pages that cannot be had", descriptors);
    scene.unharmed("huge pages that cannot be had");
}

/// In-flight notes of the VMM's own making, on huge pages that it may punch away, sealed as ours are.
fn notes_on_huge_pages() {
    let mut scene = Scene::set();
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    for flags in [MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB, MFdFlags::empty()] {
        let file = memfd(flags | MFdFlags::MFD_ALLOW_SEALING, HUGE).unwrap();
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW)).unwrap();
        let mut wire = Wire::greeted_with(&scene.service.path("a"), 1 << 12);
        let body = [words(&[HUGE, 0]), halves(&[64 << 16 | 2, 0])].concat();
        wire.send(&message(code::SET_INFLIGHT_FD, NEED_REPLY, &body), &[file.as_raw_fd()]);
        let taken = wire.answer() == Some(0);
        assert_eq!(taken, !flags.contains(MFdFlags::MFD_HUGETLB));
        drop(wire);
        scene.unharmed("notes of a VMM's own making");
    }
    assert!(scene.service.log().contains("some of it may be taken away"), "{}", scene.service.log());
}

/// Regions in descending order, each with rings and data in it.
fn any_order() {
    let scene = Scene::set();
    let regions = [(96, 32), (64, 16), (1, 0)].map(|(gpa, offset)| Region {
        gpa: gpa * MIB,
        len: 8 * MIB,
        offset: offset * MIB,
    });
    let memory = GuestMemory::with_regions(&regions);
    let mut vmm = Vmm::shake_hands(&scene.service.path("a"), u64::MAX, memory);
    vmm.frontend.set_mem_table(&vmm.memory.infos()).unwrap();
    for region in regions {
        let ring = Ring::new(&vmm.memory, region.gpa, 64, true);
        let slots = region.gpa + Ring::bytes(64).next_multiple_of(4096);
        let mut queue = RawQueue::new(ring, Layout::Plain, slots, 4);
        vmm.start(0, &queue.ring);
        assert_eq!(queue.write(region.gpa >> 12, &[7; 4096]), OK);
        assert_eq!(queue.read(region.gpa >> 12, 8), (OK, vec![7; 4096]));
        vmm.frontend.get_vring_base(0).unwrap();
    }
}

/// Regions are added and removed while requests run: each mapping ends with its region.
fn come_and_go() {
    let scene = Scene::set();
    let mut vmm = Vmm::connect(&scene.service.path("a"));
    let mut queue = vmm.queue(0, 64, Layout::Plain, 4);
    let before = scene.service.mappings();
    let file = small(64 * MIB);
    let info = |index: u64| VhostUserMemoryRegionInfo {
        guest_phys_addr: (1 << 32) + index * MIB,
        memory_size: MIB,
        userspace_addr: (1 << 32) + index * MIB + VMM_OFFSET,
        mmap_offset: index * MIB,
        mmap_handle: file.as_raw_fd(),
    };
    for round in 0..20 {
        for index in 0..16 {
            vmm.frontend.add_mem_region(&info(index)).unwrap();
            assert_eq!(queue.write(round, &[round as u8; 512]), OK);
        }
        assert!(scene.service.mappings() >= before + 8, "regions may be joined, not lost");
        for index in 0..16 {
            vmm.frontend.remove_mem_region(&info(15 - index)).unwrap();
            assert_eq!(queue.read(round, 1), (OK, vec![round as u8; 512]));
        }
        eventually("what is gone is unmapped", || {
            let maps = fs::read_to_string(format!("/proc/{}/maps", scene.service.pid())).unwrap();
            !maps.contains("shown-memory")
        });
    }
}

/// As many VMMs as used to be too many, each with all that it was offered, and then with another table.
fn slots_for_all() {
    const VMMS: usize = 9;
    let mut setup = Setup::new().args(["--workers", "1"]).volume("root", "memory:32M");
    for index in 0..VMMS {
        setup = setup.vhost_user("root", &format!("v{index}"), "");
    }
    let service = setup.start();
    let file = small(MIB);
    let mut vmms = Vec::new();
    for index in 0..VMMS {
        let mut vmm = Vmm::connect(&service.path(&format!("v{index}")));
        let slots = vmm.frontend.get_max_mem_slots().unwrap();
        assert!((32..=509).contains(&slots), "{slots}");
        for slot in 1..slots {
            let gpa = (1 << 32) + slot * MIB;
            let info = VhostUserMemoryRegionInfo {
                guest_phys_addr: gpa,
                memory_size: 4096,
                userspace_addr: gpa + VMM_OFFSET,
                mmap_offset: 0,
                mmap_handle: file.as_raw_fd(),
            };
            vmm.frontend.add_mem_region(&info).unwrap();
        }
        vmms.push(vmm);
    }
    for vmm in &mut vmms {
        let mut queue = vmm.queue(0, 64, Layout::Plain, 4);
        assert_eq!(queue.one(Op::Flush, &[]).0, OK);
        vmm.frontend.set_mem_table(&vmm.memory.infos()).unwrap();
        assert_eq!(queue.one(Op::Flush, &[]).0, OK);
    }
    // One more than offered is refused, and is nobody else's loss.
    drop(vmms.remove(0));
    let service = service.may_complain();
    let mut wire = Wire::greeted(&service.path("v0"));
    wire.send(&message(code::GET_MAX_MEM_SLOTS, VERSION, &[]), &[]);
    let slots = wire.answer().unwrap();
    for slot in 0..=slots {
        let body = words(&[0, slot * MIB, 4096, VMM_OFFSET + slot * MIB, 0]);
        wire.send(&message(code::ADD_MEM_REG, NEED_REPLY, &body), &[file.as_raw_fd()]);
        assert_eq!(wire.answer() == Some(0), slot < slots, "{slot}");
    }
    let mut queue = vmms[0].queue(0, 64, Layout::Plain, 4);
    assert_eq!(queue.one(Op::Flush, &[]).0, OK);
}

/// Tables and messages at random, of which some are in order, memory that is truncated and punched meanwhile, VMMs that
/// leave in the middle; and a neighbour who notices nothing. For as long as `RINGBLK_STORM_SECONDS` says.
fn storm() {
    let seconds = std::env::var("RINGBLK_STORM_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(3);
    let seed = std::env::var("RINGBLK_STORM_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let mut scene = Scene::set();
    scene.service.await_free("a");
    let descriptors = scene.service.descriptors();
    let (start, mut sessions) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_secs(seconds) {
        let mut random = Random::new(seed + sessions);
        one_of_a_storm(&scene.service, &mut random);
        scene.unharmed(&format!("session {sessions} of seed {seed}"));
        sessions += 1;
    }
    scene.nothing_left("a storm", descriptors);
    let lines = scene.service.log().lines().count() as u64;
    assert!(lines < 200 + seconds * 10, "{lines} lines of log from {sessions} sessions");
    eprintln!("{sessions} sessions in {seconds} s");
}

fn one_of_a_storm(service: &Service, random: &mut Random) {
    let files =
        [small(4 * MIB), small(64 << 10), huge_pages().map_or_else(|_| small(MIB), |()| huge(4 * MIB))];
    let pick = |random: &mut Random, from: &[u64]| from[random.below(from.len() as u64) as usize];
    let wire = Wire::greeted_with(&service.path("a"), 1 << 12);
    let events: Vec<EventFd> = (0..3).map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap()).collect();
    let region = |random: &mut Random, file: usize| {
        let at =
            BASE + pick(random, &[0, 0, 4, 8, 64, 1 << 40]) * MIB + pick(random, &[0, 0, 0, 4096, 1, 16]);
        let whole = [4 * MIB, 64 << 10, 4 * MIB][file];
        let len = pick(random, &[whole, whole, whole / 2, 4096, whole + 4096, 0, u64::MAX]);
        [at, len, at.wrapping_add(VMM_OFFSET), pick(random, &[0, 0, 0, 4096, 2 * MIB, 3])]
    };
    for _ in 0..random.below(40) {
        let index = pick(random, &[0, 0, 0, 1, 1, 2, 255]);
        let flags = VERSION;
        let event = events[random.below(3) as usize].as_raw_fd();
        match random.below(14) {
            0 | 1 => {
                let count = 1 + random.below(4);
                let chosen: Vec<usize> = (0..count).map(|_| random.below(3) as usize).collect();
                let regions: Vec<u64> = chosen.iter().flat_map(|file| region(random, *file)).collect();
                let fds: Vec<RawFd> = chosen.iter().map(|file| files[*file].as_raw_fd()).collect();
                let body = words(&[&[count], &regions[..]].concat());
                wire.send(&message(code::SET_MEM_TABLE, flags, &body), &fds);
            }
            2 => {
                // One that is in order, so that the rest gets somewhere.
                let body = words(&[1, BASE, 4 * MIB, BASE + VMM_OFFSET, 0]);
                wire.send(&message(code::SET_MEM_TABLE, flags, &body), &[files[0].as_raw_fd()]);
            }
            3 => {
                let file = random.below(3) as usize;
                let body = words(&[&[0], &region(random, file)[..]].concat());
                wire.send(&message(code::ADD_MEM_REG, flags, &body), &[files[file].as_raw_fd()]);
            }
            4 => {
                let body = words(&[&[0], &region(random, 0)[..]].concat());
                wire.send(&message(code::REM_MEM_REG, flags, &body), &[]);
            }
            5 => {
                let num = pick(random, &[64, 64, 256, 128, 1, 2, 0, 100, 512, 1 << 16]);
                wire.send(&message(code::SET_VRING_NUM, flags, &halves(&[index as u32, num as u32])), &[]);
            }
            6 | 7 => {
                let user = BASE + VMM_OFFSET + pick(random, &[0, 0, 16, 1, 4 * MIB - 4096, 64 * MIB]);
                let body = [halves(&[index as u32, 0]), words(&[user, user + 8192, user + 4096, 0])].concat();
                wire.send(&message(code::SET_VRING_ADDR, flags, &body), &[]);
            }
            8 => {
                wire.send(&message(code::SET_VRING_KICK, flags, &words(&[index])), &[event]);
            }
            9 => wire.send(&message(code::SET_VRING_CALL, flags, &words(&[index])), &[event]),
            10 => {
                wire.send(&message(code::SET_VRING_ENABLE, flags, &halves(&[index as u32, 1])), &[]);
            }
            11 => {
                let base = pick(random, &[0, 0, 5, 65535]);
                let body = halves(&[index as u32, base as u32]);
                wire.send(&message(code::SET_VRING_BASE, flags, &body), &[]);
            }
            12 => {
                wire.send(&message(code::GET_VRING_BASE, flags, &halves(&[index as u32, 0])), &[]);
            }
            _ => {
                let file = &files[random.below(3) as usize];
                match random.below(3) {
                    0 => file.set_len(0).unwrap_or(()),
                    1 => file.set_len(4 * MIB).unwrap_or(()),
                    _ => {
                        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                        let mode = nix::fcntl::FallocateFlags::from_bits_truncate(mode);
                        let _ = nix::fcntl::fallocate(file, mode, 0, MIB as i64);
                    }
                }
            }
        }
        for event in &events {
            event.write(1).unwrap();
        }
    }
}
