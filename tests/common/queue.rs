//! Requests on a [`Ring`], laid out in one of the ways that the standard allows.

use super::PATIENCE;
use super::model::{Op, Queue};
use super::ring::{Ring, Segment};
use std::collections::HashMap;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

/// How a request becomes descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Header, data, status: a descriptor each.
    Plain,
    /// What is contiguous and of one direction in one descriptor: header and data, data and status.
    Joined,
    /// Header in two, data in pieces of odd lengths with empty descriptors between.
    Pieces,
    /// As pieces, in an indirect table.
    Indirect,
}

/// A status byte that the device never writes.
pub const UNTOUCHED: u8 = 0xaa;

/// The most data in one request.
pub const MAX_LEN: usize = 64 << 10;

/// A page for header, ranges and indirect table; the data; a page that begins with the status byte.
const STRIDE: u64 = 4096 + MAX_LEN as u64 + 4096;
/// Of the data in a slot. The header is right before, the status byte right behind the data.
const DATA: u64 = 4096;

/// A ring with memory for requests.
pub struct RawQueue {
    pub ring: Ring,
    pub layout: Layout,
    slots_at: u64,
    slots: usize,
    /// Head to slot and data length.
    busy: HashMap<u16, (usize, usize)>,
}

impl RawQueue {
    /// Bytes a queue with so many slots takes.
    pub fn bytes(size: u16, slots: usize) -> u64 {
        Ring::bytes(size) + slots as u64 * STRIDE
    }

    /// The slots' memory starts at `slots_at`.
    pub fn new(ring: Ring, layout: Layout, slots_at: u64, slots: usize) -> RawQueue {
        RawQueue { ring, layout, slots_at, slots, busy: HashMap::new() }
    }

    /// Guest address of a slot's data.
    pub fn data(&self, slot: usize) -> u64 {
        self.slots_at + slot as u64 * STRIDE + DATA
    }

    /// The chain of a request, not offered yet. Data of a write is there already.
    pub fn chain(&self, slot: usize, kind: u32, sector: u64, data: Segment) -> Vec<Segment> {
        let memory = &self.ring.memory;
        let at = self.data(slot);
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        memory.write(at - 16, &header);
        let status = at + u64::from(data.len);
        memory.write(status, &[UNTOUCHED]);
        let header = Segment { addr: at - 16, len: 16, write: false };
        let status = Segment { addr: status, len: 1, write: true };
        let plain: Vec<Segment> = [header, data, status].into_iter().filter(|part| part.len > 0).collect();
        match self.layout {
            Layout::Plain => plain,
            Layout::Joined => join(&plain),
            Layout::Pieces | Layout::Indirect => pieces(&plain),
        }
    }

    /// Offers a chain as the layout has it.
    pub fn offer(&mut self, slot: usize, segments: &[Segment], data_len: usize) {
        let head = match self.layout {
            Layout::Indirect => self.ring.add_indirect(self.data(slot) - DATA, segments),
            _ => self.ring.add(segments),
        };
        self.busy.insert(head, (slot, data_len));
    }

    /// One request from start to end: its status and what the device says it wrote.
    pub fn one(&mut self, op: Op, data: &[u8]) -> (u8, u32) {
        if !data.is_empty() {
            self.ring.memory.write(self.data(0), data);
        }
        self.submit(0, op);
        self.kick();
        let used = self.ring.expect(1)[0];
        let (slot, len) = self.busy.remove(&used.head).expect("our request");
        (self.status(slot, len), used.len)
    }

    /// Reads one range.
    pub fn read(&mut self, sector: u64, sectors: u32) -> (u8, Vec<u8>) {
        let (status, _) = self.one(Op::Read { sector, sectors }, &[]);
        (status, self.ring.memory.get(self.data(0), sectors as usize * 512))
    }

    /// Writes one range.
    pub fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        self.one(Op::Write { sector, sectors: (bytes.len() / 512) as u32 }, bytes).0
    }

    /// Discards or zeroes any ranges of (sector, sectors, flags).
    pub fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in ranges {
            bytes.extend_from_slice(&sector.to_le_bytes());
            bytes.extend_from_slice(&sectors.to_le_bytes());
            bytes.extend_from_slice(&flags.to_le_bytes());
        }
        self.send(kind, 0, &bytes, false).0
    }

    /// A request of any kind whose data is `data`, written by the device if `write`: status, and what the device says
    /// it wrote.
    pub fn send(&mut self, kind: u32, sector: u64, data: &[u8], write: bool) -> (u8, u32) {
        self.ring.memory.write(self.data(0), data);
        let segment = Segment { addr: self.data(0), len: data.len() as u32, write };
        let chain = self.chain(0, kind, sector, segment);
        self.offer(0, &chain, data.len());
        self.kick();
        let used = self.ring.expect(1)[0];
        self.busy.remove(&used.head).expect("our request");
        (self.status(0, data.len()), used.len)
    }

    fn status(&self, slot: usize, data_len: usize) -> u8 {
        self.ring.memory.get(self.data(slot) + data_len as u64, 1)[0]
    }

    /// Which slots the used elements are of, and their status.
    pub fn settle(&mut self, used: &[super::ring::Used]) -> Vec<(usize, u8)> {
        let mut all = Vec::new();
        for used in used {
            all.push(self.completed(used.head).expect("a completion of a request in flight"));
        }
        all
    }

    /// The slot of the request with this head, which is not in flight any more, and its status byte; `None` where there
    /// is no such request.
    pub fn completed(&mut self, head: u16) -> Option<(usize, u8)> {
        let (slot, len) = self.busy.remove(&head)?;
        Some((slot, self.status(slot, len)))
    }
}

fn join(plain: &[Segment]) -> Vec<Segment> {
    let mut joined: Vec<Segment> = Vec::new();
    for part in plain {
        match joined.last_mut() {
            Some(last) if last.write == part.write && last.addr + u64::from(last.len) == part.addr => {
                last.len += part.len;
            }
            _ => joined.push(*part),
        }
    }
    joined
}

fn pieces(plain: &[Segment]) -> Vec<Segment> {
    let mut parts = Vec::new();
    for part in plain {
        // At most a handful for each, with no regard to sectors.
        let step = match part.len {
            16 => 5,
            len => len / 3 + 1,
        };
        let mut at = 0;
        while at < part.len {
            let len = step.min(part.len - at);
            parts.push(Segment { addr: part.addr + u64::from(at), len, write: part.write });
            at += len;
        }
        parts.push(Segment { len: 0, ..*part });
    }
    parts
}

/// The most descriptors a request of this layout takes.
pub fn descriptors(layout: Layout) -> usize {
    match layout {
        Layout::Plain => 3,
        Layout::Joined => 2,
        Layout::Pieces => 14,
        Layout::Indirect => 1,
    }
}

impl Queue for RawQueue {
    fn slots(&self) -> usize {
        self.slots.min(self.ring.size as usize / descriptors(self.layout))
    }

    fn max_len(&self) -> usize {
        MAX_LEN
    }

    fn put(&mut self, slot: usize, bytes: &[u8]) {
        self.ring.memory.write(self.data(slot), bytes);
    }

    fn get(&self, slot: usize, bytes: &mut [u8]) {
        self.ring.memory.read(self.data(slot), bytes);
    }

    fn submit(&mut self, slot: usize, op: Op) {
        let (kind, sector, len, write) = match op {
            Op::Read { sector, sectors } => (VIRTIO_BLK_T_IN, sector, sectors * 512, true),
            Op::Write { sector, sectors } => (VIRTIO_BLK_T_OUT, sector, sectors * 512, false),
            Op::Flush => (VIRTIO_BLK_T_FLUSH, 0, 0, false),
            Op::GetId => (VIRTIO_BLK_T_GET_ID, 0, 20, true),
            Op::Discard { sector, sectors } => {
                self.range(slot, sector, sectors, 0);
                (VIRTIO_BLK_T_DISCARD, 0, 16, false)
            }
            Op::WriteZeroes { sector, sectors, unmap } => {
                self.range(slot, sector, sectors, unmap.into());
                (VIRTIO_BLK_T_WRITE_ZEROES, 0, 16, false)
            }
        };
        let data = Segment { addr: self.data(slot), len, write };
        let chain = self.chain(slot, kind, sector, data);
        self.offer(slot, &chain, len as usize);
    }

    fn kick(&mut self) {
        self.ring.publish();
    }

    fn wait(&mut self) -> Vec<(usize, u8)> {
        let used = self.ring.wait(PATIENCE);
        assert!(!used.is_empty(), "{} requests never complete", self.ring.in_flight());
        self.settle(&used)
    }
}

impl RawQueue {
    fn range(&self, slot: usize, sector: u64, sectors: u32, flags: u32) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&sector.to_le_bytes());
        bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
        bytes[12..].copy_from_slice(&flags.to_le_bytes());
        self.ring.memory.write(self.data(slot), &bytes);
    }
}
