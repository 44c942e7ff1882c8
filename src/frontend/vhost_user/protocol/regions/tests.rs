use super::super::super::budget::{MOST_SLOTS, MemoryBudget};
use super::*;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use vhost::vhost_user::message::VhostUserMemoryRegion as Entry;

const MIB: u64 = 1 << 20;
const AT: u64 = 0x7f00_0000_0000;

fn memfd(bytes: u64) -> OwnedFd {
    memfd_of(MFdFlags::empty(), bytes)
}

fn memfd_of(flags: MFdFlags, bytes: u64) -> OwnedFd {
    let file = File::from(memfd_create(c"memory", MFdFlags::MFD_CLOEXEC | flags).unwrap());
    file.set_len(bytes).unwrap();
    file.into()
}

fn none() -> Regions {
    Regions::none(MemoryBudget::of_process(1).share())
}

fn message(request: FrontendReq, regions: &[Entry], descriptors: Vec<OwnedFd>) -> Message {
    let count = if request == FrontendReq::SET_MEM_TABLE { regions.len() as u64 } else { 0 };
    let mut body = count.to_ne_bytes().to_vec();
    regions.iter().for_each(|region| body.extend_from_slice(region.as_slice()));
    Message { request, need_reply: false, body, descriptors }
}

fn set(regions: &Regions, table: &[Entry], files: Vec<OwnedFd>) -> Result<Change, String> {
    regions.after(&mut message(FrontendReq::SET_MEM_TABLE, table, files)).map(Option::unwrap)
}

fn add(regions: &Regions, region: Entry, file: OwnedFd) -> Result<Change, String> {
    regions.after(&mut message(FrontendReq::ADD_MEM_REG, &[region], vec![file])).map(Option::unwrap)
}

fn remove(regions: &Regions, region: Entry) -> Result<Change, String> {
    regions.after(&mut message(FrontendReq::REM_MEM_REG, &[region], vec![])).map(Option::unwrap)
}

fn held(regions: &Regions) -> Vec<(u64, u64)> {
    regions.held.iter().map(|region| (region.guest, region.bytes)).collect()
}

#[test]
fn what_wraps_or_is_empty_is_refused() {
    let none = none();
    let cases = [
        ("nothing in it", Entry::new(MIB, 0, AT, 0)),
        ("guest addresses wrap", Entry::new(!4095, MIB, AT, 0)),
        ("VMM addresses wrap", Entry::new(MIB, MIB, !4095, 0)),
        ("file addresses wrap", Entry::new(MIB, MIB, AT, !4095)),
        ("guest addresses wrap", Entry::new(MIB, !4095, AT, 0)),
        ("in a file of 1048576", Entry::new(MIB, MIB + 4096, AT, 0)),
        ("in a file of 1048576", Entry::new(MIB, MIB, AT, 4096)),
    ];
    for (why, region) in cases {
        let error = add(&none, region, memfd(MIB)).unwrap_err();
        assert!(error.contains(why), "{error}");
        assert!(set(&none, &[region], vec![memfd(MIB)]).unwrap_err().contains(why));
        // What is taken away comes without a file, and must not wrap either.
        let error = remove(&none, region).unwrap_err();
        assert_eq!(error.contains("none such"), why.contains("in a file"), "{why}");
    }
    add(&none, Entry::new(MIB, MIB, AT, 0), memfd(MIB)).unwrap();
}

#[test]
fn what_cannot_be_mapped_and_unmapped_whole_is_refused() {
    let none = none();
    let small = || memfd(4 * MIB);
    let huge = || memfd_of(MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB, 8 * MIB);
    type Make<'a> = &'a dyn Fn() -> OwnedFd;
    let cases: [(&str, Entry, Make<'_>); 8] = [
        ("guest address of 0x100001", Entry::new(MIB + 1, MIB, AT, 0), &small),
        ("guest address of 0x100800", Entry::new(MIB + 2048, MIB, AT, 0), &small),
        ("VMM address", Entry::new(MIB, MIB, AT + 16, 0), &small),
        ("offset in its file of 0x10", Entry::new(MIB, MIB, AT, 16), &small),
        ("length of 0x100000 is no multiple of a page, 2097152", Entry::new(MIB, MIB, AT, 0), &huge),
        ("length of 0x300000", Entry::new(MIB, 3 * MIB, AT, 0), &huge),
        ("offset in its file of 0x100000", Entry::new(MIB, 2 * MIB, AT, MIB), &huge),
        ("offset in its file of 0x1000", Entry::new(MIB, 2 * MIB, AT, 4096), &huge),
    ];
    for (why, region, file) in cases {
        for error in
            [add(&none, region, file()).unwrap_err(), set(&none, &[region], vec![file()]).unwrap_err()]
        {
            assert!(error.contains(why), "{error}");
        }
    }
    // The guest's addresses need not be those of huge pages.
    add(&none, Entry::new(4096, 2 * MIB, AT + 4096, 2 * MIB), huge()).unwrap();
    add(&none, Entry::new(0, 4096, AT, 4096), small()).unwrap();
    // Nor need a length be any page's, where pages are small.
    add(&none, Entry::new(MIB, 3792, AT, 0), small()).unwrap();
}

#[test]
fn memory_is_of_a_known_kind() {
    let region = Entry::new(MIB, 4096, AT, 0);
    let dir = File::open("/proc/self").unwrap();
    let error = add(&none(), region, dir.into()).unwrap_err();
    assert_eq!(error, "region at 0x100000 of 4096 bytes: it is not in a regular file");
    let proc = File::open("/proc/self/status").unwrap();
    assert!(add(&none(), region, proc.into()).unwrap_err().contains("it has to be a memfd"));
}

#[test]
fn a_table_says_how_many_regions_it_has() {
    let regions = [Entry::new(MIB, MIB, AT, 0), Entry::new(4 * MIB, MIB, AT + 4 * MIB, 0)];
    let none = none();
    let two = || vec![memfd(MIB), memfd(MIB)];
    let change = set(&none, &regions, two()).unwrap();
    assert_eq!(held(&change.regions), [(MIB, MIB), (4 * MIB, MIB)]);
    for count in [0, 1, 3, 300, u32::MAX] {
        let mut message = message(FrontendReq::SET_MEM_TABLE, &regions, two());
        message.body[..4].copy_from_slice(&count.to_ne_bytes());
        assert!(none.after(&mut message).is_err(), "{count}");
    }
    assert!(set(&none, &regions, vec![memfd(MIB)]).is_err());
}

#[test]
fn a_table_in_any_order_is_put_in_order_with_its_files() {
    let places: Vec<u64> = (1..=8).map(|at| at * 16 * MIB).collect();
    for rotation in 0..places.len() {
        let mut order = places.clone();
        order.rotate_left(rotation);
        order.swap(1, 4);
        // Each in a file of its own length.
        let length = |at: &u64| at / 16 / MIB * 4096;
        let table: Vec<_> = order.iter().map(|at| Entry::new(*at, length(at), AT + at, 0)).collect();
        let files = order.iter().map(|at| memfd(length(at))).collect();
        let mut message = message(FrontendReq::SET_MEM_TABLE, &table, files);
        let head = message.body[..8].to_vec();
        let change = none().after(&mut message).unwrap().unwrap();
        let sorted: Vec<_> = places.iter().map(|at| (*at, length(at))).collect();
        assert_eq!(held(&change.regions), sorted);
        assert_eq!(message.body[..8], head);
        let passed: Vec<_> = message.body[8..].chunks_exact(ENTRY).map(region).collect();
        assert_eq!(passed.len(), places.len());
        for ((entry, file), at) in passed.iter().zip(&message.descriptors).zip(&places) {
            let (guest, user, bytes) = (entry.guest_phys_addr, entry.user_addr, entry.memory_size);
            assert_eq!((guest, user, bytes), (*at, AT + at, length(at)));
            assert_eq!(Backing::of(file).unwrap().bytes, length(at), "another region's file");
        }
    }
}

#[test]
fn guest_addresses_are_in_one_region_at_most() {
    let file = || memfd(4 * MIB);
    let entry = |at: u64, bytes: u64| Entry::new(at, bytes, AT + at, 0);
    let cases = [
        [entry(MIB, MIB), entry(MIB, MIB)],
        [entry(MIB, MIB), entry(2 * MIB - 4096, MIB)],
        [entry(2 * MIB - 4096, MIB), entry(MIB, MIB)],
        [entry(MIB, 4 * MIB), entry(2 * MIB, MIB)],
    ];
    for table in cases {
        assert!(set(&none(), &table, vec![file(), file()]).unwrap_err().contains("overlap"));
        let first = add(&none(), table[0], file()).unwrap().regions;
        assert!(add(&first, table[1], file()).unwrap_err().contains("overlap"));
        // A table takes the place of the one before.
        set(&first, &table[1..], vec![file()]).unwrap();
    }
    let next = [entry(2 * MIB, MIB), entry(MIB, MIB)];
    let change = set(&none(), &next, vec![file(), file()]).unwrap();
    // The VMM may have one memory in two places.
    let alias = Entry::new(16 * MIB, MIB, AT + MIB, 0);
    let change = add(&change.regions, alias, file()).unwrap();
    assert_eq!(change.regions.guest_address(AT + MIB + 5), Some(MIB + 5));
    assert_eq!(change.regions.guest_address(AT + 3 * MIB - 1), Some(3 * MIB - 1));
    assert_eq!(change.regions.guest_address(AT + 3 * MIB), None);
    assert_eq!(change.regions.guest_address(0), None);
}

#[test]
fn what_is_taken_away_was_there() {
    let there = Entry::new(MIB, MIB, AT, 0);
    let regions = add(&none(), there, memfd(MIB)).unwrap().regions;
    for other in
        [Entry::new(2 * MIB, MIB, AT, 0), Entry::new(MIB, 4096, AT, 0), Entry::new(MIB, MIB, AT + 4096, 0)]
    {
        assert!(remove(&regions, other).unwrap_err().contains("there is none such"));
    }
    let regions = remove(&regions, there).unwrap().regions;
    assert!(regions.is_empty());
    assert!(remove(&regions, there).is_err(), "twice");
    add(&regions, there, memfd(MIB)).unwrap();
}

#[test]
fn a_vmm_has_its_share() {
    let mut regions = none();
    assert_eq!(regions.slots(), MOST_SLOTS, "the test needs more descriptors");
    let file = memfd(4096);
    let place = |index: u64| Entry::new(index << 20, 4096, AT + (index << 20), 0);
    let again = || file.try_clone().unwrap();
    let mut charges = Vec::new();
    for index in 0..regions.slots() as u64 {
        let change = add(&regions, place(index), again()).unwrap();
        charges.extend(change.charges);
        regions = change.regions;
    }
    assert_eq!(charges.len(), regions.slots());
    assert!(add(&regions, place(600), again()).unwrap_err().contains("510 regions, of 509 memory slots"));
    // Those that are gone do not count.
    let fewer = remove(&regions, place(7)).unwrap().regions;
    assert!(add(&fewer, place(600), again()).is_ok());

    let large = || memfd(MOST_BYTES);
    let first = add(&none(), Entry::new(0, MOST_BYTES, 0, 0), large()).unwrap().regions;
    let second = Entry::new(MOST_BYTES, 4096, MOST_BYTES, 0);
    assert!(add(&first, second, large()).unwrap_err().contains("bytes of memory"));
    // What is mapped counts until it is unmapped, whatever the table says.
    let mut kept = Vec::new();
    let mut errors = Vec::new();
    for _ in 0..8 {
        match set(&regions, &[Entry::new(0, MOST_BYTES, 0, 0)], vec![large()]) {
            Ok(change) => kept.push(change),
            Err(error) => errors.push(error),
        }
    }
    assert_eq!(kept.len(), 5, "5 times 16 TiB, and 2 MiB before, in 96 TiB");
    assert!(errors.iter().all(|error| error.contains("there are addresses for")), "{errors:?}");
    kept.pop();
    set(&regions, &[Entry::new(0, MOST_BYTES, 0, 0)], vec![large()]).unwrap();
}
