//! Where a server is, and a blocking connection to it: for the service thread and the connecting threads.

#![forbid(unsafe_code)]

use super::Error;
use super::handshake::{self, Negotiated};
use super::stream::Stream;
use super::tls::{self, Tls};
use super::uri::Address;
use crate::block::Instance;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A connection in the transmission phase: blocking, without time-outs.
#[derive(Debug)]
pub struct Connected {
    /// The socket.
    pub socket: OwnedFd,
    /// What was negotiated.
    pub negotiated: Negotiated,
    /// See [`Instance`]; of a server on this machine only.
    pub instance: u64,
}

/// `PID_FS_MAGIC` of `linux/magic.h`.
const PIDFS: i64 = 0x5049_4446;

/// Which process listens at the other end: a number that no other has had since the machine was booted. Told by the inode
/// of a pidfd (Linux 6.9). For a socket that the first process made (systemd's activation), no matter who serves it,
/// nobody knows.
fn instance(socket: &UnixStream) -> u64 {
    let number = || {
        if getsockopt(socket, sockopt::PeerCredentials).ok()?.pid() <= 1 {
            return None;
        }
        let process = getsockopt(socket, sockopt::PeerPidfd).ok()?;
        let unique = rustix::fs::fstatfs(&process).is_ok_and(|system| system.f_type == PIDFS);
        unique.then(|| rustix::fs::fstat(&process).ok()).flatten().map(|stat| stat.st_ino)
    };
    number().unwrap_or(Instance::UNKNOWN)
}

/// What became of an attempt to connect: who did what.
pub fn failure(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "cannot connect: nobody listens there",
        io::ErrorKind::NotFound => "cannot connect: it is not there",
        io::ErrorKind::PermissionDenied => "cannot connect: no permission",
        io::ErrorKind::TimedOut => "cannot connect: no answer",
        _ => "cannot connect",
    }
}

impl Address {
    /// Connects and shakes hands within `limit`. Looking a name up is not counted: that has limits of its
    /// own (`resolv.conf(5)`).
    ///
    /// # Errors
    /// See [`Error`].
    pub fn connect(&self, name: &[u8], tls: Option<&Tls>, limit: Duration) -> Result<Connected, Error> {
        let (stream, deadline) = match self {
            Address::Unix(path) => {
                let deadline = Instant::now() + limit;
                (Stream::Unix(connect_unix(path, limit).map_err(Error::Connect)?), deadline)
            }
            Address::Tcp { host, port } => {
                let addresses = (host.as_str(), *port).to_socket_addrs().map_err(Error::Connect)?;
                let deadline = Instant::now() + limit;
                (Stream::Tcp(connect_tcp(addresses, deadline).map_err(Error::Connect)?), deadline)
            }
        };
        let mut timed = Timed { stream, deadline };
        let greeting = handshake::greet(&mut timed)?;
        let (negotiated, session) = match tls {
            None => (handshake::agree(&mut timed, greeting, name)?, None),
            Some(tls) => {
                handshake::start_tls(&mut timed)?;
                let mut session = tls.negotiate(&mut timed)?;
                let mut secure = rustls::Stream::new(&mut session, &mut timed);
                (handshake::agree(&mut secure, greeting, name).map_err(tls::judge)?, Some(session))
            }
        };
        let stream = timed.stream;
        stream.limit(None).map_err(Error::Io)?;
        let instance = match &stream {
            Stream::Unix(stream) => instance(stream),
            Stream::Tcp(_) => Instance::UNKNOWN,
        };
        let socket = match (session, stream) {
            (Some(session), stream) => tls::relay(session, stream, &self.to_string()).map_err(Error::Io)?,
            (None, Stream::Unix(stream)) => stream.into(),
            (None, Stream::Tcp(stream)) => stream.into(),
        };
        Ok(Connected { socket, negotiated, instance })
    }
}

/// A server with its backlog full makes `connect(2)` wait, as long as the send time-out lets it.
fn connect_unix(path: &std::path::Path, limit: Duration) -> io::Result<UnixStream> {
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let micros = i64::try_from(limit.as_micros()).unwrap_or(i64::MAX);
    setsockopt(&socket, sockopt::SendTimeout, &TimeVal::new(micros / 1_000_000, micros % 1_000_000))?;
    match connect(socket.as_raw_fd(), &UnixAddr::new(path)?) {
        Ok(()) => Ok(socket.into()),
        Err(nix::errno::Errno::EAGAIN) => Err(late()),
        Err(errno) => Err(errno.into()),
    }
}

fn connect_tcp(
    addresses: impl Iterator<Item = std::net::SocketAddr>,
    deadline: Instant,
) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in addresses {
        match TcpStream::connect_timeout(&address, remaining(deadline)?) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                notice_death(&stream)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Has the kernel end a connection whose peer is gone without a word: after 10 s of silence it asks, three times
/// 5 s apart, and sent bytes that nobody acknowledges count as long (`tcp(7)`).
fn notice_death(stream: &TcpStream) -> io::Result<()> {
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &10)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &5)?;
    setsockopt(stream, sockopt::TcpKeepCount, &3)?;
    setsockopt(stream, sockopt::TcpUserTimeout, &25_000)?;
    Ok(())
}

/// A stream that fails when its time is up, however slowly the bytes drip.
struct Timed {
    stream: Stream,
    deadline: Instant,
}

impl Read for Timed {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.stream.limit(Some(remaining(self.deadline)?))?;
        in_time(self.stream.read(into))
    }
}

impl Write for Timed {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.stream.limit(Some(remaining(self.deadline)?))?;
        in_time(self.stream.write(from))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn in_time(result: io::Result<usize>) -> io::Result<usize> {
    result.map_err(|error| if error.kind() == io::ErrorKind::WouldBlock { late() } else { error })
}

fn late() -> io::Error {
    io::ErrorKind::TimedOut.into()
}

/// Never zero: to a socket that means no limit.
fn remaining(deadline: Instant) -> io::Result<Duration> {
    deadline.checked_duration_since(Instant::now()).filter(|left| left.as_micros() > 0).ok_or_else(late)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.into(), port }
    }

    #[test]
    fn a_silent_server_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let started = Instant::now();
        let limit = Duration::from_millis(200);
        let refused = Address::Unix(path).connect(b"", None, limit).unwrap_err();
        assert!(matches!(&refused, Error::Io(error) if error.kind() == io::ErrorKind::TimedOut), "{refused}");
        assert!(started.elapsed() >= limit && started.elapsed() < Duration::from_secs(5));
        drop(listener);
    }

    #[test]
    fn a_dripping_server_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut drops = 0;
            while stream.write_all(b"N").is_ok() && drops < 1000 {
                drops += 1;
                std::thread::sleep(Duration::from_millis(30));
            }
            drops
        });
        // Each byte comes well within the limit; all together do not.
        let refused = Address::Unix(path).connect(b"", None, Duration::from_millis(200)).unwrap_err();
        assert!(matches!(&refused, Error::Io(error) if error.kind() == io::ErrorKind::TimedOut), "{refused}");
        assert!(server.join().unwrap() < 1000);
    }

    #[test]
    fn nobody_there_is_told_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let refused =
            Address::Unix(dir.path().join("none")).connect(b"", None, Duration::from_secs(5)).unwrap_err();
        assert!(matches!(&refused, Error::Connect(error) if error.kind() == io::ErrorKind::NotFound));
        // Port 1 of the loopback: nobody listens there.
        let refused = tcp("127.0.0.1", 1).connect(b"", None, Duration::from_secs(5)).unwrap_err();
        assert!(
            matches!(&refused, Error::Connect(error) if error.kind() == io::ErrorKind::ConnectionRefused)
        );
    }
}
