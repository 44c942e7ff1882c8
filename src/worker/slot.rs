//! A slot: one request after the other, for as long as its queue lives. Here a frontend meets a volume.

use super::entry::Client;
use super::meter::Meter;
use super::slow_requests::CurrentRequest;
use super::throttle::Admission;
use crate::engine::{VolumeChannel, submit};
use crate::frontend::{AnyQueue, Source, with_queue};
use crate::ring::{Io, Uring};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// What a slot's future is made from.
pub(super) struct SlotContext {
    pub io: Io<Uring>,
    pub queue: AnyQueue,
    pub channel: Rc<VolumeChannel<Uring>>,
    pub client: Client,
    pub admission: Rc<Admission>,
    pub tag: u16,
    pub current: Rc<CurrentRequest>,
    pub meter: Rc<Meter>,
    /// Its queue's number in the worker.
    pub entry: u32,
    /// Slots of this queue that have not ended.
    pub alive: Rc<Cell<usize>>,
    /// Queues whose last slot has ended.
    pub finished: Rc<RefCell<Vec<u32>>>,
}

/// A slot's life. Everything that happens to a request happens on its way through here.
async fn serve<S: Source<Uring>>(slot: &SlotContext, source: &S) {
    let SlotContext { io, channel, client, admission, tag, current, meter, .. } = slot;
    let (flusher, stats) = (client.flusher(), client.stats());
    let (tag, mut state) = (*tag, S::State::default());
    io.set_tag(tag);
    io.set_group(client.export());
    while let Some(request) = source.next(io, tag, &mut state).await {
        admission.pass(io, source, &request).await;
        current.begin(&request);
        stats.begin();
        let begun = meter.recent();
        let result = submit(channel, io, flusher, &request).await;
        current.end();
        stats.end(request.op, request.len(), meter.read().saturating_sub(begun), result);
        source.complete(tag, &mut state, result);
    }
}

/// The one future type of all slots: the frontend is a match, not a pointer.
pub(super) async fn slot_task(slot: SlotContext) {
    with_queue!(&slot.queue, queue => serve(&slot, &**queue).await);
    slot.alive.set(slot.alive.get() - 1);
    if slot.alive.get() == 0 {
        slot.finished.borrow_mut().push(slot.entry);
    }
}
