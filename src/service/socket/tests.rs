//! Sockets that are made, found, and left alone.

use super::*;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{SockType, UnixAddr};
use nix::sys::stat::Mode;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn private_and_removed_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new").join("c.sock");
    let socket = SocketFile::bind(&path, Access::PRIVATE).unwrap();
    assert_eq!(mode(&path), 0o600);
    assert_eq!(socket.path(), path);
    drop(socket);
    assert!(!path.exists());
    assert!(path.parent().unwrap().exists());
}

#[test]
fn the_mode_asked_for_whatever_the_umask() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.sock");
    for asked in [0o600, 0o660, 0o666, 0o400] {
        let access = Access { mode: asked, group: Some(nix::unistd::getgid()), ..Access::PRIVATE };
        let socket = SocketFile::bind(&path, access).unwrap();
        assert_eq!(mode(&path), asked);
        drop(socket);
    }
}

#[test]
fn a_living_service_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.sock");
    let first = SocketFile::bind(&path, Access::PRIVATE).unwrap();
    let error = SocketFile::bind(&path, Access::PRIVATE).unwrap_err();
    assert!(matches!(error, SocketError::InUse { .. }), "{error}");
    let us = format!("another service is listening there (process {} of user ", std::process::id());
    assert!(error.to_string().contains(&us), "{error}");
    assert!(path.exists());
    drop(first);
    SocketFile::bind(&path, Access::PRIVATE).unwrap();
}

#[test]
fn a_service_too_busy_to_accept_is_alive() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.sock");
    let _socket = SocketFile::bind(&path, Access::PRIVATE).unwrap();
    // Nobody accepts; fill the listen queue.
    let waiting: Vec<_> = (0..=BACKLOG).map(|_| UnixStream::connect(&path).unwrap()).collect();
    assert!(is_served(&path).unwrap());
    assert!(matches!(SocketFile::bind(&path, Access::PRIVATE), Err(SocketError::InUse { .. })));
    drop(waiting);
}

/// By whatever name it was made and is asked for.
#[test]
fn one_that_does_not_listen_yet_is_alive() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("real")).unwrap();
    symlink("real", dir.path().join("link")).unwrap();
    fs::create_dir(dir.path().join("open")).unwrap();
    fs::set_permissions(dir.path().join("open"), fs::Permissions::from_mode(0o777)).unwrap();
    for (made, asked) in
        [("real", "real"), ("link", "link"), ("link", "real"), ("real", "link"), ("open", "open")]
    {
        let [made, path] = [made, asked].map(|parent| dir.path().join(parent).join("c.sock"));
        let socket = SocketFile::reserve(&made, Access::PRIVATE).unwrap();
        assert_eq!(UnixStream::connect(&path).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let in_use = || matches!(SocketFile::bind(&path, Access::PRIVATE), Err(SocketError::InUse { .. }));
        assert!(in_use(), "{}", path.display());
        // As a service in a container would ask. Only root may make such a thread.
        let elsewhere = || match unshare(CloneFlags::CLONE_NEWNET) {
            Ok(()) => in_use(),
            Err(error) => {
                assert!(!Uid::effective().is_root() || error == Errno::EPERM, "{error}");
                true
            }
        };
        assert!(std::thread::scope(|scope| scope.spawn(elsewhere).join().unwrap()), "{}", path.display());
        socket.listen().unwrap();
        UnixStream::connect(&path).unwrap();
        drop(socket);
        SocketFile::bind(&path, Access::PRIVATE).unwrap();
    }
}

/// Anybody may choose a name that has no file.
#[test]
fn what_others_call_their_sockets_does_not_matter() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.sock");
    let dead = UnixListener::bind(&path).unwrap();
    drop(dead);
    let names = [format!("x {}", path.display()), path.display().to_string()];
    let _planted =
        names.map(|name| UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap());
    SocketFile::bind(&path, Access::PRIVATE).unwrap();
}

#[test]
fn sockets_of_other_kinds_are_left_alone_while_they_live() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.sock");
    for kind in [SockType::Datagram, SockType::SeqPacket] {
        let living = alive::new_socket(kind).unwrap();
        socket::bind(living.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        assert!(
            matches!(SocketFile::bind(&path, Access::PRIVATE), Err(SocketError::InUse { .. })),
            "{kind:?}"
        );
        drop(living);
        drop(SocketFile::bind(&path, Access::PRIVATE).unwrap());
    }
}

#[test]
fn a_dead_socket_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.sock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let socket = SocketFile::bind(&path, Access::PRIVATE).unwrap();
    UnixStream::connect(socket.path()).unwrap();
}

#[test]
fn other_files_are_never_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.sock");
    fs::write(&path, "precious").unwrap();
    let error = SocketFile::bind(&path, Access::PRIVATE).unwrap_err();
    assert!(matches!(error, SocketError::NotASocket(_)), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"precious");

    let target = dir.path().join("dead.sock");
    drop(UnixListener::bind(&target).unwrap());
    fs::remove_file(&path).unwrap();
    symlink(&target, &path).unwrap();
    assert!(matches!(SocketFile::bind(&path, Access::PRIVATE), Err(SocketError::NotASocket(_))));
    assert!(target.exists());
}

#[test]
fn what_took_our_place_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.sock");
    let socket = SocketFile::bind(&path, Access::PRIVATE).unwrap();
    fs::rename(&path, dir.path().join("away")).unwrap();
    fs::write(&path, "another").unwrap();
    drop(socket);
    assert_eq!(fs::read(&path).unwrap(), b"another");
}

/// Between the making of a socket and its volume's coming there may be days.
#[test]
fn what_took_our_place_is_noticed_before_we_listen() {
    let dir = tempfile::tempdir().unwrap();
    let (here, away) = (dir.path().join("here"), dir.path().join("away"));
    let path = here.join("c.sock");
    let socket = SocketFile::reserve(&path, Access::PRIVATE).unwrap();
    let refused = |what: &str| {
        let error = socket.listen().expect_err(what);
        assert!(error.to_string().contains("its path does not lead to the socket"), "{what}: {error}");
    };
    let kept = here.join("kept");
    fs::rename(&path, &kept).unwrap();
    refused("removed");
    let other = UnixListener::bind(&path).unwrap();
    refused("replaced");
    symlink(&kept, here.join("link")).unwrap();
    fs::rename(here.join("link"), &path).unwrap();
    refused("a link");
    fs::rename(&here, &away).unwrap();
    refused("its directory removed");
    fs::write(&here, "").unwrap();
    refused("no directory");
    fs::remove_file(&here).unwrap();
    fs::rename(&away, &here).unwrap();
    fs::rename(&kept, &path).unwrap();
    socket.listen().unwrap();
    UnixStream::connect(&path).unwrap();
    drop(other);
}

/// A directory whose owner may be anybody, and what is in it.
fn open_to_all() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let open = dir.path().join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    (dir, open)
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_lock_that_is_held_ends_in_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let place = Directory::open(dir.path()).unwrap();
    let held = place.lock().unwrap().unwrap();
    let path = dir.path().join("c.sock");
    let error = SocketFile::bind(&path, Access::PRIVATE).unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("another ringblk has had its lock"), "{error}: {cause}");
    drop(held);
    let _socket = SocketFile::bind(&path, Access::PRIVATE).unwrap();
    assert_eq!(names(dir.path()), ["c.sock"], "the lock stays");
}

#[test]
fn nobody_else_can_hold_the_lock() {
    let (_dir, open) = open_to_all();
    let path = open.join("c.sock");
    // Whoever may look into the directory may lock that.
    let whole = fs::File::open(&open).unwrap();
    whole.lock().unwrap();
    drop(SocketFile::bind(&path, Access::PRIVATE).unwrap());
    // A file that others may open, a link to one of ours, one with another name, a pipe, a directory.
    let lock = open.join(".ringblk.lock");
    let mine = open.join("mine");
    let held = fs::File::create(&mine).unwrap();
    held.set_permissions(fs::Permissions::from_mode(0o600)).unwrap();
    held.lock().unwrap();
    let plants: [&dyn Fn(); 5] = [
        &|| {
            let file = fs::File::create(&lock).unwrap();
            file.set_permissions(fs::Permissions::from_mode(0o666)).unwrap();
            file.lock().unwrap();
            let _ = std::os::fd::IntoRawFd::into_raw_fd(file);
        },
        &|| symlink(&mine, &lock).unwrap(),
        &|| fs::hard_link(&mine, &lock).unwrap(),
        &|| nix::unistd::mkfifo(&lock, Mode::S_IRWXU).unwrap(),
        &|| fs::create_dir(&lock).unwrap(),
    ];
    for plant in plants {
        plant();
        let socket = SocketFile::bind(&path, Access::PRIVATE).unwrap();
        UnixStream::connect(socket.path()).unwrap();
        drop(socket);
        assert_eq!(names(&open), ["mine"]);
    }
    // One that cannot be removed.
    fs::create_dir_all(lock.join("full")).unwrap();
    UnixStream::connect(SocketFile::bind(&path, Access::PRIVATE).unwrap().path()).unwrap();
}

#[test]
fn where_others_may_write_it_appears_when_it_is_done() {
    let (_dir, open) = open_to_all();
    let path = open.join("c.sock");
    let access = Access { mode: 0o660, group: Some(nix::unistd::getgid()), ..Access::PRIVATE };
    let socket = SocketFile::bind(&path, access).unwrap();
    assert_eq!((mode(&path), &*names(&open)), (0o660, &["c.sock".to_owned()][..]));
    let place = socket.listener().unwrap().local_addr().unwrap();
    assert!(place.as_pathname().unwrap().starts_with("/proc/self/fd"), "{place:?}");
    UnixStream::connect(&path).unwrap();
    assert!(matches!(SocketFile::bind(&path, access), Err(SocketError::InUse { .. })));
    drop(socket);
    // A dead one is replaced there, too.
    drop(UnixListener::bind(&path).unwrap());
    drop(SocketFile::bind(&path, access).unwrap());
    assert_eq!(names(&open), [""; 0]);
    // The longest name of all.
    let long = open.join("x".repeat(107 - open.as_os_str().len() - 1));
    UnixStream::connect(SocketFile::bind(&long, access).unwrap().path()).unwrap();
}

#[test]
fn where_nobody_else_may_write_its_address_is_its_path() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("link");
    fs::create_dir(dir.path().join("real")).unwrap();
    symlink("real", &link).unwrap();
    let socket = SocketFile::bind(&link.join("c.sock"), Access::PRIVATE).unwrap();
    let place = socket.listener().unwrap().local_addr().unwrap();
    assert_eq!(place.as_pathname(), Some(&*dir.path().join("real/c.sock")));
    // Not where a directory above it may be exchanged.
    let (_dir, open) = open_to_all();
    fs::create_dir(open.join("ours")).unwrap();
    assert_eq!(Directory::open(&open.join("ours")).unwrap().settled(), None);
}

#[test]
fn nobody_has_us_change_another_file() {
    let (dir, open) = open_to_all();
    let (path, victim) = (open.join("c.sock"), dir.path().join("victim"));
    fs::write(&victim, "secret").unwrap();
    fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let link = open.join("link");
            while !over.load(Ordering::Relaxed) {
                let _ = symlink(&victim, &link);
                if path.exists() {
                    let _ = fs::rename(&link, &path);
                }
                let _ = fs::remove_file(&path);
            }
        });
        for _ in 0..500 {
            let access = Access { mode: 0o666, group: Some(nix::unistd::getgid()), ..Access::PRIVATE };
            drop(SocketFile::bind(&path, access));
        }
        over.store(true, Ordering::Relaxed);
    });
    assert_eq!((mode(&victim), fs::read(&victim).unwrap()), (0o600, b"secret".to_vec()));
}

#[test]
fn what_cannot_have_its_owner_leaves_nothing() {
    let (_dir, open) = open_to_all();
    for (mode, dir) in [(0o777, &open), (0o755, &open)] {
        fs::set_permissions(dir, fs::Permissions::from_mode(mode)).unwrap();
        let refused = Access { user: Some(Uid::from_raw(u32::MAX - 1)), ..Access::PRIVATE };
        // Root may do this, another user may not: either way nothing stays.
        match SocketFile::bind(&dir.join("c.sock"), refused) {
            Ok(socket) => drop(socket),
            Err(error) => {
                assert!(error.to_string().contains("cannot make user 4294967294 its owner"), "{error}");
            }
        }
        assert_eq!(names(dir), [""; 0]);
    }
}

#[test]
fn a_directory_that_is_moved_away_keeps_its_socket_to_itself() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    let socket = SocketFile::bind(&here.join("c.sock"), Access::PRIVATE).unwrap();
    fs::rename(&here, &there).unwrap();
    fs::create_dir(&here).unwrap();
    fs::hard_link(there.join("c.sock"), here.join("c.sock")).unwrap();
    drop(socket);
    assert_eq!((names(&here), names(&there)), (vec!["c.sock".into()], vec![]));
}
