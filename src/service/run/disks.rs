//! How the disks of a service start.

use super::{Error, Shared, lock};
use crate::engine::Volume;
use crate::frontend::ublk::config::UblkConfig;
use crate::service::config::Config;
use crate::service::exports::Export;
use crate::service::exports::ublk::{self, Others, UblkExport};
use crate::worker::WorkerHandle;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::thread;

/// A disk to be started: its volume, and the workers of its queues.
pub(super) type Disk<'a> = (&'a UblkConfig, Arc<Volume>, Vec<WorkerHandle>);

/// The most that are taken over at the same time, each by a thread.
const AT_ONCE: usize = 64;

impl Shared {
    /// Starts the ublk exports, each on its workers. Those whose disk waits are first and do not wait for each other, since
    /// somebody waits for them; then the new ones, whose numbers follow the order of the configuration.
    pub(super) fn add_disks(&self, config: &Config, disks: &[Disk<'_>]) -> Result<(), Error> {
        let volumes: Vec<&str> = config.ublk.iter().map(|export| export.volume.as_str()).collect();
        let found = ublk::found();
        let start = |(export, volume, handles): &Disk<'_>| {
            let target = config.store_of(&export.volume);
            let given_up = self.arrivals.closed();
            let others = Others { volumes: volumes.clone(), target: &target, found: &found, given_up };
            let started = UblkExport::start(export, volume, handles, &others)?;
            log::info!("volume {} is served at {}", export.volume, started.status().link.display());
            Ok::<_, Error>(started)
        };
        let records = found.iter().filter_map(|found| found.record.as_ref());
        let known: BTreeSet<&str> = records.map(|record| record.volume.as_str()).collect();
        let (waiting, new): (Vec<_>, Vec<_>) =
            disks.iter().enumerate().partition(|(_, (export, ..))| known.contains(export.volume.as_str()));
        let threads = waiting.len().min(AT_ONCE);
        let (queue, results) = (Mutex::new(waiting.into_iter()), Mutex::new(Vec::new()));
        let work = || {
            let next = || lock(&queue).next();
            while let Some((at, disk)) = next() {
                let result = start(disk);
                lock(&results).push((at, result));
            }
        };
        thread::scope(|scope| {
            for _ in 1..threads {
                if let Err(error) =
                    thread::Builder::new().name("ringblk-start".into()).spawn_scoped(scope, work)
                {
                    log::debug!("a thread less for the disks' starts: {error}");
                }
            }
            work();
        });
        let mut results = std::mem::take(&mut *lock(&results));
        if results.iter().all(|(_, result)| result.is_ok()) {
            for (at, disk) in new {
                let result = start(disk);
                let failed = result.is_err();
                results.push((at, result));
                if failed {
                    break;
                }
            }
        }
        results.sort_by_key(|(at, _)| *at);
        // Those that are there are the service's, to be taken back, also when another is not.
        let mut failed = None;
        for (_, result) in results {
            match result {
                Ok(started) => lock(&self.exports).push(Export::Ublk(Box::new(started))),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(()), Err)
    }
}
