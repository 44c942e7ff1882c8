//! What a user may say about a file volume.

#![forbid(unsafe_code)]

use super::{Error, FileStore, examine};
use crate::block::Causes;
use crate::engine::driver::{AnyStore, Driver, Need, Open, Opened, Summary};
use crate::engine::error::OpenError;
use crate::engine::nbd::uri::is_uri;
use crate::engine::settings::{check_block_size, yes};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// `driver = "file"`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct FileConfig {
    /// The image or device; a relative path starts at the service's working directory.
    pub path: PathBuf,
    /// O_DIRECT: go past the host's page cache.
    #[serde(default)]
    pub direct: bool,
    /// Refuse writes.
    #[serde(default)]
    pub read_only: bool,
    /// Refuse an image that somebody else has open for writing, and keep others from it: see `lock` in `engine/file`.
    #[serde(default = "yes")]
    pub lock: bool,
    /// What it is said to be. `None`: raw, unless it looks like something else, which is refused.
    pub format: Option<ImageFormat>,
    /// Logical block in bytes, 512 or 4096; `None`: what the backing store needs.
    pub block_size: Option<u32>,
}

/// `format`: what the bytes of an image are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageFormat {
    /// Those of the disk, whatever they look like: a guest may write there what looks like another format.
    Raw,
}

impl Driver for FileConfig {
    const NAME: &'static str = "file";
    const TARGET: &'static str = "path";
    const HELP: &'static str = "
  file:PATH    an image or a block device
               format=raw, direct=on|off, read-only=on|off, lock=on|off,
               block-size=512|4096
  An image that looks like another format (qcow2, vmdk, ...) is refused without
  format=raw. Say it always: a guest can make its disk look so.
";
    type Store = FileStore;

    fn target(&self) -> String {
        self.path.display().to_string()
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        check_path(&self.path).map_err(|reason| ("path", reason))?;
        check_block_size(self.block_size)
    }

    fn examine(&self) -> Result<(), String> {
        examine(self).map_err(|error| format!("{}: {}", self.path.display(), Causes(&error)))
    }

    fn summary(&self) -> Summary<'_> {
        Summary {
            base: None,
            block_size: self.block_size,
            read_only: self.read_only,
            reconnects: false,
            needs: Some(Need::File { path: &self.path, write: !self.read_only }),
        }
    }

    fn details(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.format == Some(ImageFormat::Raw) {
            f.write_str(", format raw")?;
        }
        if self.direct {
            f.write_str(", direct")?;
        }
        Ok(())
    }

    fn opener(&self, name: &str, _: Option<Open>) -> Result<Open, OpenError> {
        let (name, config) = (name.to_owned(), self.clone());
        Ok(Box::new(move || open(&config).map_err(|source| config.failed(&name, source))))
    }
}

impl FileConfig {
    fn failed(&self, name: &str, source: Error) -> OpenError {
        OpenError::File { name: name.into(), path: self.target(), source }
    }
}

fn open(config: &FileConfig) -> Result<Opened, Error> {
    let (volume, geometry) = FileStore::open(config)?;
    let identity = volume.identity(FileConfig::NAME)?;
    Ok(Opened { geometry, identity, tail: volume.tail(), store: AnyStore::File(volume) })
}

pub(in crate::engine) fn check_path(path: &Path) -> Result<(), String> {
    if path.as_os_str().is_empty() {
        return Err("must not be empty".into());
    }
    if path.as_os_str().as_bytes().contains(&0) {
        return Err("must not contain a NUL byte".into());
    }
    if is_uri(&path.to_string_lossy()) {
        let text = path.display();
        return Err(format!("{text} is an NBD server's: it takes the driver nbd (./{text} is a file)"));
    }
    Ok(())
}
