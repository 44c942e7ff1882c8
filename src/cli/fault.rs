//! `ringblk fault`.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use super::{Failure, output};
use crate::service::client::Client;
use crate::service::config::DEFAULT_CONTROL;
use crate::service::status::Faulted;
use clap::ValueEnum;

/// Switch the faults of a volume on or off while it is served.
///
/// A volume of the driver fault stands on another and makes errors, delays, torn and lost writes on demand, for testing what
/// uses it: `--volume bad=fault:good,errors=1%,operations=read+write --vhost-user bad=/run/bad.sock`.
#[derive(Debug, clap::Args)]
#[command(after_help = "`ringblk serve --help` lists the faults there are.")]
pub(super) struct Args {
    /// The volume
    #[arg(value_name = "NAME")]
    volume: String,
    /// Whether it makes faults from now on
    #[arg(value_enum)]
    faults: Switch,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The control socket of the service
    #[arg(long, value_name = "SOCKET", default_value = DEFAULT_CONTROL, value_parser = super::control_socket)]
    control: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let client = Client::new(&args.control);
    let faulted = client.fault(&args.volume, args.faults == Switch::On).map_err(Failure::failed)?;
    if args.json { output::print_json(&faulted) } else { output::print(&render(&faulted)) }
}

fn render(faulted: &Faulted) -> String {
    let Faulted { volume, enabled } = faulted;
    format!("{volume}: {}\n", if *enabled { "makes faults" } else { "makes no faults" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_does_from_now_on_is_told() {
        let told = |enabled| render(&Faulted { volume: "bad".into(), enabled });
        assert_eq!(
            (told(true).as_str(), told(false).as_str()),
            ("bad: makes faults\n", "bad: makes no faults\n")
        );
    }
}
