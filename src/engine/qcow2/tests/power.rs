//! Whatever the ring does, an image keeps what it was given; and when the power goes, it is whole and has what was promised.

use super::*;
use crate::block::Op;
use crate::engine::driver::AnyStore;
use crate::engine::tests::crash::{History, slots, work_until_cut};
use crate::engine::tests::model::{Run, SHARE, faults, once, plan};
use crate::engine::tests::settle;
use crate::engine::tests::{mapping, request, transfer};
use crate::engine::{Flusher, submit};
use crate::ring::sim::{Faults, SimRing, get};
use crate::ring::{Core, Tasks};
use std::cell::RefCell;
use std::rc::Rc;

/// What an image may grow to in these tests.
const MOST: usize = 64 << 20;

/// Sectors of the disk whose power is cut.
const SECTORS: u64 = 96;

fn is_whole(image: &[u8]) {
    let report = look_through(image);
    assert_eq!(report.errors, Vec::<String>::new());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn an_image_keeps_what_it_was_given(
        plan in plan(),
        faults in faults(),
        seed: u64,
        kind in kind(5 * SHARE as u64 * 512),
        base in base(),
        crowded: bool,
    ) {
        let made = Rc::new(Made::new(&kind, base, crowded));
        let volume = made.open();
        let core = Core::new(SimRing::new(seed, faults));
        core.ring().let_grow(MOST);
        let view = {
            let made = made.clone();
            move |image: Vec<u8>| {
                is_whole(&image);
                made.disk(&image)
            }
        };
        let run = Run::new(volume.attach(&core, false), made.bytes.clone(), faults, true).seen(view).giving_up();
        run.run(&core, &plan, |ring| ring.set_faults(Faults::default()));
        is_whole(&core.ring().contents().unwrap());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_power_cut_leaves_an_image_whole(
        slots in slots(SECTORS),
        faults in faults(),
        seed: u64,
        kind in kind(SECTORS * 512),
        base in base(),
        crowded: bool,
        cut_after in 0..250usize,
        written_back in 0..=100u8,
        lost in prop_oneof![3 => Just(0), 1 => 1..40u8],
    ) {
        let made = Made::new(&kind, base, crowded);
        let volume = made.open();
        // Whole sectors.
        let core = Core::new(SimRing::new(seed, Faults { direct: Some((1, 512)), lost, ..faults }));
        core.ring().let_grow(MOST);
        let channel = Rc::new(volume.attach(&core, false));
        let history = Rc::new(RefCell::new(History::new(&made.bytes)));
        work_until_cut(&core, &channel, &history, slots, cut_after);
        core.ring().power_cut(written_back);
        let left = core.ring().contents().unwrap();
        is_whole(&left);
        history.borrow().check(&made.disk(&left));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// The service is killed at any moment, and nothing of what was written to the file goes with it.
    #[test]
    fn what_was_acknowledged_survives_a_kill(
        slots in slots(SECTORS),
        faults in faults(),
        seed: u64,
        kind in kind(SECTORS * 512),
        base in base(),
        crowded: bool,
        cut_after in 0..250usize,
    ) {
        let made = Made::new(&kind, base, crowded);
        let volume = made.open();
        let core = Core::new(SimRing::new(seed, Faults { direct: Some((1, 512)), ..faults }));
        core.ring().let_grow(MOST);
        let channel = Rc::new(volume.attach(&core, false));
        let history = Rc::new(RefCell::new(History::new(&made.bytes)));
        work_until_cut(&core, &channel, &history, slots, cut_after);
        let left = core.ring().contents().unwrap();
        is_whole(&left);
        history.replace(History::new(&[])).killed().check(&made.disk(&left));
    }
}

/// What was written over a base and discarded reads zero, in whole units, and never as the base again.
#[test]
fn a_discard_does_not_show_the_base_again() {
    for extended_l2 in [false, true] {
        let kind = NewImage { size: 1 << 20, cluster_bits: 14, extended_l2, ..NewImage::default() };
        let made = Made::new(&kind, Some(100), false);
        let core = Core::new(SimRing::new(1, Faults::default()));
        core.ring().let_grow(MOST);
        let channel = Rc::new(made.open().attach(&core, false));
        let memory = mapping(64 << 10);
        assert_eq!(once(&core, &channel, transfer(Op::Write, 0, memory)), Ok(()));
        assert_eq!(once(&core, &channel, request(Op::Discard, 0, 64)), Ok(()));
        assert_eq!(once(&core, &channel, transfer(Op::Read, 0, memory)), Ok(()));
        assert!(get(memory, 0, 64 * 512).iter().all(|byte| *byte == 0), "{extended_l2}");
    }
}

/// A request that began before a cluster was given up may read it: it is nobody else's until that is over.
#[test]
fn a_cluster_is_not_reused_under_whoever_may_read_it() {
    let kind = NewImage { size: 1 << 20, cluster_bits: 12, ..NewImage::default() };
    let made = Made::new(&kind, None, false);
    let volume = made.open();
    let AnyStore::Qcow2(store) = &volume.store else { unreachable!() };
    let image = store.image.clone();
    let core = Core::new(SimRing::new(1, Faults::default()));
    core.ring().let_grow(MOST);
    let channel = Rc::new(volume.attach(&core, false));
    let memory = mapping(4096);
    let write = |cluster: u64| {
        assert_eq!(once(&core, &channel, transfer(Op::Write, cluster * 8, memory)), Ok(()));
        assert_eq!(once(&core, &channel, request(Op::Flush, 0, 0)), Ok(()));
    };
    let given_up = || image.owner.lock().unwrap().as_ref().unwrap().given_up.len();
    write(0);
    let reader = image.pins.enter(7);
    assert_eq!(once(&core, &channel, request(Op::Discard, 0, 8)), Ok(()));
    (1..9).for_each(write);
    assert_eq!(given_up(), 1, "somebody may read it");
    drop(reader);
    (9..13).for_each(write);
    assert_eq!(given_up(), 0);
}

/// A range of very many clusters takes long, and others do not wait for it.
#[test]
fn a_large_range_lets_others_pass() {
    let kind = NewImage { size: 64 << 20, cluster_bits: 9, ..NewImage::default() };
    let made = Made::new(&kind, None, false);
    let core = Core::new(SimRing::new(1, Faults::default()));
    core.ring().let_grow(MOST);
    let channel = Rc::new(made.open().attach(&core, false));
    let order: Rc<RefCell<Vec<Op>>> = Rc::default();
    let mut tasks = Tasks::new(core.clone());
    let memory = mapping(4096);
    let large = |op| request(op, 0, (64 << 20) / 512);
    for request in [large(Op::Discard), large(Op::WriteZeroes), transfer(Op::Read, 0, memory)] {
        let (channel, order) = (channel.clone(), order.clone());
        tasks.add(|io| async move {
            submit(&channel, &io, &Flusher::default(), &request).await.unwrap();
            order.borrow_mut().push(request.op);
        });
    }
    settle(&core, &mut tasks);
    assert_eq!(order.borrow()[0], Op::Read);
}
