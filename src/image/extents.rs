//! Where a file has data and where it has holes.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};

/// A run of data, or a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// False for a hole, which reads as zeroes.
    pub data: bool,
}

/// Walks the first `size` bytes, without gaps and in order. Uses the file's seek position.
///
/// A file system that knows no holes, and a block device, are all data.
#[derive(Debug)]
pub(super) struct Extents {
    /// `None`: it is all data.
    file: Option<File>,
    position: u64,
    size: u64,
}

impl Extents {
    pub fn new(file: Option<File>, size: u64) -> Extents {
        Extents { file, position: 0, size }
    }

    /// The first byte at or after `from` of the kind asked for; `None` if there is none before `size`.
    fn seek(&self, file: &File, whence: Whence, from: u64) -> Result<Option<u64>, Errno> {
        let offset = i64::try_from(from).map_err(|_| Errno::EOVERFLOW)?;
        match lseek64(file, offset, whence) {
            Ok(found) => Ok(u64::try_from(found).ok().filter(|found| *found < self.size)),
            // Nothing but a hole up to the end of the file.
            Err(Errno::ENXIO) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn step(&self) -> io::Result<Extent> {
        let start = self.position;
        let rest = |data| Extent { start, end: self.size, data };
        let Some(file) = &self.file else { return Ok(rest(true)) };
        let data = match self.seek(file, Whence::SeekData, start) {
            Ok(Some(data)) => data,
            Ok(None) => return Ok(rest(false)),
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(rest(true)),
            Err(error) => return Err(error.into()),
        };
        if data > start {
            return Ok(Extent { start, end: data, data: false });
        }
        Ok(match self.seek(file, Whence::SeekHole, start)? {
            // A hole at the very place where data was found: the file changes under us. Call it data and go on.
            Some(end) if end > start => Extent { start, end, data: true },
            _ => rest(true),
        })
    }
}

impl Iterator for Extents {
    type Item = io::Result<Extent>;

    fn next(&mut self) -> Option<io::Result<Extent>> {
        if self.position >= self.size {
            return None;
        }
        let step = self.step();
        // After an error there is nothing more to say.
        self.position = step.as_ref().map_or(self.size, |extent| extent.end);
        Some(step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn extents(file: &File, size: u64, seeks: bool) -> Vec<Extent> {
        let file = seeks.then(|| file.try_clone().unwrap());
        Extents::new(file, size).collect::<io::Result<_>>().unwrap()
    }

    fn extent(start: u64, end: u64, data: bool) -> Extent {
        Extent { start, end, data }
    }

    #[test]
    fn holes_are_found_and_nothing_is_left_out() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10 << 20).unwrap();
        assert_eq!(extents(&file, 10 << 20, true), [extent(0, 10 << 20, false)]);

        file.write_all_at(&[1; 4096], 1 << 20).unwrap();
        file.write_all_at(&[1; 100], (10 << 20) - 100).unwrap();
        let found = extents(&file, 10 << 20, true);
        let mut position = 0;
        for extent in &found {
            assert_eq!(extent.start, position);
            assert!(extent.end > extent.start);
            position = extent.end;
        }
        assert_eq!(position, 10 << 20);
        assert_eq!(found.iter().filter(|extent| !extent.data).count(), 2, "{found:?}");

        assert_eq!(extents(&file, 10 << 20, false), [extent(0, 10 << 20, true)]);
    }

    #[test]
    fn an_empty_file_has_none_and_a_shrunken_one_ends_in_a_hole() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(extents(&file, 0, true), []);
        assert_eq!(extents(&file, 5000, true), [extent(0, 5000, false)]);
    }
}
