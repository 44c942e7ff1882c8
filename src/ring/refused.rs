//! Why there is no io_uring, and what to do about it.
//!
//! The kernel has a handful of numbers for it, each of which means several things. What it says besides, below /proc,
//! tells most of them apart.

#![forbid(unsafe_code)]

use rustix::process::{Resource, getrlimit};
use std::fs;
use std::io;

/// The first release that has all that a ring of ours is made with.
const OLDEST: (u32, u32) = (6, 1);

const PAGE: u64 = 4096;

/// The error of whoever made a ring, or could not use it, with the cause and the way out. `locked`: bytes of lockable
/// memory that the ring takes.
pub(super) fn explain(error: &io::Error, locked: u64) -> io::Error {
    io::Error::new(error.kind(), format!("io_uring: {error}: {}", cause(error, locked, &Kernel::here())))
}

/// Bytes that the kernel counts as locked for a ring of so many entries (`rings_size` of io_uring/io_uring.c, which they
/// are counted by since Linux 6.14).
pub(super) fn locked(entries: u32, completions: u32) -> u64 {
    let (entries, completions) = (u64::from(entries), u64::from(completions));
    let pages = |bytes: u64| bytes.next_multiple_of(PAGE);
    // A header, 16 bytes for each completion and 4 for each submission; the submissions themselves.
    pages(256 + 16 * completions + 4 * entries) + pages(64 * entries)
}

/// What is known of the system.
struct Kernel {
    release: String,
    /// `kernel.io_uring_disabled`, where it is there (6.6).
    disabled: Option<u32>,
    /// A seccomp filter is in force on this process.
    filtered: bool,
    /// Bytes that may be locked; `None`: without a limit.
    lockable: Option<u64>,
    /// Files that may be open.
    files: Option<u64>,
}

impl Kernel {
    fn here() -> Kernel {
        let read = |path: &str| fs::read_to_string(path).ok();
        let status = read("/proc/self/status").unwrap_or_default();
        Kernel {
            release: read("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            disabled: read("/proc/sys/kernel/io_uring_disabled").and_then(|text| text.trim().parse().ok()),
            filtered: status.lines().any(|line| {
                line.split_once(':').is_some_and(|(key, value)| key == "Seccomp" && value.trim() == "2")
            }),
            lockable: getrlimit(Resource::Memlock).current,
            files: getrlimit(Resource::Nofile).current,
        }
    }

    fn is_old(&self) -> bool {
        let mut numbers =
            self.release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse().ok());
        matches!((numbers.next(), numbers.next()), (Some(major), Some(minor)) if (major, minor) < OLDEST)
    }
}

fn cause(error: &io::Error, locked: u64, kernel: &Kernel) -> String {
    const FILTER: &str = "a seccomp filter forbids it (of a container, or SystemCallFilter= of a unit): let \
        io_uring_setup, io_uring_enter and io_uring_register pass";
    let (major, minor) = OLDEST;
    let too_old = format!("Linux {major}.{minor} or later is needed, and this is {}", kernel.release);
    match (error.raw_os_error(), kernel.disabled) {
        (Some(libc::ENOMEM), _) => {
            let (needed, what) = (locked.div_ceil(1024), "of lockable memory");
            match kernel.lockable {
                Some(limit) => format!(
                    "it takes {needed} KiB {what}, of which all processes of this user together may have {} KiB: raise \
                     RLIMIT_MEMLOCK (ulimit -l, LimitMEMLOCK= of a unit), or make do with fewer workers (--workers)",
                    limit / 1024
                ),
                None => "there is no memory left".into(),
            }
        }
        (Some(libc::EMFILE), _) => format!(
            "at most {} files may be open: raise RLIMIT_NOFILE (ulimit -n, LimitNOFILE= of a unit)",
            kernel.files.map_or("that many".into(), |files| files.to_string())
        ),
        (Some(libc::EPERM), Some(2)) => {
            "it is forbidden to all: `sysctl kernel.io_uring_disabled=0` allows it".into()
        }
        (Some(libc::EPERM), Some(1)) if !kernel.filtered => "it is forbidden to all but root and the group \
            kernel.io_uring_group: join that, or `sysctl kernel.io_uring_disabled=0` allows it"
            .into(),
        (Some(libc::ENOSYS | libc::EINVAL), _) if kernel.is_old() => too_old,
        // Where the setting is there, the system call is.
        (Some(libc::ENOSYS), None) if !kernel.filtered => {
            "this kernel is built without it (CONFIG_IO_URING)".into()
        }
        (Some(libc::EINVAL), _) => "this kernel refuses the settings that we need".into(),
        _ if kernel.filtered => FILTER.into(),
        (Some(libc::EPERM | libc::EACCES), _) => {
            "the system forbids it (a security module, such as SELinux or AppArmor?): its log says more"
                .into()
        }
        _ => "without it nothing can be served; `ringblk features` shows what is missing".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(errno: i32, change: impl FnOnce(&mut Kernel)) -> String {
        let mut kernel = Kernel {
            release: "6.18.5-amd64".into(),
            disabled: Some(0),
            filtered: false,
            lockable: Some(64 << 10),
            files: Some(20),
        };
        change(&mut kernel);
        cause(&io::Error::from_raw_os_error(errno), 212 << 10, &kernel)
    }

    #[test]
    fn each_cause_has_its_way_out() {
        let none = |_: &mut Kernel| {};
        let filtered = |kernel: &mut Kernel| kernel.filtered = true;
        for (text, word) in [
            (told(libc::EPERM, |kernel| kernel.disabled = Some(2)), "sysctl kernel.io_uring_disabled=0"),
            (told(libc::EPERM, |kernel| kernel.disabled = Some(1)), "io_uring_group"),
            (told(libc::EPERM, filtered), "seccomp"),
            (told(libc::ENOSYS, filtered), "seccomp"),
            (told(libc::EACCES, filtered), "seccomp"),
            (told(libc::EPERM, none), "SELinux"),
            (told(libc::EACCES, none), "SELinux"),
            (told(libc::EINVAL, |kernel| kernel.release = "5.15.0".into()), "Linux 6.1 or later"),
            (told(libc::ENOSYS, |kernel| kernel.release = "4.19".into()), "this is 4.19"),
            (told(libc::ENOSYS, |kernel| kernel.disabled = None), "CONFIG_IO_URING"),
            (told(libc::EINVAL, none), "refuses the settings"),
            (told(libc::ENOMEM, none), "takes 212 KiB of lockable memory"),
            (told(libc::ENOMEM, none), "64 KiB: raise RLIMIT_MEMLOCK (ulimit -l"),
            (told(libc::ENOMEM, |kernel| kernel.lockable = None), "no memory left"),
            (told(libc::EMFILE, none), "at most 20 files"),
            (told(libc::EIO, none), "ringblk features"),
        ] {
            assert!(text.contains(word), "{text}");
        }
    }

    #[test]
    fn releases_are_numbers() {
        let old =
            |release: &str| told(libc::EINVAL, |kernel| kernel.release = release.into()).contains("later");
        assert!(old("6.0.19") && old("5.19") && !old("6.1.0-13-amd64") && !old("7.0-rc1") && !old(""));
    }
}
