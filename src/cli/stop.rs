//! `ringblk stop`.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Duration;

use super::Failure;
use crate::service::client::Client;
use crate::service::config::DEFAULT_CONTROL;

/// Stop a running service cleanly, and wait until it is gone.
///
/// The service accepts nothing new, finishes what it has, flushes, and removes the disks and sockets it made.
/// With --hand-over the disks stay.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example, a new version of ringblk under disks that are in use:
  ringblk stop --hand-over && ringblk serve --config /etc/ringblk.toml")]
pub(super) struct Args {
    /// Leave the disks of this host where they are: they keep their names, and requests to them wait for the next
    /// `ringblk serve` with the same volumes. Virtual machines connect to it again by themselves.
    #[arg(long)]
    hand_over: bool,
    /// The control socket of the service
    #[arg(long, value_name = "SOCKET", default_value = DEFAULT_CONTROL, value_parser = super::control_socket)]
    control: PathBuf,
    /// The longest time to wait; 0 does not wait
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let client = Client::new(&args.control);
    client.stop(args.hand_over).map_err(Failure::failed)?;
    if args.timeout == 0 {
        return Ok(());
    }
    client.wait_gone(Duration::from_secs(args.timeout)).map_err(Failure::failed)
}
