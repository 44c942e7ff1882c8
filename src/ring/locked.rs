//! Memory that stays in memory. What serves a disk must not wait for a page to be found or read: where memory is short,
//! the page may have to be written out first, to that disk.

#![forbid(unsafe_code)]

use nix::sys::mman::{MlockAllFlags, mlockall};
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

/// Why the process's memory is not locked.
#[derive(Debug, thiserror::Error)]
pub enum NotLocked {
    /// What comes later would be refused.
    #[error(
        "no more than {} KiB may be locked (RLIMIT_MEMLOCK): raise it (`ulimit -l unlimited`, LimitMEMLOCK=infinity) or \
         give us CAP_IPC_LOCK",
        .0 / 1024
    )]
    Limit(u64),
    /// The kernel's refusal.
    #[error(transparent)]
    Kernel(#[from] io::Error),
}

/// Set by [`lock_process`].
static LOCKED: AtomicBool = AtomicBool::new(false);

/// Whether what is mapped now will be locked as it is used.
pub fn is_locked() -> bool {
    LOCKED.load(Ordering::Relaxed)
}

/// Locks all that the process has now, its program included, and each page of what it gets from now on as soon as it is
/// used. To be called early, before there are mappings that are large and hardly used: those there are, are made
/// resident.
///
/// # Errors
/// When not everything can be locked; then nothing is.
pub fn lock_process() -> Result<(), NotLocked> {
    let limit = getrlimit(Resource::Memlock).current;
    let free = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    if let Some(limit) = limit.filter(|_| !free) {
        return Err(NotLocked::Limit(limit));
    }
    let failed = |errno: nix::Error| NotLocked::Kernel(errno.into());
    mlockall(MlockAllFlags::MCL_CURRENT).map_err(failed)?;
    let on_use = MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT as _);
    mlockall(MlockAllFlags::MCL_FUTURE | on_use).map_err(failed)?;
    LOCKED.store(true, Ordering::Relaxed);
    Ok(())
}

/// Uses so much of this thread's stack that later calls find it in memory.
#[inline(never)]
pub fn use_stack() {
    let stack = [0u8; 64 << 10];
    std::hint::black_box(&stack);
}
