//! How the file of a socket is made.

#![forbid(unsafe_code)]

use super::alive::{holder_of, new_socket};
use super::directory::{Directory, Identity, Private, identity, through};
use super::{Access, SocketError};
use nix::errno::Errno;
use nix::sys::socket::{self, SockType, UnixAddr};
use nix::sys::stat::{self, Mode};
use rustix::fs::{AtFlags, FileType, chmodat, chownat, unlinkat};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

/// A socket to be made.
pub(super) struct NewSocket<'a> {
    pub path: &'a Path,
    pub dir: &'a Directory,
    pub name: &'a Path,
    pub access: Access,
}

impl NewSocket<'_> {
    fn failed(&self, action: &'static str) -> impl Fn(io::Error) -> SocketError {
        move |source| SocketError::System { action, path: self.path.to_owned(), source }
    }

    /// Removes a socket that nobody has open.
    pub fn remove_dead(&self) -> Result<(), SocketError> {
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
        match holder_of(asked).map_err(self.failed("tell whether anyone serves on"))? {
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
    pub fn make(&self) -> Result<(UnixListener, Identity), SocketError> {
        let fd = new_socket(SockType::Stream).map_err(self.failed("make"))?;
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

    /// Gives the file its mode, then its owner. Nobody can connect before it listens: see `SocketFile::listen`.
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
