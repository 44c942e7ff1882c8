//! The host's half where the load is in a virtual machine: runs a service and kills it, whenever a VMM is connected.

use super::common::model::Random;
use super::report::{Event, Report, Wrong};
use super::service::{Program, Service};
use ringblk::service::client::Client;
use ringblk::service::status::ExportStatus;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const REST: Duration = Duration::from_millis(5);

/// What to do.
pub struct Plan {
    pub seed: u64,
    pub kills: u64,
    /// Planned restarts.
    pub stops: u64,
    /// The longest until a VMM is connected again.
    pub limit: Duration,
    pub begin: PathBuf,
    pub done: PathBuf,
}

/// Waits until a VMM is connected. False when that takes too long.
fn connected(service: &mut Service, client: &Client, limit: Duration, report: &Report) -> bool {
    let began = Instant::now();
    loop {
        let is =
            |export: &ExportStatus| matches!(export, ExportStatus::VhostUser(export) if export.connected);
        if client.status().is_ok_and(|status| status.exports.iter().all(is)) {
            return true;
        }
        if began.elapsed() > limit {
            report.wrong(
                Wrong::Hang,
                format!("no VMM for {limit:?}; the service's log ends:\n{}", service.log_tail()),
            );
            return false;
        }
        service.revive(report);
        std::thread::sleep(REST);
    }
}

/// Serves until `ended` is set. Kills begin when there is a file `plan.begin`; when there were enough, it makes
/// `plan.done`.
pub fn run(plan: &Plan, program: Program, control: &Path, ended: &AtomicBool, report: &Arc<Report>) {
    let mut random = Random::new(plan.seed);
    let client = Client::new(control);
    let mut service = program.start();
    while !plan.begin.exists() && !ended.load(Ordering::Acquire) {
        std::thread::sleep(REST);
    }
    let mut left = (plan.kills, plan.stops);
    while left != (0, 0) && !ended.load(Ordering::Acquire) {
        if !report.passed() || !connected(&mut service, &client, plan.limit, report) {
            return;
        }
        std::thread::sleep(Duration::from_millis(200 + random.below(1500)));
        let (event, began) =
            (if random.below(left.0 + left.1) < left.0 { Event::Kill } else { Event::Stop }, Instant::now());
        match event {
            Event::Kill => {
                service.kill();
                left.0 -= 1;
            }
            _ => {
                service.stop(plan.limit, report);
                left.1 -= 1;
            }
        }
        report.event(event);
        service.start();
        // The load's own view of it is the load's to tell.
        if connected(&mut service, &client, plan.limit, report) {
            report.pause(event, began.elapsed());
        }
    }
    // The load goes on for a moment.
    std::thread::sleep(Duration::from_secs(1));
    std::fs::write(&plan.done, "").expect("the file can be made");
    while !ended.load(Ordering::Acquire) {
        std::thread::sleep(REST);
    }
    service.stop(plan.limit, report);
}
