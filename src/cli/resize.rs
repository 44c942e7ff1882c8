//! `ringblk resize`.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::str::FromStr;

use super::Failure;
use super::output;
use crate::block::{ParseSizeError, Size};
use crate::service::client::Client;
use crate::service::config::DEFAULT_CONTROL;
use crate::service::status::Resized;

/// Change the size of a volume while it is served.
///
/// A regular file is extended with a hole, or cut. Its disks and virtual machines see the new size at once; a file
/// system on the volume is not changed, so grow it afterwards, and shrink it before.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringblk resize root 40G
  ringblk resize root +10G && resize2fs /dev/ringblk/root
A block device is resized by its own tools, and then: ringblk refresh NAME")]
pub(super) struct Args {
    /// The volume
    #[arg(value_name = "NAME")]
    volume: String,
    /// The new size: bytes, or with K, M, G or T; with + in front, how much larger
    #[arg(value_name = "SIZE")]
    size: Wanted,
    /// Shrink it too; what lies beyond the new end is lost
    #[arg(long)]
    force: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The control socket of the service
    #[arg(long, value_name = "SOCKET", default_value = DEFAULT_CONTROL, value_parser = super::control_socket)]
    control: PathBuf,
}

/// `40G` or `+10G`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Size(Size),
    More(Size),
}

impl FromStr for Wanted {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Wanted, ParseSizeError> {
        match text.strip_prefix('+') {
            Some(more) => more.parse().map(Wanted::More),
            None => text.parse().map(Wanted::Size),
        }
    }
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let client = Client::new(&args.control);
    let bytes = match args.size {
        Wanted::Size(size) => size.bytes(),
        Wanted::More(more) => {
            let status = client.status().map_err(Failure::failed)?;
            let volume = status.volumes.iter().find(|volume| volume.name == args.volume);
            let volume =
                volume.ok_or_else(|| Failure::failed(format!("there is no volume {:?}", args.volume)))?;
            let sum = volume.size_bytes.checked_add(more.bytes());
            sum.ok_or_else(|| Failure::usage("the new size is more bytes than 64 bits can count"))?
        }
    };
    let resized = client.resize(&args.volume, bytes, args.force).map_err(Failure::failed)?;
    print(&resized, args.json)
}

/// What became of the volume, for a person or a script.
pub(super) fn print(resized: &Resized, json: bool) -> Result<(), Failure> {
    if json { output::print_json(resized) } else { output::print(&render(resized)) }
}

fn render(resized: &Resized) -> String {
    let (name, from, to) = (&resized.volume, Size(resized.from_bytes), Size(resized.size_bytes));
    if from == to { format!("{name}: {to}, as before\n") } else { format!("{name}: {from} -> {to}\n") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_absolute_or_more() {
        assert_eq!("40G".parse(), Ok(Wanted::Size(Size(40 << 30))));
        assert_eq!("+512".parse(), Ok(Wanted::More(Size(512))));
        for text in ["", "+", "-1G", "++1G", "+-1", "1.5G"] {
            assert!(text.parse::<Wanted>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_happened_is_told() {
        let resized = |from_bytes, size_bytes| Resized { volume: "root".into(), from_bytes, size_bytes };
        assert_eq!(render(&resized(1 << 30, 3 << 29)), "root: 1G -> 1536M\n");
        assert_eq!(render(&resized(512, 512)), "root: 512, as before\n");
    }
}
