//! What a user may say about an NBD volume.

#![forbid(unsafe_code)]

use super::uri::Uri;
use super::{Error, NbdStore, Target};
use crate::engine::driver::{AnyStore, Driver, Need, Open, Opened, Opens, Summary};
use crate::engine::error::OpenError;
use crate::engine::identity::Identity;
use crate::engine::settings::yes;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

/// `driver = "nbd"`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NbdConfig {
    /// `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`, with TLS `nbds` or `nbds+unix`.
    pub uri: String,
    /// Certificates of the authorities that may vouch for the server; `None`: the system's.
    pub tls_ca: Option<PathBuf>,
    /// Our certificate, and those of the authorities between it and what the server trusts.
    pub tls_cert: Option<PathBuf>,
    /// The key of our certificate.
    pub tls_key: Option<PathBuf>,
    /// What the server's certificate is for; `None`: the URI's host, or localhost with a Unix socket.
    pub tls_hostname: Option<String>,
    /// The server's certificate counts.
    #[serde(default = "yes")]
    pub tls_verify: bool,
    /// Connections to open, 1 to [`NbdConfig::MAX_CONNECTIONS`]; `None`: 4 where the server allows more than one.
    pub connections: Option<u16>,
    /// Seconds that a server may be silent that has requests, before the connection is given up; 0: for ever.
    #[serde(default = "NbdConfig::default_timeout")]
    pub timeout: u64,
    /// Seconds to go on trying to reach a lost server before requests fail; 0: fail at once.
    #[serde(default)]
    pub reconnect: u64,
    /// Refuse writes.
    #[serde(default)]
    pub read_only: bool,
}

impl NbdConfig {
    /// The most connections to one export.
    pub const MAX_CONNECTIONS: u16 = 16;
    /// The longest reconnect time in seconds: one day.
    pub const MAX_RECONNECT: u64 = 24 * 60 * 60;
    /// Longer than a healthy server takes for anything, its flushes included, in seconds.
    pub const DEFAULT_TIMEOUT: u64 = 60;
    /// The longest time-out in seconds: one day.
    pub const MAX_TIMEOUT: u64 = 24 * 60 * 60;

    fn default_timeout() -> u64 {
        NbdConfig::DEFAULT_TIMEOUT
    }
}

impl Driver for NbdConfig {
    const NAME: &'static str = "nbd";
    const TARGET: &'static str = "uri";
    const HELP: &'static str = "
  nbd:URI      nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH (the
               URI alone will do)
               connections=1..16, read-only=on|off
               with TLS: nbds:// or nbds+unix://, and tls-ca=FILE (else the system's
               authorities), tls-cert=FILE and tls-key=FILE, tls-hostname=NAME,
               tls-verify=on|off
               reconnect=SECONDS  how long requests wait for a lost server (0)
               timeout=SECONDS    how long it may be silent that has some (60; 0:
                                  for ever), until the connection counts as lost
";
    type Store = NbdStore;

    fn target(&self) -> String {
        self.uri.clone()
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        check(self)
    }

    /// Reads the files that TLS takes.
    fn examine(&self) -> Result<(), String> {
        Target::of(self).map(drop).map_err(|error| format!("{}: {error}", self.uri.escape_debug()))
    }

    fn summary(&self) -> Summary<'_> {
        Summary {
            base: None,
            block_size: None,
            read_only: self.read_only,
            reconnects: self.reconnect > 0,
            needs: Some(Need::Server(&self.uri)),
        }
    }

    fn details(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(connections) = self.connections {
            write!(f, ", connections {connections}")?;
        }
        if self.reconnect > 0 {
            write!(f, ", reconnect {} s", self.reconnect)?;
        }
        if !self.tls_verify {
            f.write_str(", tls-verify off")?;
        }
        match self.timeout {
            0 => f.write_str(", no time-out"),
            seconds => write!(f, ", time-out {seconds} s"),
        }
    }

    fn opener(&self, name: &str, _: Option<Open>) -> Result<Open, OpenError> {
        Ok(Box::new(NbdOpener { name: name.to_owned(), config: self.clone(), target: OnceLock::new() }))
    }
}

/// Opens an export.
struct NbdOpener {
    name: String,
    config: NbdConfig,
    /// Once all has been read that it takes.
    target: OnceLock<Target>,
}

impl NbdOpener {
    fn target(&self) -> Result<&Target, Error> {
        if let Some(target) = self.target.get() {
            return Ok(target);
        }
        let target = Target::of(&self.config)?;
        Ok(self.target.get_or_init(|| target))
    }
}

impl Opens for NbdOpener {
    fn open(&self, limit: Duration) -> Result<Opened, OpenError> {
        let NbdOpener { name, config, .. } = self;
        let opened = self.target().and_then(|target| NbdStore::open_at(config, target, limit));
        let (volume, geometry) = opened.map_err(|source| OpenError::Nbd {
            name: name.clone(),
            uri: config.uri.clone(),
            source,
        })?;
        let identity = Identity::of_uri(NbdConfig::NAME, &config.uri);
        Ok(Opened { geometry, identity, tail: volume.tail(), store: AnyStore::Nbd(volume) })
    }

    fn unread(&self) -> Vec<&Path> {
        if self.target.get().is_some() {
            return Vec::new();
        }
        let files = [&self.config.tls_ca, &self.config.tls_cert, &self.config.tls_key];
        files.into_iter().flatten().map(PathBuf::as_path).collect()
    }
}

fn check(nbd: &NbdConfig) -> Result<(), (&'static str, String)> {
    let refuse = |reason: String| ("uri", format!("\"{}\": {reason}", nbd.uri));
    let uri = Uri::parse(&nbd.uri).map_err(refuse)?;
    let given = [
        ("tls-ca", nbd.tls_ca.is_some()),
        ("tls-cert", nbd.tls_cert.is_some()),
        ("tls-key", nbd.tls_key.is_some()),
        ("tls-hostname", nbd.tls_hostname.is_some()),
        ("tls-verify", !nbd.tls_verify),
    ];
    if let Some((key, _)) = given.iter().find(|(_, given)| *given && !uri.tls) {
        return Err((*key, "is for nbds:// and nbds+unix:// alone".into()));
    }
    match (&nbd.tls_cert, &nbd.tls_key) {
        (Some(_), None) => return Err(("tls-cert", "needs tls-key".into())),
        (None, Some(_)) => return Err(("tls-key", "needs tls-cert".into())),
        _ => {}
    }
    if nbd.tls_ca.is_some() && !nbd.tls_verify {
        return Err(("tls-ca", "means nothing with tls-verify=off".into()));
    }
    if let Some(connections) = nbd.connections
        && !(1..=NbdConfig::MAX_CONNECTIONS).contains(&connections)
    {
        let most = NbdConfig::MAX_CONNECTIONS;
        return Err(("connections", format!("must be from 1 to {most}, not {connections}")));
    }
    if nbd.timeout > NbdConfig::MAX_TIMEOUT {
        let most = NbdConfig::MAX_TIMEOUT;
        return Err(("timeout", format!("must be at most {most} seconds, not {}", nbd.timeout)));
    }
    if nbd.reconnect > NbdConfig::MAX_RECONNECT {
        let most = NbdConfig::MAX_RECONNECT;
        return Err(("reconnect", format!("must be at most {most} seconds, not {}", nbd.reconnect)));
    }
    Ok(())
}
