//! A vring as its worker drives it (virtio 1.3 section 2.7): the rings read and written in place.
//!
//! A running vring never changes but for its call descriptor and whether it is enabled. Whatever else the VMM
//! changes (memory, addresses, kick), the session stops it, which drains it, and starts another: one rule for
//! every race.
//!
//! A guest that breaks the rings (an index that jumps, a head twice in flight) breaks its own vring, which
//! then takes nothing more; what is in flight still completes.

use super::areas::{Avail, Used};
use super::device::Device;
use super::inflight::{InflightQueue, Mark, Notes};
use super::memory::{Memory, Table, scatter};
use super::notify::CallFd;
use super::request::{Parsed, Range, Scratch, Status, parse};
use crate::block::{Data, Errno, Flags, Instance, Iovec, Op, Request, SECTOR};
use crate::frontend::Source;
use crate::ring::{Io, Kind, Ring, Sqe, Target, UserData};
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::future::poll_fn;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::task::Poll;
use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

/// What a pass takes from a vring: half of the most that has waited at once, between these, and at most so many
/// bytes. Few enough that the first are on their way, or done and the guest at work on them, while the rest are
/// taken; enough that the pass's one `enter` hardly counts, and that a guest as quick as we are does not run dry
/// between two passes.
const PASS_LEAST: u16 = 4;
const PASS_MOST: u16 = 8;
const PASS_BYTES: u64 = 64 << 10;

/// Requests that are left when a driver is told of the others: the work of about the time that waking it takes.
const CALL_AT: u16 = 32;

/// After so many passes without anything, a vring is looked at no more until it is kicked: each look costs a load from
/// memory that the driver writes, each kick a system call on both sides.
const IDLE_PASSES: u16 = 256;

/// Everything a vring starts with. The addresses are the guest's.
pub struct VringSetup {
    /// Its index in the device, for messages.
    pub index: usize,
    /// What requests need of the device.
    pub device: Arc<Device>,
    /// The VMM's memory, kept until the vring is gone.
    pub memory: Memory,
    /// Descriptors: a power of two, 1 to 32768.
    pub size: u16,
    /// Descriptor table.
    pub desc_table: u64,
    /// Driver area.
    pub avail_ring: u64,
    /// Device area.
    pub used_ring: u64,
    /// Where in the avail ring to go on.
    pub next_avail: u16,
    /// Takes requests from the start.
    pub enabled: bool,
    /// Writes are refused.
    pub read_only: bool,
    /// The driver's accepted features.
    pub features: u64,
    /// EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Readable when there are new requests.
    pub kick: Arc<File>,
    /// Written when requests are complete.
    pub call: Option<CallFd>,
    /// Written when the vring is broken.
    pub err: Option<CallFd>,
    /// Where to note what is in flight, and to find what was when we were killed.
    pub inflight: Option<InflightQueue>,
}

/// A running vring. Its requests' tags are ours: they are used last in, first out, so that a guest that keeps
/// few requests in flight keeps few slots warm, whichever descriptors it uses.
pub struct Vring {
    setup: VringSetup,
    table: Table,
    avail: Avail,
    used: Used,
    /// Where the next request will be in the avail ring, and where the driver's end of it was last seen.
    next_avail: Cell<u16>,
    seen_avail: Cell<u16>,
    /// Where the next completion goes in the used ring, what the driver can see, and what it was told of.
    next_used: Cell<u16>,
    published: Cell<u16>,
    told_used: Cell<u16>,
    /// The most that has waited at once since we last slept.
    crest: Cell<u16>,
    /// What this pass has taken, and the bytes that it may still take.
    taken: Cell<u16>,
    bytes_left: Cell<u64>,
    /// The driver was given something since it last brought something.
    owed: Cell<bool>,
    /// Passes since anything last happened here.
    idle_passes: Cell<u16>,
    /// Tags at rest.
    free: RefCell<Vec<u16>>,
    /// The head each tag was given and has not looked at yet.
    fresh: Box<[Cell<Option<u16>>]>,
    /// Heads in flight.
    busy: Box<[Cell<bool>]>,
    in_flight: Cell<u16>,
    /// What is in flight, noted for whoever comes after us.
    notes: Option<Notes>,
    /// Writes that an earlier process acknowledged may be lost with a server.
    doubtful: bool,
    /// Heads that were in flight when we were killed and have not been taken again, the first last.
    again: RefCell<Vec<u16>>,
    enabled: Cell<bool>,
    stopped: Cell<bool>,
    broken: Cell<bool>,
    call: RefCell<Option<CallFd>>,
    kick: Cell<UserData>,
    kicks_wanted: Cell<bool>,
}

impl Vring {
    /// Resolves the rings.
    ///
    /// # Errors
    /// `InvalidInput` for a size that is no power of two, an area that is misaligned or not the guest's, or notes
    /// of what was in flight that make no sense.
    pub fn new(mut setup: VringSetup) -> io::Result<Vring> {
        let (size, memory) = (setup.size, &setup.memory);
        let refuse = |what: &str| {
            let message = format!("vring {}: {what}", setup.index);
            Err(io::Error::new(io::ErrorKind::InvalidInput, message))
        };
        if !size.is_power_of_two() || size > 32768 {
            return refuse(&format!("size {size} is not a power of two up to 32768"));
        }
        // Lengths and alignments: virtio 1.3 section 2.7.
        if memory.resolve(setup.desc_table, 16 * u64::from(size), 16).is_none() {
            return refuse("its descriptor table is not in the guest's memory");
        }
        let Some(avail) = Avail::resolve(memory, setup.avail_ring, size) else {
            return refuse("its avail ring is not in the guest's memory");
        };
        let Some(used) = Used::resolve(memory, setup.used_ring, size) else {
            return refuse("its used ring is not in the guest's memory");
        };
        let next_used = used.idx();
        let table = memory.table(setup.desc_table, size);
        let (mut notes, mut again) = (None, Vec::new());
        let server = setup.device.geometry().server.as_ref().map(Instance::get);
        let mark = setup.inflight.as_ref().map_or(Mark::default(), InflightQueue::mark);
        let doubtful = server.is_some_and(|instance| mark.is_doubtful(instance));
        if let Some(queue) = setup.inflight.take() {
            if queue.size() < size {
                return refuse(&format!("{size} descriptors, but room to note {} in flight", queue.size()));
            }
            let found = queue.recover(next_used)?;
            if found.heads.iter().any(|head| *head >= size) {
                return refuse("a descriptor that it does not have is noted as in flight");
            }
            if !found.fresh {
                // What the VMM remembers is the used index: it cannot know how much had been taken.
                setup.next_avail = next_used.wrapping_add(found.heads.len() as u16);
            }
            if !found.heads.is_empty() {
                let (device, count) = (setup.device.name(), found.heads.len());
                log::info!("{device}: vring {}: {count} requests are carried out again", setup.index);
            }
            again = found.heads;
            again.reverse();
            notes = Some(Notes::new(queue, found.counter));
        }
        Ok(Vring {
            table,
            avail,
            used,
            next_avail: Cell::new(setup.next_avail),
            seen_avail: Cell::new(setup.next_avail),
            next_used: Cell::new(next_used),
            published: Cell::new(next_used),
            told_used: Cell::new(next_used),
            crest: Cell::new(0),
            taken: Cell::new(0),
            bytes_left: Cell::new(PASS_BYTES),
            owed: Cell::new(false),
            idle_passes: Cell::new(0),
            free: RefCell::new((0..size).rev().collect()),
            fresh: vec![Cell::new(None); size as usize].into(),
            busy: vec![Cell::new(false); size as usize].into(),
            in_flight: Cell::new(0),
            notes,
            doubtful,
            again: RefCell::new(again),
            enabled: Cell::new(setup.enabled),
            stopped: Cell::new(false),
            broken: Cell::new(false),
            call: RefCell::new(setup.call.clone()),
            kick: Cell::new(UserData::new(Kind::Kick, 0, 0)),
            kicks_wanted: Cell::new(true),
            setup,
        })
    }

    /// For messages: its device and its index there.
    pub fn label(&self) -> String {
        format!("{}: vring {}", self.setup.device.name(), self.setup.index)
    }

    /// Descriptors, and so the most requests in flight.
    pub fn size(&self) -> u16 {
        self.setup.size
    }

    /// Requests taken and not completed, by us or by the one before us.
    pub fn in_flight(&self) -> u16 {
        self.in_flight.get() + self.again.borrow().len() as u16
    }

    /// Where the next request would be taken from: what GET_VRING_BASE asks for, once drained.
    pub fn next_avail(&self) -> u16 {
        self.next_avail.get()
    }

    /// Whether nobody can vouch for writes that an earlier process acknowledged, if there were any: they were left to a
    /// server that may be another one by now.
    pub fn is_doubtful(&self) -> bool {
        self.doubtful
    }

    /// Takes requests, or lets them wait.
    pub fn enable(&self, enabled: bool) {
        self.enabled.set(enabled);
    }

    /// Takes nothing more, for good.
    pub fn stop(&self) {
        self.stopped.set(true);
    }

    /// Replaces the call descriptor and signals it once: the driver may have missed one on the old.
    pub fn set_call(&self, call: Option<CallFd>) {
        if let Some(call) = &call {
            call.signal();
        }
        *self.call.borrow_mut() = call;
    }

    /// Has the ring say when the driver kicks. The descriptor is polled and never read: its every write is a
    /// completion, and a counter takes centuries to overflow.
    pub fn arm_kick<R: Ring>(&self, ring: &R, user_data: UserData) {
        self.kick.set(user_data);
        ring.push(&Sqe::PollMultishot { file: Target::Fd(self.setup.kick.as_raw_fd()) }, user_data);
    }

    /// Whether a completion is of our kick, and not of one that had our place before.
    pub fn is_kick(&self, user_data: UserData) -> bool {
        self.kick.get() == user_data
    }

    /// Ends [`arm_kick`](Self::arm_kick).
    pub fn disarm_kick<R: Ring>(&self, ring: &R) {
        ring.push(&Sqe::Cancel { user_data: self.kick.get() }, UserData::new(Kind::Nobody, 0, 0));
    }

    /// Takes the next request, if there is one and this pass may, and says which tag's slot is to be polled.
    ///
    /// Costs a load of a cache line that the driver writes when the last seen end of its ring is reached.
    pub fn take(&self) -> Option<u16> {
        let again = !self.again.borrow().is_empty();
        // What is carried out again had been taken: only what is new can be left.
        if !again && !self.takes_new() {
            return None;
        }
        let most = (self.crest.get() / 2).clamp(PASS_LEAST, PASS_MOST);
        if self.taken.get() >= most || self.bytes_left.get() == 0 {
            return None;
        }
        let head = if again { self.again.borrow_mut().pop()? } else { self.next_head()? };
        let Some(busy) = self.busy.get(head as usize) else {
            self.give_up(&format!("there is no descriptor {head}"));
            return None;
        };
        if busy.replace(true) {
            self.give_up(&format!("descriptor {head} is in flight already"));
            return None;
        }
        // There is a free tag for every head that is not in flight.
        let tag = self.free.borrow_mut().pop()?;
        // What is carried out again is noted, and keeps its place in the order.
        if !again && let Some(notes) = &self.notes {
            notes.taken(head);
        }
        self.taken.set(self.taken.get() + 1);
        self.owed.set(false);
        self.idle_passes.set(0);
        self.in_flight.set(self.in_flight.get() + 1);
        self.fresh[tag as usize].set(Some(head));
        Some(tag)
    }

    fn takes_new(&self) -> bool {
        self.enabled.get() && !self.stopped.get() && !self.broken.get()
    }

    /// The next head in the avail ring, if there is one.
    fn next_head(&self) -> Option<u16> {
        let next = self.next_avail.get();
        if next == self.seen_avail.get() {
            let idx = self.avail.idx();
            if idx == next {
                return None;
            }
            if idx.wrapping_sub(next) > self.size() {
                self.give_up(&format!("the driver's index jumped from {next} to {idx}"));
                return None;
            }
            self.seen_avail.set(idx);
            self.crest.set(self.crest.get().max(idx.wrapping_sub(next)));
            self.refuse_kicks();
        }
        self.next_avail.set(next.wrapping_add(1));
        Some(self.avail.head(next))
    }

    fn give_up(&self, why: &str) {
        log::error!("{}: {why}: it is stopped", self.label());
        self.broken.set(true);
        self.again.borrow_mut().clear();
        if let Some(err) = &self.setup.err {
            err.signal();
        }
    }

    /// Without EVENT_IDX a driver kicks until told otherwise; with it, once for each time it was asked.
    fn refuse_kicks(&self) {
        if self.kicks_wanted.replace(false) && !self.setup.event_idx {
            self.used.set_flags(VRING_USED_F_NO_NOTIFY as u16);
        }
    }

    /// Asks for a kick at the next request. False when there is one already, which nobody will kick for.
    pub fn ask_for_kick(&self) -> bool {
        if !self.takes_new() {
            return true;
        }
        self.kicks_wanted.set(true);
        self.crest.set(0);
        if self.setup.event_idx {
            self.used.set_avail_event(self.next_avail.get());
        } else {
            self.used.set_flags(0);
        }
        // Either the driver sees what we asked for, or we see its request.
        fence(Ordering::SeqCst);
        self.avail.idx() == self.next_avail.get()
    }

    /// Begins a pass: lets the driver see everything that completed since the last one. Whether there was anything.
    pub fn publish(&self) -> bool {
        self.taken.set(0);
        self.bytes_left.set(PASS_BYTES);
        let new = self.next_used.get();
        if new == self.published.get() {
            self.idle_passes.set(self.idle_passes.get().saturating_add(1));
            return false;
        }
        self.used.set_idx(new);
        if let Some(notes) = &self.notes {
            notes.given_back(new);
        }
        self.published.set(new);
        self.owed.set(true);
        self.idle_passes.set(0);
        true
    }

    /// Tells the driver of what it can see, if that is due: when as much is done as is left and what is left is
    /// little, or nothing more is about to come (`news`: what [`publish`](Self::publish) said). To wake a driver that
    /// sleeps costs some 10 us of CPU, and one that is woken for each completion finds it and sleeps again; woken at
    /// half of its requests it works on these while we work on the others.
    pub fn tell(&self, news: bool) {
        let (old, new) = (self.told_used.get(), self.published.get());
        let untold = new.wrapping_sub(old);
        let waiting = self.seen_avail.get().wrapping_sub(self.next_avail.get());
        let left = u32::from(self.in_flight.get()) + u32::from(waiting);
        if untold == 0 || news && left > u32::from(untold.min(CALL_AT)) {
            return;
        }
        self.told_used.set(new);
        // Either the driver sees the index before it sleeps, or we see that it wants a call.
        fence(Ordering::SeqCst);
        let wanted = if self.setup.event_idx {
            // vring_need_event() of linux/virtio_ring.h.
            new.wrapping_sub(self.avail.used_event()).wrapping_sub(1) < untold
        } else {
            u32::from(self.avail.flags()) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted && let Some(call) = &*self.call.borrow() {
            call.signal();
        }
    }

    /// Whether a worker that is busy elsewhere need not look here any more, but may wait for a kick. Asks for that
    /// kick.
    pub fn falls_asleep(&self) -> bool {
        if self.idle_passes.get() < IDLE_PASSES || self.in_flight() > 0 {
            return false;
        }
        self.idle_passes.set(0);
        self.ask_for_kick()
    }

    /// Whether the driver has been given something since it last brought something: it may well bring more soon.
    pub fn expects_more(&self) -> bool {
        self.owed.get()
    }

    /// Ends a request: its status, its place in the used ring. The driver sees it when
    /// it is [published](Self::publish).
    fn finish(&self, tag: u16, state: &TagState, status: Status, written: u32) {
        let written = match state.status {
            Some(byte) => {
                scatter(&[status as u8], &[byte]);
                written + 1
            }
            None => 0,
        };
        let next = self.next_used.get();
        self.used.set(next, state.head, written);
        if let Some(notes) = &self.notes {
            notes.finished(state.head);
        }
        self.next_used.set(next.wrapping_add(1));
        self.busy[state.head as usize].set(false);
        self.in_flight.set(self.in_flight.get() - 1);
        self.free.borrow_mut().push(tag);
    }

    /// Notes what a request that succeeded means for others that a crash of the volume's server would lose. Before it is
    /// acknowledged. Costs a comparison for volumes without one.
    fn remember(&self, state: &TagState) {
        let (Some(server), Some(notes)) = (&self.setup.device.geometry().server, &self.notes) else { return };
        match state.parsed {
            Some(Parsed::Flush) => notes.flushed(state.volatile_writes),
            Some(Parsed::Transfer { op: Op::Write, .. } | Parsed::Ranges(Op::WriteZeroes)) => {
                // Durable ones too: to tell them apart would cost more than a flush that is one too many.
                notes.wrote(server.get());
            }
            _ => {}
        }
    }

    /// Parses the chain at `head`, and ends one that needs no volume.
    fn accept(&self, tag: u16, head: u16, state: &mut TagState) {
        let indirect = super::config::indirect(self.setup.features);
        let chain = parse(&self.setup.memory, self.table, head, indirect, &mut state.scratch);
        state.head = head;
        state.status = chain.status;
        match chain.request {
            Ok(Parsed::GetId(data)) => {
                let written = scatter(self.setup.device.id(), &state.scratch.iovecs[data]);
                self.finish(tag, state, Status::Ok, written as u32);
            }
            Ok(parsed) => {
                if let Parsed::Transfer { sectors, .. } = &parsed {
                    self.bytes_left.set(self.bytes_left.get().saturating_sub(u64::from(*sectors) * SECTOR));
                }
                state.parsed = Some(parsed);
            }
            Err(status) => {
                log::debug!("{}: {status:?}", self.label());
                self.finish(tag, state, status, 0);
            }
        }
    }
}

/// What a tag keeps: its chain, and how far it got with it.
#[derive(Default)]
pub struct TagState {
    scratch: Scratch,
    head: u16,
    status: Option<Iovec>,
    parsed: Option<Parsed>,
    /// For [`Notes::flushed`], where the request is a flush.
    volatile_writes: u64,
}

impl<R: Ring> Source<R> for Vring {
    type State = TagState;

    async fn next<'a>(&'a self, _: &Io<R>, tag: u16, state: &'a mut TagState) -> Option<Request<'a>> {
        // A discard of several ranges goes on until they are used up.
        while state.parsed.is_none() {
            let head = poll_fn(|_| match self.fresh[tag as usize].take() {
                Some(head) => Poll::Ready(head),
                None => Poll::Pending,
            })
            .await;
            self.accept(tag, head, state);
        }
        let write_through = !super::config::writeback(self.setup.features, self.setup.device.writeback());
        state.volatile_writes = self.notes.as_ref().map_or(0, Notes::volatile_writes);
        let TagState { scratch, parsed, .. } = state;
        Some(match parsed.as_ref()? {
            Parsed::Transfer { op, sector, sectors, data } => Request {
                op: *op,
                flags: Flags { fua: *op == Op::Write && write_through, unmap: false },
                sector: *sector,
                sectors: *sectors,
                data: Data::Iovecs(&mut scratch.iovecs[data.clone()]),
            },
            Parsed::Ranges(op) => {
                let range = scratch.ranges.pop().unwrap_or(Range { sector: 0, sectors: 0, unmap: false });
                Request {
                    op: *op,
                    flags: Flags { fua: write_through, unmap: range.unmap },
                    sector: range.sector,
                    sectors: range.sectors,
                    data: Data::None,
                }
            }
            // GET_ID never comes here: `accept` answered it.
            Parsed::Flush | Parsed::GetId(_) => {
                Request { op: Op::Flush, flags: Flags::default(), sector: 0, sectors: 0, data: Data::None }
            }
        })
    }

    fn complete(&self, tag: u16, state: &mut TagState, result: Result<(), Errno>) {
        if result.is_ok()
            && matches!(state.parsed, Some(Parsed::Ranges(_)))
            && !state.scratch.ranges.is_empty()
        {
            return;
        }
        if result.is_ok() {
            self.remember(state);
        }
        let status = match result {
            Ok(()) => Status::Ok,
            Err(Errno::EOPNOTSUPP) => Status::Unsupported,
            Err(errno) => {
                log::debug!("{}: {errno}", self.label());
                Status::IoErr
            }
        };
        let written = match (state.parsed.take(), status) {
            // More than 4 GiB at once wraps, as the field does.
            (Some(Parsed::Transfer { op: Op::Read, sectors, .. }), Status::Ok) => sectors.wrapping_mul(512),
            _ => 0,
        };
        self.finish(tag, state, status, written);
    }
}

#[cfg(test)]
mod tests;
