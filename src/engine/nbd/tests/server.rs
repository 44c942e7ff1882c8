//! An NBD server for the tests: a disk in memory with a volatile cache, and manners as bad as asked for.

#![forbid(unsafe_code)]

use crate::engine::nbd::handshake::Blocks;
use crate::engine::nbd::protocol::*;
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// All that a well-equipped server offers.
pub const ALL_FLAGS: u16 = NBD_FLAG_HAS_FLAGS
    | NBD_FLAG_SEND_FLUSH
    | NBD_FLAG_SEND_FUA
    | NBD_FLAG_SEND_TRIM
    | NBD_FLAG_SEND_WRITE_ZEROES
    | NBD_FLAG_CAN_MULTI_CONN;

/// Numbers that look random and are the same each time.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound.max(1)
    }
}

/// What is done to one request instead of answering it well.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Nothing: answered well.
    None,
    /// Refused with this error.
    Error(u32),
    /// So many bytes of the reply, then the connection ends.
    Cut(usize),
    /// These bytes instead of the reply, and the connection stays.
    Say(Vec<u8>),
    /// The cookie of another request.
    WrongCookie,
    /// Carried out, never answered, and the connection ends.
    Vanish,
    /// Never answered, while the connection stays.
    Hang,
    /// Answered well, after so long. Meanwhile nothing else is.
    Late(Duration),
}

/// Manners. They hold for requests to come.
#[derive(Clone, Debug)]
pub struct Manners {
    pub flags: u16,
    pub size: u64,
    pub blocks: Blocks,
    pub structured: bool,
    /// Answers in small writes.
    pub fragment: bool,
    /// Answers requests that are there together in another order.
    pub reorder: bool,
    /// One request in so many ends the connection, before or in its reply; 0 for none, 1 for each, unanswered.
    pub drop_one_in: u64,
    /// One request in so many is refused with `NBD_ENOSPC`; 0 for none.
    pub refuse_one_in: u64,
    pub seed: u64,
}

/// What all connections share.
pub struct Shared {
    pub manners: Mutex<Manners>,
    /// As it reads.
    pub disk: Mutex<Vec<u8>>,
    /// As it would read after a crash.
    pub stable: Mutex<Vec<u8>>,
    pub faults: Mutex<VecDeque<Fault>>,
    pub open: Mutex<Vec<UnixStream>>,
    /// Connections made so far, good-byes and flushes heard so far, and connections there are.
    pub accepted: AtomicUsize,
    pub good_byes: AtomicUsize,
    pub flushes: AtomicUsize,
    pub present: AtomicUsize,
    /// Longest payload of a read or write seen.
    pub longest: AtomicUsize,
    stop: AtomicBool,
}

pub struct Server {
    pub shared: Arc<Shared>,
    path: PathBuf,
    acceptor: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(dir: &Path, manners: Manners) -> Server {
        let size = manners.size as usize;
        let shared = Arc::new(Shared {
            manners: Mutex::new(manners),
            disk: Mutex::new(vec![0; size]),
            stable: Mutex::new(vec![0; size]),
            faults: Mutex::default(),
            open: Mutex::default(),
            accepted: AtomicUsize::new(0),
            good_byes: AtomicUsize::new(0),
            flushes: AtomicUsize::new(0),
            present: AtomicUsize::new(0),
            longest: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        });
        let mut server = Server { shared, path: dir.join("nbd.sock"), acceptor: None };
        server.listen();
        server
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.path.display())
    }

    pub fn fault(&self, fault: Fault) {
        self.shared.faults.lock().unwrap().push_back(fault);
    }

    /// Ends all connections, and takes no more. What was not flushed is lost.
    pub fn crash(&mut self) {
        self.shared.stop.store(true, SeqCst);
        let _ = UnixStream::connect(&self.path);
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.join().unwrap();
        }
        let _ = std::fs::remove_file(&self.path);
        self.hang_up();
        while self.shared.present.load(SeqCst) > 0 {
            thread::sleep(Duration::from_millis(1));
        }
        let stable = self.shared.stable.lock().unwrap().clone();
        *self.shared.disk.lock().unwrap() = stable;
    }

    /// Has a larger disk from now on.
    pub fn grow(&self, size: usize) {
        self.shared.disk.lock().unwrap().resize(size, 0);
        self.shared.stable.lock().unwrap().resize(size, 0);
        self.shared.manners.lock().unwrap().size = size as u64;
    }

    /// Ends all connections that there are.
    pub fn hang_up(&self) {
        for stream in self.shared.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Takes connections, again.
    pub fn listen(&mut self) {
        self.shared.stop.store(false, SeqCst);
        let listener = UnixListener::bind(&self.path).unwrap();
        let shared = self.shared.clone();
        self.acceptor = Some(thread::spawn(move || {
            for stream in listener.incoming() {
                if shared.stop.load(SeqCst) {
                    return;
                }
                let stream = stream.unwrap();
                let nth = shared.accepted.fetch_add(1, SeqCst);
                shared.present.fetch_add(1, SeqCst);
                shared.open.lock().unwrap().push(stream.try_clone().unwrap());
                let shared = shared.clone();
                thread::spawn(move || {
                    let _ = Session::new(&shared, &stream, nth as u64).run();
                    let _ = stream.shutdown(std::net::Shutdown::Both);
                    shared.present.fetch_sub(1, SeqCst);
                });
            }
        }));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.crash();
    }
}

struct Incoming {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    length: u32,
    payload: Vec<u8>,
}

struct Session<'a> {
    shared: &'a Shared,
    stream: &'a UnixStream,
    random: Random,
    structured: bool,
}

impl<'a> Session<'a> {
    fn new(shared: &'a Shared, stream: &'a UnixStream, nth: u64) -> Session<'a> {
        let seed = shared.manners.lock().unwrap().seed;
        Session { shared, stream, random: Random::new(seed * 1000 + nth + 1), structured: false }
    }

    fn manners(&self) -> Manners {
        self.shared.manners.lock().unwrap().clone()
    }

    fn read<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Sends, in pieces if that is our manner.
    fn say(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        if self.manners().fragment {
            for _ in 0..self.random.below(6) {
                let count = (1 + self.random.below(40) as usize).min(rest.len());
                self.stream.write_all(&rest[..count])?;
                rest = &rest[count..];
                thread::yield_now();
            }
        }
        self.stream.write_all(rest)
    }

    fn run(&mut self) -> io::Result<()> {
        self.negotiate()?;
        loop {
            let mut batch = vec![self.request()?];
            while self.manners().reorder && batch.len() < 8 && self.more()? {
                batch.push(self.request()?);
            }
            while !batch.is_empty() {
                let which = if self.manners().reorder { self.random.below(batch.len() as u64) } else { 0 };
                let request = batch.remove(which as usize);
                self.serve(&request)?;
            }
        }
    }

    /// Whether another request comes within a moment.
    fn more(&mut self) -> io::Result<bool> {
        self.stream.set_nonblocking(true)?;
        let mut there = false;
        for _ in 0..3 {
            let flags = nix::sys::socket::MsgFlags::MSG_PEEK;
            let fd = std::os::fd::AsRawFd::as_raw_fd(self.stream);
            if nix::sys::socket::recv(fd, &mut [0], flags).is_ok_and(|count| count > 0) {
                there = true;
                break;
            }
            thread::sleep(Duration::from_micros(200));
        }
        self.stream.set_nonblocking(false)?;
        Ok(there)
    }

    fn negotiate(&mut self) -> io::Result<()> {
        let manners = self.manners();
        let greeting = [NBDMAGIC.to_be_bytes(), IHAVEOPT.to_be_bytes()].concat();
        self.say(&[greeting, 3u16.to_be_bytes().to_vec()].concat())?;
        self.read::<4>()?;
        loop {
            let head = self.read::<16>()?;
            let option = be32(&head, 8);
            let mut data = vec![0; be32(&head, 12) as usize];
            self.stream.read_exact(&mut data)?;
            match option {
                NBD_OPT_STRUCTURED_REPLY if manners.structured => {
                    self.structured = true;
                    self.answer(option, NBD_REP_ACK, &[])?;
                }
                NBD_OPT_GO => {
                    let mut info = NBD_INFO_EXPORT.to_be_bytes().to_vec();
                    info.extend(manners.size.to_be_bytes());
                    info.extend(manners.flags.to_be_bytes());
                    self.answer(option, NBD_REP_INFO, &info)?;
                    let Blocks { minimum, preferred, maximum } = manners.blocks;
                    let mut info = NBD_INFO_BLOCK_SIZE.to_be_bytes().to_vec();
                    info.extend([minimum, preferred, maximum].map(u32::to_be_bytes).concat());
                    self.answer(option, NBD_REP_INFO, &info)?;
                    return self.answer(option, NBD_REP_ACK, &[]);
                }
                _ => self.answer(option, NBD_REP_ERR_UNSUP, b"not here")?,
            }
        }
    }

    fn answer(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend([option, kind, data.len() as u32].map(u32::to_be_bytes).concat());
        bytes.extend(data);
        self.say(&bytes)
    }

    fn request(&mut self) -> io::Result<Incoming> {
        let head = self.read::<28>()?;
        assert_eq!(be32(&head, 0), NBD_REQUEST_MAGIC, "the client lost its place in the stream");
        let mut request = Incoming {
            flags: be16(&head, 4),
            command: be16(&head, 6),
            cookie: be64(&head, 8),
            offset: be64(&head, 16),
            length: be32(&head, 24),
            payload: Vec::new(),
        };
        if request.command == Command::NBD_CMD_WRITE as u16 {
            request.payload = vec![0; request.length as usize];
            self.stream.read_exact(&mut request.payload)?;
        }
        if request.command <= 1 {
            self.shared.longest.fetch_max(request.length as usize, SeqCst);
        }
        Ok(request)
    }

    fn serve(&mut self, request: &Incoming) -> io::Result<()> {
        if request.command == Command::NBD_CMD_DISC as u16 {
            self.shared.good_byes.fetch_add(1, SeqCst);
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let manners = self.manners();
        let fault = self.shared.faults.lock().unwrap().pop_front().unwrap_or(Fault::None);
        let fault = match fault {
            Fault::None if manners.drop_one_in > 0 && self.random.below(manners.drop_one_in) == 0 => {
                if manners.drop_one_in == 1 || self.random.below(2) == 0 {
                    Fault::Vanish
                } else {
                    Fault::Cut(self.random.below(3000) as usize)
                }
            }
            Fault::None if manners.refuse_one_in > 0 && self.random.below(manners.refuse_one_in) == 0 => {
                Fault::Error(NBD_ENOSPC)
            }
            fault => fault,
        };
        if let Fault::Error(error) = fault {
            let reply = self.refusal(request, error);
            return self.say(&reply);
        }
        if let Fault::Say(bytes) = fault {
            return self.say(&bytes);
        }
        if let Fault::Hang = fault {
            return Ok(());
        }
        if let Fault::Late(after) = fault {
            thread::sleep(after);
        }
        let mut reply = self.perform(request);
        match fault {
            Fault::Vanish => return Err(io::ErrorKind::ConnectionAborted.into()),
            Fault::Cut(bytes) => {
                reply.truncate(bytes);
                self.say(&reply)?;
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            Fault::WrongCookie => reply[8..16].copy_from_slice(&(!request.cookie).to_be_bytes()),
            _ => {}
        }
        self.say(&reply)
    }

    fn refusal(&mut self, request: &Incoming, error: u32) -> Vec<u8> {
        if !self.structured || (request.command != 0 && self.random.below(2) == 0) {
            return tests::simple(request.cookie, error);
        }
        let text = vec![b'x'; self.random.below(300) as usize];
        let mut payload = error.to_be_bytes().to_vec();
        payload.extend((text.len() as u16).to_be_bytes());
        payload.extend(text);
        let done = self.random.below(2) == 0;
        let mut reply = tests::structured(request.cookie, done, NBD_REPLY_TYPE_ERROR, &payload);
        if !done {
            reply.extend(tests::structured(request.cookie, true, NBD_REPLY_TYPE_NONE, &[]));
        }
        reply
    }

    /// Does it, and gives the reply.
    fn perform(&mut self, request: &Incoming) -> Vec<u8> {
        let mut disk = self.shared.disk.lock().unwrap();
        let range = request.offset as usize..request.offset as usize + request.length as usize;
        match request.command {
            0 => {
                let bytes = disk[range].to_vec();
                drop(disk);
                return self.data(request, &bytes);
            }
            1 => disk[range.clone()].copy_from_slice(&request.payload),
            3 => {
                self.shared.flushes.fetch_add(1, SeqCst);
                self.shared.stable.lock().unwrap().copy_from_slice(&disk);
            }
            4 => disk[range.clone()].fill(0xdd),
            6 => disk[range.clone()].fill(0),
            other => panic!("command {other}"),
        }
        if request.flags & NBD_CMD_FLAG_FUA != 0 {
            self.shared.stable.lock().unwrap()[range.clone()].copy_from_slice(&disk[range]);
        }
        drop(disk);
        if self.structured && self.random.below(2) == 0 {
            tests::structured(request.cookie, true, NBD_REPLY_TYPE_NONE, &[])
        } else {
            tests::simple(request.cookie, 0)
        }
    }

    fn data(&mut self, request: &Incoming, bytes: &[u8]) -> Vec<u8> {
        if !self.structured {
            return [tests::simple(request.cookie, 0), bytes.to_vec()].concat();
        }
        let mut chunks = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let left = bytes.len() - at;
            let whole = !self.manners().fragment || chunks.len() > 20;
            let length = if whole { left } else { left.min(1 + self.random.below(9000) as usize) };
            chunks.push((at, &bytes[at..at + length]));
            at += length;
        }
        let mut reply = Vec::new();
        while !chunks.is_empty() {
            let which = if self.manners().reorder { self.random.below(chunks.len() as u64) } else { 0 };
            let (at, chunk) = chunks.remove(which as usize);
            let mut payload = (request.offset + at as u64).to_be_bytes().to_vec();
            let last = chunks.is_empty() && request.cookie.is_multiple_of(2);
            if chunk.iter().all(|byte| *byte == 0) {
                payload.extend((chunk.len() as u32).to_be_bytes());
                reply.extend(tests::structured(request.cookie, last, NBD_REPLY_TYPE_OFFSET_HOLE, &payload));
            } else {
                payload.extend(chunk);
                reply.extend(tests::structured(request.cookie, last, NBD_REPLY_TYPE_OFFSET_DATA, &payload));
            }
        }
        if !request.cookie.is_multiple_of(2) {
            reply.extend(tests::structured(request.cookie, true, NBD_REPLY_TYPE_NONE, &[]));
        }
        reply
    }
}
