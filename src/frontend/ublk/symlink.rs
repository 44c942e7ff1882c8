//! `/dev/ringblk/NAME`: a device's name that stays, kept by us as a link to wherever the kernel put it.

#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Component, Path, PathBuf};

/// Where the links are.
pub const DIRECTORY: &str = "/dev/ringblk";

/// What a link of ours points to, before its number.
const DEVICE: &str = "/dev/ublkb";

/// A name that is free for us, and the link once there is one. Dropping it removes the link.
#[derive(Debug)]
pub struct StableName {
    path: PathBuf,
    device: Option<PathBuf>,
}

/// Why a name cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NameError {
    /// Not a single file name.
    #[error("\"{0}\" cannot be a file name")]
    NotAName(String),
    /// Something that is not a link of ours.
    #[error("{} exists and is no link to a ublk device: move it away", .0.display())]
    Foreign(PathBuf),
    /// A link of ours, to a device that is there and not this volume's.
    #[error("{} points to {}, which is in use: is another ringblk serving this name?", .0.display(), .1.display())]
    Taken(PathBuf, PathBuf),
    /// The kernel says no.
    #[error("{}: cannot {what}", .path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// The link to the disk of a volume.
pub fn link(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

impl StableName {
    /// Checks that `/dev/ringblk/NAME` is free: not there, a link that a server left behind when it died, or one to
    /// `own`, the device that it is to lead to. Changes nothing.
    ///
    /// # Errors
    /// When it is anything else.
    pub fn check(name: &str, own: Option<&Path>) -> Result<StableName, NameError> {
        StableName::check_in(Path::new(DIRECTORY), name, own)
    }

    fn check_in(directory: &Path, name: &str, own: Option<&Path>) -> Result<StableName, NameError> {
        let mut parts = Path::new(name).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name) {
            return Err(NameError::NotAName(name.into()));
        }
        let path = directory.join(name);
        if own.is_none() || target_of(&path).ok().as_deref() != own {
            is_stale(&path)?;
        }
        Ok(StableName { path, device: None })
    }

    /// The link's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the link, or takes over the one that a dead server made for this very device.
    ///
    /// # Errors
    /// When the name was taken since it was checked, or `/dev` cannot be written to.
    pub fn point_to(&mut self, device: &Path) -> Result<(), NameError> {
        let failed = |what| {
            let path = self.path.clone();
            move |source| NameError::Io { what, path, source }
        };
        if let Some(directory) = self.path.parent() {
            match fs::create_dir(directory) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(failed("make its directory")(error));
                }
                _ => {}
            }
        }
        if target_of(&self.path).is_ok_and(|target| target == device) {
            self.device = Some(device.into());
            return Ok(());
        }
        if is_stale(&self.path)? {
            match fs::remove_file(&self.path) {
                // udev was quicker.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => removed.map_err(failed("remove the link of a device that is gone"))?,
            }
        }
        match symlink(device, &self.path) {
            // udev was quicker.
            Err(error)
                if error.kind() == io::ErrorKind::AlreadyExists
                    && target_of(&self.path).is_ok_and(|target| target == device) => {}
            made => made.map_err(failed("make the link"))?,
        }
        self.device = Some(device.into());
        Ok(())
    }

    /// Leaves the link to whoever serves the device next.
    pub fn leave(&mut self) {
        self.device = None;
    }

    /// Removes the link, if it is still the one we made. Doing it twice is no error.
    pub fn remove(&mut self) {
        let Some(device) = self.device.take() else { return };
        if target_of(&self.path).is_ok_and(|target| target == device)
            && let Err(error) = fs::remove_file(&self.path)
            // udev, which has made one too, was quicker.
            && error.kind() != io::ErrorKind::NotFound
        {
            log::warn!("{}: the link stays: {error}", self.path.display());
        }
    }
}

impl Drop for StableName {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Where a link leads. Ours are absolute, and udev's relative (see `systemd/60-ringblk.rules`).
///
/// # Errors
/// When it is no link.
pub fn target_of(path: &Path) -> io::Result<PathBuf> {
    let target = fs::read_link(path)?;
    Ok(target.strip_prefix("..").map(|device| Path::new("/dev").join(device)).unwrap_or(target))
}

/// Whether there is a link of ours whose device is gone; `false` when there is nothing at all.
fn is_stale(path: &Path) -> Result<bool, NameError> {
    let io = |source| NameError::Io { what: "look at it", path: path.into(), source };
    let kind = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(io(error)),
    };
    if !kind.is_symlink() {
        return Err(NameError::Foreign(path.into()));
    }
    let target = target_of(path).map_err(io)?;
    let number = target.to_str().and_then(|target| target.strip_prefix(DEVICE));
    if number.is_none_or(|number| number.parse::<u32>().is_err()) {
        return Err(NameError::Foreign(path.into()));
    }
    if target.symlink_metadata().is_ok() {
        return Err(NameError::Taken(path.into(), target));
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device that no machine has.
    const GONE: &str = "/dev/ublkb1048575";

    fn directory() -> (tempfile::TempDir, PathBuf) {
        let outer = tempfile::tempdir().unwrap();
        let inner = outer.path().join("ringblk");
        (outer, inner)
    }

    #[test]
    fn the_link_comes_and_goes_with_its_owner() {
        let (_keep, dir) = directory();
        let mut name = StableName::check_in(&dir, "root", None).unwrap();
        assert!(!dir.exists(), "a check changes nothing");
        name.point_to(Path::new(GONE)).unwrap();
        assert_eq!(fs::read_link(dir.join("root")).unwrap(), Path::new(GONE));
        name.remove();
        name.remove();
        assert!(dir.join("root").symlink_metadata().is_err());

        let mut name = StableName::check_in(&dir, "root", None).unwrap();
        name.point_to(Path::new(GONE)).unwrap();
        drop(name);
        assert!(dir.join("root").symlink_metadata().is_err());
    }

    #[test]
    fn a_link_left_behind_is_replaced() {
        let (_keep, dir) = directory();
        fs::create_dir(&dir).unwrap();
        symlink(GONE, dir.join("root")).unwrap();
        let mut name = StableName::check_in(&dir, "root", None).unwrap();
        name.point_to(Path::new("/dev/ublkb7")).unwrap();
        assert_eq!(fs::read_link(dir.join("root")).unwrap(), Path::new("/dev/ublkb7"));
    }

    #[test]
    fn the_link_of_a_device_that_stayed_is_taken_over() {
        let (_keep, dir) = directory();
        fs::create_dir(&dir).unwrap();
        // Only its target counts, and that it is there: no ublk device is, where this runs.
        let own = Path::new(GONE);
        symlink(own, dir.join("root")).unwrap();
        let mut name = StableName::check_in(&dir, "root", Some(own)).unwrap();
        name.point_to(own).unwrap();
        assert_eq!(fs::read_link(dir.join("root")).unwrap(), own);
        name.leave();
        drop(name);
        assert_eq!(fs::read_link(dir.join("root")).unwrap(), own, "left to the next server");

        fs::remove_file(dir.join("root")).unwrap();
        symlink("/dev/null", dir.join("root")).unwrap();
        assert!(StableName::check_in(&dir, "root", Some(own)).is_err(), "somebody else's");
    }

    #[test]
    fn a_link_of_udevs_is_as_good_as_ours() {
        let (_keep, dir) = directory();
        fs::create_dir(&dir).unwrap();
        symlink("../ublkb1048575", dir.join("root")).unwrap();
        let own = Path::new(GONE);
        let mut name = StableName::check_in(&dir, "root", Some(own)).unwrap();
        name.point_to(own).unwrap();
        assert_eq!(fs::read_link(dir.join("root")).unwrap(), Path::new("../ublkb1048575"));
        name.remove();
        assert!(dir.join("root").symlink_metadata().is_err());
    }

    #[test]
    fn what_is_not_ours_is_left_alone() {
        let (_keep, dir) = directory();
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("file"), "precious").unwrap();
        fs::create_dir(dir.join("dir")).unwrap();
        symlink("/dev/null", dir.join("link")).unwrap();
        symlink("/dev/ublkb", dir.join("short")).unwrap();
        symlink("/dev/ublkb0/../sda", dir.join("sly")).unwrap();
        for name in ["file", "dir", "link", "short", "sly"] {
            let error = StableName::check_in(&dir, name, None).unwrap_err();
            assert!(matches!(error, NameError::Foreign(_)), "{name}: {error}");
        }
        assert_eq!(fs::read(dir.join("file")).unwrap(), b"precious");
    }

    #[test]
    fn a_name_taken_in_the_meantime_is_not_overwritten() {
        let (_keep, dir) = directory();
        let mut name = StableName::check_in(&dir, "root", None).unwrap();
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("root"), "other").unwrap();
        assert!(name.point_to(Path::new(GONE)).is_err());
        drop(name);
        assert_eq!(fs::read(dir.join("root")).unwrap(), b"other");
    }

    #[test]
    fn a_link_that_was_changed_stays() {
        let (_keep, dir) = directory();
        let mut name = StableName::check_in(&dir, "root", None).unwrap();
        name.point_to(Path::new(GONE)).unwrap();
        fs::remove_file(dir.join("root")).unwrap();
        symlink("/dev/ublkb99999", dir.join("root")).unwrap();
        drop(name);
        assert!(dir.join("root").symlink_metadata().is_ok());
    }

    #[test]
    fn names_are_names() {
        let (_keep, dir) = directory();
        for name in ["", ".", "..", "a/b", "/etc/passwd", "../x", "a/"] {
            let error = StableName::check_in(&dir, name, None).unwrap_err();
            assert!(matches!(error, NameError::NotAName(_)), "{name}: {error}");
        }
    }
}
