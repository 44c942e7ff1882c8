//! The client, given a server that says what it likes: see [`crate::fuzzing`].

#![forbid(unsafe_code)]

use super::connect::Connected;
use super::export::{Offer, Promise};
use super::handshake::{self, Blocks, Export, Negotiated};
use super::protocol::*;
use super::unflushed::UnflushedWrites;
use super::uri::Address;
use super::{NbdOps, NbdStore, Remote, geometry};
use crate::block::{Capacity, Data, Errno};
use crate::engine::losses::Losses;
use crate::engine::node::Leaf;
use crate::fuzzing::Input;
use crate::ring::{Core, Io, Mapping, Ring, Setup, Tasks, Uring};
use std::cell::Cell;
use std::future::Future;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Any bytes: a server's part of a handshake, or requests and what a server makes of them.
pub fn nbd(bytes: &[u8]) {
    let mut input = Input(bytes);
    if input.flag() { transmission(&mut input) } else { handshake(&mut input) }
}

/// A server's words, all ready.
struct Script<'a>(Input<'a>);

impl Read for Script<'_> {
    fn read(&mut self, mut into: &mut [u8]) -> io::Result<usize> {
        let bytes = self.0.bytes(into.len());
        into.write(bytes)
    }
}

impl Write for Script<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        Ok(from.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// It ends, and what it agrees on is a disk or refused.
fn handshake(input: &mut Input) {
    let negotiated = handshake::negotiate(&mut Script(Input(input.0)), b"a disk");
    if let Ok(negotiated) = negotiated
        && let Ok(geometry) = geometry(&negotiated.export)
    {
        assert!(geometry.bytes() <= negotiated.export.size);
        assert!([512, 4096].contains(&geometry.logical_block) || geometry.logical_block.is_power_of_two());
    }
}

const SIZE: u64 = 1 << 20;
const BLOCK: u64 = 512;
/// Around each request's memory.
const MARGIN: usize = 4096;
/// What the server's own data consists of; our memory is zero.
const DATA: u8 = 0x5a;

type Task = Pin<Box<dyn Future<Output = ()>>>;

thread_local! {
    static CORE: Rc<Core<Uring>> =
        Core::new(Uring::new(Setup { entries: 16, completions: 256, ..Setup::default() }).unwrap());
}

/// One request, and how it ended.
struct Job {
    reads: bool,
    len: usize,
    memory: Rc<Mapping>,
    result: Rc<Cell<Option<Result<(), Errno>>>>,
}

/// Every request ends, with an error once the server is gone; none writes outside its memory, and a read that
/// succeeds was answered for every byte.
fn transmission(input: &mut Input) {
    let flags = NBD_FLAG_HAS_FLAGS | input.u16();
    let structured = input.flag();
    let (ours, server) = UnixStream::pair().unwrap();
    server.set_nonblocking(true).unwrap();
    let blocks = Blocks { maximum: 64 << 10, ..Blocks::default() };
    let export = Export { size: SIZE, flags, blocks };
    let remote = Remote {
        label: "a server".into(),
        log: crate::log_limit::LogLimit::new("a server"),
        address: Address::Unix("/nobody/is/here".into()),
        name: "a disk".into(),
        tls: None,
        reconnect: Duration::ZERO,
        timeout: Duration::ZERO,
        connections: 1,
        promise: Promise { flags, logical_block: 512, read_only: false, capacity: Capacity::new(SIZE / 512) },
        offer: Offer::default(),
        pools: AtomicUsize::new(0),
        first: Mutex::new(Some(Connected {
            socket: ours.into(),
            negotiated: Negotiated { export, structured },
            instance: 0,
        })),
        unflushed: UnflushedWrites::default(),
        instance: Default::default(),
        losses: Losses::default(),
    };
    let volume = NbdStore { remote: Arc::new(remote), tail: 0 };
    let mut client = Client::new(&volume);
    let mut server = Server { stream: server, heard: Vec::new(), requests: Vec::new(), honest: true };
    for _ in 0..1 + input.u8() % 6 {
        client.ask(input);
    }
    while !input.is_empty() {
        client.turn();
        server.listen();
        server.answer(input, structured);
        if input.u8().is_multiple_of(8) {
            client.ask(input);
        }
    }
    let _ = server.stream.shutdown(Shutdown::Both);
    client.finish(server.honest);
}

/// The worker's side.
struct Client {
    core: Rc<Core<Uring>>,
    tasks: Tasks<Uring, Task>,
    /// Until the end.
    ops: Option<Rc<NbdOps<Uring>>>,
    jobs: Vec<Job>,
}

impl Client {
    fn new(volume: &NbdStore) -> Client {
        let core = CORE.with(Rc::clone);
        let ops = Some(Rc::new(NbdOps::new(&core, volume)));
        Client { tasks: Tasks::new(core.clone()), core, ops, jobs: Vec::new() }
    }

    fn ask(&mut self, input: &mut Input) {
        let Some(ops) = self.ops.clone().filter(|_| self.jobs.len() < 32) else { return };
        let kind = input.u8() % 6;
        let len = 1 + u64::from(input.u8());
        let offset = u64::from(input.u8());
        let (len, offset) = ((len * BLOCK) as usize, offset * BLOCK);
        let memory = Rc::new(Mapping::anonymous(len + 2 * MARGIN).unwrap());
        let result = Rc::new(Cell::new(None));
        self.jobs.push(Job { reads: kind < 2, len, memory: memory.clone(), result: result.clone() });
        self.tasks.add(|io| {
            Box::pin(async move { result.set(Some(perform(&ops, &io, kind, &memory, len, offset).await)) })
                as Task
        });
    }

    /// Everything that can be done without waiting.
    fn turn(&mut self) {
        let mut cqes = Vec::new();
        loop {
            let worked = self.tasks.run_ready();
            self.core.ring().enter(false).unwrap();
            self.core.ring().reap(&mut cqes);
            if cqes.is_empty() && !worked {
                return;
            }
            for cqe in cqes.drain(..) {
                self.tasks.complete(&cqe);
            }
        }
    }

    /// Turns until something is so.
    fn until(&mut self, what: &str, done: impl Fn(&Client) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !done(self) {
            self.turn();
            assert!(Instant::now() < deadline, "it hangs: {what}");
        }
    }

    /// The server is gone.
    fn finish(mut self, honest: bool) {
        self.until("requests", |client| client.jobs.iter().all(|job| job.result.get().is_some()));
        for job in &self.jobs {
            let mut bytes = vec![0; job.memory.len()];
            job.memory.copy_out(0, &mut bytes);
            let inside = MARGIN..MARGIN + job.len;
            let clean = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
            assert!(clean(&bytes[..inside.start]) && clean(&bytes[inside.end..]), "outside the request");
            if job.reads && honest && job.result.get() == Some(Ok(())) {
                assert!(bytes[inside].iter().all(|byte| *byte == DATA), "a read succeeded without its data");
            } else if !job.reads {
                assert!(clean(&bytes), "what is written changes");
            }
        }
        let Some(ops) = self.ops.take() else { return };
        let pool = Rc::downgrade(&ops.pool);
        drop(ops);
        self.until("connections", |client| client.core.in_flight() == 0 && pool.strong_count() == 0);
    }
}

async fn perform(
    ops: &NbdOps<Uring>,
    io: &Io<Uring>,
    kind: u8,
    memory: &Mapping,
    len: usize,
    offset: u64,
) -> Result<(), Errno> {
    // In two ranges, so that a piece of a reply may lie across them.
    let middle = len / 3;
    let iovecs = [memory.iovec(MARGIN, middle), memory.iovec(MARGIN + middle, len - middle)];
    let (data, len) = (Data::of(&iovecs), len as u64);
    match kind {
        0 | 1 => ops.read(io, data, len, offset).await,
        2 => ops.write(io, data, len, offset, true).await,
        3 => ops.flush(io).await,
        4 => ops.discard(io, offset, len).await,
        _ => ops.write_zeroes(io, offset, len, true).await,
    }
}

/// The server's side. It writes what fits into the socket, and never waits.
struct Server {
    stream: UnixStream,
    heard: Vec<u8>,
    /// Cookie, offset and length of the requests heard, oldest first.
    requests: Vec<(u64, u64, u32)>,
    /// It sent no zeroes, and nothing but whole replies.
    honest: bool,
}

impl Server {
    fn listen(&mut self) {
        let mut bytes = [0; 64 << 10];
        while let Ok(count) = self.stream.read(&mut bytes)
            && count > 0
        {
            self.heard.extend(&bytes[..count]);
        }
        while self.heard.len() >= Request::SIZE {
            let head = &self.heard[..Request::SIZE];
            let (command, length) = (be16(head, 6), be32(head, 24));
            let payload = if command == Command::NBD_CMD_WRITE as u16 { length as usize } else { 0 };
            let whole = Request::SIZE + payload;
            if self.heard.len() < whole {
                return;
            }
            assert_eq!(be32(head, 0), NBD_REQUEST_MAGIC, "the client lost count");
            self.requests.push((be64(head, 8), be64(head, 16), length));
            self.heard.drain(..whole);
        }
    }

    fn say(&mut self, bytes: &[u8]) {
        self.honest &= matches!(self.stream.write(bytes), Ok(count) if count == bytes.len());
    }

    /// One thing that servers do, or do not.
    fn answer(&mut self, input: &mut Input, structured: bool) {
        let how = input.u8();
        let known = usize::from(input.u8()).checked_rem(self.requests.len()).map(|at| self.requests[at]);
        let (cookie, offset, length) = known.unwrap_or((input.u64(), input.u64(), input.u32()));
        match how % 8 {
            // What the client hopes for.
            0 if structured => {
                let half = length / 2;
                self.chunk(cookie, false, NBD_REPLY_TYPE_OFFSET_DATA, offset, half);
                let rest = offset.wrapping_add(half.into());
                self.chunk(cookie, true, NBD_REPLY_TYPE_OFFSET_DATA, rest, length - half);
            }
            0 => {
                self.simple(cookie, 0);
                self.data(length);
            }
            1 => {
                let error = [0, NBD_EIO, NBD_ESHUTDOWN, u32::MAX][usize::from(how >> 6)];
                // To a read, it takes what comes next for data.
                self.honest &= error != 0;
                self.simple(cookie, error);
            }
            2 => self.chunk(cookie, how & 0x80 != 0, NBD_REPLY_TYPE_NONE, 0, 0),
            3 => {
                let from = offset.wrapping_add(u64::from(input.u8()) * 64);
                self.chunk(cookie, how & 0x80 != 0, NBD_REPLY_TYPE_OFFSET_DATA, from, input.u16().into());
            }
            4 => {
                self.honest = false;
                let fields = [&offset.to_be_bytes()[..], &input.u32().to_be_bytes()].concat();
                self.frame(cookie, how & 0x80 != 0, NBD_REPLY_TYPE_OFFSET_HOLE, 12, &fields);
            }
            5 => {
                self.honest = false;
                let (kind, claimed) = (input.u16(), input.u32());
                let count = usize::from(input.u8());
                let payload = input.bytes(count).to_vec();
                let claimed = if how & 0x40 != 0 { claimed } else { payload.len() as u32 };
                self.frame(cookie, how & 0x80 != 0, kind, claimed, &payload);
            }
            6 => {
                self.honest = false;
                let count = usize::from(input.u8());
                let bytes = input.bytes(count).to_vec();
                self.say(&bytes);
            }
            _ if how & 0xf0 == 0xf0 => {
                let _ = self.stream.shutdown(Shutdown::Write);
            }
            _ => {}
        }
    }

    fn simple(&mut self, cookie: u64, error: u32) {
        let head = [NBD_SIMPLE_REPLY_MAGIC.to_be_bytes(), error.to_be_bytes()].concat();
        self.say(&[head, cookie.to_be_bytes().to_vec()].concat());
    }

    fn data(&mut self, length: u32) {
        self.say(&vec![DATA; length.min(256 << 10) as usize]);
    }

    fn chunk(&mut self, cookie: u64, done: bool, kind: u16, offset: u64, length: u32) {
        let fields =
            if kind == NBD_REPLY_TYPE_OFFSET_DATA { offset.to_be_bytes().to_vec() } else { Vec::new() };
        self.frame(cookie, done, kind, length.wrapping_add(fields.len() as u32), &fields);
        self.data(length);
    }

    fn frame(&mut self, cookie: u64, done: bool, kind: u16, claimed: u32, payload: &[u8]) {
        let mut bytes = NBD_STRUCTURED_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend(u16::from(done).to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(claimed.to_be_bytes());
        bytes.extend(payload);
        self.say(&bytes);
    }
}
