//! One submission, one `await`: the slots of a worker and what they wait for.

use super::fair::{FairQueue, Waiter};
use super::{Cqe, Kind, Ring, Sqe, UserData};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

/// A future that is not a request's: an NBD connection's reader, say. Boxed, since it is made once.
pub(super) type Background = Pin<Box<dyn Future<Output = ()>>>;

/// A ring, and the slots whose operations are in it. Shared by everything on one worker thread.
pub struct Core<R> {
    ring: R,
    slots: RefCell<Vec<Slot>>,
    free: RefCell<Vec<u32>>,
    /// Slots that are part of another slot's work ([`Io::join`]), and which one's. Few, and looked at only where a slot has no
    /// future of its own.
    children: RefCell<Vec<Child>>,
    ready: RefCell<VecDeque<u32>>,
    spawned: RefCell<Vec<(u32, Background)>>,
    in_flight: Cell<usize>,
    /// Slots that wait for their turn to work, and how much this pass has left for work.
    turns: RefCell<FairQueue>,
    work_left: Cell<u32>,
    /// Queues of several volumes are served here, or may be.
    shared: Cell<bool>,
}

/// What slots may do on the worker's own time in one pass, in bytes to copy (some 10 us for 128 KiB, three times as
/// much where they are not in the cache), before all get their turn: see [`Io::turn`].
pub const PASS_WORK: u32 = 256 << 10;

#[derive(Clone, Copy)]
struct Slot {
    /// Counts this slot's submissions, so that a completion of an earlier one can be told.
    generation: u32,
    state: State,
    /// Woken by another slot since it last parked.
    woken: bool,
    /// Its operation only waits for something, and may be cancelled.
    rests: bool,
    /// It is not to wait any more: see [`Core::interrupt`].
    interrupted: bool,
}

impl Slot {
    const FREE: Slot =
        Slot { generation: 0, state: State::Free, woken: false, rests: false, interrupted: false };
}

/// A slot whose news are its parent's.
#[derive(Clone, Copy)]
struct Child {
    slot: u32,
    parent: u32,
    /// A part is at work in it; otherwise it is kept for the next one.
    busy: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Free,
    Idle,
    InFlight,
    Done(i32),
}

const _: () = assert!(size_of::<Slot>() <= 16);

impl<R: Ring> Core<R> {
    /// Takes the ring over.
    pub fn new(ring: R) -> Rc<Core<R>> {
        Rc::new(Core {
            ring,
            slots: RefCell::default(),
            free: RefCell::default(),
            children: RefCell::default(),
            ready: RefCell::default(),
            spawned: RefCell::default(),
            in_flight: Cell::new(0),
            turns: RefCell::default(),
            work_left: Cell::new(PASS_WORK),
            shared: Cell::new(false),
        })
    }

    /// The ring itself.
    pub fn ring(&self) -> &R {
        &self.ring
    }

    /// Slots whose operation the kernel still has.
    pub fn in_flight(&self) -> usize {
        self.in_flight.get()
    }

    /// Polls `slot` again before the worker next sleeps.
    pub fn wake(&self, slot: u32) {
        let mut slots = self.slots.borrow_mut();
        let slot_state = &mut slots[slot as usize];
        if !slot_state.woken {
            slot_state.woken = true;
            self.ready.borrow_mut().push_back(slot);
        }
    }

    /// Ends what `slot` waits for other than the kernel's work, now and from now on: rests ([`Io::rest`]), and whatever
    /// looks at [`Io::is_interrupted`] when it is woken. An operation in flight that names memory goes on to its end.
    pub fn interrupt(&self, slot: u32) {
        let mut slots = self.slots.borrow_mut();
        let state = &mut slots[slot as usize];
        state.interrupted = true;
        if state.state == State::InFlight && state.rests {
            let user_data = UserData::new(Kind::Slot, state.generation, slot);
            self.push(&Sqe::Cancel { user_data }, UserData::new(Kind::Nobody, 0, 0));
        }
        drop(slots);
        self.wake(slot);
        for child in self.children_of(slot) {
            self.interrupt(child);
        }
    }

    /// Queues an operation that is no slot's: see [`Ring::push`].
    ///
    /// # Panics
    /// When `user_data` is a slot's, for whose operation it would be taken.
    pub fn push(&self, sqe: &Sqe<'static>, user_data: UserData) {
        assert_ne!(user_data.kind(), Some(Kind::Slot), "{sqe:?} is no slot's");
        // SAFETY: it borrows nothing that ends, and no slot takes its completion for its own.
        unsafe { self.ring.push(sqe, user_data) };
    }

    /// Whether `slot` was [interrupted](Self::interrupt).
    pub fn is_interrupted(&self, slot: u32) -> bool {
        self.slots.borrow().get(slot as usize).is_some_and(|slot| slot.interrupted)
    }

    /// Runs a future of this worker's own from now until it ends. Its slot.
    pub fn spawn<F: Future<Output = ()> + 'static>(self: &Rc<Self>, make: impl FnOnce(Io<R>) -> F) -> u32 {
        let slot = self.allocate();
        let future = make(Io::new(self, slot));
        self.spawned.borrow_mut().push((slot, Box::pin(future)));
        self.wake(slot);
        slot
    }

    pub(super) fn take_spawned(&self) -> Option<(u32, Background)> {
        self.spawned.borrow_mut().pop()
    }

    /// Whether nothing waits to be polled.
    pub fn is_quiet(&self) -> bool {
        self.ready.borrow().is_empty() && self.spawned.borrow().is_empty() && self.turns.borrow().is_empty()
    }

    /// Says whether queues of several volumes are served here, or may be.
    pub fn set_shared(&self, shared: bool) {
        self.shared.set(shared);
    }

    /// Whether a call that blocks here would hold up the requests of another volume, or the start of its queues.
    pub fn is_shared(&self) -> bool {
        self.shared.get()
    }

    /// Begins a pass: those that wait for a turn get it, as many as there is time for.
    pub(super) fn begin_pass(&self) {
        self.work_left.set(PASS_WORK);
        while self.work_left.get() > 0
            && let Some(next) = { self.turns.borrow_mut().grant(0) }
        {
            self.work_left.set(self.work_left.get().saturating_sub(next.cost));
            self.wake(next.slot);
        }
    }

    pub(super) fn next_ready(&self) -> Option<u32> {
        self.ready.borrow_mut().pop_front()
    }

    pub(super) fn allocate(&self) -> u32 {
        let mut slots = self.slots.borrow_mut();
        let slot = self.free.borrow_mut().pop().unwrap_or_else(|| {
            slots.push(Slot::FREE);
            (slots.len() - 1) as u32
        });
        let generation = slots[slot as usize].generation;
        slots[slot as usize] = Slot { generation, state: State::Idle, ..Slot::FREE };
        slot
    }

    /// A slot for a part of what `parent` does.
    fn take_child(&self, parent: u32) -> u32 {
        let mut children = self.children.borrow_mut();
        if let Some(spare) = children.iter_mut().find(|child| child.parent == parent && !child.busy) {
            spare.busy = true;
            return spare.slot;
        }
        let slot = self.allocate();
        children.push(Child { slot, parent, busy: true });
        slot
    }

    /// A part is over.
    fn return_child(&self, slot: u32) {
        let mut children = self.children.borrow_mut();
        if let Some(child) = children.iter_mut().find(|child| child.slot == slot) {
            child.busy = false;
        }
    }

    /// Whose part a slot is, if it is one.
    pub(super) fn parent(&self, slot: u32) -> Option<u32> {
        self.children.borrow().iter().find(|child| child.slot == slot).map(|child| child.parent)
    }

    fn children_of(&self, parent: u32) -> Vec<u32> {
        let children = self.children.borrow();
        children.iter().filter(|child| child.parent == parent).map(|child| child.slot).collect()
    }

    /// Gives a slot back, with those that were parts of it.
    pub(super) fn release(&self, slot: u32) {
        for child in self.children_of(slot) {
            self.children.borrow_mut().retain(|other| other.slot != child);
            self.release(child);
        }
        let mut slots = self.slots.borrow_mut();
        slots[slot as usize].state = State::Free;
        slots[slot as usize].woken = false;
        slots[slot as usize].interrupted = false;
        self.free.borrow_mut().push(slot);
    }

    /// Whether the kernel still has an operation of `slot`, or of a part of it.
    pub(super) fn is_in_flight(&self, slot: u32) -> bool {
        let own = self.slots.borrow()[slot as usize].state == State::InFlight;
        own || self.children_of(slot).into_iter().any(|child| self.is_in_flight(child))
    }

    /// Records a completion and says whose it is; `None` for one that is stale or nobody's.
    pub(super) fn deliver(&self, cqe: &Cqe) -> Option<u32> {
        let number = cqe.user_data.number();
        let mut slots = self.slots.borrow_mut();
        let slot = slots.get_mut(number as usize)?;
        if slot.state != State::InFlight || slot.generation != cqe.user_data.generation() {
            log::error!("stale completion for slot {number}: {cqe:?}");
            return None;
        }
        slot.state = State::Done(cqe.result);
        self.in_flight.set(self.in_flight.get() - 1);
        Some(number)
    }
}

/// A slot's handle to its ring: what a request's future does its I/O with. One operation at a time; several by
/// [`join`](Self::join).
pub struct Io<R> {
    core: Rc<Core<R>>,
    slot: u32,
    tag: Cell<Option<u16>>,
    group: Cell<usize>,
}

impl<R: Ring> Io<R> {
    pub(super) fn new(core: &Rc<Core<R>>, slot: u32) -> Io<R> {
        Io { core: core.clone(), slot, tag: Cell::new(None), group: Cell::new(0) }
    }

    /// The worker's slots and ring, for tests that look at what the ring has.
    #[cfg(test)]
    pub fn core(&self) -> &Rc<Core<R>> {
        &self.core
    }

    /// Our number, for [`Core::wake`].
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// The tag that the slot serves, for messages; `None` where it serves no queue.
    pub fn tag(&self) -> Option<u16> {
        self.tag.get()
    }

    /// See [`tag`](Self::tag).
    pub fn set_tag(&self, tag: u16) {
        self.tag.set(Some(tag));
    }

    /// Whose request it is: slots of one export have one number. What is scarce goes to the groups in rotation.
    pub fn group(&self) -> usize {
        self.group.get()
    }

    /// See [`group`](Self::group).
    pub fn set_group(&self, group: usize) {
        self.group.set(group);
    }

    /// Waits until it is this slot's turn to work on the worker's own time, for about as long as copying `bytes` takes
    /// (more than [`PASS_WORK`] at once is unfair to all). At once, where little was done in this pass; no system call.
    pub async fn turn(&self, bytes: u32) {
        let core = &*self.core;
        if core.work_left.get() > 0 && core.turns.borrow().is_empty() {
            core.work_left.set(core.work_left.get().saturating_sub(bytes));
            return;
        }
        let (group, slot) = (self.group(), self.slot);
        core.turns.borrow_mut().push(group, Waiter { slot, cost: bytes });
        let waits = Waits { turns: &core.turns, group, slot };
        while { core.turns.borrow_mut().accept(slot) }.is_none() {
            self.park().await;
        }
        #[expect(clippy::mem_forget, reason = "it has no place to leave any more")]
        std::mem::forget(waits);
    }

    /// Queues `sqe` now; the future gives its result, a count or a negated errno.
    ///
    /// Costs a copy into the submission queue: no allocation, no system call (see [`Ring::push`]).
    ///
    /// What it gives is not to be dropped before it is ready, which would end the process: the kernel has what it borrows.
    ///
    /// # Panics
    /// When the slot already has an operation in flight: completing one of the two would complete the other.
    #[must_use = "the result of an operation is its completion"]
    pub fn submit<'a>(&'a self, sqe: &Sqe<'a>) -> Submitted<'a, R> {
        let mut slots = self.core.slots.borrow_mut();
        let slot = &mut slots[self.slot as usize];
        assert_eq!(slot.state, State::Idle, "slot {} submits twice at once", self.slot);
        slot.generation = (slot.generation + 1) % UserData::GENERATIONS;
        slot.state = State::InFlight;
        self.core.in_flight.set(self.core.in_flight.get() + 1);
        // SAFETY: what is given back borrows the same, and goes on only when the operation is complete: see its `drop`.
        // The slot has no other operation, and a completion of one that it had has another generation.
        unsafe { self.core.ring.push(sqe, UserData::new(Kind::Slot, slot.generation, self.slot)) };
        Submitted { io: self, ended: false }
    }

    /// See [`Ring::now`].
    pub fn now(&self) -> u64 {
        self.core.ring.now()
    }

    /// See [`Core::wake`].
    pub fn wake(&self, slot: u32) {
        self.core.wake(slot);
    }

    /// See [`Ring::submit_sync`].
    pub fn submit_sync(&self, sqe: &Sqe<'_>) -> i32 {
        self.core.ring.submit_sync(sqe)
    }

    /// Whether nothing here is to wait for more than the kernel's work: see [`Core::interrupt`].
    pub fn is_interrupted(&self) -> bool {
        self.core.is_interrupted(self.slot)
    }

    /// As [`submit`](Self::submit), for an operation that waits and names no memory but its own: a poll or a timeout.
    /// `-ECANCELED` when the slot is interrupted.
    pub async fn rest(&self, sqe: &Sqe<'_>) -> i32 {
        let rests = |so| self.core.slots.borrow_mut()[self.slot as usize].rests = so;
        if self.is_interrupted() {
            return -libc::ECANCELED;
        }
        rests(true);
        let result = self.submit(sqe).await;
        rests(false);
        result
    }

    /// Ends after `time`. Others get their turn meanwhile, however short that is.
    pub async fn sleep(&self, time: Duration) {
        self.submit(&Sqe::Timeout { after: time }).await;
    }

    /// Ends after `time`, or when the slot is interrupted.
    pub async fn rest_for(&self, time: Duration) {
        self.rest(&Sqe::Timeout { after: time }).await;
    }

    /// Does two things side by side, each with an `Io` of its own, and ends when both have ended. More than two: one of them
    /// may join again.
    ///
    /// Each part has a slot whose news are this slot's: no allocation once there have been so many parts, no waker. Both are
    /// polled whenever one has news. An interruption is theirs too.
    pub async fn join<A, B>(
        &self,
        one: impl AsyncFnOnce(&Io<R>) -> A,
        other: impl AsyncFnOnce(&Io<R>) -> B,
    ) -> (A, B) {
        let parts = [self.part(), self.part()];
        let results = {
            let (mut one, mut other) = (pin!(one(&parts[0])), pin!(other(&parts[1])));
            let (mut first, mut second) = (None, None);
            poll_fn(move |context| {
                if first.is_none()
                    && let Poll::Ready(result) = one.as_mut().poll(context)
                {
                    first = Some(result);
                }
                if second.is_none()
                    && let Poll::Ready(result) = other.as_mut().poll(context)
                {
                    second = Some(result);
                }
                match (first.take(), second.take()) {
                    (Some(first), Some(second)) => Poll::Ready((first, second)),
                    unfinished => {
                        (first, second) = unfinished;
                        Poll::Pending
                    }
                }
            })
            .await
        };
        parts.iter().for_each(|part| self.core.return_child(part.slot));
        results
    }

    /// A handle for a part of what this slot does.
    fn part(&self) -> Io<R> {
        let slot = self.core.take_child(self.slot);
        let interrupted = self.is_interrupted();
        self.core.slots.borrow_mut()[slot as usize].interrupted = interrupted;
        let part = Io::new(&self.core, slot);
        part.tag.set(self.tag.get());
        part.group.set(self.group.get());
        part
    }

    /// Waits for [`Core::wake`]; returns at once if it came since the last park.
    pub fn park(&self) -> Park<'_, R> {
        Park { io: self }
    }
}

/// A slot that waits for its turn. Dropped only where the slot ends while it waits.
struct Waits<'a> {
    turns: &'a RefCell<FairQueue>,
    group: usize,
    slot: u32,
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        // A turn that came too late is over.
        self.turns.borrow_mut().leave(self.group, self.slot);
    }
}

/// An operation in flight, and the borrow of what it names.
pub struct Submitted<'a, R> {
    io: &'a Io<R>,
    ended: bool,
}

impl<R> Drop for Submitted<'_, R> {
    fn drop(&mut self) {
        if !self.ended {
            dropped_in_flight(self.io.slot);
        }
    }
}

/// Whoever drops an operation would free, or use, memory that the kernel may still write.
#[cold]
#[inline(never)]
fn dropped_in_flight(slot: u32) -> ! {
    log::error!("slot {slot}: an operation in flight is dropped: giving up");
    std::process::abort();
}

impl<R: Ring> Future for Submitted<'_, R> {
    type Output = i32;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<i32> {
        let mut slots = self.io.core.slots.borrow_mut();
        let slot = &mut slots[self.io.slot as usize];
        match slot.state {
            State::Done(result) => {
                slot.state = State::Idle;
                drop(slots);
                self.ended = true;
                Poll::Ready(result)
            }
            _ => Poll::Pending,
        }
    }
}

/// See [`Io::park`].
pub struct Park<'a, R> {
    io: &'a Io<R>,
}

impl<R: Ring> Future for Park<'_, R> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        let mut slots = self.io.core.slots.borrow_mut();
        let slot = &mut slots[self.io.slot as usize];
        if std::mem::take(&mut slot.woken) { Poll::Ready(()) } else { Poll::Pending }
    }
}
