//! What a worker does for queues whose requests wait for limits.

#![forbid(unsafe_code)]

use super::{Loop, Seat};
use crate::ring::Cqe;
use std::future::Future;

impl<F: Future<Output = ()>, M: Fn(Seat) -> F> Loop<F, M> {
    /// Has the ring wake the worker when the first of its queues is to ask again.
    pub(super) fn arm_throttle(&self) {
        let dues = self.places.iter().flatten().filter_map(|place| place.admission.due());
        self.throttle.arm(&self.core, dues);
    }

    /// Some are to ask again: slots here, and vrings when they are looked at.
    pub(super) fn throttle_expired(&self, cqe: &Cqe) {
        if self.throttle.expired(cqe.user_data) {
            let now = crate::ring::Ring::now(self.core.ring());
            let due = self
                .places
                .iter()
                .flatten()
                .filter(|place| place.admission.due().is_some_and(|due| due <= now));
            due.for_each(|place| place.admission.wake(&self.core));
        }
    }

    /// Limits have changed: all are to ask again.
    pub(super) fn limits_changed(&self) {
        self.places.iter().flatten().for_each(|place| place.admission.look_again(&self.core));
    }
}
