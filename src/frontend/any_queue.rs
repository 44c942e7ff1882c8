//! The list of all kinds of queues, for a worker that serves any mix of them.

#![forbid(unsafe_code)]

use super::queue::Queue;
use super::{ublk, vhost_user};
use crate::block::Op;
use crate::ring::{Core, Ring, UserData};
use std::rc::Rc;

/// A queue of either frontend. Cheap to clone.
#[derive(Clone)]
pub enum AnyQueue {
    /// A hardware queue of a ublk disk.
    Ublk(Rc<ublk::Queue>),
    /// A virtqueue of a vhost-user device.
    Vring(Rc<vhost_user::Vring>),
}

/// `$body` with `$queue` as what it is: a match, no pointer to a function.
macro_rules! with_queue {
    ($any:expr, $queue:ident => $body:expr) => {
        match $any {
            $crate::frontend::AnyQueue::Ublk($queue) => $body,
            $crate::frontend::AnyQueue::Vring($queue) => $body,
        }
    };
}
pub(crate) use with_queue;

/// A queue that is in the list.
pub trait ListedQueue: Queue + Sized + 'static {
    /// As one of the list.
    fn listed(self: Rc<Self>) -> AnyQueue;

    /// The one in the list, if it is of this kind.
    fn of(any: &AnyQueue) -> Option<&Self>;
}

impl ListedQueue for ublk::Queue {
    fn listed(self: Rc<Self>) -> AnyQueue {
        AnyQueue::Ublk(self)
    }

    fn of(any: &AnyQueue) -> Option<&Self> {
        if let AnyQueue::Ublk(queue) = any { Some(queue) } else { None }
    }
}

impl ListedQueue for vhost_user::Vring {
    fn listed(self: Rc<Self>) -> AnyQueue {
        AnyQueue::Vring(self)
    }

    fn of(any: &AnyQueue) -> Option<&Self> {
        if let AnyQueue::Vring(queue) = any { Some(queue) } else { None }
    }
}

impl Queue for AnyQueue {
    fn label(&self) -> String {
        with_queue!(self, queue => queue.label())
    }

    fn cpus(&self) -> Option<&[usize]> {
        with_queue!(self, queue => queue.cpus())
    }

    fn delivered_tags(&self) -> u16 {
        with_queue!(self, queue => queue.delivered_tags())
    }

    fn in_flight(&self) -> u16 {
        with_queue!(self, queue => queue.in_flight())
    }

    fn tags_in_use(&self) -> u16 {
        with_queue!(self, queue => queue.tags_in_use())
    }

    fn start<R: Ring>(&self, core: &Core<R>, user_data: UserData) {
        with_queue!(self, queue => queue.start(core, user_data));
    }

    fn kicked<R: Ring>(&self, core: &Core<R>, user_data: UserData, more: bool) -> bool {
        with_queue!(self, queue => queue.kicked(core, user_data, more))
    }

    fn begin_pass(&self) -> bool {
        with_queue!(self, queue => queue.begin_pass())
    }

    fn poll(&self) -> Option<u16> {
        with_queue!(self, queue => queue.poll())
    }

    fn poll_admitted(&self, admit: impl FnOnce(Op, u64) -> bool) -> Option<u16> {
        with_queue!(self, queue => queue.poll_admitted(admit))
    }

    fn is_held(&self) -> bool {
        with_queue!(self, queue => queue.is_held())
    }

    fn forget_held(&self) {
        with_queue!(self, queue => queue.forget_held());
    }

    fn try_idle(&self) -> bool {
        with_queue!(self, queue => queue.try_idle())
    }

    fn arm_kick(&self) -> bool {
        with_queue!(self, queue => queue.arm_kick())
    }

    fn expects_more(&self) -> bool {
        with_queue!(self, queue => queue.expects_more())
    }

    fn stop(&self) {
        with_queue!(self, queue => queue.stop());
    }

    fn close<R: Ring>(&self, core: &Core<R>) {
        with_queue!(self, queue => queue.close(core));
    }
}
