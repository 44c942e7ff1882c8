//! A listening Unix socket as a file: with its owner and mode from its first moment, never taken from a living service,
//! removed only while it is still ours, and the same in a directory that others may change.

#![forbid(unsafe_code)]

mod directory;

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use directory::{Directory, Identity, Private, identity, through};
use nix::errno::Errno;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr, getsockopt};
use nix::sys::stat::{self, Mode};
use nix::unistd::{Gid, Group, Uid, User};
use rustix::fs::{AtFlags, FileType, chmodat, chownat, unlinkat};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;

/// How often a socket is made anew when another comes into its place in between.
const MAKE_TRIES: u32 = 8;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A service answers there.
    #[error("{}: another service is listening there{who}", path.display())]
    InUse {
        /// Where.
        path: PathBuf,
        /// Who it is, or nothing.
        who: Who,
    },
    /// A file of another kind has that name.
    #[error("{}: exists and is not a socket, so it is left alone", .0.display())]
    NotASocket(PathBuf),
    /// It cannot be given away.
    #[error("{}: cannot make {owner} its owner: only root may give a socket to another user, or to a group that it is not in", path.display())]
    Owner {
        /// The socket, which is not there any more.
        path: PathBuf,
        /// Whose it should be, by name and number.
        owner: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The system refused.
    #[error("socket: cannot {action} {}", path.display())]
    System {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// A process at the other end of a socket, if that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Who(Option<(i32, u32)>);

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |(pid, uid)| write!(f, " (process {pid} of user {uid})"))
    }
}

/// Who may connect.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// Permission bits.
    pub mode: u32,
    /// `None`: whoever runs the service.
    pub user: Option<Uid>,
    /// `None`: the group the service runs as.
    pub group: Option<Gid>,
}

impl Access {
    /// The user who runs the service, and root.
    pub const PRIVATE: Access = Access { mode: 0o600, user: None, group: None };

    /// The owner in words.
    fn owner(&self) -> String {
        let user = self.user.map(|id| match User::from_uid(id) {
            Ok(Some(user)) => format!("user {} ({id})", user.name),
            _ => format!("user {id}"),
        });
        let group = self.group.map(|id| match Group::from_gid(id) {
            Ok(Some(group)) => format!("group {} ({id})", group.name),
            _ => format!("group {id}"),
        });
        user.into_iter().chain(group).collect::<Vec<_>>().join(" and ")
    }
}

/// A listening socket. Dropping it removes the file.
#[derive(Debug)]
pub struct SocketFile {
    listener: UnixListener,
    path: PathBuf,
    dir: Directory,
    name: PathBuf,
    /// Of the file we made.
    identity: Identity,
}

impl SocketFile {
    /// Makes the socket and listens. A socket that nobody listens on any more is replaced; the directory is made (0755)
    /// if only its last part is missing.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn bind(path: &Path, access: Access) -> Result<SocketFile, SocketError> {
        let socket = SocketFile::reserve(path, access)?;
        let failed = |source| SocketError::System { action: "listen on", path: socket.path.clone(), source };
        socket.listen().map_err(failed)?;
        Ok(socket)
    }

    /// Makes the socket without listening: it has its name, owner and mode, and whoever connects is refused.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn reserve(path: &Path, access: Access) -> Result<SocketFile, SocketError> {
        let failed =
            |action, path: &Path, source| SocketError::System { action, path: path.to_owned(), source };
        // The working directory may change before the file is removed.
        let path = std::path::absolute(path).map_err(|error| failed("find", path, error))?;
        let (Some(parent), Some(name)) = (path.parent(), path.file_name().map(PathBuf::from)) else {
            return Err(failed("listen on", &path, io::ErrorKind::IsADirectory.into()));
        };
        let dir = Directory::open(parent).map_err(|error| failed("use the directory", parent, error))?;
        // Two services that start together must not both find the same dead socket, and one then remove what the
        // other has just made. The lock goes with the value.
        let lock = dir.lock().map_err(|error| failed("make a socket in", parent, error))?;
        let new = NewSocket { path: &path, dir: &dir, name: &name, access };
        let mut tries = 0;
        let made = loop {
            new.remove_dead()?;
            tries += 1;
            match new.make() {
                Err(SocketError::System { source, .. })
                    if tries < MAKE_TRIES && source.raw_os_error() == Some(libc::EEXIST) => {}
                other => break other,
            }
        };
        drop(lock);
        let (listener, identity) = made?;
        Ok(SocketFile { listener, path, dir, name, identity })
    }

    /// From now on others can connect.
    ///
    /// # Errors
    /// The kernel's.
    pub fn listen(&self) -> io::Result<()> {
        let backlog = Backlog::new(BACKLOG).map_err(|_| Errno::EINVAL)?;
        Ok(socket::listen(&self.listener, backlog)?)
    }

    /// Where it is, as an absolute path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Another handle to the listening socket, which never blocks.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Nobody of ours replaces it in between: they find it alive as long as we have the listener.
        if let Err(error) = self.dir.remove(&self.name, self.identity) {
            log::warn!("cannot remove the socket {}: {error}", self.path.display());
        }
    }
}

/// A socket to be made.
struct NewSocket<'a> {
    path: &'a Path,
    dir: &'a Directory,
    name: &'a Path,
    access: Access,
}

impl NewSocket<'_> {
    fn failed(&self, action: &'static str) -> impl Fn(io::Error) -> SocketError {
        move |source| SocketError::System { action, path: self.path.to_owned(), source }
    }

    /// Removes a socket on which nobody listens.
    fn remove_dead(&self) -> Result<(), SocketError> {
        let file = match self.dir.look_at(self.name) {
            Ok(file) => file,
            Err(rustix::io::Errno::NOENT) => return Ok(()),
            Err(error) => return Err(self.failed("look at")(error.into())),
        };
        let found = rustix::fs::fstat(&file).map_err(|error| self.failed("look at")(error.into()))?;
        if FileType::from_raw_mode(found.st_mode) != FileType::Socket {
            return Err(SocketError::NotASocket(self.path.to_owned()));
        }
        // What is asked is what will be removed, whatever comes into its place.
        let through = through(&file);
        let asked = if through.exists() { &through } else { self.path };
        let listener = listener_of(asked).map_err(self.failed("tell whether anyone serves on"))?;
        match listener.or_else(|| is_reserved(self.path).then_some(Who(None))) {
            Some(who) => Err(SocketError::InUse { path: self.path.to_owned(), who }),
            None => {
                log::info!("removing the dead socket {}", self.path.display());
                let removed = self.dir.remove(self.name, identity(&found));
                removed.map_err(|error| self.failed("remove the dead socket")(error.into()))
            }
        }
    }

    /// Makes the file, as it should be. Where others could exchange it meanwhile, it is made in a place of
    /// ours and appears when it is done. Nothing is left of one that fails.
    fn make(&self) -> Result<(UnixListener, Identity), SocketError> {
        let fd = new_socket().map_err(self.failed("make"))?;
        let path = self.dir.settled().map(|dir| dir.join(self.name));
        if let Some(path) = path.filter(|path| UnixAddr::new(path).is_ok()) {
            // Its address is the path that everybody knows it by.
            return self.make_in(self.dir, self.name, &path, fd);
        }
        let private = self.dir.private().map_err(self.failed("make a place for"))?;
        let made = self.make_in(&private.inside, Private::FILE.as_ref(), &private.path(), fd)?;
        private.publish(self.name).map_err(|error| self.failed("listen on")(error.into()))?;
        Ok(made)
    }

    /// The same in a directory where nobody but us can exchange it before it has its owner.
    fn make_in(
        &self,
        dir: &Directory,
        name: &Path,
        address: &Path,
        fd: OwnedFd,
    ) -> Result<(UnixListener, Identity), SocketError> {
        // On Linux bind() gives the file the mode of the socket's own inode, less the umask. So the file is private
        // from the moment it exists, without touching the umask, which belongs to the whole process.
        let private = Mode::from_bits_truncate(self.access.mode & 0o600);
        let bound = stat::fchmod(&fd, private)
            .and_then(|()| UnixAddr::new(address))
            .and_then(|address| socket::bind(fd.as_raw_fd(), &address));
        bound.map_err(|error| {
            let exists = error == Errno::EADDRINUSE;
            self.failed("listen on")(if exists { Errno::EEXIST } else { error }.into())
        })?;
        let done = self.finish(dir, name, fd);
        if done.is_err() {
            let _ = unlinkat(dir, name, AtFlags::empty());
        }
        done
    }

    /// Gives the file its mode, then its owner. Nobody can connect before it [listens](SocketFile::listen).
    fn finish(
        &self,
        dir: &Directory,
        name: &Path,
        fd: OwnedFd,
    ) -> Result<(UnixListener, Identity), SocketError> {
        let Access { mode, user, group } = self.access;
        let asked = rustix::fs::Mode::from_raw_mode(mode);
        chmodat(dir, name, asked, AtFlags::empty())
            .map_err(|error| self.failed("set the mode of")(error.into()))?;
        let made = dir.stat(name).map_err(|error| self.failed("look at")(error.into()))?;
        if made.st_mode & 0o777 != mode {
            let error = io::Error::other("its mode did not become what was asked for");
            return Err(self.failed("protect")(error));
        }
        if user.is_some() || group.is_some() {
            let user = user.map(|id| rustix::fs::Uid::from_raw(id.as_raw()));
            let group = group.map(|id| rustix::fs::Gid::from_raw(id.as_raw()));
            chownat(dir, name, user, group, AtFlags::SYMLINK_NOFOLLOW).map_err(|error| {
                SocketError::Owner {
                    path: self.path.to_owned(),
                    owner: self.access.owner(),
                    source: error.into(),
                }
            })?;
        }
        Ok((UnixListener::from(fd), identity(&made)))
    }
}

/// Whether anyone listens on a socket. Never waits: a service too busy to accept is there all the same.
pub(super) fn is_served(path: &Path) -> io::Result<bool> {
    Ok(listener_of(path)?.is_some())
}

/// The same, and who it is.
fn listener_of(path: &Path) -> io::Result<Option<Who>> {
    let fd = new_socket()?;
    match socket::connect(fd.as_raw_fd(), &UnixAddr::new(path)?) {
        Ok(()) => {
            let peer = getsockopt(&fd, PeerCredentials).ok();
            Ok(Some(Who(peer.map(|peer| (peer.pid(), peer.uid())))))
        }
        Err(Errno::EAGAIN) => Ok(Some(Who(None))),
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whether a process has a socket of this name that does not listen yet: the kernel's list has all those that are open, with
/// the paths that they were bound to.
fn is_reserved(path: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let list = std::fs::read("/proc/net/unix").unwrap_or_default();
    let path = path.as_os_str().as_bytes();
    list.split(|byte| *byte == b'\n')
        .any(|line| line.ends_with(path) && line[..line.len() - path.len()].ends_with(b" "))
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::os::unix::net::UnixStream;
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

    #[test]
    fn one_that_does_not_listen_yet_is_alive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock");
        let socket = SocketFile::reserve(&path, Access::PRIVATE).unwrap();
        assert_eq!(UnixStream::connect(&path).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        assert!(matches!(SocketFile::bind(&path, Access::PRIVATE), Err(SocketError::InUse { .. })));
        socket.listen().unwrap();
        UnixStream::connect(&path).unwrap();
        drop(socket);
        SocketFile::bind(&path, Access::PRIVATE).unwrap();
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
                std::mem::forget(file);
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
}
