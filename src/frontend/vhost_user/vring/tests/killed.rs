//! Workers that are killed, one after the other, under a driver that notices nothing.

#![forbid(unsafe_code)]

use super::driver::{Driver, Worker, device};
use super::*;
use crate::frontend::vhost_user::atomic::traced::{Access, observed};
use crate::frontend::vhost_user::inflight::{Inflight, InflightQueue};
use crate::ring::sim::{Faults, Random};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

/// What the VMM keeps.
pub struct Kept {
    file: File,
    bytes: u64,
}

impl Kept {
    pub fn new(size: u16) -> Kept {
        let (file, bytes) = Inflight::create(1, size).unwrap();
        Kept { file, bytes }
    }

    /// The notes of the one vring.
    pub fn queue(&self) -> Option<InflightQueue> {
        let size = ((self.bytes - 16) / 16) as u16;
        Inflight::open(self.file.try_clone().unwrap(), self.bytes, 0, 1, size).unwrap().queue(0)
    }

    fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.bytes as usize];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// A worker for the vring, as a VMM has it made after a kill: it knows the used index, and has the in-flight log.
    fn worker(&self, driver: &Driver, seed: u64, faults: Faults) -> Worker {
        let file = self.file.try_clone().unwrap();
        let mut setup = driver.setup(device(), FEATURES);
        setup.next_avail = driver.used_idx();
        setup.inflight = Inflight::open(file, self.bytes, 0, 1, driver.size).unwrap().queue(0);
        Worker::new(setup, seed, faults)
    }
}

#[test]
fn each_request_is_completed_once_and_carried_out_again_in_order() {
    for seed in 0..300 {
        let mut random = Random(seed);
        let mut driver = Driver::new(16, seed % 2 == 0, if seed % 3 == 0 { u16::MAX - 5 } else { 0 });
        let kept = Kept::new(16);
        // Sectors that were asked for and not answered, in the order of asking, each by its head.
        let mut asked: Vec<(u16, u64)> = Vec::new();
        let mut sectors = 0..40u64;
        let harvest = |driver: &mut Driver, asked: &mut Vec<(u16, u64)>| {
            for (head, written) in driver.harvest() {
                let at =
                    asked.iter().position(|(other, _)| *other == head).expect("a head that was asked for");
                let (_, sector) = asked.remove(at);
                assert_eq!((driver.status(head), written), (OK, 513));
                let from = sector as usize * 512;
                assert!(driver.data(head, 512) == super::PATTERN[from..from + 512], "sector {sector}");
            }
        };
        while sectors.start < 40 || !asked.is_empty() {
            let faults = Faults { delay: 85, reorder: true, ..Faults::default() };
            let mut worker = kept.worker(&driver, random.bits(), faults);
            // Whatever was asked for and is not answered comes again, or for the first time, in its order.
            let expected: Vec<u64> = asked.iter().map(|(_, sector)| *sector).collect();
            let mut seen: Vec<u64> = Vec::new();
            for _ in 0..random.below(20) {
                worker.pass();
                seen.extend(worker.seen().iter().map(|(_, _, sector, _)| *sector));
                // The driver may look at any time, or not before the kill.
                if random.percent(40) {
                    harvest(&mut driver, &mut asked);
                }
                for sector in sectors.by_ref().take(random.below(3)) {
                    match driver.add(IN, sector, &[], 512, true) {
                        Some(head) => asked.push((head, sector)),
                        None => {
                            sectors.start = sector;
                            break;
                        }
                    }
                }
            }
            let again = expected.len().min(seen.len());
            assert_eq!(seen[..again], expected[..again], "seed {seed}");
            drop(worker);
            // What was given back before the kill is the driver's.
            harvest(&mut driver, &mut asked);
        }
        let worker = kept.worker(&driver, 0, Faults::default());
        assert_eq!((worker.vring.in_flight(), worker.vring.next_avail()), (0, driver.avail));
    }
}

#[test]
fn what_is_carried_out_again_is_drained_by_a_stop() {
    let mut driver = Driver::new(16, false, 0);
    let kept = Kept::new(16);
    let heads: Vec<u16> = (0..12).map(|n| driver.add(IN, n, &[], 512, true).unwrap()).collect();
    let worker = kept.worker(&driver, 1, Faults::default());
    while worker.vring.in_flight() < 12 {
        worker.vring.publish();
        while super::take(&worker.vring, &mut TagState::default()).is_some() {}
    }
    drop(worker);
    let mut worker = kept.worker(&driver, 1, Faults::default());
    worker.vring.enable(false);
    worker.vring.stop();
    assert_eq!((worker.vring.in_flight(), worker.vring.next_avail()), (12, 12));
    worker.settle();
    assert_eq!(driver.harvest().iter().map(|(head, _)| *head).collect::<Vec<_>>(), heads);
}

#[test]
fn a_ring_that_its_notes_have_no_room_for_is_refused() {
    let driver = Driver::new(16, false, 0);
    let kept = Kept::new(8);
    let mut setup = driver.setup(device(), FEATURES);
    setup.inflight = Inflight::open(kept.file.try_clone().unwrap(), kept.bytes, 0, 1, 8).unwrap().queue(0);
    let error = Vring::new(setup).map(drop).unwrap_err();
    assert!(error.to_string().contains("room to note 8"), "{error}");
    // A head that the ring does not have.
    let kept = Kept::new(32);
    let open = || Inflight::open(kept.file.try_clone().unwrap(), kept.bytes, 0, 1, 32).unwrap().queue(0);
    let inflight_log = InflightLog::new(open().unwrap(), 0);
    open().unwrap().recover(0).unwrap();
    inflight_log.begin(16);
    let mut setup = driver.setup(device(), FEATURES);
    setup.inflight = open();
    let error = Vring::new(setup).map(drop).unwrap_err();
    assert!(error.to_string().contains("does not have"), "{error}");
}

/// The guest's memory and the in-flight log, as a kill would leave them.
type Snapshots = Rc<RefCell<Vec<(Vec<u8>, Vec<u8>)>>>;

/// A kill leaves every store up to some point, and none after it: each is tried as the last.
#[test]
fn each_store_may_be_the_last() {
    const COUNT: u64 = 10;
    for seed in 0..8 {
        let mut driver = Driver::new(16, true, u16::MAX - 3);
        let (start, kept, mut random) = (driver.avail, Rc::new(Kept::new(16)), Random(seed));
        let driver_kept = kept.clone();
        let faults = Faults { delay: 60, reorder: true, ..Faults::default() };
        let mut worker = kept.worker(&driver, seed, faults);
        let snapshots = Snapshots::default();
        let mut sectors = 0..COUNT;
        while sectors.start < COUNT || worker.vring.in_flight() > 0 {
            for sector in sectors.by_ref().take(random.below(4)) {
                driver.add(IN, sector, &[], 512, true).unwrap();
            }
            let (memory, kept, into) = (driver.memory(), driver_kept.clone(), snapshots.clone());
            let observer = move |access| {
                if let Access::Store(..) = access {
                    into.borrow_mut().push((memory(), kept.contents()));
                }
            };
            observed(observer, || worker.pass());
        }
        drop(worker);
        let snapshots = snapshots.take();
        assert!(snapshots.len() > 8 * COUNT as usize, "{} stores", snapshots.len());
        for (at, (guest, notes)) in snapshots.iter().enumerate() {
            let mut driver = Driver::new(16, true, start);
            driver.put(0, guest);
            let kept = Kept::new(16);
            kept.file.write_all_at(notes, 0).unwrap();
            let mut worker = kept.worker(&driver, 1, Faults::default());
            worker.settle();
            // What was asked for by then is done once, none left out, none twice.
            let asked = driver.avail_idx().wrapping_sub(start);
            assert_eq!(driver.used_idx().wrapping_sub(start), asked, "seed {seed}, store {at}");
            let mut heads: Vec<u32> = (0..asked).map(|n| driver.used_head(start.wrapping_add(n))).collect();
            heads.sort_unstable();
            heads.dedup();
            assert_eq!(heads.len(), usize::from(asked), "seed {seed}, store {at}: one twice");
            driver.seen = driver.used_idx();
        }
    }
}
