//! The checks that need the whole configuration, run before anything is created.
//!
//! In this order: single values; names; that exports have volumes; that no two things claim the same device, socket
//! or file. The first complaint ends it.

#![forbid(unsafe_code)]

mod groups;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::engine::config::{LimitsConfig, Need, PolicyConfig, TopologyConfig};
use crate::engine::graph;
use crate::frontend::vhost_user::config::VhostUserConfig;

use super::origin::{Item, Origin};
use super::{Config, ConfigError, DEFAULT_CONTROL, Loader, MetricsAddress};

/// Checks all that was collected.
pub(super) fn check(loader: &Loader) -> Result<(), ConfigError> {
    check_values(loader)?;
    check_references(loader)?;
    groups::check(loader)?;
    check_ublk_claims(loader)?;
    check_socket_claims(loader)?;
    check_file_claims(loader)?;
    for warning in serial_claims(loader) {
        log::warn!("{warning}");
    }
    Ok(())
}

fn check_values(loader: &Loader) -> Result<(), ConfigError> {
    if let Some(Item { value, origin }) = &loader.poll_us
        && *value > Config::MAX_POLL_US
    {
        let most = Config::MAX_POLL_US;
        return Err(origin.key_error("poll-us", format!("must be at most {most}, not {value}")));
    }
    if let Some(Item { value, origin }) = &loader.slow_after
        && *value > Config::MAX_SLOW_AFTER
    {
        let most = Config::MAX_SLOW_AFTER;
        return Err(origin.key_error("slow-after", format!("must be at most {most} seconds, not {value}")));
    }
    if let Some(Item { value, origin }) = &loader.workers
        && !(1..=Config::MAX_WORKERS).contains(value)
    {
        let most = Config::MAX_WORKERS;
        return Err(origin.key_error("workers", format!("must be from 1 to {most}, not {value}")));
    }
    if let Some(Item { value, origin }) = &loader.control {
        // The rules of a vhost-user socket's path are those of any socket's.
        VhostUserConfig::new("", value).check().map_err(|(_, reason)| origin.key_error("control", reason))?;
    }
    if let Some(Item { value: MetricsAddress::Unix(socket), origin }) = &loader.metrics {
        socket.check().map_err(|reason| origin.key_error("metrics", reason))?;
    }
    for Item { value, origin } in &loader.allow_paths {
        if !value.is_absolute() {
            return Err(origin.key_error("allow-paths", format!("{} is not absolute", value.display())));
        }
    }
    for (name, Item { value, origin }) in &loader.volumes {
        check_name(name).map_err(|reason| origin.error(reason))?;
        let topology = loader.topologies.get(name).copied().unwrap_or_default();
        let checked = value
            .check()
            .and_then(|()| loader.policies.get(name).map_or(Ok(()), PolicyConfig::check))
            .and_then(|()| topology.check(value.summary().block_size))
            .and_then(|()| loader.limits.get(name).map_or(Ok(()), LimitsConfig::check));
        checked.map_err(|(key, reason)| origin.key_error(key, reason))?;
    }
    for Item { value, origin } in &loader.ublk {
        let checked = value.check();
        checked.map_err(|(key, reason)| origin.key_error(key, reason))?;
    }
    for Item { value, origin } in &loader.vhost_user {
        let checked = value.check();
        checked.map_err(|(key, reason)| origin.key_error(key, reason))?;
    }
    Ok(())
}

/// A volume's name becomes a file name under `/dev/ringblk` and a word in logs.
fn check_name(name: &str) -> Result<(), String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    if (1..=Config::MAX_NAME).contains(&name.len())
        && name.bytes().all(allowed)
        && !name.starts_with(['.', '-'])
    {
        return Ok(());
    }
    let most = Config::MAX_NAME;
    Err(format!(
        "{name:?} is not a name for a volume: 1 to {most} of A-Z a-z 0-9 _ . - and no . or - in front"
    ))
}

fn check_references(loader: &Loader) -> Result<(), ConfigError> {
    let ublk = loader.ublk.iter().map(|item| (&item.value.volume, &item.origin));
    let vhost_user = loader.vhost_user.iter().map(|item| (&item.value.volume, &item.origin));
    let mut exported = Vec::new();
    for (volume, origin) in ublk.chain(vhost_user) {
        if !loader.volumes.contains_key(volume) {
            let reason = format!("there is no volume {volume:?}");
            return Err(ConfigError::new(origin.place("volume"), reason));
        }
        exported.push(volume);
    }
    let bases = check_bases(loader, &exported)?;
    for (name, item) in &loader.volumes {
        if !exported.contains(&name) && !bases.contains(name.as_str()) && !grows(loader) {
            // Not an error: an export that is commented out for a day should not need its volume gone too.
            log::warn!("{}: volume \"{name}\" is not exported", item.origin.place(""));
        }
    }
    if exported.is_empty() && !grows(loader) {
        return Err(ConfigError::new(
            "configuration",
            "nothing to serve: give a volume and a ublk or vhost-user export of it (`ringblk serve --help` has examples)",
        ));
    }
    Ok(())
}

/// Whether something may be added while the service runs.
fn grows(loader: &Loader) -> bool {
    !loader.allow_paths.is_empty() || loader.allow_ublk.as_ref().is_some_and(|item| item.value)
}

/// Which volume stands on which: each on one that is there, none on itself, and what has several users is only read, since
/// they would know nothing of each other's writes. The names of those that others stand on.
fn check_bases<'a>(loader: &'a Loader, exported: &[&String]) -> Result<BTreeSet<&'a str>, ConfigError> {
    let volumes = loader.volumes.iter().map(|(name, item)| (name.clone(), item.value.clone())).collect();
    let based =
        || loader.volumes.values().filter_map(|item| Some((item.value.summary().base?, &item.origin)));
    if let Some((base, origin)) = based().find(|(base, _)| !loader.volumes.contains_key(*base)) {
        return Err(origin.key_error("base", format!("there is no volume {base:?}")));
    }
    for (name, item) in &loader.volumes {
        let tree = graph::tree(&volumes, name);
        tree.map_err(|error| item.origin.key_error("base", error.to_string()))?;
    }
    let mut users: BTreeMap<&str, &Origin> = BTreeMap::new();
    for (base, origin) in based() {
        let first = users.insert(base, origin);
        let other = match first {
            Some(first) => format!("another volume stands on it ({})", first.place("base")),
            None if exported.iter().any(|name| *name == base) => "it is exported".to_owned(),
            None => continue,
        };
        // A layer over what is read-only is so, too.
        let tree = graph::tree(&volumes, base).unwrap_or_default();
        if !tree.iter().any(|(_, below)| below.summary().read_only) {
            let reason = format!("{base:?} must be read-only to have another user: {other}");
            return Err(origin.key_error("base", reason));
        }
    }
    for base in users.keys().filter(|base| !exported.iter().any(|name| name == *base)) {
        let policy = loader.policies.get(*base).is_some_and(|policy| *policy != PolicyConfig::default());
        let topology = loader.topologies.get(*base).is_some_and(|of| *of != TopologyConfig::default());
        if let (true, Some(item)) = (policy || topology, loader.volumes.get(*base)) {
            let keys = PolicyConfig::KEYS.iter().chain(&TopologyConfig::KEYS).copied().collect::<Vec<_>>();
            let reason =
                format!("{} are for a volume that is exported, not for what it stands on", keys.join(", "));
            return Err(item.origin.error(reason));
        }
        let limited = loader.limits.get(*base).is_some_and(|of| *of != LimitsConfig::default());
        if let (true, Some(item)) = (limited, loader.volumes.get(*base)) {
            let reason =
                "limits are for a volume that is exported, not for what it stands on: say them there";
            return Err(ConfigError::new(item.origin.place(LimitsConfig::TABLE), reason));
        }
    }
    Ok(users.into_keys().collect())
}

fn check_ublk_claims(loader: &Loader) -> Result<(), ConfigError> {
    let mut links = Claims::default();
    let mut ids = Claims::default();
    for Item { value, origin } in &loader.ublk {
        let what = format!("/dev/ringblk/{}", value.volume);
        links.claim(value.volume.clone(), "volume", &what, origin)?;
        if let Some(id) = value.id {
            ids.claim(id, "id", &format!("/dev/ublkb{id}"), origin)?;
        }
        // udev names them so, and whoever writes the disk says which there are.
        let disk = partition_of(&value.volume);
        if let Some(disk) = disk.filter(|disk| loader.ublk.iter().any(|other| other.value.volume == *disk)) {
            let reason = format!("{what} is what a partition of volume {disk} is called: take another name");
            return Err(ConfigError::new(origin.place("volume"), reason));
        }
    }
    Ok(())
}

/// The disk that `name` would be the name of a partition of.
fn partition_of(name: &str) -> Option<&str> {
    let (disk, number) = name.rsplit_once("-part")?;
    (!number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())).then_some(disk)
}

fn check_socket_claims(loader: &Loader) -> Result<(), ConfigError> {
    let mut sockets = Claims::default();
    let default = Item::new(DEFAULT_CONTROL.into(), Origin::Flag("the control socket".into()));
    let control = loader.control.as_ref().unwrap_or(&default);
    let what = control.value.display().to_string();
    sockets.claim(place_of(&control.value), "control", &what, &control.origin)?;
    if let Some(Item { value: MetricsAddress::Unix(socket), origin }) = &loader.metrics {
        sockets.claim(place_of(&socket.path), "metrics", &socket.path.display().to_string(), origin)?;
    }
    for Item { value, origin } in &loader.vhost_user {
        let what = value.socket.display().to_string();
        sockets.claim(place_of(&value.socket), "socket", &what, origin)?;
    }
    Ok(())
}

/// What is odd about serial numbers, and no error: a guest that is given both disks takes them for one, by two ways.
fn serial_claims(loader: &Loader) -> Vec<String> {
    let mut serials: BTreeMap<String, (&str, &Origin)> = BTreeMap::new();
    let mut warnings = Vec::new();
    for Item { value, origin } in &loader.vhost_user {
        let serial = value.serial();
        let (first, at) = *serials.entry(serial.clone()).or_insert((&value.volume, origin));
        if first != value.volume {
            let (place, first) = (origin.place("serial"), at.place("serial"));
            warnings.push(format!(
                "{place}: {serial:?} is the serial number of another volume's disk, too ({first})"
            ));
        }
    }
    warnings
}

/// Two volumes on one file know nothing of each other's writes, so a file may be opened twice only to be read.
fn check_file_claims(loader: &Loader) -> Result<(), ConfigError> {
    let mut files: BTreeMap<PathBuf, (bool, &Origin)> = BTreeMap::new();
    for Item { value, origin } in loader.volumes.values() {
        let Some(Need::File { path, write }) = value.summary().needs else {
            continue;
        };
        match files.entry(place_of(path)) {
            Entry::Vacant(entry) => {
                entry.insert((write, origin));
            }
            Entry::Occupied(entry) => {
                let (first_writes, first) = *entry.get();
                if write || first_writes {
                    let reason = format!(
                        "{} belongs to another volume ({}); both would have to be read-only, or export one volume twice",
                        path.display(),
                        first.place("path")
                    );
                    return Err(origin.key_error("path", reason));
                }
            }
        }
    }
    Ok(())
}

/// Things that only one item may have.
struct Claims<'a, K>(BTreeMap<K, &'a Origin>);

impl<K> Default for Claims<'_, K> {
    fn default() -> Self {
        Claims(BTreeMap::new())
    }
}

impl<'a, K: Ord> Claims<'a, K> {
    fn claim(&mut self, thing: K, key: &str, shown: &str, origin: &'a Origin) -> Result<(), ConfigError> {
        match self.0.entry(thing) {
            Entry::Vacant(entry) => {
                entry.insert(origin);
                Ok(())
            }
            Entry::Occupied(entry) => {
                let first = entry.get().place(key);
                Err(origin.key_error(key, format!("{shown} is already taken ({first})")))
            }
        }
    }
}

/// The same text for two spellings of one path, as far as that can be known before the file exists.
fn place_of(path: &Path) -> PathBuf {
    if let Ok(real) = path.canonicalize() {
        return real;
    }
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    match (absolute.parent().map(Path::canonicalize), absolute.file_name()) {
        (Some(Ok(parent)), Some(name)) => parent.join(name),
        _ => absolute,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Flags by their first word, in one loader.
    fn load(flags: &[(&str, &str)]) -> Result<Config, String> {
        let mut loader = Loader::new();
        for (flag, text) in flags {
            match *flag {
                "volume" => loader.add_volume_flag(text).unwrap(),
                "ublk" => loader.add_ublk_flag(text).unwrap(),
                "vhost-user" => loader.add_vhost_user_flag(text).unwrap(),
                "control" => loader.set_control(text.into()),
                "workers" => loader.set_workers(text.parse().unwrap()),
                "poll-us" => loader.set_poll_us(text.parse().unwrap()),
                "slow-after" => loader.set_slow_after(text.parse().unwrap()),
                other => panic!("{other}"),
            }
        }
        loader.finish().map_err(|error| error.to_string())
    }

    fn refused(flags: &[(&str, &str)], place: &str, word: &str) {
        let error = load(flags).unwrap_err();
        assert!(error.starts_with(place), "{error}");
        assert!(error.contains(word), "{error}");
    }

    const A: (&str, &str) = ("volume", "a=null:1G");
    const UBLK_A: (&str, &str) = ("ublk", "a");

    #[test]
    fn single_values_are_checked() {
        for workers in ["0", "1025"] {
            refused(&[A, UBLK_A, ("workers", workers)], "--workers", "1024");
        }
        refused(&[A, UBLK_A, ("poll-us", "10001")], "--poll-us", "10000");
        refused(&[A, UBLK_A, ("slow-after", "86401")], "--slow-after", "86400");
        refused(
            &[("volume", "a=null:1G,on-error=retry,retry-for=0"), UBLK_A],
            "--volume a=null",
            "retry-for",
        );
        refused(&[("volume", "a=null:1G,retry-for=9"), UBLK_A], "--volume a=null", "on-error=retry");
        refused(&[A, UBLK_A, ("control", "")], "--control", "path");
        refused(&[A, UBLK_A, ("control", &"x".repeat(108))], "--control", "107");
        refused(&[("volume", "a=null:1000"), UBLK_A], "--volume a=null:1000", "size");
        refused(&[A, ("ublk", "a,depth=0")], "--ublk a,depth=0", "depth");
        refused(&[A, ("vhost-user", "a=/s,queues=0")], "--vhost-user", "queues");
        refused(
            &[("volume", "a=null:1G,iops-read=9,iops-total=9"), UBLK_A],
            "--volume a=null",
            "iops-read: ",
        );
        let fine = "a=null:1G,block-size=4096,physical-block=512";
        refused(&[("volume", fine), UBLK_A], "--volume a=null", "physical-block");
    }

    #[test]
    fn names_are_checked() {
        let long = "x".repeat(33);
        for name in ["", ".a", "-a", "..", "a/b", "a b", "ä", "a\nb", &long] {
            let flag = format!("{name}=null:1G");
            refused(&[("volume", &flag)], "--volume", "not a name");
        }
        for name in ["a", "A_1.b-c", "_", "0", &"x".repeat(32)] {
            load(&[("volume", &format!("{name}=null:1G")), ("ublk", name)]).unwrap();
        }
    }

    #[test]
    fn a_disk_is_not_called_like_anothers_partition() {
        let with = |name| [A, UBLK_A, ("volume", name), ("ublk", name.split('=').next().unwrap())];
        refused(&with("a-part1=null:1G"), "--ublk a-part1", "partition of volume a");
        for name in ["a-part=null:1G", "a-partx=null:1G", "b-part1=null:1G", "a-part1-b=null:1G"] {
            load(&with(name)).unwrap();
        }
        // A virtual machine's disk has no partitions here.
        load(&[A, ("vhost-user", "a=/s"), ("volume", "a-part1=null:1G"), ("ublk", "a-part1")]).unwrap();
    }

    #[test]
    fn volumes_and_exports_must_match() {
        refused(&[], "configuration", "nothing to serve");
        refused(&[A], "configuration", "nothing to serve");
        load(&[A, UBLK_A, ("volume", "spare=null:1G")]).unwrap();
        refused(&[UBLK_A], "--ublk a", "no volume \"a\"");
        refused(&[A, UBLK_A, ("vhost-user", "b=/s")], "--vhost-user b=/s", "no volume \"b\"");
    }

    #[test]
    fn volumes_stand_on_others() {
        let on = |name: &'static str, base: &str| ("volume", format!("{name}=fault:{base}"));
        let load = |flags: &[(&'static str, String)]| {
            let flags: Vec<_> = flags.iter().map(|(flag, text)| (*flag, text.as_str())).collect();
            load(&flags)
        };
        let (a, b) = (("volume", "a=null:1G".to_owned()), ("ublk", "b".to_owned()));
        let golden = ("volume", "a=file:/x,read-only=on".to_owned());
        let config = load(&[a.clone(), on("b", "a"), b.clone()]).unwrap();
        assert_eq!(config.roots().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["b"]);
        let config =
            load(&[golden.clone(), on("b", "a"), on("c", "a"), b.clone(), ("ublk", "a".into())]).unwrap();
        assert_eq!(config.roots().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(config.needs("b").count(), 1);
        assert_eq!((&*config.store_of("b"), &*config.store_of("a")), ("/x", "/x"), "no name of a volume");
        assert_eq!(config.bases().count(), 0, "one that is exported is a volume like others");
        // Nobody writes to what stands on something that is read-only.
        let config = load(&[golden.clone(), on("m", "a"), on("b", "m"), on("c", "m"), b.clone()]).unwrap();
        let bases: BTreeMap<_, _> = config.bases().collect();
        assert_eq!(bases, BTreeMap::from([("a", "c"), ("m", "c")]));
        for (flags, place, word) in [
            (vec![on("b", "x"), b.clone()], "--volume b=fault:x: base", "no volume \"x\""),
            (vec![on("b", "b"), b.clone()], "--volume b=fault:b: base", "b stands on b"),
            (
                vec![on("b", "c"), on("c", "d"), on("d", "b"), b.clone()],
                "--volume b=fault:c: base",
                "b stands on c stands on d stands on b",
            ),
            (
                vec![a.clone(), on("b", "a"), on("c", "a"), b.clone()],
                "--volume c=fault:a: base",
                "(--volume b=fault:a)",
            ),
            (
                vec![a.clone(), on("b", "a"), ("ublk", "a".into()), b.clone()],
                "--volume b=fault:a: base",
                "it is exported",
            ),
            (
                vec![("volume", "a=null:1G,on-error=stop".into()), on("b", "a"), b.clone()],
                "--volume a=null:1G,on-error=stop",
                "for a volume that is exported",
            ),
            (
                vec![("volume", "a=null:1G,iops-total=5".into()), on("b", "a"), b.clone()],
                "--volume a=null:1G,iops-total=5: limits",
                "for a volume that is exported",
            ),
        ] {
            let error = load(&flags).unwrap_err();
            assert!(error.starts_with(place) && error.contains(word), "{error}");
        }
        let mut tall = vec![a.clone(), ("ublk", "v33".into())];
        for number in 1..=33 {
            let base = if number == 1 { "a".to_owned() } else { format!("v{}", number - 1) };
            tall.push(("volume", format!("v{number}=fault:{base}")));
        }
        assert!(load(&tall).unwrap_err().contains("more than 32"));
    }

    #[test]
    fn one_volume_behind_both_doors_is_fine() {
        let both = [A, UBLK_A, ("vhost-user", "a=/run/1"), ("vhost-user", "a=/run/2,read-only=on")];
        let config = load(&both).unwrap();
        assert_eq!((config.ublk.len(), config.vhost_user.len()), (1, 2));
    }

    #[test]
    fn devices_are_claimed_once() {
        refused(
            &[A, UBLK_A, ("ublk", "a,id=3")],
            "--ublk a,id=3",
            "/dev/ringblk/a is already taken (--ublk a)",
        );
        let b = ("volume", "b=null:1G");
        refused(&[A, b, ("ublk", "a,id=3"), ("ublk", "b,id=3")], "--ublk b,id=3", "/dev/ublkb3");
        load(&[A, b, ("ublk", "a,id=3"), ("ublk", "b,id=4")]).unwrap();
    }

    #[test]
    fn sockets_are_claimed_once_whatever_their_spelling() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().display().to_string();
        std::os::unix::fs::symlink(dir.path(), dir.path().join("link")).unwrap();
        let first = format!("a={base}/s");
        for same in ["s", "./s", "link/s", "../../{}/s"] {
            let same = match same {
                "../../{}/s" => format!("a={base}/link/link/s"),
                _ => format!("a={base}/{same}"),
            };
            let flags = [A, ("vhost-user", &*first), ("vhost-user", &*same)];
            refused(&flags, &format!("--vhost-user {same}"), "already taken");
        }
        let control = format!("{base}/s");
        refused(
            &[A, ("control", &control), ("vhost-user", &first)],
            "--vhost-user",
            "already taken (--control",
        );
        let default = format!("a={DEFAULT_CONTROL}");
        refused(&[A, ("vhost-user", &default)], "--vhost-user", "(the control socket)");
    }

    #[test]
    fn disks_of_one_serial_number_are_told_of() {
        let warnings = |exports: &[&str]| {
            let mut loader = Loader::new();
            for volume in ["a", "b", "name-of-twenty-bytes-1", "name-of-twenty-bytes-2"] {
                loader.add_volume_flag(&format!("{volume}=null:1G")).unwrap();
            }
            exports.iter().for_each(|text| loader.add_vhost_user_flag(text).unwrap());
            serial_claims(&loader)
        };
        assert!(
            warnings(&["a=/1", "b=/2", "a=/3", "a=/4,read-only=on"]).is_empty(),
            "one volume is one disk"
        );
        assert!(warnings(&["name-of-twenty-bytes-1=/1", "name-of-twenty-bytes-2=/2"]).is_empty());
        let found = warnings(&["a=/1", "b=/2,serial=a"]);
        assert_eq!(found.len(), 1);
        assert!(
            found[0].contains("--vhost-user b=/2,serial=a") && found[0].contains("(--vhost-user a=/1)"),
            "{found:?}"
        );
    }

    #[test]
    fn a_file_has_one_writer() {
        let ublk = [UBLK_A, ("ublk", "b")];
        let with = |a: &'static str, b: &'static str| load(&[("volume", a), ("volume", b), ublk[0], ublk[1]]);
        let error = with("a=file:/x/y", "b=file:/x/./y").unwrap_err();
        assert!(error.contains("another volume (--volume a=file:/x/y)"), "{error}");
        assert!(with("a=file:/x/y,read-only=on", "b=file:/x/y").is_err());
        assert!(with("a=file:/x/y,read-only=on", "b=file:/x/y,read-only=on").is_ok());
        assert!(with("a=file:/x/y", "b=file:/x/z").is_ok());
    }

    #[test]
    fn the_line_of_a_base_is_named() {
        let text = "[volume.a]\ndriver = \"fault\"\n\nbase = \"b\"\n\n[[ublk]]\nvolume = \"a\"\n";
        let mut loader = Loader::new();
        loader.add_text(Path::new("r.toml"), text).unwrap();
        assert_eq!(loader.finish().unwrap_err().to_string(), "r.toml:4: base: there is no volume \"b\"");
    }

    #[test]
    fn the_line_of_the_key_is_named() {
        let text = "[volume.a]\ndriver = \"null\"\nsize = \"1G\"\n\n[[ublk]]\nvolume = \"a\"\n\ndepth = 0\n";
        let mut loader = Loader::new();
        loader.add_text(Path::new("r.toml"), text).unwrap();
        let error = loader.finish().unwrap_err();
        assert_eq!(error.to_string(), "r.toml:8: depth: must be from 1 to 4096, not 0");
    }
}
