//! What a guest reads is what a guest wrote: every operation, on every volume that needs no device, through the real
//! service, held against a model and against the image on disk.

mod common;

use common::client::Client;
use common::memory::{GuestMemory, Region};
use common::model::{Model, Op, Queue, Random};
use common::queue::{Layout, MAX_LEN, RawQueue, UNTOUCHED};
use common::service::{Service, Setup};
use common::vmm::{BASE, EVENT_IDX, INDIRECT, Vmm, everyday};
use ringblk::frontend::vhost_user::config::VhostUserConfig;
use ringblk::service::status::ExportStatus;
use std::fs;
use std::os::unix::fs::MetadataExt;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

const MIB: u64 = 1 << 20;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// Every queue works on a part of its own, all at once; then all is read back through the first.
fn exercise_queues(
    queues: Vec<impl Queue + Send + 'static>,
    bytes: u64,
    block: u64,
    count: usize,
) -> Vec<Model> {
    let part = bytes / 512 / queues.len() as u64;
    let workers: Vec<_> = queues
        .into_iter()
        .enumerate()
        .map(|(index, mut queue)| {
            std::thread::spawn(move || {
                let mut model = Model::new(index as u64, index as u64 * part, part).blocks(block);
                model.exercise(&mut queue, count);
                model.verify(&mut queue);
                queue.submit(0, Op::Flush);
                queue.kick();
                assert_eq!(queue.wait(), [(0, OK)]);
                model
            })
        })
        .collect();
    workers.into_iter().map(|worker| worker.join().unwrap()).collect()
}

fn memory_service(options: &str) -> Service {
    Setup::new().volume("root", "memory:8M").vhost_user("root", "a", options).start()
}

#[test]
fn every_number_of_queues_at_every_depth() {
    let setup = Setup::new().args(["--workers", "3"]).volume("root", "memory:8M");
    let service = setup.vhost_user("root", "a", "queues=4,queue-size=1024").start();
    for (queues, depth) in [(1, 1usize), (2, 2), (3, 8), (4, 32), (1, 256), (2, 128)] {
        for event_idx in [false, true] {
            let client = Client::connect(&service.path("a"), event_idx);
            let size = (depth * 3).next_power_of_two() as u16;
            let mut queues = client.queues(queues, size, depth);
            zero(&mut queues[0], 8 * MIB);
            exercise_queues(queues, 8 * MIB, 512, 300);
        }
    }
}

fn zero(queue: &mut dyn Queue, bytes: u64) {
    queue.submit(0, Op::WriteZeroes { sector: 0, sectors: (bytes / 512) as u32, unmap: true });
    queue.kick();
    assert_eq!(queue.wait(), [(0, OK)]);
}

#[test]
fn every_layout_with_and_without_event_idx() {
    let service = memory_service("queues=1,queue-size=256");
    for mask in [0, EVENT_IDX, INDIRECT, EVENT_IDX | INDIRECT] {
        // A ring of one descriptor holds an indirect request, one of two a joined one.
        for (layout, size) in [
            (Layout::Plain, 4),
            (Layout::Plain, 256),
            (Layout::Joined, 2),
            (Layout::Joined, 32),
            (Layout::Pieces, 16),
            (Layout::Pieces, 256),
            (Layout::Indirect, 1),
            (Layout::Indirect, 16),
        ] {
            if layout == Layout::Indirect && mask & INDIRECT == 0 {
                continue;
            }
            let features = !(EVENT_IDX | INDIRECT) | mask;
            let memory = GuestMemory::new(BASE, 4 * MIB);
            let mut vmm = Vmm::connect_with(&service.path("a"), features, memory);
            let mut queue = vmm.queue(0, size, layout, 16);
            zero(&mut queue, 8 * MIB);
            let mut model = Model::new(mask + u64::from(size), 0, 8 * MIB / 512);
            model.exercise(&mut queue, 200);
            model.verify(&mut queue);
        }
    }
}

#[test]
fn images_hold_what_was_flushed() {
    for options in ["", ",direct=on", ",block-size=4096", ",direct=on,block-size=4096"] {
        let setup = Setup::new();
        let image = setup.image(8 * MIB);
        let setup = setup.volume("root", &format!("file:{}{options}", image.display()));
        let service = setup.args(["--workers", "2"]).vhost_user("root", "a", "queues=2").start();
        let client = Client::connect(&service.path("a"), true);
        let block = u64::from(u32::from(client.config().blk_size));
        assert_eq!(block, if options.contains("4096") { 4096 } else { 512 });
        let models = exercise_queues(client.queues(2, 64, 16), 8 * MIB, block, 400);
        // Read past the page cache's view of the direct image, too: the file system keeps them coherent.
        let bytes = fs::read(&image).unwrap();
        assert_eq!(bytes.len() as u64, 8 * MIB);
        for model in models {
            model.verify_image(&bytes);
        }
    }
}

#[test]
fn direct_io_takes_buffers_of_any_alignment() {
    let setup = Setup::new();
    let image = setup.image(8 * MIB);
    let service = setup
        .volume("root", &format!("file:{},direct=on", image.display()))
        .vhost_user("root", "a", "")
        .start();
    let mut vmm = Vmm::connect(&service.path("a"));
    // Data in pieces of odd lengths: nothing is aligned to anything.
    let mut queue = vmm.queue(0, 256, Layout::Pieces, 16);
    let mut model = Model::new(9, 0, 8 * MIB / 512);
    model.exercise(&mut queue, 300);
    model.verify(&mut queue);
    assert_eq!(queue.one(Op::Flush, &[]).0, OK);
    model.verify_image(&fs::read(&image).unwrap());
}

#[test]
fn a_null_volume_agrees_to_everything() {
    let service = Setup::new().volume("none", "null:1G").vhost_user("none", "a", "queues=2").start();
    let client = Client::connect(&service.path("a"), true);
    assert_eq!(u64::from(client.config().capacity), (1 << 30) / 512);
    let offers_discard = client.features() & 1 << VIRTIO_BLK_F_DISCARD != 0;
    for mut queue in client.queues(2, 256, 64) {
        let mut model = Model::new(3, 0, 1 << 21).blind();
        if offers_discard {
            model.exercise(&mut queue, 500);
        } else {
            queue.submit(0, Op::Read { sector: 0, sectors: 8 });
            queue.submit(1, Op::Write { sector: (1 << 21) - 8, sectors: 8 });
            queue.submit(2, Op::WriteZeroes { sector: 0, sectors: 8, unmap: true });
            queue.submit(3, Op::Flush);
            queue.kick();
            let mut done = Vec::new();
            while done.len() < 4 {
                done.extend(queue.wait());
            }
            assert!(done.iter().all(|(_, status)| *status == OK), "{done:?}");
        }
    }
    drop(client);
    // Forgotten it is, and past the end there is nothing even here.
    let (_vmm, mut queue) = everyday(&service.path("a"));
    assert_eq!(queue.write(0, &[7; 512]), OK);
    assert_eq!(queue.read(1 << 21, 1).0, IO_ERROR);
}

#[test]
fn one_volume_behind_two_doors() {
    let setup = Setup::new();
    let image = setup.image(8 * MIB);
    let setup = setup.volume("root", &format!("file:{}", image.display())).args(["--workers", "2"]);
    let service = setup
        .vhost_user("root", "a", "")
        .vhost_user("root", "b", "")
        .vhost_user("root", "c", "read-only=on")
        .start();
    let (_a, mut first) = everyday(&service.path("a"));
    let (_b, mut second) = everyday(&service.path("b"));
    let (_c, mut third) = everyday(&service.path("c"));
    let mut random = Random::new(1);
    for round in 0..50 {
        let bytes = random.bytes(4096);
        assert_eq!(first.write(round * 8, &bytes), OK);
        assert_eq!(first.one(Op::Flush, &[]).0, OK);
        assert_eq!(second.read(round * 8, 8), (OK, bytes.clone()));
        assert_eq!(third.read(round * 8, 8), (OK, bytes));
        std::mem::swap(&mut first, &mut second);
    }
    // And both at once.
    zero(&mut first, 8 * MIB);
    let models = exercise_queues(vec![first, second], 8 * MIB, 512, 500);
    let bytes = fs::read(&image).unwrap();
    models.iter().for_each(|model| model.verify_image(&bytes));
}

#[test]
fn many_volumes_and_exports_on_few_workers() {
    let mut setup = Setup::new().args(["--workers", "2"]);
    let names: Vec<String> = (0..6).map(|number| format!("v{number}")).collect();
    for name in &names {
        setup = setup.volume(name, "memory:2M").vhost_user(name, name, "queues=2");
    }
    let service = setup.start();
    let clients: Vec<_> = names
        .iter()
        .map(|name| {
            let path = service.path(name);
            std::thread::spawn(move || {
                let client = Client::connect(&path, true);
                exercise_queues(client.queues(2, 64, 16), 2 * MIB, 512, 300);
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().unwrap());
    let status = service.status();
    assert_eq!((status.workers, status.volumes.len(), status.exports.len()), (2, 6, 6));
}

#[test]
fn requests_across_memory_regions() {
    // Neighbours for the guest, the other way round in the file: what is contiguous there is not contiguous here.
    let memory = GuestMemory::with_regions(&[
        Region { gpa: BASE, len: MIB, offset: MIB },
        Region { gpa: BASE + MIB, len: MIB, offset: 0 },
    ]);
    let service = memory_service("queues=2");
    let mut vmm = Vmm::connect_with(&service.path("a"), u64::MAX, memory);
    for (index, layout) in [Layout::Plain, Layout::Joined].into_iter().enumerate() {
        let ring = vmm.ring(16);
        vmm.start(index, &ring);
        // The middle of the data is at the border.
        let mut queue = RawQueue::new(ring, layout, BASE + MIB - 4096 - MAX_LEN as u64 / 2, 1);
        let bytes = Random::new(5).bytes(MAX_LEN);
        assert_eq!(queue.write(64, &bytes), OK);
        queue.ring.memory.write(queue.data(0), &vec![0; MAX_LEN]);
        assert_eq!(queue.read(64, MAX_LEN as u32 / 512), (OK, bytes));
    }
}

#[test]
fn discards_give_space_back_and_zeroes_read_as_zeroes() {
    let setup = Setup::new();
    let image = setup.image(8 * MIB);
    let service =
        setup.volume("root", &format!("file:{}", image.display())).vhost_user("root", "a", "").start();
    let (_vmm, mut queue) = everyday(&service.path("a"));
    let fill = |queue: &mut RawQueue| {
        for sector in (0..2048).step_by(128) {
            assert_eq!(queue.write(sector, &[0xff; 65536]), OK);
        }
        assert_eq!(queue.one(Op::Flush, &[]).0, OK);
        fs::metadata(&image).unwrap().blocks()
    };
    let full = fill(&mut queue);
    assert!(full >= 2048);
    // Several ranges in one request.
    let ranges = [(0, 256, 0), (512, 256, 0), (1024, 1024, 0)];
    assert_eq!(queue.ranges(VIRTIO_BLK_T_DISCARD, &ranges), OK);
    let left = fs::metadata(&image).unwrap().blocks();
    assert!(full - left >= 1500, "{full} blocks of 512 bytes became {left}");
    assert_eq!(queue.read(256, 128), (OK, vec![0xff; 65536]), "between the ranges");

    let full = fill(&mut queue);
    assert_eq!(queue.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 1000, 1), (1000, 1, 0), (1002, 998, 0)]), OK);
    let left = fs::metadata(&image).unwrap().blocks();
    assert!(full - left >= 900, "unmap frees: {full} blocks became {left}");
    let (status, bytes) = queue.read(960, 128);
    assert_eq!(status, OK);
    let wanted: Vec<u8> =
        (960..1088).flat_map(|sector| [if sector == 1001 { 0xff } else { 0 }; 512]).collect();
    assert_eq!(bytes, wanted);

    // What is not in the standard is not done.
    fill(&mut queue);
    assert_eq!(queue.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 8, 1)]), UNSUPPORTED, "discard with unmap");
    assert_eq!(queue.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 8, 2)]), UNSUPPORTED, "an unknown flag");
    assert_eq!(queue.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 4)]), UNSUPPORTED, "an unknown flag");
    assert_eq!(queue.ranges(VIRTIO_BLK_T_DISCARD, &[(16384 - 8, 9, 0)]), IO_ERROR, "past the end");
    assert_eq!(queue.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(u64::MAX, 8, 0)]), IO_ERROR, "far past the end");
    assert_eq!(queue.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[]), IO_ERROR, "nothing");
    assert_eq!(queue.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 8, 0); 300]), IO_ERROR, "more than max_discard_seg");
    assert_eq!(queue.send(VIRTIO_BLK_T_DISCARD, 0, &[0; 17], false).0, IO_ERROR, "half a range");
    assert_eq!(queue.read(0, 8), (OK, vec![0xff; 4096]), "nothing was done");
}

/// Without a word a VMM may set up what QEMU does by itself: a queue for each of its CPUs, and rings of any size it has.
#[test]
fn queues_are_not_short() {
    let service = memory_service("");
    let mut vmm = Vmm::connect_with(&service.path("a"), u64::MAX, GuestMemory::new(BASE, 32 * MIB));
    let offered = vmm.config(34, 2);
    assert!(u16::from_le_bytes([offered[0], offered[1]]) >= 64);
    // The last of the 16 that this VMM knows of is on a worker as the first is.
    for index in [0, 15] {
        let mut queue = vmm.queue(index, 1024, Layout::Plain, 16);
        assert_eq!(queue.write(index as u64, &[index as u8; 512]), OK);
        assert_eq!(queue.read(index as u64, 1), (OK, vec![index as u8; 512]));
    }
}

/// There are guests that take the topology for a part of the block size.
#[test]
fn the_topology_can_be_left_out() {
    let shown = |options: &str| {
        let setup = Setup::new();
        let image = setup.image(8 * MIB);
        let volume = format!("file:{}{options}", image.display());
        let service = setup.volume("root", &volume).vhost_user("root", "a", "").start();
        let topology = Vmm::connect(&service.path("a")).config(20, 12);
        (topology[..4].to_vec(), topology[4], topology[4..].iter().all(|byte| *byte == 0))
    };
    let block = 512u32.to_le_bytes().to_vec();
    assert_eq!(shown(",physical-block=512"), (block.clone(), 0, true));
    assert_eq!(shown(",physical-block=16384"), (block.clone(), 5, false));
    assert!(!shown("").2, "of a file system there is one to tell");
    let setup = Setup::new()
        .volume("root", "memory:8M,block-size=4096,physical-block=512")
        .vhost_user("root", "a", "");
    let (status, said) = setup.refused();
    assert!(
        status == 2 && said.contains("physical-block: must be a power of two from 4096"),
        "{status} {said}"
    );
}

#[test]
fn the_name_of_the_device() {
    let name = "a-name-of-more-than-twenty.bytes";
    let service = Setup::new().volume(name, "memory:1M").volume("b", "memory:1M");
    let service = service.vhost_user(name, "a", "").vhost_user("b", "b", "").vhost_user(
        "b",
        "c",
        "serial=20-bytes-all-its-own",
    );
    let service = service.start();
    let serial = VhostUserConfig::new(name, "a").serial();
    assert_eq!((serial.len(), &serial[..10]), (20, "a-name-of-"), "a hash follows");
    let (_a, mut queue) = everyday(&service.path("a"));
    let mut ask = |len: usize| {
        let answer = queue.send(VIRTIO_BLK_T_GET_ID, 0, &vec![0xcc; len], true);
        (answer, queue.ring.memory.get(queue.data(0), len))
    };
    assert_eq!(ask(20), ((OK, 21), serial.as_bytes().to_vec()));
    // A buffer that is shorter, longer, or none.
    assert_eq!(ask(3), ((OK, 4), b"a-n".to_vec()));
    let (answer, bytes) = ask(64);
    assert_eq!((answer, &bytes[..20], &bytes[20..]), ((OK, 21), serial.as_bytes(), &[0xcc; 44][..]));
    assert_eq!(ask(0).0.0, OK);
    for (socket, serial) in
        [("b", *b"b\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"), ("c", *b"20-bytes-all-its-own")]
    {
        let (_vmm, mut queue) = everyday(&service.path(socket));
        assert_eq!(queue.send(VIRTIO_BLK_T_GET_ID, 0, &[0xcc; 20], true), (OK, 21));
        assert_eq!(queue.ring.memory.get(queue.data(0), 20), serial);
    }
}

#[test]
fn read_only_means_it() {
    // As the volume's setting, and as one export's.
    for (volume, export) in [(",read-only=on", ""), ("", "read-only=on")] {
        let setup = Setup::new();
        let image = setup.image(MIB);
        fs::write(&image, vec![0x5a; MIB as usize]).unwrap();
        let setup = setup.volume("root", &format!("file:{}{volume}", image.display()));
        let service = setup.vhost_user("root", "a", export).start();
        let (vmm, mut queue) = everyday(&service.path("a"));
        assert_ne!(vmm.offered & 1 << VIRTIO_BLK_F_RO, 0);
        assert_eq!(vmm.offered & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES), 0);
        assert_eq!(queue.write(0, &[1; 512]), IO_ERROR);
        assert_ne!(queue.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 0)]), OK);
        assert_ne!(queue.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 8, 0)]), OK);
        assert_eq!(queue.one(Op::Flush, &[]).0, OK);
        assert_eq!(queue.read(0, 8), (OK, vec![0x5a; 4096]));
        assert!(service.status().exports.iter().all(|export| match export {
            ExportStatus::VhostUser(export) => export.read_only,
            ExportStatus::Ublk(_) => false,
        }));
        assert_eq!(fs::read(&image).unwrap(), vec![0x5a; MIB as usize]);
    }
}

#[test]
fn bad_ranges_change_nothing_and_give_nothing_away() {
    let setup = Setup::new();
    let image = setup.image(MIB);
    let service =
        setup.volume("root", &format!("file:{}", image.display())).vhost_user("root", "a", "").start();
    let (_vmm, mut queue) = everyday(&service.path("a"));
    assert_eq!(queue.write(0, &[0x77; 65536]), OK);
    let end = MIB / 512;
    for sector in [end, end - 1, u64::MAX, u64::MAX / 512, u64::MAX - 1, 1 << 55] {
        queue.ring.memory.write(queue.data(0), &[UNTOUCHED; 1024]);
        assert_eq!(queue.read(sector, 2), (IO_ERROR, vec![UNTOUCHED; 1024]), "read at {sector}");
        assert_eq!(queue.write(sector, &[1; 1024]), IO_ERROR, "write at {sector}");
    }
    // Lengths that are no sectors.
    for len in [1, 511, 513, 1000] {
        assert_eq!(queue.send(VIRTIO_BLK_T_IN, 0, &vec![UNTOUCHED; len], true), (IO_ERROR, 1));
        assert_eq!(queue.ring.memory.get(queue.data(0), len), vec![UNTOUCHED; len]);
        assert_eq!(queue.send(VIRTIO_BLK_T_OUT, 0, &vec![1; len], false).0, IO_ERROR);
    }
    assert_eq!(queue.one(Op::Flush, &[]).0, OK);
    let bytes = fs::read(&image).unwrap();
    assert_eq!(bytes.len() as u64, MIB, "the image does not grow");
    assert!(bytes[..65536].iter().all(|byte| *byte == 0x77) && bytes[65536..].iter().all(|byte| *byte == 0));
    // Requests that nobody knows.
    for kind in [2, 3, 5, 7, 10, 14, 16, 0x8000_0000, u32::MAX] {
        assert_eq!(queue.send(kind, 0, &[0; 512], true).0, UNSUPPORTED, "type {kind}");
    }
    // What the device says it wrote: the data and the status.
    assert_eq!(queue.one(Op::Read { sector: 0, sectors: 8 }, &[]), (OK, 4097));
    assert_eq!(queue.one(Op::Write { sector: 0, sectors: 1 }, &[1; 512]), (OK, 1));
    assert_eq!(queue.one(Op::Flush, &[]), (OK, 1));
}

#[test]
fn a_driver_without_flush_is_still_served() {
    let setup = Setup::new();
    let image = setup.image(MIB);
    let service =
        setup.volume("root", &format!("file:{}", image.display())).vhost_user("root", "a", "").start();
    let memory = GuestMemory::new(BASE, 2 * MIB);
    let mut vmm = Vmm::connect_with(&service.path("a"), 1 << 32, memory);
    assert_eq!(vmm.features & 1 << VIRTIO_BLK_F_FLUSH, 0);
    let mut queue = vmm.queue(0, 16, Layout::Plain, 4);
    assert_eq!(queue.write(8, &[3; 4096]), OK);
    assert_eq!(queue.read(8, 8), (OK, vec![3; 4096]));
}
