//! `ringblk stop`.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Duration;

use super::{Failure, output};
use crate::service::client::Client;
use crate::service::config::DEFAULT_CONTROL;
use crate::service::orphans::{self, DeviceState};
use crate::service::status::{ExportStatus, Stop};

/// Stop a running service cleanly, and wait until it is gone.
///
/// The service accepts nothing new, finishes what it has, flushes, and removes the disks and sockets it made. A disk that
/// is in use (mounted, swapped to, part of another device, open) stays, and waits for the next `ringblk serve`; what
/// cannot stay because its data goes with the service, and is in use, keeps the service from stopping.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example, a new version of ringblk under disks that are in use:
  ringblk stop --hand-over && ringblk serve --config /etc/ringblk.toml")]
pub(super) struct Args {
    /// Leave all disks of this host where they are: they keep their names, and requests to them wait for the next
    /// `ringblk serve` with the same volumes. Virtual machines connect to it again by themselves.
    #[arg(long)]
    hand_over: bool,
    /// Take disks away that are in use: whoever uses them gets errors, and what was not written yet is lost
    #[arg(long, conflicts_with = "hand_over")]
    force: bool,
    /// The control socket of the service
    #[arg(long, value_name = "SOCKET", default_value = DEFAULT_CONTROL, value_parser = super::control_socket)]
    control: PathBuf,
    /// The longest time to wait; 0 does not wait. The service itself gives up after 145 s at most; the stop goes on when
    /// this command has given up
    #[arg(long, value_name = "SECONDS", default_value_t = 150)]
    timeout: u64,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let client = Client::new(&args.control);
    let disks = disks(&client);
    // What only root sees, and not a service in its sandbox.
    let keep = match args.force || args.hand_over {
        true => Vec::new(),
        false => used(&disks).map(|(volume, ..)| volume).collect(),
    };
    let wanted = Stop { hand_over: args.hand_over, force: args.force, keep };
    client.stop(&wanted).map_err(Failure::failed)?;
    if args.timeout == 0 {
        return Ok(());
    }
    client.wait_gone(Duration::from_secs(args.timeout)).map_err(Failure::failed)?;
    if !args.hand_over {
        tell_kept(&disks)?;
    }
    Ok(())
}

/// Volumes and devices of the disks that the service has.
fn disks(client: &Client) -> Vec<(String, PathBuf)> {
    let exports = client.status().map(|status| status.exports).unwrap_or_default();
    let disk = |export| match export {
        ExportStatus::Ublk(ublk) => Some((ublk.volume, ublk.device)),
        ExportStatus::VhostUser(_) => None,
    };
    exports.into_iter().filter_map(disk).collect()
}

/// Those of the disks that somebody uses, and who.
fn used(disks: &[(String, PathBuf)]) -> impl Iterator<Item = (String, PathBuf, String)> {
    let devices: Vec<PathBuf> = disks.iter().map(|(_, device)| device.clone()).collect();
    let users = orphans::users_of(&devices).into_iter();
    let used = disks.iter().cloned().zip(users).filter(|(_, users)| !users.is_empty());
    used.map(|((volume, device), users)| (volume, device, users.join(", ")))
}

/// Names the disks that the service has left because somebody uses them.
fn tell_kept(disks: &[(String, PathBuf)]) -> Result<(), Failure> {
    if disks.is_empty() {
        return Ok(());
    }
    let left = orphans::devices().unwrap_or_default();
    let waits = |device: &PathBuf| {
        let state = left.iter().find(|left| left.device == *device).map(|left| left.state);
        // Its service may not be quite gone yet, or the next one be there already.
        state.is_some_and(|state| !matches!(state, DeviceState::Stale | DeviceState::Gone))
    };
    let kept: Vec<_> = disks.iter().filter(|(_, device)| waits(device)).cloned().collect();
    for (volume, device, users) in used(&kept) {
        output::print(&format!(
            "volume {volume}: {} stays, since it is {users}; it waits for the next `ringblk serve` (or `ringblk remove \
             {volume}` when it is not used any more)\n",
            device.display()
        ))?;
    }
    Ok(())
}
