//! `ringblk serve`.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use super::{Failure, output};
use crate::engine::config::VolumeConfig;
use crate::service;
use crate::service::config::SandboxMode;
use crate::service::config::{Config, ConfigError, DEFAULT_CONTROL, Loader};
use crate::service::preflight;

/// What every driver takes, and the exports; what each driver has of its own comes before it.
const HELP: &str = "\
  Each also takes on-error=report|retry|stop and, with retry, retry-for=SECONDS:
  what becomes of a request that the store fails. It is reported to the client,
  or tried again for a time, or waits for `ringblk resume NAME`.
  And required=yes|no: whether the service does not begin, or begins without it
  and tries again, when the volume cannot be opened. By default it waits for a
  server that cannot be reached, if it is to (reconnect=, on-error=) or if there
  are other volumes to be served; and serves these without an image that looks
  like another format.
  And physical-block=512..65536: shown in place of the store's; equal to the
  logical block, no preferred sizes are shown (some guests misread them).
  And limits of operations and bytes in a second, as QEMU has them: iops-total=N,
  iops-read, iops-write, bps-total=SIZE, bps-read, bps-write; of each a burst,
  iops-total-max=N for iops-total-max-length=SECONDS; iops-size=SIZE, above which
  a request counts as several; group=NAME, the same set for all that name it.
  `ringblk limit NAME` changes them while the volume is served.

Options of --ublk:
  queues=N, depth=N, zero-copy=auto|on|off, id=N, max-io=SIZE, workers=N
  recovery=reissue|queue|fail-io|off
  What becomes of the disk when the service dies or is handed over. It stays, and
  the same configuration finds it again; meanwhile all requests wait (reissue),
  only new ones do (queue), or they fail (fail-io, Linux 6.13). Or it goes (off).

Options of --vhost-user:
  queues=N, queue-size=N, mode=0600, owner=USER[:GROUP], read-only=on|off,
  serial=TEXT, workers=N

Each export shares the service's workers, or has workers=N of its own, which
serve no other export: what its store or its guest holds up, others do not notice.

Sizes take K, M, G, T, P and E (binary). A comma inside a value is written \",,\".

Examples:
  ringblk serve --volume root=file:/srv/root.img,format=raw --ublk root
  ringblk serve --volume root=file:/srv/root.img,format=raw,direct=on \\
      --ublk root,queues=2 --vhost-user root=/run/ringblk/root.sock,mode=0660
  ringblk serve --config /etc/ringblk.toml --check

SIGTERM, Ctrl-C or `ringblk stop` end the service cleanly; a second signal gives
up waiting for requests in flight.";

/// The drivers in their own words, then [`HELP`].
fn help() -> String {
    let drivers: Vec<_> = VolumeConfig::helps().iter().map(|help| help.trim_matches('\n')).collect();
    format!("Drivers (NAME=DRIVER:TARGET):\n{}\n{HELP}", drivers.join("\n"))
}

/// Serve volumes as ublk disks and on vhost-user sockets, in the foreground.
#[derive(Debug, clap::Args)]
#[command(after_help = help())]
pub(super) struct Args {
    /// Read volumes and exports from a TOML file; flags add to it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Add a volume
    #[arg(long = "volume", value_name = "NAME=DRIVER:TARGET[,key=value...]")]
    volumes: Vec<String>,
    /// Show a volume as a disk, /dev/ringblk/VOLUME
    #[arg(long, value_name = "VOLUME[,key=value...]")]
    ublk: Vec<String>,
    /// Show a volume to a virtual machine on a Unix socket
    #[arg(long, value_name = "VOLUME=SOCKET[,key=value...]")]
    vhost_user: Vec<String>,
    /// Threads that do the work of the exports without workers of their own [default: as many as CPUs, at most the
    /// queues]
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
    #[arg(long, value_name = "MICROSECONDS", help = format!(
        "How long a worker may look for more requests of a guest before it sleeps, 0 for not at all [default: {}]",
        Config::DEFAULT_POLL_US
    ))]
    poll_us: Option<u32>,
    #[arg(long, value_name = "SECONDS", help = format!(
        "Log requests that take longer, 0 for none [default: {}]",
        Config::DEFAULT_SLOW_AFTER
    ))]
    slow_after: Option<u64>,
    #[arg(long, value_name = "SOCKET", help = format!(
        "Where `ringblk list` and `ringblk stop` find the service [default: {DEFAULT_CONTROL}]"
    ))]
    control: Option<PathBuf>,
    /// Where anybody who can connect may read /metrics, and / in a browser shows a status page; nothing can be changed
    /// there [default: nowhere but /metrics on the control socket]
    #[arg(long, value_name = "ADDRESS:PORT|SOCKET[,key=value...]")]
    metrics: Option<String>,
    /// Whether the service gives up the rights that it does not need once it runs; log: system calls that would be
    /// refused are only logged by the kernel [default: on]
    #[arg(long, value_name = "on|off|log")]
    sandbox: Option<SandboxMode>,
    /// A directory in which images and sockets may be that are added while the service runs (`ringblk volume add`, `ringblk
    /// export add`): the sandbox leaves it open
    #[arg(long = "allow-path", value_name = "DIRECTORY")]
    allow_paths: Vec<PathBuf>,
    /// Disks may be added while the service runs (`ringblk export add --ublk`): the sandbox leaves what they take
    #[arg(long)]
    allow_ublk: bool,
    /// Check the configuration, print what would be served, and look whether images, directories, users and addresses are
    /// there; create nothing
    #[arg(long)]
    check: bool,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let config = load(args).map_err(Failure::usage)?;
    if args.check {
        output::print(&config.to_string())?;
        preflight::warnings(&config).iter().for_each(|warning| log::warn!("{warning}"));
        let problems = preflight::problems(&config);
        return if problems.is_empty() {
            Ok(())
        } else {
            Err(Failure::failed(problems.join("\nringblk: error: ")))
        };
    }
    service::run(config).map_err(Failure::failed)
}

fn load(args: &Args) -> Result<Config, ConfigError> {
    let mut loader = Loader::new();
    if let Some(path) = &args.config {
        loader.add_file(path)?;
    }
    for text in &args.volumes {
        loader.add_volume_flag(text)?;
    }
    for text in &args.ublk {
        loader.add_ublk_flag(text)?;
    }
    for text in &args.vhost_user {
        loader.add_vhost_user_flag(text)?;
    }
    if let Some(poll_us) = args.poll_us {
        loader.set_poll_us(poll_us);
    }
    if let Some(seconds) = args.slow_after {
        loader.set_slow_after(seconds);
    }
    if let Some(workers) = args.workers {
        loader.set_workers(workers);
    }
    if let Some(mode) = args.sandbox {
        loader.set_sandbox(mode);
    }
    args.allow_paths.iter().for_each(|path| loader.add_allowed_path(path.clone()));
    if args.allow_ublk {
        loader.allow_ublk();
    }
    if let Some(path) = &args.control {
        loader.set_control(path.clone());
    }
    if let Some(text) = &args.metrics {
        loader.set_metrics_flag(text)?;
    }
    loader.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::parsed;

    fn args(line: &str) -> Args {
        parsed(line).unwrap()
    }

    #[test]
    fn flags_reach_the_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("r.toml");
        std::fs::write(&file, "workers = 1\n[volume.b]\ndriver = \"null\"\nsize = \"1G\"\n").unwrap();
        let line = format!(
            "serve --config {} --volume a=null:1G --ublk a --ublk b --vhost-user a=/run/a.sock --workers 3 --slow-after 7 --control /c",
            file.display()
        );
        let config = load(&args(&line)).unwrap();
        assert_eq!((config.workers, config.slow_after), (Some(3), 7));
        assert_eq!(config.control, std::path::Path::new("/c"));
        assert_eq!(config.volumes.len(), 2);
        assert_eq!((config.ublk.len(), config.vhost_user.len()), (2, 1));
    }

    #[test]
    fn a_bad_configuration_is_bad_usage() {
        for line in [
            "serve",
            "serve --check",
            "serve --volume a",
            "serve --ublk a",
            "serve --volume a=null:1G --vhost-user a",
            "serve --config /no/such/file",
            "serve --volume a=null:1G --ublk a --workers 0",
        ] {
            let failure = run(&args(line)).unwrap_err();
            assert_eq!(failure.status, 2, "{line}: {failure}");
        }
    }

    #[test]
    fn a_check_of_a_good_one_succeeds() {
        let dir = tempfile::tempdir().unwrap();
        let good = format!("serve --volume a=null:1G --ublk a --check --control {}/c", dir.path().display());
        run(&args(&good)).unwrap();
    }

    #[test]
    fn a_check_fails_where_something_is_missing() {
        let line = "serve --volume a=file:/no/such/image --vhost-user a=/no/such/a.sock --check --control /no/such/c";
        let failure = run(&args(line)).unwrap_err();
        let text = failure.to_string();
        assert_eq!((failure.status, text.matches("/no/such").count()), (1, 3), "{text}");
    }
}
