//! What an image can be kept in: a regular file or a block device.

#![forbid(unsafe_code)]

use std::fs::{self, File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::ImageError;
use crate::engine::file::{Access, Error, Opening};

/// How long an image is waited for that somebody has: one who is just going. A person waits, so not for long.
const PATIENCE: Duration = Duration::from_secs(1);

/// How an image is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Also while somebody writes it: what is read may be torn.
    pub force_share: bool,
    /// Its bytes as they are, even if they look like another format.
    pub raw: bool,
}

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A regular file.
    File,
    /// A block device.
    BlockDevice,
}

impl Kind {
    fn of(metadata: &Metadata) -> Option<Kind> {
        let kind = metadata.file_type();
        match (kind.is_file(), kind.is_block_device()) {
            (true, _) => Some(Kind::File),
            (_, true) => Some(Kind::BlockDevice),
            _ => None,
        }
    }
}

/// An open image.
#[derive(Debug)]
pub(super) struct Store {
    pub path: PathBuf,
    pub file: File,
    pub kind: Kind,
    pub metadata: Metadata,
    /// Bytes.
    pub size: u64,
}

impl Store {
    /// Opens for reading, and keeps writers off meanwhile.
    ///
    /// # Errors
    /// Anything but a regular file or a block device, one in use, another format, or the system's refusal.
    pub fn open(path: &Path, reading: Reading) -> Result<Store, ImageError> {
        Store::read(path, reading, true)
    }

    /// As [`open`](Self::open), to look at it only: a block device may be mounted.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_to_look(path: &Path, reading: Reading) -> Result<Store, ImageError> {
        Store::read(path, reading, false)
    }

    fn read(path: &Path, reading: Reading, claim: bool) -> Result<Store, ImageError> {
        look(path)?;
        let access = if reading.force_share { Access::ReadShared } else { Access::Read };
        let opening = Opening { claim, raw: reading.raw, ..opening(path, access) };
        Store::new(path, opening.open().map_err(refusal(path, "--force-share reads it all the same"))?)
    }

    /// Opens a regular file that is to be replaced, and keeps everybody off until this is dropped.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn to_replace(path: &Path) -> Result<Store, ImageError> {
        let file = opening(path, Access::Write).open();
        let store = Store::new(path, file.map_err(refusal(path, "an image in use is not replaced"))?)?;
        match store.kind {
            Kind::File => Ok(store),
            Kind::BlockDevice => Err(ImageError::unsuitable(path, "is no longer a regular file")),
        }
    }

    /// Opens an image to change it in place, and keeps everybody off meanwhile.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_to_mend(path: &Path) -> Result<Store, ImageError> {
        look(path)?;
        let opening = Opening { write: true, ..opening(path, Access::Write) };
        Store::new(path, opening.open().map_err(refusal(path, "an image in use is not repaired"))?)
    }

    /// Opens a block device for writing, and for nobody else: the kernel refuses one that is mounted or in use.
    ///
    /// # Errors
    /// Anything but a block device, or the system's refusal.
    pub fn open_device(path: &Path) -> Result<Store, ImageError> {
        look(path)?;
        let opening = Opening { write: true, ..opening(path, Access::Write) };
        let file = opening.open().map_err(refusal(path, "a device in use is not overwritten"))?;
        let store = Store::new(path, file)?;
        match store.kind {
            Kind::BlockDevice => Ok(store),
            Kind::File => Err(ImageError::unsuitable(path, "is no longer a block device")),
        }
    }

    fn new(path: &Path, mut file: File) -> Result<Store, ImageError> {
        let metadata = file.metadata().map_err(ImageError::system("look at", path))?;
        let kind = Kind::of(&metadata).ok_or_else(|| wrong_kind(path))?;
        let size = match kind {
            Kind::File => metadata.len(),
            // The end of a block device is where seeking to the end goes.
            Kind::BlockDevice => {
                file.seek(SeekFrom::End(0)).map_err(ImageError::system("find the size of", path))?
            }
        };
        Ok(Store { path: path.to_owned(), file, kind, metadata, size })
    }

    /// Logical block of a block device in bytes, from sysfs; `None` for a file.
    pub fn logical_block(&self) -> io::Result<Option<u32>> {
        if self.kind == Kind::File {
            return Ok(None);
        }
        let device = self.metadata.rdev();
        let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
        let base = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
        // A partition has no queue of its own; its disk is the directory above.
        let text = fs::read_to_string(base.join("queue/logical_block_size"))
            .or_else(|_| fs::read_to_string(base.join("../queue/logical_block_size")))?;
        let bytes = text.trim().parse().map_err(io::Error::other)?;
        Ok(Some(bytes))
    }
}

/// To read, whatever the format.
fn opening(path: &Path, access: Access) -> Opening<'_> {
    let lock = Some(access);
    Opening { path, write: false, direct: false, lock, claim: true, raw: true, patience: PATIENCE }
}

/// What is told of a store that cannot be opened; `way_out` where it is in use.
fn refusal(path: &Path, way_out: &'static str) -> impl FnOnce(Error) -> ImageError {
    let path = path.to_owned();
    move |error| match error {
        Error::Io { source, .. } => ImageError::system("open", &path)(source),
        Error::InUse(by) => ImageError::InUse { path, by, way_out },
        Error::Format(format) => ImageError::Format { path, format },
        Error::Kind => wrong_kind(&path),
        other => ImageError::unsuitable(&path, other.to_string()),
    }
}

/// Whether two files or two device nodes are one and the same store.
pub(super) fn same_store(a: &Metadata, b: &Metadata) -> bool {
    match (Kind::of(a), Kind::of(b)) {
        (Some(Kind::BlockDevice), Some(Kind::BlockDevice)) => a.rdev() == b.rdev(),
        _ => a.dev() == b.dev() && a.ino() == b.ino(),
    }
}

/// What is at `path`, refused before it is opened if it is no store: opening a pipe would wait for its other end.
pub(super) fn look(path: &Path) -> Result<Kind, ImageError> {
    let metadata = fs::metadata(path).map_err(ImageError::system("find", path))?;
    Kind::of(&metadata).ok_or_else(|| wrong_kind(path))
}

fn wrong_kind(path: &Path) -> ImageError {
    ImageError::unsuitable(path, "is neither a regular file nor a block device")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_and_block_devices() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [dir.path(), &fifo, Path::new("/dev/null")] {
            let error = Store::open(path, Reading::default()).unwrap_err();
            assert!(matches!(error, ImageError::Unsuitable { .. }), "{error}");
        }
        let error = Store::open(&dir.path().join("none"), Reading::default()).unwrap_err();
        assert!(matches!(error, ImageError::System { .. }), "{error}");
    }

    #[test]
    fn one_store_under_two_names() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b, c) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
        fs::write(&a, "x").unwrap();
        fs::hard_link(&a, &b).unwrap();
        fs::write(&c, "x").unwrap();
        let [a, b, c] = [a, b, c].map(|path| fs::metadata(path).unwrap());
        assert!(same_store(&a, &b));
        assert!(!same_store(&a, &c));
    }
}
