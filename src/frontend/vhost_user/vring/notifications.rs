//! Who is told when: the driver's kicks to us, our calls to the driver (virtio 1.3 sections 2.7.7 and 2.7.10).

#![forbid(unsafe_code)]

use super::Vring;
use crate::frontend::vhost_user::eventfd::CallFd;
use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

/// Requests that are left when a driver is told of the others, at the most: the quickest of them take 0.05 us each, and to
/// wake a driver takes 10. Where they take longer, a driver with so many is told at half of them all the same.
const CALL_AT: u16 = 256;

/// Completions of which a driver is told at the latest, whatever is left: its indices have 16 bits, so one that was
/// not told of so many and of a whole ring more could not be told at all.
const CALL_AT_THE_LATEST: u16 = 1 << 15;

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

    /// Without EVENT_IDX a driver kicks until told otherwise; with it, once for each time it was asked.
    pub(super) fn refuse_kicks(&self) {
        if self.kicks_wanted.replace(false) && !self.setup.event_idx {
            self.used.set_flags(VRING_USED_F_NO_NOTIFY as u16);
        }
    }

    /// Tells the driver of what it can see, if that is due: when as much is done as is left and what is left is
    /// little, or nothing more is about to come (`news`: what [`publish`](Self::publish) said). To wake a driver that
    /// sleeps costs some 10 us of CPU, and one that is woken for each completion finds it and sleeps again; woken at
    /// half of its requests it works on these while we work on the others.
    pub(crate) fn maybe_signal(&self, news: bool) {
        let (old, new) = (self.signalled_used.get(), self.published.get());
        let untold = new.wrapping_sub(old);
        let waiting = self.seen_avail.get().wrapping_sub(self.next_avail.get());
        let left = u32::from(self.in_flight.get()) + u32::from(waiting);
        let may_wait = news && left > u32::from(untold.min(CALL_AT)) && untold < CALL_AT_THE_LATEST;
        if untold == 0 || may_wait {
            return;
        }
        self.signalled_used.set(new);
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
}
