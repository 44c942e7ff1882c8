//! The configuration of a service: what a file and the flags say, merged and checked before anything is created.
//!
//! [`Loader`] collects and [`Loader::finish`] is the only way to a loaded [`Config`], so a `Config` that came from a
//! user has passed every check of [`check`]. Every error says where the offending text stands: a file and its line,
//! or the flag.

#![forbid(unsafe_code)]

mod check;
mod file;
mod flag;
mod grow;
mod metrics;
mod origin;
mod sandbox_mode;
mod words;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use crate::engine::config::{LimitsConfig, Need, PolicyConfig, TopologyConfig, VolumeConfig};
use crate::engine::graph;
use crate::frontend::ublk::config::UblkConfig;
use crate::frontend::vhost_user::config::VhostUserConfig;

pub use metrics::{MetricsAddress, MetricsSocket};
use origin::{Item, Origin, printable};
pub use sandbox_mode::SandboxMode;
use words::plain;

/// Where the control socket is when nobody says otherwise.
pub const DEFAULT_CONTROL: &str = "/run/ringblk/control.sock";

/// Everything a service is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Worker threads that the exports without their own share, 1 to [`Config::MAX_WORKERS`]; `None`: as many as CPUs, at
    /// most the queues.
    pub workers: Option<usize>,
    /// Microseconds that a worker may look for requests before it sleeps, 0 to [`Config::MAX_POLL_US`].
    pub poll_us: u32,
    /// The control socket.
    pub control: PathBuf,
    /// Where the service's numbers can be read, and nothing can be changed.
    pub metrics: Option<MetricsAddress>,
    /// Seconds after which a request in flight is reported, up to [`Config::MAX_SLOW_AFTER`]; 0: never.
    pub slow_after: u64,
    /// What the service gives up once it runs.
    pub sandbox: SandboxMode,
    /// Directories in which volumes and sockets may be that are added while the service runs.
    pub allow_paths: Vec<PathBuf>,
    /// ublk disks may be added while the service runs.
    pub allow_ublk: bool,
    /// Volumes by name.
    pub volumes: BTreeMap<String, VolumeConfig>,
    /// What becomes of the requests that each volume's store fails.
    pub policies: BTreeMap<String, PolicyConfig>,
    /// What is told of each volume's blocks.
    pub topologies: BTreeMap<String, TopologyConfig>,
    /// How many operations and bytes each volume takes in a second.
    pub limits: BTreeMap<String, LimitsConfig>,
    /// Volumes shown as ublk disks, at most one a volume.
    pub ublk: Vec<UblkConfig>,
    /// Volumes shown on vhost-user sockets.
    pub vhost_user: Vec<VhostUserConfig>,
}

impl Config {
    /// Whether volumes and exports may be added while the service runs.
    pub fn may_grow(&self) -> bool {
        !self.allow_paths.is_empty() || self.allow_ublk
    }

    /// Looking longer than this would only burn the CPU.
    pub const MAX_POLL_US: u32 = 10_000;
    /// A cross-CPU wake-up and its answer, with room: what looking is there to save.
    pub const DEFAULT_POLL_US: u32 = 50;
    /// Longer than a disk takes for anything but trouble, and well below the guests' own limits (30 s and more).
    pub const DEFAULT_SLOW_AFTER: u64 = 10;
    /// The longest time after which a request is reported, in seconds: one day.
    pub const MAX_SLOW_AFTER: u64 = 24 * 60 * 60;
    /// More workers than this is a slip of the finger.
    pub const MAX_WORKERS: usize = 1024;
    /// The longest name of a volume.
    pub const MAX_NAME: usize = 32;

    /// Volumes that are more than what others stand on: these are opened, and the others with them.
    pub fn roots(&self) -> impl Iterator<Item = (&String, &VolumeConfig)> {
        let bases: BTreeSet<&str> =
            self.volumes.values().filter_map(|volume| volume.summary().base).collect();
        // What may be exported later is opened then.
        let idle = self.may_grow();
        self.volumes
            .iter()
            .filter(move |(name, _)| self.is_exported(name) || !idle && !bases.contains(name.as_str()))
    }

    fn is_exported(&self, name: &str) -> bool {
        self.ublk.iter().any(|export| export.volume == name)
            || self.vhost_user.iter().any(|export| export.volume == name)
    }

    /// Volumes that are nothing but what others stand on, each with a root that does. One may come several times.
    pub fn bases(&self) -> impl Iterator<Item = (&str, &str)> {
        let roots: BTreeSet<&str> = self.roots().map(|(name, _)| name.as_str()).collect();
        let others = |root| self.tree(root).map(move |base| (base, root));
        let all: Vec<_> = roots.iter().flat_map(|root| others(*root)).collect();
        all.into_iter().filter(move |(base, _)| !roots.contains(base))
    }

    /// The volume of this name and those that it stands on.
    pub fn tree(&self, name: &str) -> impl Iterator<Item = &str> {
        // Which stands on which was checked.
        graph::tree(&self.volumes, name).unwrap_or_default().into_iter().map(|(name, _)| name)
    }

    /// Where the bytes of a volume are, as the user wrote it: what it is pointed at, or the volume that it stands on.
    pub fn store_of(&self, name: &str) -> String {
        let leaf = self.tree(name).last().unwrap_or(name);
        self.volumes.get(leaf).map(VolumeConfig::target).unwrap_or_default()
    }

    /// What a volume and those that it stands on have to reach outside the process.
    pub fn needs(&self, name: &str) -> impl Iterator<Item = Need<'_>> {
        self.tree(name).filter_map(|name| self.volumes[name].summary().needs)
    }
}

/// Why a configuration is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {reason}")]
pub struct ConfigError {
    /// `FILE:LINE`, `FILE`, or the flag as it was given.
    pub place: String,
    /// What is wrong.
    pub reason: String,
}

impl ConfigError {
    fn new(place: impl Into<String>, reason: impl Into<String>) -> ConfigError {
        ConfigError { place: place.into(), reason: printable(&plain(&reason.into())) }
    }
}

/// Collects one configuration from a file and from flags.
#[derive(Debug, Default)]
pub struct Loader {
    workers: Option<Item<usize>>,
    poll_us: Option<Item<u32>>,
    slow_after: Option<Item<u64>>,
    control: Option<Item<PathBuf>>,
    metrics: Option<Item<MetricsAddress>>,
    sandbox: Option<Item<SandboxMode>>,
    allow_paths: Vec<Item<PathBuf>>,
    allow_ublk: Option<Item<bool>>,
    volumes: BTreeMap<String, Item<VolumeConfig>>,
    policies: BTreeMap<String, PolicyConfig>,
    topologies: BTreeMap<String, TopologyConfig>,
    limits: BTreeMap<String, LimitsConfig>,
    ublk: Vec<Item<UblkConfig>>,
    vhost_user: Vec<Item<VhostUserConfig>>,
}

impl Loader {
    /// Nothing said yet.
    pub fn new() -> Loader {
        Loader::default()
    }

    /// Adds a TOML file.
    ///
    /// # Errors
    /// A file that cannot be read, is not TOML, or holds unknown keys, values of a wrong type, or a volume that is
    /// already there.
    pub fn add_file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let text = file::read(path)?;
        self.add_text(path, &text)
    }

    /// Adds what [`Loader::add_file`] would find in `path`.
    pub(crate) fn add_text(&mut self, path: &Path, text: &str) -> Result<(), ConfigError> {
        let found = file::parse(path, text)?;
        // What was said before stays: flags win, whichever comes first.
        self.workers = self.workers.take().or(found.workers);
        self.poll_us = self.poll_us.take().or(found.poll_us);
        self.slow_after = self.slow_after.take().or(found.slow_after);
        self.control = self.control.take().or(found.control);
        if let (None, Some(Item { value, origin })) = (&self.metrics, found.metrics) {
            let value = flag::metrics(&value).map_err(|reason| origin.key_error("metrics", reason))?;
            self.metrics = Some(Item::new(value, origin));
        }
        self.sandbox = self.sandbox.take().or(found.sandbox);
        if let Some(Item { value, origin }) = found.allow_paths {
            self.allow_paths.extend(value.into_iter().map(|path| Item::new(path, origin.clone())));
        }
        self.allow_ublk = self.allow_ublk.take().or(found.allow_ublk);
        for (name, volume) in found.volumes {
            self.add_volume(name, volume)?;
        }
        self.ublk.extend(found.ublk);
        self.vhost_user.extend(found.vhost_user);
        Ok(())
    }

    /// Adds a volume: `NAME=DRIVER:TARGET[,key=value...]`.
    ///
    /// # Errors
    /// Text of another form, an unknown driver or key, a bad value, a name that is already there.
    pub fn add_volume_flag(&mut self, text: &str) -> Result<(), ConfigError> {
        let origin = Origin::flag("--volume", text);
        let (name, volume) = flag::volume(text).map_err(|reason| origin.error(reason))?;
        self.add_volume(name, Item::new(volume, origin))
    }

    /// Adds a ublk export: `VOLUME[,key=value...]`.
    ///
    /// # Errors
    /// Text of another form, an unknown key, a bad value.
    pub fn add_ublk_flag(&mut self, text: &str) -> Result<(), ConfigError> {
        let origin = Origin::flag("--ublk", text);
        let export = flag::ublk(text).map_err(|reason| origin.error(reason))?;
        self.ublk.push(Item::new(export, origin));
        Ok(())
    }

    /// Adds a vhost-user export: `VOLUME=SOCKET[,key=value...]`.
    ///
    /// # Errors
    /// Text of another form, an unknown key, a bad value.
    pub fn add_vhost_user_flag(&mut self, text: &str) -> Result<(), ConfigError> {
        let origin = Origin::flag("--vhost-user", text);
        let export = flag::vhost_user(text).map_err(|reason| origin.error(reason))?;
        self.vhost_user.push(Item::new(export, origin));
        Ok(())
    }

    /// Sets where the numbers can be read, over what a file said: `ADDRESS:PORT` or `PATH[,mode=OCTAL][,owner=USER:GROUP]`.
    ///
    /// # Errors
    /// Text of another form.
    pub fn set_metrics_flag(&mut self, text: &str) -> Result<(), ConfigError> {
        let origin = Origin::flag("--metrics", text);
        let address = flag::metrics(text).map_err(|reason| origin.error(reason))?;
        self.metrics = Some(Item::new(address, origin));
        Ok(())
    }

    /// Sets how long a worker looks for requests, over what a file said.
    pub fn set_poll_us(&mut self, poll_us: u32) {
        let origin = Origin::flag("--poll-us", &poll_us.to_string());
        self.poll_us = Some(Item::new(poll_us, origin));
    }

    /// Sets after how many seconds a request is reported, over what a file said.
    pub fn set_slow_after(&mut self, seconds: u64) {
        let origin = Origin::flag("--slow-after", &seconds.to_string());
        self.slow_after = Some(Item::new(seconds, origin));
    }

    /// Sets the number of workers, over what a file said.
    pub fn set_workers(&mut self, workers: usize) {
        let origin = Origin::flag("--workers", &workers.to_string());
        self.workers = Some(Item::new(workers, origin));
    }

    /// Sets what the service gives up, over what a file said.
    pub fn set_sandbox(&mut self, mode: SandboxMode) {
        let origin = Origin::flag("--sandbox", &mode.to_string());
        self.sandbox = Some(Item::new(mode, origin));
    }

    /// Adds a directory in which volumes and sockets may be that are added later.
    pub fn add_allowed_path(&mut self, path: PathBuf) {
        let origin = Origin::flag("--allow-path", &path.display().to_string());
        self.allow_paths.push(Item::new(path, origin));
    }

    /// Has ublk disks be added later.
    pub fn allow_ublk(&mut self) {
        self.allow_ublk = Some(Item::new(true, Origin::flag("--allow-ublk", "")));
    }

    /// What a running service has, for something to be added to it.
    pub fn of(config: &Config) -> Loader {
        fn item<T>(value: T) -> Item<T> {
            Item::new(value, Origin::Flag("the running service".into()))
        }
        let volumes = config.volumes.iter();
        Loader {
            workers: config.workers.map(item),
            poll_us: Some(item(config.poll_us)),
            slow_after: Some(item(config.slow_after)),
            control: Some(item(config.control.clone())),
            metrics: config.metrics.clone().map(item),
            sandbox: Some(item(config.sandbox)),
            allow_paths: config.allow_paths.iter().cloned().map(item).collect(),
            allow_ublk: Some(item(config.allow_ublk)),
            volumes: volumes.map(|(name, volume)| (name.clone(), item(volume.clone()))).collect(),
            policies: config.policies.clone(),
            topologies: config.topologies.clone(),
            limits: config.limits.clone(),
            ublk: config.ublk.iter().cloned().map(item).collect(),
            vhost_user: config.vhost_user.iter().cloned().map(item).collect(),
        }
    }

    /// Sets the control socket, over what a file said.
    pub fn set_control(&mut self, path: PathBuf) {
        let origin = Origin::flag("--control", &path.display().to_string());
        self.control = Some(Item::new(path, origin));
    }

    /// Checks the whole, and gives it out.
    ///
    /// # Errors
    /// The first thing that is wrong; see [`check`] for what is looked at.
    pub fn finish(self) -> Result<Config, ConfigError> {
        check::check(&self)?;
        Ok(Config {
            workers: self.workers.map(|item| item.value),
            poll_us: self.poll_us.map_or(Config::DEFAULT_POLL_US, |item| item.value),
            sandbox: self.sandbox.map_or_else(SandboxMode::default, |item| item.value),
            allow_paths: self.allow_paths.into_iter().map(|item| item.value).collect(),
            allow_ublk: self.allow_ublk.is_some_and(|item| item.value),
            control: self.control.map_or_else(|| DEFAULT_CONTROL.into(), |item| item.value),
            metrics: self.metrics.map(|item| item.value),
            slow_after: self.slow_after.map_or(Config::DEFAULT_SLOW_AFTER, |item| item.value),
            policies: self.policies,
            topologies: self.topologies,
            limits: self.limits,
            volumes: self.volumes.into_iter().map(|(name, item)| (name, item.value)).collect(),
            ublk: self.ublk.into_iter().map(|item| item.value).collect(),
            vhost_user: self.vhost_user.into_iter().map(|item| item.value).collect(),
        })
    }

    fn add_volume(&mut self, name: String, volume: file::Volume) -> Result<(), ConfigError> {
        let (store, policy, topology, limits) = volume.value;
        match self.volumes.entry(name) {
            Entry::Vacant(entry) => {
                self.policies.insert(entry.key().clone(), policy);
                self.topologies.insert(entry.key().clone(), topology);
                self.limits.insert(entry.key().clone(), limits);
                entry.insert(Item::new(store, volume.origin));
                Ok(())
            }
            Entry::Occupied(entry) => {
                let first = entry.get().origin.place("");
                let reason = format!("volume \"{}\" is already defined ({first})", entry.key());
                Err(volume.origin.error(reason))
            }
        }
    }
}

/// What would be served, one line a thing.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.workers {
            Some(workers) => writeln!(f, "workers: {workers}")?,
            None => writeln!(f, "workers: as many as CPUs, at most the queues")?,
        }
        writeln!(f, "control: {}", self.control.display())?;
        if let Some(metrics) = &self.metrics {
            writeln!(f, "metrics: {metrics}")?;
        }
        writeln!(f, "sandbox: {}", self.sandbox)?;
        for path in &self.allow_paths {
            writeln!(f, "allowed later: {}", path.display())?;
        }
        if self.allow_ublk {
            writeln!(f, "allowed later: ublk disks")?;
        }
        for (name, volume) in &self.volumes {
            let (topology, policy, limits) = (self.topologies[name], self.policies[name], &self.limits[name]);
            writeln!(f, "volume {name}: {volume}{topology}{policy}{limits}")?;
        }
        let own = |workers: Option<u16>| workers.map_or(String::new(), |count| format!(", workers {count}"));
        for export in &self.ublk {
            let queues = match export.queues {
                Some(count) => format!("queues {count}"),
                None => "a queue for every worker".to_owned(),
            };
            write!(f, "ublk {}: {queues}, depth {}", export.volume, export.depth)?;
            write!(f, ", zero copy {}{}", export.zero_copy, own(export.workers))?;
            match export.id {
                Some(id) => writeln!(f, ", /dev/ublkb{id}")?,
                None => writeln!(f)?,
            }
        }
        for export in &self.vhost_user {
            let (volume, socket) = (&export.volume, export.socket.display());
            let queues = export.most_queues();
            write!(f, "vhost-user {volume}: {socket}, up to {queues} queues of {}", export.queue_size)?;
            write!(f, ", serial {}{}, mode {:04o}", export.serial(), own(export.workers), export.mode)?;
            if let Some(owner) = &export.owner {
                write!(f, ", owner {owner}")?;
            }
            writeln!(f, "{}", if export.read_only { ", read-only" } else { "" })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::config::OnError;

    const FILE: &str = r#"
workers = 2
slow-after = 20
control = "/run/x/control.sock"
metrics = "/run/x/metrics.sock,mode=0660,owner=:0"

[volume.root]
driver = "file"
path = "/srv/a,b.img"
direct = true
block-size = 4096

[volume.scratch]
driver = "memory"
size = "1G"
physical-block = 4096
limits = { iops-read = 500, iops-size = "8K", group = "small" }

[volume.root.limits]
iops-total = 2000
iops-total-max = 8000
iops-total-max-length = 30
bps-write = "100M"

[volume.far]
on-error = "retry"
retry-for = 60
driver = "nbd"
uri = "nbd://server/disk"
connections = 2
reconnect = 30

[[ublk]]
volume = "root"
queues = 2
zero-copy = true
id = 7
max-io = "1M"
workers = 2

[[vhost-user]]
volume = "root"
socket = "/run/x/root.sock"
mode = "0660"
owner = "root:0"
read-only = true
queues = 4
queue-size = 512
serial = "disk-1"
workers = 1
"#;

    #[test]
    fn a_file_and_flags_say_the_same() {
        let mut file = Loader::new();
        file.add_text(Path::new("ringblk.toml"), FILE).unwrap();

        let mut flags = Loader::new();
        flags.set_workers(2);
        flags.set_slow_after(20);
        flags.set_control("/run/x/control.sock".into());
        flags.set_metrics_flag("/run/x/metrics.sock,mode=0660,owner=:0").unwrap();
        for text in [
            "root=file:/srv/a,,b.img,direct=on,block-size=4096,iops-total=2000,iops-total-max=8000,iops-total-max-length=30,bps-write=100M",
            "scratch=memory:1G,physical-block=4096,group=small,iops-read=500,iops-size=8192",
            "far=nbd:nbd://server/disk,connections=2,reconnect=30,on-error=retry,retry-for=60",
        ] {
            flags.add_volume_flag(text).unwrap();
        }
        flags.add_ublk_flag("root,queues=2,zero-copy=on,id=7,max-io=1M,workers=2").unwrap();
        flags
            .add_vhost_user_flag("root=/run/x/root.sock,mode=0660,owner=root:0,read-only=on,queues=4,queue-size=512,serial=disk-1,workers=1")
            .unwrap();

        let config = file.finish().unwrap();
        assert_eq!(config, flags.finish().unwrap());
        assert_eq!(config.workers, Some(2));
        assert_eq!(config.volumes["root"].target(), "/srv/a,b.img");
        let policy =
            |name: &str| (config.policies[name].on_error, config.policies[name].patience().as_secs());
        assert_eq!(policy("far"), (OnError::Retry, 60));
        assert_eq!(policy("root").0, OnError::Report);
        assert_eq!(config.limits["root"].numbers()["bps-write"], 100 << 20);
        assert!(config.to_string().contains(", iops-read=500, iops-size=8K, group=small\n"));
        assert_eq!(config.ublk[0].id, Some(7));
        assert_eq!(config.vhost_user[0].mode, 0o660);
    }

    #[test]
    fn flags_add_to_the_file_and_win_over_its_scalars() {
        let mut loader = Loader::new();
        loader.set_control("/run/flag.sock".into());
        loader.add_volume_flag("extra=null:1G").unwrap();
        loader.add_ublk_flag("extra").unwrap();
        loader.add_text(Path::new("r.toml"), FILE).unwrap();
        loader.set_workers(5);
        loader.set_poll_us(0);
        loader.set_slow_after(0);
        let config = loader.finish().unwrap();
        assert_eq!((config.workers, config.poll_us, config.slow_after), (Some(5), 0, 0));
        assert_eq!(config.control, Path::new("/run/flag.sock"));
        assert_eq!(config.volumes.len(), 4);
        assert_eq!(config.ublk.len(), 2);
    }

    #[test]
    fn a_second_definition_names_the_first() {
        let mut loader = Loader::new();
        loader.add_text(Path::new("r.toml"), FILE).unwrap();
        let error = loader.add_volume_flag("root=null:1G").unwrap_err();
        assert_eq!(error.to_string(), "--volume root=null:1G: volume \"root\" is already defined (r.toml:7)");
    }

    #[test]
    fn defaults_without_a_word() {
        let mut loader = Loader::new();
        loader.add_volume_flag("a=null:1G").unwrap();
        loader.add_ublk_flag("a").unwrap();
        let config = loader.finish().unwrap();
        assert_eq!((config.workers, config.poll_us), (None, Config::DEFAULT_POLL_US));
        assert_eq!(config.slow_after, Config::DEFAULT_SLOW_AFTER);
        assert_eq!(config.control, Path::new(DEFAULT_CONTROL));
    }

    #[test]
    fn shown_line_by_line() {
        let mut loader = Loader::new();
        loader.add_text(Path::new("r.toml"), FILE).unwrap();
        let text = loader.finish().unwrap().to_string();
        for line in [
            "workers: 2",
            "volume scratch: memory:1G, physical block 4096, iops-read=500, iops-size=8K, group=small",
            "volume far: nbd:nbd://server/disk, connections 2, reconnect 30 s, time-out 60 s, on error retry for 60 s",
            "ublk root: queues 2, depth 128, zero copy on, workers 2, /dev/ublkb7",
            "vhost-user root: /run/x/root.sock, up to 4 queues of 512, serial disk-1, workers 1, mode 0660, \
             owner root:0, read-only",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\nnot in\n{text}");
        }
    }
}
