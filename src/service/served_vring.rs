//! A vring on its worker: what a vhost-user session asks for, as messages to a worker that knows no vring.

#![forbid(unsafe_code)]

use crate::engine::{Flushers, QueueStart};
use crate::frontend::vhost_user::{CallFd, StopMode, Stopped, Vring, VringSetup};
use crate::worker::{ExportVolume, NewQueue, QueueId, WorkerHandle};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

/// A vring that is served. [`stop`](Self::stop) it: one that is only dropped is served on.
pub struct ServedVring {
    handle: WorkerHandle,
    id: QueueId,
    /// Which of the flushers it is.
    number: usize,
    flushers: Arc<Flushers>,
}

impl ServedVring {
    /// Serves a vring from now on.
    ///
    /// # Errors
    /// When it makes no sense (see [`Vring::new`]), its memory cannot be had, or the worker is gone.
    pub fn start(handle: &WorkerHandle, setup: VringSetup, export: ExportVolume) -> io::Result<ServedVring> {
        let (number, read_only, flushers) = (setup.index, setup.read_only, export.flushers.clone());
        let (volume, heard, device) = (export.volume.clone(), flushers.clone(), setup.device.clone());
        let served = handle.serve(NewQueue { export, number, read_only }, move |_| {
            let vring = Vring::new(setup)?;
            let start = QueueStart {
                vmm: vring.vmm(),
                at: vring.next_avail(),
                noted: vring.is_noted(),
                doubtful: vring.is_doubtful(),
            };
            if heard.start(&volume, number, start) {
                let lost =
                    "writes that were not flushed before this service began may be lost with their server";
                let message = format_args!("vring {number}: {lost}: the next flush fails");
                device.log().warn("doubtful", message);
            }
            Ok(vring)
        })?;
        Ok(ServedVring { handle: handle.clone(), id: served.id, number, flushers })
    }

    /// Stops taking requests; what this returns hears what the vring leaves behind when the last that was taken is complete
    /// (`None` for a vring that was stopped before).
    pub fn stop(&self) -> Receiver<Option<Stopped>> {
        let (flushers, number) = (self.flushers.clone(), self.number);
        self.handle.stop(self.id, move |vring: &Vring| {
            flushers.stop(number, vring.next_avail());
            vring.stopped()
        })
    }

    /// Ends the waits of requests of a vring that stops: those for a store that failed, or for a server that is gone. The
    /// second time also those for a server that does not answer, by hanging up on it.
    pub fn interrupt(&self, mode: StopMode) {
        self.handle.interrupt(self.id, move |vring: &Vring| vring.interrupt(mode));
    }

    /// Takes requests, or lets them wait. Completions go on.
    ///
    /// # Errors
    /// When the worker is gone.
    pub fn enable(&self, enabled: bool) -> io::Result<()> {
        self.handle.with(self.id, move |vring: &Vring| vring.enable(enabled)).map(drop)
    }

    /// Replaces the descriptor that completions are told through, and tells once.
    ///
    /// # Errors
    /// When the worker is gone.
    pub fn set_call(&self, call: Option<CallFd>) -> io::Result<()> {
        self.handle.with(self.id, move |vring: &Vring| vring.set_call(call)).map(drop)
    }
}
