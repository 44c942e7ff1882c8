//! An opened image, as all workers share it.

#![forbid(unsafe_code)]

use super::cache::{Cache, SLICE, Spot, State as SliceState};
use super::claims::{Claims, Pins};
use super::entry::{COPIED, Entry, Layout, OFFSET, Place};
use super::error::Error;
use super::header::Header;
use super::refcounts::Refcounts;
use crate::block::{DiscardLimits, Geometry, SECTOR};
use crate::engine::file::{FileConfig, FileStore, ImageFormat, plainly};
use std::collections::BTreeSet;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The most bytes of one discard or write-zeroes: each cluster of it takes a change of the tables.
const MOST_AT_ONCE: u32 = 1 << 30;

/// One image file. What lies below it, other images or volumes, is not its business.
pub struct Image {
    pub file: FileStore,
    pub header: Header,
    pub layout: Layout,
    /// L1 entries, as in the image; and as many behind them as its clusters have room for, which are 0.
    l1: Box<[AtomicU64]>,
    /// Bytes of the file: it only grows.
    file_end: AtomicU64,
    pub cache: Cache,
    state: Mutex<State>,
    /// Whether tables have changes in memory that are not in the file: as `state` says, for those who only want to know that.
    unsaved: AtomicBool,
    /// Held by one request at a time, across its waits for the store; see [`Refcounts`].
    pub owner: Mutex<Option<Box<Refcounts>>>,
    pub pins: Pins,
    /// Clusters that have held tables since it was opened: in order.
    tables: Mutex<Vec<u64>>,
    /// Writes are refused: it cannot be trusted with them.
    broken: AtomicBool,
    /// Its path, for the log.
    pub name: String,
    pub read_only: bool,
    shape: Geometry,
}

/// What changes, under a lock that is never held for long, nor across a wait.
#[derive(Default)]
pub struct State {
    pub claims: Claims,
    /// Numbers of clusters that are ours to use: their refcounts are 1 in the image, and they read zero.
    pub reserve: Vec<Range<u64>>,
    /// Slices with changes that nobody writes yet.
    pub dirty: Vec<Spot>,
    /// L1 entries with changes, likewise.
    pub dirty_l1: BTreeSet<usize>,
    /// Offsets of clusters that nothing points at in memory any more, and something may in the image.
    pub unmapped: Vec<Range<u64>>,
    /// Changes are being written.
    pub writing: bool,
    /// Some are written, and not durable.
    pub unsynced: bool,
}

/// What a look at the tables gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// Where the bytes are, and how many go on like that.
    Found(Place, u64),
    /// The slice at this offset has to be loaded first.
    Load(u64),
    /// What stands there cannot be.
    Damaged,
}

/// An L2 entry, in its slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Of the slice.
    pub tag: u64,
    /// The entry's first word there.
    pub at: usize,
}

impl Image {
    /// Opens an image and reads its header and its L1 table. `cache`: bytes of memory for tables.
    pub fn open(config: &FileConfig, cache: u64) -> Result<Image, Error> {
        let config = FileConfig { format: Some(ImageFormat::Raw), ..config.clone() };
        let (file, geometry) = FileStore::open(&config).map_err(Error::File)?;
        let file_end = file.size().map_err(Error::Read)?;
        let header = plainly(file.file(), Header::read).map_err(Error::Read)??;
        if file.is_direct() && header.cluster() >> 5 < u64::from(geometry.logical_block) {
            // Each unit, and what is packed, is read by itself.
            return Err(Error::Direct);
        }
        let l1 = words(&file, header.l1_offset, u64::from(header.l1_entries) * 8, file_end, "L1 table")?;
        let layout = Layout::of(&header);
        // Its clusters may have room for more.
        let room = (u64::from(header.l1_entries) * 8).next_multiple_of(layout.cluster()) / 8;
        let mut refcounts = None;
        let mut tables: Vec<u64> =
            l1.iter().map(|entry| entry & OFFSET).filter(|table| *table != 0).collect();
        if !config.read_only {
            is_writable(&header)?;
            let table =
                words(&file, header.reftable_offset, header.reftable_bytes(), file_end, "refcount table")?;
            tables.extend(table.iter().map(|block| block & OFFSET).filter(|block| *block != 0));
            tables.extend(clusters(layout, header.l1_offset, u64::from(header.l1_entries) * 8));
            tables.extend(clusters(layout, header.reftable_offset, header.reftable_bytes()));
            let fixed = (!file.is_regular()).then_some(file_end);
            refcounts = Some(Box::new(Refcounts::new(&header, table, fixed)));
        }
        tables.sort_unstable();
        if let Some(twice) = tables.windows(2).find(|pair| pair[0] == pair[1])
            && !config.read_only
        {
            return Err(Error::Overlap(twice[0]));
        }
        let mut file_end = file_end;
        let whole = file_end.next_multiple_of(layout.cluster());
        if !config.read_only && file.is_regular() && file_end < whole {
            // qemu-img ends a new image within its last table, and direct I/O reads whole blocks.
            file.set_size(whole).map_err(Error::Read)?;
            file_end = whole;
        }
        if file.is_direct() && !file_end.is_multiple_of(geometry.logical_block.into()) {
            return Err(Error::DirectEnd { end: file_end, block: geometry.logical_block });
        }
        Ok(Image {
            layout,
            l1: l1.into_iter().chain(std::iter::repeat(0)).take(room as usize).map(AtomicU64::new).collect(),
            file_end: AtomicU64::new(file_end),
            cache: Cache::new(SLICE.min(layout.cluster()), cache),
            state: Mutex::default(),
            unsaved: AtomicBool::new(false),
            owner: Mutex::new(refcounts),
            pins: Pins::default(),
            tables: Mutex::new(tables),
            broken: AtomicBool::new(false),
            name: config.path.display().to_string(),
            read_only: config.read_only,
            shape: geometry,
            file,
            header,
        })
    }

    /// Whether we can write to it and leave it whole.
    pub fn is_writable(&self) -> Result<(), Error> {
        is_writable(&self.header)
    }

    /// The disk that it makes, standing on nothing.
    pub fn geometry(&self) -> Result<Geometry, Error> {
        let own = Geometry::new(self.header.size, self.shape.logical_block).map_err(Error::Geometry)?;
        let unit = u32::try_from(self.layout.unit()).unwrap_or(u32::MAX);
        let most = MOST_AT_ONCE / SECTOR as u32;
        Ok(Geometry {
            physical_block: self.shape.physical_block.max(own.logical_block),
            io_min: self.shape.io_min,
            io_opt: self.shape.io_opt,
            read_only: self.read_only,
            volatile_cache: true,
            discard: Some(DiscardLimits { granularity: unit, max_sectors: most }),
            max_write_zeroes: most,
            dma_alignment: self.shape.dma_alignment,
            ..own
        })
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        // Each change is whole before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of the file: what is read past them is zero.
    pub fn file_end(&self) -> u64 {
        self.file_end.load(Ordering::Acquire)
    }

    /// The file has become so long.
    pub fn grown(&self, end: u64) {
        self.file_end.fetch_max(end, Ordering::AcqRel);
    }

    /// Whether writes are refused.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }

    /// Refuses writes from now on. False where they were refused before.
    pub fn refuse_writes(&self) -> bool {
        !self.broken.swap(true, Ordering::Relaxed)
    }

    /// Refuses writes from now on: nothing that is in the image is to become worse.
    pub fn give_up(&self, why: std::fmt::Arguments<'_>) {
        if self.refuse_writes() {
            log::error!("{}: {why}: it takes no more writes", self.name);
        }
    }

    /// the L1 table's entry for a byte of the disk, and which entry of its L2 table is meant.
    pub fn index(&self, offset: u64) -> (usize, u64) {
        let cluster = offset >> self.layout.cluster_bits;
        ((cluster / self.layout.entries()) as usize, cluster % self.layout.entries())
    }

    /// Where the table for this L1 entry is; 0: there is none. `None`: where none can be.
    pub fn table(&self, index: usize) -> Option<u64> {
        let entry = self.l1.get(index)?.load(Ordering::Acquire);
        let table = entry & OFFSET;
        let sound = entry & !(OFFSET | COPIED) == 0 && table & (self.layout.cluster() - 1) == 0;
        sound.then_some(table)
    }

    /// Entries that the L1 table has room for.
    pub fn l1_room(&self) -> u64 {
        self.l1.len() as u64
    }

    /// The bytes of the L1 entries from `first` on, as they are to be in the image.
    pub fn l1_bytes(&self, entries: Range<usize>) -> Vec<u8> {
        let end = entries.end.min(self.l1.len());
        self.l1[entries.start.min(end)..end]
            .iter()
            .flat_map(|entry| entry.load(Ordering::Acquire).to_be_bytes())
            .collect()
    }

    /// A L2 table is at `table` from now on. Under the lock of `state`.
    pub fn set_table(&self, state: &mut State, index: usize, table: u64) {
        if let Some(entry) = self.l1.get(index) {
            self.unsaved.store(true, Ordering::Release);
            entry.store(table | COPIED, Ordering::Release);
            state.dirty_l1.insert(index);
        }
    }

    /// Where the entry of a byte of the disk is. `None`: there is no table for it yet.
    pub fn slot(&self, offset: u64) -> Result<Option<Slot>, ()> {
        let (index, entry) = self.index(offset);
        match self.table(index) {
            None => Err(()),
            Some(0) => Ok(None),
            Some(table) => {
                let byte = entry * self.layout.words() as u64 * 8;
                let slice = self.cache.slice();
                Ok(Some(Slot { tag: table + byte / slice * slice, at: (byte % slice / 8) as usize }))
            }
        }
    }

    /// The entry in a slot; `None`: its slice has to be loaded.
    pub fn entry(&self, slot: Slot) -> Option<Entry> {
        if self.layout.extended {
            let [word, bitmap] = self.cache.read(slot.tag, slot.at)?;
            return Some(Entry { word, bitmap });
        }
        let [word] = self.cache.read(slot.tag, slot.at)?;
        Some(Entry { word, bitmap: 0 })
    }

    /// Where the byte at `offset` is, and how many of the `len` from there on follow it.
    pub fn lookup(&self, offset: u64, len: u64) -> Lookup {
        let unit = self.layout.unit();
        let mut found: Option<(Place, u64)> = None;
        let mut at = offset;
        while at < offset + len {
            let within = at & (unit - 1);
            let step = (unit - within).min(offset + len - at);
            let place = match self.slot(at) {
                Err(()) => None,
                Ok(None) => Some(Place::Below),
                Ok(Some(slot)) => match self.entry(slot) {
                    Some(entry) => self.layout.place(entry, at & (self.layout.cluster() - 1)),
                    None if found.is_none() => return Lookup::Load(slot.tag),
                    None => break,
                },
            };
            let place = match place {
                Some(Place::At(host)) => Some(Place::At(host + within)),
                Some(Place::Packed { packed, skip }) => Some(Place::Packed { packed, skip: skip + within }),
                other => other,
            };
            found = match (found, place) {
                (None, None) => return Lookup::Damaged,
                (None, Some(place)) => Some((place, step)),
                (Some((first, so_far)), Some(next)) if follows(first, so_far, next) => {
                    Some((first, so_far + step))
                }
                _ => break,
            };
            at += step;
        }
        found.map_or(Lookup::Damaged, |(place, len)| Lookup::Found(place, len))
    }

    /// Whether a slice's entries point at what they may: whole clusters of the file that hold no table.
    pub fn is_sound(&self, bytes: &[u8]) -> bool {
        let word = |at: usize| {
            let bytes = bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u64::from_be_bytes)
        };
        let end = self.file_end().next_multiple_of(self.layout.cluster());
        (0..bytes.len()).step_by(self.layout.words() * 8).all(|at| {
            let bitmap = if self.layout.extended { word(at + 8) } else { 0 };
            let entry = Entry { word: word(at), bitmap };
            let units = (0..self.layout.cluster()).step_by(self.layout.unit() as usize);
            let mut places = units.map(|within| self.layout.place(entry, within));
            let holds = self.layout.holds(entry);
            places.all(|place| place.is_some())
                && holds.end <= end
                && (holds.is_empty() || holds.start >= self.layout.cluster())
                && !self.holds_table(holds)
        })
    }

    fn holds_table(&self, range: Range<u64>) -> bool {
        let tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let first = tables.partition_point(|table| *table < range.start);
        tables.get(first).is_some_and(|table| *table < range.end)
    }

    /// A table has moved from there: its clusters may hold data one day.
    pub fn moved(&self, from: &Range<u64>) {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        tables.retain(|table| !from.contains(table));
    }

    /// Changes an entry, of which the slice is there. False: it is not.
    pub fn set_entry(&self, state: &mut State, slot: Slot, entry: Entry) -> bool {
        let Some((spot, found)) = self.cache.find(slot.tag) else { return false };
        if found == SliceState::Loading {
            return false;
        }
        // Who sees the entry sees this, too.
        self.unsaved.store(true, Ordering::Release);
        let first = match self.layout.extended {
            true => self.cache.write(spot, slot.at, [entry.word, entry.bitmap]),
            false => self.cache.write(spot, slot.at, [entry.word]),
        };
        if first {
            state.dirty.push(spot);
        }
        true
    }

    /// Whether the image lacks changes of its tables that are made. One load: each write asks for it.
    pub fn has_unsaved(&self) -> bool {
        self.unsaved.load(Ordering::Acquire)
    }

    /// All changes that there are have been written, or some have not. Under the lock.
    pub fn end_writing(&self, state: &mut State) {
        state.writing = false;
        let unsaved = !state.dirty.is_empty() || !state.dirty_l1.is_empty();
        self.unsaved.store(unsaved, Ordering::Release);
    }

    /// Whether stable storage lacks some, or clusters wait for it.
    pub fn has_unwritten(&self) -> bool {
        let state = self.state();
        self.has_unsaved() || state.unsynced || !state.unmapped.is_empty()
    }
}

/// Whether the unit after `so_far` bytes of `first` goes on like those.
fn follows(first: Place, so_far: u64, next: Place) -> bool {
    match (first, next) {
        (Place::At(a), Place::At(b)) => a + so_far == b,
        (Place::Packed { packed: a, skip: from }, Place::Packed { packed: b, skip: to }) => {
            a == b && from + so_far == to
        }
        (Place::Below, Place::Below) | (Place::Zero, Place::Zero) => true,
        _ => false,
    }
}

/// The clusters that a table takes.
fn clusters(layout: Layout, offset: u64, len: u64) -> impl Iterator<Item = u64> {
    (0..len.div_ceil(layout.cluster())).map(move |number| offset + number * layout.cluster())
}

/// Reads big-endian words.
fn words(file: &FileStore, offset: u64, len: u64, end: u64, what: &'static str) -> Result<Vec<u64>, Error> {
    if offset.checked_add(len).is_none_or(|last| last > end) {
        return Err(Error::CutOff(what));
    }
    let mut bytes = vec![0; len as usize];
    plainly(file.file(), |file| file.read_exact_at(&mut bytes, offset)).map_err(Error::Read)?;
    Ok(bytes.chunks_exact(8).map(|bytes| u64::from_be_bytes(bytes.try_into().unwrap_or_default())).collect())
}

/// Whether we can write to such an image and leave it whole.
fn is_writable(header: &Header) -> Result<(), Error> {
    if header.dirty {
        return Err(Error::Dirty);
    }
    if header.corrupt {
        return Err(Error::Corrupt);
    }
    if header.snapshots > 0 {
        return Err(Error::Snapshots(header.snapshots));
    }
    // The first is QEMU's persistent bitmaps, which every write would have to be noted in.
    if header.autoclear != 0 {
        return Err(Error::Autoclear);
    }
    Ok(())
}
