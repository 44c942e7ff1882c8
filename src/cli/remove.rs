//! `ringblk remove`.

#![forbid(unsafe_code)]

use super::Failure;
use super::output;
use crate::block::Causes;
use crate::service::orphans::{self, RemoveTarget};

/// Remove disks whose service is dead.
///
/// The ublk disk of a service that died waits for the service to come back. This gives it up: what waits for the disk
/// fails, and it is gone. A disk that is served or in use is left alone; stop its service instead, or unmount it.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringblk remove root
  ringblk remove /dev/ublkb0
  ringblk remove --all-dead")]
pub(super) struct Args {
    /// Names of volumes, or paths of their disks
    #[arg(value_name = "NAME|DEVICE", required_unless_present = "all_dead")]
    disks: Vec<String>,
    #[arg(long, hide = true, value_name = "SOCKET")]
    control: Option<String>,
    /// Every disk of ringblk's that nobody serves
    #[arg(long, conflicts_with = "disks")]
    all_dead: bool,
    /// Also a disk that is in use (mounted, swapped to, part of another device, open): whoever uses it gets errors, and
    /// what was not written yet is lost
    #[arg(long)]
    force: bool,
}

impl Args {
    fn which(&self) -> Vec<RemoveTarget> {
        if self.all_dead {
            return vec![RemoveTarget::AllDead];
        }
        let which = |disk: &String| match disk.contains('/') {
            true => RemoveTarget::Device(disk.into()),
            false => RemoveTarget::Volume(disk.clone()),
        };
        self.disks.iter().map(which).collect()
    }
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    if args.control.is_some() {
        return Err(Failure::usage(
            "remove asks no service, and takes no --control: it gives up disks of this host whose service is dead. \
             `ringblk stop --control` ends one that runs, with its disks",
        ));
    }
    let mut refused = Vec::new();
    for which in args.which() {
        match orphans::remove(&which, args.force) {
            Ok(removal) => {
                for gone in removal.gone {
                    output::print(&format!("removed {}\n", gone.display()))?;
                }
                refused.extend(removal.refused);
            }
            Err(error) => refused.push(error),
        }
    }
    match refused.len() {
        0 => Ok(()),
        1 => Err(Failure::failed(refused.remove(0))),
        _ => {
            let all: Vec<_> = refused.iter().map(|error| Causes(error).to_string()).collect();
            Err(Failure::failed(all.join("\n")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn names_and_paths_are_told_apart() {
        let which = |words: &[&str]| {
            Line::try_parse_from([&["remove"], words].concat()).map(|line| line.args.which()).ok()
        };
        let both = vec![RemoveTarget::Volume("root".into()), RemoveTarget::Device("/dev/ublkb0".into())];
        assert_eq!(which(&["root", "/dev/ublkb0"]), Some(both));
        assert_eq!(which(&["--all-dead"]), Some(vec![RemoveTarget::AllDead]));
        assert_eq!(which(&["--all-dead", "root"]), None);
        assert_eq!(which(&[]), None);
    }

    #[test]
    fn there_is_no_service_to_be_asked() {
        let line = Line::try_parse_from(["remove", "root", "--control", "/run/x"]).unwrap();
        let failure = run(&line.args).unwrap_err();
        assert!(failure.status == 2 && failure.to_string().contains("takes no --control"), "{failure}");
    }
}
