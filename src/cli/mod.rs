//! The command line: words to calls of the service, results to text. No decisions are made here.

#![forbid(unsafe_code)]

mod export;
mod fault;
mod features;
mod image;
mod limit;
mod list;
mod output;
mod refresh;
mod remove;
mod resize;
mod resume;
mod serve;
mod stats;
mod stop;
mod top;
mod volume;

use crate::service::config::DEFAULT_CONTROL;
use crate::service::status::Changed;
use std::error::Error;
use std::fmt;
use std::path::PathBuf;
use std::process::ExitCode;

use crate::block::{Errno, limit_behind};
use crate::frontend::vhost_user::config::VhostUserConfig;
use clap::{ArgAction, Parser, Subcommand};

/// A block device service: one storage engine behind ublk disks and vhost-user-blk sockets.
#[derive(Debug, Parser)]
#[command(
    name = "ringblk",
    version,
    after_help = "Exit status: 0 done, 1 failed, 2 bad usage or bad configuration."
)]
pub struct Cli {
    /// Say more; twice for even more. RUST_LOG overrides this.
    #[arg(short, long, action = ArgAction::Count, global = true)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::Args),
    Features(features::Args),
    List(list::Args),
    Stats(stats::Args),
    Top(top::Args),
    #[command(subcommand)]
    Volume(volume::Command),
    #[command(subcommand)]
    Export(export::Command),
    Resize(resize::Args),
    Refresh(refresh::Args),
    Resume(resume::Args),
    Limit(Box<limit::Args>),
    Fault(fault::Args),
    Remove(remove::Args),
    Stop(stop::Args),
    #[command(subcommand)]
    Image(image::Command),
}

impl Cli {
    /// Does what was asked.
    ///
    /// # Errors
    /// What to tell the user, and the exit status to end with.
    pub fn run(self) -> Result<(), Failure> {
        match self.command {
            Command::Serve(args) => serve::run(&args),
            Command::Features(args) => features::run(&args),
            Command::List(args) => list::run(&args),
            Command::Stats(args) => stats::run(&args),
            Command::Top(args) => top::run(&args),
            Command::Volume(command) => volume::run(&command),
            Command::Export(command) => export::run(&command),
            Command::Resize(args) => resize::run(&args),
            Command::Refresh(args) => refresh::run(&args),
            Command::Resume(args) => resume::run(&args),
            Command::Limit(args) => limit::run(&args),
            Command::Fault(args) => fault::run(&args),
            Command::Remove(args) => remove::run(&args),
            Command::Stop(args) => stop::run(&args),
            Command::Image(command) => image::run(&command),
        }
    }

    /// What to log where RUST_LOG says nothing: a service tells of its doings, a tool only of trouble.
    pub fn log_filter(&self) -> &'static str {
        let base = matches!(self.command, Command::Serve(_));
        match u8::from(base).saturating_add(self.verbose) {
            0 => "warn",
            1 => "warn,ringblk=info",
            2 => "warn,ringblk=debug",
            _ => "info,ringblk=trace",
        }
    }
}

/// Which service is asked, and how its answer is told.
#[derive(Debug, clap::Args)]
struct Service {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The control socket of the service
    #[arg(long, value_name = "SOCKET", default_value = DEFAULT_CONTROL, value_parser = control_socket)]
    control: PathBuf,
}

/// Tells what became of something that was to be added or removed.
fn tell_change(change: &Changed, json: bool, done: &str, already: &str) -> Result<(), Failure> {
    let became = if change.changed { done } else { already };
    match json {
        true => output::print_json(change),
        false => output::print(&format!("{}: {became}\n", change.name)),
    }
}

/// Where a service is asked: the path of a socket.
fn control_socket(text: &str) -> Result<PathBuf, String> {
    // The rules of a vhost-user socket's path are those of any socket's.
    VhostUserConfig::new("", text).check().map_err(|(_, reason)| reason)?;
    Ok(text.into())
}

/// Why a command did not succeed.
#[derive(Debug)]
pub struct Failure {
    status: u8,
    cause: Box<dyn Error + Send + Sync>,
}

impl Failure {
    /// What was asked for did not work.
    fn failed(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Failure {
        Failure { status: 1, cause: cause.into() }
    }

    /// What was asked for makes no sense.
    fn usage(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Failure {
        Failure { status: 2, cause: cause.into() }
    }

    /// It worked, and what was found has a status of its own.
    fn of(status: u8, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Failure {
        Failure { status, cause: cause.into() }
    }

    /// The status to end the process with.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.status)
    }
}

/// The number of the first error of the system among an error and its causes.
fn number(error: &(dyn Error + 'static)) -> Option<Errno> {
    let errors = std::iter::successors(Some(error), |error| (*error).source());
    errors.filter_map(|error| error.downcast_ref::<std::io::Error>()?.raw_os_error()).map(Errno::new).next()
}

/// A command's own arguments, for its tests: the command's name first.
#[cfg(test)]
fn parsed<A: clap::Args>(line: &str) -> Result<A, clap::Error> {
    let command = A::augment_args(clap::Command::new("ringblk"));
    A::from_arg_matches(&command.try_get_matches_from(line.split(' '))?)
}

/// The error and its causes, in one line, each said once, with the limit that is behind them.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        crate::block::Causes(&*self.cause).fmt(f)?;
        match number(&*self.cause).and_then(limit_behind) {
            Some(limit) => write!(f, ": {limit}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn verbosity() {
        let filter = |line: &str| Cli::try_parse_from(line.split(' ')).unwrap().log_filter();
        assert_eq!(filter("ringblk list"), "warn");
        assert_eq!(filter("ringblk serve"), "warn,ringblk=info");
        assert_eq!(filter("ringblk list -v"), "warn,ringblk=info");
        assert_eq!(filter("ringblk serve -vv"), "info,ringblk=trace");
    }

    #[test]
    fn causes_are_told_in_one_line() {
        let cause = crate::image::ImageError::System {
            action: "open",
            path: "/a".into(),
            source: std::io::Error::from_raw_os_error(2),
        };
        let failure = Failure::failed(cause);
        assert_eq!(failure.to_string(), "cannot open /a: No such file or directory (os error 2)");
        assert_eq!(failure.exit_code(), ExitCode::from(1));
        assert_eq!(Failure::usage("x").exit_code(), ExitCode::from(2));
    }
}
