//! A listening Unix socket as a file: with its owner and mode from its first moment, never taken from a living service,
//! removed only while it is still ours, and the same in a directory that others may change.

#![forbid(unsafe_code)]

mod alive;
mod directory;
mod make;

use std::fmt;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

pub(super) use alive::is_served;
use directory::{Directory, Identity, identity};
use make::NewSocket;
use nix::errno::Errno;
use nix::sys::socket::{self, Backlog};
use nix::unistd::{Gid, Group, Uid, User};
use rustix::fs::{AtFlags, CWD, statat};

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

    /// From now on others can connect. May be tried again.
    ///
    /// # Errors
    /// When our path leads to no file any more, or to another: nobody would find us. The kernel's.
    pub fn listen(&self) -> io::Result<()> {
        if !self.is_found() {
            let reason = "its path does not lead to the socket that was made there: somebody has removed, moved or \
                          replaced it or its directory. Restart the service, or put it back";
            return Err(io::Error::other(reason));
        }
        let backlog = Backlog::new(BACKLOG).map_err(|_| Errno::EINVAL)?;
        Ok(socket::listen(&self.listener, backlog)?)
    }

    /// Whether who connects to our path comes to us. So it is taken to be where we may not look, in a directory of another
    /// user.
    fn is_found(&self) -> bool {
        use rustix::io::Errno;
        match statat(CWD, &self.path, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => identity(&found) == self.identity,
            Err(error) => ![Errno::NOENT, Errno::NOTDIR, Errno::LOOP].contains(&error),
        }
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

#[cfg(test)]
mod tests;
