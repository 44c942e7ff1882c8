//! Who has a file or a block device, for a message to the one who may not have it too.

#![forbid(unsafe_code)]

use rustix::fs::{major, minor};
use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Processes named at most.
const MOST: usize = 3;

/// Who has it, as far as can be seen from here: "another process" and its name, or what it is mounted at.
pub(super) fn of(path: &Path, metadata: &Metadata) -> String {
    if metadata.file_type().is_block_device() {
        let users = of_device(metadata.rdev());
        if !users.is_empty() {
            return users.join(", ");
        }
    }
    let processes = processes(path);
    match processes.is_empty() {
        true => "another process".to_owned(),
        false => format!("another process: {}", processes.join(", ")),
    }
}

/// What the kernel itself has it for, or one of its partitions, or the disk that it is a part of.
fn of_device(rdev: u64) -> Vec<String> {
    let mut users = Vec::new();
    for (number, what) in family(rdev) {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mounted = mounts.lines().filter_map(mount).find(|(device, source, _)| {
            *device == number || rdev_of(Path::new(source)).is_some_and(|found| text(found) == number)
        });
        if let Some((_, _, place)) = mounted {
            users.push(format!("{what}a file system mounted at {place}"));
        }
        let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
        let names = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next());
        if names.filter_map(|name| rdev_of(Path::new(name))).any(|found| text(found) == number) {
            users.push(format!("{what}swap"));
        }
        for holder in children(&sysfs(&number).join("holders")) {
            let name = fs::read_to_string(holder.join("dm/name"));
            let name =
                name.map_or_else(|_| file_name(&holder), |name| format!("/dev/mapper/{}", name.trim()));
            users.push(format!("{what}{name}"));
        }
    }
    users
}

/// A device with its partitions and the disk that it is one of, each as `MAJOR:MINOR` and what to say before a user of it.
fn family(rdev: u64) -> Vec<(String, String)> {
    let own = text(rdev);
    let Ok(directory) = fs::canonicalize(sysfs(&own)) else { return vec![(own, String::new())] };
    let number =
        |directory: &Path| fs::read_to_string(directory.join("dev")).map(|text| text.trim().to_owned());
    let mut found = vec![(own, String::new())];
    for part in children(&directory).into_iter().filter(|child| child.join("partition").exists()) {
        found.extend(number(&part).map(|number| (number, format!("its partition {}: ", file_name(&part)))));
    }
    if directory.join("partition").exists()
        && let Some(disk) = directory.parent()
    {
        found.extend(number(disk).map(|number| (number, format!("its disk {}: ", file_name(disk)))));
    }
    found
}

/// `MAJOR:MINOR`, source and place of a line of `mountinfo` (`proc(5)`).
fn mount(line: &str) -> Option<(&str, &str, &str)> {
    let (mount, source) = line.split_once(" - ")?;
    let mut fields = mount.split(' ').skip(2);
    let (device, place) = (fields.next()?, fields.nth(1)?);
    Some((device, source.split(' ').nth(1)?, place))
}

/// Processes that have a file open under the name that `path` leads to. The name is compared and not the file: asking for
/// a file of somebody else's may hang, on a server that does not answer.
fn processes(path: &Path) -> Vec<String> {
    let Ok(path) = fs::canonicalize(path) else { return Vec::new() };
    let own = std::process::id().to_string();
    let is_number =
        |name: &Path| name.file_name().is_some_and(|name| name.as_bytes().iter().all(u8::is_ascii_digit));
    children(Path::new("/proc"))
        .into_iter()
        .filter(|process| is_number(process) && file_name(process) != own)
        .filter(|process| {
            let open = children(&process.join("fd"));
            open.iter().any(|file| fs::read_link(file).is_ok_and(|target| target == path))
        })
        .take(MOST)
        .map(|process| {
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            format!("{} (process {})", name.trim(), file_name(&process))
        })
        .collect()
}

fn children(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory)
        .map_or_else(|_| Vec::new(), |entries| entries.flatten().map(|e| e.path()).collect())
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn sysfs(number: &str) -> PathBuf {
    Path::new("/sys/dev/block").join(number)
}

fn text(rdev: u64) -> String {
    format!("{}:{}", major(rdev), minor(rdev))
}

/// Of a block device.
fn rdev_of(path: &Path) -> Option<u64> {
    // A server's name, "none" and the like are no paths.
    let metadata = if path.is_absolute() { fs::metadata(path).ok()? } else { return None };
    metadata.file_type().is_block_device().then(|| metadata.rdev())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_mountinfo() {
        let line = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        assert_eq!(mount(line), Some(("98:0", "/dev/root", "/mnt2")));
        assert_eq!(mount("36 35 0:30 / /x rw - tmpfs tmpfs rw"), Some(("0:30", "tmpfs", "/x")));
        assert_eq!(mount("36 35 98:0"), None);
    }

    #[test]
    fn a_file_of_nobody_elses() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(of(file.path(), &file.as_file().metadata().unwrap()), "another process");
    }
}
