//! What the rest of the process speaks to a worker through.

use super::ExportVolume;
use super::entry::{NewQueue, QueueId};
use super::mailbox::{Mailbox, OnWorker};
use crate::block::Errno;
use crate::engine::Volume;
use crate::frontend::ListedQueue;
use crate::ring::{Core, Ring, Uring};
use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

/// Speaks to a worker, from any thread: each call is a closure that runs on the worker's. Cheap to clone.
///
/// What returns a `Receiver` does not wait: it hears the answer, or is disconnected when the worker is gone.
#[derive(Clone)]
pub struct WorkerHandle {
    mailbox: Arc<Mailbox>,
}

/// A queue that is served.
pub struct ServedQueue {
    /// Its name on the worker.
    pub id: QueueId,
    /// Hears when it has ended by itself (all of its slots have).
    pub ended: Receiver<()>,
}

/// The worker's thread is gone, which it never is while its [`Worker`](super::Worker) lives.
pub(super) fn gone() -> io::Error {
    io::Error::other("the worker has ended")
}

impl WorkerHandle {
    pub(super) fn new(mailbox: Arc<Mailbox>) -> WorkerHandle {
        WorkerHandle { mailbox }
    }

    /// Serves a queue that `make` makes on the worker's thread, from its ring. Returns when the operations that its slots
    /// begin with are submitted: a ublk device's start waits for them.
    ///
    /// # Errors
    /// When `make` fails, the kernel refuses the submission, or the worker is gone.
    pub fn serve<Q: ListedQueue>(
        &self,
        new: NewQueue,
        make: impl FnOnce(&Rc<Core<Uring>>) -> io::Result<Q> + Send + 'static,
    ) -> io::Result<ServedQueue> {
        let (end, ended) = channel();
        let id = self.ask(move |worker| {
            let channel = worker.channel(&new.export.volume, new.read_only);
            let queue = Rc::new(make(worker.core())?).listed();
            let id = worker.add(queue, channel, new, end);
            worker.core().ring().enter(false)?;
            Ok::<_, io::Error>(id)
        })??;
        Ok(ServedQueue { id, ended })
    }

    /// Does something with a queue on its worker's thread, and looks at it in the next pass. `None` for one that is not
    /// there, or not of that kind.
    ///
    /// # Errors
    /// When the worker is gone.
    pub fn with<Q: ListedQueue, T: Send + 'static>(
        &self,
        id: QueueId,
        act: impl FnOnce(&Q) -> T + Send + 'static,
    ) -> io::Result<Option<T>> {
        self.ask(move |worker| {
            let result = worker.queue(id).and_then(Q::of).map(act);
            worker.activate(id);
            result
        })
    }

    /// Takes nothing more from a queue. When the last request that was taken is complete, the queue goes, and what this
    /// returns hears what `left` has found in it (`None` for one that is not there, or not of that kind).
    pub fn stop<Q: ListedQueue, T: Send + 'static>(
        &self,
        id: QueueId,
        left: impl FnOnce(&Q) -> T + Send + 'static,
    ) -> Receiver<Option<T>> {
        self.begin(move |worker, reply| {
            worker.stop(id, Box::new(move |queue| reply(queue.and_then(Q::of).map(left))));
        })
    }

    /// Ends the waits of requests of a queue that stops, once `how` has told it: those for a store that failed, or for a
    /// server that is gone. The second time also those for a server that does not answer, by hanging up on it.
    pub fn interrupt<Q: ListedQueue>(&self, id: QueueId, how: impl FnOnce(&Q) + Send + 'static) {
        self.post(move |worker| {
            worker.queue(id).and_then(Q::of).map(how);
            worker.interrupt(id);
        });
    }

    /// Brings every write to a volume that was acknowledged, on any worker, to stable storage, for the first of the
    /// flushers. What it returns hears how that went. For a store that is not there it waits so long at most.
    pub fn flush(&self, export: ExportVolume, limit: Duration) -> Receiver<Result<(), Errno>> {
        self.begin(move |worker, reply| {
            let channel = worker.channel(&export.volume, false);
            // Not as a request: those may wait for a word from outside, and this is for somebody who leaves.
            let flush = async move |io: &_| {
                let result = channel.flush_for(io, export.flushers.queue(0)).await;
                reply(
                    result.map_err(|errno| if errno == Errno::ERESTART { Errno::ETIMEDOUT } else { errno }),
                );
            };
            let core = worker.core();
            // Each ends the other; a slot may be somebody else's once its task has ended.
            let alive = Rc::new(Cell::new([None; 2]));
            let end_other = |own: usize| {
                let (alive, core) = (alive.clone(), core.clone());
                move || alive.take()[1 - own].map_or((), |other| core.interrupt(other))
            };
            let (flushed, expired) = (end_other(0), end_other(1));
            let first = core.spawn(|io| async move {
                flush(&io).await;
                flushed();
            });
            let second = core.spawn(|io| async move {
                io.rest_for(limit).await;
                expired();
            });
            alive.set([Some(first), Some(second)]);
        })
    }

    /// What it returns hears when every request to `volume` is over that this worker admitted before the call, or
    /// false after `limit`. New ones go on meanwhile.
    pub fn drain(&self, volume: Arc<Volume>, limit: Duration) -> Receiver<bool> {
        self.begin(move |worker, reply| {
            let used = worker.channels(Some(&volume));
            worker.core().spawn(|io| async move {
                let mut drained = true;
                for channel in used {
                    drained &= channel.drain(&io, limit).await;
                }
                reply(drained);
            });
        })
    }

    /// What it returns hears how many requests are in flight there.
    pub fn in_flight(&self) -> Receiver<usize> {
        self.begin(|worker, reply| reply(worker.in_flight()))
    }

    /// Has it let go of volumes that nobody else has any more: what it returns hears when their files are closed.
    pub fn let_go(&self) -> Receiver<()> {
        self.begin(|worker, reply| {
            worker.let_go();
            reply(());
        })
    }

    /// From now on it serves several volumes, or one: whether it may wait for a store itself.
    pub fn set_shared(&self, shared: bool) {
        self.post(move |worker| worker.core().set_shared(shared));
    }

    /// Limits have changed, or were [lifted](crate::frontend::LimitWait::Lifted): what waits for them there asks again.
    pub fn limits_changed(&self) {
        self.post(|worker| worker.limits_changed());
    }

    /// Fails what waits for somebody other than the kernel: see [`VolumeChannel::abandon`](crate::engine::VolumeChannel).
    pub fn abandon(&self) {
        self.post(|worker| worker.channels(None).iter().for_each(|channel| channel.abandon()));
    }

    /// Ends the worker.
    pub(super) fn quit(&self) {
        self.post(|worker| worker.quit());
    }

    fn post(&self, message: impl FnOnce(&mut dyn OnWorker) + Send + 'static) {
        self.mailbox.post(Box::new(message));
    }

    /// Begins something whose end is told by calling `reply`. Whoever asked may be gone by then, which is no error.
    fn begin<T: Send + 'static>(
        &self,
        message: impl FnOnce(&mut dyn OnWorker, Box<dyn FnOnce(T)>) + Send + 'static,
    ) -> Receiver<T> {
        let (sender, answer) = channel();
        self.post(move |worker| {
            message(worker, Box::new(move |value| drop(sender.send(value))));
        });
        answer
    }

    /// Does something, and waits for the result.
    fn ask<T: Send + 'static>(
        &self,
        message: impl FnOnce(&mut dyn OnWorker) -> T + Send + 'static,
    ) -> io::Result<T> {
        self.begin(|worker, reply| reply(message(worker))).recv().map_err(|_| gone())
    }
}
