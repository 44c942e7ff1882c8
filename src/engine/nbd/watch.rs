//! Time-outs of requests: a server that has them and stays silent loses the connection.
//!
//! Time is counted in ticks, of which eight are the time-out, and only while a request is in flight: no request looks at a
//! clock, and an idle connection has no timer. A connection is given up when it has a request that old, and
//! - it was sent, and nothing at all has come from the server since as long;
//! - or it could not be sent, and no byte has moved in either direction since as long;
//! - or a request was answered that was sent so much later: this one's answer is lost.
//!
//! So a link that is slow, or a server that is busy with much, is no reason as long as it moves.
//!
//! What becomes of the requests then is what becomes of them at any loss of a connection.

#![forbid(unsafe_code)]

use crate::ring::{Core, Io, Ring};
use std::cell::Cell;

/// Ticks that make a time-out.
pub const TICKS: u64 = 8;

/// Who looks after the requests of a pool, as its connections know them.
#[derive(Debug, Default)]
pub struct Watch {
    slot: Cell<Option<u32>>,
    /// It waits for a request.
    parked: Cell<bool>,
}

impl Watch {
    /// There is a request to be watched.
    pub fn wake<R: Ring>(&self, core: &Core<R>) {
        if self.parked.replace(false)
            && let Some(slot) = self.slot.get()
        {
            core.wake(slot);
        }
    }

    /// The pool is closing: ends the watch, whatever it waits for.
    pub fn end<R: Ring>(&self, core: &Core<R>) {
        if let Some(slot) = self.slot.get() {
            core.interrupt(slot);
        }
    }

    /// Says which slot watches, if any does.
    pub fn set_slot(&self, slot: Option<u32>) {
        self.slot.set(slot);
    }

    /// Waits for a request.
    pub async fn park<R: Ring>(&self, io: &Io<R>) {
        self.parked.set(true);
        io.park().await;
    }
}
