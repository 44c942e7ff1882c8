//! What a file is besides its contents, for one that takes another's place.

#![forbid(unsafe_code)]

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::Path;

use rustix::fs::{
    IFlags, XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr, ioctl_getflags, ioctl_setflags,
};
use rustix::io::Errno;

use super::ImageError;

/// Attributes that are the kernel's own account of a file: of its contents, or of a layer that it is seen through.
const NOT_OURS: [&str; 4] = ["security.ima", "security.evm", "security.capability", "trusted.overlay."];

/// The most that one attribute, or the list of all names, may take (`XATTR_SIZE_MAX` and `XATTR_LIST_MAX` of
/// `linux/limits.h`).
const MOST: usize = 65536;

/// Gives `new` owner, group, mode, access control lists, labels and other attributes of `old`, both of one file system, and
/// takes what `old` does not have (such as the entries of a directory's default list). `path` is that of `old`, for messages.
///
/// In an order in which nobody may do with `new`, not for a moment, what he may not do with `old`: it is closed to all but its
/// owner (which leaves inherited entries of lists without effect) until it has the owner, the lists and the labels.
///
/// # Errors
/// What cannot be kept or taken: the new file must not be more open than the old one was, nor closed to whom it is for.
pub(super) fn keep(old: &File, new: &File, path: &Path) -> Result<(), ImageError> {
    let refuse = |reason: String| ImageError::unsuitable(path, reason);
    let lost = |what: &str, error: io::Error| {
        refuse(format!("its {what} cannot be given to the file that is to replace it: {error}"))
    };
    let metadata = old.metadata().map_err(ImageError::system("look at", path))?;
    let present = new.metadata().map_err(ImageError::system("look at", path))?;
    let unlisted = |error| lost("list of attributes", error);
    let (wanted, has) = (names(old).map_err(unlisted)?, names(new).map_err(unlisted)?);
    let (mut changes, mut kept) = (Vec::new(), Vec::new());
    for name in wanted {
        match value(old, &name) {
            // Often the same by the directory's rules, and then it may not be ours to set.
            Ok(Some(wanted)) if value(new, &name).ok().flatten().as_ref() == Some(&wanted) => {}
            Ok(Some(wanted)) => changes.push((name.clone(), wanted)),
            // Gone since it was listed.
            Ok(None) => continue,
            Err(errno) if matters(&name) => return Err(lost(&format!("attribute {name}"), errno.into())),
            Err(errno) => log::warn!("{}: its attribute {name} is not kept: {errno}", path.display()),
        }
        kept.push(name);
    }
    // Lists last, since they say at once who may do what.
    changes.sort_by_key(|(name, _)| name.starts_with("system."));
    let surplus: Vec<_> = has.into_iter().filter(|name| !kept.contains(name)).collect();
    let same_owner = (metadata.uid(), metadata.gid()) == (present.uid(), present.gid());
    // Where nothing is to be changed, as on a file system that has nothing of all this, it may not be asked for either.
    let is_open = present.mode() & 0o077 != 0;
    if is_open && !(same_owner && changes.is_empty() && surplus.is_empty()) {
        new.set_permissions(Permissions::from_mode(0o600)).map_err(|error| lost("mode", error))?;
    }
    for name in surplus {
        match fremovexattr(new, &*name) {
            Ok(()) | Err(Errno::NODATA) => {}
            Err(errno) if matters(&name) => {
                let reason = "which it does not have, cannot be taken from the file that is to replace it";
                return Err(refuse(format!("the attribute {name}, {reason}: {errno}")));
            }
            Err(errno) => log::warn!("{}: it gets an attribute {name}: {errno}", path.display()),
        }
    }
    if !same_owner {
        fchown(new, Some(metadata.uid()), Some(metadata.gid()))
            .map_err(|error| lost(&format!("owner ({}:{})", metadata.uid(), metadata.gid()), error))?;
    }
    for (name, value) in changes {
        match fsetxattr(new, &*name, &value, XattrFlags::empty()) {
            Ok(()) => {}
            Err(errno) if matters(&name) => return Err(lost(&format!("attribute {name}"), errno.into())),
            Err(errno) => log::warn!("{}: its attribute {name} is not kept: {errno}", path.display()),
        }
    }
    // After the owner, whose change takes set-user-ID bits away, and after the lists, which are part of the mode.
    new.set_permissions(metadata.permissions()).map_err(|error| lost("mode", error))
}

/// Whether it says who may do what, or is the user's own; others are hints to the file system.
fn matters(name: &str) -> bool {
    ["security.", "system.", "user."].iter().any(|kind| name.starts_with(kind))
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

/// Those that are ours to keep.
fn names(file: &File) -> io::Result<Vec<String>> {
    let mut list = vec![0u8; MOST];
    let length = match flistxattr(file, &mut list[..]) {
        Ok(length) => length,
        Err(Errno::NOTSUP | Errno::NOSYS) => 0,
        Err(errno) => return Err(errno.into()),
    };
    let names = list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let names = names.map(|name| String::from_utf8_lossy(name).into_owned());
    Ok(names.filter(|name| !NOT_OURS.iter().any(|not| name.starts_with(not))).collect())
}

/// `None`: it has no such attribute.
fn value(file: &File, name: &str) -> Result<Option<Vec<u8>>, Errno> {
    let mut value = vec![0u8; MOST];
    match fgetxattr(file, name, &mut value[..]) {
        Ok(length) => {
            value.truncate(length);
            Ok(Some(value))
        }
        Err(Errno::NODATA) => Ok(None),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    /// A list of `acl(5)`: the owner, user 7, the group, the mask and all others.
    fn list([owner, other_user, group, mask, others]: [u8; 5]) -> Vec<u8> {
        let mut list = vec![2, 0, 0, 0];
        for (tag, rights) in [(1, owner), (2, other_user), (4, group), (16, mask), (32, others)] {
            let id = if tag == 2 { 7 } else { u32::MAX };
            list.extend([tag, 0, rights, 0]);
            list.extend(id.to_le_bytes());
        }
        list
    }

    const ACCESS: &str = "system.posix_acl_access";

    /// Somebody who looks all the time never sees user 7 let in.
    #[test]
    fn nobody_is_let_in_for_a_moment() {
        let dir = tempfile::tempdir().unwrap();
        let directory = File::open(dir.path()).unwrap();
        let default = fsetxattr(&directory, "system.posix_acl_default", &list([7; 5]), XattrFlags::empty());
        if let Err(errno) = default {
            eprintln!("not tried: no lists here: {errno}");
            return;
        }
        let path = dir.path().join("old");
        let old = File::create(&path).unwrap();
        fremovexattr(&old, ACCESS).unwrap();
        for round in 0..300 {
            let scratch = super::super::scratch::Scratch::new(dir.path()).unwrap();
            let new = &scratch.file;
            assert!(value(new, ACCESS).unwrap().is_some());
            let done = AtomicBool::new(false);
            thread::scope(|scope| {
                let watch = scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        let Some(list) = value(new, ACCESS).unwrap() else { continue };
                        // The entries' rights, those of the user after those of the owner.
                        let rights = |entry: usize| list[4 + 8 * entry + 2];
                        assert_eq!(rights(1) & rights(3) & !4, 0, "round {round}: {list:?}");
                    }
                });
                // Once closed, once with a list that lets user 7 read, and closed again.
                for (mode, given) in [(0o660, None), (0o640, Some([6, 4, 4, 4, 0])), (0o660, None)] {
                    match given {
                        Some(given) => fsetxattr(&old, ACCESS, &list(given), XattrFlags::empty()).unwrap(),
                        None => drop(fremovexattr(&old, ACCESS)),
                    }
                    old.set_permissions(Permissions::from_mode(mode)).unwrap();
                    keep(&old, new, &path).unwrap();
                    assert_eq!(value(new, ACCESS).unwrap(), given.map(list));
                    assert_eq!(new.metadata().unwrap().mode() & 0o777, mode);
                }
                done.store(true, Ordering::Relaxed);
                watch.join().unwrap();
            });
        }
    }
}
