//! A look at what a configuration names, before anybody depends on it: images, directories, users, addresses.
//!
//! Nothing is made, opened for writing, claimed, locked or connected to, so that a service which runs does not notice. What only
//! the service itself can find out (a lock, a server that does not answer) is left to it.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::ToSocketAddrs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use nix::unistd::{Gid, Uid, getgroups};
use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::thread::{CapabilitySet, capabilities};

use super::config::{Config, MetricsAddress};
use crate::engine::config::Need;
use crate::engine::nbd;
use crate::frontend::vhost_user::config::VhostUserConfig;

/// Where the ublk driver takes its commands.
const UBLK_CONTROL: &str = "/dev/ublk-control";

/// Whatever would keep the service from starting, for people: a line each, nothing being well.
pub fn problems(config: &Config) -> Vec<String> {
    let volumes = volumes(config, |required| required);
    let control = socket(&config.control).err().map(|problem| match Uid::effective().is_root() {
        true => format!("control: {problem}"),
        false => format!("control: {problem} (another user than root gives --control SOCKET)"),
    });
    let metrics = match &config.metrics {
        Some(MetricsAddress::Unix(at)) => socket(&at.path).err().map(|problem| format!("metrics: {problem}")),
        _ => None,
    };
    let exports = config.vhost_user.iter().filter_map(|export| {
        let problem = socket(&export.socket).and_then(|()| owner(export));
        problem.err().map(|problem| format!("vhost-user {}: {problem}", export.volume))
    });
    volumes.chain(control).chain(metrics).chain(exports).collect()
}

/// What is missing of the volumes that are required, or of the others.
fn volumes(config: &Config, which: impl Fn(bool) -> bool) -> impl Iterator<Item = String> {
    // A base is as much required as what stands on it.
    let required = |name: &str| config.policies.get(name).is_none_or(|policy| policy.required != Some(false));
    let roots = config.roots().filter(|(name, _)| required(name));
    let required: BTreeSet<_> = roots.flat_map(|(name, _)| config.tree(name)).collect();
    let wanted = config.volumes.iter().filter(move |(name, _)| which(required.contains(name.as_str())));
    wanted.flat_map(|(name, volume)| {
        let looks = match volume.summary().needs {
            Some(Need::File { path, write }) => vec![image(path, write).and_then(|()| volume.examine())],
            Some(Need::Server(uri)) => vec![server(uri), volume.examine()],
            None => vec![volume.examine()],
        };
        looks
            .into_iter()
            .filter_map(move |look| look.err().map(|problem| format!("volume {name}: {problem}")))
    })
}

/// What may well be there by the time that it is needed, or is done without.
pub fn warnings(config: &Config) -> Vec<String> {
    let missing = !config.ublk.is_empty() && !Path::new(UBLK_CONTROL).exists();
    let text = format!("there is no {UBLK_CONTROL} yet: `modprobe ublk_drv`, or see `ringblk features`");
    volumes(config, |required| !required).chain(missing.then_some(text)).collect()
}

fn told(path: &Path) -> impl Fn(io::Error) -> String {
    move |error| format!("{}: {error}", path.display())
}

/// Whether we may do that, as whom we act as.
fn may(path: &Path, access: Access) -> Result<(), String> {
    accessat(CWD, path, access, AtFlags::EACCESS).map_err(|error| told(path)(error.into()))
}

fn image(path: &Path, write: bool) -> Result<(), String> {
    let kind = fs::metadata(path).map_err(told(path))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(format!("{}: is neither a file nor a block device", path.display()));
    }
    may(path, if write { Access::READ_OK | Access::WRITE_OK } else { Access::READ_OK })
}

fn server(uri: &str) -> Result<(), String> {
    match nbd::server(uri) {
        Ok(nbd::Server::Unix(path)) => {
            match fs::metadata(&path).map_err(told(&path))?.file_type().is_socket() {
                true => may(&path, Access::WRITE_OK),
                false => Err(format!("{}: is not a socket", path.display())),
            }
        }
        Ok(nbd::Server::Tcp { host, port }) => {
            let found =
                (host.as_str(), port).to_socket_addrs().map(|mut addresses| addresses.next().is_some());
            match found {
                Ok(true) => Ok(()),
                Ok(false) => Err(format!("{host}: has no address")),
                Err(error) => Err(format!("{host}: {error}")),
            }
        }
        Err(error) => Err(error.to_string()),
    }
}

/// A place where a socket can be made, with one directory more if need be.
fn socket(path: &Path) -> Result<(), String> {
    let path = std::path::absolute(path).map_err(told(path))?;
    match fs::symlink_metadata(&path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(format!("{}: exists and is not a socket", path.display()));
        }
        _ => {}
    }
    let Some(dir) = path.parent() else { return Ok(()) };
    let dir = match (fs::metadata(dir), dir.parent()) {
        (Err(error), Some(above)) if error.kind() == io::ErrorKind::NotFound && above.is_dir() => above,
        (Err(error), _) => return Err(told(dir)(error)),
        (Ok(found), _) if !found.is_dir() => return Err(format!("{}: is not a directory", dir.display())),
        _ => dir,
    };
    may(dir, Access::WRITE_OK | Access::EXEC_OK)
}

/// Whether the socket can be given to whom it is meant for, who is there: the configuration was checked.
fn owner(export: &VhostUserConfig) -> Result<(), String> {
    let (user, group) = export.owner_ids()?;
    if capabilities(None).is_ok_and(|all| all.effective.contains(CapabilitySet::CHOWN)) {
        return Ok(());
    }
    let ours = |group: Gid| group == Gid::effective() || getgroups().is_ok_and(|all| all.contains(&group));
    match user.is_none_or(|user| user == Uid::effective()) && group.is_none_or(ours) {
        true => Ok(()),
        false => Err(format!(
            "owner={}: only root may give a socket to another user, or to a group that it is not in",
            export.owner.as_deref().unwrap_or_default()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::config::Loader;

    fn look(volume: &str, socket: &Path, control: &Path) -> Vec<String> {
        let mut loader = Loader::new();
        loader.add_volume_flag(&format!("v={volume}")).unwrap();
        loader.add_vhost_user_flag(&format!("v={}", socket.display())).unwrap();
        loader.set_control(control.to_owned());
        problems(&loader.finish().unwrap())
    }

    #[test]
    fn what_is_not_there_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let control = path("control.sock");
        let image = path("image");
        fs::write(&image, [0; 4096]).unwrap();
        let file = format!("file:{}", image.display());
        let there = std::os::unix::net::UnixListener::bind(path("nbd")).unwrap();
        let nbd = |socket: &str| format!("nbd:nbd+unix:///?socket={}", path(socket).display());
        for (volume, socket) in [
            (&*file, "v.sock"),
            (&file, "new/v.sock"),
            (&nbd("nbd"), "v.sock"),
            ("nbd:nbd://127.0.0.1/x", "v.sock"),
            ("memory:1M", "nbd"),
        ] {
            assert_eq!(look(volume, &path(socket), &control), [""; 0], "{volume} {socket}");
        }
        for (volume, socket, control, words) in [
            ("file:/no/such/image", "v.sock", "c", "volume v: /no/such/image: No such file"),
            ("file:/dev", "v.sock", "c", "neither a file nor a block device"),
            (&*nbd("none"), "v.sock", "c", "none: No such file"),
            (&nbd("image"), "v.sock", "c", "image: is not a socket"),
            ("nbd:nbd://no-such-host.invalid/x", "v.sock", "c", "no-such-host.invalid: "),
            ("memory:1M", "new/new/v.sock", "c", "vhost-user v: "),
            ("memory:1M", "image", "c", "image: exists and is not a socket"),
            ("memory:1M", "image/v.sock", "c", "image: is not a directory"),
            ("memory:1M", "v.sock", "new/new/c", "control: "),
        ] {
            let found = look(volume, &path(socket), &path(control));
            assert!(found.len() == 1 && found[0].contains(words), "{volume} {socket}: {found:?}");
        }
        // What the service itself would find when it opens the image, each with its way out.
        let write = |name: &str, bytes: &[u8]| fs::write(path(name), bytes).unwrap();
        write("qcow2", b"QFI\xfb\0\0\0\x03");
        fs::OpenOptions::new().write(true).open(path("qcow2")).unwrap().set_len(4096).unwrap();
        write("empty", b"");
        write("small", &[0; 1000]);
        for (name, options, words) in [
            ("qcow2", "", "qcow2: is a qcow2 image, not a raw one"),
            ("qcow2", ",read-only=on", "format=raw"),
            ("empty", "", "empty: 0 bytes are less than one logical block of 512"),
            ("small", ",block-size=4096", "small: 1000 bytes are less than"),
        ] {
            let volume = format!("file:{}{options}", path(name).display());
            let found = look(&volume, &path("v.sock"), &control);
            assert!(found.len() == 1 && found[0].contains(words), "{volume}: {found:?}");
        }
        let raw = format!("file:{},format=raw", path("qcow2").display());
        assert_eq!(look(&raw, &path("v.sock"), &control), [""; 0]);
        drop(there);
        // Nothing was made.
        let mut names: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["empty", "image", "nbd", "qcow2", "small"]);
    }

    #[test]
    fn a_volume_that_is_not_required_may_be_missing() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let volume = "file:/no/such/image,required=no";
        assert_eq!(look(volume, &path("v"), &path("c")), [""; 0]);
        let mut loader = Loader::new();
        loader.add_volume_flag(&format!("v={volume}")).unwrap();
        loader.add_vhost_user_flag("v=/v").unwrap();
        let told = warnings(&loader.finish().unwrap());
        assert!(told.len() == 1 && told[0].contains("/no/such/image"), "{told:?}");
        // Nor what it stands on, unless something else does that is required.
        for (other, problems) in [("required=no", 0), ("required=yes", 1), ("on-error=stop", 1)] {
            let mut loader = Loader::new();
            loader.add_volume_flag("base=file:/no/such/image,read-only=on").unwrap();
            loader.add_volume_flag("middle=fault:base").unwrap();
            loader.add_volume_flag("top=fault:middle,required=no").unwrap();
            loader.add_volume_flag(&format!("other=fault:base,{other}")).unwrap();
            for name in ["top", "other"] {
                loader.add_vhost_user_flag(&format!("{name}={}", path(name).display())).unwrap();
            }
            loader.set_control(path("c"));
            let config = loader.finish().unwrap();
            let told = super::problems(&config);
            assert_eq!(told.len(), problems, "{other}: {told:?}");
            assert_eq!(warnings(&config).len(), 1 - problems, "{other}");
        }
    }

    #[test]
    fn the_files_that_tls_takes_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let volume = |options: &str| format!("nbd:nbds://127.0.0.1/x,{options}");
        let (missing, wrong) = (path("missing.pem"), path("wrong.pem"));
        fs::write(&wrong, "no certificate").unwrap();
        let (missing, wrong) = (missing.display(), wrong.display());
        for (options, words) in [
            (format!("tls-ca={missing}"), format!("TLS: tls-ca {missing}: ")),
            (format!("tls-ca={wrong}"), format!("tls-ca {wrong}: there is no certificate in it")),
            (format!("tls-verify=off,tls-cert={missing},tls-key={wrong}"), format!("tls-cert {missing}: ")),
        ] {
            let found = look(&volume(&options), &path("v"), &path("c"));
            assert!(found.len() == 1 && found[0].contains(&words), "{options}: {found:?}");
        }
        assert_eq!(look(&volume("tls-verify=off"), &path("v"), &path("c")), [""; 0]);
        let both = format!("nbd:nbds+unix:///?socket={},tls-ca={missing}", path("none").display());
        assert_eq!(look(&both, &path("v"), &path("c")).len(), 2);
        assert_eq!(look(&format!("{both},required=no"), &path("v"), &path("c")), [""; 0]);
    }

    #[test]
    fn every_problem_is_told_at_once() {
        let found = look("file:/no/such/image", Path::new("/no/such/v"), Path::new("/no/such/c"));
        assert_eq!(found.len(), 3, "{found:?}");
    }
}
