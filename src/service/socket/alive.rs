//! Whether a socket is of a process that lives.

#![forbid(unsafe_code)]

use super::Who;
use nix::errno::Errno;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr, getsockopt};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// Whether anyone listens on a socket. Never waits: a service too busy to accept is there all the same.
///
/// # Errors
/// When we may not connect to it.
pub(in crate::service) fn is_served(path: &Path) -> io::Result<bool> {
    Ok(listener_of(path)?.is_some())
}

/// Who has a socket, listening or not. `None`: nobody has it open any more, or it is not there.
///
/// # Errors
/// When we may not connect to it.
pub(super) fn holder_of(path: &Path) -> io::Result<Option<Who>> {
    // A socket of one kind never connects to one of another. The kernel says so of any that a process has open, and
    // refuses the connection where none has: it goes by the inode, so names, links and name spaces do not matter, nor
    // what others call their sockets (/proc/net/unix shows an abstract name of any user as it shows a path).
    let other = new_socket(SockType::Datagram)?;
    match socket::connect(other.as_raw_fd(), &UnixAddr::new(path)?) {
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => Ok(None),
        // It has one of that kind, which would take us, or has a peer already.
        Ok(()) | Err(Errno::EPROTOTYPE | Errno::EPERM) => {
            Ok(Some(listener_of(path).ok().flatten().unwrap_or(Who(None))))
        }
        Err(error) => Err(error.into()),
    }
}

/// Who listens on it.
fn listener_of(path: &Path) -> io::Result<Option<Who>> {
    let fd = new_socket(SockType::Stream)?;
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

/// One that no call waits for.
pub(super) fn new_socket(kind: SockType) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket::socket(AddressFamily::Unix, kind, flags, None)?)
}
