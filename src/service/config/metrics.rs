//! The configuration's word on who may look at the service's numbers without being able to do anything.

#![forbid(unsafe_code)]

use crate::frontend::vhost_user::config::{VhostUserConfig, octal_mode};
use crate::service::socket::Access;
use serde::Deserialize;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Where the read-only address is: `ADDRESS:PORT`, or the path of a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsAddress {
    /// Whoever reaches it may look. Port 0: any that is free.
    Tcp(SocketAddr),
    /// Whoever may connect to it.
    Unix(MetricsSocket),
}

/// A Unix socket and its access rights.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricsSocket {
    /// Where it is.
    pub path: PathBuf,
    /// Permission bits; written as an octal string.
    #[serde(default = "default_mode", deserialize_with = "octal_mode")]
    pub mode: u32,
    /// `USER[:GROUP]` or `:GROUP`, by name or number; `None`: whoever runs the service.
    pub owner: Option<String>,
}

fn default_mode() -> u32 {
    VhostUserConfig::DEFAULT_MODE
}

impl MetricsSocket {
    /// Checks its path and its rights, and that the owner exists.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), String> {
        self.rules().check().map_err(|(key, reason)| match key {
            "socket" => reason,
            key => format!("{key}: {reason}"),
        })
    }

    /// Who may connect. Of one that was [checked](Self::check).
    pub(in crate::service) fn access(&self) -> Access {
        let (user, group) = self.rules().owner_ids().unwrap_or((None, None));
        Access { mode: self.mode, user, group }
    }

    /// The rules of a vhost-user socket are those of any socket.
    fn rules(&self) -> VhostUserConfig {
        VhostUserConfig { mode: self.mode, owner: self.owner.clone(), ..VhostUserConfig::new("", &self.path) }
    }
}

impl fmt::Display for MetricsAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MetricsAddress::Tcp(address) => write!(f, "{address}"),
            MetricsAddress::Unix(MetricsSocket { path, mode, owner }) => {
                write!(f, "{}, mode {mode:04o}", path.display())?;
                owner.as_ref().map_or(Ok(()), |owner| write!(f, ", owner {owner}"))
            }
        }
    }
}
