//! Where requests wait for somebody to say that they may go on.
//!
//! A gate is made when a volume stops, is opened once, and is never used again: no request can miss its opening
//! because another one has failed meanwhile. It is an eventfd that nobody reads, which the rings of all workers poll.

#![forbid(unsafe_code)]

use crate::block::Errno;
use crate::ring::{Io, Ring, Sqe, Target};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::OnceLock;
use std::time::Duration;

/// Between two looks at a gate that has no eventfd.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// See the module.
pub(super) struct Gate {
    /// Readable once it is open; `None` where there was no descriptor to be had.
    event: Option<EventFd>,
    action: OnceLock<ResumeAction>,
    /// Why it was shut.
    pub errno: Errno,
}

/// What is to become of those who wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ResumeAction {
    GoOn,
    GiveUp,
    /// Of one slot alone, which is [interrupted](Io::is_interrupted).
    Interrupted,
}

impl Gate {
    /// Shut, because of an error.
    pub fn new(errno: Errno) -> Gate {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let event =
            event.inspect_err(|error| log::warn!("eventfd: {error}: looking every second instead")).ok();
        Gate { event, action: OnceLock::new(), errno }
    }

    /// Lets everybody through, or sends everybody back. The first word counts.
    pub fn open(&self, action: ResumeAction) {
        let _ = self.action.set(action);
        if let Some(event) = &self.event {
            // It fails only when it is readable already.
            let _ = event.write(1);
        }
    }

    /// Waits for [`open`](Self::open), or until the slot is interrupted.
    pub async fn pass<R: Ring>(&self, io: &Io<R>) -> ResumeAction {
        loop {
            if let Some(action) = self.action.get() {
                return *action;
            }
            if io.is_interrupted() {
                return ResumeAction::Interrupted;
            }
            let polled = match &self.event {
                Some(event) => {
                    let file = Target::Fd(event.as_fd().as_raw_fd());
                    io.rest(&Sqe::PollOnce { file }).await
                }
                None => -libc::EBADF,
            };
            if polled < 0 {
                io.rest_for(POLL_INTERVAL).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::settle;
    use crate::ring::sim::{Faults, SimRing};
    use crate::ring::{Core, Tasks};
    use std::cell::Cell;
    use std::rc::Rc;

    #[test]
    fn without_a_descriptor_a_gate_is_looked_at() {
        for action in [ResumeAction::GoOn, ResumeAction::GiveUp] {
            let gate = Rc::new(Gate { event: None, ..Gate::new(Errno::EIO) });
            let core = Core::new(SimRing::new(1, Faults::default()));
            let mut tasks = Tasks::new(core.clone());
            let ended = Rc::new(Cell::new(None));
            tasks.add(|io| {
                let (gate, ended) = (gate.clone(), ended.clone());
                async move { ended.set(Some(gate.pass(&io).await)) }
            });
            let mut cqes = Vec::new();
            for _ in 0..3 {
                core.ring().enter(true).unwrap();
                core.ring().reap(&mut cqes);
                cqes.drain(..).for_each(|cqe| tasks.complete(&cqe));
            }
            assert_eq!(ended.get(), None);
            gate.open(action);
            gate.open(ResumeAction::GoOn);
            settle(&core, &mut tasks);
            assert_eq!(ended.get(), Some(action));
        }
    }
}
