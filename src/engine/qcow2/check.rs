//! Whether an image's tables and its refcounts agree: what `qemu-img check` looks at.
//!
//! For an image that nobody writes to. It takes 4 bytes of memory for each cluster that something points at.

#![forbid(unsafe_code)]

use super::entry::{COPIED, Entry, Layout, OFFSET};
use super::header::{Header, HeaderError};
use super::refcounts::Refcounts;
use crate::block::Size;
use crate::engine::file::read_up_to;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Clusters whose counts are kept in one piece.
const PIECE: u64 = 4096;

/// Findings that are told one by one; all are counted.
const TOLD: usize = 100;

/// Why an image cannot be looked through.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// Its first cluster.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// Clusters belong to what we do not look through, and would seem to be leaks.
    #[error("has {0}, which we do not look through: use qemu-img check")]
    Beyond(&'static str),
    /// The kernel's answer.
    #[error("cannot be read")]
    Read(#[source] io::Error),
    /// Likewise.
    #[error("cannot be written")]
    Write(#[source] io::Error),
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// Of what is wrong, the first hundred.
    pub errors: Vec<String>,
    /// How much is wrong.
    pub corruptions: u64,
    /// Clusters that are counted and not used. They do no harm but take room.
    pub leaks: u64,
    /// Leaks that were mended.
    pub leaks_fixed: u64,
    /// Clusters of the disk that have a place in the image.
    pub allocated_clusters: u64,
    /// Of these, compressed ones.
    pub compressed_clusters: u64,
    /// Clusters that the disk has.
    pub total_clusters: u64,
    /// Behind the last cluster that is used.
    pub image_end_offset: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.errors.iter().try_for_each(|error| writeln!(f, "error:      {error}"))?;
        writeln!(f, "corrupted:  {}", self.corruptions)?;
        match self.leaks_fixed {
            0 => writeln!(f, "leaked:     {} clusters", self.leaks)?,
            fixed => writeln!(f, "leaked:     {} clusters, {fixed} of them free again", self.leaks)?,
        }
        let (allocated, total) = (self.allocated_clusters, self.total_clusters);
        writeln!(f, "allocated:  {allocated} of {total} clusters, {} compressed", self.compressed_clusters)?;
        let end = self.image_end_offset;
        writeln!(f, "end:        {} ({end} bytes)", Size(end).approx())
    }
}

/// Looks an image through; with `repair`, leaks are counted as free from then on.
///
/// # Errors
/// See [`CheckError`]. What is merely wrong is in the report.
pub fn check(file: &File, repair: bool) -> Result<Report, CheckError> {
    let header = Header::read(file).map_err(CheckError::Read)??;
    if header.snapshots > 0 {
        return Err(CheckError::Beyond("internal snapshots"));
    }
    if header.autoclear != 0 {
        return Err(CheckError::Beyond("bitmaps"));
    }
    let layout = Layout::of(&header);
    let mut check = Check {
        file,
        header: &header,
        layout,
        used: Used::default(),
        copied: Vec::new(),
        report: Report::default(),
    };
    check.report.total_clusters = header.size.div_ceil(layout.cluster());
    check.tables()?;
    check.counts(repair)?;
    Ok(check.report)
}

/// How often each cluster is used.
#[derive(Default)]
struct Used(BTreeMap<u64, Box<[u32]>>);

impl Used {
    fn add(&mut self, cluster: u64) {
        let piece = self.0.entry(cluster / PIECE).or_insert_with(|| vec![0; PIECE as usize].into());
        let count = &mut piece[(cluster % PIECE) as usize];
        *count = count.saturating_add(1);
    }

    fn get(&self, cluster: u64) -> u64 {
        let piece = self.0.get(&(cluster / PIECE));
        piece.map_or(0, |piece| u64::from(piece[(cluster % PIECE) as usize]))
    }

    /// Clusters that are used at all, in order.
    fn all(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().flat_map(|(piece, counts)| {
            let counts = counts.iter().enumerate().filter(|(_, count)| **count > 0);
            counts.map(move |(at, count)| (*piece * PIECE + at as u64, u64::from(*count)))
        })
    }
}

struct Check<'a> {
    file: &'a File,
    header: &'a Header,
    layout: Layout,
    used: Used,
    /// Clusters, and whether what points at them says that it is alone.
    copied: Vec<(u64, bool)>,
    report: Report,
}

impl Check<'_> {
    fn wrong(&mut self, what: std::fmt::Arguments<'_>) {
        self.report.corruptions += 1;
        if self.report.errors.len() < TOLD {
            self.report.errors.push(what.to_string());
        }
    }

    /// Bytes `len` from `offset` on; what the file has not is zero.
    fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, CheckError> {
        let mut bytes = vec![0; len];
        read_up_to(self.file, &mut bytes, offset).map_err(CheckError::Read)?;
        Ok(bytes)
    }

    fn words(&self, offset: u64, count: u64) -> Result<Vec<u64>, CheckError> {
        let bytes = self.read(offset, count as usize * 8)?;
        Ok(bytes
            .chunks_exact(8)
            .map(|word| u64::from_be_bytes(word.try_into().unwrap_or_default()))
            .collect())
    }

    /// Something points at these bytes.
    fn uses(&mut self, range: Range<u64>) {
        let bits = self.layout.cluster_bits;
        for cluster in range.start >> bits..range.end.div_ceil(1 << bits) {
            self.used.add(cluster);
        }
        self.report.image_end_offset =
            self.report.image_end_offset.max(range.end.next_multiple_of(1 << bits));
    }

    /// Where a table is that an entry points at, if it can be there.
    fn table(&mut self, entry: u64, allowed: u64, what: &str) -> Option<u64> {
        let offset = entry & OFFSET;
        if offset == 0 && entry & !allowed == 0 {
            return None;
        }
        let sound = entry & !(OFFSET | allowed) == 0 && offset & (self.layout.cluster() - 1) == 0;
        if !sound || offset == 0 {
            self.wrong(format_args!("{what} is {entry:#x}, which cannot be"));
            return None;
        }
        Some(offset)
    }

    /// The header, and all that the L1 table leads to.
    fn tables(&mut self) -> Result<(), CheckError> {
        let cluster = self.layout.cluster();
        let header = self.header;
        self.uses(0..cluster);
        let l1_bytes = u64::from(header.l1_entries) * 8;
        self.uses(header.l1_offset..header.l1_offset + l1_bytes);
        let l1 = self.words(header.l1_offset, header.l1_entries.into())?;
        for (index, entry) in l1.into_iter().enumerate() {
            let Some(table) = self.table(entry, COPIED, &format!("entry {index} of the L1 table")) else {
                continue;
            };
            self.uses(table..table + cluster);
            if self.used.get(table >> self.layout.cluster_bits) > 1 {
                // Looked through already, or something else: once is enough.
                self.wrong(format_args!("the table at {table:#x} is in use twice"));
                continue;
            }
            self.copied.push((table, entry & COPIED != 0));
            self.second(index as u64, table)?;
        }
        Ok(())
    }

    /// A L2 table.
    fn second(&mut self, index: u64, table: u64) -> Result<(), CheckError> {
        let layout = self.layout;
        let words = self.words(table, layout.cluster() / 8)?;
        for (at, words) in words.chunks_exact(layout.words()).enumerate() {
            let entry = Entry { word: words[0], bitmap: words.get(1).copied().unwrap_or(0) };
            let mut units = (0..layout.cluster()).step_by(layout.unit() as usize);
            if !units.all(|within| layout.place(entry, within).is_some()) {
                let number = index * layout.entries() + at as u64;
                self.wrong(format_args!(
                    "the entry of the disk's cluster {number} is {:#x}, which cannot be",
                    entry.word
                ));
                continue;
            }
            let holds = layout.holds(entry);
            if holds.is_empty() {
                continue;
            }
            self.report.allocated_clusters += 1;
            if layout.packed(entry).is_some() {
                self.report.compressed_clusters += 1;
            } else {
                self.copied.push((holds.start, entry.word & COPIED != 0));
            }
            self.uses(holds);
        }
        Ok(())
    }

    /// Holds the refcounts against what is used.
    fn counts(&mut self, repair: bool) -> Result<(), CheckError> {
        let (header, layout) = (self.header, self.layout);
        let (cluster, bits) = (layout.cluster(), layout.cluster_bits);
        self.uses(header.reftable_offset..header.reftable_offset + header.reftable_bytes());
        let table = self.words(header.reftable_offset, header.reftable_bytes() / 8)?;
        let mut blocks = Vec::new();
        for (index, entry) in table.into_iter().enumerate() {
            // What is below 512 is reserved in both kinds of entries.
            if let Some(block) = self.table(entry, 0, &format!("entry {index} of the refcount table")) {
                self.uses(block..block + cluster);
                blocks.push((index as u64, block));
            }
        }
        let mut stored = Refcounts::new(header, Vec::new(), None);
        let per_block = stored.per_block();
        let is_counted =
            |number: u64| blocks.binary_search_by_key(&(number / per_block), |(index, _)| *index).is_ok();
        let uncounted: Vec<_> = self.used.all().filter(|(number, _)| !is_counted(*number)).collect();
        for (number, _) in uncounted {
            self.wrong(format_args!("the cluster at {:#x} is used, and no block counts it", number << bits));
        }
        let mut copied = std::mem::take(&mut self.copied);
        copied.sort_unstable();
        for (index, block) in &blocks {
            stored.insert(*index, self.read(*block, cluster as usize)?);
            for number in index * per_block..(index + 1) * per_block {
                let (counted, used) = (stored.get(number), self.used.get(number));
                if counted < used {
                    let offset = number << bits;
                    self.wrong(format_args!(
                        "the cluster at {offset:#x} is used {used} times, and its count is {counted}"
                    ));
                } else if counted > used {
                    self.report.leaks += 1;
                    if repair {
                        stored.set(number, used);
                    }
                }
            }
            let within = |(offset, _): &&(u64, bool)| (offset >> bits) / per_block == *index;
            let first = copied.partition_point(|(offset, _)| (offset >> bits) / per_block < *index);
            for (offset, alone) in copied[first..].iter().take_while(within) {
                let counted = stored.get(offset >> bits);
                if *alone != (counted == 1) {
                    self.wrong(format_args!(
                        "the cluster at {offset:#x} is marked as used {}, and its count is {counted}",
                        if *alone { "once" } else { "by several" }
                    ));
                }
            }
            if let Some((_, range, bytes)) = stored.next_dirty() {
                self.file.write_all_at(bytes, block + range.start as u64).map_err(CheckError::Write)?;
            }
            stored.remove(*index);
        }
        if repair && self.report.leaks > 0 {
            self.file.sync_all().map_err(CheckError::Write)?;
            self.report.leaks_fixed = self.report.leaks;
        }
        Ok(())
    }
}
