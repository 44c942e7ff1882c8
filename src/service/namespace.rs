//! A mount namespace of our own.
//!
//! When the last process of a mount namespace ends, the kernel unmounts what is mounted there, in that process's exit and
//! before it lets go of the process's files. Were that process the server of a disk that is mounted there, it would wait for
//! itself, for ever: the server of a container, say, whose disk is mounted in it. So the server is alone in a namespace that
//! nobody mounts its disks in. What is mounted and unmounted where we came from follows, where that is shared, so that we
//! keep no file system of the machine busy; and where the machine's own init is with us, which outlives us, we stay: mounts that
//! are not shared can be seen only from there.

#![forbid(unsafe_code)]

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use std::fs;
use std::path::{Path, PathBuf};

/// The process namespace of the machine itself: `PROC_PID_INIT_INO` of the kernel.
const MACHINE: &str = "pid:[4026531836]";

/// Leaves the mount namespace that we were started in. To be called before there are other threads, which would stay.
pub fn leave_mounts() {
    if has_init() {
        return;
    }
    let slave = || mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>);
    match unshare(CloneFlags::CLONE_NEWNS).and_then(|()| slave()) {
        Ok(()) => log::debug!("in a mount namespace of our own"),
        // A unit's namespace is its own already (ProtectSystem=), and may forbid others (RestrictNamespaces=).
        Err(error) => log::info!(
            "no mount namespace of our own ({error}): if we are the last process of ours, our disks must not be mounted in it"
        ),
    }
}

/// Whether the machine's first process shares our mounts.
fn has_init() -> bool {
    let of = |process: &str, what: &str| {
        fs::read_link(Path::new("/proc").join(process).join("ns").join(what)).ok()
    };
    let mounts = of("self", "mnt");
    of("self", "pid") == Some(PathBuf::from(MACHINE)) && mounts.is_some() && of("1", "mnt") == mounts
}
