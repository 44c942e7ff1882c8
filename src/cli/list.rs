//! `ringblk list`.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use super::Failure;
use super::output::{self, table};
use crate::block::Size;
use crate::engine::limits::LimitsChange;
use crate::service::client::{Client, ClientError};
use crate::service::config::DEFAULT_CONTROL;
use crate::service::orphans::{self, DeviceState, OrphanDevice};
use crate::service::status::{ExportStatus, Status, VolumeStatus};

/// List the volumes and exports of a running service.
///
/// Where none runs, the disks are listed that a service has left behind, if any, and the status is 1. Root is told
/// what they wait for.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringblk list
  ringblk list --json | jq -r '.exports[] | select(.kind == \"ublk\") | .device'")]
pub(super) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The control socket of the service
    #[arg(long, value_name = "SOCKET", default_value = DEFAULT_CONTROL, value_parser = super::control_socket)]
    control: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    match Client::new(&args.control).status() {
        Ok(status) if args.json => output::print_json(&status),
        Ok(status) => output::print(&render(&status)),
        Err(error @ ClientError::NotRunning(_)) => {
            let left = orphans::devices().map_err(Failure::failed)?;
            match args.json {
                true => output::print_json(&LeftBehind { left_behind: &left })?,
                false => output::print(&render_leftovers(&left))?,
            }
            Err(Failure::failed(error))
        }
        Err(error) => Err(Failure::failed(error)),
    }
}

/// What is printed as JSON where no service runs.
#[derive(serde::Serialize)]
struct LeftBehind<'a> {
    left_behind: &'a [OrphanDevice],
}

fn render(status: &Status) -> String {
    let mut volumes =
        vec![["VOLUME", "DRIVER", "SIZE", "BLOCK", "MODE", "TARGET", "STATE"].map(String::from)];
    for volume in &status.volumes {
        let there = |text: String| if volume.size_bytes == 0 { "-".to_owned() } else { text };
        volumes.push([
            volume.name.clone(),
            volume.driver.clone(),
            there(Size(volume.size_bytes).approx()),
            there(volume.block_size.to_string()),
            mode(volume.read_only),
            volume.target.clone(),
            state(volume),
        ]);
    }
    let mut exports = vec![["EXPORT", "VOLUME", "QUEUES", "WORKERS", "MODE", "STATE"].map(String::from)];
    let is_there = |export: &ExportStatus| {
        status.volumes.iter().any(|volume| volume.name == export.volume() && volume.size_bytes > 0)
    };
    for export in &status.exports {
        let waits = if is_there(export) { "did not start (see below)" } else { "waiting for its volume" };
        let (queues, read_only, workers, state) = match export {
            ExportStatus::Ublk(ublk) if ublk.waiting => {
                let queues = format!("{} x {}", ublk.queues, ublk.depth);
                (queues, ublk.read_only, ublk.workers, waits.to_owned())
            }
            ExportStatus::Ublk(ublk) => {
                let buffers = Size(ublk.buffer_bytes).approx();
                let copy = match (ublk.zero_copy, ublk.buffers_locked) {
                    (true, _) => "zero copy".to_owned(),
                    (false, true) => format!("copy, {buffers} locked"),
                    (false, false) => format!("copy, {buffers} not locked"),
                };
                let (device, link) = (ublk.device.display(), ublk.link.display());
                let state = format!("{link} -> {device}, {copy}");
                (format!("{} x {}", ublk.queues, ublk.depth), ublk.read_only, ublk.workers, state)
            }
            ExportStatus::VhostUser(vhost_user) => {
                let state = match vhost_user {
                    of if of.waiting => &format!("{waits}, refuses VMMs"),
                    of if of.connected && of.vmm_waiting => "connected, and another VMM waits",
                    of if of.connected => "connected",
                    _ => "waiting for a VMM",
                };
                let queues = format!("{} x {}", vhost_user.queues, vhost_user.queue_size);
                (queues, vhost_user.read_only, vhost_user.workers, state.to_owned())
            }
        };
        let workers = workers.map_or("shared".to_owned(), |own| format!("{own} own"));
        exports.push([export.name(), export.volume().to_owned(), queues, workers, mode(read_only), state]);
    }
    let (version, pid, workers) = (&status.version, status.pid, status.workers);
    let stopping = if status.stopping { ", stopping" } else { "" };
    let mut text = format!(
        "ringblk {version}, pid {pid}, workers {workers}{stopping}\n\n{}\n{}",
        table(&volumes),
        table(&exports)
    );
    text += &limits(status);
    let causes: Vec<&str> =
        status.volumes.iter().filter_map(|volume| volume.unavailable.as_deref()).collect();
    if !causes.is_empty() {
        text += "\nNot there yet, and tried again every few seconds:\n";
        causes.iter().for_each(|cause| text += &format!("  {cause}\n"));
    }
    text
}

/// The limits of those volumes that have some, and how long requests have waited for them.
fn limits(status: &Status) -> String {
    let mut rows = vec![["LIMITS", "GROUP", "THROTTLED", "IN A SECOND"].map(String::from)];
    for volume in status.volumes.iter().filter(|volume| !volume.limits.is_empty() || volume.throttled_ms > 0)
    {
        let shown = |key: &str| {
            let value = volume.limits.get(key)?;
            let value =
                if LimitsChange::is_bytes(key) { Size(*value).to_string() } else { value.to_string() };
            Some(format!("{key}={value}"))
        };
        let numbers = LimitsChange::NUMBERS.iter().filter_map(|key| shown(key)).collect::<Vec<_>>();
        rows.push([
            volume.name.clone(),
            volume.group.clone().unwrap_or_else(|| "-".into()),
            format!("{:.1} s", volume.throttled_ms as f64 / 1000.0),
            if numbers.is_empty() { "-".into() } else { numbers.join(" ") },
        ]);
    }
    if rows.len() > 1 { format!("\n{}", table(&rows)) } else { String::new() }
}

/// What a volume's requests are at.
fn state(volume: &VolumeStatus) -> String {
    let VolumeStatus { name, paused, waiting, unavailable, size_bytes, idle, .. } = volume;
    if *idle {
        return "no exports".into();
    }
    match (unavailable, size_bytes) {
        (Some(_), 0) => return "not there yet".into(),
        (Some(_), _) if !paused && *waiting == 0 => return "ok, but for an export that did not start".into(),
        _ => {}
    }
    let requests = match waiting {
        1 => "1 request".to_owned(),
        count => format!("{count} requests"),
    };
    match (paused, waiting) {
        (true, _) => format!("its store failed: {requests} until `ringblk resume {name}`"),
        (false, 0) => "ok".into(),
        (false, _) => format!("its store fails: {requests} tried again"),
    }
}

fn mode(read_only: bool) -> String {
    if read_only { "ro" } else { "rw" }.to_owned()
}

fn render_leftovers(left: &[OrphanDevice]) -> String {
    if left.is_empty() {
        return String::new();
    }
    let mut rows = vec![["LEFT BEHIND", "DEVICE", "STATE", "NEEDS"].map(String::from)];
    for disk in left {
        let state = match (disk.state, disk.server) {
            (DeviceState::Served, Some(pid)) => format!("served by process {pid}"),
            (DeviceState::Served, None) => "served".into(),
            (DeviceState::Exiting, _) => "its service is ending".into(),
            (DeviceState::Waiting, _) => "waiting for its service".into(),
            (DeviceState::Stale, _) => "without a disk".into(),
            (DeviceState::Unknown, _) => "there, may be served by another process".into(),
            (DeviceState::Gone, _) => "gone".into(),
        };
        rows.push([
            disk.link.as_ref().map_or("-".into(), |link| link.display().to_string()),
            disk.device.display().to_string(),
            state,
            disk.needs().into(),
        ]);
    }
    table(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::status::sample;

    #[test]
    fn everything_is_listed() {
        let text = render(&sample());
        let expected = "\
ringblk 0.1.0, pid 42, workers 2

VOLUME  DRIVER  SIZE      BLOCK  MODE  TARGET         STATE
root    file    1.00 GiB  512    rw    /srv/root.img  its store failed: 3 requests until `ringblk resume root`

EXPORT                             VOLUME  QUEUES   WORKERS  MODE  STATE
ublk:root                          root    2 x 128  shared   rw    /dev/ringblk/root -> /dev/ublkb0, zero copy
vhost-user:/run/ringblk/root.sock  root    2 x 256  1 own    ro    waiting for a VMM
";
        assert_eq!(text, expected);
    }

    #[test]
    fn limits_are_listed() {
        let mut status = sample();
        assert!(!render(&status).contains("LIMITS"));
        let volume = &mut status.volumes[0];
        volume.limits = [("bps-read".to_owned(), 3 << 20), ("iops-total".to_owned(), 500)].into();
        (volume.group, volume.throttled_ms) = (Some("small".into()), 61_250);
        let expected = "
LIMITS  GROUP  THROTTLED  IN A SECOND
root    small  61.2 s     iops-total=500 bps-read=3M
";
        assert!(render(&status).ends_with(expected), "{}", render(&status));
    }

    #[test]
    fn what_waits_is_told() {
        let mut status = sample();
        let mut states = |paused, waiting, connected, vmm_waiting| {
            let volume = &mut status.volumes[0];
            (volume.paused, volume.waiting) = (paused, waiting);
            if let ExportStatus::VhostUser(export) = &mut status.exports[1] {
                (export.connected, export.vmm_waiting) = (connected, vmm_waiting);
            }
            render(&status)
        };
        let text = states(false, 0, true, false);
        assert!(text.contains("root.img  ok\n") && text.contains("ro    connected\n"), "{text}");
        let text = states(false, 1, true, true);
        assert!(text.contains("its store fails: 1 request tried again"), "{text}");
        assert!(text.contains("connected, and another VMM waits"), "{text}");
    }

    #[test]
    fn a_volume_that_is_not_there_yet_is_listed_with_its_cause() {
        let mut status = sample();
        (status.volumes[0].size_bytes, status.volumes[0].block_size) = (0, 0);
        status.volumes[0].unavailable = Some("volume root: nbd://h/: cannot connect".into());
        for export in &mut status.exports {
            match export {
                ExportStatus::Ublk(ublk) => ublk.waiting = true,
                ExportStatus::VhostUser(vhost_user) => vhost_user.waiting = true,
            }
        }
        let text = render(&status);
        let volume = text.lines().nth(3).unwrap();
        assert!(volume.starts_with("root") && volume.ends_with("not there yet"), "{volume}");
        assert_eq!(text.matches("waiting for its volume").count(), 2, "{text}");
        assert!(text.ends_with("every few seconds:\n  volume root: nbd://h/: cannot connect\n"), "{text}");
        // It has come, and they have not.
        let volume = &mut status.volumes[0];
        (volume.size_bytes, volume.paused, volume.waiting) = (1 << 30, false, 0);
        let text = render(&status);
        assert_eq!(text.matches("did not start (see below)").count(), 2, "{text}");
        assert!(text.contains("root.img  ok, but for an export that did not start\n"), "{text}");
        assert!(text.contains("  volume root: nbd://h/: cannot connect\n"), "{text}");
    }

    #[test]
    fn leftovers_are_listed() {
        assert_eq!(render_leftovers(&[]), "");
        let left = |state, link: Option<&str>| OrphanDevice {
            link: link.map(Into::into),
            device: "/dev/ublkb3".into(),
            volume: None,
            target: None,
            state,
            server: Some(7),
        };
        let text = render_leftovers(&[
            left(DeviceState::Served, Some("/dev/ringblk/a")),
            left(DeviceState::Waiting, None),
        ]);
        let expected = "\
LEFT BEHIND     DEVICE       STATE                    NEEDS
/dev/ringblk/a  /dev/ublkb3  served by process 7      nothing
-               /dev/ublkb3  waiting for its service  start its service, or `ringblk remove`
";
        assert_eq!(text, expected);
        let json =
            serde_json::to_value(LeftBehind { left_behind: &[left(DeviceState::Waiting, None)] }).unwrap();
        assert_eq!(json["left_behind"][0]["state"], "waiting");
        assert_eq!(json["left_behind"][0]["device"], "/dev/ublkb3");
    }

    #[test]
    fn nobody_there_is_a_failure() {
        let args = Args { json: true, control: "/no/such/control.sock".into() };
        assert_eq!(run(&args).unwrap_err().status, 1);
    }
}
