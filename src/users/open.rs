//! Which processes have something open, as far as `/proc` lets us look: root all of them.

#![forbid(unsafe_code)]

use super::{Device, Use, User, processes, read, shown};
use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Processes that have the `devices` open, or one of those that belong to them: those of each.
pub fn openers(devices: &[Device]) -> Vec<Vec<User>> {
    let root = devices.first().map_or(Path::new("/"), |device| device.root.as_path());
    let mut openers = vec![Vec::new(); devices.len()];
    each_process(root, |files, user| {
        let opened: Vec<_> =
            files.iter().filter_map(|(file, name)| block_device(file, name, devices)).collect();
        for (device, openers) in devices.iter().zip(&mut openers) {
            if device.parts.iter().any(|part| opened.contains(&part.number)) {
                openers.push(user());
            }
        }
        true
    });
    openers
}

/// Up to `most` processes that have a file open under the name that `path` leads to. The name is compared and not the
/// file, so that a file of somebody else's is never asked for: do not decide by it.
pub fn having_open(path: &Path, most: usize) -> Vec<User> {
    let mut found = Vec::new();
    let Ok(path) = fs::canonicalize(path) else { return found };
    each_process(Path::new("/"), |files, user| {
        if files.iter().any(|(_, name)| *name == path) {
            found.push(user());
        }
        found.len() < most
    });
    found
}

/// Shows `look` the open files of each process but ours, each as its place in `/proc` and its name, and how to name the
/// process, until it has seen enough.
fn each_process(root: &Path, mut look: impl FnMut(&[(PathBuf, PathBuf)], &dyn Fn() -> User) -> bool) {
    let own = std::process::id().to_string();
    for (pid, process) in processes(root).filter(|(pid, _)| *pid != own) {
        let files = fs::read_dir(process.join("fd")).into_iter().flatten().flatten().map(|file| file.path());
        let named: Vec<_> =
            files.filter_map(|file| fs::read_link(&file).ok().map(|name| (file, name))).collect();
        let command = || shown(read(process.join("comm")).trim());
        let user = || User { whose: String::new(), what: Use::Open { pid: pid.clone(), command: command() } };
        if !look(&named, &user) {
            return;
        }
    }
}

/// The number of the block device that `file` of `/proc` is, if it is called like one of `devices`, from whichever root.
/// The name alone may be anybody's file; and the file alone may be on a server that does not answer, so that only one with
/// such a name is looked at, and no more than the kernel knows of it.
fn block_device(file: &Path, name: &Path, devices: &[Device]) -> Option<String> {
    let name = name.as_os_str().as_bytes();
    let mut parts = devices.iter().flat_map(|device| &device.parts);
    if !parts.any(|part| name.ends_with(part.node().as_bytes())) {
        return None;
    }
    let found = statx(CWD, file, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).ok()?;
    let is_block = FileType::from_raw_mode(found.stx_mode.into()).is_block_device();
    is_block.then(|| format!("{}:{}", found.stx_rdev_major, found.stx_rdev_minor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_name_does_not_make_a_device() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("sys/block/ublkb7/dev", "259:1\n");
        write("proc/123/comm", "dd\n");
        write("proc/123/fdinfo/0", "");
        // As a process in a user namespace of its own may have it.
        write("dev/ublkb7", "a file");
        fs::create_dir_all(dir.path().join("proc/123/fd")).unwrap();
        symlink(dir.path().join("dev/ublkb7"), dir.path().join("proc/123/fd/0")).unwrap();
        assert_eq!(openers(&[Device::named_in(dir.path(), "ublkb7")]), [vec![]]);
        assert!(openers(&[]).is_empty());
    }

    #[test]
    fn who_has_a_file_open_is_found_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        fs::write(&path, "").unwrap();
        let file = fs::File::open(&path).unwrap();
        let mut children: Vec<_> = (0..2)
            .map(|_| {
                let mut child = std::process::Command::new("sleep");
                child.arg("1000").stdin(file.try_clone().unwrap()).spawn().unwrap()
            })
            .collect();
        let (one, all) = (having_open(&path, 1), having_open(&path, usize::MAX));
        let pids: Vec<_> = children.iter().map(|child| child.id().to_string()).collect();
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(one.len(), 1);
        // A child of another test may have it too, for a moment.
        let has = |wanted: &String| {
            all.iter().any(|user| matches!(&user.what, Use::Open { pid, .. } if pid == wanted))
        };
        assert!(pids.iter().all(has), "{all:?}");
        assert!(!has(&std::process::id().to_string()), "we do not count");
    }
}
