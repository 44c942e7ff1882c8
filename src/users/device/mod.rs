//! What the kernel itself has a block device for.

#![forbid(unsafe_code)]

use super::{Use, User, names, processes, read, shown};
use rustix::fs::{major, minor};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A block device with those that belong to it, and where they are looked for.
#[derive(Debug)]
pub struct Device {
    pub(super) root: PathBuf,
    pub(super) parts: Vec<Part>,
}

/// One of them.
#[derive(Debug)]
pub(super) struct Part {
    /// Its kernel name, as in sysfs.
    name: String,
    /// `MAJOR:MINOR`.
    pub(super) number: String,
    /// In sysfs.
    directory: PathBuf,
    /// Before a user of it.
    whose: String,
}

impl Part {
    /// `None` for what is no block device.
    fn at(directory: &Path, whose: impl FnOnce(&str) -> String) -> Option<Part> {
        let name = directory.file_name()?.to_str()?.to_owned();
        let number = read(directory.join("dev")).trim().to_owned();
        let whose = whose(&name);
        (!number.is_empty()).then(|| Part { name, number, directory: directory.into(), whose })
    }

    /// `/dev/NAME`, which the kernel itself makes.
    pub(super) fn node(&self) -> String {
        format!("/dev/{}", self.name.replace('!', "/"))
    }

    fn user(&self, what: Use) -> User {
        User { whose: self.whose.clone(), what }
    }
}

impl Device {
    /// The disk `name`, with its partitions.
    pub fn named(name: &str) -> Device {
        Device::named_in(Path::new("/"), name)
    }

    pub(super) fn named_in(root: &Path, name: &str) -> Device {
        let directory = root.join("sys/block").join(name);
        let own = Part::at(&directory, |_| String::new());
        let parts = own.into_iter().chain(partitions(&directory, |_| String::new())).collect();
        Device { root: root.into(), parts }
    }

    /// The disk or partition of that number, with its partitions and the disk that it is one of: to have one of them for
    /// itself, one must have them all.
    pub fn numbered(rdev: u64) -> Device {
        Device::numbered_in(Path::new("/"), rdev)
    }

    pub(super) fn numbered_in(root: &Path, rdev: u64) -> Device {
        let link = root.join("sys/dev/block").join(format!("{}:{}", major(rdev), minor(rdev)));
        let Ok(directory) = fs::canonicalize(link) else {
            return Device { root: root.into(), parts: Vec::new() };
        };
        let mut parts: Vec<_> = Part::at(&directory, |_| String::new()).into_iter().collect();
        parts.extend(partitions(&directory, |name| format!("its partition {name}: ")));
        if is_partition(&directory)
            && let Some(disk) = directory.parent()
        {
            parts.extend(Part::at(disk, |name| format!("its disk {name}: ")));
        }
        Device { root: root.into(), parts }
    }

    /// Mounts, swaps and devices on it. Mounts of other mount namespaces are seen as far as `/proc` lets us, and else as
    /// what they are of.
    pub fn users(&self) -> Vec<User> {
        self.mounts().into_iter().chain(self.swaps()).chain(self.holders()).chain(self.loops()).collect()
    }

    fn mounts(&self) -> Vec<User> {
        let kinds: Vec<BTreeSet<String>> = self.parts.iter().map(|part| self.file_systems(part)).collect();
        let mut places = vec![BTreeSet::new(); self.parts.len()];
        let mut seen = BTreeSet::new();
        let own = self.root.join("proc/self");
        // Who may not look at one may look at none: a service in its sandbox.
        let may_look = fs::read_link(self.root.join("proc/1/ns/mnt")).is_ok();
        let others = processes(&self.root).map(|(_, process)| process).filter(|_| may_look);
        for process in [own].into_iter().chain(others) {
            // One of each mount namespace.
            let namespace = fs::read_link(process.join("ns/mnt")).ok();
            if namespace.is_some_and(|namespace| !seen.insert(namespace)) {
                continue;
            }
            for line in read(process.join("mountinfo")).lines() {
                let Some(mount) = Mount::of(line) else { continue };
                for ((part, kinds), places) in self.parts.iter().zip(&kinds).zip(&mut places) {
                    if self.is_on(&mount, part, kinds) {
                        places.insert(shown(&unescaped(mount.place)));
                    }
                }
            }
        }
        let mut users = Vec::new();
        for ((part, kinds), places) in self.parts.iter().zip(kinds).zip(places) {
            if places.is_empty() {
                users.extend(kinds.into_iter().map(|kind| part.user(Use::Somewhere { kind })));
            }
            users.extend(places.into_iter().map(|at| part.user(Use::Mounted { at })));
        }
        users
    }

    /// Whether a mount is of what is on `part`, on which sysfs knows file systems of `kinds`. The number tells, which the
    /// kernel alone gives. Btrfs, which may have several devices, has numbers of its own, and says which device it shows:
    /// a source like any other's, but nobody without privileges mounts btrfs, and sysfs must agree.
    fn is_on(&self, mount: &Mount<'_>, part: &Part, kinds: &BTreeSet<String>) -> bool {
        let of_mapper = |source: &str| {
            let name = read(part.directory.join("dm/name"));
            !name.trim().is_empty() && source == format!("/dev/mapper/{}", name.trim())
        };
        let says_so = || {
            let source = unescaped(mount.source);
            source == part.node() || of_mapper(&source)
        };
        mount.number == part.number || mount.kind == "btrfs" && kinds.contains("btrfs") && says_so()
    }

    /// Kinds of file systems that tell sysfs that they are on `part`: most by a directory of its name, some by one of their
    /// own that names all their devices.
    fn file_systems(&self, part: &Part) -> BTreeSet<String> {
        let directory = self.root.join("sys/fs");
        let device = |path: &Path| fs::metadata(path).ok().map(|metadata| metadata.dev());
        // What is mounted below it is others': anybody may make directories in a bpf file system.
        let own = |kind: &String| device(&directory.join(kind)) == device(&directory);
        let names_it = |instance: &Path| {
            // Btrfs and bcachefs.
            instance.join("devices").join(&part.name).symlink_metadata().is_ok()
                || names(instance).iter().filter(|name| name.starts_with("dev-")).any(|name| {
                    let link = fs::read_link(instance.join(name).join("block"));
                    link.is_ok_and(|device| device.file_name().is_some_and(|name| *name == *part.name))
                })
        };
        let on_it = |kind: &String| {
            let kind = directory.join(kind);
            names(&kind).iter().any(|name| *name == part.name || names_it(&kind.join(name)))
        };
        names(&directory).into_iter().filter(own).filter(on_it).collect()
    }

    fn swaps(&self) -> Vec<User> {
        let swaps = read(self.root.join("proc/swaps"));
        let device = |line: &str| {
            let mut words = line.split_whitespace();
            let path = unescaped(words.next()?);
            (words.next()? == "partition").then_some(path)
        };
        let on = |path: String| {
            // From the root of whoever looks, which may be below that of who made it swap.
            let part = self.parts.iter().find(|part| path.ends_with(&part.node()))?;
            Some(part.user(Use::Swap { on: shown(&path) }))
        };
        swaps.lines().skip(1).filter_map(device).filter_map(on).collect()
    }

    /// Devices that are built on it.
    fn holders(&self) -> Vec<User> {
        let of = |part: &Part, holder: String| {
            let name = read(self.root.join("sys/block").join(&holder).join("dm/name"));
            let name = Some(name.trim()).filter(|name| !name.is_empty()).map(shown);
            part.user(Use::Part { of: shown(&holder), name })
        };
        let of_part = |part| names(holders_of(part)).into_iter().map(move |holder| of(part, holder));
        self.parts.iter().flat_map(of_part).collect()
    }

    /// Loop devices on it. What their files are called is compared with the kernel's own name alone: udisks attaches
    /// anybody's files.
    fn loops(&self) -> Vec<User> {
        let devices = self.root.join("sys/block");
        let on = |name: String| {
            let file = read(devices.join(&name).join("loop/backing_file"));
            let part = self.parts.iter().find(|part| file.trim_end_matches('\n') == part.node())?;
            Some(part.user(Use::Loop { name }))
        };
        names(&devices).into_iter().filter(|name| name.starts_with("loop")).filter_map(on).collect()
    }
}

fn is_partition(directory: &Path) -> bool {
    directory.join("partition").exists()
}

fn partitions(disk: &Path, whose: impl Fn(&str) -> String) -> Vec<Part> {
    let inside = names(disk).into_iter().map(|name| disk.join(name));
    inside.filter(|directory| is_partition(directory)).filter_map(|part| Part::at(&part, &whose)).collect()
}

fn holders_of(part: &Part) -> PathBuf {
    part.directory.join("holders")
}

/// A line of `mountinfo` (`proc(5)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mount<'a> {
    number: &'a str,
    place: &'a str,
    kind: &'a str,
    source: &'a str,
}

impl Mount<'_> {
    fn of(line: &str) -> Option<Mount<'_>> {
        let (of_mount, of_file_system) = line.split_once(" - ")?;
        let mut words = of_mount.split(' ').skip(2);
        let (number, place) = (words.next()?, words.nth(1)?);
        let mut words = of_file_system.split(' ');
        Some(Mount { number, place, kind: words.next()?, source: words.next()? })
    }
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
mod tests;
