//! One task's way with one piece: read it, write it, or make zeroes of it.

#![forbid(unsafe_code)]

use std::io;
use std::ops::Range;
use std::path::PathBuf;

use crate::image::ImageError;
use crate::image::end::End;
use crate::image::extents::Extent;
pub(super) use crate::image::nbd::CHUNK;

/// Zeroes are looked for in steps of this: finer ones would make more, smaller writes than they save.
const ZERO_STEP: usize = 64 << 10;
/// What fallocate is asked for is aligned to this: no logical block is larger.
const BLOCK: u64 = 4096;

/// What is copied from and to.
pub(super) struct Ends {
    pub source: End,
    pub source_path: PathBuf,
    pub target: End,
    pub target_path: PathBuf,
    /// Whether zeroes have to be made in the target, or are there already.
    pub write_holes: bool,
    /// Whether data is searched for zeroes.
    pub detect_zeroes: bool,
}

/// A buffer, and how much went through it.
pub(super) struct Transfer {
    /// Taken by the kernel while it reads or writes.
    buffer: Vec<u8>,
    written: u64,
}

impl Transfer {
    pub fn new() -> Transfer {
        Transfer { buffer: vec![0; CHUNK], written: 0 }
    }

    /// Bytes of data written so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Copies a piece: at most [`CHUNK`] bytes if it is data.
    ///
    /// # Errors
    /// Names the end that failed.
    pub async fn copy(&mut self, ends: &Ends, piece: Extent) -> Result<(), ImageError> {
        let write_failed = ImageError::system("write to", &ends.target_path);
        if !piece.data {
            return self.zero(ends, piece.start, piece.end).await.map_err(write_failed);
        }
        let length = (piece.end - piece.start) as usize;
        self.read(&ends.source, piece.start, length)
            .await
            .map_err(ImageError::system("read from", &ends.source_path))?;
        self.store(ends, piece.start, length).await.map_err(write_failed)
    }

    /// Writes the first `length` bytes of the buffer at `start`.
    async fn store(&mut self, ends: &Ends, start: u64, length: usize) -> io::Result<()> {
        let runs = match ends.detect_zeroes {
            true => runs(&self.buffer[..length]),
            false => vec![(0..length, true)],
        };
        for (run, data) in runs {
            let (from, to) = (start + run.start as u64, start + run.end as u64);
            if data {
                self.written += run.len() as u64;
                self.write(&ends.target, from, run).await?;
            } else {
                // Making zeroes may need the buffer, and every later run its contents: so these are not in it.
                Transfer::new_for_zeroes().zero(ends, from, to).await?;
            }
        }
        Ok(())
    }

    fn new_for_zeroes() -> Transfer {
        Transfer { buffer: Vec::new(), written: 0 }
    }

    /// Makes `start..end` of the target read as zeroes. The buffer's contents are lost.
    async fn zero(&mut self, ends: &Ends, start: u64, end: u64) -> io::Result<()> {
        if !ends.write_holes {
            return Ok(());
        }
        let first = start.next_multiple_of(BLOCK).min(end);
        let last = (end & !(BLOCK - 1)).max(first);
        self.write_zeroes(&ends.target, start, first).await?;
        if first < last && !ends.target.zero(first, last).await {
            self.write_zeroes(&ends.target, first, last).await?;
        }
        self.write_zeroes(&ends.target, last, end).await
    }

    async fn write_zeroes(&mut self, target: &End, mut start: u64, end: u64) -> io::Result<()> {
        if start < end {
            self.buffer.clear();
            self.buffer.resize(CHUNK, 0);
        }
        while start < end {
            let length = (end - start).min(CHUNK as u64);
            self.write(target, start, 0..length as usize).await?;
            start += length;
        }
        Ok(())
    }

    /// Fills the first `length` bytes of the buffer, however many reads it takes.
    async fn read(&mut self, source: &End, start: u64, length: usize) -> io::Result<()> {
        let mut done = 0;
        while done < length {
            let buffer = std::mem::take(&mut self.buffer);
            let (result, buffer) = source.read(buffer, done..length, start + done as u64).await;
            self.buffer = buffer;
            done += progress(result, io::ErrorKind::UnexpectedEof)?;
        }
        Ok(())
    }

    /// Writes `range` of the buffer at `start`, however many writes it takes.
    async fn write(&mut self, target: &End, start: u64, range: Range<usize>) -> io::Result<()> {
        let mut done = 0;
        while done < range.len() {
            let (buffer, rest) = (std::mem::take(&mut self.buffer), range.start + done..range.end);
            let (result, buffer) = target.write(buffer, rest, start + done as u64).await;
            self.buffer = buffer;
            done += progress(result, io::ErrorKind::WriteZero)?;
        }
        Ok(())
    }
}

/// Bytes moved; nothing moved is the error `stuck`, an interrupted call is tried again.
fn progress(result: io::Result<usize>, stuck: io::ErrorKind) -> io::Result<usize> {
    match result {
        Ok(0) => Err(stuck.into()),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
        other => other,
    }
}

/// Cuts data into runs with and without anything but zeroes.
fn runs(data: &[u8]) -> Vec<(Range<usize>, bool)> {
    let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
    let mut start = 0;
    for step in data.chunks(ZERO_STEP) {
        let end = start + step.len();
        let has_data = step.iter().any(|byte| *byte != 0);
        match runs.last_mut() {
            Some((run, kind)) if *kind == has_data => run.end = end,
            _ => runs.push((start..end, has_data)),
        }
        start = end;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_uring::fs::File;

    #[test]
    fn runs_cover_the_data() {
        let mut data = vec![0; 5 * ZERO_STEP + 10];
        assert_eq!(runs(&data), [(0..data.len(), false)]);
        data[ZERO_STEP] = 1;
        data[3 * ZERO_STEP - 1] = 1;
        data[5 * ZERO_STEP + 9] = 1;
        assert_eq!(
            runs(&data),
            [
                (0..ZERO_STEP, false),
                (ZERO_STEP..3 * ZERO_STEP, true),
                (3 * ZERO_STEP..5 * ZERO_STEP, false),
                (5 * ZERO_STEP..5 * ZERO_STEP + 10, true),
            ]
        );
        assert_eq!(runs(&[]), []);
    }

    /// A regular file stands for a device here: it, too, holds something else before.
    #[test]
    fn zeroes_are_made_to_the_byte() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("target");
        let size = 3 * CHUNK;
        let ranges =
            [0..1, 1..4095, 4095..4097, 5000..20_000, 8192..CHUNK, CHUNK + 1..3 * CHUNK - 1, 0..3 * CHUNK];
        for range in ranges {
            std::fs::write(&path, vec![0xff; size]).unwrap();
            let open = || std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
            let runtime = tokio_uring::Runtime::new(&tokio_uring::builder()).unwrap();
            runtime.block_on(async {
                let ends = Ends {
                    source: End::File(File::from_std(open())),
                    source_path: path.clone(),
                    target: End::File(File::from_std(open())),
                    target_path: path.clone(),
                    write_holes: true,
                    detect_zeroes: false,
                };
                let piece = Extent { start: range.start as u64, end: range.end as u64, data: false };
                Transfer::new().copy(&ends, piece).await.unwrap();
            });
            let found = std::fs::read(&path).unwrap();
            assert_eq!(found.len(), size);
            for (index, byte) in found.iter().enumerate() {
                let expected = if range.contains(&index) { 0 } else { 0xff };
                assert_eq!(*byte, expected, "byte {index} for {range:?}");
            }
        }
    }
}
