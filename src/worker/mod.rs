//! A worker: one thread, one ring, any mix of queues. The only place where a frontend meets a volume.
//!
//! [`Worker`] is the handle that the rest of the process holds; `run` is what happens on the thread. They speak
//! through a mailbox: a channel, and an eventfd that the ring polls.

#![forbid(unsafe_code)]

mod affinity;
mod mailbox;
mod patience;
mod run;
mod slot;
mod throttle;
mod watch;

use crate::block::Errno;
use crate::engine::{Flushers, Volume};
use crate::frontend::{ublk, vhost_user};
use mailbox::Mailbox;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// A running worker. Dropping the handle asks it to end, and waits for it; not for ever, since it may be in a call that a
/// store holds up.
pub struct Worker {
    number: usize,
    link: Link,
    thread: Option<JoinHandle<()>>,
    /// Disconnected at its end.
    alive: Receiver<()>,
}

/// How long a worker may take to end: ten times what one does that nothing holds up.
const END_LIMIT: Duration = Duration::from_secs(10);

/// How a worker spends its time.
#[derive(Clone, Copy, Debug)]
pub struct Habits {
    /// After requests it looks for more of them for so long at most before it sleeps.
    pub patience: Duration,
    /// Requests that take longer are logged; zero for none.
    pub slow_after: Duration,
    /// Queues of several volumes may come. Then it makes no call that a store could hold up: the kernel's threads do.
    pub shared: bool,
}

/// A way to a worker, for whoever starts and stops queues on it. Cheap to clone.
#[derive(Clone)]
pub struct Link {
    mailbox: Arc<Mailbox>,
}

/// A volume, and who of an export uses it.
#[derive(Clone)]
pub struct Lent {
    /// What is used.
    pub volume: Arc<Volume>,
    /// The flushers of the export, one for each of its queues.
    pub flushers: Arc<Flushers>,
}

/// What a worker is told. Every command that has a `Reply` is answered, once.
enum Command {
    AddUblk { setup: ublk::QueueSetup, lent: Lent, ready: Reply<io::Result<()>>, ended: Reply<()> },
    StartVring { setup: vhost_user::VringSetup, lent: Lent, reply: Reply<io::Result<VringId>> },
    StopVring { id: VringId, reply: Reply<Option<vhost_user::Stopped>> },
    InterruptVring { id: VringId, mode: vhost_user::StopMode },
    EnableVring { id: VringId, enabled: bool, reply: Reply<()> },
    CallVring { id: VringId, call: Option<vhost_user::CallFd>, reply: Reply<()> },
    Flush { lent: Lent, limit: Duration, reply: Reply<Result<(), Errno>> },
    Drain { volume: Arc<Volume>, limit: Duration, reply: Reply<bool> },
    Busy { reply: Reply<usize> },
    LimitsChanged,
    Abandon,
    Quit,
}

/// Names a vring on its worker until it is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VringId(u32);

/// Where an answer goes. The asker may be gone by then, which is no error.
struct Reply<T>(Sender<T>);

impl<T> Reply<T> {
    fn pair() -> (Reply<T>, Receiver<T>) {
        let (sender, receiver) = channel();
        (Reply(sender), receiver)
    }

    fn send(self, answer: T) {
        let _ = self.0.send(answer);
    }
}

impl Lent {
    /// The volume for a new export of so many queues.
    pub fn new(volume: Arc<Volume>, queues: u16) -> Lent {
        let flushers = Arc::new(Flushers::new(&volume, queues));
        Lent { volume, flushers }
    }
}

/// The worker's thread is gone, which it never is while its handle lives.
fn gone() -> io::Error {
    io::Error::other("the worker has ended")
}

impl Worker {
    /// Starts worker `number`. It waits for commands and uses no CPU.
    ///
    /// # Errors
    /// When the kernel refuses the thread or its ring.
    pub fn start(number: usize, habits: Habits) -> io::Result<Worker> {
        let mailbox = Arc::new(Mailbox::new()?);
        let inside = mailbox.clone();
        let (ready, made) = Reply::pair();
        let (life, alive) = channel();
        let thread = thread::Builder::new().name(format!("ringblk-{number}")).spawn(move || {
            let _life: Sender<()> = life;
            // The ring is made here because it belongs to the thread that makes it.
            match run::Run::new(&inside, habits) {
                Ok(run) => {
                    ready.send(Ok(()));
                    run.until_quit();
                }
                Err(error) => ready.send(Err(error)),
            }
        })?;
        let link = Link { mailbox };
        made.recv().map_err(|_| gone())??;
        Ok(Worker { number, link, thread: Some(thread), alive })
    }

    /// A way to this worker.
    pub fn link(&self) -> &Link {
        &self.link
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.link.mailbox.post(Command::Quit);
        if let Err(RecvTimeoutError::Timeout) = self.alive.recv_timeout(END_LIMIT) {
            log::error!("worker {} does not end: it is left in a call that does not return", self.number);
        } else if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Link {
    /// Serves a ublk queue: returns when its fetches are submitted, which the device's start waits for. What
    /// it returns hears when the queue has ended.
    ///
    /// # Errors
    /// When the queue's memory cannot be had.
    pub fn add_ublk(&self, setup: ublk::QueueSetup, lent: Lent) -> io::Result<Receiver<()>> {
        let (ended, end) = Reply::pair();
        self.ask(|ready| Command::AddUblk { setup, lent, ready, ended })??;
        Ok(end)
    }

    /// Serves a vring from now on.
    ///
    /// # Errors
    /// When its memory cannot be had.
    pub fn start_vring(&self, setup: vhost_user::VringSetup, lent: Lent) -> io::Result<VringId> {
        self.ask(|reply| Command::StartVring { setup, lent, reply })?
    }

    /// Stops taking requests from a vring; what it returns hears what the vring leaves behind when the last that was
    /// taken is complete (`None` for a vring that is not there).
    pub fn stop_vring(&self, id: VringId) -> Receiver<Option<vhost_user::Stopped>> {
        let (reply, answer) = Reply::pair();
        self.mailbox.post(Command::StopVring { id, reply });
        answer
    }

    /// Ends the waits of requests of a vring that stops: those for a store that failed, or for a server that is gone. The
    /// second time also those for a server that does not answer, by hanging up on it.
    pub fn interrupt_vring(&self, id: VringId, mode: vhost_user::StopMode) {
        self.mailbox.post(Command::InterruptVring { id, mode });
    }

    /// Takes requests from a vring, or lets them wait. Completions go on.
    ///
    /// # Errors
    /// When the worker is gone.
    pub fn enable_vring(&self, id: VringId, enabled: bool) -> io::Result<()> {
        self.ask(|reply| Command::EnableVring { id, enabled, reply })
    }

    /// Replaces the descriptor a vring's completions are told through, and tells once.
    ///
    /// # Errors
    /// When the worker is gone.
    pub fn call_vring(&self, id: VringId, call: Option<vhost_user::CallFd>) -> io::Result<()> {
        self.ask(|reply| Command::CallVring { id, call, reply })
    }

    /// Brings every write to a volume that was acknowledged, on any worker, to stable storage, for the first of the
    /// flushers. What it returns hears how that went. For a store that is not there it waits so long at most.
    pub fn flush(&self, lent: Lent, limit: Duration) -> Receiver<Result<(), Errno>> {
        let (reply, answer) = Reply::pair();
        self.mailbox.post(Command::Flush { lent, limit, reply });
        answer
    }

    /// What it returns hears when every request to `volume` is over that this worker admitted before the call, or
    /// false after `limit`. New ones go on meanwhile.
    pub fn drain(&self, volume: Arc<Volume>, limit: Duration) -> Receiver<bool> {
        let (reply, answer) = Reply::pair();
        self.mailbox.post(Command::Drain { volume, limit, reply });
        answer
    }

    /// What it returns hears how many requests are in flight there.
    pub fn busy(&self) -> Receiver<usize> {
        let (reply, answer) = Reply::pair();
        self.mailbox.post(Command::Busy { reply });
        answer
    }

    /// Limits have changed, or were [lifted](ublk::QuiesceFlag::lift_limits): what waits for them there asks again.
    pub fn limits_changed(&self) {
        self.mailbox.post(Command::LimitsChanged);
    }

    /// Fails what waits for somebody other than the kernel: see [`Attached::abandon`](crate::engine::Attached).
    pub fn abandon(&self) {
        self.mailbox.post(Command::Abandon);
    }

    fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> io::Result<T> {
        let (reply, answer) = Reply::pair();
        self.mailbox.post(command(reply));
        answer.recv().map_err(|_| gone())
    }
}
