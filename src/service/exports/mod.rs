//! Volumes behind front doors: where a configuration becomes something that runs.

pub mod ublk;
pub mod vhost_user;

use super::status::ExportStatus;
use crate::worker::Link;
use std::time::Instant;
use ublk::UblkExport;
use vhost_user::VhostUserExport;

/// A stop that did not come to its end in time, and what it still waits for.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Abandoned(pub String);

/// A running export of either door.
pub enum Export {
    /// A disk of the host.
    Ublk(UblkExport),
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

    /// Takes no more requests, waits for those that it has, and takes the door away.
    ///
    /// # Errors
    /// When they are not complete by `deadline`.
    pub fn stop(&mut self, deadline: Instant) -> Result<(), Abandoned> {
        match self {
            Export::Ublk(export) => export.stop(deadline),
            Export::VhostUser(export) => export.stop(deadline),
        }
    }
}

/// Spreads queues over workers, each export going on where the last one ended.
pub struct Placement<'a> {
    links: &'a [Link],
    next: usize,
}

impl<'a> Placement<'a> {
    /// Over these; there must be one.
    pub fn over(links: &'a [Link]) -> Placement<'a> {
        Placement { links, next: 0 }
    }

    /// A worker for each of `queues` queues; one and the same for all of them when the volume must not be
    /// used by several.
    pub fn of(&mut self, queues: u16, single_worker: Option<usize>) -> Vec<Link> {
        (0..queues)
            .map(|_| {
                let at = single_worker.unwrap_or(self.next);
                self.next += usize::from(single_worker.is_none());
                self.links[at % self.links.len()].clone()
            })
            .collect()
    }
}
