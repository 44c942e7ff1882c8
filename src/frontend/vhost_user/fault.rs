//! A VMM that truncates the file behind its memory: touching what is gone is a SIGBUS, which would end us and every
//! other VMM with us.
//!
//! The handler puts memory of our own in the place of the region that is gone and hangs up on the VMM whose it is. The
//! access is then repeated by the processor and finds zeroes, which are as good as anything a hostile guest may have
//! written there. What the kernel does with such memory for us ends in `EFAULT`, without a signal.
//!
//! A signal handler may neither lock nor allocate, so the regions are in a table of fixed length, and the handler makes
//! system calls only.

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

/// Regions that can be guarded at a time. A VMM has a few dozen at most.
const PLACES: usize = 4096;

/// One region. `start` is 0 for a place that is free, 1 for one that is being filled.
struct Place {
    start: AtomicUsize,
    len: AtomicUsize,
    socket: AtomicI32,
    lost: AtomicBool,
}

const FREE: usize = 0;
const FILLING: usize = 1;

static TABLE: [Place; PLACES] = [const {
    Place {
        start: AtomicUsize::new(FREE),
        len: AtomicUsize::new(0),
        socket: AtomicI32::new(-1),
        lost: AtomicBool::new(false),
    }
}; PLACES];

/// What SIGBUS did before; the kernel's refusal when it took no handler.
static BEFORE: OnceLock<Result<SigAction, Errno>> = OnceLock::new();

/// A region that may go away under us without harm. To be dropped before the region is unmapped.
pub(super) struct Guard {
    place: &'static Place,
    _socket: Arc<UnixStream>,
}

impl Guard {
    /// Guards `len` bytes at `start`, a shared mapping of a VMM's that stays until the guard is dropped. When they are
    /// gone, `socket` is shut down.
    ///
    /// # Errors
    /// When there are too many regions, or the kernel takes no handler.
    pub fn new(start: *mut u8, len: usize, socket: &Arc<UnixStream>) -> io::Result<Guard> {
        install()?;
        let free = |place: &&Place| {
            place.start.compare_exchange(FREE, FILLING, Ordering::Acquire, Ordering::Relaxed).is_ok()
        };
        let place =
            TABLE.iter().find(free).ok_or_else(|| io::Error::other("too many memory regions in use"))?;
        place.len.store(len, Ordering::Relaxed);
        place.socket.store(socket.as_raw_fd(), Ordering::Relaxed);
        place.lost.store(false, Ordering::Relaxed);
        place.start.store(start as usize, Ordering::Release);
        Ok(Guard { place, _socket: socket.clone() })
    }

    /// Whether it is gone.
    pub fn is_lost(&self) -> bool {
        self.place.lost.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.place.start.store(FREE, Ordering::Release);
    }
}

fn install() -> Result<(), Errno> {
    let install = || {
        let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK | SaFlags::SA_NODEFER;
        let action = SigAction::new(SigHandler::SigAction(on_sigbus), flags, SigSet::empty());
        // SAFETY: the handler only loads and stores atomics and makes system calls.
        unsafe { sigaction(Signal::SIGBUS, &action) }
    };
    BEFORE.get_or_init(install).map(drop)
}

extern "C" fn on_sigbus(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes one, and a SIGBUS has an address.
    let at = unsafe { (*info).si_addr() } as usize;
    // SAFETY: the thread's own errno, which the interrupted code may be about to read.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let kept = unsafe { *errno };
    let mut replaced = false;
    for place in &TABLE {
        let start = place.start.load(Ordering::Acquire);
        let len = place.len.load(Ordering::Relaxed);
        if start <= FILLING || at.wrapping_sub(start) >= len {
            continue;
        }
        replaced = replaced || replace(start, len);
        place.lost.store(true, Ordering::Release);
        // SAFETY: takes no memory; the guard keeps the descriptor open.
        unsafe { libc::shutdown(place.socket.load(Ordering::Relaxed), libc::SHUT_RDWR) };
    }
    // SAFETY: as above.
    unsafe { *errno = kept };
    if !replaced {
        // Not a VMM's doing. The access is repeated, and this time what was there before us hears of it.
        match BEFORE.get() {
            // SAFETY: it is what this process had installed.
            Some(Ok(before)) => drop(unsafe { sigaction(Signal::SIGBUS, before) }),
            // SAFETY: it does not return.
            _ => unsafe { libc::abort() },
        }
    }
}

/// Puts zeroes in the place of a region. Whether that went well.
fn replace(start: usize, len: usize) -> bool {
    let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the range is a mapping that its guard's owner keeps, and that belongs to nobody but a VMM; whoever touched
    // it has a snapshot that holds it, so it is not being unmapped.
    let base = unsafe { libc::mmap(start as *mut libc::c_void, len, prot, flags, -1 as RawFd, 0) };
    base != libc::MAP_FAILED
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::Mapping;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsFd;

    fn mapped() -> (File, Mapping) {
        let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(8192).unwrap();
        let mapping = Mapping::shared(file.as_fd(), 0, 8192).unwrap();
        (file, mapping)
    }

    #[test]
    fn memory_that_is_truncated_reads_zero_and_costs_the_vmm_its_connection() {
        let (file, mapping) = mapped();
        let (_other_file, other) = mapped();
        let (ours, mut vmm) = UnixStream::pair().unwrap();
        let (others, _vmm) = UnixStream::pair().unwrap();
        let guard = Guard::new(mapping.as_ptr(), mapping.len(), &Arc::new(ours)).unwrap();
        let other_guard = Guard::new(other.as_ptr(), other.len(), &Arc::new(others)).unwrap();
        crate::ring::double::put(&mapping, 4096, &[7; 8]);
        assert_eq!(crate::ring::double::get(&mapping, 4096, 8), [7; 8]);
        file.set_len(4096).unwrap();
        assert!(!guard.is_lost());
        assert_eq!(crate::ring::double::get(&mapping, 4096, 8), [0; 8]);
        assert!(guard.is_lost());
        assert_eq!(vmm.read(&mut [0]).unwrap(), 0, "hung up");
        crate::ring::double::put(&mapping, 4096, &[1; 8]);
        assert!(!other_guard.is_lost());
    }

    #[test]
    fn places_are_used_again() {
        let (_file, mapping) = mapped();
        let socket = Arc::new(UnixStream::pair().unwrap().0);
        for _ in 0..2 * PLACES {
            Guard::new(mapping.as_ptr(), mapping.len(), &socket).unwrap();
        }
    }
}
