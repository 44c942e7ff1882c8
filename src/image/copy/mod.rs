//! `ringblk image copy`: a raw image from one file, block device or NBD export to another, holes kept.
//!
//! A bounded number of tasks share one walk over the source's extents. Each has a buffer of its own and takes the next
//! piece when it is done with the last, so at most `depth` transfers are in flight and no task waits for another.

#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::extents::{Extent, Extents};
use super::interrupt::unless_interrupted;
use super::store::Reading;
use super::{ImageError, run};
use crate::block::Size;

mod ends;
mod transfer;

use ends::{Source, Target};
use transfer::{CHUNK, Ends, Transfer};

/// How to copy.
#[derive(Clone, Copy, Debug)]
pub struct CopyOptions {
    /// Transfers in flight, 1 to [`CopyOptions::MAX_DEPTH`], of 1 MiB each.
    pub depth: usize,
    /// Replace a destination file, or overwrite a block device.
    pub force: bool,
    /// Look for zeroes in the data, and make holes of them.
    pub detect_zeroes: bool,
    /// How to take the source.
    pub reading: Reading,
}

impl CopyOptions {
    /// The completion queue of the runtime has room for these.
    pub const MAX_DEPTH: usize = 256;
    /// Depth where none is given.
    pub const DEFAULT_DEPTH: usize = 32;
}

impl Default for CopyOptions {
    fn default() -> CopyOptions {
        let reading = Reading::default();
        CopyOptions { depth: CopyOptions::DEFAULT_DEPTH, force: false, detect_zeroes: false, reading }
    }
}

/// Told how far a copy has come.
pub trait Progress {
    /// Before anything else.
    fn begin(&self, total_bytes: u64);
    /// So many more bytes are done, holes counted too.
    fn advance(&self, bytes: u64);
}

/// Nobody is told.
impl Progress for () {
    fn begin(&self, _: u64) {}
    fn advance(&self, _: u64) {}
}

/// What a copy did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopySummary {
    /// Size of the image.
    pub size: u64,
    /// Bytes written; the rest was holes.
    pub written: u64,
    /// From the first read to the last flush.
    pub elapsed: Duration,
}

impl fmt::Display for CopySummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (size, written) = (Size(self.size).approx(), Size(self.written).approx());
        let seconds = self.elapsed.as_secs_f64();
        let rate = Size((self.written as f64 / seconds.max(1e-9)) as u64).approx();
        write!(f, "copied {size} ({written} written) in {seconds:.2} s, {rate}/s")
    }
}

/// Copies an image.
///
/// A new file appears under its name when it is complete and on disk, for its owner alone (mode 0600). A block device or an export must be at least as
/// large as the source; what lies behind the copy is left as it was. A file that is replaced keeps its owner, mode and attributes.
///
/// # Errors
/// A destination that exists (without `force`), is the source itself, too small, in use or of another kind; a source
/// that is in use, in another format, or changes its size meanwhile; the system's refusal; a signal.
pub fn copy(
    source: &Path,
    destination: &Path,
    options: &CopyOptions,
    progress: Rc<dyn Progress>,
) -> Result<CopySummary, ImageError> {
    if !(1..=CopyOptions::MAX_DEPTH).contains(&options.depth) {
        let (most, depth) = (CopyOptions::MAX_DEPTH, options.depth);
        let reason = format!("the depth must be from 1 to {most}, not {depth}");
        return Err(ImageError::Setting(reason));
    }
    let source = Source::open(source, options.reading)?;
    let target = Target::open(&source, destination, options.force)?;
    let options = *options;
    run(destination, async move {
        let copying = copy_all(&source, &target, destination, &options, progress);
        let copied = unless_interrupted(copying)
            .await
            .map_err(ImageError::system("watch signals for", destination))?;
        match (copied, target) {
            (Some(Err(error)), _) => Err(error),
            (Some(Ok(summary)), Target::New(new)) => new.publish().map(|()| summary),
            (Some(Ok(summary)), Target::Device(_) | Target::Nbd(_)) => Ok(summary),
            (None, Target::New(_)) => Err(ImageError::Interrupted),
            (None, Target::Device(_) | Target::Nbd(_)) => {
                Err(ImageError::InterruptedDevice(destination.to_owned()))
            }
        }
    })
}

async fn copy_all(
    source: &Source,
    target: &Target,
    destination: &Path,
    options: &CopyOptions,
    progress: Rc<dyn Progress>,
) -> Result<CopySummary, ImageError> {
    let start = Instant::now();
    let size = source.size();
    progress.begin(size);
    if !options.reading.raw {
        source.is_raw().await?;
    }
    let extents = source.extents(target)?;
    let job = Rc::new(Job {
        pieces: RefCell::new(Pieces { extents, current: None }),
        failed: Cell::new(false),
        ends: Ends {
            source: source.end()?,
            source_path: source.path().to_owned(),
            target: target.end()?,
            target_path: destination.to_owned(),
            // A new file is one hole to begin with; a device holds what it held.
            write_holes: !matches!(target, Target::New(_)),
            detect_zeroes: options.detect_zeroes,
        },
        progress,
    });
    let tasks: Vec<_> = (0..options.depth).map(|_| tokio_uring::spawn(work(Rc::clone(&job)))).collect();
    let mut written = 0;
    let mut first_error = None;
    for task in tasks {
        let done = task.await.map_err(io::Error::other);
        let done = done.map_err(ImageError::system("finish the copy to", destination));
        match done.and_then(|result| result) {
            Ok(bytes) => written += bytes,
            Err(error) => {
                first_error.get_or_insert(error);
            }
        }
    }
    if let Some(error) = first_error {
        return Err(error);
    }
    source.is_unchanged()?;
    job.ends.target.flush().await.map_err(ImageError::system("flush", destination))?;
    Ok(CopySummary { size, written, elapsed: start.elapsed() })
}

/// What the tasks share.
struct Job {
    pieces: RefCell<Pieces>,
    /// Set by the first task that fails: the others stop at their next piece.
    failed: Cell<bool>,
    ends: Ends,
    progress: Rc<dyn Progress>,
}

/// One task. Returns the bytes it wrote.
async fn work(job: Rc<Job>) -> Result<u64, ImageError> {
    let mut transfer = Transfer::new();
    loop {
        let piece = job.pieces.borrow_mut().next();
        let Some(piece) = piece.filter(|_| !job.failed.get()) else {
            return Ok(transfer.written());
        };
        let done = match piece {
            Ok(piece) => transfer.copy(&job.ends, piece).await.map(|()| piece),
            Err(error) => Err(ImageError::system("find the holes of", &job.ends.source_path)(error)),
        };
        match done {
            Ok(piece) => job.progress.advance(piece.end - piece.start),
            Err(error) => {
                job.failed.set(true);
                return Err(error);
            }
        }
    }
}

/// Extents cut to what one transfer takes: data at multiples of [`CHUNK`], holes at larger steps.
struct Pieces {
    extents: Extents,
    current: Option<Extent>,
}

/// A step over a hole moves no data, but progress should be seen on a large one.
const HOLE_STEP: u64 = 1 << 30;

impl Iterator for Pieces {
    type Item = io::Result<Extent>;

    fn next(&mut self) -> Option<io::Result<Extent>> {
        let extent = match self.current.take() {
            Some(extent) => extent,
            None => match self.extents.next()? {
                Ok(extent) => extent,
                Err(error) => return Some(Err(error)),
            },
        };
        let step = if extent.data { CHUNK as u64 } else { HOLE_STEP };
        let end = (extent.start / step + 1).saturating_mul(step).min(extent.end);
        if end < extent.end {
            self.current = Some(Extent { start: end, ..extent });
        }
        Some(Ok(Extent { end, ..extent }))
    }
}

#[cfg(test)]
mod tests;
