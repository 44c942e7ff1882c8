//! Finding the device that an earlier server of a volume left, and deciding what to do with it.
//!
//! Why no write of the dead server can land after one of ours: its ring has the character device in its file table,
//! and the kernel frees that table only when every operation of the ring is over, writes to the store included; and
//! it lets nobody recover a device whose character device is open. A server that lives does not get here at all.
//! (An NBD server may hold a dead client's last write back for longer than that; no kernel can know.)

#![forbid(unsafe_code)]

use super::commands::{ControlDevice, Failed};
use super::control_thread::delete;
use super::deadline::{EXIT_LIMIT, POLL_INTERVAL, until};
use super::error::{ControlOp, Error};
use super::info::{Info, Ownership};
use super::params::Params;
use super::record::{self, Record};
use super::spec::DeviceSpec;
use crate::block::{Geometry, SECTOR};
use libublk::sys;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Where the kernel lists the devices of the driver.
const DEVICES: &str = "/sys/class/ublk-char";

/// After so long it is said that we wait.
const PATIENCE: Duration = Duration::from_secs(2);

/// The longest that a look may take.
const LOOK_LIMIT: Duration = Duration::from_secs(10);

/// A device of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// What the driver knows of it.
    pub info: Info,
    /// What it is of. `None` where that cannot be told: `/dev/ringblk` was cleared, or is another one than it was for
    /// the server that made it.
    pub record: Option<Record>,
}

/// Every device of ours, by number, whoever serves it.
///
/// # Errors
/// When the driver does not tell us.
pub fn ours() -> Result<Vec<Found>, Error> {
    let mut ids = numbers(Path::new(DEVICES));
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    ids.sort_unstable();
    let failed = |failed| Error::of(ControlOp::Look, failed, None, LOOK_LIMIT);
    let mut driver = ControlDevice::open().map_err(|error| failed(error.into()))?;
    let mut found = Vec::new();
    for id in ids {
        match driver.info(id, until(LOOK_LIMIT)) {
            Ok(info) if info.owner_tag.is_ours() => found.push(Found { record: Record::of(&info), info }),
            Ok(_) => {}
            // It went in the meantime, or was made without privileges, as ours are not.
            Err(Failed::Refused(errno)) if [libc::ENODEV, libc::EINVAL].contains(&errno.raw()) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(found)
}

/// Numbers of all the devices there are.
fn numbers(directory: &Path) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let number = |entry: io::Result<fs::DirEntry>| {
        entry.ok()?.file_name().to_str()?.strip_prefix("ublkc")?.parse::<u32>().ok()
    };
    entries.filter_map(number).collect()
}

impl Found {
    /// Whether it is the one that a server of `wanted`'s volume would want, on whichever store. Without a record the
    /// owner tag must do, which is of the volume and the store.
    fn is_of(&self, wanted: &Record) -> bool {
        match &self.record {
            Some(record) => record.volume == wanted.volume,
            None => self.info.owner_tag == wanted.owner_tag(),
        }
    }

    /// The other volume that it waits for, where that one has the same bytes and is not among `volumes`, whose servers
    /// are on their way. One whose server has just died will wait in a moment, with requests that were not carried out.
    fn other_name(&self, wanted: &Record, volumes: &[&str]) -> Option<&str> {
        let record = self.record.as_ref()?;
        let other = !volumes.contains(&record.volume.as_str());
        // What keeps nothing cannot have the same.
        let same = record.bytes().is_some() && record.bytes() == wanted.bytes();
        let waits = matches!(self.info.ownership(), Ownership::Waiting | Ownership::Exiting);
        (other && same && waits).then_some(&record.volume)
    }
}

/// The one of `all` that waits for a server of `wanted`'s volume; `volumes` are all that are served besides. Waits for a
/// dead server to be gone; removes what is left of a device without a disk.
///
/// # Errors
/// When a process serves it, or it does not get free in a minute, or before it is `given_up`; when the store is that of a disk which waits for a
/// volume of another name.
pub fn find(
    wanted: &Record,
    volumes: &[&str],
    all: &[Found],
    given_up: &AtomicBool,
) -> Result<Option<Found>, Error> {
    let volume = wanted.volume.as_str();
    let (found, others): (Vec<_>, Vec<_>) = all.iter().partition(|found| found.is_of(wanted));
    let found = match found[..] {
        [found] => found,
        [] => {
            let other =
                |found: &&Found| Some((found.info.path(), found.other_name(wanted, volumes)?.to_owned()));
            return match others.iter().find_map(other) {
                None => Ok(None),
                Some((device, other)) => Err(Error::OtherName { device, other, volume: volume.into() }),
            };
        }
        _ => {
            let devices =
                found.iter().map(|found| found.info.path().display().to_string()).collect::<Vec<_>>();
            return Err(Error::Several { volume: volume.into(), devices: devices.join(", ") });
        }
    };
    let refused = |failed| Error::of(ControlOp::Look, failed, Some(found.info.id), LOOK_LIMIT);
    let mut driver = ControlDevice::open().map_err(|error| refused(error.into()))?;
    let since = Instant::now();
    let mut told = false;
    loop {
        let info = match driver.info(found.info.id, until(LOOK_LIMIT)) {
            Ok(now) if now.owner_tag == found.info.owner_tag => now,
            // Gone, or another device by now.
            Ok(_) => return Ok(None),
            Err(failed) if is_gone(failed) => return Ok(None),
            Err(failed) => return Err(refused(failed)),
        };
        let device = info.path();
        match info.ownership() {
            Ownership::Served(pid) => return Err(Error::Served { device, volume: volume.into(), pid }),
            Ownership::Waiting => return Ok(Some(Found { info, record: found.record.clone() })),
            Ownership::Stale => {
                remove_remains(&info, volume)?;
                return Ok(None);
            }
            Ownership::Exiting => {}
        }
        if given_up.load(Ordering::Relaxed) {
            return Err(Error::GivenUp);
        }
        if since.elapsed() > EXIT_LIMIT {
            return Err(Error::Exiting { device, after: since.elapsed() });
        }
        if since.elapsed() > PATIENCE && !told {
            told = true;
            log::info!("{}: waiting for its dead server's last requests", device.display());
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// Deletes a device that has no disk, unless somebody is about to make it one.
fn remove_remains(info: &Info, volume: &str) -> Result<(), Error> {
    let node = PathBuf::from(format!("/dev/ublkc{}", info.id));
    match File::options().read(true).write(true).open(node) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            let pid = info.server.unwrap_or(0);
            return Err(Error::Served { device: info.path(), volume: volume.into(), pid });
        }
        _ => log::info!("{}: its disk is gone; removing what is left", info.path().display()),
    }
    let refused = |failed| Error::of(ControlOp::Delete, failed, Some(info.id), LOOK_LIMIT);
    let mut driver = ControlDevice::open().map_err(|error| refused(error.into()))?;
    Record::remove(info.id);
    delete(&mut driver, info.id).map_err(refused)
}

/// Whether `found` is of the store that `spec` is of, and as it would have made it for a volume that looks like
/// `geometry`. Only its size may differ, and only be smaller than the volume.
///
/// # Errors
/// All that differs, and what to do; or that the driver does not tell.
pub fn check(found: &Found, spec: &DeviceSpec, geometry: &Geometry) -> Result<(), Error> {
    let Found { info, record } = found;
    let refused = |failed| Error::of(ControlOp::Look, failed, Some(info.id), LOOK_LIMIT);
    let mut driver = ControlDevice::open().map_err(|error| refused(error.into()))?;
    let params = driver.params(info.id, until(LOOK_LIMIT)).map_err(refused)?;
    let wanted = Params::new(geometry, spec.max_io, spec.zero_copy);
    let mut differences = differences(info, &params, spec, &wanted, possible_cpus());
    match record {
        Some(record) => differences.extend(other_store(record, &spec.record)),
        None => log::warn!(
            "{}: has no record in {}; its owner tag says that it is volume {}'s, on this store",
            info.path().display(),
            record::directory().display(),
            spec.record.volume
        ),
    }
    if differences.is_empty() {
        return Ok(());
    }
    let volume = spec.record.volume.clone();
    Err(Error::Differs { device: info.path(), volume, differences: differences.join("; ") })
}

/// How the store differs, in words.
fn other_store(own: &Record, wanted: &Record) -> Option<String> {
    if own.store == wanted.store {
        return None;
    }
    let (of, asked) = (&own.target, &wanted.target);
    let text = match of == asked {
        true => format!(
            "store: {of} is not what it was: the disk is of {}, and this is {}",
            own.store, wanted.store
        ),
        false => {
            format!("store: it is of {of} ({}), the configuration's is {asked} ({})", own.store, wanted.store)
        }
    };
    Some(text)
}

/// What differs, in words.
fn differences(found: &Info, params: &Params, spec: &DeviceSpec, wanted: &Params, cpus: u16) -> Vec<String> {
    let asked = spec.info();
    let mut all = Vec::new();
    let mut compare = |name: &str, own: u64, wanted: u64| {
        if own != wanted {
            all.push(format!("{name}: it has {own}, the configuration asks for {wanted}"));
        }
    };
    compare("id", found.id.into(), spec.id.unwrap_or(found.id).into());
    // The kernel grants one a CPU at most.
    compare("queues", found.queues.into(), asked.queues.min(cpus).into());
    compare("depth", found.depth.into(), asked.depth.into());
    compare("max-io", found.max_io.into(), asked.max_io.into());
    for (name, own, wanted) in params.differences(wanted) {
        compare(name, own, wanted);
    }
    for (name, flag) in [
        ("USER_RECOVERY", sys::UBLK_F_USER_RECOVERY),
        ("USER_RECOVERY_REISSUE", sys::UBLK_F_USER_RECOVERY_REISSUE),
        ("USER_RECOVERY_FAIL_IO", sys::UBLK_F_USER_RECOVERY_FAIL_IO),
        ("AUTO_BUF_REG (zero copy)", sys::UBLK_F_AUTO_BUF_REG),
    ] {
        let word = |has| if has { "on" } else { "off" };
        if found.has(flag) != asked.has(flag) {
            let (own, wanted) = (word(found.has(flag)), word(asked.has(flag)));
            all.push(format!("{name}: it is {own}, the configuration asks for {wanted}"));
        }
    }
    if params.sectors() > wanted.sectors() {
        let (own, wanted) = (params.sectors() * SECTOR, wanted.sectors() * SECTOR);
        all.push(format!("size: it has {own} bytes, the volume only {wanted}"));
    }
    all
}

/// CPUs that the kernel could have; the most there can be where it does not say.
fn possible_cpus() -> u16 {
    let text = fs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or_default();
    last_number(&text).and_then(|last| last.checked_add(1)).unwrap_or(u16::MAX)
}

/// The last number of a list like `0-3,8`.
fn last_number(text: &str) -> Option<u16> {
    text.trim().rsplit([',', '-']).next()?.parse().ok()
}

/// Stops and deletes a device that nobody serves. What waits for it fails.
///
/// # Errors
/// When a process serves it, or the driver refuses or does not answer in a minute.
pub fn remove(info: &Info) -> Result<(), Error> {
    let refused = |failed| Error::of(ControlOp::Delete, failed, Some(info.id), EXIT_LIMIT);
    let mut driver = ControlDevice::open().map_err(|error| refused(error.into()))?;
    let mut go_on = until(EXIT_LIMIT);
    loop {
        let info = match driver.info(info.id, &mut go_on) {
            Ok(now) if now.owner_tag == info.owner_tag => now,
            // Gone, or another device by now.
            Ok(_) => return Ok(()),
            Err(failed) if is_gone(failed) => return Ok(()),
            Err(failed) => return Err(refused(failed)),
        };
        match info.ownership() {
            Ownership::Served(pid) => return Err(Error::InService { device: info.path(), pid }),
            // A stop would wait for requests that nobody answers.
            Ownership::Exiting if go_on() => thread::sleep(POLL_INTERVAL),
            Ownership::Exiting => return Err(Error::Exiting { device: info.path(), after: EXIT_LIMIT }),
            Ownership::Waiting | Ownership::Stale => break,
        }
    }
    let gone = |failed| if is_gone(failed) { Ok(()) } else { Err(refused(failed)) };
    driver.plain(sys::UBLK_U_CMD_STOP_DEV, info.id, 0, &mut go_on).or_else(gone)?;
    Record::remove(info.id);
    delete(&mut driver, info.id).or_else(gone)
}

/// Somebody else was quicker.
fn is_gone(failed: Failed) -> bool {
    matches!(failed, Failed::Refused(errno) if errno.raw() == libc::ENODEV)
}

#[cfg(test)]
mod tests {
    use super::super::config::Recovery;
    use super::super::info::{State, sample};
    use super::*;

    fn spec() -> DeviceSpec {
        DeviceSpec {
            record: Record::new("root", "file device=8:1 inode=2 born=3", "/a"),
            id: None,
            queues: 2,
            depth: 128,
            max_io: 512 << 10,
            zero_copy: false,
            recovery: Recovery::Reissue,
            features: u64::MAX,
        }
    }

    fn geometry(bytes: u64) -> Geometry {
        Geometry::new(bytes, 512).unwrap()
    }

    /// What keeps a server of `spec` from a device that was made with `made`.
    fn between(made: &DeviceSpec, spec: &DeviceSpec, sizes: (u64, u64)) -> Vec<String> {
        let info = Info { flags: made.info().flags, depth: made.depth, queues: made.queues, ..sample() };
        let params = |spec: &DeviceSpec, bytes| Params::new(&geometry(bytes), spec.max_io, spec.zero_copy);
        differences(&info, &params(made, sizes.0), spec, &params(spec, sizes.1), 8)
    }

    #[test]
    fn the_same_configuration_recovers() {
        let same = (1 << 20, 1 << 20);
        assert!(between(&spec(), &spec(), same).is_empty());
        // The kernel of another boot is out of the question, but a driver that has more to offer now is not.
        assert!(between(&DeviceSpec { features: 0, ..spec() }, &spec(), same).is_empty());
        assert!(between(&spec(), &DeviceSpec { id: Some(3), ..spec() }, same).is_empty());
        // Sixteen queues on eight CPUs are eight.
        assert!(
            between(&DeviceSpec { queues: 8, ..spec() }, &DeviceSpec { queues: 16, ..spec() }, same)
                .is_empty()
        );
    }

    #[test]
    fn a_disk_is_of_one_store() {
        let own = &spec().record;
        assert_eq!(other_store(own, &Record { target: "/link/to/a".into(), ..own.clone() }), None);
        let other = Record { store: "file device=8:1 inode=4 born=5".into(), ..own.clone() };
        assert!(other_store(own, &other).unwrap().contains("/a is not what it was"));
        let moved = Record { target: "/b".into(), ..other };
        let text = other_store(own, &moved).unwrap();
        assert!(text.contains("of /a (file device=8:1 inode=2") && text.contains("is /b (file"), "{text}");
    }

    #[test]
    fn names_and_stores_find_a_disk() {
        let record = spec().record;
        let found = |record: Option<&Record>, info: Info| Found { info, record: record.cloned() };
        let other = Record { volume: "data".into(), ..record.clone() };
        // By its record, whatever its tag; without one, by the tag of both.
        assert!(found(Some(&record), sample()).is_of(&Record { store: "nbd x".into(), ..record.clone() }));
        assert!(!found(Some(&other), Info { owner_tag: record.owner_tag(), ..sample() }).is_of(&record));
        assert!(found(None, Info { owner_tag: record.owner_tag(), ..sample() }).is_of(&record));
        assert!(!found(None, Info { owner_tag: other.owner_tag(), ..sample() }).is_of(&record));
        // The store of a disk that waits under another name is taken, unless that name is served too.
        let waits = found(Some(&other), sample());
        assert_eq!(waits.other_name(&record, &["root"]), Some("data"));
        assert_eq!(waits.other_name(&record, &["root", "data"]), None);
        let in_state = |state, server| found(Some(&other), Info { state, server, ..sample() });
        let us = Some(std::process::id());
        assert_eq!(
            in_state(State::Live, None).other_name(&record, &[]),
            Some("data"),
            "its server has just died"
        );
        assert_eq!(in_state(State::FailIo, None).other_name(&record, &[]), Some("data"));
        // Two that only read may have it at once, and the lock is for the rest.
        assert_eq!(in_state(State::Live, us).other_name(&record, &[]), None);
        assert_eq!(in_state(State::Dead, None).other_name(&record, &[]), None);
        assert_eq!(waits.other_name(&Record { store: "nbd x".into(), ..record.clone() }, &[]), None);
        let null = |volume: &str| Record { store: "null".into(), volume: volume.into(), ..record.clone() };
        assert_eq!(found(Some(&null("a")), sample()).other_name(&null("b"), &[]), None);
        // Whatever stands on it, here or there: its requests would be carried out over ours.
        let over =
            |record: &Record| Record { store: format!("fault over {}", record.store), ..record.clone() };
        for (had, wanted) in
            [(&other, &over(&record)), (&over(&other), &record), (&over(&over(&other)), &over(&record))]
        {
            assert_eq!(found(Some(had), sample()).other_name(wanted, &[]), Some("data"));
        }
        assert_eq!(found(Some(&over(&null("a"))), sample()).other_name(&over(&null("b")), &[]), None);
    }

    #[test]
    fn whatever_differs_is_named() {
        let same = (1 << 20, 1 << 20);
        for (other, word) in [
            (DeviceSpec { queues: 4, ..spec() }, "queues: it has 2, the configuration asks for 4"),
            (DeviceSpec { depth: 64, ..spec() }, "depth: it has 128, the configuration asks for 64"),
            (DeviceSpec { max_io: 4096, ..spec() }, "max-io: it has 524288"),
            (DeviceSpec { id: Some(4), ..spec() }, "id: it has 3"),
            (DeviceSpec { recovery: Recovery::Off, ..spec() }, "USER_RECOVERY: it is on"),
            (DeviceSpec { recovery: Recovery::Queue, ..spec() }, "USER_RECOVERY_REISSUE: it is on"),
            (DeviceSpec { zero_copy: true, ..spec() }, "zero copy"),
        ] {
            let found = between(&spec(), &other, same);
            assert!(found.iter().any(|text| text.contains(word)), "{word}: {found:?}");
        }
    }

    #[test]
    fn a_volume_may_have_grown_and_not_shrunk() {
        assert!(between(&spec(), &spec(), (1 << 20, 1 << 21)).is_empty());
        let found = between(&spec(), &spec(), (1 << 21, 1 << 20));
        assert_eq!(found, ["size: it has 2097152 bytes, the volume only 1048576"]);
    }

    #[test]
    fn lists_of_cpus() {
        assert_eq!(last_number("0-3\n"), Some(3));
        assert_eq!(last_number("0"), Some(0));
        assert_eq!(last_number("0-3,8"), Some(8));
        assert_eq!(last_number(""), None);
        assert!(possible_cpus() > 0);
    }

    #[test]
    fn devices_are_numbers() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["ublkc3", "ublkc", "ublkcx", "ublkb1"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        assert_eq!(numbers(dir.path()), [3]);
        assert!(numbers(&dir.path().join("none")).is_empty());
    }
}
