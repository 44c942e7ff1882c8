//! Vrings on their workers.

#![forbid(unsafe_code)]

use crate::block::Errno;
use crate::engine::Volume;
use crate::frontend::vhost_user::{CallFd, Host, Running, StopMode, Stopped, VringSetup};
use crate::service::served_vring::ServedVring;
use crate::worker::{ExportVolume, WorkerHandle};
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A drain that takes longer is told of, and again after as long.
const SLOW: Duration = Duration::from_secs(5);

/// How long requests may wait for their store to come back when the VMM asks for a vring to stop. It knows no way to go
/// on with them, so they fail then; but most waits are shorter.
const QUIESCE_LIMIT: Duration = Duration::from_secs(1);

/// Queues that are stopped so soon after one that ran into this limit are not waited for again: the VMM stops them one by
/// one.
const QUIESCE_AGAIN: Duration = Duration::from_secs(10);

/// Slow drains after which a server that has a request and does not answer is hung up on.
const HANG_UP_AFTER: u32 = 6;

/// How long a flush may wait for its store to come back when the guest turns its cache off.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// How long such a flush may take at all.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// The workers as a session sees them: each queue has its own.
pub(super) struct Workers {
    handles: Vec<WorkerHandle>,
    export: ExportVolume,
    /// When a queue was last stopped whose requests waited too long.
    too_long: Arc<Mutex<Option<Instant>>>,
}

impl Workers {
    /// Queues are on `handles` in turn.
    pub fn new(handles: Vec<WorkerHandle>, export: ExportVolume) -> Workers {
        Workers { handles, export, too_long: Arc::default() }
    }
}

impl Host for Workers {
    fn start(&self, setup: VringSetup) -> io::Result<Box<dyn Running>> {
        let handle = &self.handles[setup.index % self.handles.len()];
        let name = format!("{}: vring {}", setup.device.name(), setup.index);
        let vring = ServedVring::start(handle, setup, self.export.clone())?;
        let (volume, too_long) = (self.export.volume.clone(), self.too_long.clone());
        Ok(Box::new(OnWorker { vring, name, volume, too_long }))
    }

    fn flush(&self) -> io::Result<()> {
        let flushers = Arc::new(self.export.flushers.on_behalf());
        let answer = self.handles[0]
            .flush(ExportVolume { flushers, ..self.export.clone() }, FLUSH_LIMIT)
            .recv_timeout(ANSWER_LIMIT);
        // A flush without an answer is a flush that failed.
        answer.unwrap_or(Err(Errno::ETIMEDOUT)).map_err(io::Error::from)
    }
}

/// A vring on its worker.
struct OnWorker {
    vring: ServedVring,
    name: String,
    volume: Arc<Volume>,
    too_long: Arc<Mutex<Option<Instant>>>,
}

impl OnWorker {
    /// Waits for the requests of a queue that the VMM stops, for as long as they may wait for their store.
    fn quiesce(&self, answer: &Receiver<Option<Stopped>>) -> Option<Stopped> {
        let mut too_long = self.too_long.lock().unwrap_or_else(PoisonError::into_inner);
        let again = too_long.is_some_and(|then| then.elapsed() < QUIESCE_AGAIN);
        match answer.recv_timeout(if again { Duration::ZERO } else { QUIESCE_LIMIT }) {
            Err(RecvTimeoutError::Timeout) => {
                *too_long = Some(Instant::now());
                None
            }
            answer => Some(answer.ok().flatten().unwrap_or_default()),
        }
    }
}

impl Running for OnWorker {
    fn stop(self: Box<Self>, mode: StopMode) -> Stopped {
        let answer = self.vring.stop();
        if mode == StopMode::Quiesce
            && let Some(stopped) = self.quiesce(&answer)
        {
            return stopped;
        }
        self.vring.interrupt(mode);
        let mut slow = 0;
        loop {
            match answer.recv_timeout(SLOW) {
                // Answering before the kernel is done with the guest's memory would let the VMM use it for
                // something else, so there is no other way out of here.
                Err(RecvTimeoutError::Timeout) => {
                    let why = self.volume.pending_reason().map_or(String::new(), |why| format!(" ({why})"));
                    log::warn!("{}: still waiting for its requests in flight{why}", self.name);
                    slow += 1;
                    if slow == HANG_UP_AFTER {
                        self.vring.interrupt(mode);
                    }
                }
                Ok(Some(stopped)) => return stopped,
                // The worker is gone, with all that it had in flight: the process ends.
                Ok(None) | Err(RecvTimeoutError::Disconnected) => return Stopped::default(),
            }
        }
    }

    fn enable(&self, enabled: bool) {
        if let Err(error) = self.vring.enable(enabled) {
            log::error!("{}: {error}", self.name);
        }
    }

    fn set_call(&self, call: Option<CallFd>) {
        if let Err(error) = self.vring.set_call(call) {
            log::error!("{}: {error}", self.name);
        }
    }
}
