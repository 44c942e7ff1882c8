//! A guest and its VMM: memory, rings, a thread for each queue, and the connection that comes and goes.

use super::common::memory::{GuestMemory, Region};
use super::common::model::Random;
use super::common::player::{Broken, Connection, Player};
use super::common::profile::{Base, Profile};
use super::common::queue::{Layout, RawQueue};
use super::common::ring::Ring;
use super::common::vmm::{BASE, EVENT_IDX, INDIRECT};
use super::load::Load;
use super::queue::{Driver, Shared};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

/// What a guest is like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub profile: &'static Profile,
    pub queues: usize,
    /// Requests in flight in each queue.
    pub depth: usize,
    pub layout: Layout,
    pub event_idx: bool,
    /// Whether the VMM keeps notes of what is in flight.
    pub inflight: bool,
    pub load: Load,
}

impl Shape {
    /// Any that this VMM's guest can have.
    pub fn any(random: &mut Random, profile: &'static Profile, block: u64) -> Shape {
        let layouts: &[Layout] = match (profile.segments, profile.has(VIRTIO_RING_F_INDIRECT_DESC)) {
            (false, _) => &[Layout::Plain, Layout::Joined],
            (true, false) => &[Layout::Plain, Layout::Joined, Layout::Pieces],
            (true, true) => &[Layout::Plain, Layout::Joined, Layout::Pieces, Layout::Indirect],
        };
        Shape {
            profile,
            queues: 1 + random.below(profile.queues as u64) as usize,
            depth: [1, 4, 16, 32, 64, 1 + random.below(64) as usize][random.below(6) as usize],
            layout: layouts[random.below(layouts.len() as u64) as usize],
            event_idx: random.below(4) != 0,
            inflight: true,
            load: Load::any(random, block, profile.has(VIRTIO_BLK_F_DISCARD)),
        }
    }

    /// Sectors in the largest logical block that this VMM's guest learns of.
    pub fn most_block(profile: &Profile) -> u64 {
        if profile.has(VIRTIO_BLK_F_BLK_SIZE) { 8 } else { 1 }
    }

    /// Whether the VMM and its guest go on after a planned restart, when nothing is in flight.
    pub fn survives_stop(&self) -> bool {
        // One that sends the available index needs notes that know better.
        self.profile.again.is_some() && (self.inflight || self.profile.base == Base::Used)
    }

    /// Whether they go on after a kill.
    pub fn survives_kill(&self) -> bool {
        self.profile.again.is_some() && self.inflight
    }

    /// The VMM connects, before there is a guest.
    pub fn connect(&self, socket: &Path, limit: Duration) -> Result<Connection, Broken> {
        Connection::open(self.profile, socket, limit, self.queues, self.inflight)
    }
}

/// A guest, dead or alive.
pub struct Guest {
    pub vmm: Player,
    shared: Arc<Shared>,
    idle: Vec<Driver>,
    busy: Vec<JoinHandle<Driver>>,
}

impl Guest {
    /// A guest that has not begun, of a VMM that is connected.
    pub fn new(shape: &Shape, shared: &Arc<Shared>, connection: Connection, seed: u64) -> Guest {
        let size = shape.profile.size;
        let ring_bytes = Ring::bytes(size);
        let slot_bytes = (RawQueue::bytes(size, shape.depth) - ring_bytes).next_multiple_of(4096);
        let each = ring_bytes + slot_bytes;
        let len = each * shape.queues as u64;
        // Two regions, with a hole between them that is not in the file.
        let first = Region { gpa: BASE, len: each, offset: 0 };
        let rest = Region { gpa: BASE + (1 << 30), len: len - each, offset: each };
        let regions = [first, rest];
        let memory = Arc::new(GuestMemory::with_regions(&regions[..shape.queues]));
        let mut mask = shape.profile.features & !(EVENT_IDX | INDIRECT);
        mask |= if shape.event_idx { EVENT_IDX } else { 0 };
        mask |= if shape.layout == Layout::Indirect { INDIRECT } else { 0 };
        let features = connection.offered & mask;
        let drivers = (0..shape.queues).map(|index| {
            let at = regions[index].gpa;
            let mut ring = Ring::new(&memory, at, size, features & EVENT_IDX != 0);
            if shape.profile.blocking {
                ring.block();
            }
            let queue = RawQueue::new(ring, shape.layout, at + ring_bytes, shape.depth);
            let polls = shape.profile.polls;
            Driver::new(queue, index, shared, shape.load, polls, seed ^ (index as u64 + 1))
        });
        let idle: Vec<Driver> = drivers.collect();
        let rings = idle.iter().map(|driver| &driver.queue.ring);
        let vmm = Player::new(&memory, rings, features, connection);
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
