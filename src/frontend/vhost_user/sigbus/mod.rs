//! A VMM that takes memory away that it had shown us: touching what is gone is a SIGBUS, which would end us and every
//! other VMM with us.
//!
//! The handler puts memory of our own in the place of the region that is gone and hangs up on the VMM whose it is. The
//! access is then repeated by the processor and finds zeroes, which are as good as anything a hostile guest may have
//! written there. What the kernel does with such memory for us ends in `EFAULT`, without a signal.
//!
//! What makes it safe to map over an address: there is one guard for each mapping, and whoever touches a mapping has a
//! snapshot that holds both. So the region in which a thread faults stays what it is until that thread is out of the
//! handler, and no other region in the [`table`] has the address in it.
//!
//! A signal handler may neither lock nor allocate: this one loads and stores atomics and makes system calls.

mod table;

use super::budget::Charge;
use crate::ring::is_locked;
use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use table::{Region, RegionSlot, RegionTable};

static TABLE: RegionTable = RegionTable::new();

/// What SIGBUS did before; the kernel's refusal when it took no handler.
static BEFORE: OnceLock<Result<SigAction, Errno>> = OnceLock::new();

/// Each thread that had touched a region, or one of its pages, may replace it once. One that is replaced more often does
/// not get better by it.
const MOST_REPAIRS: usize = 4096;

/// A region that may go away under us without harm.
pub(super) struct Guard {
    place: &'static RegionSlot,
    _socket: Arc<UnixStream>,
    /// The addresses, which are free again when the region is unmapped.
    _charge: Option<Charge>,
}

impl Guard {
    /// Guards `len` bytes at `start`, a shared mapping of a VMM's of a file with pages of `page` bytes; huge
    /// ones are mapped whole. It must stay mapped until the guard is dropped, and have no other guard. When some of it is
    /// gone, `socket` is shut down.
    ///
    /// # Errors
    /// When the kernel takes no handler.
    pub fn new(
        start: *mut u8,
        len: usize,
        page: usize,
        socket: &Arc<UnixStream>,
        charge: Option<Charge>,
    ) -> io::Result<Guard> {
        install()?;
        // A service that has disks of the host too keeps its own pages in memory (see `lock_process`): but these are the
        // guest's, and its VMM's to keep.
        if is_locked() {
            // SAFETY: the caller's mapping, of which no byte changes.
            unsafe { libc::munlock(start.cast(), len) };
        }
        let place = TABLE.add(Region { start: start as usize, len, page, socket: socket.as_raw_fd() });
        Ok(Guard { place, _socket: socket.clone(), _charge: charge })
    }

    /// Whether some of it is gone.
    pub fn is_lost(&self) -> bool {
        self.place.is_lost()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        TABLE.remove(self.place);
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
    let (code, at) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // SAFETY: the thread's own errno, which the interrupted code may be about to read.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let kept = unsafe { *errno };
    let repaired = match code {
        // Memory broke that nobody has touched yet: whoever does hears of it.
        libc::BUS_MCEERR_AO => true,
        // A page that the file has no more, or that broke.
        libc::BUS_ADRERR | libc::BUS_MCEERR_AR => repair(at),
        // Misaligned, which other memory does not mend; or sent by somebody.
        _ => false,
    };
    // SAFETY: as above.
    unsafe { *errno = kept };
    if !repaired {
        give_way(code);
    }
}

/// It was not a VMM's doing: what was there before us is to hear of it.
fn give_way(code: i32) {
    if code <= 0 {
        // Sent by somebody. Nothing will be repeated that raises it again, and a handler that was made for faults, as
        // Rust's own, would wait for that.
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: the default action runs none of our code.
        let _ = unsafe { sigaction(Signal::SIGBUS, &default) };
        let _ = raise(Signal::SIGBUS);
        return;
    }
    // The access is repeated, this time for the other handler.
    match BEFORE.get() {
        Some(Ok(before)) => {
            // SAFETY: it is what this process had installed.
            let _ = unsafe { sigaction(Signal::SIGBUS, before) };
        }
        // SAFETY: it does not return.
        _ => unsafe { libc::abort() },
    }
}

/// Replaces the guarded region that `at` is in, and hangs up on its VMM. False when there is none, or it did not help.
fn repair(at: usize) -> bool {
    let Some((place, region)) = TABLE.find(at) else { return false };
    // Where not all of it can be replaced, each of its pages may be touched.
    let pages = region.len.div_ceil(region.page);
    if place.lose() >= pages.saturating_add(MOST_REPAIRS) {
        return false;
    }
    let replaced = replace_around(&region, at, replace);
    // SAFETY: takes no memory; the guard keeps the descriptor open.
    unsafe { libc::shutdown(region.socket, libc::SHUT_RDWR) };
    replaced
}

/// Has `replace` do so with as much of a region around `at` as it can. All of it, so that there is one fault for each region
/// and not one for each page. Where so much memory cannot be had (`vm.overcommit_memory` of 2 counts it), a part: a VMM
/// that is hung up on has its worker touch many pages yet, and each part is a mapping more.
fn replace_around(region: &Region, at: usize, replace: impl Fn(usize, usize) -> bool) -> bool {
    let pages = region.len.div_ceil(region.page);
    let page = (at - region.start) / region.page;
    let mut part = pages;
    loop {
        let first = page / part * part;
        let (start, end) = (first * region.page, (first + part).saturating_mul(region.page).min(region.len));
        if replace(region.start + start, end - start) {
            return true;
        }
        if part == 1 {
            return false;
        }
        part = (part / 8).max(1);
    }
}

/// Puts zeroes in the place of a region, or of a part of one. Whether that went well.
fn replace(start: usize, len: usize) -> bool {
    let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the range is in a mapping that belongs to nobody but a VMM. Whoever touched it, which is the thread that
    // we interrupted, holds its guard and the mapping, so it is not being unmapped.
    let base = unsafe { libc::mmap(start as *mut libc::c_void, len, prot, flags, -1 as RawFd, 0) };
    base != libc::MAP_FAILED
}

/// Whether the handler knows address `at`.
#[cfg(test)]
pub(super) fn is_guarded(at: *mut u8) -> bool {
    TABLE.find(at as usize).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::Mapping;
    use crate::ring::sim::{get, put};
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

    fn guard(mapping: &Mapping, socket: UnixStream) -> Guard {
        Guard::new(mapping.as_ptr(), mapping.len(), 4096, &Arc::new(socket), None).unwrap()
    }

    #[test]
    fn memory_that_is_truncated_reads_zero_and_costs_the_vmm_its_connection() {
        let (file, mapping) = mapped();
        let (_other_file, other) = mapped();
        let (ours, mut vmm) = UnixStream::pair().unwrap();
        let (others, _vmm) = UnixStream::pair().unwrap();
        let (guard, other_guard) = (guard(&mapping, ours), guard(&other, others));
        put(&mapping, 4096, &[7; 8]);
        assert_eq!(get(&mapping, 4096, 8), [7; 8]);
        file.set_len(4096).unwrap();
        assert!(!guard.is_lost());
        assert_eq!(get(&mapping, 4096, 8), [0; 8]);
        assert!(guard.is_lost());
        assert_eq!(vmm.read(&mut [0]).unwrap(), 0, "hung up");
        put(&mapping, 4096, &[1; 8]);
        assert!(!other_guard.is_lost());
    }

    /// Regions come and go on one thread while memory is taken away on another: what is replaced is the region that
    /// was touched, and no other VMM is hung up on.
    #[test]
    fn the_handler_keeps_to_the_region_that_was_touched() {
        let (_file, witness) = mapped();
        let (ours, vmm) = UnixStream::pair().unwrap();
        vmm.set_nonblocking(true).unwrap();
        let witness_guard = guard(&witness, ours);
        put(&witness, 0, &[9; 8192]);
        let start = std::time::Instant::now();
        std::thread::scope(|scope| {
            let churn = scope.spawn(|| {
                let socket = Arc::new(UnixStream::pair().unwrap().0);
                let (_file, small) = mapped();
                let large = Mapping::sparse(1 << 36).unwrap();
                while start.elapsed().as_millis() < 1000 {
                    for mapping in [&small, &large] {
                        drop(Guard::new(mapping.as_ptr(), mapping.len(), 4096, &socket, None).unwrap());
                    }
                }
            });
            let mut rounds = 0;
            while !churn.is_finished() {
                let (file, mapping) = mapped();
                let guard = guard(&mapping, UnixStream::pair().unwrap().0);
                file.set_len(0).unwrap();
                assert_eq!(get(&mapping, 4096 * (rounds % 2), 8), [0; 8]);
                assert!(guard.is_lost());
                rounds += 1;
            }
        });
        assert_eq!(get(&witness, 0, 8192), [9; 8192]);
        assert!(!witness_guard.is_lost());
        let error = (&vmm).read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "another VMM was hung up on");
    }

    /// In a process of its own, which such a signal ends.
    fn ends_by_sigbus(what: impl FnOnce()) {
        // SAFETY: the child makes system calls and touches memory, and takes no lock of the parent's other threads.
        match unsafe { libc::fork() } {
            0 => {
                what();
                // SAFETY: it ends this process at once.
                unsafe { libc::_exit(0) }
            }
            child => {
                let mut status = 0;
                // SAFETY: `status` is ours to write to.
                assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
                assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGBUS, "{status:#x}");
            }
        }
    }

    #[test]
    fn what_is_not_a_vmms_doing_still_ends_the_process() {
        let (_file, mapping) = mapped();
        let (other_file, other) = mapped();
        let _guard = guard(&mapping, UnixStream::pair().unwrap().0);
        other_file.set_len(0).unwrap();
        // Memory that is no VMM's; a signal from outside.
        ends_by_sigbus(|| {
            // SAFETY: the mapping's first byte; what becomes of the access is the test.
            unsafe { other.as_ptr().read_volatile() };
        });
        ends_by_sigbus(|| raise(Signal::SIGBUS).unwrap());
    }

    #[test]
    fn as_much_as_there_is_memory_for_is_replaced() {
        const PAGE: usize = 4096;
        let region = Region { start: 1 << 30, len: 1000 * PAGE + 17, page: PAGE, socket: -1 };
        for most in [usize::MAX, 1001 * PAGE, 1000 * PAGE, 125 * PAGE, 10 * PAGE, PAGE] {
            for page in [0, 1, 7, 124, 125, 500, 999, 1000] {
                let at = region.start + page * PAGE + 16;
                let done = std::cell::Cell::new((0, 0));
                assert!(replace_around(&region, at, |start, len| {
                    assert!(start >= region.start && start.is_multiple_of(PAGE));
                    assert!(start + len <= region.start + region.len && start <= at && at < start + len);
                    let end = start + len - region.start;
                    assert!(end.is_multiple_of(PAGE) || end == region.len);
                    done.set((start, len));
                    len <= most
                }));
                assert!(page == 1000 || done.get().1 * 16 > most.min(region.len), "{most}: {:?}", done.get());
            }
        }
        assert!(!replace_around(&region, region.start, |_, _| false));
    }

    #[test]
    fn a_fault_that_other_memory_does_not_mend_is_not_repaired_for_ever() {
        let (_file, mapping) = mapped();
        let _guard = guard(&mapping, UnixStream::pair().unwrap().0);
        let faults = |code: i32, times: u32| {
            // SAFETY: a siginfo of zeroes is one.
            let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
            info.si_code = code;
            // SAFETY: of a fault the address is the first field of what follows the three numbers, at offset 16.
            unsafe { (&raw mut info).cast::<usize>().add(2).write(mapping.as_ptr() as usize) };
            (0..times).for_each(|_| on_sigbus(libc::SIGBUS, &raw mut info, std::ptr::null_mut()));
            let mut now = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
            // SAFETY: it only asks, and zeroes are a sigaction.
            let now = unsafe {
                libc::sigaction(libc::SIGBUS, std::ptr::null(), now.as_mut_ptr());
                now.assume_init()
            };
            if now.sa_sigaction != on_sigbus as *const () as usize {
                // It gave way: as the repeated access would, this ends the process.
                let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
                // SAFETY: the default action runs none of our code.
                let _ = unsafe { sigaction(Signal::SIGBUS, &default) };
                let _ = raise(Signal::SIGBUS);
            }
        };
        ends_by_sigbus(|| faults(libc::BUS_ADRALN, 1));
        // Two pages.
        ends_by_sigbus(|| faults(libc::BUS_ADRERR, 2 + MOST_REPAIRS as u32 + 1));
        // Other threads may have touched it before the first had replaced it.
        faults(libc::BUS_ADRERR, 8);
        faults(libc::BUS_MCEERR_AO, 8);
        put(&mapping, 0, &[3]);
        assert_eq!(get(&mapping, 0, 1), [3]);
    }
}
