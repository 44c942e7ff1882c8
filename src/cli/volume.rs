//! `ringblk volume`.

#![forbid(unsafe_code)]

use super::{Failure, Service, tell_change};
use crate::service::client::Client;

/// Add and remove volumes of a running service.
///
/// It has to be one that was started for that: `serve --allow-path DIRECTORY`. `ringblk list` lists all.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    Add(AddArgs),
    Remove(RemoveArgs),
}

/// Have a volume be known, for exports to come. It is opened with the first (`ringblk export add`).
///
/// The same again is no error; another of the same name is.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringblk volume add vm1=qcow2:/srv/vm1.qcow2,base=golden
  ringblk volume add scratch=memory:1G

`ringblk serve --help` has the drivers and their options.")]
pub(super) struct AddArgs {
    /// As `serve --volume` takes it
    #[arg(value_name = "NAME=DRIVER:TARGET[,key=value...]")]
    volume: String,
    #[command(flatten)]
    service: Service,
}

/// Forget a volume that has no exports, and that no other stands on. Its image stays.
///
/// One that is not known is no error.
#[derive(Debug, clap::Args)]
pub(super) struct RemoveArgs {
    /// The volume
    #[arg(value_name = "NAME")]
    volume: String,
    #[command(flatten)]
    service: Service,
}

pub(super) fn run(command: &Command) -> Result<(), Failure> {
    match command {
        Command::Add(AddArgs { volume, service }) => {
            let added = Client::new(&service.control).add_volume(volume).map_err(Failure::failed)?;
            tell_change(&added, service.json, "added", "is there already")
        }
        Command::Remove(RemoveArgs { volume, service }) => {
            let removed = Client::new(&service.control).remove_volume(volume).map_err(Failure::failed)?;
            tell_change(&removed, service.json, "removed", "is not there")
        }
    }
}
