//! A VMM whose handshake is the vhost crate's, and whose rings are ours.

use super::PATIENCE;
use super::memory::GuestMemory;
use super::queue::{Layout, RawQueue};
use super::ring::Ring;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// INDIRECT_DESC.
pub const INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// The most queues any of our services has.
const MAX_QUEUES: u64 = 16;

/// A connected VMM.
pub struct Vmm {
    pub frontend: Frontend,
    pub memory: Arc<GuestMemory>,
    /// Offered by the device.
    pub offered: u64,
    /// Accepted.
    pub features: u64,
    /// First guest address that nothing is at yet.
    free: u64,
}

/// Enough for four queues of 16 slots.
const MEMORY: u64 = 8 << 20;
/// Where guest memory starts: not at 0, where a forgotten address would point.
pub const BASE: u64 = 0x10_0000;

impl Vmm {
    /// Accepts everything.
    pub fn connect(socket: &Path) -> Vmm {
        Vmm::connect_with(socket, u64::MAX, GuestMemory::new(BASE, MEMORY))
    }

    /// Accepts what is in `mask`, and shows `memory`.
    pub fn connect_with(socket: &Path, mask: u64, memory: GuestMemory) -> Vmm {
        let mut vmm = Vmm::shake_hands(socket, mask, memory);
        vmm.frontend.set_mem_table(&vmm.memory.infos()).unwrap();
        vmm.free = vmm.memory.infos()[0].guest_phys_addr;
        vmm
    }

    /// As far as features, without memory.
    pub fn shake_hands(socket: &Path, mask: u64, memory: GuestMemory) -> Vmm {
        Vmm::shake_hands_with(socket, mask, memory, VhostUserProtocolFeatures::empty())
    }

    /// Accepts everything, and keeps notes of requests in flight and a socket for what the device has to say.
    pub fn connect_with_notes(socket: &Path) -> Vmm {
        let more = VhostUserProtocolFeatures::INFLIGHT_SHMFD | VhostUserProtocolFeatures::BACKEND_REQ;
        let mut vmm = Vmm::shake_hands_with(socket, u64::MAX, GuestMemory::new(BASE, MEMORY), more);
        vmm.frontend.set_mem_table(&vmm.memory.infos()).unwrap();
        vmm.free = BASE;
        vmm
    }

    /// The same, by a VMM that comes back with the memory that it has.
    pub fn connect_sharing(socket: &Path, memory: Arc<GuestMemory>) -> Vmm {
        let more = VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        let mut vmm = Vmm::shake_hands_with(socket, u64::MAX, GuestMemory::new(BASE, 4096), more);
        vmm.memory = memory;
        vmm.frontend.set_mem_table(&vmm.memory.infos()).unwrap();
        vmm
    }

    fn shake_hands_with(
        socket: &Path,
        mask: u64,
        memory: GuestMemory,
        more: VhostUserProtocolFeatures,
    ) -> Vmm {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut frontend = Frontend::from_stream(stream, MAX_QUEUES);
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        frontend
            .set_protocol_features(
                protocol
                    & (VhostUserProtocolFeatures::MQ
                        | VhostUserProtocolFeatures::CONFIG
                        | VhostUserProtocolFeatures::REPLY_ACK
                        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
                        | more),
            )
            .unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        // Bit 30 is vhost-user's own, and not the driver's to refuse.
        let features = offered & (mask | 1 << 30);
        frontend.set_features(features).unwrap();
        Vmm { frontend, memory: Arc::new(memory), offered, features, free: 0 }
    }

    /// Guest memory for something.
    pub fn take(&mut self, bytes: u64) -> u64 {
        let at = self.free;
        self.free += bytes.next_multiple_of(4096);
        at
    }

    /// A ring that the device knows nothing of.
    pub fn ring(&mut self, size: u16) -> Ring {
        let at = self.take(Ring::bytes(size));
        Ring::new(&self.memory, at, size, self.features & EVENT_IDX != 0)
    }

    /// Has the device serve a ring as queue `index`, from its `next_avail` on.
    pub fn start(&mut self, index: usize, ring: &Ring) {
        self.prepare(index, ring);
        self.frontend.set_vring_enable(index, true).unwrap();
    }

    /// The same, disabled.
    pub fn prepare(&mut self, index: usize, ring: &Ring) {
        self.frontend.set_vring_num(index, ring.size).unwrap();
        self.frontend.set_vring_addr(index, &ring.config()).unwrap();
        self.frontend.set_vring_base(index, ring.next_used).unwrap();
        self.frontend.set_vring_err(index, &ring.err).unwrap();
        self.frontend.set_vring_call(index, &ring.call).unwrap();
        self.frontend.set_vring_kick(index, &ring.kick).unwrap();
    }

    /// A running queue with `slots` requests at most.
    pub fn queue(&mut self, index: usize, size: u16, layout: Layout, slots: usize) -> RawQueue {
        let queue = self.idle_queue(size, layout, slots);
        self.start(index, &queue.ring);
        queue
    }

    /// A queue that the device knows nothing of.
    pub fn idle_queue(&mut self, size: u16, layout: Layout, slots: usize) -> RawQueue {
        let ring = self.ring(size);
        let at = self.take(RawQueue::bytes(size, slots) - Ring::bytes(size));
        RawQueue::new(ring, layout, at, slots)
    }

    /// A part of the configuration space.
    pub fn config(&mut self, offset: u32, len: usize) -> Vec<u8> {
        let flags = VhostUserConfigFlags::empty();
        self.frontend.get_config(offset, len as u32, flags, &vec![0; len]).unwrap().1
    }

    /// The driver's write to it.
    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) {
        self.frontend.set_config(offset, VhostUserConfigFlags::WRITABLE, bytes).unwrap();
    }
}

/// A working queue 0 of everyday shape, to see that an export serves.
pub fn everyday(socket: &Path) -> (Vmm, RawQueue) {
    let mut vmm = Vmm::connect(socket);
    let queue = vmm.queue(0, 64, Layout::Plain, 16);
    (vmm, queue)
}
