//! `ringblk export`.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use super::{Failure, Service, tell_change};
use crate::service::client::Client;
use crate::service::status::{AddExport, RemoveExport};

/// Add and remove exports of a running service: disks of the host, and sockets for virtual machines.
///
/// It has to be one that was started for that: `serve --allow-path DIRECTORY`, and for disks `--allow-ublk`. Nobody else
/// notices. `ringblk list` lists all.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    Add(AddArgs),
    Remove(RemoveArgs),
}

/// Show a volume as a disk or to a virtual machine from now on.
///
/// The volume is opened if this is its first export. The same again is no error; another in its place is.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringblk export add --vhost-user vm1=/run/ringblk/vm1.sock
  ringblk export add --ublk vm1,queues=2

`ringblk serve --help` has the options.")]
pub(super) struct AddArgs {
    #[command(flatten)]
    export: NewExport,
    #[command(flatten)]
    service: Service,
}

/// One of these.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct NewExport {
    /// As `serve --ublk` takes it
    #[arg(long, value_name = "VOLUME[,key=value...]")]
    ublk: Option<String>,
    /// As `serve --vhost-user` takes it
    #[arg(long, value_name = "VOLUME=SOCKET[,key=value...]")]
    vhost_user: Option<String>,
}

/// Take a disk or a socket away.
///
/// One that somebody uses stays, with an error that says who, unless it is forced. With its last export a volume is flushed and
/// closed. One that is not there is no error.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringblk export remove --vhost-user /run/ringblk/vm1.sock
  ringblk export remove --ublk vm1 --force")]
pub(super) struct RemoveArgs {
    #[command(flatten)]
    export: OldExport,
    /// Also when it is mounted, or a virtual machine is connected
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    service: Service,
}

/// One of these.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct OldExport {
    /// The disk of this volume
    #[arg(long, value_name = "VOLUME")]
    ublk: Option<String>,
    /// This socket
    #[arg(long, value_name = "SOCKET")]
    vhost_user: Option<PathBuf>,
}

pub(super) fn run(command: &Command) -> Result<(), Failure> {
    match command {
        Command::Add(AddArgs { export: NewExport { ublk, vhost_user }, service }) => {
            let wanted = AddExport { vhost_user: vhost_user.clone(), ublk: ublk.clone() };
            let added = Client::new(&service.control).add_export(&wanted).map_err(Failure::failed)?;
            tell_change(&added, service.json, "added", "is there already")
        }
        Command::Remove(RemoveArgs { export: OldExport { ublk, vhost_user }, force, service }) => {
            let wanted = RemoveExport { vhost_user: vhost_user.clone(), ublk: ublk.clone(), force: *force };
            let removed = Client::new(&service.control).remove_export(&wanted).map_err(Failure::failed)?;
            tell_change(&removed, service.json, "removed", "is not there")
        }
    }
}
