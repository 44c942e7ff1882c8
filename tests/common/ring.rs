//! The driver's side of a split virtqueue (virtio 1.3 section 2.7), with nothing hidden.

use super::memory::{GuestMemory, VMM_OFFSET};
use super::{PATIENCE, readable};
use std::collections::HashMap;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;
use vhost::VringConfigData;
use vmm_sys_util::eventfd::EventFd;

/// Descriptor flags.
pub const NEXT: u16 = 1;
/// The device writes.
pub const WRITE: u16 = 2;
/// The buffer is a table.
pub const INDIRECT: u16 = 4;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// The device writes it.
    pub write: bool,
}

/// A used element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The chain's first descriptor.
    pub head: u16,
    /// Bytes the device says it wrote.
    pub len: u32,
}

/// One vring.
pub struct Ring {
    pub memory: Arc<GuestMemory>,
    pub size: u16,
    /// Guest addresses of the three areas.
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    pub event_idx: bool,
    /// Next places, counted on without end.
    pub next_avail: u16,
    pub next_used: u16,
    /// Avail index when the device was last considered for a kick.
    kicked: u16,
    pub kick: EventFd,
    pub call: EventFd,
    pub err: EventFd,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
}

fn event() -> EventFd {
    EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).unwrap()
}

impl Ring {
    /// Bytes a ring takes, with its alignments.
    pub fn bytes(size: u16) -> u64 {
        (26 * u64::from(size) + 64).next_multiple_of(4096)
    }

    /// An empty ring at guest address `at`.
    pub fn new(memory: &Arc<GuestMemory>, at: u64, size: u16, event_idx: bool) -> Ring {
        let count = u64::from(size);
        let avail = at + 16 * count;
        let used = (avail + 6 + 2 * count).next_multiple_of(4);
        memory.write(at, &vec![0; Ring::bytes(size) as usize]);
        Ring {
            memory: memory.clone(),
            size,
            desc: at,
            avail,
            used,
            event_idx,
            next_avail: 0,
            next_used: 0,
            kicked: 0,
            kick: event(),
            call: event(),
            err: event(),
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
        }
    }

    /// Where it is, for SET_VRING_NUM and SET_VRING_ADDR.
    pub fn config(&self) -> VringConfigData {
        VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: 0,
            desc_table_addr: self.desc + VMM_OFFSET,
            used_ring_addr: self.used + VMM_OFFSET,
            avail_ring_addr: self.avail + VMM_OFFSET,
            log_addr: None,
        }
    }

    /// Copies the ring, as it is, to another place in memory.
    pub fn relocate(&mut self, at: u64) {
        let from = self.desc;
        let bytes = self.memory.get(from, Ring::bytes(self.size) as usize);
        self.memory.write(at, &bytes);
        (self.desc, self.avail, self.used) = (at, at + self.avail - from, at + self.used - from);
    }

    /// Has descriptors that reading and writing may wait for.
    pub fn block(&mut self) {
        let blocking = || EventFd::new(libc::EFD_CLOEXEC).unwrap();
        (self.kick, self.call, self.err) = (blocking(), blocking(), blocking());
    }

    /// New kick and call descriptors.
    pub fn replace_kick(&mut self) -> EventFd {
        std::mem::replace(&mut self.kick, event())
    }

    /// The same for call.
    pub fn replace_call(&mut self) -> EventFd {
        std::mem::replace(&mut self.call, event())
    }

    /// Descriptors not in use.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Chains the device has.
    pub fn in_flight(&self) -> usize {
        self.chains.len()
    }

    /// Writes a descriptor into a table anywhere.
    pub fn descriptor(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write(table + 16 * u64::from(index), &bytes);
    }

    /// Puts a head into the avail ring, whatever it is; the device does not see it before [`publish`].
    ///
    /// [`publish`]: Ring::publish
    pub fn offer(&mut self, head: u16) {
        let place = self.avail + 4 + 2 * u64::from(self.next_avail % self.size);
        self.memory.write(place, &head.to_le_bytes());
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Builds a chain of free descriptors and offers it.
    pub fn add(&mut self, segments: &[Segment]) -> u16 {
        let chain = self.free.split_off(self.free.len() - segments.len());
        for (place, segment) in segments.iter().enumerate() {
            let next = chain.get(place + 1).copied();
            let flags = if segment.write { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            self.descriptor(self.desc, chain[place], segment.addr, segment.len, flags, next.unwrap_or(0));
        }
        self.given(chain)
    }

    /// The same in a table at `table`, which takes one descriptor of the ring.
    pub fn add_indirect(&mut self, table: u64, segments: &[Segment]) -> u16 {
        for (place, segment) in segments.iter().enumerate() {
            let last = place + 1 == segments.len();
            let flags = if segment.write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.descriptor(table, place as u16, segment.addr, segment.len, flags, place as u16 + 1);
        }
        let head = self.free.pop().expect("a free descriptor");
        self.descriptor(self.desc, head, table, 16 * segments.len() as u32, INDIRECT, 0);
        self.given(vec![head])
    }

    fn given(&mut self, chain: Vec<u16>) -> u16 {
        let head = chain[0];
        self.chains.insert(head, chain);
        self.offer(head);
        head
    }

    /// Makes everything offered available, and kicks if the device wants it.
    pub fn publish(&mut self) {
        if self.expose() {
            self.kick.write(1).unwrap();
        }
    }

    /// Makes everything offered available. Whether the device wants a kick.
    pub fn expose(&mut self) -> bool {
        let new = self.next_avail;
        self.memory.half(self.avail + 2).store(new.to_le(), Ordering::Release);
        // Either the device sees the index, or we see that it wants a kick.
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.kicked, new);
        if self.event_idx {
            let event = self.used + 4 + 8 * u64::from(self.size);
            let event = u16::from_le(self.memory.half(event).load(Ordering::Relaxed));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.memory.half(self.used).load(Ordering::Relaxed) == 0
        }
    }

    /// The device's index.
    pub fn used_idx(&self) -> u16 {
        u16::from_le(self.memory.half(self.used + 2).load(Ordering::Acquire))
    }

    /// What has been used since the last time.
    pub fn reap(&mut self) -> Vec<Used> {
        let mut all = Vec::new();
        while self.used_idx() != self.next_used {
            let place = self.used + 4 + 8 * u64::from(self.next_used % self.size);
            let bytes = self.memory.get(place, 8);
            let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            let used = Used { head: word(0) as u16, len: word(4) };
            self.next_used = self.next_used.wrapping_add(1);
            // A chain that a test built by hand is not here.
            if let Some(chain) = self.chains.remove(&used.head) {
                self.free.extend(chain);
            }
            all.push(used);
        }
        all
    }

    /// The same, sleeping on the call descriptor until there is something; empty after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Vec<Used> {
        loop {
            let used = self.reap();
            if !used.is_empty() {
                return used;
            }
            let event = self.avail + 4 + 2 * u64::from(self.size);
            self.memory.half(event).store(self.next_used.to_le(), Ordering::Relaxed);
            // Either the device sees that we want a call, or we see what it used.
            fence(Ordering::SeqCst);
            if self.used_idx() != self.next_used {
                continue;
            }
            // SAFETY: the descriptor is open as long as the ring is.
            let call = unsafe { BorrowedFd::borrow_raw(self.call.as_raw_fd()) };
            if !readable(call, limit) {
                return Vec::new();
            }
            self.call.read().unwrap();
        }
    }

    /// Waits for `count` used elements, or fails.
    pub fn expect(&mut self, count: usize) -> Vec<Used> {
        let mut all = Vec::new();
        while all.len() < count {
            let more = self.wait(PATIENCE);
            assert!(!more.is_empty(), "{} of {count} requests completed, and no more", all.len());
            all.extend(more);
        }
        assert_eq!(all.len(), count, "more completions than requests");
        all
    }
}
