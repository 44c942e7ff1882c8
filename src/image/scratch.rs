//! A file that is written before it has its name, and that nothing is left of if it never gets one.
//!
//! Where the file system has files without a name (`O_TMPFILE` of `open(2)`), the kernel itself forgets what was written by
//! a process that is killed. Elsewhere it has a hidden name beside its place, and its process holds a writer's lock on it: the next job in
//! that directory removes those whose lock is free.

#![forbid(unsafe_code)]

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, RenameFlags, fstatfs, linkat, renameat_with};
use rustix::io::Errno;

use crate::engine::file::{Access, try_take};

/// Such a file.
#[derive(Debug)]
pub(super) struct Scratch {
    pub file: File,
    directory: PathBuf,
    /// `None`: it has no name.
    name: Option<PathBuf>,
}

/// For its owner alone. What a directory's default list gives others is without effect by this too.
const MODE: u32 = 0o600;

/// Hidden names begin and end so. Between them are the process and a number.
const PREFIX: &str = ".ringblk-";
const SUFFIX: &str = ".tmp";

/// Names tried before giving up.
const NAME_TRIES: u32 = 1000;

/// How long a file must have been left alone to be given up where a lock says nothing.
const ABANDONED: Duration = Duration::from_secs(24 * 60 * 60);

impl Scratch {
    /// An empty file that only its owner may use, to be given a name in `directory`. Removes what dead jobs left there.
    ///
    /// # Errors
    /// The system's.
    pub fn new(directory: &Path) -> io::Result<Scratch> {
        remove_dead(directory);
        match nameless(directory) {
            Ok(Some(file)) => return Ok(Scratch { file, directory: directory.to_owned(), name: None }),
            Ok(None) => {}
            // What else is wrong, making a file with a name says too.
            Err(error) => log::debug!("{}: no O_TMPFILE: {error}", directory.display()),
        }
        let (file, name) = named(directory, |name| {
            let made = OpenOptions::new().read(true).write(true).create_new(true).mode(MODE).open(name)?;
            // Until it is locked it may be taken for a dead one.
            match lock(&made) && leads_to(name, &made.metadata()?) {
                true => Ok(made),
                false => Err(io::ErrorKind::AlreadyExists.into()),
            }
        })?;
        Ok(Scratch { file, directory: directory.to_owned(), name: Some(name) })
    }

    /// Gives it a name that nothing has. It has no other then.
    ///
    /// # Errors
    /// `AlreadyExists`, or the system's: it is as before.
    pub fn publish(&mut self, path: &Path) -> io::Result<()> {
        let Some(name) = &self.name else { return link_nameless(&self.file, path) };
        match renameat_with(CWD, name, CWD, path, RenameFlags::NOREPLACE) {
            // No such flag here. Dropping removes the other name.
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => match fs::hard_link(name, path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => move_to_own(name, path)?,
                linked => return linked,
            },
            renamed => renamed?,
        }
        self.name = None;
        Ok(())
    }

    /// Gives it the name of another file, which loses it at that moment.
    ///
    /// # Errors
    /// The system's: both are as before.
    pub fn publish_over(&mut self, path: &Path) -> io::Result<()> {
        if self.name.is_none() {
            // A rename needs a name to begin with.
            let (_, name) = named(&self.directory, |name| link_nameless(&self.file, name))?;
            self.name = Some(name);
        }
        if let Some(name) = &self.name {
            fs::rename(name, path)?;
        }
        self.name = None;
        Ok(())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let Some(name) = &self.name else { return };
        if let Err(error) = fs::remove_file(name)
            && error.kind() != io::ErrorKind::NotFound
        {
            log::warn!("cannot remove {}: {error}", name.display());
        }
    }
}

/// `make` with the first hidden name that it does not find taken.
fn named<T>(directory: &Path, mut make: impl FnMut(&Path) -> io::Result<T>) -> io::Result<(T, PathBuf)> {
    let mut attempt = 0;
    loop {
        let name = directory.join(format!("{PREFIX}{}-{attempt}{SUFFIX}", std::process::id()));
        match make(&name) {
            Ok(made) => return Ok((made, name)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && attempt < NAME_TRIES => {
                attempt += 1
            }
            Err(error) => return Err(error),
        }
    }
}

/// A file without a name that can be given one; `None` where there is no such thing.
fn nameless(directory: &Path) -> io::Result<Option<File>> {
    let open =
        || OpenOptions::new().read(true).write(true).mode(MODE).custom_flags(libc::O_TMPFILE).open(directory);
    // A name is given by a link. Where there are none, as in some containers, that is better known before the whole image
    // is written; and a file that had a name and lost it gets no other. A job killed between the link and its removal leaves
    // an empty file, which the next job in that directory removes.
    let probe = open()?;
    lock(&probe);
    match named(directory, |name| link_nameless(&probe, name)) {
        Ok(((), name)) => fs::remove_file(name)?,
        Err(error) => {
            log::debug!("{}: O_TMPFILE without links: {error}", directory.display());
            return Ok(None);
        }
    }
    let file = open()?;
    // Once it has a hidden name for a moment, it is not to be taken for a dead one.
    lock(&file);
    Ok(Some(file))
}

fn link_nameless(file: &File, path: &Path) -> io::Result<()> {
    // By the descriptor itself (AT_EMPTY_PATH) it takes a capability.
    let magic = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(linkat(CWD, magic, CWD, path, AtFlags::SYMLINK_FOLLOW)?)
}

/// The last resort, on file systems that can neither link nor rename without replacing: an empty file holds the place.
fn move_to_own(name: &Path, path: &Path) -> io::Result<()> {
    let place = OpenOptions::new().write(true).create_new(true).mode(MODE).open(path)?;
    let empty = place.metadata()?;
    let ours = |now: &Metadata| now.ino() == empty.ino() && now.dev() == empty.dev() && now.len() == 0;
    if !fs::symlink_metadata(path).is_ok_and(|now| ours(&now)) {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    fs::rename(name, path).inspect_err(|_| {
        if fs::symlink_metadata(path).is_ok_and(|now| ours(&now)) {
            let _ = fs::remove_file(path);
        }
    })
}

/// Whether it is ours now, or there are no locks.
fn lock(file: &File) -> bool {
    try_take(file, Access::Write).unwrap_or(true)
}

fn leads_to(path: &Path, file: &Metadata) -> bool {
    fs::symlink_metadata(path).is_ok_and(|now| (now.dev(), now.ino()) == (file.dev(), file.ino()))
}

/// Removes the hidden files of jobs that are dead. What cannot be done here is no matter.
fn remove_dead(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if !is_hidden_name(&entry.file_name().to_string_lossy()) {
            continue;
        }
        // Its lock is held until it is gone, so that the name is no other file's before.
        let removed = dead(&path).and_then(|dead| match dead {
            Some(_lock) => fs::remove_file(&path).map(|()| true),
            None => Ok(false),
        });
        match removed {
            Ok(true) => log::info!("removed {}, left by a job that was killed", path.display()),
            Ok(false) => {}
            Err(error) => log::debug!("cannot remove {}: {error}", path.display()),
        }
    }
}

/// Whether `name` is one that [`named`] makes, and no user would.
fn is_hidden_name(name: &str) -> bool {
    let middle = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_suffix(SUFFIX));
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    middle.and_then(|middle| middle.split_once('-')).is_some_and(|(pid, count)| number(pid) && number(count))
}

/// The file of a job that is dead, and with it its lock; `None` where the job may be alive.
fn dead(path: &Path) -> io::Result<Option<File>> {
    // Opening anything else may do something.
    if !fs::symlink_metadata(path)?.is_file() {
        return Ok(None);
    }
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    let free = try_take(&file, Access::Write);
    // Locks of other machines may not be seen from here.
    let certain = free.is_ok() && !is_remote(&file);
    let abandoned = metadata.modified()?.elapsed().is_ok_and(|age| age > ABANDONED);
    let dead = free.unwrap_or(true) && (certain || abandoned) && leads_to(path, &metadata);
    Ok(dead.then_some(file))
}

/// Whether the file system may be used by other machines, or somebody else's program (FUSE) says what is in it: by the
/// magic numbers of NFS, SMB, 9P, Ceph and AFS too (`linux/magic.h`).
fn is_remote(file: &File) -> bool {
    const REMOTE: [u64; 8] =
        [0x6969, 0x517b, 0xff53_4d42, 0xfe53_4d42, 0x0102_1997, 0x00c3_6400, 0x5346_414f, 0x6573_5546];
    fstatfs(file).map_or(true, |found| REMOTE.contains(&(found.f_type as u64 & 0xffff_ffff)))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// What is in a directory, sorted.
    pub fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// As on a file system that has no files without names.
    fn with_name(directory: &Path) -> Scratch {
        let (file, name) =
            named(directory, |name| OpenOptions::new().read(true).write(true).create_new(true).open(name))
                .unwrap();
        assert!(lock(&file));
        Scratch { file, directory: directory.to_owned(), name: Some(name) }
    }

    #[test]
    fn it_has_a_name_when_it_is_published_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        for make in [|dir: &Path| Scratch::new(dir).unwrap(), with_name] {
            drop(make(dir.path()));
            assert_eq!(names(dir.path()), [""; 0]);
            let mut scratch = make(dir.path());
            scratch.file.set_len(7).unwrap();
            assert!(!path.exists());
            scratch.publish(&path).unwrap();
            let mut second = make(dir.path());
            assert_eq!(second.publish(&path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
            second.publish_over(&path).unwrap();
            drop((scratch, second));
            assert_eq!((names(dir.path()), fs::metadata(&path).unwrap().len()), (vec!["a".to_owned()], 0));
            fs::remove_file(&path).unwrap();
        }
    }

    /// Where there is neither a link nor a rename that replaces nothing.
    #[test]
    fn the_last_resort() {
        let dir = tempfile::tempdir().unwrap();
        let (hidden, path) = (dir.path().join("hidden"), dir.path().join("a"));
        fs::write(&hidden, "new").unwrap();
        fs::write(&path, "old").unwrap();
        assert_eq!(move_to_own(&hidden, &path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        fs::remove_file(&path).unwrap();
        move_to_own(&hidden, &path).unwrap();
        assert_eq!((names(dir.path()), fs::read(&path).unwrap()), (vec!["a".to_owned()], b"new".to_vec()));
        assert!(move_to_own(&hidden, &dir.path().join("b")).is_err());
        assert_eq!(names(dir.path()), ["a"], "the place is given up");
    }

    #[test]
    fn the_dead_are_removed_and_the_living_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let living = with_name(dir.path());
        let lives = living.name.clone().unwrap();
        let own = dir.path().join(".ringblk-mine.tmp");
        let dead = dir.path().join(".ringblk-1-0.tmp");
        let elsewhere = dir.path().join("elsewhere");
        let link = dir.path().join(".ringblk-1-1.tmp");
        for path in [&own, &dead, &elsewhere] {
            fs::write(path, "x").unwrap();
        }
        std::os::unix::fs::symlink(&elsewhere, &link).unwrap();
        fs::create_dir(dir.path().join(".ringblk-1-2.tmp")).unwrap();
        // Another test's thread may fork, and hold the lock for a moment.
        for _ in 0..1000 {
            drop(Scratch::new(dir.path()).unwrap());
            if !dead.exists() {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(!dead.exists());
        assert!(lives.exists() && own.exists() && elsewhere.exists() && link.is_symlink());
        assert_eq!(names(dir.path()).len(), 5);
        drop(living);
        assert!(!lives.exists());
    }

    #[test]
    fn hidden_names() {
        assert!(is_hidden_name(".ringblk-4711-0.tmp"));
        for name in [
            ".ringblk-4711.tmp",
            ".ringblk--0.tmp",
            "ringblk-1-1.tmp",
            ".ringblk-1-1.tmp~",
            ".ringblk-a-1.tmp",
        ] {
            assert!(!is_hidden_name(name), "{name}");
        }
    }
}
