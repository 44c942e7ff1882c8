//! The ends of a ublk export: its disk goes, or stays for the next server.

#![forbid(unsafe_code)]

use super::super::Abandoned;
use super::UblkExport;
use crate::frontend::ublk::config::Recovery;
use crate::frontend::ublk::{self, Answer};
use crate::worker::WorkerHandle;
use std::fmt::Display;
use std::io;
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::{Duration, Instant};

/// The longest that undoing a start which failed may take.
const UNDO_LIMIT: Duration = Duration::from_secs(10);

/// How long the queues have to end before the kernel is asked once more to quiesce them.
const QUIESCE_AGAIN: Duration = Duration::from_millis(20);

/// How long a disk may be open somewhere when it is to go: udev and its like look at it for a moment now and then.
const OPEN_LIMIT: Duration = Duration::from_secs(1);

/// Between two tries to stop a disk that was open.
const TRY_EVERY: Duration = Duration::from_millis(50);

/// How far a stop has come, so that one that ran out of time can be gone on with.
pub(super) enum Phase {
    /// Serving, or about to.
    Live,
    /// The kernel waits for requests in flight.
    Stopping(Answer),
    /// The queues' last fetches come back.
    Draining,
    /// The kernel forgets the device.
    Deleting(Answer),
    /// Nothing is left for us to do.
    Gone,
    /// The same, and the disk waits for the next service.
    Left,
}

impl UblkExport {
    /// Takes the disk away: its name first, then new requests fail, those in flight are served, and at last
    /// the device is deleted. Writes that were not flushed are left to the volume. To be called from a
    /// thread that serves nothing. Once it has returned `Ok`, further calls do nothing; after an error they
    /// go on where it gave up.
    ///
    /// # Errors
    /// When it is not over at `deadline`.
    pub fn stop(&mut self, deadline: Instant) -> Result<(), Abandoned> {
        loop {
            self.phase = match &self.phase {
                Phase::Live => {
                    self.name.remove();
                    self.lift_limits();
                    Phase::Stopping(self.device.stop())
                }
                Phase::Stopping(answer) => {
                    done(answer.wait(deadline)).map_err(|error| self.abandoned(&error))?;
                    // Its number is taken for as long as anybody has it open.
                    drop(self.claim.take());
                    Phase::Draining
                }
                Phase::Draining => {
                    self.wait_for_ends(deadline);
                    if !self.ends.is_empty() {
                        let reason = format!("{} of its queues have requests in flight", self.ends.len());
                        return Err(self.abandoned(&reason));
                    }
                    self.device.close();
                    Phase::Deleting(self.device.delete())
                }
                Phase::Deleting(answer) => {
                    done(answer.wait(deadline)).map_err(|error| self.abandoned(&error))?;
                    Phase::Gone
                }
                Phase::Gone | Phase::Left => return Ok(()),
            };
        }
    }

    /// Takes the disk away as [`stop`](Self::stop) does if nobody uses it, and else leaves it to the next server.
    ///
    /// # Errors
    /// Those of both. Where it is in use and cannot be left, it is taken away all the same, since it would not outlive us.
    pub fn stop_unless_used(&mut self, deadline: Instant) -> Result<(), Abandoned> {
        if !matches!(self.phase, Phase::Live) {
            return self.stop(deadline);
        }
        self.lift_limits();
        match self.stop_if_unused(deadline)? {
            None => Ok(()),
            Some(users) => self.keep(&users, deadline),
        }
    }

    /// Takes the disk away as [`stop`](Self::stop) does, if nobody uses it. Else it is served as before: who uses it, as far as
    /// we see (nobody whom we see: it is open).
    ///
    /// # Errors
    /// Those of [`stop`](Self::stop).
    pub fn stop_if_unused(&mut self, deadline: Instant) -> Result<Option<Vec<String>>, Abandoned> {
        let users = self.device.users();
        if !users.is_empty() {
            return Ok(Some(users));
        }
        if !self.device.tells_whether_open() {
            return self.stop_claimed(deadline);
        }
        let patience = Instant::now() + OPEN_LIMIT;
        loop {
            match self.device.try_stop().wait(deadline) {
                Err(ublk::Error::Refused { errno, .. }) if errno.raw() == libc::EBUSY => {
                    if Instant::now() > patience {
                        return Ok(Some(Vec::new()));
                    }
                    thread::sleep(TRY_EVERY);
                }
                answer => {
                    done(answer).map_err(|error| self.abandoned(&error))?;
                    self.name.remove();
                    self.lift_limits();
                    self.phase = Phase::Draining;
                    return self.stop(deadline).map(|()| None);
                }
            }
        }
    }

    /// Takes the disk away if nobody has claimed it, and lets nobody do so meanwhile. For kernels that do not tell whether
    /// it is open: somebody who merely opens it since we have looked is not seen.
    fn stop_claimed(&mut self, deadline: Instant) -> Result<Option<Vec<String>>, Abandoned> {
        let claim = match self.device.claim(OPEN_LIMIT, TRY_EVERY) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => return Ok(Some(Vec::new())),
            Err(error) => {
                let device = self.status.device.display();
                log::info!(
                    "{device}: cannot be kept from being mounted while it is taken away: open: {error}"
                );
                None
            }
            Ok(claim) => Some(claim),
        };
        // Who came before the claim, or needs none: a loop device.
        let users = self.device.users();
        if !users.is_empty() {
            drop(claim);
            return Ok(Some(users));
        }
        self.name.remove();
        self.lift_limits();
        self.phase = Phase::Stopping(self.device.stop());
        self.claim = claim;
        self.stop(deadline).map(|()| None)
    }

    /// Leaves a disk to the next server that `users` have, or (none) somebody whom we need not see, where that can be, and
    /// says so.
    ///
    /// # Errors
    /// As [`stop_unless_used`](Self::stop_unless_used).
    pub fn keep(&mut self, users: &[String], deadline: Instant) -> Result<(), Abandoned> {
        // What we see is told in preference to what we were told.
        let seen = if users.is_empty() { self.device.users() } else { users.to_vec() };
        let users = if seen.is_empty() { "open in another process".into() } else { seen.join(", ") };
        let disk = self.status.link.display();
        if let Err(error) = self.can_hand_over() {
            log::warn!("{disk} goes although it is {users}: {error}");
            return self.stop(deadline);
        }
        log::warn!(
            "{disk} stays, since it is {users}: it waits for the next service (`ringblk stop --force` takes it away)"
        );
        self.hand_over(deadline)
    }

    /// Who uses the disk, if it is used and could not be left.
    pub fn cannot_be_left(&self) -> Option<String> {
        let error = self.can_hand_over().err()?;
        let users = self.device.users();
        (!users.is_empty())
            .then(|| format!("{} is {}, and {error}", self.status.link.display(), users.join(", ")))
    }

    /// Whether the disk was left to the next server.
    pub fn stays(&self) -> bool {
        matches!(self.phase, Phase::Left)
    }

    /// Whether the disk would stay, with its requests, if we left it now.
    ///
    /// # Errors
    /// Why it would not, and what could be done.
    pub fn can_hand_over(&self) -> Result<(), Abandoned> {
        if !matches!(self.phase, Phase::Live) {
            return Err(self.abandoned(&"it is not in service"));
        }
        match self.recovery {
            Recovery::Off => Err(self.abandoned(&"it cannot be handed over with recovery=off")),
            // The requests that we are given while we leave would fail.
            Recovery::Queue if !self.device.quiesces() => {
                let release = &self.features.release;
                let reason = format!(
                    "with recovery=queue it can be handed over on kernels with UBLK_F_QUIESCE, which came with Linux \
                     6.16 (this is {release}); with recovery=reissue on all"
                );
                Err(self.abandoned(&reason))
            }
            _ => Ok(()),
        }
    }

    /// Leaves the disk, with its name and all that was asked of it, to the next server. What was acknowledged is at
    /// the volume; what is in flight is waited for until `deadline`. The process must end after this: on kernels
    /// without `UBLK_F_QUIESCE` that is what lets go of the device.
    ///
    /// Nothing that we have begun can reach the store after the next server has: either all of it is over before
    /// this returns, or the kernel keeps the device from the next server until our ring is gone, and our ring until
    /// its last operation is over. What we were given and have not begun, the kernel gives to the next server.
    ///
    /// # Errors
    /// See [`can_hand_over`](Self::can_hand_over). With another recovery than `reissue`, also when requests are in
    /// flight at `deadline`, which would fail; then no more are taken, and the disk can be stopped, or handed over
    /// once more.
    pub fn hand_over(&mut self, deadline: Instant) -> Result<(), Abandoned> {
        self.can_hand_over()?;
        let drained = if self.device.quiesces() && self.quiesce(deadline) {
            // Gone from our side too, so the next server need not wait for our end.
            self.device.close();
            true
        } else {
            self.hold(deadline)
        };
        if !drained && self.recovery != Recovery::Reissue {
            return Err(self.abandoned(&"requests are in flight, and would fail"));
        }
        if !drained {
            let device = self.status.device.display();
            log::warn!(
                "{device}: handed over with requests in flight: the next server carries them out again"
            );
        }
        self.name.leave();
        self.phase = Phase::Left;
        Ok(())
    }

    /// Lets the requests go that wait for limits: the kernel waits for all that it has given us, and nobody is to wait for
    /// limits with it.
    fn lift_limits(&self) {
        self.device.quiesce_flag().lift_limits();
        self.handles.iter().for_each(WorkerHandle::limits_changed);
    }

    /// Lets the kernel keep new requests, and sees every queue to its end. Whether that is done by `deadline`.
    fn quiesce(&mut self, deadline: Instant) -> bool {
        self.lift_limits();
        while !self.ends.is_empty() && Instant::now() < deadline {
            // A request that is committed fetches the next, and such a fetch is aborted by the next call.
            let limit = deadline.saturating_duration_since(Instant::now());
            if let Err(error) = self.device.quiesce(limit).wait(deadline) {
                log::warn!("{}: {error}", self.status.device.display());
            }
            let again = deadline.min(Instant::now() + QUIESCE_AGAIN);
            self.wait_for_ends(again);
        }
        self.ends.is_empty()
    }

    /// Takes no more requests, and waits for those that we have. Whether they are over by `deadline`.
    fn hold(&mut self, deadline: Instant) -> bool {
        self.device.quiesce_flag().set();
        let left = || deadline.saturating_duration_since(Instant::now());
        let answers: Vec<_> =
            self.handles.iter().map(|handle| handle.drain(self.volume.clone(), left())).collect();
        // A worker that has ended has no requests. Those that wait for a store to come back are not drained.
        answers.into_iter().all(|answer| answer.recv().unwrap_or(true))
            && self.volume.policy_state().waiting == 0
    }

    /// Takes what a failed start of the service has made away again. A disk that was there before stays, and so do
    /// the requests that wait for it.
    ///
    /// # Errors
    /// Those of [`stop`](Self::stop) and [`hand_over`](Self::hand_over). A disk that was there before stays even so.
    pub fn withdraw(&mut self, deadline: Instant) -> Result<(), Abandoned> {
        if self.device.recovered() && matches!(self.phase, Phase::Live) {
            self.name.leave();
            return self.hand_over(deadline);
        }
        self.stop(deadline)
    }

    /// Removes what a failed start has made, as far as that goes in time.
    pub(super) fn undo(&mut self) {
        if let Err(abandoned) = self.withdraw(Instant::now() + UNDO_LIMIT) {
            log::error!("ublk:{}: {abandoned}", self.status.volume);
        }
    }

    /// Waits for the queues' ends, until `deadline`.
    fn wait_for_ends(&mut self, deadline: Instant) {
        self.ends.retain(|end| {
            let left = deadline.saturating_duration_since(Instant::now());
            matches!(end.recv_timeout(left), Err(RecvTimeoutError::Timeout))
        });
    }

    fn abandoned(&self, reason: &dyn Display) -> Abandoned {
        Abandoned(format!("{}: {reason}", self.status.device.display()))
    }
}

/// A device that somebody else has deleted is as good as one that we have.
fn done(result: Result<(), ublk::Error>) -> Result<(), ublk::Error> {
    match result {
        Err(ublk::Error::Refused { errno, .. }) if [libc::ENODEV, libc::ENOENT].contains(&errno.raw()) => {
            Ok(())
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Errno;
    use crate::frontend::ublk::ControlOp;

    #[test]
    fn a_device_deleted_by_others_is_gone() {
        let refused =
            |raw| Err(ublk::Error::Refused { op: ControlOp::Stop, errno: Errno::new(raw), id: None });
        assert!(done(refused(libc::ENODEV)).is_ok());
        assert!(done(refused(libc::ENOENT)).is_ok());
        assert!(done(refused(libc::EBUSY)).is_err());
        assert!(done(Err(ublk::Error::TimedOut { op: ControlOp::Stop, after: Duration::ZERO })).is_err());
    }
}
