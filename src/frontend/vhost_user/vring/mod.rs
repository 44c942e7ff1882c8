//! A vring as its worker drives it (virtio 1.3 section 2.7): the rings read and written in place.
//!
//! A running vring never changes but for its call descriptor and whether it is enabled. Whatever else the VMM
//! changes (memory, addresses, kick), the session stops it, which drains it, and starts another: one rule for
//! every race.
//!
//! A guest that breaks the rings (an index that jumps, a head twice in flight, a chain without a status byte that we
//! can reach) breaks its own vring, which then takes nothing more; what is in flight still completes.

mod held;
mod notifications;
mod queue;
mod start;
mod stop;

use super::eventfd::{CallFd, signal_error};
use super::inflight::InflightLog;
use super::memory::{DescriptorTable, Memory, scatter, write_byte};
use super::request::{Parsed, Range, Scratch, Status, parse, status_byte};
use super::split_ring::{Avail, Used};
use crate::block::{Data, Errno, Flags, Instance, Iovec, Op, Request, SECTOR};
use crate::frontend::{LimitWait, Queue, Source};
use crate::ring::{Io, Ring, UserData};
use held::{Held, Hold};
pub use start::VringSetup;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
pub use stop::{StopMode, Stopped};

/// What a pass takes from a vring: half of the most that has waited at once, between these, and at most so many
/// bytes. Few enough that the first are on their way, or done and the guest at work on them, while the rest are
/// taken; enough that the pass's one `enter` hardly counts, and that a guest as quick as we are does not run dry
/// between two passes.
const PASS_LEAST: u16 = 4;
const PASS_MOST: u16 = 8;
const PASS_BYTES: u64 = 64 << 10;

/// No tag's turn: there are at most 32768.
const NOBODY: u16 = u16::MAX;

/// A running vring. Its requests' tags are ours: they are used last in, first out, so that a guest that keeps
/// few requests in flight keeps few slots warm, whichever descriptors it uses.
pub struct Vring {
    setup: VringSetup,
    /// In the memory that [`VringSetup::memory`] keeps.
    table: DescriptorTable<'static>,
    /// Indirect tables were negotiated.
    indirect: bool,
    avail: Avail,
    used: Used,
    /// Where the next request will be in the avail ring, and where the driver's end of it was last seen.
    next_avail: Cell<u16>,
    seen_avail: Cell<u16>,
    /// Where the next completion goes in the used ring, what the driver can see, and what it was told of.
    next_used: Cell<u16>,
    published: Cell<u16>,
    signalled_used: Cell<u16>,
    /// The most that has waited at once since we last slept.
    peak_depth: Cell<u16>,
    /// What this pass has taken, and the bytes that it may still take.
    taken: Cell<u16>,
    bytes_left: Cell<u64>,
    /// The driver was given something since it last brought something.
    expects_kick_soon: Cell<bool>,
    /// Passes since anything last happened here.
    idle_passes: Cell<u16>,
    /// Tags at rest.
    free: RefCell<Vec<u16>>,
    /// The tag whose slot takes the next request when it is polled, or [`NOBODY`].
    turn: Cell<u16>,
    /// Of each head in flight its place in the order of taking, counted from 1; otherwise 0.
    head_in_flight: Box<[Cell<u32>]>,
    /// The last such place.
    sequence: Cell<u32>,
    in_flight: Cell<u16>,
    /// What is in flight, noted for whoever comes after us.
    inflight_log: Option<InflightLog>,
    /// There were notes of it from before.
    noted: bool,
    /// Writes that an earlier process acknowledged may be lost with a server.
    doubtful: bool,
    /// Who keeps writes that are not flushed, where that is to be noted.
    server: Option<Instance>,
    /// Heads that were in flight when we were killed and have not been taken again, the first last.
    resubmit: RefCell<Vec<u16>>,
    /// Heads that are left to whoever comes next, with their places in the order.
    unfinished: RefCell<Vec<(u32, u16)>>,
    enabled: Cell<bool>,
    stopped: Cell<bool>,
    /// How it stops, once its requests are not to wait for their store any more.
    interrupted: Cell<Option<StopMode>>,
    broken: Cell<bool>,
    call: RefCell<Option<CallFd>>,
    kick: Cell<UserData>,
    kicks_wanted: Cell<bool>,
    /// A request that was looked at before it is taken.
    held: RefCell<Held>,
    hold: Cell<Hold>,
}

/// The guest's memory for as long as a vring is: its table, and what its requests are resolved to.
fn kept(memory: &Arc<Memory>) -> &'static Memory {
    // SAFETY: a vring keeps its `VringSetup::memory` and never replaces it, so the reference outlives no use of it by the
    // vring. What is resolved with it goes to the vring's own fields, and to the `TagState` of its slots: those are private,
    // are followed by methods of this vring alone, and are lent to a request for no longer than the vring is borrowed.
    unsafe { &*Arc::as_ptr(memory) }
}

impl Vring {
    /// Descriptors, and so the most requests in flight.
    pub fn size(&self) -> u16 {
        self.setup.size
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

    /// Whether it found notes of its requests from before.
    pub fn is_noted(&self) -> bool {
        self.noted
    }

    /// See [`Device::vmm`](super::Device).
    pub fn vmm(&self) -> u64 {
        self.setup.device.vmm()
    }

    /// Whether the guest broke it: it takes nothing more.
    pub fn is_broken(&self) -> bool {
        self.broken.get()
    }

    /// Takes requests, or lets them wait.
    pub fn enable(&self, enabled: bool) {
        self.enabled.set(enabled);
    }

    /// Whether this pass may take another one.
    fn has_pass_left(&self) -> bool {
        let most = (self.peak_depth.get() / 2).clamp(PASS_LEAST, PASS_MOST);
        self.taken.get() < most && self.bytes_left.get() > 0
    }

    /// The next request is a free tag's.
    fn give_turn(&self) -> Option<u16> {
        let Some(tag) = self.free.borrow().last().copied() else {
            self.give_up(format_args!("every descriptor is in flight, and the driver brings one more"));
            return None;
        };
        self.turn.set(tag);
        Some(tag)
    }

    /// Takes the next request if it is this tag's turn: its head.
    #[inline]
    fn take(&self, tag: u16) -> Option<u16> {
        if self.turn.get() != tag {
            return None;
        }
        self.turn.set(NOBODY);
        let resubmitted = self.resubmit.borrow_mut().pop();
        let head = resubmitted.unwrap_or_else(|| self.next_head());
        let Some(busy) = self.head_in_flight.get(head as usize) else {
            self.give_up(format_args!("there is no descriptor {head}"));
            return None;
        };
        if busy.get() != 0 {
            self.give_up(format_args!("descriptor {head} is in flight already"));
            return None;
        }
        busy.set(self.next_sequence());
        // It is the last of them: `give_turn` looked.
        self.free.borrow_mut().pop();
        // What is carried out again is noted, and keeps its place in the order.
        if resubmitted.is_none()
            && let Some(inflight_log) = &self.inflight_log
        {
            inflight_log.begin(head);
        }
        self.taken.set(self.taken.get() + 1);
        self.expects_kick_soon.set(false);
        self.idle_passes.set(0);
        self.in_flight.set(self.in_flight.get() + 1);
        Some(head)
    }

    fn has_again(&self) -> bool {
        !self.resubmit.borrow().is_empty()
    }

    fn next_sequence(&self) -> u32 {
        let next = self.sequence.get().wrapping_add(1).max(1);
        self.sequence.set(next);
        next
    }

    fn takes_new(&self) -> bool {
        self.enabled.get() && !self.stopped.get() && !self.broken.get()
    }

    /// Takes the next head from the avail ring, where there [is one](Self::has_new).
    fn next_head(&self) -> u16 {
        let next = self.next_avail.get();
        self.next_avail.set(next.wrapping_add(1));
        if self.hold.get() == Hold::LetIn { self.held.borrow().head() } else { self.avail.head(next) }
    }

    /// Whether the driver has made a request available that has not been taken.
    fn has_new(&self) -> bool {
        let next = self.next_avail.get();
        if next != self.seen_avail.get() {
            return true;
        }
        let idx = self.avail.idx();
        if idx == next {
            return false;
        }
        if idx.wrapping_sub(next) > self.size() {
            self.give_up(format_args!("the driver's index jumped from {next} to {idx}"));
            return false;
        }
        self.seen_avail.set(idx);
        self.peak_depth.set(self.peak_depth.get().max(idx.wrapping_sub(next)));
        self.refuse_kicks();
        true
    }

    /// Takes nothing more; what is in flight still completes.
    fn give_up(&self, why: fmt::Arguments<'_>) {
        let index = self.setup.index;
        self.setup.device.log().error("vring stopped", format_args!("vring {index}: {why}: it is stopped"));
        self.broken.set(true);
        self.resubmit.borrow_mut().clear();
        if let Some(err) = &self.setup.err {
            signal_error(err);
        }
    }

    /// Lets the driver see everything that completed since the last time. Whether there was anything.
    pub fn publish(&self) -> bool {
        self.taken.set(0);
        self.bytes_left.set(PASS_BYTES);
        let new = self.next_used.get();
        if new == self.published.get() {
            self.idle_passes.set(self.idle_passes.get().saturating_add(1));
            return false;
        }
        self.used.set_idx(new);
        if let Some(inflight_log) = &self.inflight_log {
            inflight_log.complete_batch(new);
        }
        self.published.set(new);
        self.expects_kick_soon.set(true);
        self.idle_passes.set(0);
        true
    }

    /// Ends a request: its status, its place in the used ring. The driver sees it when
    /// it is [published](Self::publish).
    fn finish(&self, tag: u16, state: &TagState, status: Status, written: u32) {
        // There is one: `accept` sees to that.
        if let Some(byte) = &state.status {
            write_byte(status as u8, byte);
        }
        let next = self.next_used.get();
        self.used.set(next, state.head, written + 1);
        if let Some(inflight_log) = &self.inflight_log {
            inflight_log.complete(state.head);
        }
        self.next_used.set(next.wrapping_add(1));
        self.end(tag, state.head);
    }

    /// `head` is not in flight any more, and its tag is free. Which place it had in the order of taking.
    fn end(&self, tag: u16, head: u16) -> u32 {
        self.in_flight.set(self.in_flight.get() - 1);
        self.free.borrow_mut().push(tag);
        self.head_in_flight[head as usize].replace(0)
    }

    /// Logs what a request that succeeded means for others that a crash of the volume's server would lose. Before it is
    /// acknowledged. Costs a comparison for volumes without one.
    fn remember(&self, state: &TagState) {
        let (Some(server), Some(inflight_log)) = (&self.server, &self.inflight_log) else { return };
        match state.parsed {
            Some(Parsed::Flush) => inflight_log.flushed(state.volatile_writes),
            Some(Parsed::Transfer { op: Op::Write, .. } | Parsed::Ranges(Op::WriteZeroes)) => {
                // Durable ones too: to tell them apart would cost more than a flush that is one too many.
                inflight_log.wrote(server.get());
            }
            _ => {}
        }
    }

    /// Parses the chain at `head`, and ends one that needs no volume.
    fn accept(&self, tag: u16, head: u16, state: &mut TagState) {
        state.head = head;
        let chain = if self.hold.get() == Hold::LetIn {
            self.let_in(state)
        } else {
            parse(self.table, head, self.indirect, &mut state.scratch)
        };
        let parsed = match chain {
            Ok(chain) => {
                state.status = Some(chain.status);
                chain.request
            }
            Err(told) => return self.refuse(tag, head, state, told),
        };
        match &parsed {
            Parsed::GetId(data) => {
                let written = scatter(self.setup.device.id(), &state.scratch.iovecs[data.clone()]);
                return self.finish(tag, state, Status::Ok, written as u32);
            }
            Parsed::Transfer { sectors, .. } => {
                self.bytes_left.set(self.bytes_left.get().saturating_sub(u64::from(*sectors) * SECTOR));
            }
            Parsed::Flush | Parsed::Ranges(_) => {}
        }
        state.parsed = Some(parsed);
    }

    /// Ends a request whose chain cannot be carried out.
    #[cold]
    fn refuse(&self, tag: u16, head: u16, state: &mut TagState, told: Status) {
        state.status = status_byte(self.table, head);
        if state.status.is_none() {
            // A used element would say that all went well: drivers leave 0 in the byte that we cannot find.
            self.keep(tag, head);
            self.give_up(format_args!("the chain at descriptor {head} has no status byte that we can reach"));
            return;
        }
        log::debug!("{}: {told:?}", self.label());
        self.finish(tag, state, told, 0);
    }
}

/// What a tag keeps: its chain, and how far it got with it.
#[derive(Default)]
pub struct TagState {
    scratch: Scratch<'static>,
    head: u16,
    status: Option<Iovec<'static>>,
    parsed: Option<Parsed>,
    /// For [`InflightLog::flushed`], where the request is a flush.
    volatile_writes: u64,
}

impl<R: Ring> Source<R> for Vring {
    type State = TagState;

    async fn next<'a>(&'a self, _: &Io<R>, tag: u16, state: &'a mut TagState) -> Option<Request<'a>> {
        // A discard of several ranges goes on until they are used up.
        while state.parsed.is_none() {
            let head = poll_fn(|_| self.take(tag).map_or(Poll::Pending, Poll::Ready)).await;
            self.accept(tag, head, state);
        }
        let write_through =
            !super::config_space::writeback(self.setup.features, self.setup.device.writeback());
        if self.server.is_some() {
            state.volatile_writes = self.inflight_log.as_ref().map_or(0, InflightLog::volatile_writes);
        }
        let TagState { scratch, parsed, .. } = state;
        Some(match parsed.as_ref()? {
            Parsed::Transfer { op, sector, sectors, data } => Request {
                op: *op,
                flags: Flags { fua: *op == Op::Write && write_through, unmap: false },
                sector: *sector,
                sectors: *sectors,
                data: Data::of(&scratch.iovecs[data.clone()]),
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

    fn limit_wait(&self) -> Option<LimitWait> {
        None
    }

    fn complete(&self, tag: u16, state: &mut TagState, result: Result<(), Errno>) {
        if result.is_ok()
            && matches!(state.parsed, Some(Parsed::Ranges(_)))
            && !state.scratch.ranges.is_empty()
        {
            return;
        }
        let status = match result {
            Ok(()) => {
                self.remember(state);
                Status::Ok
            }
            Err(Errno::ERESTART) if self.keeps() => {
                state.parsed = None;
                self.keep(tag, state.head);
                return;
            }
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
pub(crate) mod tests;
