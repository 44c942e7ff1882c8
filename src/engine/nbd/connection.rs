//! One connection in the transmission phase, on the worker's ring.
//!
//! Two tasks of its own move the protocol's bytes: a sender that takes requests from a queue, and a receiver
//! that reads the heads of replies. They never touch a request's memory. When it is a payload's turn, the task
//! **grants** its direction of the stream to the request's slot, which moves the payload between the socket and
//! its own ranges, and gives the stream back. So the operation that names a request's memory is always in flight
//! in that request's slot, where [`Tasks`](crate::ring::Tasks) knows not to free it; and the memory is named
//! only by the future that has it.
//!
//! Headers of requests without a payload that wait together go out together.
//!
//! Contract: whatever goes wrong on a connection, it is [lost](Connection::disconnect) once, everybody who waits for
//! it hears of it, and its descriptor is closed when nobody uses it any more.

#![forbid(unsafe_code)]

use super::Remote;
use super::buffer::Buffer;
use super::connect::Connected;
use super::handshake::Negotiated;
use super::pending::Inflight;
use super::protocol::*;
use super::watch::{TICKS, Watch};
use crate::block::Errno;
use crate::ring::{Core, Io, Message, MessageRanges, Ring, Sqe, Target};
use nix::sys::socket::{Shutdown, shutdown};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

/// In a row, without a byte moved; see the engine's transfers.
const MAX_RETRIES: u32 = 1000;

/// A place for a connection, which comes and goes.
pub struct Connection<R: Ring> {
    pub(super) core: Rc<Core<R>>,
    pub(super) remote: Arc<Remote>,
    /// The socket, from [`raise`](Self::raise) to [`lower`](Self::lower).
    socket: RefCell<Option<Socket>>,
    /// Requests may be sent.
    pub(super) up: Cell<bool>,
    /// It is being ended for good.
    pub(super) closing: Cell<bool>,
    /// While it is down: whether requests may wait for it.
    patient: Cell<bool>,
    /// When it was last lost.
    lost: Cell<Option<Instant>>,
    /// The server has answered something since it is up.
    pub(super) proven: Cell<bool>,
    /// See [`UnflushedWrites`](super::unflushed::UnflushedWrites).
    epoch: Cell<u64>,
    /// The ticks in which a byte last came in, and went out.
    heard: Cell<u64>,
    moved: Cell<u64>,
    /// Who looks for requests that wait too long.
    pub(super) watch: Rc<Watch>,
    /// What its server agreed to.
    terms: Cell<Terms>,
    pub(super) inflight: RefCell<Inflight>,
    pub(super) queue: RefCell<VecDeque<u64>>,
    /// The request whose slot has the stream out.
    pub(super) granted: Cell<Option<u64>>,
    /// Slots and the sender, as long as they use the socket.
    pub(super) busy: Cell<usize>,
    pub(super) buffer: Buffer,
    /// Lists of ranges that nobody uses just now.
    pub(super) scratch: RefCell<Vec<MessageRanges>>,
    pub(super) sender: Cell<Option<u32>>,
    pub(super) receiver: Cell<Option<u32>>,
}

/// What the server of a connection agreed to.
#[derive(Clone, Copy, Debug, Default)]
struct Terms {
    /// Bytes.
    size: u64,
    /// `NBD_FLAG_*`.
    flags: u16,
    /// The most bytes in a read or write.
    max_payload: u32,
}

struct Socket {
    fd: OwnedFd,
    target: Target,
}

impl<R: Ring> Connection<R> {
    /// One that is down, and that requests wait for if `patient`.
    ///
    /// # Errors
    /// When there is no memory for its buffer.
    pub fn new(
        core: &Rc<Core<R>>,
        remote: &Arc<Remote>,
        watch: &Rc<Watch>,
        patient: bool,
    ) -> io::Result<Connection<R>> {
        Ok(Connection {
            core: core.clone(),
            remote: remote.clone(),
            socket: RefCell::new(None),
            up: Cell::new(false),
            closing: Cell::new(false),
            patient: Cell::new(patient),
            lost: Cell::new(None),
            proven: Cell::new(false),
            epoch: Cell::new(0),
            heard: Cell::new(0),
            moved: Cell::new(0),
            watch: watch.clone(),
            terms: Cell::default(),
            inflight: RefCell::default(),
            queue: RefCell::default(),
            granted: Cell::new(None),
            busy: Cell::new(0),
            buffer: Buffer::new()?,
            scratch: RefCell::default(),
            sender: Cell::new(None),
            receiver: Cell::new(None),
        })
    }

    /// Requests may be sent.
    pub fn is_up(&self) -> bool {
        self.up.get()
    }

    /// Losses before it was made: which writes it can vouch for.
    pub fn epoch(&self) -> u64 {
        self.epoch.get()
    }

    /// It is down, and requests may wait for it.
    pub fn is_worth_waiting(&self) -> bool {
        self.patient.get() && !self.up.get() && !self.closing.get()
    }

    /// Requests that wait for it are not to wait any longer.
    pub fn lose_patience(&self) {
        self.patient.set(false);
    }

    /// When it was last lost.
    pub fn lost_at(&self) -> Option<Instant> {
        self.lost.get()
    }

    /// The server answered something on the connection that is or was.
    pub fn is_proven(&self) -> bool {
        self.proven.get()
    }

    /// Ends it for good: says good-bye if it is up. Requests must be over.
    pub fn close(&self) {
        self.closing.set(true);
        self.wake(&self.sender);
        self.wake(&self.receiver);
    }

    /// Says which task receives. `None` when it ends.
    pub fn set_receiver(&self, slot: Option<u32>) {
        self.receiver.set(slot);
    }

    pub(super) fn wake(&self, task: &Cell<Option<u32>>) {
        if let Some(slot) = task.get() {
            self.core.wake(slot);
        }
    }

    /// Takes a new connection into use.
    pub fn raise(&self, connected: Connected) {
        let target = self.core.ring().register(connected.socket.as_raw_fd());
        self.socket.replace(Some(Socket { fd: connected.socket, target }));
        let Negotiated { export, structured } = connected.negotiated;
        self.inflight.borrow_mut().set_structured(structured);
        let max_payload = self.remote.max_payload(&export.blocks);
        self.terms.set(Terms { size: export.size, flags: export.flags, max_payload });
        self.buffer.clear();
        self.hear();
        self.proven.set(false);
        self.epoch.set(self.remote.unflushed.epoch());
        self.up.set(true);
        self.remote.offer.add(export.size, &self.remote.promise);
        self.wake(&self.sender);
    }

    /// No request waits for an answer.
    pub fn is_idle(&self) -> bool {
        self.inflight.borrow().len() == 0
    }

    /// Another tick of the watch's clock. Whether a request waits for too long.
    pub fn tick(&self) -> bool {
        let late = self.inflight.borrow_mut().tick(TICKS, self.heard.get(), self.moved.get());
        late && self.up.get()
    }

    /// Something came from the server.
    pub(super) fn hear(&self) {
        self.heard.set(self.inflight.borrow().now());
    }

    /// Whether its server has a transmission flag.
    pub fn has(&self, flag: u16) -> bool {
        self.terms.get().flags & flag != 0
    }

    /// As much of a request as its server takes at once, and in the form that it understands; `None` where it knows no such
    /// thing. The second is whether a flush has to follow: what is to be on stable storage is not.
    pub fn suit(&self, mut request: Request) -> Option<(Request, bool)> {
        let writes = matches!(request.command, Command::NBD_CMD_WRITE | Command::NBD_CMD_WRITE_ZEROES);
        match request.command {
            Command::NBD_CMD_READ | Command::NBD_CMD_WRITE => {
                request.length = request.length.min(self.terms.get().max_payload);
            }
            Command::NBD_CMD_WRITE_ZEROES if !self.has(NBD_FLAG_SEND_WRITE_ZEROES) => return None,
            Command::NBD_CMD_TRIM if !self.has(NBD_FLAG_SEND_TRIM) => return None,
            _ => {}
        }
        // Where the export had no volatile cache, the clients do not flush.
        let hidden_cache =
            writes && self.has(NBD_FLAG_SEND_FLUSH) && !self.remote.promise.has(NBD_FLAG_SEND_FLUSH);
        let stable = hidden_cache || request.flags & NBD_CMD_FLAG_FUA != 0;
        let native = stable && self.has(NBD_FLAG_SEND_FUA);
        request.flags &= !NBD_CMD_FLAG_FUA;
        request.flags |= if native { NBD_CMD_FLAG_FUA } else { 0 };
        Some((request, stable && !native))
    }

    /// Says which task sends.
    pub fn set_sender(&self, slot: u32) {
        self.sender.set(Some(slot));
    }

    /// Gives the connection up, if it is up: everybody who waits for it hears of it.
    pub fn disconnect(&self, why: &str) {
        if !self.up.replace(false) {
            return;
        }
        if self.closing.get() {
            log::debug!("{}: connection closed", self.remote.label);
        } else {
            self.remote.log.warn("lost", format_args!("connection lost: {why}"));
        }
        // A good-bye that others survive takes nothing away: the server is still there.
        if !self.closing.get() || !self.remote.promise.has(NBD_FLAG_CAN_MULTI_CONN) {
            self.remote.unflushed.lost_connection();
        }
        self.remote.offer.remove(self.terms.get().size, &self.remote.promise);
        self.patient.set(!self.remote.reconnect.is_zero());
        self.lost.set(Some(Instant::now()));
        if let Some(socket) = &*self.socket.borrow() {
            // Ends what is in flight on it. It fails when the other side has done so already.
            let _ = shutdown(socket.fd.as_raw_fd(), Shutdown::Both);
        }
        self.queue.borrow_mut().clear();
        self.granted.set(None);
        self.inflight.borrow_mut().disconnect(|slot| self.core.wake(slot));
        self.wake(&self.sender);
        self.wake(&self.receiver);
    }

    /// Waits until nobody uses the lost connection's socket any more, and closes it.
    pub async fn lower(&self, io: &Io<R>) {
        while self.busy.get() > 0 {
            io.park().await;
        }
        if let Some(socket) = self.socket.take() {
            self.core.ring().release(socket.target);
        }
    }

    fn target(&self) -> Option<Target> {
        self.socket.borrow().as_ref().map(|socket| socket.target)
    }

    /// Sends from the message's ranges: at least one byte.
    pub(super) async fn send_some(&self, io: &Io<R>, message: &Message<'_>) -> Result<usize, Errno> {
        // WAITALL has the kernel finish a short send by itself where it can.
        let flags = (libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32;
        let sent = self.some(io, |file| Sqe::Sendmsg { file, message, flags }).await;
        self.moved.set(self.inflight.borrow().now());
        sent
    }

    /// Fills the message's ranges: with at least one byte.
    pub(super) async fn receive_some(&self, io: &Io<R>, message: &Message<'_>) -> Result<usize, Errno> {
        let flags = libc::MSG_WAITALL as u32;
        let received = self.some(io, |file| Sqe::Recvmsg { file, message, flags }).await;
        self.hear();
        received
    }

    /// Submits until something moves. The end of the stream is an error.
    pub(super) async fn some<'a>(
        &self,
        io: &'a Io<R>,
        sqe: impl Fn(Target) -> Sqe<'a>,
    ) -> Result<usize, Errno> {
        let mut retries = 0;
        loop {
            let Some(file) = self.target().filter(|_| self.up.get()) else { return Err(Errno::ENOTCONN) };
            match Errno::split(io.submit(&sqe(file)).await) {
                Ok(0) => return Err(Errno::ENOTCONN),
                Ok(count) => return Ok(count as usize),
                Err(Errno::EAGAIN | Errno::EINTR) if retries < MAX_RETRIES => retries += 1,
                Err(errno) => return Err(errno),
            }
        }
    }
}
