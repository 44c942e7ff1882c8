//! Notes taken, found again, and made up.

#![forbid(unsafe_code)]

use super::super::sigbus::is_guarded;
use super::*;
use std::os::unix::fs::FileExt;

fn region(queues: u16, size: u16) -> (File, Inflight) {
    let (file, bytes) = Inflight::create(queues, size).unwrap();
    let inflight = Inflight::open(file.try_clone().unwrap(), bytes, 0, queues, size).unwrap();
    (file, inflight)
}

fn notes(queue: &InflightQueue, used_idx: u16) -> (InflightLog, Vec<u16>) {
    let found = queue.recover(used_idx).unwrap();
    (InflightLog::new(queue.clone(), found.counter), found.heads)
}

#[test]
fn what_was_taken_is_found_in_its_order() {
    let (file, inflight) = region(2, 8);
    let queue = inflight.queue(1).unwrap();
    let (before, none) = notes(&queue, 0);
    assert!(none.is_empty());
    for head in [5, 2, 7, 0] {
        before.begin(head);
    }
    before.complete(2);
    before.complete_batch(1);
    drop((before, queue));
    let bytes = file.metadata().unwrap().len();
    let again = Inflight::open(file, bytes, 0, 2, 8).unwrap();
    let queue = again.queue(1).unwrap();
    let (after, heads) = notes(&queue, 1);
    assert_eq!(heads, [5, 7, 0]);
    after.begin(2);
    assert_eq!(notes(&queue, 1).1, [5, 7, 0, 2]);
    assert!(notes(&again.queue(0).unwrap(), 0).1.is_empty(), "the other queue's are its own");
}

#[test]
fn a_batch_is_given_back_once_wherever_the_kill_comes() {
    // Four are taken, two of them finished; then each point at which a kill may come.
    for published in [false, true] {
        for cleared in [0, 1, 2] {
            let (file, inflight) = region(1, 4);
            let queue = inflight.queue(0).unwrap();
            let (before, _) = notes(&queue, 100);
            for head in 0..4 {
                before.begin(head);
            }
            before.complete(3);
            before.complete_batch(101);
            before.begin(3);
            before.complete(1);
            before.complete(0);
            for head in [1, 0].into_iter().take(cleared) {
                file.write_all_at(&[0], (size_of::<Header>() + size_of::<Entry>() * head) as u64).unwrap();
            }
            let (used_idx, heads) = match published {
                // What the driver has not seen is carried out again.
                false if cleared == 0 => (101, vec![0, 1, 2, 3]),
                // The notes are cleared only after the index has moved.
                false => continue,
                true => (103, vec![2, 3]),
            };
            assert_eq!(notes(&queue, used_idx).1, heads, "{published} {cleared}");
            assert_eq!(notes(&queue, used_idx).1, heads, "and nothing is left over");
        }
    }
}

#[test]
fn indices_wrap() {
    let (_, inflight) = region(1, 4);
    let queue = inflight.queue(0).unwrap();
    let (before, _) = notes(&queue, u16::MAX);
    for head in 0..3 {
        before.begin(head);
    }
    before.complete(2);
    before.complete(1);
    assert_eq!(notes(&queue, 1).1, [0]);
}

#[test]
fn new_notes_say_so() {
    let (_, inflight) = region(1, 4);
    let queue = inflight.queue(0).unwrap();
    assert!(queue.recover(7).unwrap().fresh);
    let again = queue.recover(7).unwrap();
    assert_eq!(again, Recovered { heads: vec![], counter: 0, fresh: false });
    // A driver that began anew while nothing was in flight.
    assert!(queue.recover(0).unwrap().heads.is_empty());
}

/// The worker reads them, and the VMM has written them: every head in flight, and all of them in the last batch.
#[test]
fn the_largest_notes_are_read_in_no_time() {
    const SIZE: u16 = MAX_QUEUE_SIZE;
    let (_, inflight) = region(1, SIZE);
    let queue = inflight.queue(0).unwrap();
    let (before, _) = notes(&queue, 0);
    (0..SIZE).for_each(|head| before.begin(head));
    (0..SIZE).for_each(|head| before.complete(head));
    let begun = std::time::Instant::now();
    assert!(queue.recover(SIZE).unwrap().heads.is_empty());
    // Looking at all for each would be a thousand million steps.
    assert!(begun.elapsed().as_secs() < 3, "{:?}", begun.elapsed());
}

#[test]
fn notes_that_make_no_sense_are_refused() {
    let header = |version: u16, heads: u16, last: u16, used: u16| {
        [version, heads, last, used].iter().flat_map(|field| field.to_ne_bytes()).collect::<Vec<_>>()
    };
    for (bytes, in_flight, used_idx, why) in [
        (header(2, 0, 0, 0), 0, 0, "version is 2"),
        (header(1, 5, 0, 0), 0, 0, "for 5 descriptors"),
        (header(0, 0, 0, 0), 1, 0, "no version"),
        (header(1, 4, 0, 0), 1, 5, "5 of 4 requests"),
        (header(1, 4, 0, 9), 1, 8, "65535 of 4 requests"),
        (header(1, 4, 4, 0), 1, 1, "head 4 of 4"),
        (header(1, 4, u16::MAX, 0), 255, 4, "head 65535 of 4"),
    ] {
        let (file, bytes_long) = Inflight::create(1, 4).unwrap();
        file.write_all_at(&bytes, std::mem::offset_of!(Header, version) as u64).unwrap();
        file.write_all_at(&[in_flight], size_of::<Header>() as u64).unwrap();
        let found = Inflight::open(file, bytes_long, 0, 1, 4)
            .and_then(|inflight| inflight.queue(0).unwrap().recover(used_idx));
        let error = found.unwrap_err().to_string();
        assert!(error.contains(why), "{error}: {why}");
    }
    // A chain of a batch that runs in a circle ends with the batch.
    let (_, inflight) = region(1, 4);
    let queue = inflight.queue(0).unwrap();
    let (before, _) = notes(&queue, 0);
    before.begin(0);
    before.begin(1);
    before.complete(1);
    before.complete(1);
    assert_eq!(notes(&queue, 4).1, [0]);
}

#[test]
fn only_a_file_that_cannot_shrink_is_taken() {
    let (file, bytes) = Inflight::create(2, 4).unwrap();
    assert_eq!(bytes, 2 * 128);
    let open = |bytes, offset, queues, size| {
        Inflight::open(file.try_clone().unwrap(), bytes, offset, queues, size).map(drop)
    };
    assert!(open(bytes, 0, 2, 4).is_ok());
    for (length, offset, queues, size) in [
        (bytes, 0, 3, 4),
        (bytes, 0, 2, 16),
        (bytes, 64, 1, 4),
        (bytes - 1, 0, 2, 4),
        (u64::MAX, 1, 1, 4),
        (bytes, 0, 0, 4),
        (bytes, 0, 257, 4),
        (bytes, 0, 1, 0),
        (u64::MAX, 0, 1, 4),
    ] {
        assert!(open(length, offset, queues, size).is_err(), "{length} {offset} {queues} {size}");
    }
    assert!(file.set_len(0).is_err(), "sealed");
    let error = |file: &File, offset| {
        file.set_len(4 << 20).ok();
        fcntl(file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).ok();
        let file = file.try_clone().unwrap();
        Inflight::open(file, 8192, offset, 1, 4).map(drop).unwrap_err().to_string()
    };
    let memfd = |flags| File::from(memfd_create(c"notes", MFdFlags::MFD_CLOEXEC | flags).unwrap());
    assert!(error(&memfd(MFdFlags::empty()), 0).contains("taken away"), "it can shrink");
    let huge = MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB | MFdFlags::MFD_ALLOW_SEALING;
    assert!(error(&memfd(huge), 0).contains("taken away"), "its pages may be punched away, and be the last");
    assert!(error(&memfd(MFdFlags::MFD_ALLOW_SEALING), 64).contains("multiple of a page"));
    assert!(error(&File::open("/proc/self/status").unwrap(), 0).contains("it has to be a memfd"));
    assert!(Inflight::create(0, 4).is_err() && Inflight::create(1, 40000).is_err());
}

#[test]
fn what_a_vmm_gives_is_guarded_as_long_as_it_is_mapped() {
    let socket = Arc::new(UnixStream::pair().unwrap().0);
    let (file, bytes) = Inflight::create(2, 4).unwrap();
    let inflight = Inflight::guarded(file, bytes, 0, 2, 4, &socket).unwrap();
    let at = inflight.shared.map.as_ptr();
    let queue = inflight.queue(1).unwrap();
    assert!(is_guarded(at) && !inflight.is_lost());
    drop(inflight);
    assert!(is_guarded(at));
    drop(queue);
    assert!(!is_guarded(at));
    assert_eq!(Arc::strong_count(&socket), 1);
}
