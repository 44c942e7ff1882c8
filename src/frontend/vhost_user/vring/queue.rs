//! A vring as the worker's loop drives it.

#![forbid(unsafe_code)]

use super::Vring;
use super::held::Hold;
use crate::block::Op;
use crate::frontend::Queue;
use crate::ring::{Core, Kind, Ring, Sqe, Target, UserData};
use std::os::fd::AsRawFd;

/// After so many passes without anything, a vring is looked at no more until it is kicked: each look costs a load from
/// memory that the driver writes, each kick a system call on both sides.
pub(super) const IDLE_PASSES: u16 = 256;

impl Queue for Vring {
    fn label(&self) -> String {
        format!("{}: vring {}", self.setup.device.name(), self.setup.index)
    }

    fn cpus(&self) -> Option<&[usize]> {
        None
    }

    fn delivered_tags(&self) -> u16 {
        0
    }

    /// Those of the one before us are among them, until they are carried out again.
    fn in_flight(&self) -> u16 {
        self.in_flight.get() + self.resubmit.borrow().len() as u16
    }

    fn tags_in_use(&self) -> u16 {
        self.in_flight.get()
    }

    /// The kick descriptor is polled and never read: its every write is a completion, and a counter takes centuries to
    /// overflow.
    fn start<R: Ring>(&self, core: &Core<R>, user_data: UserData) {
        self.kick.set(user_data);
        core.push(&Sqe::PollMultishot { file: Target::Fd(self.setup.kick.as_raw_fd()) }, user_data);
    }

    fn kicked<R: Ring>(&self, core: &Core<R>, user_data: UserData, more: bool) -> bool {
        let ours = self.kick.get() == user_data;
        if ours && !more {
            self.start(core, user_data);
        }
        ours
    }

    fn begin_pass(&self) -> bool {
        let news = self.publish();
        self.maybe_signal(news);
        news
    }

    /// Costs a load of a cache line that the driver writes when the last seen end of its ring is reached.
    fn poll(&self) -> Option<u16> {
        let again = self.has_again();
        // What is carried out again had been taken: only what is new can be left.
        let may = again || self.takes_new();
        if may && self.has_pass_left() && (again || self.has_new()) { self.give_turn() } else { None }
    }

    fn poll_admitted(&self, admit: impl FnOnce(Op, u64) -> bool) -> Option<u16> {
        // What was taken before, and is carried out again, has been let in.
        if self.has_again() { self.poll() } else { self.poll_held(admit) }
    }

    fn is_held(&self) -> bool {
        self.hold.get() == Hold::Waits
    }

    /// The next request is read anew when it is taken.
    fn forget_held(&self) {
        self.hold.set(Hold::Nothing);
    }

    fn try_idle(&self) -> bool {
        if self.idle_passes.get() < IDLE_PASSES || self.in_flight() > 0 || self.is_held() {
            return false;
        }
        self.idle_passes.set(0);
        self.arm_kick()
    }

    fn arm_kick(&self) -> bool {
        if !self.takes_new() {
            return true;
        }
        self.kicks_wanted.set(true);
        self.peak_depth.set(0);
        if self.setup.event_idx {
            self.used.set_avail_event(self.next_avail.get());
        } else {
            self.used.set_flags(0);
        }
        // Either the driver sees what we asked for, or we see its request.
        self.used.fence();
        self.avail.idx() == self.next_avail.get()
    }

    fn expects_more(&self) -> bool {
        self.expects_kick_soon.get() && !self.is_held()
    }

    fn stop(&self) {
        self.stopped.set(true);
    }

    fn close<R: Ring>(&self, core: &Core<R>) {
        self.publish();
        self.maybe_signal(false);
        core.push(&Sqe::Cancel { user_data: self.kick.get() }, UserData::new(Kind::Nobody, 0, 0));
    }
}
