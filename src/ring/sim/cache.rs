//! A volatile write cache, sector by sector.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

/// A power cut tears writes at multiples of it.
const SECTOR: usize = 512;

/// When the completion of a write was seen; `None` before.
pub(super) type Moment = Rc<Cell<Option<u64>>>;

/// What was written to each sector and is not stable, oldest first.
#[derive(Default)]
pub(super) struct Cache {
    sectors: BTreeMap<usize, Vec<Piece>>,
}

/// What one write wrote to one sector, or a part of it.
struct Piece {
    at: usize,
    bytes: Vec<u8>,
    seen: Moment,
}

impl Cache {
    /// Somebody wrote `range`, which `file` holds now, and will have seen so at `seen`.
    pub fn add(&mut self, range: Range<usize>, file: &[u8], seen: &Moment) {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / SECTOR + 1) * SECTOR);
            let piece = Piece { at, bytes: file[at..end].to_vec(), seen: seen.clone() };
            self.sectors.entry(at / SECTOR).or_default().push(piece);
            at = end;
        }
    }

    /// Writes back the sectors of `range` as they are.
    pub fn write_back_range(&mut self, stable: &mut Vec<u8>, range: Range<usize>) {
        for sector in range.start / SECTOR..range.end.div_ceil(SECTOR) {
            self.sectors.remove(&sector).into_iter().flatten().for_each(|piece| piece.write_back(stable));
        }
    }

    /// Writes back, of each sector, everything up to the last piece that `must` be, in order.
    pub fn write_back(&mut self, stable: &mut Vec<u8>, mut must: impl FnMut(&Moment) -> bool) {
        for pieces in self.sectors.values_mut() {
            let last = pieces.iter().map(|piece| must(&piece.seen)).collect::<Vec<_>>();
            let count = last.iter().rposition(|must| *must).map_or(0, |last| last + 1);
            pieces.drain(..count).for_each(|piece| piece.write_back(stable));
        }
    }

    /// Whether everything that was written is stable.
    pub fn is_empty(&self) -> bool {
        self.sectors.values().all(Vec::is_empty)
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.sectors.clear();
    }
}

impl Piece {
    fn write_back(self, stable: &mut Vec<u8>) {
        stable.resize(stable.len().max(self.at + self.bytes.len()), 0);
        stable[self.at..][..self.bytes.len()].copy_from_slice(&self.bytes);
    }
}
