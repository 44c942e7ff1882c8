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
mod tests;
