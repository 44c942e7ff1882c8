//! One writer for an image, by the locks that QEMU and its tools take on theirs.
//!
//! QEMU locks single bytes of the file, far fewer than it has meanings for: byte 100 + n for "I do n", byte 200 + n for
//! "nobody else may do n", each shared, on the open file description (`block/file-posix.c` of QEMU). Who takes its own
//! looks whether anybody holds the opposite. The bytes need not exist, and nothing of the file's contents is locked.

#![forbid(unsafe_code)]

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use std::fs::File;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// `BLK_PERM_*` of QEMU: the number of each is the bit there.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

const DOES: i64 = 100;
const FORBIDS: i64 = 200;

/// What an image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To read it beside other readers, while nobody writes.
    Read,
    /// To write it, while nobody else does, nor reads what is to stay as it is.
    Write,
    /// To read it whoever writes: what is read may be torn.
    ReadShared,
}

impl Access {
    /// What it does, and what nobody else may do meanwhile.
    fn bits(self) -> (&'static [i64], &'static [i64]) {
        match self {
            Access::Read => (&[CONSISTENT_READ], &[WRITE, RESIZE]),
            Access::Write => (&[CONSISTENT_READ, WRITE], &[WRITE, RESIZE]),
            Access::ReadShared => (&[CONSISTENT_READ], &[]),
        }
    }
}

/// How often a lock is looked at that is waited for.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Takes what an open image needs, for as long as the file is open. False when somebody has it open in a way that this
/// one cannot be: any other writer, or for a writer any reader that wants the contents to stay. That is said only at
/// `limit`: the lock of a server that was killed is also what keeps a write of its from coming after ours.
///
/// # Errors
/// The kernel's: `ENOLCK` or `EOPNOTSUPP` where the file system has no locks.
pub(super) fn take(file: &File, access: Access, limit: Instant, path: &Path) -> Result<bool, Errno> {
    let mut told = false;
    loop {
        if try_take(file, access)? {
            return Ok(true);
        }
        if Instant::now() >= limit {
            return Ok(false);
        }
        if !std::mem::replace(&mut told, true) {
            let left = limit.saturating_duration_since(Instant::now()).as_secs_f32();
            log::info!("{}: is in use: waiting up to {left:.0} s for it", path.display());
        }
        sleep(POLL_INTERVAL);
    }
}

/// As [`take`], at once. What was not taken whole is not kept.
pub fn try_take(file: &File, access: Access) -> Result<bool, Errno> {
    let (does, forbids) = access.bits();
    // First ours, then a look at the others': of two that come at once at least one sees the other.
    let own = does.iter().map(|bit| DOES + bit).chain(forbids.iter().map(|bit| FORBIDS + bit));
    for byte in own {
        fcntl(file, FcntlArg::F_OFD_SETLK(&lock(libc::F_RDLCK, byte)))?;
    }
    let opposite = does.iter().map(|bit| FORBIDS + bit).chain(forbids.iter().map(|bit| DOES + bit));
    for byte in opposite {
        // Would a lock that nobody may share be refused? Not for what this description holds itself.
        let mut found = lock(libc::F_WRLCK, byte);
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))?;
        if i32::from(found.l_type) != libc::F_UNLCK {
            // Or two that wait would wait for each other.
            let all = libc::flock { l_len: FORBIDS + 100 - DOES, ..lock(libc::F_UNLCK, DOES) };
            fcntl(file, FcntlArg::F_OFD_SETLK(&all))?;
            return Ok(false);
        }
    }
    Ok(true)
}

fn lock(kind: i32, byte: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    #[test]
    fn one_writer_or_many_readers() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let open = || OpenOptions::new().read(true).write(true).open(image.path()).unwrap();
        // What another test's thread forks has our open files, and with them the locks, until it runs its program.
        let is_free = || {
            (0..1000).any(|_| {
                let free = try_take(&open(), Access::Write).unwrap();
                if !free {
                    std::thread::sleep(Duration::from_millis(1));
                }
                free
            })
        };
        let (first, second, third) = (open(), open(), open());
        assert_eq!(try_take(&first, Access::Read), Ok(true));
        assert_eq!(try_take(&second, Access::Read), Ok(true));
        assert_eq!(try_take(&third, Access::Write), Ok(false), "there are readers");
        drop((first, second, third));
        assert!(is_free());
        let writer = open();
        assert_eq!(try_take(&writer, Access::Write), Ok(true));
        assert_eq!(try_take(&writer, Access::Write), Ok(true), "its own");
        for access in [Access::Read, Access::Write] {
            assert_eq!(try_take(&open(), access), Ok(false));
        }
        let shared = open();
        assert_eq!(try_take(&shared, Access::ReadShared), Ok(true), "whoever writes");
        drop(shared);
        drop(writer);
        assert!(is_free(), "locks end with who record them");
    }

    /// Whoever waits keeps nobody else from it.
    #[test]
    fn what_was_not_taken_is_not_kept() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let open = || OpenOptions::new().read(true).write(true).open(image.path()).unwrap();
        let (reader, waits, other) = (open(), open(), open());
        assert_eq!(try_take(&reader, Access::Read), Ok(true));
        assert_eq!(try_take(&waits, Access::Write), Ok(false));
        assert_eq!(try_take(&other, Access::Read), Ok(true));
    }

    #[test]
    fn a_lock_that_is_about_to_go_is_waited_for() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let open = || OpenOptions::new().read(true).write(true).open(image.path()).unwrap();
        let dying = open();
        assert_eq!(try_take(&dying, Access::Write), Ok(true));
        let after = std::thread::spawn(move || {
            sleep(Duration::from_millis(200));
            drop(dying);
        });
        assert_eq!(
            take(&open(), Access::Write, Instant::now() + Duration::from_secs(60), image.path()),
            Ok(true)
        );
        after.join().unwrap();
    }
}
