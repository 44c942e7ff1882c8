//! `ringblk limit`.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use super::{Failure, output};
use crate::block::Size;
use crate::engine::limits::LimitsChange;
use crate::service::client::Client;
use crate::service::config::DEFAULT_CONTROL;
use crate::service::status::LimitsStatus;
use clap::{Arg, ArgMatches, Command, value_parser};

/// Show or change the limits of a volume while it is served.
///
/// What is not named stays; 0 takes a limit off, with its burst. Without any it shows what there is. The volumes of a group share
/// one set: changed for one, it is changed for all. A restart brings back what the configuration says.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringblk limit vm1
  ringblk limit vm1 --iops-total 2000 --iops-total-max 8000 --iops-total-max-length 30
  ringblk limit vm1 --iops-total 0 --bps-write 100M")]
pub(super) struct Args {
    /// The volume
    #[arg(value_name = "NAME")]
    volume: String,
    #[command(flatten)]
    limits: Numbers,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The control socket of the service
    #[arg(long, value_name = "SOCKET", default_value = DEFAULT_CONTROL, value_parser = super::control_socket)]
    control: PathBuf,
}

/// A flag for each number, by its name in the configuration.
#[derive(Debug, Default)]
struct Numbers(LimitsChange);

/// What a number is, for the help text.
fn help(key: &str) -> String {
    if key == "iops-size" {
        return "A larger request counts as several operations; 0: as one".into();
    }
    let what = if key.starts_with("iops") { "Operations" } else { "Bytes" };
    let of = if key.contains("-read") {
        "read"
    } else if key.contains("-write") {
        "written"
    } else {
        "in all"
    };
    match key {
        key if key.ends_with("-length") => "How long such a burst may last".into(),
        key if key.ends_with("-max") => format!("{what} {of} in a second of a burst"),
        _ => format!("{what} {of} in a second; 0: no limit"),
    }
}

impl clap::Args for Numbers {
    fn augment_args(command: Command) -> Command {
        command.args(LimitsChange::NUMBERS.iter().map(|key| {
            let arg = Arg::new(*key).long(*key).help(help(key)).help_heading("Limits");
            match (LimitsChange::is_bytes(key), key.ends_with("-length")) {
                (true, _) => arg.value_name("SIZE").value_parser(value_parser!(Size)),
                (false, true) => arg.value_name("SECONDS").value_parser(value_parser!(u64)),
                (false, false) => arg.value_name("N").value_parser(value_parser!(u64)),
            }
        }))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Numbers::augment_args(command)
    }
}

impl clap::FromArgMatches for Numbers {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Numbers, clap::Error> {
        let mut numbers = Numbers::default();
        numbers.update_from_arg_matches(matches)?;
        Ok(numbers)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        for key in LimitsChange::NUMBERS {
            let value = match LimitsChange::is_bytes(key) {
                true => matches.get_one::<Size>(key).map(|size| size.bytes()),
                false => matches.get_one::<u64>(key).copied(),
            };
            if let Some(value) = value {
                self.0.set(key, value);
            }
        }
        Ok(())
    }
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let client = Client::new(&args.control);
    let Numbers(change) = &args.limits;
    let limited = match change.is_empty() {
        true => client.limits(&args.volume),
        false => client.limit(&args.volume, change),
    };
    let limited = limited.map_err(Failure::failed)?;
    if args.json { output::print_json(&limited) } else { output::print(&render(&limited)) }
}

fn render(limited: &LimitsStatus) -> String {
    let LimitsStatus { volume, limits, group, throttled_ms } = limited;
    let of = group.as_ref().map_or(String::new(), |group| format!(" (with group {group})"));
    let mut text = match limits.is_empty() {
        true => format!("{volume}{of}: no limits\n"),
        false => format!("{volume}{of}:\n"),
    };
    // In the order of the configuration.
    for key in LimitsChange::NUMBERS {
        match limits.get(*key) {
            Some(value) if LimitsChange::is_bytes(key) => text += &format!("  {key} {}\n", Size(*value)),
            Some(value) => text += &format!("  {key} {value}\n"),
            None => {}
        }
    }
    if *throttled_ms > 0 {
        text += &format!("  throttled for {:.1} s so far\n", *throttled_ms as f64 / 1000.0);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::parsed;

    fn numbers(line: &str) -> Result<Vec<(&'static str, u64)>, String> {
        let args: Args = parsed(line).map_err(|error| error.to_string())?;
        Ok(args.limits.0.numbers().collect())
    }

    #[test]
    fn each_number_has_a_flag() {
        for key in LimitsChange::NUMBERS {
            assert_eq!(numbers(&format!("limit a --{key} 7")).unwrap(), [(*key, 7)]);
            assert!(numbers(&format!("limit a --{key} lots")).is_err());
        }
        let both = numbers("limit a --bps-read 1M --iops-total 0").unwrap();
        assert_eq!(both, [("iops-total", 0), ("bps-read", 1 << 20)]);
        assert_eq!(numbers("limit a").unwrap(), []);
        assert!(numbers("limit a --group g").is_err());
    }

    #[test]
    fn what_there_is_is_told() {
        let limits = [("bps-write".to_owned(), 1 << 20), ("iops-total".to_owned(), 5)].into();
        let limited =
            LimitsStatus { volume: "vm1".into(), limits, group: Some("g".into()), throttled_ms: 1250 };
        let expected = "vm1 (with group g):\n  iops-total 5\n  bps-write 1M\n  throttled for 1.2 s so far\n";
        assert_eq!(render(&limited), expected);
        let none = LimitsStatus { volume: "vm1".into(), limits: [].into(), group: None, throttled_ms: 0 };
        assert_eq!(render(&none), "vm1: no limits\n");
    }
}
