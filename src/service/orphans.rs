//! What a service that is gone may have left: ublk disks, and the links to them.

#![forbid(unsafe_code)]

use crate::frontend::ublk::{self, Found, Info, Ownership};
use serde::Serialize;
use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// A disk of ours, a link to one, or both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OrphanDevice {
    /// `/dev/ringblk/NAME`; a service that died early has made none.
    pub link: Option<PathBuf>,
    /// `/dev/ublkbN`.
    pub device: PathBuf,
    /// The volume that it is of, where that is known.
    pub volume: Option<String>,
    /// Where that volume's store was.
    pub target: Option<String>,
    /// What has become of it.
    pub state: DeviceState,
    /// The process that serves it.
    pub server: Option<u32>,
}

/// What has become of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// A process serves it.
    Served,
    /// Its server is dead, and the kernel clears up behind it.
    Exiting,
    /// It waits for a service.
    Waiting,
    /// A device without a disk.
    Stale,
    /// There is a disk, and the driver does not tell us more.
    Unknown,
    /// There is none.
    Gone,
}

/// What is to be removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RemoveTarget {
    /// The disk of that volume.
    Volume(String),
    /// `/dev/ublkbN` or `/dev/ringblk/NAME`.
    Device(PathBuf),
    /// All that nobody serves.
    AllDead,
}

/// Why something was not removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// Nothing there.
    #[error("there is no disk of a volume {0} of ringblk's")]
    NoVolume(String),
    /// Nothing of ours.
    #[error("{} is no disk of ringblk's", .0.display())]
    NotOurs(PathBuf),
    /// Somebody uses it.
    #[error("{} is {users}: it would be lost with all that waits for it; --force removes it all the same", .device.display())]
    InUse {
        /// The disk.
        device: PathBuf,
        /// By whom, in words.
        users: String,
    },
    /// See [`ublk::Error`].
    #[error(transparent)]
    Ublk(#[from] ublk::Error),
    /// A link.
    #[error("{}", .0.display())]
    Link(PathBuf, #[source] io::Error),
}

impl OrphanDevice {
    /// What a user can do about it.
    pub fn needs(&self) -> &'static str {
        match self.state {
            DeviceState::Waiting => "start its service, or `ringblk remove`",
            DeviceState::Stale | DeviceState::Gone => "`ringblk remove`, or nothing",
            DeviceState::Exiting => "a moment",
            DeviceState::Served | DeviceState::Unknown => "nothing",
        }
    }
}

/// All disks of ours and all links under `/dev/ringblk`, links first, by name. Where the driver does not tell us of
/// its devices (it tells root), only links are known.
///
/// # Errors
/// When the directory is there but cannot be read.
pub fn devices() -> io::Result<Vec<OrphanDevice>> {
    let known = ublk::ours().inspect_err(|error| log::debug!("{error}"));
    devices_in(Path::new(ublk::LINKS), &known.unwrap_or_default())
}

fn devices_in(dir: &Path, known: &[Found]) -> io::Result<Vec<OrphanDevice>> {
    let mut found = Vec::new();
    for (link, device) in links_in(dir)? {
        let known = known.iter().find(|known| known.info.path() == device);
        let there = fs::metadata(&link).is_ok_and(|metadata| metadata.file_type().is_block_device());
        let state = if there { DeviceState::Unknown } else { DeviceState::Gone };
        found.push(match known {
            Some(known) => described(known, Some(link)),
            None => {
                OrphanDevice { link: Some(link), device, volume: None, target: None, state, server: None }
            }
        });
    }
    found.sort_by(|a, b| a.link.cmp(&b.link));
    let linked = |known: &&Found| found.iter().any(|left| left.device == known.info.path());
    let unlinked: Vec<_> =
        known.iter().filter(|known| !linked(known)).map(|known| described(known, None)).collect();
    found.extend(unlinked);
    Ok(found)
}

/// Links and where they point. Anything that is no link is not ours to speak of.
fn links_in(dir: &Path) -> io::Result<Vec<(PathBuf, PathBuf)>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut links = Vec::new();
    for entry in entries {
        let link = entry?.path();
        let Ok(target) = ublk::target_of(&link) else { continue };
        // Links to partitions are udev's alone.
        let disk = |target: &Path| target.to_str()?.strip_prefix("/dev/ublkb")?.parse::<u32>().ok();
        if disk(&target).is_some() {
            links.push((link, target));
        }
    }
    Ok(links)
}

fn described(known: &Found, link: Option<PathBuf>) -> OrphanDevice {
    let Found { info, record } = known;
    let (volume, target) = record.clone().map(|record| (record.volume, record.target)).unzip();
    let (state, server) = match info.ownership() {
        Ownership::Served(pid) => (DeviceState::Served, Some(pid)),
        Ownership::Exiting => (DeviceState::Exiting, None),
        Ownership::Waiting => (DeviceState::Waiting, None),
        Ownership::Stale => (DeviceState::Stale, None),
    };
    OrphanDevice { link, device: info.path(), volume, target, state, server }
}

/// Who uses each of these disks of ours, in words: nobody, for one that is not there.
pub fn users_of(devices: &[PathBuf]) -> Vec<Vec<String>> {
    // No device has the largest number.
    let id = |device: &PathBuf| device.to_str()?.strip_prefix("/dev/ublkb")?.parse().ok();
    let ids: Vec<u32> = devices.iter().map(|device| id(device).unwrap_or(u32::MAX)).collect();
    let all = |(id, openers)| ublk::users(id).into_iter().chain(openers).collect();
    ids.iter().copied().zip(ublk::openers(&ids)).map(all).collect()
}

/// What became of a removal.
#[derive(Debug, Default)]
pub struct Removal {
    /// Disks and links that are gone.
    pub gone: Vec<PathBuf>,
    /// Why others are not.
    pub refused: Vec<RemoveError>,
}

/// Removes disks that nobody serves, with their links; what waits for them fails. With `force` also those that somebody
/// uses. One of several that has to stay keeps no other.
///
/// # Errors
/// When there is nothing of ours by that name, or the driver does not tell.
pub fn remove(which: &RemoveTarget, force: bool) -> Result<Removal, RemoveError> {
    remove_in(Path::new(ublk::LINKS), which, &ublk::ours()?, |info| {
        let (device, users) = (info.path(), users_of(&[info.path()]).concat());
        // One that is served is refused for that.
        let served = matches!(info.ownership(), Ownership::Served(_));
        if !users.is_empty() && !force && !served {
            return Err(RemoveError::InUse { device, users: users.join(", ") });
        }
        Ok(ublk::remove(info)?)
    })
}

fn remove_in(
    dir: &Path,
    which: &RemoveTarget,
    known: &[Found],
    mut remove: impl FnMut(&Info) -> Result<(), RemoveError>,
) -> Result<Removal, RemoveError> {
    let links = links_in(dir).map_err(|error| RemoveError::Link(dir.into(), error))?;
    let target = |link: &Path| links.iter().find(|(of, _)| of == link).map(|(_, device)| device.clone());
    let infos = known.iter().map(|known| &known.info);
    let is_dead = |info: &&Info| !matches!(info.ownership(), Ownership::Served(_));
    let Removal { mut gone, mut refused } = Removal::default();
    let mut stale: Vec<PathBuf> = Vec::new();
    let chosen: Vec<&Info> = match which {
        RemoveTarget::AllDead => infos.filter(is_dead).collect(),
        RemoveTarget::Volume(name) => {
            let linked = target(&dir.join(name));
            stale.extend(linked.clone());
            let is_it = |known: &&Found| match &known.record {
                Some(record) => record.volume == *name,
                None => linked.as_ref() == Some(&known.info.path()),
            };
            known.iter().filter(is_it).map(|known| &known.info).collect()
        }
        RemoveTarget::Device(path) => {
            let device = target(path).unwrap_or_else(|| path.clone());
            let of = infos.filter(|info| info.path() == device).collect();
            stale.push(device);
            of
        }
    };
    // A link to nothing is ours to remove, a disk that we do not know is not.
    stale.retain(|device| device.symlink_metadata().is_err());
    for info in &chosen {
        match remove(info) {
            Ok(()) => {
                gone.push(info.path());
                stale.push(info.path());
            }
            Err(error) => refused.push(error),
        }
    }
    for (link, device) in &links {
        let dead = *which == RemoveTarget::AllDead && device.symlink_metadata().is_err();
        if !stale.contains(device) && !dead {
            continue;
        }
        match remove_link(link, device) {
            Ok(()) => gone.push(link.clone()),
            Err(error) => refused.push(RemoveError::Link(link.clone(), error)),
        }
    }
    match which {
        _ if !gone.is_empty() || !refused.is_empty() => Ok(Removal { gone, refused }),
        RemoveTarget::Volume(name) => Err(RemoveError::NoVolume(name.clone())),
        RemoveTarget::Device(path) => Err(RemoveError::NotOurs(path.clone())),
        RemoveTarget::AllDead => Ok(Removal::default()),
    }
}

/// Removes a link that led to `device`. Where our rules for udev are in place, it does so too, at the same time; and the next
/// service may already have made another of that name.
fn remove_link(link: &Path, device: &Path) -> io::Result<()> {
    if ublk::target_of(link).is_ok_and(|target| target != device) {
        return Ok(());
    }
    match fs::remove_file(link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::ublk::{Record, State};
    use std::os::unix::fs::symlink;

    fn info(id: u32, state: State, server: Option<u32>, volume: &str) -> Found {
        let record = Record::new(volume, "null", "64M");
        let owner_tag = record.owner_tag();
        let info = Info { id, queues: 1, depth: 1, max_io: 4096, state, server, flags: 0, owner_tag };
        Found { info, record: Some(record) }
    }

    /// A directory with links: `a` to number 1048575, `b` to 1048574, and a file `c`.
    fn links() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        symlink("/dev/ublkb1048574", dir.path().join("b")).unwrap();
        symlink("/dev/ublkb1048575", dir.path().join("a")).unwrap();
        fs::write(dir.path().join("c"), "").unwrap();
        dir
    }

    fn names(dir: &tempfile::TempDir) -> Vec<String> {
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(name).collect();
        names.sort();
        names
    }

    #[test]
    fn links_are_found_and_files_are_not() {
        let dir = links();
        let found = devices_in(dir.path(), &[]).unwrap();
        let devices: Vec<_> = found.iter().map(|left| left.device.as_path()).collect();
        assert_eq!(devices, [Path::new("/dev/ublkb1048575"), Path::new("/dev/ublkb1048574")]);
        assert!(found.iter().all(|left| left.state == DeviceState::Gone));
        assert_eq!(devices_in(&dir.path().join("none"), &[]).unwrap(), []);
    }

    #[test]
    fn the_driver_knows_more_than_links_tell() {
        let dir = links();
        let us = std::process::id();
        let known = [
            info(1048575, State::Quiesced, Some(us), "a"),
            info(1048574, State::Live, Some(us), "b"),
            info(1048573, State::Dead, None, "lost"),
        ];
        let found = devices_in(dir.path(), &known).unwrap();
        let states: Vec<_> =
            found.iter().map(|left| (left.state, left.server, left.link.is_some())).collect();
        let expected = [
            (DeviceState::Waiting, None, true),
            (DeviceState::Served, Some(us), true),
            (DeviceState::Stale, None, false),
        ];
        assert_eq!(states, expected);
    }

    #[test]
    fn what_is_asked_for_goes_and_nothing_else() {
        let us = std::process::id();
        let known = [
            info(1048575, State::Quiesced, None, "a"),
            info(1048574, State::Live, Some(us), "b"),
            info(1048573, State::Dead, None, "lost"),
        ];
        let run = |which: RemoveTarget| {
            let dir = links();
            let mut removed = Vec::new();
            let result = remove_in(dir.path(), &which, &known, |info| {
                removed.push(info.id);
                Ok(())
            });
            (removed, names(&dir), result.is_ok_and(|removal| removal.refused.is_empty()))
        };
        let all = || ["a", "b", "c"].map(String::from).to_vec();
        let without_a = || ["b", "c"].map(String::from).to_vec();
        assert_eq!(run(RemoveTarget::Volume("a".into())), (vec![1048575], without_a(), true));
        assert_eq!(run(RemoveTarget::Device("/dev/ublkb1048575".into())), (vec![1048575], without_a(), true));
        assert_eq!(run(RemoveTarget::Volume("lost".into())), (vec![1048573], all(), true));
        assert_eq!(run(RemoveTarget::Volume("c".into())), (vec![], all(), false));
        assert_eq!(run(RemoveTarget::Device("/dev/null".into())), (vec![], all(), false));
        let (removed, ..) = run(RemoveTarget::AllDead);
        assert_eq!(removed, [1048575, 1048573], "not the one that is served");
    }

    #[test]
    fn the_link_of_a_disk_that_is_gone_can_be_removed() {
        let dir = links();
        let link = dir.path().join("a");
        let never = |_: &Info| panic!("there is none");
        let removal = remove_in(dir.path(), &RemoveTarget::Device(link.clone()), &[], never).unwrap();
        assert_eq!(removal.gone, [link]);
        assert_eq!(names(&dir), ["b", "c"]);
    }

    #[test]
    fn one_that_has_to_stay_keeps_no_other() {
        let dir = links();
        let known = [
            info(1048574, State::Quiesced, None, "b"),
            info(1048575, State::Quiesced, None, "a"),
            info(1048573, State::Quiesced, None, "none"),
        ];
        // The links of what is gone go too. (No machine has any of them, but that is not asked for those that stay.)
        let removal = remove_in(dir.path(), &RemoveTarget::Volume("a".into()), &known, |_| Ok(())).unwrap();
        assert_eq!((removal.gone.len(), names(&dir)), (2, vec!["b".into(), "c".into()]));
        let dir = links();
        let removal = remove_in(dir.path(), &RemoveTarget::AllDead, &known, |info| match info.id {
            1048574 => Err(RemoveError::InUse { device: info.path(), users: "mounted on /x".into() }),
            _ => Ok(()),
        });
        let removal = removal.unwrap();
        assert_eq!(removal.refused.len(), 1, "{:?}", removal.refused);
        assert!(removal.gone.contains(&"/dev/ublkb1048575".into()), "{:?}", removal.gone);
        assert!(removal.gone.contains(&"/dev/ublkb1048573".into()), "{:?}", removal.gone);
        assert!(!names(&dir).contains(&"a".into()));
    }

    #[test]
    fn udev_may_be_quicker() {
        let dir = links();
        let link = dir.path().join("a");
        let known = [info(1048575, State::Quiesced, None, "a")];
        let removal = remove_in(dir.path(), &RemoveTarget::Volume("a".into()), &known, |_| {
            fs::remove_file(&link).unwrap();
            Ok(())
        });
        assert!(removal.unwrap().refused.is_empty());
        // And so may the next service.
        let dir = links();
        let link = dir.path().join("a");
        let removal = remove_in(dir.path(), &RemoveTarget::Volume("a".into()), &known, |_| {
            fs::remove_file(&link).unwrap();
            symlink("/dev/ublkb1048572", &link).unwrap();
            Ok(())
        });
        assert!(removal.unwrap().refused.is_empty());
        assert_eq!(names(&dir), ["a", "b", "c"]);
    }
}
