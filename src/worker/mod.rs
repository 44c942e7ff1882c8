//! A worker: one thread, one ring, any mix of queues. The only place where a frontend meets a volume.
//!
//! [`Worker`] is the thread, [`WorkerHandle`] what the rest of the process speaks to it through: each message is a closure
//! that runs there. `event_loop` is what happens on the thread, and `slot` is a request's way.

#![forbid(unsafe_code)]

mod affinity;
mod busy_poll;
mod entry;
mod event_loop;
mod handle;
mod mailbox;
mod meter;
mod slot;
mod slow_requests;
mod throttle;

use crate::engine::{Flushers, Volume};
use crate::stats::{ExportStats, WorkerStats};
pub use entry::{NewQueue, QueueId};
use event_loop::EventLoop;
pub use handle::{ServedQueue, WorkerHandle};
use mailbox::Mailbox;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// A running worker. Dropping it asks the thread to end, and waits for it; not for ever, since it may be in a call that a
/// store holds up.
pub struct Worker {
    number: usize,
    handle: WorkerHandle,
    stats: Arc<WorkerStats>,
    thread: Option<JoinHandle<()>>,
    /// Disconnected at its end.
    alive: Receiver<()>,
}

/// How long a worker may take to end: ten times what one does that nothing holds up.
const END_LIMIT: Duration = Duration::from_secs(10);

/// How a worker spends its time.
#[derive(Clone, Copy, Debug)]
pub struct WorkerConfig {
    /// After requests it looks for more of them for so long at most before it sleeps. Zero for not at all.
    pub busy_poll: Duration,
    /// Requests that take longer are logged; zero for none.
    pub slow_after: Duration,
    /// Queues of several volumes may come. Then it makes no call that a store could hold up: the kernel's threads do.
    pub shared: bool,
}

/// A volume as one export uses it. Cheap to clone.
#[derive(Clone)]
pub struct ExportVolume {
    /// What is used.
    pub volume: Arc<Volume>,
    /// The flushers of the export, one for each of its queues.
    pub flushers: Arc<Flushers>,
    /// What is counted of it.
    pub stats: Arc<ExportStats>,
}

impl ExportVolume {
    /// The volume for a new export of so many queues.
    pub fn new(volume: Arc<Volume>, queues: u16) -> ExportVolume {
        let flushers = Arc::new(Flushers::new(&volume, queues));
        ExportVolume { volume, flushers, stats: Arc::new(ExportStats::new(queues)) }
    }
}

impl Worker {
    /// Starts worker `number`. It waits for messages and uses no CPU.
    ///
    /// # Errors
    /// When the kernel refuses the thread or its ring.
    pub fn start(number: usize, config: WorkerConfig) -> io::Result<Worker> {
        let mailbox = Arc::new(Mailbox::new()?);
        let (inside, stats) = (mailbox.clone(), Arc::<WorkerStats>::default());
        let counted = stats.clone();
        let (ready, made) = channel();
        let (life, alive) = channel();
        let thread = thread::Builder::new().name(format!("ringblk-{number}")).spawn(move || {
            let _life: Sender<()> = life;
            // The ring is made here because it belongs to the thread that makes it.
            match event_loop::ring(config) {
                Ok(core) => {
                    let _ = ready.send(Ok(()));
                    EventLoop::new(core, inside, config, counted, slot::slot_task).run();
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        })?;
        made.recv().map_err(|_| handle::gone())??;
        Ok(Worker { number, handle: WorkerHandle::new(mailbox), stats, thread: Some(thread), alive })
    }

    /// How it spends its time.
    pub fn stats(&self) -> &Arc<WorkerStats> {
        &self.stats
    }

    /// What speaks to this worker.
    pub fn handle(&self) -> &WorkerHandle {
        &self.handle
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.handle.quit();
        if let Err(RecvTimeoutError::Timeout) = self.alive.recv_timeout(END_LIMIT) {
            log::error!("worker {} does not end: it is left in a call that does not return", self.number);
        } else if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
