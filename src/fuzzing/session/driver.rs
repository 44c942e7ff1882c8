//! What the hostile guest writes into its memory, and what it finds there.

use super::super::Input;
use super::guest::{AVAIL, BASE, Guest, USED, address, writable};
use std::thread;
use std::time::Duration;

const INDIRECT: u64 = 0xc00;
const BUFFERS: u64 = 0x1000;
/// From one request's buffer to the next's.
const BUFFER: u64 = 0x80;

/// A status byte that the device never writes.
const UNTOUCHED: u8 = 0xaa;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

impl Guest<'_> {
    fn ring_of(&self, input: &mut Input) -> usize {
        usize::from(input.flag())
    }

    fn put_one(&self, at: u64, (addr, len, flags, next): (u64, u32, u16, u16)) {
        let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.put(at, &[addr.to_le_bytes(), rest.to_le_bytes()].concat());
    }

    /// Any descriptor, in the table or in an indirect one.
    pub fn put_descriptor(&mut self, input: &mut Input) {
        let ring = self.rings[self.ring_of(input)].clone();
        let place = u64::from(input.u8());
        let table = if place & 0x80 == 0 { ring.at } else { ring.at.wrapping_add(INDIRECT) };
        let addr = if place & 0x40 == 0 { address(input) } else { ring.at.wrapping_add(INDIRECT) };
        let (len, flags, next) = (length(input), u16::from(input.u8()), u16::from(input.u8()));
        self.muddled = true;
        self.put_one(table.wrapping_add(16 * (place & 0x3f)), (addr, len, flags, next));
    }

    /// Anything anywhere.
    pub fn put_bytes(&mut self, input: &mut Input) {
        let at = address(input);
        let count = usize::from(input.u8() & 63);
        self.muddled = true;
        self.put(at, input.bytes(count));
    }

    /// A request as drivers make them, whose data may be where no memory is, and a kick.
    pub fn put_request(&mut self, input: &mut Input) {
        let index = self.ring_of(input);
        let ring = self.rings[index].clone();
        let kind: u32 = input.one_of(&[0, 1, 4, 8, 11, 13, 0, 1, 2, u32::MAX]);
        let sector: u64 = match input.u8() {
            255 => input.u64(),
            small => small.into(),
        };
        let (head, layout) = (u16::from(input.u8()) % ring.size, input.u8());
        // Not over one that the device has.
        if ring.proper.contains_key(&head) {
            return;
        }
        let writes = if [0, 8].contains(&kind) { F_WRITE } else { 0 };
        let buffer = ring.at.wrapping_add(BUFFERS + BUFFER * u64::from(head));
        self.put(buffer, &[&u64::from(kind).to_le_bytes()[..], &sector.to_le_bytes()].concat());
        if [11, 13].contains(&kind) {
            let range =
                [sector.to_le_bytes(), (u64::from(input.u8()) | u64::from(input.flag()) << 32).to_le_bytes()];
            self.put(buffer.wrapping_add(0x10), &range.concat());
        }
        let data = match layout & 3 {
            0 => (buffer.wrapping_add(0x10), 16),
            1 => (BASE + 0x8000, 512),
            2 => (BASE + 0x20000, 4096),
            _ => (address(input), length(input)),
        };
        // The device's data may go over anything that is there.
        let (start, end) = (data.0, data.0.wrapping_add(data.1.into()));
        if layout & 3 == 3 && (self.place(start).is_some() || self.place(end).is_some()) {
            self.muddled = true;
        }
        let status = buffer.wrapping_add(BUFFER - 1);
        self.put(status, &[UNTOUCHED]);
        let mut parts = vec![(buffer, 16, 0)];
        for _ in 0..(layout >> 2 & 3) {
            parts.push((data.0, data.1, writes));
        }
        parts.push((status, 1, F_WRITE));
        let indirect = layout & 16 != 0;
        let (table, first) = if indirect {
            (ring.at.wrapping_add(INDIRECT + 0x80 * u64::from(head & 7)), 0)
        } else {
            (ring.at, head)
        };
        // A chain that goes beyond the table, or over another's descriptors, is nobody's proper request.
        let fits = indirect || usize::from(head) + parts.len() <= usize::from(ring.size);
        let other_table = |other: &u16| other & 7 != head & 7;
        let apart =
            ring.proper.is_empty() || indirect && ring.indirect && ring.proper.keys().all(other_table);
        for (place, (addr, len, flags)) in (first..).zip(&parts) {
            let last = usize::from(place - first) + 1 == parts.len();
            let next = if last { 0 } else { F_NEXT };
            self.put_one(table.wrapping_add(16 * u64::from(place)), (*addr, *len, flags | next, place + 1));
        }
        if indirect {
            let bytes = 16 * parts.len() as u32;
            self.put_one(ring.at.wrapping_add(16 * u64::from(head)), (table, bytes, F_INDIRECT, 0));
        }
        if fits && apart {
            self.rings[index].indirect = indirect;
            self.rings[index].proper.insert(head, status);
        } else {
            self.muddled = true;
        }
        let avail = ring.at.wrapping_add(AVAIL);
        let idx = self.get(avail.wrapping_add(2)).map_or(0, u16::from_le_bytes);
        self.put(avail.wrapping_add(4 + 2 * u64::from(idx % ring.size)), &head.to_le_bytes());
        self.put(avail.wrapping_add(2), &idx.wrapping_add(1).to_le_bytes());
        if layout & 32 == 0 {
            self.signal();
        }
    }

    /// The available index, to anywhere.
    pub fn move_avail(&mut self, input: &mut Input) {
        let ring = self.rings[self.ring_of(input)].clone();
        self.muddled = true;
        self.put(ring.at.wrapping_add(AVAIL + 2), &input.u16().to_le_bytes());
        self.signal();
    }

    fn signal(&self) {
        if writable(&self.events[0]) {
            let _ = self.events[0].write(1);
        }
    }

    /// A kick, and nothing else.
    pub fn kick(&mut self, input: &mut Input) {
        let _ = input.u8();
        self.signal();
    }

    /// Sees whether the device has used something, and what became of it.
    pub fn wait(&mut self, input: &mut Input) {
        self.settle(1 + (input.u8() & 31));
    }

    /// Looks so many times. Whether all requests have an answer.
    pub fn settle(&mut self, rounds: u8) -> bool {
        for _ in 0..rounds {
            (0..self.rings.len()).for_each(|index| self.reap(index));
            if self.rings.iter().all(|ring| ring.proper.is_empty()) {
                return true;
            }
            thread::sleep(Duration::from_micros(20));
        }
        false
    }

    fn reap(&mut self, index: usize) {
        let ring = self.rings[index].clone();
        let Some(idx) = self.get(ring.at.wrapping_add(USED + 2)).map(u16::from_le_bytes) else { return };
        let mut next = ring.used;
        // What jumps further was not used one by one.
        if idx.wrapping_sub(next) > ring.size {
            self.rings[index].used = idx;
            self.rings[index].proper.clear();
            return;
        }
        while next != idx {
            let place = ring.at.wrapping_add(USED + 4 + 8 * u64::from(next % ring.size));
            next = next.wrapping_add(1);
            let Some(element) = self.get::<8>(place) else { continue };
            let head = u16::from_le_bytes([element[0], element[1]]);
            let Some(status) = self.rings[index].proper.remove(&head) else { continue };
            let found = self.get(status);
            if !self.muddled {
                assert_ne!(found, Some([UNTOUCHED]), "request {head} is used up without a status");
            }
        }
        self.rings[index].used = next;
    }
}

/// A length, mostly a short one or one of sectors.
fn length(input: &mut Input) -> u32 {
    match input.u8() {
        0 => input.u32(),
        short @ 1..128 => short.into(),
        sectors => u32::from(sectors - 127) * 512,
    }
}
