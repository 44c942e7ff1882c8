//! What a file is besides its contents, for one that takes another's place.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, fchown};
use std::path::Path;

use rustix::fs::{IFlags, fgetxattr, flistxattr, fsetxattr, ioctl_getflags, ioctl_setflags};
use rustix::io::Errno;

use super::ImageError;

/// Attributes that are the kernel's own account of a file: of its contents, or of a layer that it is seen through.
const NOT_OURS: [&str; 4] = ["security.ima", "security.evm", "security.capability", "trusted.overlay."];

/// The most that one attribute, or the list of all names, may take (`XATTR_SIZE_MAX` and `XATTR_LIST_MAX` of
/// `linux/limits.h`).
const MOST: usize = 65536;

/// Gives `new` owner, group, mode, access control lists, labels and other attributes of `old`, both of one file system.
/// `path` is that of `old`, for messages.
///
/// # Errors
/// What cannot be kept: the new file must not be more open than the old one was, nor closed to whom it is for.
pub(super) fn keep(old: &File, new: &File, path: &Path) -> Result<(), ImageError> {
    let lost = |what: &str, error: io::Error| {
        let reason = format!("its {what} cannot be given to the file that is to replace it: {error}");
        ImageError::unsuitable(path, reason)
    };
    let metadata = old.metadata().map_err(ImageError::system("look at", path))?;
    let present = new.metadata().map_err(ImageError::system("look at", path))?;
    if (metadata.uid(), metadata.gid()) != (present.uid(), present.gid()) {
        fchown(new, Some(metadata.uid()), Some(metadata.gid()))
            .map_err(|error| lost(&format!("owner ({}:{})", metadata.uid(), metadata.gid()), error))?;
    }
    for name in names(old).map_err(|error| lost("list of attributes", error))? {
        if NOT_OURS.iter().any(|ours| name.starts_with(ours)) {
            continue;
        }
        match copy(old, new, &name) {
            Ok(()) => {}
            // Those that say who may do what, and the user's own; others are hints to the file system.
            Err(errno) if ["security.", "system.", "user."].iter().any(|kind| name.starts_with(kind)) => {
                return Err(lost(&format!("attribute {name}"), errno.into()));
            }
            Err(errno) => log::warn!("{}: its attribute {name} is not kept: {errno}", path.display()),
        }
    }
    // After the owner, whose change takes set-user-ID bits away, and after the lists, which are part of the mode.
    new.set_permissions(metadata.permissions()).map_err(|error| lost("mode", error))
}

/// Has the file system keep the contents of `new` as it keeps those of `old`: on btrfs, without copying on write. Only an
/// empty file can be told. No file system is asked for what it does not have.
pub(super) fn keep_storage(old: &File, new: &File) {
    let kept = IFlags::NOCOW | IFlags::COMPRESSED | IFlags::NODUMP;
    let change = || -> Result<(), Errno> {
        let (wanted, present) = (ioctl_getflags(old)?, ioctl_getflags(new)?);
        let flags = (present - kept) | (wanted & kept);
        if flags == present { Ok(()) } else { ioctl_setflags(new, flags) }
    };
    if let Err(errno) = change() {
        log::debug!("flags of the file that is replaced: {errno}");
    }
}

fn names(file: &File) -> io::Result<Vec<String>> {
    let mut list = vec![0u8; MOST];
    let length = match flistxattr(file, &mut list[..]) {
        Ok(length) => length,
        Err(Errno::NOTSUP | Errno::NOSYS) => 0,
        Err(errno) => return Err(errno.into()),
    };
    let names = list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    Ok(names.map(|name| String::from_utf8_lossy(name).into_owned()).collect())
}

fn copy(old: &File, new: &File, name: &str) -> Result<(), Errno> {
    let mut value = vec![0u8; MOST];
    let length = match fgetxattr(old, name, &mut value[..]) {
        Ok(length) => length,
        // Gone since it was listed.
        Err(Errno::NODATA) => return Ok(()),
        Err(errno) => return Err(errno),
    };
    let mut present = vec![0u8; MOST];
    // Often the same by the directory's rules, and then it may not be ours to set.
    if fgetxattr(new, name, &mut present[..]).is_ok_and(|has| present[..has] == value[..length]) {
        return Ok(());
    }
    fsetxattr(new, name, &value[..length], rustix::fs::XattrFlags::empty())
}
