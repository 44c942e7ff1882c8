//! The directory that a socket is made in, which may belong to somebody else, or be open to anybody.
//!
//! Everything is done relative to a descriptor, so that nobody who moves directories about sends us elsewhere; and
//! what others can change is never waited for, nor trusted to be what we have made.

#![forbid(unsafe_code)]

use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{
    AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, RawMode, RenameFlags, Stat, flock, fstat, linkat,
    mkdirat, openat, renameat_with, statat, unlinkat,
};
use rustix::io::Errno;

/// What a lock is taken on, in the directory itself: it must be one for all who make sockets there.
const LOCK: &str = ".ringblk.lock";

/// How often and how long apart the lock is tried: a second in all.
const LOCK_TRIES: u32 = 50;
const LOCK_REST: Duration = Duration::from_millis(20);

/// How often something in the lock's place is removed before we do without.
const CLEAR_TRIES: u32 = 8;

/// Write permission for the group and for all.
const OTHERS_WRITE: RawMode = 0o022;

/// A directory, as it was when it was opened.
#[derive(Debug)]
pub(super) struct Directory {
    fd: OwnedFd,
    path: PathBuf,
}

/// Which file it is: device and inode.
pub(super) type Identity = (u64, u64);

#[allow(clippy::useless_conversion, reason = "other machines have other types")]
pub(super) fn identity(stat: &Stat) -> Identity {
    (stat.st_dev.into(), stat.st_ino.into())
}

fn is_ours(uid: u32) -> bool {
    uid == rustix::process::geteuid().as_raw()
}

impl Directory {
    /// Opens a directory. It is made (0755) if only its last part is missing.
    ///
    /// # Errors
    /// The system's.
    pub fn open(path: &Path) -> io::Result<Directory> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let made = match mkdirat(CWD, path, Mode::from_raw_mode(0o755)) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(error) => return Err(error.into()),
        };
        let flags = if made { flags | OFlags::NOFOLLOW } else { flags };
        let fd = openat(CWD, path, flags, Mode::empty())?;
        if made && !is_ours(fstat(&fd)?.st_uid) {
            return Err(io::Error::other("somebody else's directory has come into its place"));
        }
        Ok(Directory { fd, path: path.to_owned() })
    }

    /// The path of the directory, if nobody but root and us can make it lead elsewhere, or change what we have made in
    /// it: it and all above it belong to us or to root, and others may not write there or may not touch what is not
    /// theirs (the sticky bit).
    pub fn settled(&self) -> Option<PathBuf> {
        let path = self.path.canonicalize().ok()?;
        let safe = |dir: &Path| {
            fs::symlink_metadata(dir).is_ok_and(|found| {
                let closed =
                    found.mode() & OTHERS_WRITE == 0 || found.mode() & rustix::fs::Mode::SVTX.bits() != 0;
                closed && (found.uid() == 0 || is_ours(found.uid()))
            })
        };
        let here = fs::metadata(&path).ok().map(|found| (found.dev(), found.ino()));
        let same = here.is_some() && here == fstat(&self.fd).ok().as_ref().map(identity);
        (same && path.ancestors().all(safe)).then_some(path)
    }

    /// What has this name, not what it links to.
    pub fn stat(&self, name: &Path) -> rustix::io::Result<Stat> {
        statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// A descriptor of what has this name, good for nothing but saying what it is.
    pub fn look_at(&self, name: &Path) -> rustix::io::Result<OwnedFd> {
        openat(&self.fd, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
    }

    /// Removes a file if it is still this one.
    pub fn remove(&self, name: &Path, which: Identity) -> rustix::io::Result<()> {
        match self.stat(name) {
            Ok(found) if identity(&found) == which => unlinkat(&self.fd, name, AtFlags::empty()),
            _ => Ok(()),
        }
    }

    /// Keeps every other service of this user's from making or removing sockets here, until what it returns is dropped.
    /// `None` where somebody else will not let us, who could then as well remove the sockets themselves.
    ///
    /// # Errors
    /// When such a service takes too long, or files cannot be made here.
    pub fn lock(&self) -> io::Result<Option<Lock<'_>>> {
        let (mut waited, mut cleared) = (0, 0);
        while waited < LOCK_TRIES && cleared < CLEAR_TRIES {
            let Some(fd) = self.open_lock()? else {
                // A link, a pipe, a file that its owner has locked: whoever has put it there is to have no say.
                cleared += 1;
                let file = unlinkat(&self.fd, LOCK, AtFlags::empty());
                let _ = file.or_else(|_| unlinkat(&self.fd, LOCK, AtFlags::REMOVEDIR));
                continue;
            };
            match flock(&fd, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    waited += 1;
                    std::thread::sleep(LOCK_REST);
                    continue;
                }
                // No locks on this file system.
                Err(_) => return Ok(None),
            }
            // The last one who had it has removed it, and another may have made a new one.
            let which = identity(&fstat(&fd)?);
            if self.stat(Path::new(LOCK)).is_ok_and(|found| identity(&found) == which) {
                return Ok(Some(Lock { dir: self, which, _fd: fd }));
            }
            waited += 1;
        }
        if waited == LOCK_TRIES {
            let reason = format!("another ringblk has had its lock ({LOCK}) for a second");
            return Err(io::Error::new(io::ErrorKind::TimedOut, reason));
        }
        let path = self.path.display();
        log::warn!("{path}/{LOCK} is somebody else's: sockets are made without a lock there");
        Ok(None)
    }

    /// A file that nobody but us and root can open. `None` where its name is somebody else's.
    fn open_lock(&self) -> io::Result<Option<OwnedFd>> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = match openat(&self.fd, LOCK, flags, Mode::RUSR | Mode::WUSR) {
            Ok(fd) => fd,
            // Not that file, but all files.
            Err(error) if self.stat(Path::new(LOCK)).is_err() => return Err(error.into()),
            Err(_) => return Ok(None),
        };
        let found = fstat(&fd)?;
        let private = found.st_mode & 0o077 == 0 && found.st_nlink <= 1;
        let file = FileType::from_raw_mode(found.st_mode) == FileType::RegularFile;
        Ok((file && private && is_ours(found.st_uid)).then_some(fd))
    }

    /// Makes a directory in this one that nobody but us and root can look into or write.
    ///
    /// # Errors
    /// The system's.
    pub fn private(&self) -> io::Result<Private<'_>> {
        loop {
            let name = PathBuf::from(format!(".ringblk-{:016x}", RandomState::new().build_hasher().finish()));
            match mkdirat(&self.fd, &name, Mode::RWXU) {
                Ok(()) => {}
                Err(Errno::EXIST) => continue,
                Err(error) => return Err(error.into()),
            }
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let private = openat(&self.fd, &name, flags, Mode::empty()).and_then(|fd| {
                let found = fstat(&fd)?;
                let ours = is_ours(found.st_uid) && found.st_mode & 0o777 == 0o700;
                if ours { Ok(fd) } else { Err(Errno::PERM) }
            });
            return match private {
                Ok(fd) => {
                    Ok(Private { inside: Directory { fd, path: self.path.join(&name) }, outside: self, name })
                }
                Err(error) => {
                    let _ = unlinkat(&self.fd, &name, AtFlags::REMOVEDIR);
                    Err(error.into())
                }
            };
        }
    }
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A lock on a [`Directory`].
#[derive(Debug)]
pub(super) struct Lock<'a> {
    dir: &'a Directory,
    which: Identity,
    _fd: OwnedFd,
}

impl Drop for Lock<'_> {
    fn drop(&mut self) {
        // Before the descriptor goes, and the lock with it.
        let _ = self.dir.remove(Path::new(LOCK), self.which);
    }
}

/// A directory of ours inside another, gone with this value.
pub(super) struct Private<'a> {
    pub inside: Directory,
    outside: &'a Directory,
    name: PathBuf,
}

impl Private<'_> {
    /// The one file in it, whatever it is called once it is out: the way to it is longer than other paths.
    pub const FILE: &'static str = "socket";

    /// A path of that file that stays right, wherever the directory is moved.
    pub fn path(&self) -> PathBuf {
        through(&self.inside.fd).join(Private::FILE)
    }

    /// Moves [`Private::FILE`] out, where its new name is free.
    ///
    /// # Errors
    /// `EEXIST` where it is not; the system's.
    pub fn publish(&self, name: &Path) -> rustix::io::Result<()> {
        let (from, to) = (&self.inside.fd, &self.outside.fd);
        match renameat_with(from, Private::FILE, to, name, RenameFlags::NOREPLACE) {
            // A file system that does not know how; a link never replaces anything.
            Err(Errno::INVAL | Errno::NOSYS) => linkat(from, Private::FILE, to, name, AtFlags::empty()),
            other => other,
        }
    }
}

impl Drop for Private<'_> {
    fn drop(&mut self) {
        let _ = unlinkat(&self.inside.fd, Private::FILE, AtFlags::empty());
        let _ = unlinkat(&self.outside.fd, &self.name, AtFlags::REMOVEDIR);
    }
}

/// The path of an open file, whatever has become of its name.
pub(super) fn through(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}
