//! `ringblk resume`.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use super::{Failure, output};
use crate::service::client::Client;
use crate::service::config::DEFAULT_CONTROL;
use crate::service::status::Resumed;

/// Let a volume go on that has stopped because its store failed.
///
/// Volumes with on-error=stop hold their requests back once their file, device or server fails, so that no client sees
/// an error. See to the store, then resume: the requests are tried again, and wait again if they still fail.
#[derive(Debug, clap::Args)]
#[command(after_help = "`ringblk list` shows the volumes that wait.")]
pub(super) struct Args {
    /// The volume
    #[arg(value_name = "NAME")]
    volume: String,
    /// Do not try the requests again: their clients are told of the errors
    #[arg(long)]
    give_up: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The control socket of the service
    #[arg(long, value_name = "SOCKET", default_value = DEFAULT_CONTROL, value_parser = super::control_socket)]
    control: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let client = Client::new(&args.control);
    let resumed = client.resume(&args.volume, args.give_up).map_err(Failure::failed)?;
    if args.json { output::print_json(&resumed) } else { output::print(&render(&resumed, args.give_up)) }
}

fn render(resumed: &Resumed, gave_up: bool) -> String {
    let fate = if gave_up { "fail" } else { "are tried again" };
    match resumed.requests {
        0 => format!("{}: no requests were waiting\n", resumed.volume),
        count => format!("{}: {count} requests {fate}\n", resumed.volume),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_becomes_of_the_requests_is_told() {
        let resumed = |requests| Resumed { volume: "root".into(), requests };
        assert_eq!(render(&resumed(0), true), "root: no requests were waiting\n");
        assert_eq!(render(&resumed(3), false), "root: 3 requests are tried again\n");
        assert_eq!(render(&resumed(3), true), "root: 3 requests fail\n");
    }
}
