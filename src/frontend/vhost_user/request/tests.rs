//! Chains of every legal layout, and of many others, in a guest's memory.

use super::*;
use crate::frontend::vhost_user::memory::Memory;
use proptest::prelude::*;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// The guest's memory: three regions that adjoin in the guest and nowhere else, one far away, and one that
/// ends just below the last address.
const REGIONS: [(u64, usize); 5] =
    [(0, 0x8000), (0x8000, 0x8000), (0x1_0000, 0x8000), (1 << 32, 0x8000), (u64::MAX - 0xfff, 0x800)];

/// Where the vring's descriptor table is, and how long.
const TABLE: u64 = 0;
const TABLE_LEN: u16 = 512;

/// Where data goes: from the second region well into the third.
const DATA: u64 = 0xa000;

/// An indirect table in which there is nothing wrong.
const NESTED: u64 = 0x6000;

struct Guest {
    mappings: Arc<GuestMemoryMmap<()>>,
    memory: Memory,
}

/// What is told of a chain, and where.
struct Outcome<'m> {
    status: Option<Iovec<'m>>,
    request: Result<Parsed, Status>,
}

impl Guest {
    fn new() -> Guest {
        let ranges = REGIONS.map(|(at, len)| (GuestAddress(at), len));
        let mappings = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let memory = Memory::new(mappings.clone()).unwrap();
        let guest = Guest { mappings, memory };
        for (at, len) in REGIONS {
            guest.write(at, &vec![0x5a; len]);
        }
        guest
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.mappings.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    fn put(&self, table: u64, index: usize, descriptor: &Raw) {
        let Raw { addr, len, flags, next } = *descriptor;
        let at = table + 16 * index as u64;
        self.write(at, &addr.to_le_bytes());
        self.write(at + 8, &len.to_le_bytes());
        self.write(at + 12, &flags.to_le_bytes());
        self.write(at + 14, &next.to_le_bytes());
    }

    fn all(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for (at, len) in REGIONS {
            let mut bytes = vec![0; len];
            self.mappings.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            all.append(&mut bytes);
        }
        all
    }

    /// The guest's address of a range, which lies in one region or is none of the guest's.
    fn address(&self, iovec: &Iovec<'_>) -> u64 {
        let found = self.mappings.iter().find_map(|region| {
            let host = self.mappings.get_host_address(region.start_addr()).unwrap().addr();
            let skip = iovec.base().addr().checked_sub(host)? as u64;
            let inside = skip < region.len() && iovec.len() as u64 <= region.len() - skip;
            inside.then_some(region.start_addr().0 + skip)
        });
        found.unwrap_or_else(|| panic!("{iovec:?} is outside the guest's memory"))
    }

    /// What is read straight is what the general way makes of it.
    fn both_ways(&self, table: DescriptorTable<'_>, head: u16, indirect: bool) {
        let (mut short, mut long) = (Scratch::default(), Scratch::default());
        let Some(straight) = straight::straight(table, head, indirect, &mut short) else { return };
        let general = parse_any(table, head, indirect, &mut long).expect("it makes sense");
        let (
            Parsed::Transfer { op, sector, sectors, data },
            Parsed::Transfer { op: op_too, sector: sector_too, sectors: sectors_too, data: data_too },
        ) = (straight.request, general.request)
        else {
            panic!("no transfer was read straight");
        };
        assert_eq!((op, sector, sectors), (op_too, sector_too, sectors_too));
        let places = |iovecs: &[Iovec<'_>]| {
            iovecs.iter().map(|iovec| (self.address(iovec), iovec.len())).collect::<Vec<_>>()
        };
        assert_eq!(places(&short.iovecs[data]), places(&long.iovecs[data_too]));
        assert_eq!(self.address(&straight.status), self.address(&general.status));
    }

    /// Parses, and checks what holds for any chain whatever: nothing is written, and every range that comes
    /// out is the guest's.
    fn parse(&self, head: u16, indirect: bool) -> (Outcome<'_>, Scratch<'_>) {
        let before = self.all();
        let mut scratch = Scratch::default();
        let table = self.memory.table(TABLE, TABLE_LEN);
        let chain = match parse(table, head, indirect, &mut scratch) {
            Ok(Chain { status, request }) => Outcome { status: Some(status), request: Ok(request) },
            Err(told) => Outcome { status: status_byte(table, head), request: Err(told) },
        };
        assert!(self.all() == before, "the parser wrote to the guest's memory");
        self.both_ways(table, head, indirect);
        if let Some(status) = &chain.status {
            assert_eq!(status.len(), 1);
            self.address(status);
        }
        for iovec in scratch.iovecs.iter().filter(|iovec| !iovec.is_empty()) {
            self.address(iovec);
        }
        match &chain.request {
            Ok(Parsed::Transfer { sectors, data, .. }) => {
                let bytes: u64 = scratch.iovecs[data.clone()].iter().map(|iovec| iovec.len() as u64).sum();
                assert_eq!(bytes, u64::from(*sectors) * 512);
                assert!(bytes > 0);
            }
            Ok(Parsed::GetId(data)) => assert!(data.end <= scratch.iovecs.len()),
            Ok(Parsed::Ranges(_)) => assert!((1..=MAX_RANGES).contains(&scratch.ranges.len())),
            Ok(Parsed::Flush) | Err(_) => {}
        }
        (chain, scratch)
    }

    /// The last byte of the last writable descriptor of a chain, where it is the guest's.
    fn last_writable(&self, (direct, indirect): &(Vec<(u16, Raw)>, Vec<Raw>)) -> Option<u64> {
        let direct = direct.iter().map(|(_, raw)| raw).filter(|raw| raw.flags & INDIRECT == 0);
        let last = direct.chain(indirect).rfind(|raw| raw.flags & WRITE != 0 && raw.len > 0)?;
        let at = last.addr.checked_add(u64::from(last.len) - 1)?;
        self.mappings.address_in_range(GuestAddress(at)).then_some(at)
    }

    /// The guest's addresses of ranges, those that adjoin made one.
    fn addresses(&self, iovecs: &[Iovec<'_>]) -> Vec<(u64, u64)> {
        joined(
            iovecs
                .iter()
                .filter(|iovec| !iovec.is_empty())
                .map(|iovec| (self.address(iovec), iovec.len() as u64)),
        )
    }
}

/// Ranges, those that adjoin made one, empty ones left out.
fn joined(ranges: impl Iterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for (at, len) in ranges.filter(|range| range.1 > 0) {
        match joined.last_mut() {
            Some(last) if last.0 + last.1 == at => last.1 += len,
            _ => joined.push((at, len)),
        }
    }
    joined
}

#[derive(Clone, Copy, Debug, Default)]
struct Raw {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// A piece of a chain: where it is, its length, and whether the device writes it.
type Piece = (u64, u32, bool);

/// How a chain lies in memory.
#[derive(Clone, Debug)]
struct Layout {
    /// Where the bytes are cut into descriptors; equal cuts make empty ones.
    readable_cuts: Vec<usize>,
    writable_cuts: Vec<usize>,
    /// Where the first piece is, and how far apart they are.
    start: u64,
    gaps: Vec<u64>,
    /// From this piece on they are in an indirect table, which is there.
    indirect: Option<(usize, u64)>,
    /// The descriptor that leads there has WRITE, which must be ignored.
    write_flag: bool,
    /// Descriptor n is at n * step: odd, so that none is used twice.
    step: u16,
}

fn layout() -> impl Strategy<Value = Layout> {
    let cuts = |most: usize| prop::collection::vec(prop_oneof![0..40usize, 0..16384usize], 0..most);
    let gaps = prop::collection::vec(prop_oneof![Just(0u64), 1..64u64], 1..8);
    // Aligned, not aligned, and over the end of a region.
    let tables =
        prop_oneof![Just(0x4000u64), Just(0x4008), Just(0x4003), Just(0x7fe8), Just(0x7ff8), Just(1 << 32)];
    let indirect = prop::option::of((0..6usize, tables));
    (cuts(12), cuts(12), 0..0x6000u64, gaps, indirect, any::<bool>(), 0..TABLE_LEN / 2).prop_map(
        |(readable_cuts, writable_cuts, start, gaps, indirect, write_flag, step)| {
            let start = DATA + start;
            Layout { readable_cuts, writable_cuts, start, gaps, indirect, write_flag, step: step * 2 + 1 }
        },
    )
}

impl Layout {
    /// The pieces of a chain of so many readable bytes and then so many writable ones.
    fn pieces(&self, readable: usize, writable: usize) -> Vec<Piece> {
        let mut at = self.start;
        let mut gaps = self.gaps.iter().cycle();
        let mut pieces = Vec::new();
        for (cuts, len, write) in
            [(&self.readable_cuts, readable, false), (&self.writable_cuts, writable, true)]
        {
            if len == 0 {
                continue;
            }
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| *cut % (len + 1)).chain([0, len]).collect();
            cuts.sort_unstable();
            for pair in cuts.windows(2) {
                let len = pair[1] - pair[0];
                pieces.push((at, len as u32, write));
                at += len as u64 + gaps.next().unwrap();
            }
        }
        pieces
    }

    /// Links the pieces: the descriptors of the vring's table with their indices, head first, and those of
    /// the indirect one.
    fn link(&self, pieces: &[Piece]) -> (Vec<(u16, Raw)>, Vec<Raw>) {
        let raw = |(addr, len, write): &Piece| Raw {
            addr: *addr,
            len: *len,
            flags: if *write { WRITE } else { 0 },
            next: 0,
        };
        let split = self.indirect.map_or(pieces.len(), |(split, _)| split.min(pieces.len() - 1));
        let (direct, rest) = pieces.split_at(split);
        let mut direct: Vec<Raw> = direct.iter().map(raw).collect();
        let mut indirect: Vec<Raw> = rest.iter().map(raw).collect();
        for (index, descriptor) in indirect.iter_mut().enumerate().take(rest.len().saturating_sub(1)) {
            descriptor.flags |= NEXT;
            descriptor.next = index as u16 + 1;
        }
        if let Some((_, addr)) = self.indirect {
            let flags = INDIRECT | if self.write_flag { WRITE } else { 0 };
            direct.push(Raw { addr, len: 16 * indirect.len() as u32, flags, next: 0 });
        }
        let place = |index: usize| (index as u16 + 1).wrapping_mul(self.step) % TABLE_LEN;
        let last = direct.len() - 1;
        for (index, descriptor) in direct.iter_mut().enumerate().take(last) {
            descriptor.flags |= NEXT;
            descriptor.next = place(index + 1);
        }
        (direct.into_iter().enumerate().map(|(index, raw)| (place(index), raw)).collect(), indirect)
    }

    /// Writes the descriptors into the guest's memory. The head.
    fn write(&self, guest: &Guest, (direct, indirect): &(Vec<(u16, Raw)>, Vec<Raw>)) -> u16 {
        for (index, raw) in direct {
            guest.put(TABLE, *index as usize, raw);
        }
        for (index, raw) in indirect.iter().enumerate() {
            guest.put(self.indirect.unwrap().1, index, raw);
        }
        direct[0].0
    }
}

/// Spreads bytes over the readable pieces.
fn fill(guest: &Guest, pieces: &[Piece], mut bytes: &[u8]) {
    for (at, len, _) in pieces.iter().filter(|piece| !piece.2) {
        let (part, rest) = bytes.split_at((*len as usize).min(bytes.len()));
        guest.write(*at, part);
        bytes = rest;
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0xee; 4], &sector.to_le_bytes()].concat()
}

/// The pieces' ranges without the first `skip` bytes of the readable or the last of the writable ones.
fn data_of(pieces: &[Piece], write: bool, skip: u64) -> Vec<(u64, u64)> {
    let all =
        joined(pieces.iter().filter(|piece| piece.2 == write).map(|(at, len, _)| (*at, u64::from(*len))));
    let mut left = skip;
    let cut = |(at, len): (u64, u64), left: &mut u64, front: bool| {
        let step = len.min(*left);
        *left -= step;
        (if front { at + step } else { at }, len - step)
    };
    if write {
        left = 1;
        let mut kept: Vec<_> = all.into_iter().rev().map(|range| cut(range, &mut left, false)).collect();
        kept.reverse();
        joined(kept.into_iter())
    } else {
        joined(all.into_iter().map(|range| cut(range, &mut left, true)))
    }
}

/// A range as the driver writes it.
fn range_bytes(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn transfers_are_found_in_every_layout(layout in layout(), write: bool, sectors in 1..28usize, sector: u64) {
        let guest = Guest::new();
        let (readable, writable) = if write { (16 + sectors * 512, 1) } else { (16, sectors * 512 + 1) };
        let pieces = layout.pieces(readable, writable);
        fill(&guest, &pieces, &header(u32::from(write), sector));
        let head = layout.write(&guest, &layout.link(&pieces));
        let (chain, scratch) = guest.parse(head, true);

        let last = pieces.iter().rfind(|piece| piece.1 > 0).unwrap();
        prop_assert_eq!(guest.address(&chain.status.unwrap()), last.0 + u64::from(last.1) - 1);
        let Ok(Parsed::Transfer { op, sector: found, sectors: count, data }) = chain.request else {
            panic!("{:?}", chain.request)
        };
        prop_assert_eq!((op, found), (if write { Op::Write } else { Op::Read }, sector));
        prop_assert_eq!(count as usize, sectors);
        prop_assert_eq!(guest.addresses(&scratch.iovecs[data]), data_of(&pieces, !write, 16));
    }

    #[test]
    fn ranges_are_read_in_every_layout(
        layout in layout(),
        zeroes: bool,
        ranges in prop::collection::vec((any::<u64>(), any::<u32>(), any::<bool>()), 1..=MAX_RANGES),
    ) {
        let guest = Guest::new();
        let (kind, op) = if zeroes { (13, Op::WriteZeroes) } else { (11, Op::Discard) };
        let mut bytes = header(kind, 0);
        for (sector, sectors, unmap) in &ranges {
            bytes.extend(range_bytes(*sector, *sectors, u32::from(*unmap && zeroes)));
        }
        let pieces = layout.pieces(bytes.len(), 1);
        fill(&guest, &pieces, &bytes);
        let head = layout.write(&guest, &layout.link(&pieces));
        let (chain, mut scratch) = guest.parse(head, true);
        let understood = matches!(chain.request, Ok(Parsed::Ranges(found)) if found == op);
        prop_assert!(understood, "{:?}", chain.request);
        scratch.ranges.reverse();
        let expected: Vec<_> = ranges
            .iter()
            .map(|(sector, sectors, unmap)| Range { sector: *sector, sectors: *sectors, unmap: *unmap && zeroes })
            .collect();
        prop_assert_eq!(scratch.ranges, expected);
    }

    #[test]
    fn the_rest_is_understood_in_every_layout(layout in layout(), kind in 0..40u32, room in 0..30usize) {
        let guest = Guest::new();
        let pieces = layout.pieces(16, room + 1);
        fill(&guest, &pieces, &header(kind, 0));
        let head = layout.write(&guest, &layout.link(&pieces));
        let (chain, scratch) = guest.parse(head, true);
        let unclear = pieces.last().unwrap().1 == 0 && chain.request.is_err();
        prop_assert_eq!(chain.status.is_some(), !unclear);
        match chain.request {
            Ok(Parsed::Flush) => prop_assert_eq!(kind, 4),
            Ok(Parsed::GetId(data)) => {
                prop_assert_eq!(kind, 8);
                prop_assert_eq!(guest.addresses(&scratch.iovecs[data]), data_of(&pieces, true, 0));
            }
            Err(Status::IoErr) => prop_assert!([0, 1, 11, 13].contains(&kind), "{kind}"),
            Err(Status::Unsupported) => prop_assert!(![0, 1, 4, 8, 11, 13].contains(&kind), "{kind}"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn damage_is_noticed(layout in layout(), damage in damage(), write: bool, sectors in 1..8usize) {
        let guest = Guest::new();
        let (readable, writable) = if write { (16 + sectors * 512, 1) } else { (16, sectors * 512 + 1) };
        let (mut readable, mut writable) = (readable, writable);
        match damage {
            Damage::ShortHeader(len) => readable = len,
            Damage::Ragged(extra) if write => readable += extra,
            Damage::Ragged(extra) => writable += extra,
            Damage::NoStatus => writable = 0,
            _ => {}
        }
        let mut layout = layout;
        if damage.needs_indirect() && layout.indirect.is_none() {
            layout.indirect = Some((1, 0x4000));
        }
        let mut pieces = layout.pieces(readable, writable);
        if let Damage::ReadableLast = damage {
            pieces.push((DATA, 1, false));
        }
        fill(&guest, &pieces, &header(u32::from(write), 0));
        let mut links = layout.link(&pieces);
        damage.apply(&mut links);
        guest.put(NESTED, 0, &Raw { addr: DATA, len: 1, flags: WRITE, next: 0 });
        let head = layout.write(&guest, &links);
        let (chain, _) = guest.parse(head, !matches!(damage, Damage::NotNegotiated));
        prop_assert_eq!(chain.request.err(), Some(Status::IoErr), "{:?}", damage);
        // Nobody is told in the wrong place: either where the driver looks, or not at all.
        let place = damage.has_an_end(&links).then(|| guest.last_writable(&links)).flatten();
        prop_assert_eq!(chain.status.map(|status| guest.address(&status)), place, "{:?}", damage);
    }
}

/// What can be wrong with a chain.
#[derive(Clone, Copy, Debug)]
enum Damage {
    /// The last descriptor leads back to one before it.
    Loop(usize),
    /// A link out of the table.
    BadNext(u16),
    /// A readable piece after the status.
    ReadableLast,
    /// A descriptor of an indirect table that leads to another.
    Nested(usize),
    /// Both INDIRECT and NEXT.
    IndirectAndNext,
    NotNegotiated,
    /// An indirect table of no whole number of descriptors, or of none, or of too many.
    IndirectLen(u32),
    /// An indirect table that is not there.
    IndirectAt(u64),
    /// A piece that is not there, or does not end there.
    Outside(usize, u64, u32),
    ShortHeader(usize),
    /// Data that is no whole number of sectors.
    Ragged(usize),
    NoStatus,
}

fn damage() -> impl Strategy<Value = Damage> {
    // Addresses from which not a byte, or not many, is the guest's.
    let nowhere = || {
        prop_oneof![
            Just(0x1_8000u64),
            Just(0x1_7fff),
            Just((1 << 32) - 1),
            Just((1 << 32) + 0x7fff),
            Just(u64::MAX),
            Just(u64::MAX - 0x800),
            Just(u64::MAX - 1),
            (0x1_8000..1u64 << 32),
        ]
    };
    let len = prop_oneof![Just(u32::MAX), Just(0x1_0001), 2..4096u32];
    prop_oneof![
        any::<usize>().prop_map(Damage::Loop),
        (TABLE_LEN..=u16::MAX).prop_map(Damage::BadNext),
        Just(Damage::ReadableLast),
        any::<usize>().prop_map(Damage::Nested),
        Just(Damage::IndirectAndNext),
        Just(Damage::NotNegotiated),
        prop_oneof![Just(0), 1..16u32, Just(17), Just(u32::MAX), Just(16 << 16)]
            .prop_map(Damage::IndirectLen),
        nowhere().prop_map(Damage::IndirectAt),
        (any::<usize>(), nowhere(), len).prop_map(|(at, addr, len)| Damage::Outside(at, addr, len)),
        (0..16usize).prop_map(Damage::ShortHeader),
        (1..512usize).prop_map(Damage::Ragged),
        Just(Damage::NoStatus),
    ]
}

impl Damage {
    /// Whether the chain can still be followed to its end.
    /// Nor may it be unclear where the status is.
    fn has_an_end(self, (direct, indirect): &(Vec<(u16, Raw)>, Vec<Raw>)) -> bool {
        let last = indirect.last().unwrap_or(&direct.last().unwrap().1);
        if last.flags & WRITE != 0 && last.len == 0 {
            return false;
        }
        match self {
            Damage::Loop(_) | Damage::BadNext(_) | Damage::Nested(_) => false,
            Damage::IndirectAndNext | Damage::IndirectAt(_) => false,
            Damage::IndirectLen(len) => len as usize / 16 >= indirect.len(),
            _ => true,
        }
    }

    fn needs_indirect(self) -> bool {
        matches!(
            self,
            Damage::Nested(_)
                | Damage::IndirectAndNext
                | Damage::NotNegotiated
                | Damage::IndirectLen(_)
                | Damage::IndirectAt(_)
        )
    }

    fn apply(self, (direct, indirect): &mut (Vec<(u16, Raw)>, Vec<Raw>)) {
        let heads: Vec<u16> = direct.iter().map(|(index, _)| *index).collect();
        let in_table = !indirect.is_empty();
        let (_, lead) = direct.last_mut().unwrap();
        match self {
            Damage::Loop(to) => {
                let count = if in_table { indirect.len() } else { heads.len() };
                let to = to % count;
                let last = if in_table { indirect.last_mut().unwrap() } else { lead };
                last.flags |= NEXT;
                last.next = if in_table { to as u16 } else { heads[to] };
            }
            Damage::BadNext(next) => {
                let last = if in_table { indirect.last_mut().unwrap() } else { lead };
                (last.flags, last.next) = (last.flags | NEXT, next);
            }
            Damage::Nested(at) => {
                let at = at % indirect.len();
                indirect[at] = Raw { addr: NESTED, len: 16, flags: INDIRECT, next: 0 };
            }
            Damage::IndirectAndNext => (lead.flags, lead.next) = (lead.flags | NEXT, heads[0]),
            Damage::IndirectLen(len) => lead.len = len,
            Damage::IndirectAt(addr) => lead.addr = addr,
            Damage::Outside(at, addr, len) => {
                let pieces = direct.iter_mut().map(|(_, raw)| raw).filter(|raw| raw.flags & INDIRECT == 0);
                let mut pieces: Vec<_> = pieces.chain(indirect).collect();
                let at = at % pieces.len();
                (pieces[at].addr, pieces[at].len) = (addr, len);
            }
            Damage::ReadableLast
            | Damage::NotNegotiated
            | Damage::ShortHeader(_)
            | Damage::Ragged(_)
            | Damage::NoStatus => {}
        }
    }
}

/// Descriptors of no sense, though of numbers that matter.
fn noise() -> impl Strategy<Value = Raw> {
    let edges = prop::sample::select(REGIONS.map(|(at, _)| at).to_vec());
    let addr = prop_oneof![
        3 => (edges, -40..0x8000i64).prop_map(|(edge, off)| edge.wrapping_add_signed(off)),
        2 => 0x4000..0x4100u64,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        0..64u32,
        (0..32u32).prop_map(|n| n * 16),
        (0..16u32).prop_map(|n| n * 512),
        any::<u32>()
    ];
    let flags = prop_oneof![4 => Just(NEXT), 3 => Just(NEXT | WRITE), 1 => Just(WRITE), 2 => 0..8u16, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..32u16, 1 => any::<u16>()];
    (addr, len, flags, next).prop_map(|(addr, len, flags, next)| Raw { addr, len, flags, next })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// The checks are [`Guest::parse`]'s.
    #[test]
    fn nonsense_does_no_harm(table in prop::collection::vec(noise(), 32), inner in prop::collection::vec(noise(), 16)) {
        let guest = Guest::new();
        for (index, raw) in table.iter().enumerate() {
            guest.put(TABLE, index, raw);
        }
        for (index, raw) in inner.iter().enumerate() {
            guest.put(0x4000, index, raw);
        }
        for head in [0, 1, 2, 31, TABLE_LEN - 1, TABLE_LEN, u16::MAX] {
            guest.parse(head, true);
            guest.parse(head, false);
        }
    }
}

/// A read of `segments` segments of a sector each.
fn long(segments: usize) -> (Guest, u16) {
    let guest = Guest::new();
    guest.write(DATA, &header(0, 5));
    let mut pieces = vec![(DATA, 16, false)];
    pieces.extend((0..segments).map(|_| (DATA + 1024, 512, true)));
    pieces.push((DATA + 512, 1, true));
    let none = Vec::new();
    let layout = Layout {
        readable_cuts: Vec::new(),
        writable_cuts: Vec::new(),
        start: 0,
        gaps: none,
        indirect: None,
        write_flag: false,
        step: 1,
    };
    let head = layout.write(&guest, &layout.link(&pieces));
    (guest, head)
}

#[test]
fn as_many_segments_as_we_promise_fit_and_far_more_do_not() {
    let (guest, head) = long(MAX_SEGMENTS);
    let (chain, scratch) = guest.parse(head, false);
    let Ok(Parsed::Transfer { sectors, data, .. }) = chain.request else { panic!("{:?}", chain.request) };
    assert_eq!((sectors as usize, data.len()), (MAX_SEGMENTS, MAX_SEGMENTS));
    assert_eq!(scratch.iovecs[data].iter().map(Iovec::len).sum::<usize>(), MAX_SEGMENTS * 512);
    let (guest, head) = long(MAX_IOVECS);
    let (chain, _) = guest.parse(head, false);
    assert!(chain.status.is_some() && chain.request.is_err(), "and are told so");
    // The vring has as many descriptors; a chain that is longer has no end that we look for.
    let (guest, head) = long(usize::from(TABLE_LEN) - 2);
    assert_eq!(guest.address(&guest.parse(head, false).0.status.unwrap()), DATA + 512);
}

#[test]
fn flags_of_ranges_are_those_of_the_standard() {
    let status = |kind: u32, flags: u32, count: usize| {
        let guest = Guest::new();
        let mut bytes = header(kind, 0);
        (0..count).for_each(|_| bytes.extend(range_bytes(1, 2, flags)));
        guest.write(DATA, &bytes);
        guest.put(TABLE, 0, &Raw { addr: DATA, len: bytes.len() as u32, flags: NEXT, next: 1 });
        guest.put(TABLE, 1, &Raw { addr: DATA + 4096, len: 1, flags: WRITE, next: 0 });
        guest.parse(0, false).0.request.err()
    };
    assert_eq!(status(11, 0, 1), None);
    assert_eq!(status(11, 1, 1), Some(Status::Unsupported), "a discard always unmaps, and may not say so");
    assert_eq!(status(13, 1, 1), None);
    assert_eq!(status(13, 2, 1), Some(Status::Unsupported));
    assert_eq!(status(13, 3, 1), Some(Status::Unsupported));
    assert_eq!(status(13, 0, MAX_RANGES), None);
    assert_eq!(status(13, 0, MAX_RANGES + 1), Some(Status::IoErr));
    assert_eq!(status(11, 0, 0), Some(Status::IoErr));
}

/// A driver whose data is of the wrong direction is told so, not obeyed.
#[test]
fn data_of_the_wrong_direction_is_refused() {
    for (kind, flags) in [(0, NEXT), (1, NEXT | WRITE), (8, NEXT), (11, NEXT | WRITE), (13, NEXT | WRITE)] {
        let guest = Guest::new();
        guest.write(DATA, &header(kind, 0));
        guest.put(TABLE, 0, &Raw { addr: DATA, len: 16, flags: NEXT, next: 1 });
        guest.put(TABLE, 1, &Raw { addr: DATA + 4096, len: 512, flags, next: 2 });
        guest.put(TABLE, 2, &Raw { addr: DATA + 8192, len: 1, flags: WRITE, next: 0 });
        let (chain, _) = guest.parse(0, false);
        assert_eq!(chain.request.err(), Some(Status::IoErr), "type {kind}");
        assert!(chain.status.is_some());
    }
}

#[test]
fn what_drivers_send_most_is_read_straight() {
    for (kind, write, indirect) in [(0, false, false), (1, true, false), (0, false, true), (1, true, true)] {
        let guest = Guest::new();
        let table = if indirect { NESTED } else { TABLE };
        guest.write(DATA, &header(kind, 5));
        let way = if write { NEXT } else { NEXT | WRITE };
        guest.put(table, 0, &Raw { addr: DATA, len: 16, flags: NEXT, next: 1 });
        guest.put(table, 1, &Raw { addr: DATA + 4096, len: 1024, flags: way, next: 2 });
        guest.put(table, 2, &Raw { addr: DATA + 512, len: 1, flags: WRITE, next: 0 });
        if indirect {
            guest.put(TABLE, 0, &Raw { addr: NESTED, len: 48, flags: INDIRECT, next: 0 });
        }
        let straight = |indirect| {
            straight::straight(guest.memory.table(TABLE, TABLE_LEN), 0, indirect, &mut Scratch::default())
        };
        assert!(straight(true).is_some(), "{kind} {indirect}");
        assert_eq!(straight(false).is_some(), !indirect, "only what was negotiated");
        guest.parse(0, true);
    }
}
