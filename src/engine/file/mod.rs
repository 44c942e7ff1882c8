//! A volume on a regular file or a block device.

mod config;
mod inline;
mod lock;
mod open;
mod ops;
mod probe;
mod store;

pub(super) use config::check_path;
pub use config::{FileConfig, ImageFormat};
pub use lock::{Access, try_take};
pub use open::{Opening, format};
pub(super) use open::{plainly, read_up_to};
pub(super) use ops::FileOps;

use super::identity::Identity;
use super::losses::Losses;
use crate::block::{Format, Geometry, GeometryError};
use probe::{Kind, Store};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// How long a volume waits for whoever has its store: a server that was killed may take so long to end.
const DYING: Duration = Duration::from_secs(5);

/// An opened store, shared by all workers.
#[derive(Clone, Debug)]
pub struct FileStore {
    file: Arc<File>,
    /// Write-backs that failed, which the kernel tells one user of the open file.
    losses: Arc<Losses>,
    kind: Kind,
    /// Alignment a direct transfer's memory must have; 1 for buffered I/O, which takes any.
    memory_alignment: u32,
    /// What each range's length must be a multiple of for a direct transfer: the store's block, not the
    /// volume's, which may be coarser.
    length_alignment: u32,
    /// A read cannot be tried without waiting: see [`inline`].
    reads_wait: bool,
    /// See [`tail`](Self::tail).
    tail: u64,
}

/// Why a store cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Opening or asking about it failed.
    #[error("{what}")]
    Io {
        /// What we were doing.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("is neither a regular file nor a block device")]
    Kind,
    /// Somebody else has it in a way that excludes us: who.
    #[error("is in use by {0} (lock=off serves it all the same)")]
    InUse(String),
    /// It is no raw image, and nobody has said to take it for one.
    #[error(
        "is a {0} image, not a raw one: {way}, or serve its bytes as they are with format=raw",
        way = match .0 {
            Format::Qcow2 => "serve it by its driver (qcow2:PATH)",
            _ => "convert it (qemu-img convert -O raw)",
        }
    )]
    Format(Format),
    /// Direct I/O does not work there.
    #[error("direct=on: the file system does not support O_DIRECT on it")]
    NoDirect,
    /// The logical block asked for is finer than the store can do.
    #[error("block-size={asked}: the store needs at least {needed}")]
    Block {
        /// As configured.
        asked: u32,
        /// What direct I/O or the device needs.
        needed: u32,
    },
    /// See [`GeometryError`].
    #[error(transparent)]
    Geometry(#[from] GeometryError),
}

impl FileStore {
    /// Opens the store and finds out its shape.
    ///
    /// # Errors
    /// When it is missing, of the wrong kind, not ours to open, empty, or cannot do what was asked.
    pub fn open(options: &FileConfig) -> Result<(FileStore, Geometry), Error> {
        let access = if options.read_only { Access::Read } else { Access::Write };
        let opening = Opening {
            path: &options.path,
            write: !options.read_only,
            direct: options.direct,
            lock: options.lock.then_some(access),
            claim: false,
            raw: options.format.is_some(),
            patience: DYING,
        };
        let file = opening.open()?;
        let (store, mut geometry) = shape(&file, options)?;
        let logical_block = geometry.logical_block;
        let tail = store.bytes - geometry.bytes();
        geometry.physical_block = store.physical_block.max(logical_block);
        geometry.io_min = store.io_min;
        geometry.io_opt = store.io_opt;
        geometry.read_only = options.read_only;
        geometry.volatile_cache = true;
        geometry.discard = store.discard;
        geometry.max_write_zeroes = store.max_write_zeroes;
        geometry.dma_alignment = store.memory_alignment;
        let volume = FileStore {
            file: Arc::new(file),
            losses: Arc::default(),
            kind: store.kind,
            memory_alignment: store.memory_alignment,
            length_alignment: store.logical_block,
            reads_wait: store.reads_wait,
            tail,
        };
        Ok((volume, geometry))
    }
}

/// Looks for what would keep the store from being served, but for who else has it: it is opened to read, and neither locked
/// nor claimed, so that nobody notices who has it.
///
/// # Errors
/// See [`FileStore::open`].
fn examine(options: &FileConfig) -> Result<(), Error> {
    let (path, direct, raw) = (&options.path, options.direct, options.format.is_some());
    let opening =
        Opening { path, write: false, direct, lock: None, claim: false, raw, patience: Duration::ZERO };
    shape(&opening.open()?, options).map(drop)
}

/// What there is, and the disk that it makes.
fn shape(file: &File, options: &FileConfig) -> Result<(Store, Geometry), Error> {
    let store = Store::probe(file, options.direct)?;
    let logical_block = match options.block_size {
        Some(asked) if asked < store.logical_block => {
            return Err(Error::Block { asked, needed: store.logical_block });
        }
        asked => asked.unwrap_or(store.logical_block),
    };
    let geometry = Geometry::new(store.bytes, logical_block)?;
    Ok((store, geometry))
}

impl FileStore {
    /// Bytes behind the last whole block when it was opened.
    pub fn tail(&self) -> u64 {
        self.tail
    }

    /// Itself, for what is done while nobody is served.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Whether it goes past the page cache.
    pub fn is_direct(&self) -> bool {
        self.memory_alignment > 1
    }

    /// Which file or device it is, for `driver`.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn identity(&self, driver: &str) -> Result<Identity, Error> {
        Identity::of_file(driver, &self.file)
            .map_err(|source| Error::Io { what: "its metadata cannot be read", source })
    }

    /// Losses of acknowledged writes.
    pub(super) fn losses(&self) -> &Losses {
        &self.losses
    }

    /// Whether its length is ours to change: a block device's is not.
    pub fn is_regular(&self) -> bool {
        self.kind == Kind::Regular
    }

    /// Bytes it has now.
    ///
    /// # Errors
    /// The kernel's.
    pub fn size(&self) -> io::Result<u64> {
        probe::size(&self.file)
    }

    /// Cuts a regular file, or extends it with a hole.
    ///
    /// # Errors
    /// The kernel's: `EFBIG` for more than the file system holds in a file, `EINVAL` for what is no regular file.
    pub fn set_size(&self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)
    }

    /// As if it had been opened for direct I/O, with sectors of 512 bytes, for tests of what that asks of us where the
    /// file system has none.
    #[cfg(test)]
    pub(super) fn pretend_direct(self) -> FileStore {
        FileStore { memory_alignment: 512, length_alignment: 512, ..self }
    }

    /// Whether writes cannot be tried without waiting, where that is known. Direct ones can, and only a write can
    /// tell of the others.
    fn writes_wait(&self) -> Option<bool> {
        if self.is_direct() { Some(false) } else { self.reads_wait.then_some(true) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::config::ImageFormat;
    use rustix::fs::{OFlags, fcntl_getfl};
    use std::path::Path;

    fn options(path: &Path) -> FileConfig {
        FileConfig {
            path: path.into(),
            direct: false,
            read_only: false,
            lock: true,
            format: None,
            block_size: None,
        }
    }

    #[test]
    fn only_files_and_block_devices_are_served() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [fifo.as_path(), Path::new("/dev/null")] {
            assert!(matches!(FileStore::open(&options(path)), Err(Error::Kind)), "{}", path.display());
        }
        let mut directory = options(dir.path());
        directory.read_only = true;
        assert!(matches!(FileStore::open(&directory), Err(Error::Kind)));
        assert!(matches!(
            FileStore::open(&options(&dir.path().join("absent"))),
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound
        ));
    }

    /// Where it matters whether io_uring can read without waiting.
    #[test]
    fn files_in_memory_are_read_by_the_worker() {
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let (volume, _) = FileStore::open(&options(file.path())).unwrap();
        let tmpfs = rustix::fs::fstatfs(file.as_file()).unwrap().f_type == 0x0102_1994; // TMPFS_MAGIC of linux/magic.h
        assert_eq!(volume.reads_wait, tmpfs);
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let (volume, _) = FileStore::open(&options(file.path())).unwrap();
        assert_eq!(volume.writes_wait(), volume.reads_wait.then_some(true), "only a write tells");
        assert!(!fcntl_getfl(&*volume.file).unwrap().contains(OFlags::NONBLOCK));
    }

    /// The first bytes that QEMU gives a qcow2 image, and a disk that begins so all the same.
    #[test]
    fn other_formats_are_refused_unless_raw_is_said() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"QFI\xfb\0\0\0\x03").unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        for direct in [false, true] {
            let given = FileConfig { direct, ..options(file.path()) };
            match FileStore::open(&given) {
                Err(error @ Error::Format(Format::Qcow2)) => {
                    assert!(error.to_string().contains("qcow2") && error.to_string().contains("format=raw"));
                }
                Err(Error::NoDirect) if direct => continue,
                other => panic!("{other:?}"),
            }
            let raw = FileConfig { format: Some(ImageFormat::Raw), ..given };
            let (volume, _) = FileStore::open(&raw).unwrap();
            let flags = fcntl_getfl(&*volume.file).unwrap();
            assert_eq!(flags.contains(OFlags::DIRECT), direct);
        }
        std::fs::write(file.path(), b"# Disk DescriptorFile").unwrap();
        assert!(
            matches!(FileStore::open(&options(file.path())), Err(Error::Format(Format::Vmdk))),
            "a short one"
        );
    }

    /// What had the lock put another file under the name: that one is opened, and not the one that has no name any more.
    #[test]
    fn a_file_that_was_replaced_while_it_was_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (path, new) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&path, [1; 512]).unwrap();
        std::fs::write(&new, [2; 1024]).unwrap();
        let holder = File::open(&path).unwrap();
        assert_eq!(lock::try_take(&holder, Access::Write), Ok(true));
        let moving = path.clone();
        let waits = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            std::fs::rename(new, moving).unwrap();
            drop(holder);
        });
        let (_, geometry) = FileStore::open(&options(&path)).unwrap();
        waits.join().unwrap();
        assert_eq!(geometry.bytes(), 1024);
    }

    #[test]
    fn the_size_is_whole_blocks() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(FileStore::open(&options(file.path())), Err(Error::Geometry(_))));
        file.as_file().set_len(3 * 4096 + 512 + 17).unwrap();
        let (_, geometry) = FileStore::open(&options(file.path())).unwrap();
        assert_eq!((geometry.sectors(), geometry.logical_block), (25, 512));
        let coarse = FileConfig { block_size: Some(4096), ..options(file.path()) };
        let (_, geometry) = FileStore::open(&coarse).unwrap();
        assert_eq!((geometry.sectors(), geometry.logical_block), (24, 4096));
    }
}
