//! `ringblk list`.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use super::Failure;
use super::output::{self, table};
use crate::block::Size;
use crate::service::client::{Client, ClientError};
use crate::service::config::DEFAULT_CONTROL;
use crate::service::leftovers::{self, Leftover};
use crate::service::status::{ExportStatus, Status};

/// List the volumes and exports of a running service.
///
/// Where none runs, the disks are listed that a service has left behind, if any, and the status is 1.
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
    #[arg(long, value_name = "SOCKET", default_value = DEFAULT_CONTROL)]
    control: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    match Client::new(&args.control).status() {
        Ok(status) if args.json => output::print_json(&status),
        Ok(status) => output::print(&render(&status)),
        Err(error @ ClientError::NotRunning(_)) if !args.json => {
            let left = leftovers::devices().map_err(Failure::failed)?;
            output::print(&render_leftovers(&left))?;
            Err(Failure::failed(error))
        }
        Err(error) => Err(Failure::failed(error)),
    }
}

fn render(status: &Status) -> String {
    let mut volumes = vec![["VOLUME", "DRIVER", "SIZE", "BLOCK", "MODE", "TARGET"].map(String::from)];
    for volume in &status.volumes {
        volumes.push([
            volume.name.clone(),
            volume.driver.clone(),
            Size(volume.size_bytes).approx(),
            volume.block_size.to_string(),
            mode(volume.read_only),
            volume.target.clone(),
        ]);
    }
    let mut exports = vec![["EXPORT", "VOLUME", "QUEUES", "MODE", "STATE"].map(String::from)];
    for export in &status.exports {
        let (queues, read_only, state) = match export {
            ExportStatus::Ublk(ublk) => {
                let copy = if ublk.zero_copy { "zero copy" } else { "copy" };
                let (device, link) = (ublk.device.display(), ublk.link.display());
                let state = format!("{link} -> {device}, {copy}");
                (format!("{} x {}", ublk.queues, ublk.depth), ublk.read_only, state)
            }
            ExportStatus::VhostUser(vhost_user) => {
                let state = match vhost_user.connected {
                    true => "connected",
                    false => "waiting for a VMM",
                };
                let queues = format!("{} x {}", vhost_user.queues, vhost_user.queue_size);
                (queues, vhost_user.read_only, state.to_owned())
            }
        };
        exports.push([export.name(), export.volume().to_owned(), queues, mode(read_only), state]);
    }
    let (version, pid, workers) = (&status.version, status.pid, status.workers);
    let stopping = if status.stopping { ", stopping" } else { "" };
    format!(
        "ringblk {version}, pid {pid}, workers {workers}{stopping}\n\n{}\n{}",
        table(&volumes),
        table(&exports)
    )
}

fn mode(read_only: bool) -> String {
    if read_only { "ro" } else { "rw" }.to_owned()
}

fn render_leftovers(left: &[Leftover]) -> String {
    if left.is_empty() {
        return String::new();
    }
    let mut rows = vec![["LEFT BEHIND", "DEVICE", "STATE"].map(String::from)];
    for link in left {
        rows.push([
            link.link.display().to_string(),
            link.device.display().to_string(),
            match link.exists {
                true => "there, may be served by another process",
                false => "gone",
            }
            .to_owned(),
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

VOLUME  DRIVER  SIZE      BLOCK  MODE  TARGET
root    file    1.00 GiB  512    rw    /srv/root.img

EXPORT                             VOLUME  QUEUES   MODE  STATE
ublk:root                          root    2 x 128  rw    /dev/ringblk/root -> /dev/ublkb0, zero copy
vhost-user:/run/ringblk/root.sock  root    2 x 256  ro    waiting for a VMM
";
        assert_eq!(text, expected);
    }

    #[test]
    fn leftovers_are_listed() {
        assert_eq!(render_leftovers(&[]), "");
        let left = Leftover { link: "/dev/ringblk/a".into(), device: "/dev/ublkb3".into(), exists: false };
        let text = render_leftovers(&[left]);
        assert!(text.ends_with("/dev/ringblk/a  /dev/ublkb3  gone\n"), "{text}");
    }

    #[test]
    fn nobody_there_is_a_failure() {
        let args = Args { json: true, control: "/no/such/control.sock".into() };
        assert_eq!(run(&args).unwrap_err().status, 1);
    }
}
