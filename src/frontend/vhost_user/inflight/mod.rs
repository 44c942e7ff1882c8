//! Requests in flight, noted in memory that outlives us (`VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD`).
//!
//! The VMM keeps a file of ours in which each vring says which heads it has taken and not given back. When we are
//! killed, whoever serves the VMM next finds there what was in flight, and carries it out again: reads and writes
//! may be repeated, as long as nobody was told that they are done. The layout and the order of the in-flight log are those
//! of the vhost-user specification, "Inflight I/O tracking", split virtqueues; numbers are in the machine's order.
//!
//! A kill leaves every store up to some point of the program, and none after it. So the order of the stores is all
//! that matters, and the compiler is told to keep it.
//!
//! The VMM can write to the file. What is read from it is checked, and a vring whose notes make no sense is not started.

mod mark;

use super::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use super::backing::Backing;
use super::sigbus::Guard;
use crate::ring::Mapping;
pub use mark::QueueMark;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// The one layout there is.
const VERSION: u16 = 1;

/// `QueueRegionSplit`, before its entries.
#[repr(C)]
struct Header {
    features: AtomicU64,
    version: AtomicU16,
    desc_num: AtomicU16,
    last_batch_head: AtomicU16,
    used_idx: AtomicU16,
}

/// `DescStateSplit`: one for each head.
#[repr(C)]
struct Entry {
    inflight: AtomicU8,
    padding: [u8; 5],
    next: AtomicU16,
    counter: AtomicU64,
}

const _: () = {
    use std::mem::offset_of;
    assert!(
        size_of::<Header>() == 16 && offset_of!(Header, version) == 8 && offset_of!(Header, used_idx) == 14
    );
    assert!(size_of::<Entry>() == 16 && offset_of!(Entry, next) == 6 && offset_of!(Entry, counter) == 8);
};

/// Each queue's part begins on a line of its own.
const ALIGN: usize = 64;

/// More than any device of ours has.
const MAX_QUEUES: u16 = 256;
const MAX_QUEUE_SIZE: u16 = 32768;

/// The file as it is mapped here.
struct Shared {
    /// Before the mapping, which it must not outlive.
    guard: Option<Guard>,
    map: Mapping,
}

/// The notes of a device's vrings.
#[derive(Clone)]
pub struct Inflight {
    shared: Arc<Shared>,
    queues: u16,
    queue_size: u16,
}

/// The notes of one vring. Written by one worker at a time.
#[derive(Clone)]
pub struct InflightQueue {
    shared: Arc<Shared>,
    /// Where its part begins; a multiple of [`ALIGN`].
    at: usize,
    /// Heads it has room for: `0..size`.
    size: u16,
}

fn refused(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("in-flight region: {why}"))
}

/// Bytes of one queue's part.
fn stride(queue_size: u16) -> usize {
    (size_of::<Header>() + size_of::<Entry>() * usize::from(queue_size)).next_multiple_of(ALIGN)
}

fn check_shape(queues: u16, queue_size: u16) -> io::Result<()> {
    if !(1..=MAX_QUEUES).contains(&queues) || !(1..=MAX_QUEUE_SIZE).contains(&queue_size) {
        return Err(refused(format!("{queues} queues of {queue_size} are not a device's")));
    }
    Ok(())
}

impl Inflight {
    /// A new file for a VMM to keep, with its length in bytes. Nobody can change that length.
    ///
    /// # Errors
    /// `InvalidInput` for a shape that no device has (1 to 256 queues of 1 to 32768), or the kernel's.
    pub fn create(queues: u16, queue_size: u16) -> io::Result<(File, u64)> {
        check_shape(queues, queue_size)?;
        let bytes = (usize::from(queues) * stride(queue_size)) as u64;
        let fd = memfd_create(c"ringblk-inflight", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        let file = File::from(fd);
        file.set_len(bytes)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Ok((file, bytes))
    }

    /// Takes the file that a VMM kept, `bytes` from `offset` on, for so many queues of that size; `socket` is shut down
    /// when the VMM takes some of it away.
    ///
    /// # Errors
    /// `InvalidInput` for a file that could shrink under us, is too short or not in ordinary memory, or notes in a
    /// layout that is not ours.
    pub(super) fn guarded(
        file: File,
        bytes: u64,
        offset: u64,
        queues: u16,
        queue_size: u16,
        socket: &Arc<UnixStream>,
    ) -> io::Result<Inflight> {
        let guard = |map: &Mapping, page| Guard::new(map.as_ptr(), map.len(), page, socket, None).map(Some);
        Inflight::take(file, bytes, offset, queues, queue_size, guard)
    }

    /// As [`guarded`](Self::guarded), of a file that nobody changes.
    #[cfg(any(test, fuzzing))]
    pub fn open(file: File, bytes: u64, offset: u64, queues: u16, queue_size: u16) -> io::Result<Inflight> {
        Inflight::take(file, bytes, offset, queues, queue_size, |_, _| Ok(None))
    }

    fn take(
        file: File,
        bytes: u64,
        offset: u64,
        queues: u16,
        queue_size: u16,
        guard: impl FnOnce(&Mapping, usize) -> io::Result<Option<Guard>>,
    ) -> io::Result<Inflight> {
        check_shape(queues, queue_size)?;
        let backing = Backing::of(&file).map_err(|error| refused(error.to_string()))?;
        let seals = fcntl(&file, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain);
        // Ours is a memfd of small pages. With huge ones the kernel may have none left when the page is gone.
        if backing.huge || !seals.is_ok_and(|seals| seals.contains(SealFlag::F_SEAL_SHRINK)) {
            return Err(refused(
                "its file is not one that was given out: some of it may be taken away".into(),
            ));
        }
        let needed = usize::from(queues) * stride(queue_size);
        let length = backing.bytes;
        if bytes < needed as u64 || offset.checked_add(bytes).is_none_or(|end| end > length) {
            return Err(refused(format!(
                "{bytes} bytes from {offset} on, in a file of {length}, for {queues} queues of {queue_size}, \
                 which need {needed}"
            )));
        }
        if !offset.is_multiple_of(backing.page) {
            return Err(refused(format!("its offset of {offset} is no multiple of a page")));
        }
        let map = Mapping::shared(file.as_fd(), offset, needed)?;
        let guard = guard(&map, backing.page as usize)?;
        let inflight = Inflight { shared: Arc::new(Shared { guard, map }), queues, queue_size };
        for index in 0..queues.into() {
            inflight.queue(index).map_or(Ok(()), |queue| queue.check())?;
        }
        Ok(inflight)
    }

    fn marks(&self) -> impl Iterator<Item = InflightQueue> {
        (0..self.queues.into()).filter_map(|index| self.queue(index))
    }

    /// The cache mode that an earlier process has left: whether it is writeback. `None` where there was none, or it said
    /// nothing.
    pub fn writeback(&self) -> Option<bool> {
        let mut modes = self.marks().filter_map(|queue| queue.mark().writeback()).peekable();
        modes.peek()?;
        Some(modes.all(|writeback| writeback))
    }

    /// Leaves a cache mode for whoever comes after us.
    pub fn set_writeback(&self, on: bool) {
        self.marks().for_each(|queue| queue.set_mark(queue.mark().with_writeback(on)));
    }

    /// Whether a write of any vring is marked as not flushed.
    pub fn is_unflushed(&self) -> bool {
        self.marks().any(|queue| queue.mark().is_unflushed())
    }

    /// Every write is flushed. While no vring runs.
    pub fn set_flushed(&self) {
        self.marks().for_each(|queue| queue.set_mark(queue.mark().with_flushed()));
    }

    /// Whether the VMM took some of it away.
    pub(super) fn is_lost(&self) -> bool {
        self.shared.guard.as_ref().is_some_and(Guard::is_lost)
    }

    /// The part of vring `index`; `None` when the VMM made none for it.
    pub fn queue(&self, index: usize) -> Option<InflightQueue> {
        let at = index * stride(self.queue_size);
        let there = index < usize::from(self.queues);
        there.then(|| InflightQueue { shared: self.shared.clone(), at, size: self.queue_size })
    }
}

/// What a vring that goes on finds.
#[derive(Debug, PartialEq, Eq)]
pub struct Recovered {
    /// Heads that were taken and not given back, in the order in which they were taken.
    pub heads: Vec<u16>,
    /// The count to go on with.
    pub counter: u64,
    /// The notes are new: they say nothing about where the vring stood.
    pub fresh: bool,
}

impl InflightQueue {
    /// Heads it has room for.
    pub fn size(&self) -> u16 {
        self.size
    }

    fn header(&self) -> &Header {
        // SAFETY: the beginning of this queue's part of the mapping, which `open` made long enough and no one can shorten;
        // aligned, since a mapping begins on a page; and nothing but atomics, which may change behind our back.
        unsafe { &*self.shared.map.as_ptr().add(self.at).cast() }
    }

    fn entry(&self, head: u16) -> &Entry {
        assert!(head < self.size);
        let at = self.at + size_of::<Header>() + size_of::<Entry>() * usize::from(head);
        // SAFETY: as above, and there are `size` entries; the padding is never read.
        unsafe { &*self.shared.map.as_ptr().add(at).cast() }
    }

    /// Where the mark is; `None` where a queue of that size leaves no room for it. None of a power of two does.
    fn mark_place(&self) -> Option<&AtomicU64> {
        let used = size_of::<Header>() + size_of::<Entry>() * usize::from(self.size);
        let end = stride(self.size);
        if end - used < size_of::<AtomicU64>() {
            return None;
        }
        let at = self.at + end - size_of::<AtomicU64>();
        // SAFETY: the end of this queue's part, behind its entries and aligned, since parts begin at multiples of 64.
        Some(unsafe { &*self.shared.map.as_ptr().add(at).cast() })
    }

    /// What was left here for us.
    pub fn mark(&self) -> QueueMark {
        self.mark_place()
            .map_or(QueueMark::default(), |place| QueueMark::from_raw(place.load(Ordering::Acquire)))
    }

    /// Leaves a mark.
    pub fn set_mark(&self, mark: QueueMark) {
        if let Some(place) = self.mark_place() {
            place.store(mark.raw(), Ordering::Release);
        }
    }

    fn check(&self) -> io::Result<()> {
        let header = self.header();
        let (version, heads) =
            (header.version.load(Ordering::Relaxed), header.desc_num.load(Ordering::Relaxed));
        if ![0, VERSION].contains(&version) {
            return Err(refused(format!("its version is {version}, not {VERSION}")));
        }
        if ![0, self.size].contains(&heads) {
            return Err(refused(format!("it is for {heads} descriptors, not {}", self.size)));
        }
        Ok(())
    }

    /// Makes the in-flight log agree with the used ring, whose index is `used_idx`, and says what was in flight.
    ///
    /// The index moves first and the in-flight log follow; where a kill came between the two, what the last batch gave
    /// back is still noted as in flight, and the index tells how many that are.
    ///
    /// # Errors
    /// `InvalidInput` for notes that make no sense.
    pub fn recover(&self, used_idx: u16) -> io::Result<Recovered> {
        let header = self.header();
        let mut in_flight: Vec<(u64, u16)> = (0..self.size)
            .filter(|head| self.entry(*head).inflight.load(Ordering::Acquire) != 0)
            .map(|head| (self.entry(head).counter.load(Ordering::Relaxed), head))
            .collect();
        let fresh = header.version.load(Ordering::Relaxed) == 0;
        if fresh && !in_flight.is_empty() {
            return Err(refused("it has requests in flight and no version".into()));
        }
        let complete_batch = used_idx.wrapping_sub(header.used_idx.load(Ordering::Relaxed));
        // Without anything in flight, a driver that began anew is the reason why the indices differ.
        if complete_batch > 0 && !in_flight.is_empty() {
            if complete_batch > self.size {
                return Err(refused(format!(
                    "its last batch has {complete_batch} of {} requests",
                    self.size
                )));
            }
            let mut head = header.last_batch_head.load(Ordering::Relaxed);
            // In one go: the VMM says how many there are, and others wait for this worker.
            let mut ended = vec![false; self.size.into()];
            for _ in 0..complete_batch {
                let Some(ended) = ended.get_mut(usize::from(head)) else {
                    return Err(refused(format!("its last batch has head {head} of {}", self.size)));
                };
                *ended = true;
                head = self.entry(head).next.load(Ordering::Relaxed);
            }
            in_flight.retain(|(_, head)| !ended[usize::from(*head)]);
        }
        in_flight.sort_unstable();
        let counter = in_flight.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        let heads: Vec<u16> = in_flight.into_iter().map(|(_, head)| head).collect();
        let mut noted = vec![0; self.size.into()];
        heads.iter().for_each(|head| noted[usize::from(*head)] = 1);
        for (head, noted) in (0..self.size).zip(noted) {
            self.entry(head).inflight.store(noted, Ordering::Release);
        }
        header.used_idx.store(used_idx, Ordering::Release);
        header.desc_num.store(self.size, Ordering::Release);
        header.version.store(VERSION, Ordering::Release);
        Ok(Recovered { heads, counter, fresh })
    }
}

/// The notes as a running vring takes them. A request costs seven accesses to memory that is in its cache.
pub(super) struct InflightLog {
    queue: InflightQueue,
    /// Heads taken so far.
    counter: Cell<u64>,
    /// Heads that are in the used ring while its index does not say so yet; room for all.
    batch: RefCell<Vec<u16>>,
    /// Writes that were acknowledged and may be lost with the server that took them.
    volatile_writes: Cell<u64>,
}

impl InflightLog {
    /// Goes on with notes that [`recover`](InflightQueue::recover) brought up to date.
    pub fn new(queue: InflightQueue, counter: u64) -> InflightLog {
        let batch = RefCell::new(Vec::with_capacity(queue.size.into()));
        InflightLog { queue, counter: Cell::new(counter), batch, volatile_writes: Cell::new(0) }
    }

    /// A write is about to be acknowledged that the server's run `instance` has not flushed.
    pub fn wrote(&self, instance: u64) {
        self.volatile_writes.set(self.volatile_writes.get() + 1);
        let mark = self.queue.mark();
        if !mark.is_unflushed() {
            self.queue.set_mark(mark.with_unflushed(instance));
        }
    }

    /// For [`flushed`](Self::flushed), when a flush begins.
    pub fn volatile_writes(&self) -> u64 {
        self.volatile_writes.get()
    }

    /// A flush succeeded that began after so many volatile writes.
    pub fn flushed(&self, covered: u64) {
        if covered == self.volatile_writes.get() {
            self.queue.set_mark(self.queue.mark().with_flushed());
        }
    }

    /// `head` was taken.
    pub fn begin(&self, head: u16) {
        let entry = self.queue.entry(head);
        let counter = self.counter.get();
        self.counter.set(counter.wrapping_add(1));
        entry.counter.store(counter, Ordering::Relaxed);
        entry.inflight.store(1, Ordering::Release);
    }

    /// `head` is in the used ring, and is given back with the others of its batch.
    pub fn complete(&self, head: u16) {
        let last = &self.queue.header().last_batch_head;
        self.queue.entry(head).next.store(last.load(Ordering::Relaxed), Ordering::Relaxed);
        last.store(head, Ordering::Release);
        self.batch.borrow_mut().push(head);
    }

    /// The batch was given back: the used ring's index is `used_idx` now.
    pub fn complete_batch(&self, used_idx: u16) {
        let mut batch = self.batch.borrow_mut();
        for head in &*batch {
            self.queue.entry(*head).inflight.store(0, Ordering::Release);
        }
        batch.clear();
        self.queue.header().used_idx.store(used_idx, Ordering::Release);
    }
}

#[cfg(test)]
mod tests;
