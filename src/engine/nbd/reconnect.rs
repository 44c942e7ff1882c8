//! A helper thread that makes one connection, however long that takes.
//!
//! It tells what happens through a channel, and writes to an eventfd, which the worker's ring polls. It ends when
//! it has a connection, or soon after its [`Reconnect`] is dropped: at most one attempt later.

#![forbid(unsafe_code)]

use super::connect::Connected;
use super::{CONNECT_TIME, Remote};
use crate::block::Causes;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// Shortest pause between two attempts; the first is made at once.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// The least time an attempt gets, even when the requests that wait for it have less.
const LEAST_ATTEMPT: Duration = Duration::from_secs(1);

/// What a connecting thread has to tell.
#[derive(Debug)]
pub enum Event {
    /// Its last word.
    Connected(Connected),
    /// Who waited has waited long enough. It goes on trying.
    OutOfPatience,
}

/// A connection being made.
#[derive(Debug)]
pub struct Reconnect {
    events: Receiver<Event>,
    /// Dropped with this: that ends the thread.
    _stop: Sender<()>,
}

/// The pause after one of `pause`.
pub fn longer(pause: Duration) -> Duration {
    (pause * 2).clamp(SHORTEST_PAUSE, LONGEST_PAUSE)
}

impl Reconnect {
    /// Starts a thread that connects to `remote` after `pause` and writes to `wakeup` for each event. Requests wait
    /// for it for `patience`, and for the first attempt in any case.
    ///
    /// # Errors
    /// The kernel's, when there are too many threads.
    pub fn start(
        remote: Arc<Remote>,
        wakeup: Arc<EventFd>,
        pause: Duration,
        patience: Duration,
    ) -> io::Result<Reconnect> {
        let (sender, events) = channel();
        let (stop, stopped) = channel();
        let tell = move |event| {
            // Fails when nobody listens any more, or when it was woken 2^64 times without a look.
            let _ = sender.send(event);
            let _ = wakeup.write(1);
        };
        thread::Builder::new()
            .name("ringblk-nbd".into())
            .spawn(move || reconnect(&remote, pause, patience, &stopped, tell))?;
        Ok(Reconnect { events, _stop: stop })
    }

    /// What happened since the last call.
    pub fn event(&self) -> Option<Event> {
        self.events.try_recv().ok()
    }
}

fn reconnect(
    remote: &Remote,
    mut pause: Duration,
    patience: Duration,
    stopped: &Receiver<()>,
    tell: impl Fn(Event),
) {
    let deadline = Instant::now() + patience;
    let mut patient = true;
    let mut failures = 0u64;
    let mut last = String::new();
    loop {
        if stopped.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
            return;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = if left.is_zero() { CONNECT_TIME } else { left.clamp(LEAST_ATTEMPT, CONNECT_TIME) };
        match remote.connect(limit) {
            Ok(connected) => {
                remote.log.info("connected", format_args!("connected"));
                return tell(Event::Connected(connected));
            }
            Err(error) => {
                failures += 1;
                let why = Causes(&error).to_string();
                // Often enough to be seen, seldom enough not to fill a disk.
                let seen = failures.is_power_of_two() || why != last;
                if seen {
                    remote.log.warn("attempt", format_args!("attempt {failures}: {why}"));
                }
                last = why;
            }
        }
        pause = longer(pause);
        let left = deadline.saturating_duration_since(Instant::now());
        if patient && left.is_zero() {
            patient = false;
            tell(Event::OutOfPatience);
        }
        if patient {
            pause = pause.min(left);
        }
    }
}
