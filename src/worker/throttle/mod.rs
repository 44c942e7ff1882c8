//! Where requests wait for the limits of their volume.
//!
//! Those of a queue that is polled wait there: one is looked at, and while it is refused nothing is taken. Those that are
//! delivered are with us from the moment that the kernel gives them, so they wait in their slots, the first first. Nobody else on
//! the worker waits with them: a timer, one for all, says when to ask again.

#![forbid(unsafe_code)]

use crate::block::Request;
use crate::engine::limits::{Limits, Throttle};
use crate::frontend::{LimitWait, Queue, Source};
use crate::ring::{Core, Io, Kind, Ring, Sqe, UserData};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::pending;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// One queue's.
pub(super) struct Admission {
    throttle: Throttle,
    /// Slots that wait, in the order in which they came.
    slots: RefCell<VecDeque<u32>>,
    /// Something waits somewhere on this worker.
    any: Rc<Cell<bool>>,
}

impl Admission {
    /// Whether anything of the queue's waits.
    pub fn waits(&self) -> bool {
        self.throttle.waits_until().is_some()
    }

    /// When it is to ask again, on the ring's clock.
    pub fn due(&self) -> Option<u64> {
        self.throttle.waits_until()
    }

    /// The tag whose slot is to be polled for the queue's next request, if that may go. `has_slot`: it could be carried out.
    /// Costs a load where nothing is limited.
    pub fn poll<R: Ring>(
        &self,
        queue: &impl Queue,
        ring: &R,
        has_slot: impl FnOnce() -> bool,
    ) -> Option<u16> {
        if self.throttle.concerns() {
            return self.poll_limited(queue, ring, has_slot());
        }
        if has_slot() { queue.poll() } else { None }
    }

    #[cold]
    fn poll_limited<R: Ring>(&self, queue: &impl Queue, ring: &R, has_slot: bool) -> Option<u16> {
        let now = ring.now();
        if queue.is_held() && self.due().is_some_and(|due| now < due) {
            return None;
        }
        let mut asked = false;
        let admit = |op, bytes| {
            asked = true;
            self.throttle.admit(now, op, bytes)
        };
        let tag = if has_slot { queue.poll_admitted(admit) } else { None };
        match (tag, asked) {
            (None, true) => self.any.set(true),
            // There is nothing to be let in: nobody is to wait for its turn.
            (None, false) => {
                queue.forget_held();
                self.throttle.leave(now);
            }
            (Some(_), _) => {}
        }
        tag
    }

    /// Lets a request go on that has left its queue: it waits in its slot, if that is where those of its `source` wait.
    pub async fn pass<R: Ring, S: Source<R>>(&self, io: &Io<R>, source: &S, request: &Request<'_>) {
        // Known when this is compiled, where requests wait in their queue.
        if source.limit_wait().is_some() && (self.throttle.concerns() || !self.slots.borrow().is_empty()) {
            // Boxed, as all that is rare: a slot's future has no room for it.
            Box::pin(self.wait(io, source, request)).await;
        }
    }

    async fn wait<R: Ring, S: Source<R>>(&self, io: &Io<R>, source: &S, request: &Request<'_>) {
        let place = Waiting { admission: self, slot: io.slot() };
        self.slots.borrow_mut().push_back(io.slot());
        loop {
            match source.limit_wait() {
                Some(LimitWait::UntilAdmitted) => {}
                Some(LimitWait::ForEver) => {
                    self.throttle.leave(io.now());
                    return pending().await;
                }
                Some(LimitWait::Lifted) | None => break,
            }
            let first = self.slots.borrow().front() == Some(&io.slot());
            if first && self.throttle.admit(io.now(), request.op, request.len()) {
                break;
            }
            self.any.set(true);
            io.park().await;
        }
        drop(place);
        match self.slots.borrow().front() {
            Some(next) => io.wake(*next),
            None => self.throttle.leave(io.now()),
        }
    }

    /// The time is due, or something has changed: the first slot that waits asks again.
    pub fn wake<R: Ring>(&self, core: &Core<R>) {
        if let Some(first) = self.slots.borrow().front() {
            core.wake(*first);
        }
    }

    /// The limits have changed: what waits asks again at once.
    pub fn look_again<R: Ring>(&self, core: &Core<R>) {
        self.throttle.look_again();
        self.wake(core);
    }
}

/// A slot's place among those that wait.
struct Waiting<'a> {
    admission: &'a Admission,
    slot: u32,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.admission.slots.borrow_mut().retain(|slot| *slot != self.slot);
    }
}

/// The timer of one worker.
pub(super) struct ThrottleTimer {
    any: Rc<Cell<bool>>,
    /// When the timer in the ring is over.
    armed: Cell<Option<u64>>,
    /// Timers so far: tells one that was replaced.
    count: Cell<u32>,
}

impl ThrottleTimer {
    /// Nothing waits.
    pub fn new() -> ThrottleTimer {
        ThrottleTimer { any: Rc::default(), armed: Cell::new(None), count: Cell::new(0) }
    }

    /// For a queue of this worker.
    pub fn admission(&self, limits: &Arc<Limits>) -> Admission {
        Admission { throttle: limits.throttle(), slots: RefCell::default(), any: self.any.clone() }
    }

    fn user_data(&self) -> UserData {
        UserData::new(Kind::Throttle, self.count.get(), 0)
    }

    /// Sets the timer to the first of the times at which somebody is to ask again. Before each `enter`; costs a load when nobody
    /// waits.
    pub fn arm<R: Ring>(&self, core: &Core<R>, dues: impl Iterator<Item = u64>) {
        if !self.any.get() {
            return;
        }
        let Some(first) = dues.min() else {
            self.any.set(false);
            return;
        };
        match self.armed.get() {
            Some(armed) if armed <= first => return,
            Some(_) => {
                core.push(&Sqe::Cancel { user_data: self.user_data() }, UserData::new(Kind::Nobody, 0, 0));
            }
            None => {}
        }
        self.armed.set(Some(first));
        self.count.set(self.count.get().wrapping_add(1));
        // Zero would be no time at all, and is none that the kernel takes.
        let left = first.saturating_sub(core.ring().now()).max(1);
        core.push(&Sqe::Timeout { after: Duration::from_nanos(left) }, self.user_data());
    }

    /// A timer is over, and may be ours. Whether it is, and those that are due are to be [woken](Admission::wake).
    pub fn expired(&self, user_data: UserData) -> bool {
        let ours = user_data == self.user_data();
        if ours {
            self.armed.set(None);
        }
        ours
    }
}

#[cfg(test)]
mod tests;
