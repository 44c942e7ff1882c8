//! Vrings that stop while requests wait for a store that does not come back.

#![forbid(unsafe_code)]

use super::driver::{Driver, Worker, device};
use super::killed::Kept;
use super::notified::ByHand;
use super::*;

const ALL: [StopMode; 3] = [StopMode::Restart, StopMode::Quiesce, StopMode::Disconnect];

/// A vring with six reads in flight, on notes or not.
fn six(kept: Option<&Kept>) -> (Driver, ByHand, Vec<u16>) {
    let mut driver = Driver::new(16, true, u16::MAX - 2);
    let heads = (0..6).map(|n| driver.add(IN, n, &[], 512, true).unwrap()).collect();
    let mut setup = VringSetup { next_avail: u16::MAX - 2, ..driver.setup(device(), FEATURES) };
    setup.inflight = kept.and_then(Kept::queue);
    let mut vring = ByHand::new(setup);
    vring.take_all();
    assert_eq!(vring.vring.in_flight(), 6);
    (driver, vring, heads)
}

#[test]
fn what_waits_ends_as_the_stop_demands() {
    for mode in ALL {
        for noted in [false, true] {
            let kept = Kept::new(16);
            let (mut driver, mut vring, heads) = six(noted.then_some(&kept));
            let keeps = mode == StopMode::Restart || mode == StopMode::Disconnect && noted;
            // The first is done by the store, the others wait for it.
            vring.complete(1, Ok(()));
            vring.vring.interrupt(mode);
            flushes(&mut driver, 1);
            assert_eq!(vring.take(), 0, "nothing more is taken");
            vring.complete(4, Err(Errno::ERESTART));
            // What the store itself says is told in any case.
            vring.complete(1, Err(Errno::EIO));
            assert_eq!(vring.vring.in_flight(), 0);
            vring.publish();
            let told: Vec<_> =
                driver.harvest().iter().map(|(head, _)| (*head, driver.status(*head))).collect();
            let stopped = vring.vring.stopped();
            assert_eq!(stopped.next_avail, (u16::MAX - 2).wrapping_add(6));
            drop(vring);
            let expected: &[_] = if keeps { &[0, 5] } else { &[0, 1, 2, 3, 4, 5] };
            let expected = expected.iter().map(|at| (heads[*at], if *at == 0 { OK } else { IOERR }));
            assert_eq!(told, expected.collect::<Vec<_>>(), "{mode:?}, noted: {noted}");
            assert_eq!(stopped.unfinished, if keeps { heads[1..5].to_vec() } else { vec![] });

            // Whoever goes on carries out what was kept, in its order, and then what is new.
            let mut setup = VringSetup { next_avail: stopped.next_avail, ..driver.setup(device(), FEATURES) };
            if noted {
                setup.inflight = kept.queue();
            }
            if mode == StopMode::Restart {
                setup.unfinished = stopped.unfinished;
            }
            let mut worker = Worker::new(setup, 1, Faults::default());
            worker.settle();
            let again: Vec<_> = worker.seen().iter().map(|(op, _, sector, _)| (*op, *sector)).collect();
            let expected =
                if keeps { &[1, 2, 3, 4][..] } else { &[] }.iter().map(|sector| (Op::Read, *sector));
            assert_eq!(
                again,
                expected.chain([(Op::Flush, 0)]).collect::<Vec<_>>(),
                "{mode:?}, noted: {noted}"
            );
            driver.harvest();
            assert_eq!((driver.in_flight(), worker.vring.next_avail()), (0, driver.avail));
        }
    }
}

/// A vring that was to carry out again what another had in flight, and stops before it could.
#[test]
fn what_was_not_taken_again_is_left_in_its_order() {
    for mode in ALL {
        let (driver, vring, heads) = six(None);
        drop(vring);
        let setup = VringSetup { unfinished: heads.clone(), ..driver.setup(device(), FEATURES) };
        let mut vring = ByHand::new(setup);
        assert_eq!((vring.take(), vring.vring.in_flight()), (4, 6));
        vring.vring.interrupt(mode);
        // In another order than that of taking.
        vring.taken_reversed();
        vring.complete(4, Err(Errno::ERESTART));
        if mode != StopMode::Restart {
            assert_eq!(vring.vring.in_flight(), 2, "they are carried out, and fail if they must wait");
            continue;
        }
        assert_eq!(vring.vring.stopped().unfinished, heads);
    }
}

/// Notes that come while the vring runs: what it has in flight is noted there too.
#[test]
fn what_goes_on_is_noted_in_new_notes() {
    let (mut driver, mut vring, heads) = six(None);
    vring.vring.interrupt(StopMode::Restart);
    vring.complete(6, Err(Errno::ERESTART));
    let stopped = vring.vring.stopped();
    let kept = Kept::new(16);
    let setup =
        |unfinished| VringSetup { unfinished, inflight: kept.queue(), ..driver.setup(device(), FEATURES) };
    drop(ByHand::new(setup(stopped.unfinished)));
    // Killed.
    let mut worker = Worker::new(setup(vec![]), 1, Faults::default());
    worker.settle();
    assert_eq!(driver.harvest().iter().map(|(head, _)| *head).collect::<Vec<_>>(), heads);
}

#[test]
fn a_head_that_a_smaller_ring_does_not_have_is_refused() {
    let driver = Driver::new(16, false, 0);
    let kept = Kept::new(16);
    for inflight in [None, kept.queue()] {
        let setup = VringSetup { unfinished: vec![3, 16], inflight, ..driver.setup(device(), FEATURES) };
        assert!(Vring::new(setup).is_err_and(|error| error.kind() == io::ErrorKind::InvalidInput));
    }
    let setup = VringSetup { inflight: kept.queue(), ..driver.setup(device(), FEATURES) };
    assert_eq!(Vring::new(setup).unwrap().in_flight(), 0, "nothing of it was noted");
}
