//! Opening an image or a device: the one way to it, for volumes and for offline jobs.
//!
//! One writer, however the store is named: images are locked as QEMU locks its own ([`lock`]), and block devices are
//! claimed besides (`O_EXCL` of `open(2)`), as a mount, device-mapper, or swap claims theirs. Whoever was waited for may
//! have put another file under the name: then that one is opened.

#![forbid(unsafe_code)]

use super::Error;
use super::lock::{self, Access};
use crate::block::Format;
use crate::users::{self, User};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// What is to be opened, and how.
#[derive(Clone, Copy, Debug)]
pub struct Opening<'a> {
    /// The image or device.
    pub path: &'a Path,
    /// For writing too.
    pub write: bool,
    /// Past the page cache.
    pub direct: bool,
    /// The lock to take; `None`: nobody is asked, and nobody kept off.
    pub lock: Option<Access>,
    /// Claim a block device also where it is only read: nothing that is mounted is read then.
    pub claim: bool,
    /// Take an image in another format for raw.
    pub raw: bool,
    /// How long to wait for whoever has it. A server that was killed has it until the last of its requests that the
    /// kernel still carries out is complete, since each of them keeps the file open.
    pub patience: Duration,
}

/// How often a device is tried that is waited for.
const TRY_EVERY: Duration = Duration::from_millis(20);

/// Processes named at most.
const NAMED: usize = 3;

/// How often a file is opened anew that was replaced meanwhile.
const REPLACED: u32 = 10;

impl Opening<'_> {
    /// Opens it.
    ///
    /// # Errors
    /// When it is missing, of the wrong kind, not ours to open, in use, or an image in another format.
    pub fn open(&self) -> Result<File, Error> {
        let limit = Instant::now() + self.patience;
        let mut attempts = 0;
        let file = loop {
            let (file, metadata) = self.claimed(limit)?;
            if !self.locked(&file, limit)? {
                return Err(Error::InUse(user(self.path, &metadata)));
            }
            attempts += 1;
            // Whoever had it may have replaced it, and what we have locked has no name any more.
            if self.lock.is_none() || attempts == REPLACED || self.names(&metadata) {
                break file;
            }
        };
        if !self.raw
            && let Some(format) = format(&file)
        {
            return Err(Error::Format(format));
        }
        settle(&file, self.direct).map_err(|source| Error::Io { what: "cannot be made blocking", source })?;
        Ok(file)
    }

    /// An open file or device; a device that is to be claimed is ours.
    fn claimed(&self, limit: Instant) -> Result<(File, Metadata), Error> {
        loop {
            let is_device = fs::metadata(self.path).is_ok_and(|found| found.file_type().is_block_device());
            let claim = is_device && self.claims();
            match self.attempt(claim) {
                Ok(file) => {
                    let io = |source| Error::Io { what: "its metadata cannot be read", source };
                    let metadata = file.metadata().map_err(io)?;
                    let kind = metadata.file_type();
                    if !kind.is_file() && !kind.is_block_device() {
                        return Err(Error::Kind);
                    }
                    // Another file since it was looked at: once more.
                    if !kind.is_block_device() || claim || !self.claims() {
                        return Ok((file, metadata));
                    }
                }
                Err(error) if claim && error.kind() == io::ErrorKind::ResourceBusy => {
                    if Instant::now() >= limit {
                        let metadata = fs::metadata(self.path);
                        let by = metadata.map_or_else(|_| String::new(), |found| user(self.path, &found));
                        return Err(Error::InUse(by));
                    }
                    sleep(TRY_EVERY);
                }
                Err(error) if self.direct && error.raw_os_error() == Some(libc::EINVAL) => {
                    return Err(Error::NoDirect);
                }
                Err(source) if self.write && denied(&source) => {
                    return Err(Error::Io {
                        what: "cannot be opened for writing (read-only=on goes without)",
                        source,
                    });
                }
                Err(source) => return Err(Error::Io { what: "cannot be opened", source }),
            }
        }
    }

    fn claims(&self) -> bool {
        match self.lock {
            Some(Access::Write) => true,
            Some(Access::Read) => self.claim,
            Some(Access::ReadShared) | None => false,
        }
    }

    fn attempt(&self, claim: bool) -> io::Result<File> {
        // O_NONBLOCK keeps a FIFO from blocking us before its kind is known; it means nothing for the others.
        let mut flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        if self.direct {
            flags |= libc::O_DIRECT;
        }
        if claim {
            flags |= libc::O_EXCL;
        }
        OpenOptions::new().read(true).write(self.write).custom_flags(flags).open(self.path)
    }

    /// False when it is in use.
    fn locked(&self, file: &File, limit: Instant) -> Result<bool, Error> {
        let Some(access) = self.lock else { return Ok(true) };
        lock::take(file, access, limit, self.path).or_else(|errno| {
            // As QEMU does by default: a file system without locks is no reason not to serve.
            log::warn!("{}: is not locked: {errno}", self.path.display());
            Ok(true)
        })
    }

    /// Whether the path still leads to the file that `opened` is of.
    fn names(&self, opened: &Metadata) -> bool {
        fs::metadata(self.path).is_ok_and(|now| {
            (now.dev(), now.ino(), now.rdev()) == (opened.dev(), opened.ino(), opened.rdev())
        })
    }
}

/// Who has it, as far as can be seen from here: "another process" and its name, or what it is mounted at.
fn user(path: &Path, metadata: &Metadata) -> String {
    let names = |users: Vec<User>| users.iter().map(User::name).collect::<Vec<_>>().join(", ");
    if metadata.file_type().is_block_device() {
        let users = users::Device::numbered(metadata.rdev()).users();
        if !users.is_empty() {
            return names(users);
        }
    }
    let processes = users::having_open(path, NAMED);
    match processes.is_empty() {
        true => "another process".to_owned(),
        false => format!("another process: {}", names(processes)),
    }
}

fn denied(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS))
}

/// The format of an image, if it is another than raw. One whose ends cannot be read is taken as it is: that is for its
/// user to find.
pub fn format(file: &File) -> Option<Format> {
    // Direct I/O would want aligned memory for so little.
    let flags = fcntl_getfl(file).ok().filter(|flags| flags.contains(OFlags::DIRECT));
    if let Some(flags) = flags {
        fcntl_setfl(file, flags - OFlags::DIRECT).ok()?;
    }
    let look = || {
        let mut head = [0; Format::LOOK];
        let mut tail = [0; Format::LOOK];
        let some = |buffer: &mut [u8], offset| {
            let read = read_up_to(file, buffer, offset);
            read.inspect_err(|error| log::debug!("its format cannot be looked at: {error}")).ok()
        };
        let read = some(&mut head, 0)?;
        let footer = super::probe::size(file).ok().and_then(|bytes| bytes.checked_sub(Format::LOOK as u64));
        let end = footer.and_then(|from| some(&mut tail, from)).unwrap_or(0);
        Format::detect(&head[..read], &tail[..end])
    };
    let found = look();
    if let Some(flags) = flags {
        fcntl_setfl(file, flags).ok()?;
    }
    found
}

/// Does something with a file that nobody else does I/O on: whatever direct I/O would ask of its memory.
///
/// # Errors
/// Those of `act`, and the kernel's.
pub(in crate::engine) fn plainly<T>(file: &File, act: impl FnOnce(&File) -> io::Result<T>) -> io::Result<T> {
    let flags = fcntl_getfl(file)?;
    fcntl_setfl(file, flags - OFlags::DIRECT)?;
    let done = act(file);
    fcntl_setfl(file, flags)?;
    done
}

/// Fills as much of `buffer` as there is: how much.
///
/// # Errors
/// The kernel's.
pub(in crate::engine) fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Makes it what requests are served from.
fn settle(file: &File, direct: bool) -> io::Result<()> {
    // On a non-blocking file io_uring answers EAGAIN instead of waiting for the disk.
    let mut flags = fcntl_getfl(file)? - OFlags::NONBLOCK;
    flags.set(OFlags::DIRECT, direct);
    // A disk has no use for the time of its last read, and keeping it costs 2 % of a cached one. Only the file's owner
    // may ask for that.
    if fcntl_setfl(file, flags | OFlags::NOATIME).is_err() {
        fcntl_setfl(file, flags)?;
    }
    Ok(())
}
