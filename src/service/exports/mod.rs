//! Volumes behind frontends: where a configuration becomes something that runs.

mod placement;
pub mod ublk;
pub mod vhost_user;

use super::status::ExportStatus;
use crate::stats::ExportStats;
pub use placement::Placement;
use std::time::Instant;
use ublk::UblkExport;
use vhost_user::VhostUserExport;

/// A stop that did not come to its end in time, and what it still waits for.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Abandoned(pub String);

/// How an export ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShutdownMode {
    /// Its disk or socket goes; but a disk that somebody uses stays, and waits for the next service.
    Stop,
    /// Its disk or socket goes, whoever uses it.
    Force,
    /// Its disk stays where that is possible, because somebody is known to use it.
    Keep,
    /// Its disk stays, and waits for the next service.
    HandOver,
    /// As if the service had never been: a disk goes, unless an earlier service has left it.
    Withdraw,
}

/// A running export of either frontend.
pub enum Export {
    /// A disk of the host.
    Ublk(Box<UblkExport>),
    /// A socket for VMMs.
    VhostUser(VhostUserExport),
}

impl Export {
    /// As it is now.
    pub fn status(&self) -> ExportStatus {
        match self {
            Export::Ublk(export) => ExportStatus::Ublk(export.status()),
            Export::VhostUser(export) => ExportStatus::VhostUser(export.status()),
        }
    }

    /// What is counted of it.
    pub fn stats(&self) -> &ExportStats {
        match self {
            Export::Ublk(export) => export.stats(),
            Export::VhostUser(export) => export.stats(),
        }
    }

    /// Whether its clients can be shown another size.
    ///
    /// # Errors
    /// Why not, for people.
    pub fn can_resize(&self) -> Result<(), String> {
        match self {
            Export::Ublk(export) => export.can_resize().map_err(|error| error.to_string()),
            Export::VhostUser(_) => Ok(()),
        }
    }

    /// Shows its clients the capacity of the volume, which is `sectors` now.
    ///
    /// # Errors
    /// Why that did not work, for people.
    pub fn resize(&mut self, sectors: u64) -> Result<(), String> {
        match self {
            Export::Ublk(export) => export.resize(sectors).map_err(|error| error.to_string()),
            Export::VhostUser(export) => {
                // Its configuration space is made from the capacity at each look.
                export.resize();
                Ok(())
            }
        }
    }

    /// Whether it would survive a [`ShutdownMode::HandOver`].
    ///
    /// # Errors
    /// Why not, for people.
    pub fn can_hand_over(&self) -> Result<(), String> {
        match self {
            Export::Ublk(export) => export.can_hand_over().map_err(|error| error.to_string()),
            Export::VhostUser(_) => Ok(()),
        }
    }

    /// Who uses its disk, where it could not be left to the next service: then a stop would be their end.
    pub fn cannot_be_left(&self) -> Option<String> {
        match self {
            Export::Ublk(export) => export.cannot_be_left(),
            Export::VhostUser(_) => None,
        }
    }

    /// Whether its disk stayed when it took leave.
    pub fn stays(&self) -> bool {
        match self {
            Export::Ublk(export) => export.stays(),
            Export::VhostUser(_) => false,
        }
    }

    /// Ends as a [`ShutdownMode::Stop`] would, if nobody uses it. Else it is served as before: who uses it.
    ///
    /// # Errors
    /// When its requests are not complete by `deadline`.
    pub fn stop_if_unused(&mut self, deadline: Instant) -> Result<Option<String>, Abandoned> {
        match self {
            Export::Ublk(export) => {
                Ok(export.stop_if_unused(deadline)?.map(|users| match users.is_empty() {
                    true => "open in another process".into(),
                    false => users.join(", "),
                }))
            }
            Export::VhostUser(export) => match export.status().connected {
                true => Ok(Some("connected to a VMM".into())),
                false => export.stop(deadline).map(|()| None),
            },
        }
    }

    /// Takes no more requests, waits for those that it has, and takes leave of the frontend.
    ///
    /// # Errors
    /// When they are not complete by `deadline`.
    pub fn leave(&mut self, how: ShutdownMode, deadline: Instant) -> Result<(), Abandoned> {
        match (self, how) {
            (Export::Ublk(export), ShutdownMode::Stop) => export.stop_unless_used(deadline),
            (Export::Ublk(export), ShutdownMode::Keep) => export.keep(&[], deadline),
            (Export::Ublk(export), ShutdownMode::Force) => export.stop(deadline),
            (Export::Ublk(export), ShutdownMode::HandOver) => export.hand_over(deadline),
            (Export::Ublk(export), ShutdownMode::Withdraw) => export.withdraw(deadline),
            // A VMM comes back by itself, to whoever listens by then.
            (Export::VhostUser(export), _) => export.stop(deadline),
        }
    }
}
