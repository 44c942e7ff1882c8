//! A guest and its VMM: memory, rings, a thread for each queue, and the connection that comes and goes.

use super::common::memory::{GuestMemory, Region};
use super::common::model::Random;
use super::common::queue::{Layout, RawQueue};
use super::common::ring::Ring;
use super::common::vmm::{BASE, EVENT_IDX, INDIRECT};
use super::load::Load;
use super::queue::{Driver, Shared};
use super::session::Vmm;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

/// What a guest is like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub queues: usize,
    /// Requests in flight in each queue.
    pub depth: usize,
    /// Descriptors in a ring.
    pub size: u16,
    pub layout: Layout,
    pub event_idx: bool,
    /// Whether the VMM keeps notes of what is in flight.
    pub inflight: bool,
    pub load: Load,
}

impl Shape {
    /// Any.
    pub fn any(random: &mut Random, block: u64) -> Shape {
        Shape {
            queues: 1 + random.below(2) as usize,
            depth: [1, 4, 16, 32, 64, 1 + random.below(64) as usize][random.below(6) as usize],
            size: [128, 256][random.below(2) as usize],
            layout: [Layout::Plain, Layout::Joined, Layout::Pieces, Layout::Indirect]
                [random.below(4) as usize],
            event_idx: random.below(4) != 0,
            inflight: random.below(8) != 0,
            load: Load::any(random, block),
        }
    }
}

/// A guest, dead or alive.
pub struct Guest {
    pub vmm: Vmm,
    shared: Arc<Shared>,
    idle: Vec<Driver>,
    busy: Vec<JoinHandle<Driver>>,
}

impl Guest {
    /// A guest that has not begun. `offered` is what the device offers.
    pub fn new(shape: &Shape, shared: &Arc<Shared>, offered: u64, seed: u64) -> Guest {
        let ring_bytes = Ring::bytes(shape.size);
        let slot_bytes = (RawQueue::bytes(shape.size, shape.depth) - ring_bytes).next_multiple_of(4096);
        let each = ring_bytes + slot_bytes;
        let len = each * shape.queues as u64;
        // Two regions, with a hole between them that is not in the file.
        let first = Region { gpa: BASE, len: each, offset: 0 };
        let rest = Region { gpa: BASE + (1 << 30), len: len - each, offset: each };
        let regions = [first, rest];
        let memory = Arc::new(GuestMemory::with_regions(&regions[..shape.queues]));
        let mut mask = !(EVENT_IDX | INDIRECT);
        mask |= if shape.event_idx { EVENT_IDX } else { 0 };
        mask |= if shape.layout == Layout::Indirect { INDIRECT } else { 0 };
        let features = offered & mask;
        let drivers = (0..shape.queues).map(|index| {
            let at = regions[index].gpa;
            let ring = Ring::new(&memory, at, shape.size, features & EVENT_IDX != 0);
            let queue = RawQueue::new(ring, shape.layout, at + ring_bytes, shape.depth);
            Driver::new(queue, index, shared, shape.load, seed ^ (index as u64 + 1))
        });
        let idle: Vec<Driver> = drivers.collect();
        let rings = idle.iter().map(|driver| &driver.queue.ring);
        let vmm = Vmm::new(&memory, rings, features, shape.inflight);
        Guest { vmm, shared: shared.clone(), idle, busy: Vec::new() }
    }

    /// Its queues begin.
    pub fn run(&mut self) {
        self.shared.halt.store(false, Ordering::Release);
        self.shared.drain.store(false, Ordering::Release);
        self.busy = self.idle.drain(..).map(|driver| std::thread::spawn(|| driver.run())).collect();
    }

    /// Its queues, which must not run, will do nothing but read.
    pub fn only_read(&mut self) {
        for driver in &mut self.idle {
            driver.load = Load { reads: 100, others: 0, ..driver.load };
        }
    }

    fn join(&mut self) {
        self.idle = self.busy.drain(..).map(|thread| thread.join().expect("a queue's thread")).collect();
    }

    /// Its queues end in the middle of what they do.
    pub fn halt(&mut self) {
        self.shared.halt.store(true, Ordering::Release);
        self.join();
    }

    /// Its queues end when nothing is in flight any more.
    pub fn drain(&mut self) {
        self.shared.drain.store(true, Ordering::Release);
        self.join();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.halt();
    }
}
