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

/// How long a server that was killed may take to let go of an image: until the last of its requests that the kernel
/// still carries out is complete, since each of them keeps the file open.
const DYING: Duration = Duration::from_secs(5);

/// How often it is looked at meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Takes what an open image needs, for as long as the file is open. False when somebody has it open in a way that this
/// one cannot be: any other writer, or for a writer any reader that wants the contents to stay. That is said only after
/// some seconds: the lock of a server that was killed is also what keeps a write of its from coming after ours.
///
/// # Errors
/// The kernel's: `ENOLCK` or `EOPNOTSUPP` where the file system has no locks.
pub(super) fn take(file: &File, read_only: bool, path: &Path) -> Result<bool, Errno> {
    let limit = Instant::now() + DYING;
    let mut told = false;
    loop {
        if try_take(file, read_only)? {
            return Ok(true);
        }
        if Instant::now() >= limit {
            return Ok(false);
        }
        if !std::mem::replace(&mut told, true) {
            log::info!("{}: is in use: waiting {} s for it", path.display(), DYING.as_secs());
        }
        sleep(LOOK_EVERY);
    }
}

fn try_take(file: &File, read_only: bool) -> Result<bool, Errno> {
    let does: &[i64] = if read_only { &[CONSISTENT_READ] } else { &[CONSISTENT_READ, WRITE] };
    let forbids = [WRITE, RESIZE];
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
                let free = try_take(&open(), false).unwrap();
                if !free {
                    std::thread::sleep(Duration::from_millis(1));
                }
                free
            })
        };
        let (first, second, third) = (open(), open(), open());
        assert_eq!(try_take(&first, true), Ok(true));
        assert_eq!(try_take(&second, true), Ok(true));
        assert_eq!(try_take(&third, false), Ok(false), "there are readers");
        drop((first, second, third));
        assert!(is_free());
        let writer = open();
        assert_eq!(try_take(&writer, false), Ok(true));
        assert_eq!(try_take(&writer, false), Ok(true), "its own");
        for read_only in [true, false] {
            assert_eq!(try_take(&open(), read_only), Ok(false));
        }
        drop(writer);
        assert!(is_free(), "locks end with who took them");
    }

    #[test]
    fn a_lock_that_is_about_to_go_is_waited_for() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let open = || OpenOptions::new().read(true).write(true).open(image.path()).unwrap();
        let dying = open();
        assert_eq!(try_take(&dying, false), Ok(true));
        let after = std::thread::spawn(move || {
            sleep(Duration::from_millis(200));
            drop(dying);
        });
        assert_eq!(take(&open(), false, image.path()), Ok(true));
        after.join().unwrap();
    }
}
