//! NBD: a client that asks for no more than reads and writes, so that it costs as little as the vhost-user one.
//!
//! Fixed newstyle, simple replies. A batch of requests goes out in one call, and replies come in by the buffer; what
//! a read brought is not copied out of it.

use crate::driver::{Queue, fill};
use crate::{Args, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::VecDeque;
use std::fmt;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;

const SERVER_MAGIC: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;
const OPT_EXPORT_NAME: u32 = 1;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISCONNECT: u16 = 2;
const REQUEST: usize = 28;
const REPLY: usize = 16;
/// Bytes that one call receives at most.
const RECEIVE: usize = 256 << 10;
/// What one call takes at most (IOV_MAX).
const VECTORS: usize = 1024;

#[derive(Clone, Debug)]
pub enum Address {
    Unix(PathBuf),
    Tcp(String),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Address, String> {
        match text.split_once(':') {
            Some(("unix", path)) => Ok(Address::Unix(path.into())),
            Some(("tcp", address)) => Ok(Address::Tcp(address.to_owned())),
            _ => Err("must be unix:PATH or tcp:HOST:PORT".to_owned()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "{}", path.display()),
            Address::Tcp(address) => f.write_str(address),
        }
    }
}

trait Stream: Read + Write + AsFd {}
impl<T: Read + Write + AsFd> Stream for T {}

/// A connection.
pub struct Connection {
    stream: Box<dyn Stream>,
    /// For each slot a request's header and, where the load writes, its data behind it.
    requests: Vec<Vec<u8>>,
    len: usize,
    /// Slots whose requests are not sent, or the first not to its end.
    unsent: VecDeque<usize>,
    /// Bytes of the first that are.
    sent: usize,
    received: Vec<u8>,
    /// The start of a header that the last call received.
    have: usize,
    /// The slot whose reply's header is here, and the bytes of its data that are still to come.
    current: Option<(usize, usize)>,
    in_flight: Vec<bool>,
    reads: bool,
}

/// As many connections as queues, and the export's bytes.
pub fn connect(address: &Address, args: &Args) -> Result<(Vec<Connection>, u64)> {
    let (len, depth, writes) = (args.bs.bytes() as usize, usize::from(args.depth), args.rw.writes());
    let mut capacity = 0;
    let mut connections = Vec::new();
    for _ in 0..args.queues {
        let stream: Box<dyn Stream> = match address {
            Address::Unix(path) => {
                let mut stream = UnixStream::connect(path)?;
                capacity = handshake(&mut stream)?;
                stream.set_nonblocking(true)?;
                Box::new(stream)
            }
            Address::Tcp(address) => {
                let mut stream = TcpStream::connect(address)?;
                stream.set_nodelay(true)?;
                capacity = handshake(&mut stream)?;
                stream.set_nonblocking(true)?;
                Box::new(stream)
            }
        };
        let mut request = vec![0; REQUEST + if writes { len } else { 0 }];
        fill(&mut request);
        connections.push(Connection {
            stream,
            requests: vec![request; depth],
            len,
            unsent: VecDeque::with_capacity(depth),
            sent: 0,
            received: vec![0; RECEIVE],
            have: 0,
            current: None,
            in_flight: vec![false; depth],
            reads: !writes,
        });
    }
    Ok((connections, capacity))
}

fn take<const N: usize>(stream: &mut impl Read) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Asks for the export without a name; its size.
fn handshake(stream: &mut (impl Read + Write)) -> Result<u64> {
    let magics = (u64::from_be_bytes(take(stream)?), u64::from_be_bytes(take(stream)?));
    let flags = u16::from_be_bytes(take(stream)?);
    if magics != (SERVER_MAGIC, OPTION_MAGIC) || flags & FIXED_NEWSTYLE == 0 {
        return Err("not an NBD server of the fixed newstyle".into());
    }
    let mut hello = Vec::new();
    let flags = flags & (FIXED_NEWSTYLE | NO_ZEROES);
    hello.extend(u32::from(flags).to_be_bytes());
    hello.extend(OPTION_MAGIC.to_be_bytes());
    hello.extend(OPT_EXPORT_NAME.to_be_bytes());
    hello.extend(0u32.to_be_bytes());
    stream.write_all(&hello)?;
    let size = u64::from_be_bytes(take(stream)?);
    take::<2>(stream)?; // transmission flags
    if flags & NO_ZEROES == 0 {
        take::<124>(stream)?;
    }
    Ok(size)
}

impl Connection {
    /// Writes the header of a slot's request.
    fn request(&mut self, command: u16, offset: u64, len: usize, slot: usize) {
        let header = &mut self.requests[slot][..REQUEST];
        header[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        header[4..6].fill(0); // flags
        header[6..8].copy_from_slice(&command.to_be_bytes());
        header[8..16].copy_from_slice(&(slot as u64).to_be_bytes());
        header[16..24].copy_from_slice(&offset.to_be_bytes());
        header[24..28].copy_from_slice(&(len as u32).to_be_bytes());
    }

    /// Takes the replies that the first `end` bytes of `received` hold; the rest of them stays at its front.
    fn parse(&mut self, end: usize, slots: &mut Vec<usize>) -> Result<()> {
        let mut at = 0;
        loop {
            if let Some((slot, data)) = self.current {
                let here = data.min(end - at);
                at += here;
                if here < data {
                    self.current = Some((slot, data - here));
                    break;
                }
                self.current = None;
                slots.push(slot);
            }
            let Some(header) = self.received[at..end].first_chunk::<REPLY>() else { break };
            let field =
                |from: usize| u32::from_be_bytes(header[from..from + 4].try_into().expect("four bytes"));
            // The handle's upper half is 0.
            let (magic, error, slot) = (field(0), field(4), field(12) as usize);
            if magic != REPLY_MAGIC || !self.in_flight.get(slot).is_some_and(|in_flight| *in_flight) {
                return Err("not a reply to a request in flight".into());
            }
            if error != 0 {
                return Err(format!("a request failed with NBD error {error}").into());
            }
            self.in_flight[slot] = false;
            at += REPLY;
            self.current = Some((slot, if self.reads { self.len } else { 0 }));
        }
        self.received.copy_within(at..end, 0);
        self.have = end - at;
        Ok(())
    }
}

impl Queue for Connection {
    fn submit(&mut self, write: bool, offset: u64, slot: usize) -> Result<()> {
        self.request(if write { CMD_WRITE } else { CMD_READ }, offset, self.len, slot);
        self.unsent.push_back(slot);
        self.in_flight[slot] = true;
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        while !self.unsent.is_empty() {
            let mut from = self.sent;
            let vectors: Vec<IoSlice> = self
                .unsent
                .iter()
                .take(VECTORS)
                .map(|slot| IoSlice::new(&self.requests[*slot][std::mem::take(&mut from)..]))
                .collect();
            match self.stream.write_vectored(&vectors) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
            let request = self.requests[0].len();
            self.unsent.drain(..self.sent / request);
            self.sent %= request;
        }
        Ok(())
    }

    fn complete(&mut self, slots: &mut Vec<usize>) -> Result<()> {
        self.flush()?;
        match self.stream.read(&mut self.received[self.have..]) {
            Ok(0) => Err("the server closed the connection".into()),
            Ok(count) => self.parse(self.have + count, slots),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn wanted(&self) -> PollFd<'_> {
        let output = if self.unsent.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
        let fd: BorrowedFd = self.stream.as_fd();
        PollFd::new(fd, PollFlags::POLLIN | output)
    }

    fn woken(&mut self) -> Result<()> {
        Ok(())
    }

    /// Some servers take a client that leaves with requests in flight badly.
    fn close(mut self) -> Result<()> {
        let mut slots = Vec::new();
        while self.in_flight.contains(&true) || self.current.is_some() {
            if poll(&mut [self.wanted()], PollTimeout::from(10_000u16))? == 0 {
                return Err("no request completes for 10 seconds".into());
            }
            self.complete(&mut slots)?;
        }
        self.requests[0].truncate(REQUEST);
        self.request(CMD_DISCONNECT, 0, 0, 0);
        Ok(self.stream.write_all(&self.requests[0])?)
    }
}
