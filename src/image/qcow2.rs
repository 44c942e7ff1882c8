//! `ringblk image create --format qcow2`, and `ringblk image check`.

#![forbid(unsafe_code)]

use super::create::create_with;
use super::store::{Reading, Store};
use super::{ImageError, is_path};
use crate::block::{Causes, Format, SECTOR, Size};
use crate::engine::file::format;
use crate::engine::qcow2::{self, Header, NewImage, Report};
use std::fs::File;
use std::path::{Path, PathBuf};

/// What a new image stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// As it is to stand in the image: a relative path starts at the image's directory.
    pub path: PathBuf,
    /// `None`: raw, if it does not look like anything else; qcow2, if it does and its name says so too.
    pub format: Option<BackingFormat>,
}

/// Formats of what an image may stand on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackingFormat {
    /// Its bytes are the disk's.
    Raw,
    /// Another such image.
    Qcow2,
}

/// Makes a qcow2 image, for its owner alone (mode 0600), of `size` bytes or of what it stands on. `new` says what it is to be
/// besides.
///
/// # Errors
/// What no image can be, a `path` that exists, a backing file that cannot be looked at or whose format is in doubt, the system's
/// refusal, a signal.
pub fn create_qcow2(
    path: &Path,
    size: Option<Size>,
    new: NewImage,
    backing: Option<&Backing>,
) -> Result<(), ImageError> {
    is_path(path)?;
    let below = backing.map(|backing| look_below(path, backing)).transpose()?;
    let size = match (size, &below) {
        (Some(size), _) => size.bytes(),
        (None, Some((_, _, size))) => *size,
        (None, None) => {
            return Err(ImageError::Setting("an image that stands on no other needs a size".into()));
        }
    };
    let backing = below.map(|(name, format, _)| (name, format));
    let bytes = NewImage { size, backing, ..new }.bytes();
    create_with(
        path,
        bytes.map_err(|error| ImageError::Setting(format!("{}: {}", path.display(), Causes(&error))))?,
    )
}

/// The name of what an image is to stand on, its format and its size.
fn look_below(image: &Path, backing: &Backing) -> Result<(String, String, u64), ImageError> {
    let name = backing.path.to_str().ok_or_else(|| {
        ImageError::unsuitable(&backing.path, "is no text, and the name of a backing file is to be one")
    })?;
    let there = match (backing.path.is_absolute(), image.parent()) {
        (false, Some(directory)) => directory.join(&backing.path),
        _ => backing.path.clone(),
    };
    let store = Store::open_to_look(&there, Reading { force_share: true, raw: true })?;
    let looks = format(&store.file);
    let named = there.extension().is_some_and(|extension| extension == "qcow2");
    let format = match (backing.format, looks) {
        (Some(format), _) => format,
        (None, None) => BackingFormat::Raw,
        (None, Some(Format::Qcow2)) if named => BackingFormat::Qcow2,
        (None, Some(looks)) => {
            let reason = format!(
                "looks like a {looks} image, and whoever writes to a raw disk can make it look so: say what it is with \
                 --backing-format"
            );
            return Err(ImageError::unsuitable(&there, reason));
        }
    };
    match format {
        BackingFormat::Raw => Ok((name.into(), "raw".into(), store.size / SECTOR * SECTOR)),
        BackingFormat::Qcow2 => {
            let header = header(&store.file, &there)?;
            Ok((name.into(), "qcow2".into(), header.size))
        }
    }
}

/// The header of the qcow2 image in `file`.
///
/// # Errors
/// What is no such image, or none that we know.
pub(super) fn header(file: &File, path: &Path) -> Result<Header, ImageError> {
    let header = Header::read(file).map_err(ImageError::system("read", path))?;
    header.map_err(|error| ImageError::unsuitable(path, error.to_string()))
}

/// Looks a qcow2 image through; with `repair`, what is counted and not used is free from then on.
///
/// # Errors
/// Another format, an image that somebody writes (or, to repair it, uses at all), or the system's refusal. What is merely wrong
/// with it is in the report.
pub fn check(path: &Path, repair: bool, force_share: bool) -> Result<Report, ImageError> {
    is_path(path)?;
    let file = match repair {
        false => Store::open_to_look(path, Reading { force_share, raw: true })?.file,
        true => Store::open_to_mend(path)?.file,
    };
    qcow2::check(&file, repair).map_err(|error| ImageError::unsuitable(path, Causes(&error).to_string()))
}
