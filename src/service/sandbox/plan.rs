//! What a service needs once it runs: worked out from its configuration.

use crate::engine::config::Need;
use crate::engine::nbd;
use crate::service::config::{Config, MetricsAddress, SandboxMode};
use std::path::{Path, PathBuf};

/// What [`enter`](super::enter()) leaves.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Whether there is a sandbox at all.
    pub mode: SandboxMode,
    /// Files that may be opened to read.
    pub read: Vec<PathBuf>,
    /// Files that may be opened to read and write.
    pub write: Vec<PathBuf>,
    /// Directories that files may be removed from: ours are the sockets in them.
    pub remove_in: Vec<PathBuf>,
    /// Unix sockets that may have to be connected to again.
    pub connect_to: Vec<PathBuf>,
    /// TCP ports that may have to be connected to again.
    pub ports: Vec<u16>,
    /// Hosts may have to be looked up again.
    pub names: bool,
    /// There are files or devices whose particulars are read below /sys.
    pub files: bool,
    /// There are vhost-user exports.
    pub vhost_user: bool,
    /// There are, or will be, ublk devices.
    pub ublk: bool,
    /// Directories in which files are still to be opened that are not there now.
    pub expect_in: Vec<PathBuf>,
    /// Directories in which images may be opened and sockets made, later.
    pub grow_in: Vec<PathBuf>,
    /// Whose what is still to be opened will be is not known.
    pub foreign: bool,
}

/// Answers that are too long for a datagram come over TCP.
const DNS: u16 = 53;

impl Plan {
    /// What a service of `config` needs, after its volumes were opened and its sockets made.
    pub fn of(config: &Config) -> Plan {
        let mut plan = Plan {
            mode: config.sandbox,
            vhost_user: !config.vhost_user.is_empty() || !config.allow_paths.is_empty(),
            ublk: !config.ublk.is_empty() || config.allow_ublk,
            files: config.may_grow(),
            foreign: config.may_grow(),
            grow_in: config.allow_paths.clone(),
            ..Plan::default()
        };
        for need in config.volumes.values().filter_map(|volume| volume.summary().needs) {
            plan.files |= matches!(need, Need::File { .. });
            match need {
                Need::File { path, write: false } => plan.read.push(path.to_owned()),
                Need::File { path, write: true } => plan.write.push(path.to_owned()),
                Need::Server(uri) => plan.add_server(uri),
            }
        }
        let metrics = match &config.metrics {
            Some(MetricsAddress::Unix(socket)) => Some(&socket.path),
            _ => None,
        };
        let exports = config.vhost_user.iter().map(|export| &export.socket);
        let sockets = exports.chain([&config.control]).chain(metrics);
        for socket in sockets {
            // As the socket itself was made: the working directory may be another one by the time it is removed.
            let directory = std::path::absolute(socket).ok();
            plan.remove_in.extend(directory.as_deref().and_then(Path::parent).map(Path::to_owned));
        }
        plan.remove_in.sort();
        plan.remove_in.dedup();
        plan
    }

    /// The same with volumes that are still to be opened.
    pub fn waiting_for<'a>(mut self, config: &Config, names: impl Iterator<Item = &'a String>) -> Plan {
        for need in names.flat_map(|name| config.needs(name)) {
            self.foreign = true;
            if let Need::File { path, .. } = need {
                self.expect_in.extend(directory_there(path));
            }
        }
        self
    }

    /// The same with files that are still to be read, which may not be there now.
    pub fn reading<'a>(mut self, files: impl Iterator<Item = &'a Path>) -> Plan {
        self.read.extend(files.filter_map(directory_there));
        self
    }

    /// The URI was checked when the volume was opened.
    fn add_server(&mut self, uri: &str) {
        match nbd::server(uri) {
            Ok(nbd::Server::Unix(path)) => self.connect_to.push(path),
            Ok(nbd::Server::Tcp { host, port }) => {
                self.ports.push(port);
                if host.parse::<std::net::IpAddr>().is_err() {
                    self.names = true;
                    self.ports.push(DNS);
                }
            }
            Err(_) => {}
        }
    }

    /// There is a server to connect to again.
    pub(super) fn connects(&self) -> bool {
        !self.connect_to.is_empty() || !self.ports.is_empty()
    }

    /// Where the disks' names are.
    pub(super) fn links(&self) -> &'static str {
        crate::frontend::ublk::LINKS
    }
}

/// The directory that `path` will come to be in, or the nearest above that is there now.
fn directory_there(path: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    path.ancestors().skip(1).find(|directory| directory.is_dir()).map(Path::to_owned)
}
