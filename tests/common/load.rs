//! Plain load: one queue of a VMM, every request alike, a number of them always in flight.

use super::PATIENCE;
use super::memory::GuestMemory;
use super::ring::{Ring, Segment};
use super::vmm::{BASE, EVENT_IDX, Vmm};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

/// Descriptors in the queue.
const SIZE: u16 = 128;

/// A VMM and its queue 0.
pub struct Load {
    _vmm: Vmm,
    ring: Ring,
    /// The chains, by request.
    requests: Vec<[Segment; 3]>,
    polls: bool,
}

impl Load {
    /// Connects to `socket`, for `depth` requests of `bytes` at once, the first of which is for sector 0. One that
    /// `polls` wants no calls.
    pub fn connect(socket: &Path, write: bool, bytes: u32, depth: u32, polls: bool) -> Load {
        Load::skewed(socket, write, bytes, depth, polls, 0)
    }

    /// The same, with data so many bytes past a page's beginning.
    pub fn skewed(socket: &Path, write: bool, bytes: u32, depth: u32, polls: bool, skew: u64) -> Load {
        let each = (u64::from(bytes) + skew + 32 + 1).next_multiple_of(4096);
        let memory = GuestMemory::new(BASE, Ring::bytes(SIZE) + u64::from(depth) * each);
        let mut vmm = Vmm::connect_with(socket, !EVENT_IDX, memory);
        let ring = vmm.ring(SIZE);
        vmm.start(0, &ring);
        if polls {
            // VRING_AVAIL_F_NO_INTERRUPT
            vmm.memory.half(ring.avail).store(1u16.to_le(), Ordering::Relaxed);
        }
        let kind = if write { VIRTIO_BLK_T_OUT } else { VIRTIO_BLK_T_IN };
        let requests = (0..depth).map(|number| {
            let at = vmm.take(each);
            let header = at + (skew + u64::from(bytes)).next_multiple_of(16);
            vmm.memory.write(header, &kind.to_le_bytes());
            vmm.memory.write(header + 8, &(u64::from(number) * u64::from(bytes / 512)).to_le_bytes());
            [
                Segment { addr: header, len: 16, write: false },
                Segment { addr: at + skew, len: bytes, write: !write },
                Segment { addr: header + 16, len: 1, write: true },
            ]
        });
        let requests = requests.collect();
        Load { _vmm: vmm, ring, requests, polls }
    }

    /// Carries `count` requests out.
    pub fn run(&mut self, count: usize) {
        let mut waiting: Vec<usize> = (0..self.requests.len()).collect();
        let mut owner = vec![0; usize::from(SIZE)];
        let (mut offered, mut done) = (0, 0);
        let mut last = Instant::now();
        while done < count {
            let before = offered;
            while offered < count
                && let Some(request) = waiting.pop()
            {
                owner[usize::from(self.ring.add(&self.requests[request]))] = request;
                offered += 1;
            }
            if offered > before {
                self.ring.publish();
            }
            let used = if self.polls { self.ring.reap() } else { self.ring.wait(PATIENCE) };
            if !used.is_empty() {
                last = Instant::now();
            }
            assert!(last.elapsed() < PATIENCE, "{} requests never complete", self.ring.in_flight());
            for used in used {
                let request = owner[usize::from(used.head)];
                let status = self.requests[request][2].addr;
                assert_eq!(self.ring.memory.get(status, 1), [0], "the status of a request");
                waiting.push(request);
                done += 1;
            }
        }
    }
}
