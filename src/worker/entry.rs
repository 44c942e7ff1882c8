//! A queue's entry in its worker.

use super::ExportVolume;
use super::slow_requests::CurrentRequest;
use super::throttle::Admission;
use crate::engine::{Flusher, Flushers, VolumeChannel};
use crate::frontend::{AnyQueue, Queue};
use crate::ring::Uring;
use crate::stats::{ExportStats, QueueStats};
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::Sender;

/// The most slots that the polled queues of one export get here, 10 KiB each at the most (with room for a chain of 254
/// segments). What a guest brings beyond that waits in its ring, and takes no memory of ours.
const MOST_SLOTS: usize = 4096;

/// What each queue gets all the same, so that none waits for another.
const LEAST_SLOTS: usize = 32;

/// Names a queue on its worker until it is [stopped](super::WorkerHandle::stop), or has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueId(pub(super) u32);

/// A queue of an export that is to be served.
pub struct NewQueue {
    /// What it is of.
    pub export: ExportVolume,
    /// Its number in the export: which of the flushers it is.
    pub number: usize,
    /// Writes are refused.
    pub read_only: bool,
}

/// What is to be done with a queue when it has drained; with `None` if there is no such queue.
pub(super) type Finish = Box<dyn FnOnce(Option<&AnyQueue>)>;

/// Whose requests a queue brings: one of the flushers of its export.
#[derive(Clone)]
pub(super) struct Client {
    pub flushers: Arc<Flushers>,
    pub stats: Arc<ExportStats>,
    pub number: usize,
}

impl Client {
    pub fn flusher(&self) -> &Flusher {
        self.flushers.queue(self.number)
    }

    pub fn stats(&self) -> &QueueStats {
        self.stats.queue(self.number)
    }

    /// Names the export: the address of what its queues have in common.
    pub fn export(&self) -> usize {
        Arc::as_ptr(&self.flushers).addr()
    }
}

/// See the module.
pub(super) struct QueueEntry {
    pub queue: AnyQueue,
    pub channel: Rc<VolumeChannel<Uring>>,
    pub client: Client,
    pub admission: Rc<Admission>,
    /// Slots of all the queues of its export here.
    pub export_slots: Rc<Cell<usize>>,
    /// The slot of each tag that has one.
    pub slots: Vec<u32>,
    /// What each of them is at.
    pub current: Vec<Rc<CurrentRequest>>,
    /// Slots that have not ended.
    pub alive: Rc<Cell<usize>>,
    /// Its requests do not wait for their store.
    pub interrupted: bool,
    /// Hears of it when all slots have ended.
    pub ended: Sender<()>,
}

impl QueueEntry {
    /// The tag whose slot is to be polled for the next request, if there is one that has, or may have, a slot. Where there is
    /// none for it, the queue has requests in flight, and goes on when one of them completes.
    pub fn poll(&self, ring: &Uring) -> Option<u16> {
        self.admission.poll(&self.queue, ring, || self.has_slot())
    }

    /// Whether there is nothing to stay awake for, though there may be requests: they are beyond its slots or its limits.
    pub fn is_held_back(&self) -> bool {
        self.admission.waits() || !self.has_slot()
    }

    /// Whether there is a slot for one more request: an idle one, or one that is made for it.
    fn has_slot(&self) -> bool {
        usize::from(self.queue.tags_in_use()) < self.slots.len().max(LEAST_SLOTS)
            || self.export_slots.get() < MOST_SLOTS
    }
}
