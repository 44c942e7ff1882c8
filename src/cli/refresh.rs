//! `ringblk refresh`.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use super::{Failure, resize};
use crate::service::client::Client;
use crate::service::config::DEFAULT_CONTROL;

/// Have a volume take the size that its file or block device has now.
///
/// For a store that was resized by other means, such as lvextend or truncate, while it is served.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  lvextend -L +10G vg/root && ringblk refresh root")]
pub(super) struct Args {
    /// The volume
    #[arg(value_name = "NAME")]
    volume: String,
    /// Also when the store has become smaller: what lay beyond its end is lost already
    #[arg(long)]
    force: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The control socket of the service
    #[arg(long, value_name = "SOCKET", default_value = DEFAULT_CONTROL, value_parser = super::control_socket)]
    control: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let client = Client::new(&args.control);
    let resized = client.refresh(&args.volume, args.force).map_err(Failure::failed)?;
    resize::print(&resized, args.json)
}
