//! A volume behind the ublk door: the device, its queues on the workers, and its stable name.

#![forbid(unsafe_code)]

use super::Abandoned;
use crate::engine::Volume;
use crate::frontend::ublk::options::{UblkConfig, ZeroCopy};
use crate::frontend::ublk::support::{self, NoZeroCopy};
use crate::frontend::ublk::{self, Answer, Device, StableName, Wish};
use crate::service::status::UblkStatus;
use crate::worker::Link;
use std::fmt::Display;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

/// How often a start is looked at for a reason why it will never finish.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// The longest that undoing a start which failed may take.
const UNDO_LIMIT: Duration = Duration::from_secs(10);

/// A ublk disk in service. [`stop`](Self::stop) it; one that is only dropped goes in the background, with
/// nobody to say when.
pub struct UblkExport {
    device: Device,
    name: StableName,
    status: UblkStatus,
    /// Queues that have not ended: each hears when it has.
    ends: Vec<Receiver<()>>,
    phase: Phase,
}

/// How far a stop has come, so that one that ran out of time can be gone on with.
enum Phase {
    /// Serving, or about to.
    Live,
    /// The kernel waits for requests in flight.
    Stopping(Answer),
    /// The queues' last fetches come back.
    Draining,
    /// The kernel forgets the device.
    Deleting(Answer),
    /// Nothing is left.
    Gone,
}

/// Why a volume is not behind the ublk door.
#[derive(Debug, thiserror::Error)]
#[error("ublk export of volume {volume}")]
pub struct Error {
    /// Its name.
    pub volume: String,
    /// What was wrong.
    pub source: ublk::Error,
}

impl UblkExport {
    /// Makes the device, and serves its queues on `links`, one for each queue that is asked for (the kernel
    /// may grant fewer). Returns when the disk and its stable name are there.
    ///
    /// # Errors
    /// When the name is not free, there is no ublk to be used, the kernel cannot do what was asked, or does
    /// not do it in time. What had been made by then is undone.
    pub fn start(config: &UblkConfig, volume: &Arc<Volume>, links: &[Link]) -> Result<UblkExport, Error> {
        let failed = |source| Error { volume: config.volume.clone(), source };
        let mut export = UblkExport::add(config, volume, links).map_err(failed)?;
        match export.serve(config, volume, links) {
            Ok(()) => Ok(export),
            Err(error) => {
                export.undo();
                Err(failed(error))
            }
        }
    }

    /// Checks all that can be checked, and adds the device.
    fn add(config: &UblkConfig, volume: &Volume, links: &[Link]) -> Result<UblkExport, ublk::Error> {
        let name = StableName::check(&config.volume)?;
        let wish = match config.zero_copy {
            ZeroCopy::Auto if !volume.prefers_registered() => ZeroCopy::Off,
            wish => wish,
        };
        let zero_copy = support::probe()?.zero_copy(wish, volume.takes_registered())?;
        let wish = Wish {
            name: config.volume.clone(),
            id: config.id,
            queues: u16::try_from(links.len()).unwrap_or(UblkConfig::MAX_QUEUES),
            depth: config.depth,
            max_io: config.max_io,
            zero_copy,
        };
        let device = Device::add(&wish, volume.geometry())?;
        let status = UblkStatus {
            volume: config.volume.clone(),
            device: device.path(),
            link: name.path().into(),
            queues: 0,
            depth: device.depth(),
            zero_copy: device.zero_copy(),
            read_only: volume.geometry().read_only,
        };
        Ok(UblkExport { device, name, status, ends: Vec::new(), phase: Phase::Live })
    }

    /// How it runs.
    pub fn status(&self) -> UblkStatus {
        self.status.clone()
    }

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
                    Phase::Stopping(self.device.stop())
                }
                Phase::Stopping(answer) => {
                    done(answer.wait(deadline)).map_err(|error| self.abandoned(&error))?;
                    Phase::Draining
                }
                Phase::Draining => {
                    self.ends.retain(|end| {
                        let left = deadline.saturating_duration_since(Instant::now());
                        matches!(end.recv_timeout(left), Err(RecvTimeoutError::Timeout))
                    });
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
                Phase::Gone => return Ok(()),
            };
        }
    }

    /// Hands the queues out, starts the device and names it.
    fn serve(
        &mut self,
        config: &UblkConfig,
        volume: &Arc<Volume>,
        links: &[Link],
    ) -> Result<(), ublk::Error> {
        if config.zero_copy == ZeroCopy::On && !self.status.zero_copy {
            return Err(NoZeroCopy::NotGranted.into());
        }
        for (setup, link) in self.device.queues().into_iter().zip(links) {
            let queue = setup.queue;
            let end = link.add_ublk(setup, volume.clone());
            self.ends.push(end.map_err(|source| ublk::Error::Queue { queue, source })?);
            self.status.queues += 1;
        }
        self.wait_for_start()?;
        self.name.point_to(&self.status.device)?;
        Ok(())
    }

    /// Starts the device, unless a queue ends first: then its fetches were refused, and the kernel would wait
    /// for them for ever.
    fn wait_for_start(&self) -> Result<(), ublk::Error> {
        let answer = self.device.start();
        loop {
            if let Some(result) = answer.try_wait(Instant::now() + LOOK_EVERY) {
                return result;
            }
            let dead = |end: &Receiver<()>| !matches!(end.try_recv(), Err(TryRecvError::Empty));
            if let Some(queue) = self.ends.iter().position(dead) {
                self.device.give_up_start();
                return Err(ublk::Error::Fetch { queue });
            }
        }
    }

    /// Removes what a failed start has made, as far as that goes in time.
    fn undo(&mut self) {
        if let Err(abandoned) = self.stop(Instant::now() + UNDO_LIMIT) {
            log::error!("ublk:{}: {abandoned}", self.status.volume);
        }
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
    use crate::frontend::ublk::Verb;

    #[test]
    fn a_device_deleted_by_others_is_gone() {
        let refused = |raw| Err(ublk::Error::Refused { verb: Verb::Stop, errno: Errno::new(raw), id: None });
        assert!(done(refused(libc::ENODEV)).is_ok());
        assert!(done(refused(libc::ENOENT)).is_ok());
        assert!(done(refused(libc::EBUSY)).is_err());
        assert!(done(Err(ublk::Error::TimedOut { verb: Verb::Stop, after: Duration::ZERO })).is_err());
    }
}
