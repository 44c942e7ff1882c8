//! `ringblk stats`.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use super::Failure;
use super::output::{self, table};
use crate::block::Size;
use crate::service::client::Client;
use crate::service::config::DEFAULT_CONTROL;
use crate::service::stats::{ExportStats, Stats};

/// Show what the exports of a running service did since it began, and how long it took.
///
/// Times go from when a worker takes a request to when it is complete: waits for a limit come before. They are at most a
/// quarter too long.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringblk stats vm1
  ringblk stats --json | jq '.exports[] | {name, p99: .operations.read.p99_ns}'

The same for Prometheus: curl --unix-socket /run/ringblk/control.sock http://localhost/metrics")]
pub(super) struct Args {
    /// The volume; without one, every export
    #[arg(value_name = "NAME")]
    volume: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The control socket of the service
    #[arg(long, value_name = "SOCKET", default_value = DEFAULT_CONTROL, value_parser = super::control_socket)]
    control: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let stats = Client::new(&args.control).stats().map_err(Failure::failed)?;
    let Stats { uptime_ns, mut exports, mut volumes, workers } = stats;
    if let Some(volume) = &args.volume {
        exports.retain(|export| export.volume == *volume);
        volumes.retain(|each| each.name == *volume);
        if exports.is_empty() {
            return Err(Failure::failed(format!("volume {volume:?} has no export that is served")));
        }
    }
    match args.json {
        true => output::print_json(&Stats { uptime_ns, exports, volumes, workers }),
        false => output::print(&render(&exports)),
    }
}

fn render(exports: &[ExportStats]) -> String {
    let head = ["EXPORT", "OPERATION", "REQUESTS", "BYTES", "ERRORS", "P50", "P99", "P99.9"];
    let mut rows = vec![head.map(String::from)];
    let mut errors = String::new();
    for export in exports {
        for (op, stats) in export.operations.iter().filter(|(_, stats)| stats.requests > 0) {
            let took = |time| duration(time, stats.requests);
            rows.push([
                export.name.clone(),
                op.clone(),
                stats.requests.to_string(),
                if stats.bytes == 0 { "-".into() } else { Size(stats.bytes).to_string() },
                stats.errors.to_string(),
                took(stats.p50_ns),
                took(stats.p99_ns),
                took(stats.p999_ns),
            ]);
        }
        for (errno, count) in &export.errors {
            errors += &format!("{}: {count} failed with {errno}\n", export.name);
        }
    }
    match rows.len() {
        1 => "no export has had a request yet\n".into(),
        _ => table(&rows) + &errors,
    }
}

/// A time for people, in three digits: `-` of no requests, and what is too long to be told apart.
pub(super) fn duration(nanoseconds: Option<u64>, requests: u64) -> String {
    let Some(nanoseconds) = nanoseconds else {
        return if requests == 0 { "-".into() } else { "> 1 min".into() };
    };
    let (value, unit) = match nanoseconds as f64 {
        time if time < 1e6 => (time / 1e3, "us"),
        time if time < 1e9 => (time / 1e6, "ms"),
        time => (time / 1e9, "s"),
    };
    match value {
        ..9.995 => format!("{value:.2} {unit}"),
        ..99.95 => format!("{value:.1} {unit}"),
        _ => format!("{value:.0} {unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{Errno, Op};
    use crate::cli::parsed;
    use crate::service::status::sample;
    use crate::stats;

    #[test]
    fn what_was_done_is_told() {
        let counted = stats::ExportStats::new(1);
        let status = &sample().exports[0];
        assert_eq!(render(&[ExportStats::new(status, counted.read())]), "no export has had a request yet\n");
        for result in [Ok(()), Err(Errno::EIO)] {
            counted.queue(0).begin();
            counted.queue(0).end(Op::Read, 8192, 100_000, result);
        }
        let text = render(&[ExportStats::new(status, counted.read())]);
        let expected = "\
EXPORT     OPERATION  REQUESTS  BYTES  ERRORS  P50     P99     P99.9
ublk:root  read       2         8K     1       115 us  115 us  115 us
ublk:root: 1 failed with EIO
";
        assert_eq!(text, expected);
    }

    #[test]
    fn times_have_three_digits() {
        for (time, text) in [
            (1024, "1.02 us"),
            (9_999, "10.0 us"),
            (99_960, "100 us"),
            (1_500_000, "1.50 ms"),
            (60_000_000_000, "60.0 s"),
        ] {
            assert_eq!(duration(Some(time), 1), text);
        }
        assert_eq!((&*duration(None, 0), &*duration(None, 1)), ("-", "> 1 min"));
    }

    #[test]
    fn a_volume_may_be_named() {
        let args: Args = parsed("stats vm1 --json").unwrap();
        assert!(args.json && args.volume.as_deref() == Some("vm1"));
        assert!(parsed::<Args>("stats a b").is_err());
    }
}
