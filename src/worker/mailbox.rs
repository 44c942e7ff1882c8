//! How messages reach a worker that may be asleep in its ring.

use super::entry::{Finish, NewQueue, QueueId};
use crate::engine::{Volume, VolumeChannel};
use crate::frontend::AnyQueue;
use crate::ring::{Core, Uring};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

/// What is to be done on a worker's thread.
pub(super) type Message = Box<dyn FnOnce(&mut dyn OnWorker) + Send>;

/// A worker as its messages see it. Not on the way of a request.
pub(super) trait OnWorker {
    /// Its ring, and the slots on it.
    fn core(&self) -> &Rc<Core<Uring>>;

    /// The volume as this worker uses it: one for all its queues here.
    fn channel(&mut self, volume: &Arc<Volume>, read_only: bool) -> Rc<VolumeChannel<Uring>>;

    /// What is open here: of one volume, or of all.
    fn channels(&self, of: Option<&Volume>) -> Vec<Rc<VolumeChannel<Uring>>>;

    /// Lets go of volumes that nobody else has any more.
    fn let_go(&mut self);

    /// Serves a queue from now on. `ended` hears when all its slots have ended.
    fn add(
        &mut self,
        queue: AnyQueue,
        channel: Rc<VolumeChannel<Uring>>,
        new: NewQueue,
        ended: Sender<()>,
    ) -> QueueId;

    /// The queue with that name, if it is still served.
    fn queue(&self, id: QueueId) -> Option<&AnyQueue>;

    /// Looks at a queue in the next pass: it may have something to do.
    fn activate(&mut self, id: QueueId);

    /// Takes nothing more from a queue. When the last that was taken is complete it is served no longer, and `then` is told what
    /// it was; one that is not there is told of as `None`.
    fn stop(&mut self, id: QueueId, then: Finish);

    /// Ends the waits of a queue's requests for their store, now and from now on; the second time, those for a server
    /// that has a request and does not answer.
    fn interrupt(&mut self, id: QueueId);

    /// Requests in flight.
    fn in_flight(&self) -> usize;

    /// Limits have changed: what waits for them asks again.
    fn limits_changed(&self);

    /// Ends the worker after this pass.
    fn quit(&mut self);
}

/// Messages, and an eventfd that is readable when there are some.
pub(super) struct Mailbox {
    messages: Mutex<Vec<Message>>,
    event: EventFd,
}

impl Mailbox {
    pub fn new() -> io::Result<Mailbox> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Mailbox { messages: Mutex::default(), event })
    }

    /// Any thread's side. Two system calls at most.
    pub fn post(&self, message: Message) {
        self.lock().push(message);
        // It fails only when 2^64 - 2 posts are unread, and then it is readable already.
        let _ = self.event.write(1);
    }

    /// The worker's side: what came since the last time. The eventfd is emptied first, so nothing that is
    /// posted after the look goes unnoticed.
    pub fn take(&self) -> Vec<Message> {
        let _ = self.event.read();
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Message>> {
        // A poisoned lock means that a thread panicked while it pushed to a Vec; the Vec is whole.
        self.messages.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl AsRawFd for Mailbox {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_fd().as_raw_fd()
    }
}
