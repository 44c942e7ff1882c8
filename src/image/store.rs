//! What an image can be kept in: a regular file or a block device.

#![forbid(unsafe_code)]

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::ImageError;

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
    /// Opens for reading.
    ///
    /// # Errors
    /// Anything but a regular file or a block device, or the system's refusal.
    pub fn open(path: &Path) -> Result<Store, ImageError> {
        look(path)?;
        let file = File::open(path).map_err(ImageError::system("open", path))?;
        Store::new(path, file)
    }

    /// Opens a block device for writing, and for nobody else: the kernel refuses one that is mounted or in use.
    ///
    /// # Errors
    /// Anything but a block device, or the system's refusal.
    pub fn open_device(path: &Path) -> Result<Store, ImageError> {
        look(path)?;
        let file =
            OpenOptions::new().write(true).custom_flags(libc::O_EXCL).open(path).map_err(
                |error| match error.kind() {
                    io::ErrorKind::ResourceBusy => {
                        ImageError::unsuitable(path, "is in use: mounted, or held by another program")
                    }
                    _ => ImageError::system("open for writing", path)(error),
                },
            )?;
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
            let error = Store::open(path).unwrap_err();
            assert!(matches!(error, ImageError::Unsuitable { .. }), "{error}");
        }
        let error = Store::open(&dir.path().join("none")).unwrap_err();
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
