//! What an L2 entry says: where the bytes of a cluster, or of a 32nd of one, are (QEMU's
//! `docs/interop/qcow2.rst`, "Cluster mapping" and "Extended L2 Entries").

#![forbid(unsafe_code)]

use super::header::Header;
use std::ops::Range;

/// The refcount of what the entry points at is exactly one. In entries of both levels.
pub const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Where something is, in entries of both levels and of the refcount table.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// An L2 entry. `bitmap` is 0 where entries are not extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Entry {
    /// Where, and how.
    pub word: u64,
    /// Of an extended one: which parts are in the cluster (low half), and which read zero (high half).
    pub bitmap: u64,
}

/// Where a unit's bytes are: those of a cluster, or of a part of one, a 32nd (a subcluster).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Here not: what lies below, or zeroes.
    Below,
    /// Nowhere: they read zero, whatever lies below.
    Zero,
    /// In the image, from this offset on.
    At(u64),
    /// In a compressed cluster, of which `skip` bytes come before them.
    Packed {
        /// The cluster.
        packed: Packed,
        /// Bytes of it.
        skip: u64,
    },
}

/// A compressed cluster: `len` bytes from `offset` on, of which the compression may not need all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Packed {
    /// In the image, to the byte.
    pub offset: u64,
    /// At most two clusters.
    pub len: u64,
}

/// How an image's entries are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// A cluster has `1 << cluster_bits` bytes.
    pub cluster_bits: u32,
    /// Entries have a bitmap.
    pub extended: bool,
    /// Clusters can be marked to read zero: from version 3 on.
    pub zero_flag: bool,
}

impl Layout {
    pub fn of(header: &Header) -> Layout {
        Layout {
            cluster_bits: header.cluster_bits,
            extended: header.extended_l2,
            zero_flag: header.version >= 3,
        }
    }

    /// Bytes of a cluster.
    pub fn cluster(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bits of a unit's bytes.
    pub fn unit_bits(self) -> u32 {
        if self.extended { self.cluster_bits - 5 } else { self.cluster_bits }
    }

    /// Bytes of a unit.
    pub fn unit(self) -> u64 {
        1 << self.unit_bits()
    }

    /// Words of 8 bytes in an entry.
    pub fn words(self) -> usize {
        if self.extended { 2 } else { 1 }
    }

    /// Entries in a table.
    pub fn entries(self) -> u64 {
        self.cluster() / 8 / self.words() as u64
    }

    /// What an entry says of the unit that has byte `within` of its cluster. `None`: nothing that the format allows.
    pub fn place(self, entry: Entry, within: u64) -> Option<Place> {
        let unit_at = within & !(self.unit() - 1);
        if entry.word & COMPRESSED != 0 {
            let packed = self.packed(entry)?;
            return Some(Place::Packed { packed, skip: unit_at });
        }
        let host = self.host(entry)?;
        if self.extended {
            let part = unit_at >> self.unit_bits();
            let (here, zero) = (entry.bitmap >> part & 1, entry.bitmap >> (part + 32) & 1);
            return match (here, zero) {
                (0, 0) => Some(Place::Below),
                (0, 1) => Some(Place::Zero),
                (1, 0) if host != 0 => Some(Place::At(host + unit_at)),
                _ => None,
            };
        }
        Some(match (entry.word & ZERO != 0, host) {
            (true, _) => Place::Zero,
            (false, 0) => Place::Below,
            (false, host) => Place::At(host),
        })
    }

    /// The cluster that a plain or extended entry has in the image, 0 where it has none. `None`: none that can be.
    pub fn host(self, entry: Entry) -> Option<u64> {
        let allowed = COPIED | OFFSET | if self.extended || !self.zero_flag { 0 } else { ZERO };
        let host = entry.word & OFFSET;
        let sound = entry.word & !allowed == 0 && host & (self.cluster() - 1) == 0;
        sound.then_some(host)
    }

    /// The compressed cluster that the entry points at, if it is one of that kind.
    pub fn packed(self, entry: Entry) -> Option<Packed> {
        if entry.word & COMPRESSED == 0 || entry.word & COPIED != 0 || entry.bitmap != 0 {
            return None;
        }
        let size_at = 62 - (self.cluster_bits - 8);
        let offset = entry.word & ((1 << size_at) - 1);
        let sectors = (entry.word & (COMPRESSED - 1)) >> size_at;
        let len = (sectors + 1) * 512 - (offset & 511);
        (offset >= self.cluster()).then_some(Packed { offset, len })
    }

    /// The clusters of the image that an entry holds a reference to, by their offsets.
    pub fn holds(self, entry: Entry) -> Range<u64> {
        let cluster = |at: u64| at & !(self.cluster() - 1);
        if entry.word & COMPRESSED != 0 {
            return match self.packed(entry) {
                Some(Packed { offset, len }) => {
                    // The last sector is whole.
                    cluster(offset)..cluster(offset + len - 1) + self.cluster()
                }
                None => 0..0,
            };
        }
        match self.host(entry) {
            None | Some(0) => 0..0,
            Some(host) => host..host + self.cluster(),
        }
    }

    /// Whether the cluster that the entry has is its own to write to.
    pub fn is_own(self, entry: Entry) -> bool {
        entry.word & COPIED != 0 && self.host(entry).is_some_and(|host| host != 0)
    }

    /// The entry of a cluster that is at `host` and nobody else's, with the parts of `here` in it (all, where entries are not
    /// extended) and those of `zero` reading zero.
    pub fn at(self, host: u64, here: u32, zero: u32) -> Entry {
        let bitmap = if self.extended { u64::from(zero & !here) << 32 | u64::from(here) } else { 0 };
        Entry { word: host | COPIED, bitmap }
    }

    /// The entry of a cluster that reads zero and is nowhere.
    pub fn zero(self) -> Entry {
        match self.extended {
            true => Entry { word: 0, bitmap: u64::from(u32::MAX) << 32 },
            false => Entry { word: ZERO, bitmap: 0 },
        }
    }

    /// The parts of a cluster that lie wholly within `range`, bytes of the cluster; one bit where entries are not extended.
    pub fn whole_parts(self, range: Range<u64>) -> u32 {
        let first = range.start.div_ceil(self.unit());
        let end = range.end >> self.unit_bits();
        bits(first, end)
    }

    /// The parts that `range` touches.
    pub fn touched_parts(self, range: Range<u64>) -> u32 {
        bits(range.start >> self.unit_bits(), range.end.div_ceil(self.unit()))
    }
}

/// Bits from `first` up to `end`, at most 32.
fn bits(first: u64, end: u64) -> u32 {
    if first >= end {
        return 0;
    }
    let below = |bit: u64| (1u64 << bit.min(32)) - 1;
    (below(end) & !below(first)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Layout = Layout { cluster_bits: 16, extended: false, zero_flag: true };
    const EXTENDED: Layout = Layout { cluster_bits: 17, extended: true, zero_flag: true };

    fn plain(word: u64) -> Option<Place> {
        PLAIN.place(Entry { word, bitmap: 0 }, 0x1234)
    }

    #[test]
    fn plain_entries() {
        assert_eq!(plain(0), Some(Place::Below));
        assert_eq!(plain(1), Some(Place::Zero));
        assert_eq!(plain(0x50001), Some(Place::Zero), "kept for later writes");
        assert_eq!(plain(COPIED | 0x50000), Some(Place::At(0x50000)));
        assert_eq!(plain(0x50200), None, "not at the beginning of a cluster");
        assert_eq!(plain(0x50002), None, "a reserved bit");
        let old = Layout { zero_flag: false, ..PLAIN };
        assert_eq!(old.place(Entry { word: 1, bitmap: 0 }, 0), None, "version 2 has no such flag");
    }

    #[test]
    fn extended_entries() {
        let entry = |word, bitmap| EXTENDED.place(Entry { word, bitmap }, 0x2fff);
        assert_eq!(entry(0, 0), Some(Place::Below));
        assert_eq!(entry(0x60000, 0b0100), Some(Place::At(0x62000)));
        assert_eq!(entry(0x60000, 0b1011), Some(Place::Below));
        assert_eq!(entry(0, 0b0100 << 32), Some(Place::Zero));
        assert_eq!(entry(0x60000, 0b0100 << 32 | 0b0100), None, "both");
        assert_eq!(entry(0, 0b0100), None, "here, and nowhere");
        assert_eq!(entry(1, 0), None, "the flag of plain entries");
    }

    #[test]
    fn compressed_entries() {
        // 62 - (16 - 8) = 54: the offset has 54 bits.
        let word = COMPRESSED | 3 << 54 | 0x12345;
        let packed = Packed { offset: 0x12345, len: 4 * 512 - 0x145 };
        assert_eq!(plain(word), Some(Place::Packed { packed, skip: 0 }));
        assert_eq!(plain(word | COPIED), None);
        assert_eq!(plain(COMPRESSED | 5), None, "within the header");
        assert_eq!(PLAIN.holds(Entry { word, bitmap: 0 }), 0x10000..0x20000);
        let over = COMPRESSED | 3 << 54 | 0x1ff00;
        assert_eq!(PLAIN.holds(Entry { word: over, bitmap: 0 }), 0x10000..0x30000);
    }

    #[test]
    fn parts() {
        assert_eq!(PLAIN.whole_parts(0..65536), 1);
        assert_eq!(PLAIN.whole_parts(0..65535), 0);
        assert_eq!(PLAIN.touched_parts(5..6), 1);
        assert_eq!(EXTENDED.whole_parts(4095..12288), 0b110);
        assert_eq!(EXTENDED.touched_parts(4095..12289), 0b1111);
        assert_eq!(EXTENDED.whole_parts(0..131072), u32::MAX);
    }
}
