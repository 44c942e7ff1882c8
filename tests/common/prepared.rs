//! A vring whose requests are laid out beforehand, on a worker of this process: what is left to the guest's side is a
//! store and a load, so that what is measured is ours.
//!
//! A batch is all of its requests at once. Each is complete before the next batch is offered, so a request's
//! descriptors serve again and again.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use ringblk::block::Geometry;
use ringblk::frontend::vhost_user::{CallFd, Device, Memory, VringSetup};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Descriptors in the vring: enough for a batch of 32 with 16 segments each.
const SIZE: u16 = 1024;
const AVAIL: u64 = 0x1_0000;
const USED: u64 = 0x2_0000;
/// A page of header, status and indirect table for each request, then its data.
const REQUESTS: u64 = 0x3_0000;

/// What every request of a batch is.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// The device reads its data.
    pub write: bool,
    /// Bytes of data in all.
    pub bytes: u32,
    /// Data descriptors, equal parts of it.
    pub segments: u32,
    /// All descriptors in a table of their own.
    pub indirect: bool,
    /// Requests in a batch; a power of two.
    pub depth: u16,
}

/// 32 reads of 4 KiB in one piece.
pub const READ_4K: Shape = Shape { write: false, bytes: 4096, segments: 1, indirect: false, depth: 32 };

/// The guest.
pub struct Prepared {
    mappings: Arc<GuestMemoryMmap<()>>,
    shape: Shape,
    offered: u16,
    kick: Arc<File>,
    call: File,
}

fn event() -> File {
    // As QEMU makes them: the worker needs one call to write to it, and not another to see that it can.
    let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap();
    File::from(OwnedFd::from(event))
}

impl Prepared {
    /// Lays the requests out, each on other sectors, from the first on.
    pub fn new(shape: Shape) -> Prepared {
        let Shape { depth, bytes, segments, indirect, .. } = shape;
        assert!(depth.is_power_of_two() && bytes.is_multiple_of(segments));
        let stride = 4096 + u64::from(bytes).next_multiple_of(4096);
        let len = REQUESTS + u64::from(depth) * stride;
        let mappings = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len as usize)]).unwrap();
        let put = |at: u64, bytes: &[u8]| mappings.write_slice(bytes, GuestAddress(at)).unwrap();
        let descriptor = |at: u64, addr: u64, len: u32, flags: u32, next: u32| {
            put(at, &addr.to_le_bytes());
            put(at + 8, &len.to_le_bytes());
            put(at + 12, &(flags as u16).to_le_bytes());
            put(at + 14, &(next as u16).to_le_bytes());
        };
        for request in 0..depth {
            let page = REQUESTS + u64::from(request) * stride;
            let (header, status, inner, data) = (page, page + 16, page + 32, page + 4096);
            let kind = if shape.write { VIRTIO_BLK_T_OUT } else { VIRTIO_BLK_T_IN };
            put(header, &kind.to_le_bytes());
            put(header + 8, &(u64::from(request) * u64::from(bytes / 512)).to_le_bytes());
            // A chain's place in the vring's table: descriptors of their own, or one for the indirect table.
            let (table, first) = if indirect { (inner, 0) } else { (0, u32::from(request) * (segments + 2)) };
            let one = |place: u32, addr: u64, len: u32, flags: u32| {
                descriptor(table + 16 * u64::from(first + place), addr, len, flags, first + place + 1);
            };
            one(0, header, 16, VRING_DESC_F_NEXT);
            let part = bytes / segments;
            let flags = VRING_DESC_F_NEXT | if shape.write { 0 } else { VRING_DESC_F_WRITE };
            for segment in 0..segments {
                one(1 + segment, data + u64::from(segment * part), part, flags);
            }
            one(1 + segments, status, 1, VRING_DESC_F_WRITE);
            let head = if indirect { request } else { first as u16 };
            if indirect {
                let at = 16 * u64::from(head);
                descriptor(at, inner, 16 * (segments + 2), VRING_DESC_F_INDIRECT, 0);
            }
            // The avail ring is filled once: what is offered next has always been offered there before.
            for place in (request..SIZE).step_by(depth.into()) {
                put(AVAIL + 4 + 2 * u64::from(place), &head.to_le_bytes());
            }
        }
        Prepared { mappings: Arc::new(mappings), shape, offered: 0, kick: Arc::new(event()), call: event() }
    }

    /// What the vring starts with. With `called`, each batch of completions is told through the call descriptor.
    pub fn setup(&self, called: bool) -> VringSetup {
        let geometry = Geometry::new(1 << 30, 512).unwrap();
        VringSetup {
            index: 0,
            device: Arc::new(Device::new("prepared", "none", geometry, false)),
            memory: Arc::new(Memory::new(self.mappings.clone()).unwrap()),
            size: SIZE,
            desc_table: 0,
            avail_ring: AVAIL,
            used_ring: USED,
            next_avail: 0,
            unfinished: Vec::new(),
            enabled: true,
            read_only: false,
            features: 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC,
            event_idx: false,
            kick: self.kick.clone(),
            call: called.then(|| CallFd::new(&self.call).unwrap()),
            err: None,
            inflight: None,
        }
    }

    fn half(&self, at: u64) -> &AtomicU16 {
        let host = self.mappings.get_host_address(GuestAddress(at)).unwrap();
        // SAFETY: mapped as long as we live, aligned, and an atomic may change behind our back.
        unsafe { &*host.cast::<AtomicU16>() }
    }

    /// Makes a batch available, without a kick. How many requests that is.
    pub fn offer(&mut self) -> u16 {
        self.offered = self.offered.wrapping_add(self.shape.depth);
        self.half(AVAIL + 2).store(self.offered.to_le(), Ordering::Release);
        self.shape.depth
    }

    /// Whether everything offered is complete.
    pub fn is_done(&self) -> bool {
        u16::from_le(self.half(USED + 2).load(Ordering::Acquire)) == self.offered
    }

    /// Has the worker look, whether it asked for that or not.
    pub fn kick(&self) {
        (&*self.kick).write_all(&1u64.to_ne_bytes()).unwrap();
    }

    /// One batch by a polling guest: kicks if it must, and looks until everything is complete.
    pub fn batch_polled(&mut self) {
        self.offer();
        // Either the device sees the requests before it sleeps, or we see that it wants a kick.
        fence(Ordering::SeqCst);
        if self.half(USED).load(Ordering::Relaxed) == 0 {
            self.kick();
        }
        while !self.is_done() {
            std::hint::spin_loop();
        }
    }

    /// One batch by an event-driven guest: kicks, and sleeps until it is called and everything is complete.
    pub fn batch(&mut self) {
        self.offer();
        self.kick();
        while !self.is_done() {
            poll(&mut [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
            (&self.call).read_exact(&mut [0; 8]).unwrap();
        }
    }

    /// Asserts that every request of the last batch succeeded.
    pub fn check(&self) {
        let stride = 4096 + u64::from(self.shape.bytes).next_multiple_of(4096);
        for request in 0..u64::from(self.shape.depth) {
            let at = GuestAddress(REQUESTS + request * stride + 16);
            assert_eq!(self.mappings.read_obj::<u8>(at).unwrap(), 0, "the status of request {request}");
        }
    }
}
