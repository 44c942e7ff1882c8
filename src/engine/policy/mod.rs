//! What becomes of a request that the store fails: its client is told, or it is tried again for a time, or it waits
//! until somebody has seen to the store. QEMU has the same choice for its own disks (`werror=`, `rerror=`).
//!
//! Which errors: all that come from the store, whatever their number. Those it never concerns:
//! - what [`submit`](super::submit()) refuses before the store is asked. That is the client's mistake, and stays one;
//! - `EINVAL` and `EOPNOTSUPP`: the store understood the request, and will answer it so every time;
//! - `EFAULT`: it is the client's memory that is missing;
//! - `ERESTART`: it waited, and its queue stops;
//! - a flush that failed. The kernel tells of lost writes once, and the next flush succeeds without them, so that to
//!   try a flush again is to say that lost data is safe. One that never reached its server is another matter
//!   ([`VolumeChannel::may_flush_again`](super::VolumeChannel)).
//!
//! For the last reason a write with FUA becomes a write and then a flush where a policy is in force: the error of the
//! two in one may be of other writes, and tell of their loss.
//!
//! All workers share a volume's policy. Nothing here is reached while the store does its work, but for one load of
//! [`Policy::is_stopped`].

#![forbid(unsafe_code)]

mod gate;
mod label;

use super::config::{OnError, PolicyConfig};
use crate::block::{Errno, limit_behind};
use crate::log_limit::LogLimit;
use crate::ring::{Io, Ring};
use gate::{Gate, ResumeAction};
pub(super) use label::RequestLabel;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

/// Before the first new attempt; each pause is twice as long as the one before it.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The longest pause: well below what a service that gives up waits for its requests.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// What becomes of the requests of one volume that fail.
pub(super) struct Policy {
    volume: String,
    on_error: OnError,
    patience: Duration,
    /// Requests wait for a [`resume`](Policy::resume).
    stopped: AtomicBool,
    /// Nothing waits any more.
    abandoned: AtomicBool,
    state: Mutex<State>,
    /// For lines about requests: their clients bring them about.
    log: LogLimit,
}

#[derive(Default)]
struct State {
    /// Where requests wait; there while stopped.
    gate: Option<Arc<Gate>>,
    /// Every request that waits, for either reason.
    waiting: Vec<Waiting>,
}

struct Waiting {
    /// The worker and its slot: whose request it is.
    thread: ThreadId,
    slot: u32,
    what: RequestLabel,
    for_resume: bool,
    errno: Errno,
}

/// A volume's policy and how it stands, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyState {
    /// `report`, `retry` or `stop`.
    pub policy: &'static str,
    /// Requests wait for a resume.
    pub paused: bool,
    /// Requests that wait, for that or for their next attempt.
    pub waiting: usize,
}

/// What a request that failed has behind it.
pub(super) struct Attempts {
    begun: Instant,
    paused: Duration,
    pause: Duration,
    count: u32,
}

impl Attempts {
    /// It has failed for the first time.
    pub fn new() -> Attempts {
        Attempts { begun: Instant::now(), paused: Duration::ZERO, pause: FIRST_PAUSE, count: 1 }
    }
}

impl Policy {
    pub fn new(volume: &str, config: PolicyConfig) -> Policy {
        Policy {
            volume: volume.to_owned(),
            on_error: config.on_error,
            patience: config.patience(),
            stopped: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
            state: Mutex::default(),
            log: LogLimit::new(format!("volume {volume}")),
        }
    }

    /// For lines about requests to the volume.
    pub fn log(&self) -> &LogLimit {
        &self.log
    }

    /// An error of the store that its client is told of leaves a line, whatever the policy. Not those that are no doing of
    /// the store's: memory that the client does not have, a queue that stops.
    #[cold]
    pub fn report(&self, what: RequestLabel, errno: Errno) {
        if !matches!(errno, Errno::EFAULT | Errno::ERESTART) {
            let limit = limit_behind(errno).map_or(String::new(), |limit| format!(" ({limit})"));
            self.log.warn(what.name(), format_args!("{what}: {errno}{limit}"));
        }
    }

    /// Name of the volume.
    pub fn volume(&self) -> &str {
        &self.volume
    }

    /// Whether new requests are to [wait](Self::wait_for_resume). A load of a line that nobody writes.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Whether errors are more than reported.
    pub fn is_active(&self) -> bool {
        self.on_error != OnError::Report
    }

    /// Whether it concerns an error of the store.
    pub fn covers(&self, errno: Errno) -> bool {
        self.is_active()
            && !matches!(errno, Errno::EINVAL | Errno::EOPNOTSUPP | Errno::EFAULT | Errno::ERESTART)
            && !self.abandoned.load(Ordering::Relaxed)
    }

    /// A request that has not been tried waits until the others are resumed.
    ///
    /// # Errors
    /// The one that everything waits for, when they are given up; `ERESTART` when the slot is interrupted.
    pub async fn wait_for_resume<R: Ring>(&self, io: &Io<R>, what: RequestLabel) -> Result<(), Errno> {
        let joined = {
            let mut state = self.lock();
            state.gate.clone().map(|gate| {
                let waits = self.enlist(&mut state, io, what, gate.errno, true);
                (gate, waits)
            })
        };
        match joined {
            Some((gate, _waits)) => decided(gate.pass(io).await, gate.errno),
            // Resumed since the look.
            None => Ok(()),
        }
    }

    /// A request failed with an error that the policy [covers](Self::covers): returns when it is to be tried again.
    ///
    /// # Errors
    /// `errno`, when it is to be told to the client after all; `ERESTART` when the slot is interrupted.
    pub async fn failed<R: Ring>(
        &self,
        io: &Io<R>,
        what: RequestLabel,
        errno: Errno,
        attempts: &mut Attempts,
    ) -> Result<(), Errno> {
        match self.on_error {
            OnError::Report => Err(errno),
            _ if io.is_interrupted() => Err(Errno::ERESTART),
            OnError::Retry => self.pause(io, what, errno, attempts).await,
            OnError::Stop => self.stop(io, what, errno).await,
        }
    }

    async fn pause<R: Ring>(
        &self,
        io: &Io<R>,
        what: RequestLabel,
        errno: Errno,
        attempts: &mut Attempts,
    ) -> Result<(), Errno> {
        // The clock may stand still where it is a test's; the pauses do not.
        let left = self.patience.saturating_sub(attempts.begun.elapsed().max(attempts.paused));
        if left.is_zero() {
            let count = attempts.count;
            self.log.warn("given up", format_args!("{what}: {errno}: given up after {count} attempts"));
            return Err(errno);
        }
        let pause = attempts.pause.min(left);
        let seconds = left.as_secs_f32().ceil();
        self.log.warn("again", format_args!("{what}: {errno}: it is tried again for {seconds} s"));
        {
            let _waits = self.enlist(&mut self.lock(), io, what, errno, false);
            io.rest_for(pause).await;
        }
        attempts.paused += pause;
        attempts.pause = (attempts.pause * 2).min(LONGEST_PAUSE);
        attempts.count += 1;
        if self.abandoned.load(Ordering::Relaxed) {
            return Err(errno);
        }
        if io.is_interrupted() { Err(Errno::ERESTART) } else { Ok(()) }
    }

    async fn stop<R: Ring>(&self, io: &Io<R>, what: RequestLabel, errno: Errno) -> Result<(), Errno> {
        let (gate, _waits) = {
            let mut state = self.lock();
            if self.abandoned.load(Ordering::Relaxed) {
                return Err(errno);
            }
            let gate = state.gate.get_or_insert_with(|| {
                log::error!(
                    "volume {}: {what}: {errno}: requests wait until `ringblk resume {}`",
                    self.volume,
                    self.volume
                );
                Arc::new(Gate::new(errno))
            });
            let gate = gate.clone();
            self.stopped.store(true, Ordering::Relaxed);
            let waits = self.enlist(&mut state, io, what, errno, true);
            (gate, waits)
        };
        decided(gate.pass(io).await, errno)
    }

    /// Lets the requests go on that wait: to be tried again, or to fail with their errors. How many there were.
    pub fn resume(&self, give_up: bool) -> usize {
        let mut state = self.lock();
        let Some(gate) = state.gate.take() else { return 0 };
        let count = state.waiting.iter().filter(|waiting| waiting.for_resume).count();
        self.stopped.store(false, Ordering::Relaxed);
        let fate = if give_up { "fail" } else { "are tried again" };
        log::warn!("volume {}: resumed: {count} requests {fate}", self.volume);
        gate.open(if give_up { ResumeAction::GiveUp } else { ResumeAction::GoOn });
        count
    }

    /// Fails what waits, and keeps nothing waiting any more.
    pub fn abandon(&self) {
        {
            // Under the lock, so that nobody stops after the resume.
            let _state = self.lock();
            self.abandoned.store(true, Ordering::Relaxed);
        }
        self.resume(true);
    }

    pub fn state(&self) -> PolicyState {
        let state = self.lock();
        PolicyState {
            policy: self.on_error.name(),
            paused: state.gate.is_some(),
            waiting: state.waiting.len(),
        }
    }

    /// What the request in `slot` of the calling worker waits for, if it waits here.
    pub fn waits(&self, slot: u32) -> Option<String> {
        let (state, thread) = (self.lock(), thread::current().id());
        let found = state.waiting.iter().find(|waiting| waiting.slot == slot && waiting.thread == thread)?;
        Some(match found.for_resume {
            true => format!("`ringblk resume {}` ({})", self.volume, found.errno),
            false => format!("its next attempt ({})", found.errno),
        })
    }

    /// What keeps a drain from ending, if it is the policy: the first of the requests that wait.
    pub fn pending_reason(&self) -> Option<String> {
        let state = self.lock();
        let Waiting { what, errno, for_resume, .. } = state.waiting.first()?;
        let (count, volume) = (state.waiting.len(), &self.volume);
        Some(match for_resume {
            true => format!("volume {volume}: {count} wait for `ringblk resume {volume}`: {what}: {errno}"),
            false => format!("volume {volume}: {count} wait for another attempt: {what}: {errno}"),
        })
    }

    /// Enters a request among those that wait, until what it returns is dropped.
    fn enlist<R: Ring>(
        &self,
        state: &mut State,
        io: &Io<R>,
        what: RequestLabel,
        errno: Errno,
        for_resume: bool,
    ) -> Waits<'_> {
        let (thread, slot) = (thread::current().id(), io.slot());
        state.waiting.push(Waiting { thread, slot, what, for_resume, errno });
        Waits { policy: self, thread, slot }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whoever panics with it has left nothing half done: each change is one push, take or retain.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an action means for a request that waited because of `errno`.
fn decided(action: ResumeAction, errno: Errno) -> Result<(), Errno> {
    match action {
        ResumeAction::GoOn => Ok(()),
        ResumeAction::GiveUp => Err(errno),
        ResumeAction::Interrupted => Err(Errno::ERESTART),
    }
}

/// A request that waits.
struct Waits<'a> {
    policy: &'a Policy,
    thread: ThreadId,
    slot: u32,
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        let ours = |waiting: &Waiting| waiting.slot == self.slot && waiting.thread == self.thread;
        self.policy.lock().waiting.retain(|waiting| !ours(waiting));
    }
}
