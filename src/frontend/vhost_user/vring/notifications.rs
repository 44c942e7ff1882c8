//! Who is told when: the driver's kicks to us, our calls to the driver (virtio 1.3 sections 2.7.7 and 2.7.10).

#![forbid(unsafe_code)]

use super::Vring;
use crate::frontend::vhost_user::eventfd::CallFd;
use crate::ring::{Core, Kind, Ring, Sqe, Target, UserData};
use std::os::fd::AsRawFd;
use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

/// Requests that are left when a driver is told of the others: the work of about the time that waking it takes.
const CALL_AT: u16 = 32;

/// Completions of which a driver is told at the latest, whatever is left: its indices have 16 bits, so one that was
/// not told of so many and of a whole ring more could not be told at all.
const CALL_AT_THE_LATEST: u16 = 1 << 15;

/// After so many passes without anything, a vring is looked at no more until it is kicked: each look costs a load from
/// memory that the driver writes, each kick a system call on both sides.
pub(super) const IDLE_PASSES: u16 = 256;

impl Vring {
    /// Replaces the call descriptor and calls once: the driver may have missed one on the old.
    pub fn set_call(&self, call: Option<CallFd>) {
        *self.call.borrow_mut() = call;
        self.call_driver();
    }

    /// Calls the driver, if it has a call descriptor.
    pub(super) fn call_driver(&self) {
        let called = self.call.borrow().as_ref().map_or(Ok(()), CallFd::signal);
        if let Err(error) = called {
            self.give_up(format_args!("its driver cannot be called: {error}"));
        }
    }

    /// Has the ring say when the driver kicks. The descriptor is polled and never read: its every write is a
    /// completion, and a counter takes centuries to overflow.
    pub fn arm_kick<R: Ring>(&self, core: &Core<R>, user_data: UserData) {
        self.kick.set(user_data);
        core.push(&Sqe::PollMultishot { file: Target::Fd(self.setup.kick.as_raw_fd()) }, user_data);
    }

    /// Takes note of a completion that may be of our kick (`user_data`), and arms it again if there are no `more` to
    /// come. Whether it is ours, and not of one that had our place before.
    pub fn kicked<R: Ring>(&self, core: &Core<R>, user_data: UserData, more: bool) -> bool {
        let ours = self.kick.get() == user_data;
        if ours && !more {
            self.arm_kick(core, user_data);
        }
        ours
    }

    /// Ends [`arm_kick`](Self::arm_kick).
    pub fn disarm_kick<R: Ring>(&self, core: &Core<R>) {
        core.push(&Sqe::Cancel { user_data: self.kick.get() }, UserData::new(Kind::Nobody, 0, 0));
    }

    /// Without EVENT_IDX a driver kicks until told otherwise; with it, once for each time it was asked.
    pub(super) fn refuse_kicks(&self) {
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
        self.used.fence();
        self.avail.idx() == self.next_avail.get()
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
        let may_wait = news && left > u32::from(untold.min(CALL_AT)) && untold < CALL_AT_THE_LATEST;
        if untold == 0 || may_wait {
            return;
        }
        self.told_used.set(new);
        // Either the driver sees the index before it sleeps, or we see that it wants a call.
        self.used.fence();
        let wanted = if self.setup.event_idx {
            // vring_need_event() of linux/virtio_ring.h.
            new.wrapping_sub(self.avail.used_event()).wrapping_sub(1) < untold
        } else {
            u32::from(self.avail.flags()) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted {
            self.call_driver();
        }
    }

    /// Whether a worker that is busy elsewhere need not look here any more, but may wait for a kick. Asks for that
    /// kick.
    pub fn falls_asleep(&self) -> bool {
        if self.idle_passes.get() < IDLE_PASSES || self.in_flight() > 0 || self.is_held() {
            return false;
        }
        self.idle_passes.set(0);
        self.ask_for_kick()
    }

    /// Whether the driver has been given something since it last brought something: it may well bring more soon.
    pub fn expects_more(&self) -> bool {
        self.owed.get() && !self.is_held()
    }
}
