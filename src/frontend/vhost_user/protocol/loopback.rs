//! A connection that nobody but us has the other end of.
//!
//! The daemon takes a listener and accepts one connection from it; it takes no connection. A listening socket has an
//! address, and any process that finds it may connect.

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getsockname, listen, socket_with,
};
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};

/// Another process would have to find the address within microseconds, each time.
const ATTEMPTS: usize = 100;

/// A listener with exactly one connection waiting, and the other end of that.
///
/// # Errors
/// The kernel's; `AddrInUse` when somebody else was always faster.
pub fn connection() -> io::Result<(UnixListener, UnixStream)> {
    for _ in 0..ATTEMPTS {
        let make =
            |flags| socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | flags, None);
        let listener = make(SocketFlags::empty())?;
        // The kernel chooses a name (unix(7), "Autobind feature"): no file to make or to remove.
        bind(&listener, &SocketAddrUnix::new_unnamed())?;
        // With a backlog of 0 one connection may wait: if ours gets in, it is the only one there.
        listen(&listener, 0)?;
        let stream = make(SocketFlags::NONBLOCK)?;
        match connect(&stream, &getsockname(&listener)?) {
            Ok(()) => {
                let stream = UnixStream::from(stream);
                stream.set_nonblocking(false)?;
                return Ok((UnixListener::from(listener), stream));
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn nobody_else_fits_in() {
        let (listener, mut ours) = connection().unwrap();
        let other =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
        assert_eq!(connect(&other, &getsockname(&listener).unwrap()), Err(Errno::AGAIN));
        let (mut accepted, _) = listener.accept().unwrap();
        drop(listener);
        ours.write_all(b"it is us").unwrap();
        let mut bytes = [0; 8];
        accepted.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"it is us");
    }
}
