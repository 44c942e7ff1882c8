//! What a disk must hold, and a driver that does everything to it at random and compares.

use std::collections::HashMap;
use std::ops::Range;

/// A request; ranges in sectors of 512 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Into the slot's buffer.
    Read { sector: u64, sectors: u32 },
    /// From the slot's buffer.
    Write { sector: u64, sectors: u32 },
    /// To stable storage.
    Flush,
    /// Undefined afterwards.
    Discard { sector: u64, sectors: u32 },
    /// Zeroes afterwards.
    WriteZeroes { sector: u64, sectors: u32, unmap: bool },
    /// The device's name into the slot's buffer.
    GetId,
}

impl Op {
    fn range(self) -> Range<u64> {
        match self {
            Op::Read { sector, sectors }
            | Op::Write { sector, sectors }
            | Op::Discard { sector, sectors }
            | Op::WriteZeroes { sector, sectors, .. } => sector..sector + u64::from(sectors),
            Op::Flush | Op::GetId => 0..0,
        }
    }
}

/// A queue of either VMM.
pub trait Queue {
    /// Requests it takes at once.
    fn slots(&self) -> usize;
    /// Bytes in a slot's buffer.
    fn max_len(&self) -> usize;
    /// Fills a slot's buffer.
    fn put(&mut self, slot: usize, bytes: &[u8]);
    /// Reads a slot's buffer.
    fn get(&self, slot: usize, bytes: &mut [u8]);
    /// Gives a request to the device, which need not look before [`kick`](Queue::kick).
    fn submit(&mut self, slot: usize, op: Op);
    /// Has the device look.
    fn kick(&mut self);
    /// Waits for at least one completion: slots and their status bytes.
    fn wait(&mut self) -> Vec<(usize, u8)>;
}

/// xorshift64*: the same numbers each time.
pub struct Random(u64);

impl Random {
    /// A sequence for each seed.
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.number() % end
    }

    /// `len` bytes, 0 never among them, so that they differ from zeroes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| (self.number() >> 32) as u8 | 1).collect()
    }
}

/// Sectors from `first` on, as they must be.
pub struct Model {
    first: u64,
    bytes: Vec<u8>,
    /// Whether each sector's contents are defined.
    known: Vec<bool>,
    /// Contents mean nothing, as on a null volume: only statuses are looked at.
    blind: bool,
    /// Requests are multiples of this many sectors.
    unit: u64,
    random: Random,
}

impl Model {
    /// `sectors` sectors of zeroes from `first` on.
    pub fn new(seed: u64, first: u64, sectors: u64) -> Model {
        Model {
            first,
            bytes: vec![0; sectors as usize * 512],
            known: vec![true; sectors as usize],
            blind: false,
            unit: 1,
            random: Random::new(seed),
        }
    }

    /// The sectors from `first` on that hold these bytes.
    pub fn of(seed: u64, first: u64, bytes: Vec<u8>) -> Model {
        let sectors = bytes.len() / 512;
        Model { known: vec![true; sectors], bytes, ..Model::new(seed, first, 0) }
    }

    /// Asks only whether requests succeed.
    pub fn blind(self) -> Model {
        Model { blind: true, ..self }
    }

    /// Requests in logical blocks of so many bytes.
    pub fn blocks(self, bytes: u64) -> Model {
        Model { unit: bytes / 512, ..self }
    }

    fn at(&self, range: &Range<u64>) -> Range<usize> {
        let start = (range.start - self.first) as usize * 512;
        start..start + (range.end - range.start) as usize * 512
    }

    /// A request that overlaps none in flight.
    fn next(&mut self, max_len: usize, busy: &HashMap<usize, (Op, Vec<u8>)>) -> Op {
        for _ in 0..16 {
            let units = self.known.len() as u64 / self.unit;
            let most = (max_len as u64 / 512 / self.unit).min(units);
            let long = if self.random.below(4) == 0 { most } else { most.min(8) };
            let count = 1 + self.random.below(long);
            let sector = self.first + self.random.below(units - count + 1) * self.unit;
            let sectors = (count * self.unit) as u32;
            let op = match self.random.below(16) {
                0 => Op::Flush,
                1 => Op::Discard { sector, sectors },
                2 => Op::WriteZeroes { sector, sectors, unmap: self.random.below(2) == 0 },
                3..9 => Op::Write { sector, sectors },
                _ => Op::Read { sector, sectors },
            };
            let range = op.range();
            let free = |(other, _): &(Op, Vec<u8>)| {
                range.end <= other.range().start || other.range().end <= range.start
            };
            if busy.values().all(free) {
                return op;
            }
        }
        Op::Flush
    }

    /// Carries out `count` requests, as many at a time as the queue takes, and compares everything read.
    pub fn exercise(&mut self, queue: &mut dyn Queue, count: usize) {
        let mut free: Vec<usize> = (0..queue.slots()).collect();
        let mut busy: HashMap<usize, (Op, Vec<u8>)> = HashMap::new();
        let mut left = count;
        while left > 0 || !busy.is_empty() {
            while left > 0 {
                let Some(slot) = free.pop() else { break };
                let op = self.next(queue.max_len(), &busy);
                let mut data = Vec::new();
                if let Op::Write { sectors, .. } = op {
                    data = self.random.bytes(sectors as usize * 512);
                    queue.put(slot, &data);
                }
                queue.submit(slot, op);
                busy.insert(slot, (op, data));
                left -= 1;
            }
            queue.kick();
            for (slot, status) in queue.wait() {
                let (op, data) = busy.remove(&slot).expect("a slot in flight");
                assert_eq!(status, 0, "{op:?}");
                self.completed(op, &data, |bytes| queue.get(slot, bytes));
                free.push(slot);
            }
        }
    }

    /// Reads everything through `queue`, and compares.
    pub fn verify(&mut self, queue: &mut dyn Queue) {
        let step = (queue.max_len() / 512) as u64;
        let end = self.first + self.known.len() as u64;
        for sector in (self.first..end).step_by(step as usize) {
            let op = Op::Read { sector, sectors: step.min(end - sector) as u32 };
            queue.submit(0, op);
            queue.kick();
            assert_eq!(queue.wait(), [(0, 0)], "{op:?}");
            self.completed(op, &[], |bytes| queue.get(0, bytes));
        }
    }

    fn completed(&mut self, op: Op, data: &[u8], get: impl FnOnce(&mut [u8])) {
        let range = op.range();
        let known = || (range.start - self.first) as usize..(range.end - self.first) as usize;
        match op {
            Op::Read { .. } => {
                let mut bytes = vec![0; self.at(&range).len()];
                get(&mut bytes);
                self.compare(&bytes, range.start, &format!("{op:?}"));
            }
            Op::Write { .. } => {
                let (at, known) = (self.at(&range), known());
                self.bytes[at].copy_from_slice(data);
                self.known[known].fill(true);
            }
            Op::WriteZeroes { .. } => {
                let (at, known) = (self.at(&range), known());
                self.bytes[at].fill(0);
                self.known[known].fill(true);
            }
            Op::Discard { .. } => {
                let known = known();
                self.known[known].fill(false);
            }
            Op::Flush | Op::GetId => {}
        }
    }

    fn compare(&self, bytes: &[u8], sector: u64, what: &str) {
        for (index, found) in bytes.chunks(512).enumerate().filter(|_| !self.blind) {
            let at = (sector - self.first) as usize + index;
            if self.known[at] {
                let wanted = &self.bytes[at * 512..][..512];
                let sector = sector + index as u64;
                assert!(found == wanted, "{what}: sector {sector} holds the wrong bytes");
            }
        }
    }

    /// Compares with an image, whole.
    pub fn verify_image(&self, image: &[u8]) {
        let start = self.first as usize * 512;
        self.compare(&image[start..start + self.bytes.len()], self.first, "image");
    }
}
