//! A listening Unix socket as a file: with its mode from its first moment, never taken from a living service,
//! removed only while it is still ours.

#![forbid(unsafe_code)]

use std::fs::{self, DirBuilder, File, Metadata, TryLockError};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::sys::stat::{self, Mode};
use nix::unistd::{Gid, Uid};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;
/// How often and how long apart the directory's lock is tried: a second in all.
const LOCK_TRIES: u32 = 50;
const LOCK_REST: Duration = Duration::from_millis(20);

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A service answers there.
    #[error("{}: another service is listening there", .0.display())]
    InUse(PathBuf),
    /// A file of another kind has that name.
    #[error("{}: exists and is not a socket, so it is left alone", .0.display())]
    NotASocket(PathBuf),
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
}

/// A listening socket. Dropping it removes the file.
#[derive(Debug)]
pub struct SocketFile {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file we made.
    identity: (u64, u64),
}

impl SocketFile {
    /// Makes the socket and listens. A socket that nobody listens on any more is replaced; the directory is made (0755)
    /// if only its last part is missing.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn bind(path: &Path, access: Access) -> Result<SocketFile, SocketError> {
        let failed = |action, path: &Path, source: io::Error| SocketError::System {
            action,
            path: path.to_owned(),
            source,
        };
        // The working directory may change before the file is removed.
        let path = std::path::absolute(path).map_err(|error| failed("find", path, error))?;
        let dir = path.parent().unwrap_or(Path::new("/"));
        make_dir(dir).map_err(|error| failed("make the directory", dir, error))?;
        // Two services that start together must not both find the same dead socket, and one then remove what the
        // other has just made. The lock goes with the descriptor.
        let _lock = lock_dir(dir).map_err(|error| failed("lock the directory", dir, error))?;
        remove_stale(&path)?;

        let listener = listen(&path, access).map_err(|error| failed("listen on", &path, error))?;
        let made = fs::symlink_metadata(&path).map_err(|error| failed("look at", &path, error))?;
        let socket = SocketFile { listener, path, identity: identity(&made) };
        if made.mode() & 0o777 != access.mode {
            let error = io::Error::other("its mode did not become what was asked for");
            return Err(failed("protect", &socket.path, error));
        }
        Ok(socket)
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
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|found| identity(&found) == self.identity);
        if !ours {
            return;
        }
        if let Err(error) = fs::remove_file(&self.path) {
            log::warn!("cannot remove the socket {}: {error}", self.path.display());
        }
    }
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

fn make_dir(dir: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o755).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Locks a directory for as long as the file is open. Bounded, for anyone who can read it can hold that lock.
fn lock_dir(dir: &Path) -> io::Result<File> {
    let file = File::open(dir)?;
    for _ in 0..LOCK_TRIES {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_REST),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let failed = |action, source| SocketError::System { action, path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {}
        Ok(_) => return Err(SocketError::NotASocket(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at", error)),
    }
    match is_served(path) {
        Ok(true) => Err(SocketError::InUse(path.to_owned())),
        Ok(false) => {
            log::info!("removing the dead socket {}", path.display());
            fs::remove_file(path).map_err(|error| failed("remove the dead socket", error))
        }
        Err(error) => Err(failed("tell whether anyone serves on", error)),
    }
}

/// Whether anyone listens on a socket. Never waits: a service too busy to accept is there all the same.
pub(super) fn is_served(path: &Path) -> io::Result<bool> {
    let fd = new_socket()?;
    match socket::connect(fd.as_raw_fd(), &UnixAddr::new(path)?) {
        Ok(()) | Err(Errno::EAGAIN) => Ok(true),
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?)
}

fn listen(path: &Path, access: Access) -> io::Result<UnixListener> {
    let address = UnixAddr::new(path)?;
    let fd = new_socket()?;
    // On Linux bind() gives the file the mode of the socket's own inode, less the umask. So the file is private from
    // the moment it exists, without touching the umask, which belongs to the whole process. Nobody can connect before
    // listen(), by when it is as it should be.
    stat::fchmod(&fd, Mode::from_bits_truncate(access.mode & 0o600))?;
    socket::bind(fd.as_raw_fd(), &address)?;
    if access.user.is_some() || access.group.is_some() {
        nix::unistd::chown(path, access.user, access.group)?;
    }
    if access.mode & 0o777 != 0o600 {
        fs::set_permissions(path, fs::Permissions::from_mode(access.mode))?;
    }
    let backlog = Backlog::new(BACKLOG).map_err(|_| Errno::EINVAL)?;
    socket::listen(&fd, backlog)?;
    Ok(UnixListener::from(fd))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

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
        assert!(matches!(error, SocketError::InUse(_)), "{error}");
        assert!(error.to_string().contains("another service is listening there"));
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
        assert!(matches!(SocketFile::bind(&path, Access::PRIVATE), Err(SocketError::InUse(_))));
        drop(waiting);
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
        std::os::unix::fs::symlink(&target, &path).unwrap();
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

    #[test]
    fn a_lock_that_is_held_ends_in_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let _held = lock_dir(dir.path()).unwrap();
        let error = SocketFile::bind(&dir.path().join("c.sock"), Access::PRIVATE).unwrap_err();
        assert!(error.to_string().contains("lock"), "{error}");
    }
}
