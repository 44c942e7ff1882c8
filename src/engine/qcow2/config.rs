//! What a user may say about a qcow2 volume.

#![forbid(unsafe_code)]

use super::error::Error;
use super::image::Image;
use super::store::Qcow2Store;
use crate::block::{Causes, Geometry, Size};
use crate::engine::driver::{AnyStore, Driver, Need, Open, Opened, Opens, Summary};
use crate::engine::error::OpenError;
use crate::engine::file::{FileConfig, check_path};
use crate::engine::settings::yes;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// `driver = "qcow2"`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Qcow2Config {
    /// The image; a relative path starts at the service's working directory.
    pub path: PathBuf,
    /// The volume that it stands on, its backing file: by its name. It must be read-only.
    pub base: Option<String>,
    /// O_DIRECT: go past the host's page cache.
    #[serde(default)]
    pub direct: bool,
    /// Refuse writes.
    #[serde(default)]
    pub read_only: bool,
    /// Refuse an image that somebody else has open for writing, and keep others from it.
    #[serde(default = "yes")]
    pub lock: bool,
    /// Memory for the image's tables at most, [`Qcow2Config::MIN_CACHE`] to [`Qcow2Config::MAX_CACHE`]; `None`:
    /// [`Qcow2Config::DEFAULT_CACHE`].
    pub cache: Option<Size>,
}

impl Qcow2Config {
    /// The least memory for tables: 256 KiB.
    pub const MIN_CACHE: u64 = 256 << 10;
    /// The most: 1 GiB.
    pub const MAX_CACHE: u64 = 1 << 30;
    /// What covers 256 GiB of a disk with clusters of 64 KiB. Taken as it is used.
    pub const DEFAULT_CACHE: u64 = 32 << 20;

    fn file(&self) -> FileConfig {
        FileConfig {
            path: self.path.clone(),
            direct: self.direct,
            read_only: self.read_only,
            lock: self.lock,
            format: Some(crate::engine::file::ImageFormat::Raw),
            block_size: None,
        }
    }

    fn open_image(&self) -> Result<Image, Error> {
        let image = Image::open(&self.file(), self.cache.map_or(Self::DEFAULT_CACHE, Size::bytes))?;
        match (&image.header.backing, &self.base) {
            (Some(name), None) => Err(Error::Base(name.clone())),
            (None, Some(base)) => Err(Error::NoBase(base.clone())),
            _ => Ok(image),
        }
    }
}

impl Driver for Qcow2Config {
    const NAME: &'static str = "qcow2";
    const TARGET: &'static str = "path";
    const HELP: &'static str = "
  qcow2:PATH   a qcow2 image
               base=NAME, direct=on|off, read-only=on|off, lock=on|off,
               cache=SIZE
  One that stands on a backing file names the volume which that is, and which is
  read-only: what the image itself says of it is not followed.
";
    type Store = Qcow2Store;

    fn target(&self) -> String {
        self.path.display().to_string()
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        check_path(&self.path).map_err(|reason| ("path", reason))?;
        match self.cache.map(Size::bytes) {
            Some(bytes) if !(Self::MIN_CACHE..=Self::MAX_CACHE).contains(&bytes) => {
                Err(("cache", format!("must be from {} to {}", Size(Self::MIN_CACHE), Size(Self::MAX_CACHE))))
            }
            _ => Ok(()),
        }
    }

    fn examine(&self) -> Result<(), String> {
        // Read alone, and not locked: nobody notices. What a writer would mind is looked at all the same.
        let looked = Qcow2Config { read_only: true, lock: false, direct: false, ..self.clone() };
        let writable = |image: Image| if self.read_only { Ok(()) } else { image.is_writable() };
        let found = looked.open_image().and_then(writable);
        found.map_err(|error| format!("{}: {}", self.path.display(), Causes(&error)))
    }

    fn summary(&self) -> Summary<'_> {
        Summary {
            base: self.base.as_deref(),
            block_size: None,
            read_only: self.read_only,
            reconnects: false,
            needs: Some(Need::File { path: &self.path, write: !self.read_only }),
        }
    }

    fn details(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.direct { f.write_str(", direct") } else { Ok(()) }
    }

    fn opener(&self, name: &str, base: Option<Open>) -> Result<Open, OpenError> {
        Ok(Box::new(Qcow2Opener { name: name.to_owned(), config: self.clone(), base }))
    }
}

/// Opens the image, and what it stands on.
struct Qcow2Opener {
    name: String,
    config: Qcow2Config,
    base: Option<Open>,
}

impl Opens for Qcow2Opener {
    fn open(&self, limit: Duration) -> Result<Opened, OpenError> {
        let base = self.base.as_ref().map(|base| base.open(limit)).transpose()?;
        let failed =
            |source| OpenError::Qcow2 { name: self.name.clone(), path: self.config.target(), source };
        let image = self.config.open_image().map_err(failed)?;
        let own = image.geometry().map_err(failed)?;
        let geometry = match &base {
            None => own,
            Some(base) => over(&image, own, &base.geometry).map_err(failed)?,
        };
        let identity =
            image.file.identity(Qcow2Config::NAME).map_err(|source| failed(Error::File(source)))?;
        let tail = image.header.size - geometry.bytes();
        let store = AnyStore::Qcow2(Qcow2Store::new(image, geometry.clone(), base));
        Ok(Opened { geometry, identity, tail, store })
    }

    fn unread(&self) -> Vec<&Path> {
        self.base.as_ref().map(|base| base.unread()).unwrap_or_default()
    }
}

/// What an image shows that stands on another volume.
fn over(image: &Image, own: Geometry, base: &Geometry) -> Result<Geometry, Error> {
    if !base.read_only {
        return Err(Error::WritableBase);
    }
    let logical_block = own.logical_block.max(base.logical_block);
    if u64::from(logical_block) > image.layout.unit() {
        return Err(Error::CoarseBase { block: base.logical_block, unit: image.layout.unit() });
    }
    let shape = Geometry::new(image.header.size, logical_block).map_err(Error::Geometry)?;
    Ok(Geometry {
        capacity: shape.capacity,
        logical_block,
        physical_block: own.physical_block.max(logical_block),
        ..own
    })
}
