//! The configuration's word on the sandbox.

#![forbid(unsafe_code)]

use serde::Deserialize;
use std::fmt;
use std::str::FromStr;

/// Whether there is a sandbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SandboxMode {
    /// What is not needed is refused, with `EPERM` or `EACCES`.
    #[default]
    On,
    /// System calls that would be refused are carried out, and the kernel logs them; the rest is as with `On`.
    Log,
    /// None.
    Off,
}

impl SandboxMode {
    const ALL: [(SandboxMode, &str); 3] =
        [(SandboxMode::On, "on"), (SandboxMode::Log, "log"), (SandboxMode::Off, "off")];
}

impl fmt::Display for SandboxMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(SandboxMode::ALL.iter().find(|(mode, _)| mode == self).map_or("", |(_, name)| name))
    }
}

impl FromStr for SandboxMode {
    type Err = String;

    fn from_str(text: &str) -> Result<SandboxMode, String> {
        let found = SandboxMode::ALL.iter().find(|(_, name)| *name == text);
        found.map(|(mode, _)| *mode).ok_or_else(|| "write on, off or log".into())
    }
}
