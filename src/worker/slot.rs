//! A slot: one request after the other, for as long as its queue lives. Here a door meets a volume.

use super::throttle::Admission;
use super::watch::Watch;
use crate::block::Request;
use crate::engine::{Attached, Flusher, Flushers, execute};
use crate::frontend::{Source, ublk, vhost_user};
use crate::ring::{Io, Uring};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

/// A queue of either door.
#[derive(Clone)]
pub(super) enum Queue {
    Ublk(Rc<ublk::Queue>),
    Vring(Rc<vhost_user::Vring>),
}

impl Queue {
    /// For messages.
    pub fn label(&self) -> String {
        match self {
            Queue::Ublk(queue) => format!("ublk queue {}", queue.number()),
            Queue::Vring(vring) => vring.label(),
        }
    }
}

/// Whose requests a queue brings: one of the flushers of its export.
#[derive(Clone)]
pub(super) struct Client {
    pub flushers: Arc<Flushers>,
    pub queue: usize,
}

impl Client {
    pub fn flusher(&self) -> &Flusher {
        self.flushers.queue(self.queue)
    }

    /// Names the export: the address of what its queues have in common.
    pub fn export(&self) -> usize {
        Arc::as_ptr(&self.flushers).addr()
    }
}

/// What a slot's future is made from.
pub(super) struct Seat {
    pub io: Io<Uring>,
    pub queue: Queue,
    pub volume: Rc<Attached<Uring>>,
    pub client: Client,
    pub admission: Rc<Admission>,
    pub tag: u16,
    pub watch: Rc<Watch>,
    pub place: u32,
    /// Slots of this queue that have not ended.
    pub alive: Rc<Cell<usize>>,
    /// Places whose last slot ended.
    pub deserted: Rc<RefCell<Vec<u32>>>,
}

/// A slot's life. Everything that happens to a request happens on its way through here. `wait`: until it may go.
async fn serve<S: Source<Uring>>(seat: &Seat, source: &S, wait: impl AsyncFn(&Request<'_>)) {
    let Seat { io, volume, client, tag, watch, .. } = seat;
    let flusher = client.flusher();
    let (tag, mut state) = (*tag, S::State::default());
    io.set_tag(tag);
    io.set_group(client.export());
    while let Some(request) = source.next(io, tag, &mut state).await {
        wait(&request).await;
        watch.begin(&request);
        let result = execute(volume, io, flusher, &request).await;
        watch.end();
        source.complete(tag, &mut state, result);
    }
}

/// The one future type of all slots: the door is a match, not a pointer.
pub(super) async fn sit(seat: Seat) {
    match &seat.queue {
        Queue::Ublk(queue) => {
            let Seat { io, admission, .. } = &seat;
            let wait =
                async |of: &Request<'_>| admission.pass(io, of.op, of.len(), queue.quiesce_flag()).await;
            serve(&seat, &**queue, wait).await;
        }
        // What its limits do not let in is not taken from the ring.
        Queue::Vring(vring) => serve(&seat, &**vring, async |_: &Request<'_>| ()).await,
    }
    seat.alive.set(seat.alive.get() - 1);
    if seat.alive.get() == 0 {
        seat.deserted.borrow_mut().push(seat.place);
    }
}
