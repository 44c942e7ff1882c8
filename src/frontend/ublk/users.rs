//! Who uses a disk: what would be hurt if it went.
//!
//! The kernel tells whether anybody has a ublk disk open only when it is asked to stop it (`UBLK_F_SAFE_STOP_DEV`, Linux
//! 7.0), and never who. So we look where users leave traces: mounts, swaps, and the devices that are built on it, for
//! anybody to see; and the open files of processes, for those who may look.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Mounts, swaps and devices on the disk `/dev/ublkbN` and its partitions, each in a few words. Mounts of other mount
/// namespaces are seen as far as `/proc` lets us, and else as what they are of.
pub fn users(id: u32) -> Vec<String> {
    Disk::new(Path::new("/"), id).users()
}

/// Processes that have the disks `ids` open, those of each, as far as `/proc` lets us look: root all of them.
pub fn openers(ids: &[u32]) -> Vec<Vec<String>> {
    let root = Path::new("/");
    openers_of(root, &ids.iter().map(|id| Disk::new(root, *id)).collect::<Vec<_>>())
}

/// A disk, and where it is looked for.
struct Disk<'a> {
    root: &'a Path,
    name: String,
    /// `MAJOR:MINOR` of the disk and its partitions.
    numbers: Vec<String>,
    /// Their directories in sysfs.
    directories: Vec<PathBuf>,
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Names in a directory, sorted; none where it cannot be read.
fn names(directory: impl AsRef<Path>) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

impl Disk<'_> {
    fn new(root: &Path, id: u32) -> Disk<'_> {
        let name = format!("ublkb{id}");
        let directory = root.join("sys/block").join(&name);
        let partition = |name: &String| directory.join(name).join("partition").exists();
        let partitions = names(&directory).into_iter().filter(partition).map(|name| directory.join(name));
        let directories: Vec<_> = [directory.clone()].into_iter().chain(partitions).collect();
        let numbers = directories.iter().map(|directory| read(directory.join("dev")).trim().to_owned());
        Disk { root, name, numbers: numbers.filter(|number| !number.is_empty()).collect(), directories }
    }

    /// Whether `path` names the disk or one of its partitions.
    fn is_it(&self, path: &str) -> bool {
        let path = Path::new(path);
        let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let file = |path: &Path| path.file_name().and_then(|name| name.to_str()).map(str::to_owned);
        [path, &target].into_iter().filter_map(file).any(|name| {
            let rest = name.strip_prefix(&self.name);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('p'))
        })
    }

    fn users(&self) -> Vec<String> {
        let mut mounts = self.mounts();
        if mounts.is_empty() {
            mounts = self.file_systems();
        }
        mounts.into_iter().chain(self.swaps()).chain(self.holders()).chain(self.loops()).collect()
    }

    fn mounts(&self) -> Vec<String> {
        let mut seen = BTreeSet::new();
        let mut points = BTreeSet::new();
        let own = self.root.join("proc/self");
        let others = names(self.root.join("proc")).into_iter().filter(|name| name.parse::<u32>().is_ok());
        // Who may not look at one may look at none: a service in its sandbox.
        let others =
            others.take(if fs::read_link(self.root.join("proc/1/ns/mnt")).is_ok() { usize::MAX } else { 0 });
        for process in [own].into_iter().chain(others.map(|pid| self.root.join("proc").join(pid))) {
            // One of each mount namespace.
            let namespace = fs::read_link(process.join("ns/mnt")).ok();
            if namespace.is_some_and(|namespace| !seen.insert(namespace)) {
                continue;
            }
            points.extend(read(process.join("mountinfo")).lines().filter_map(|line| self.mount_point(line)));
        }
        points.into_iter().map(|point| format!("mounted on {point}")).collect()
    }

    /// The mount point of a line of mountinfo that is of the disk. Some file systems have a device number of their own.
    fn mount_point(&self, line: &str) -> Option<String> {
        let (of_mount, of_file_system) = line.split_once(" - ")?;
        let mut words = of_mount.split(' ').skip(2);
        let (number, point) = (words.next()?, words.nth(1)?);
        let source = of_file_system.split(' ').nth(1)?;
        let ours =
            self.numbers.iter().any(|own| own == number) || source.starts_with("/dev/") && self.is_it(source);
        ours.then(|| unescaped(point))
    }

    /// File systems that say so themselves.
    fn file_systems(&self) -> Vec<String> {
        let directory = self.root.join("sys/fs");
        let on = |kind: &String| names(directory.join(kind)).iter().any(|name| self.is_it(name));
        names(&directory)
            .into_iter()
            .filter(on)
            .map(|kind| format!("mounted somewhere, with {kind}"))
            .collect()
    }

    fn swaps(&self) -> Vec<String> {
        let swaps = read(self.root.join("proc/swaps"));
        let first = |line: &str| line.split_whitespace().next().map(unescaped);
        let ours = swaps.lines().skip(1).filter_map(first).filter(|path| self.is_it(path));
        ours.map(|path| format!("swap on {path}")).collect()
    }

    /// Devices that are built on it: device mapper, md, bcache.
    fn holders(&self) -> Vec<String> {
        let holders = self.directories.iter().flat_map(|directory| names(directory.join("holders")));
        let named = |holder: String| {
            let name = read(self.root.join("sys/block").join(&holder).join("dm/name"));
            match name.trim() {
                "" => format!("part of {holder}"),
                name => format!("part of {holder} ({name})"),
            }
        };
        holders.map(named).collect()
    }

    /// Loop devices on it.
    fn loops(&self) -> Vec<String> {
        let devices = self.root.join("sys/block");
        let on_it = |name: &String| {
            if !name.starts_with("loop") {
                return false;
            }
            let file = read(devices.join(name).join("loop/backing_file"));
            self.is_it(file.trim_end())
        };
        names(&devices).into_iter().filter(on_it).map(|name| format!("behind {name}")).collect()
    }
}

/// One look at all processes, for all disks.
fn openers_of(root: &Path, disks: &[Disk<'_>]) -> Vec<Vec<String>> {
    let proc = root.join("proc");
    let own = std::process::id().to_string();
    let mut openers = vec![Vec::new(); disks.len()];
    for pid in names(&proc).into_iter().filter(|name| name.parse::<u32>().is_ok() && *name != own) {
        let files = proc.join(&pid).join("fd");
        let block = |metadata: &fs::Metadata| metadata.file_type().is_block_device();
        let opened =
            names(&files).into_iter().filter_map(|file| fs::metadata(files.join(file)).ok().filter(block));
        let number = |of: u64| format!("{}:{}", rustix::fs::major(of), rustix::fs::minor(of));
        let numbers: BTreeSet<String> = opened.map(|metadata| number(metadata.rdev())).collect();
        for (disk, openers) in disks.iter().zip(&mut openers) {
            if disk.numbers.iter().any(|own| numbers.contains(own)) {
                let command = read(proc.join(&pid).join("comm"));
                openers.push(format!("open in process {pid} ({})", command.trim()));
            }
        }
    }
    openers
}

/// Text of /proc, where `\040` is a space.
fn unescaped(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let octal = (*first == b'\\').then(|| after.get(..3)).flatten();
        let byte = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &after[3..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A machine with the disk 7, which has a partition, and the disk 77.
    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let disk = [
            ("sys/block/ublkb7/dev", "259:1\n"),
            ("sys/block/ublkb7/ublkb7p1/dev", "259:2\n"),
            ("sys/block/ublkb7/ublkb7p1/partition", "1\n"),
            ("sys/block/ublkb77/dev", "259:3\n"),
            ("proc/swaps", "Filename Type Size Used Priority\n/dev/vda2 partition 1 0 -2\n"),
        ];
        for (path, text) in disk.iter().chain(files) {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    fn users(files: &[(&str, &str)]) -> Vec<String> {
        Disk::new(machine(files).path(), 7).users()
    }

    #[test]
    fn mounts_are_found_in_every_namespace() {
        let own = "22 1 259:3 / / rw - ext4 /dev/ublkb77 rw\n36 22 259:2 / /mnt/my\\040disk rw shared:1 - ext4 /dev/x rw\n";
        assert_eq!(users(&[("proc/self/mountinfo", own)]), ["mounted on /mnt/my disk"]);
        let other = "36 22 0:45 /sub /data rw - btrfs /dev/ublkb7p1 rw\n";
        // Where we may look.
        assert!(users(&[("proc/123/mountinfo", other)]).is_empty());
        // Once for each namespace, not for each process.
        let dir = machine(&[
            ("proc/1/mountinfo", other),
            ("proc/2/mountinfo", "36 2 259:1 / /twice rw - xfs /dev/x rw\n"),
        ]);
        for pid in ["1", "2"] {
            fs::create_dir_all(dir.path().join("proc").join(pid).join("ns")).unwrap();
            symlink("mnt:[4026531841]", dir.path().join("proc").join(pid).join("ns/mnt")).unwrap();
        }
        assert_eq!(Disk::new(dir.path(), 7).users(), ["mounted on /data"]);
        // Where nobody lets us look, the file system says so.
        assert_eq!(users(&[("sys/fs/ext4/ublkb7p1/errors_count", "0")]), ["mounted somewhere, with ext4"]);
    }

    #[test]
    fn what_is_built_on_it_is_found() {
        let swaps = "Filename Type Size Used Priority\n/dev/ublkb7p1 partition 1 0 -2\n/dev/ublkb77 partition 1 0 -3\n";
        assert_eq!(users(&[("proc/swaps", swaps)]), ["swap on /dev/ublkb7p1"]);
        let holders = [
            ("sys/block/ublkb7/holders/dm-0/x", ""),
            ("sys/block/dm-0/dm/name", "vg-root\n"),
            ("sys/block/ublkb7/ublkb7p1/holders/md0/x", ""),
            ("sys/block/ublkb77/holders/dm-1/x", ""),
        ];
        assert_eq!(users(&holders), ["part of dm-0 (vg-root)", "part of md0"]);
        assert_eq!(users(&[("sys/block/loop3/loop/backing_file", "/dev/ublkb7\n")]), ["behind loop3"]);
        assert!(users(&[]).is_empty());
        assert!(Disk::new(Path::new("/nowhere"), 7).users().is_empty());
    }

    #[test]
    fn openers_are_those_of_a_block_device() {
        let dir = machine(&[("proc/123/comm", "dd\n"), ("proc/123/fd/0", "a file")]);
        assert_eq!(openers_of(dir.path(), &[Disk::new(dir.path(), 7)]), [Vec::<String>::new()]);
    }

    #[test]
    fn octal_is_undone() {
        assert_eq!(unescaped("/a\\040b\\134"), "/a b\\");
        assert_eq!(unescaped("/a\\04"), "/a\\04");
    }
}
