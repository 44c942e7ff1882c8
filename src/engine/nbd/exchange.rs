//! A request's side of a connection: the slot waits for its turn, and moves its own payload.

#![forbid(unsafe_code)]

use super::buffer::window;
use super::connection::Connection;
use super::pending::{Failure, Piece, Step};
use super::protocol::Request;
use crate::block::{Errno, Iovec};
use crate::ring::{Io, MessageRanges, Ring, Sqe};

/// Ranges of one message, beside a header.
const MAX_RANGES: usize = Sqe::MAX_RANGES - 1;

impl<R: Ring> Connection<R> {
    /// Has the server carry `request` out, whose payload is in `data`, `skip` bytes in.
    ///
    /// # Errors
    /// The server's, or that the connection was lost.
    pub async fn transact(
        &self,
        io: &Io<R>,
        request: &Request,
        data: &[Iovec<'_>],
        skip: usize,
    ) -> Result<(), Failure> {
        if !self.up.get() {
            return Err(Failure::Lost);
        }
        let cookie = self.inflight.borrow_mut().insert(io.slot(), *request);
        self.watch.wake(&self.core);
        self.queue.borrow_mut().push_back(cookie);
        self.wake(&self.sender);
        let mut ticket = Ticket { connection: self, cookie, using: false };
        loop {
            let step = self.inflight.borrow_mut().step(cookie);
            match step {
                Step::Wait => io.park().await,
                Step::Send => {
                    ticket.take_up();
                    let sent = self.send_payload(io, request, cookie, data, skip).await;
                    ticket.put_down();
                    let whole = sent.is_ok();
                    if let Err(errno) = sent {
                        self.disconnect(&format!("sending failed: {errno}"));
                    }
                    self.inflight.borrow_mut().sent(cookie, whole);
                    self.granted.set(None);
                    self.wake(&self.sender);
                }
                Step::Take(piece) => {
                    ticket.take_up();
                    let received = self.take_piece(io, &piece, data, skip).await;
                    ticket.put_down();
                    // First of all: a piece that did not come must not count as taken.
                    if let Err(errno) = received {
                        self.disconnect(&format!("receiving failed: {errno}"));
                    }
                    self.inflight.borrow_mut().taken(cookie);
                    self.wake(&self.receiver);
                }
                Step::Ended(outcome) => return outcome,
            }
        }
    }

    /// Sends a request's header and payload: in one message, as a rule.
    async fn send_payload(
        &self,
        io: &Io<R>,
        request: &Request,
        cookie: u64,
        data: &[Iovec<'_>],
        skip: usize,
    ) -> Result<(), Errno> {
        let mut header = request.encode(cookie);
        let payload = request.payload();
        let mut sent = 0;
        let mut list = self.borrow_scratch();
        while sent < header.len() + payload {
            let before = sent.saturating_sub(header.len());
            let rest = window(data, skip + before, payload - before).take(MAX_RANGES);
            let head = header.get_mut(sent..).filter(|rest| !rest.is_empty()).map(Iovec::of);
            sent += self.send_some(io, &list.message(head.into_iter().chain(rest))).await?;
        }
        self.return_scratch(list);
        Ok(())
    }

    /// Takes a piece of a reply in: what is here already, and the rest from the socket.
    async fn take_piece(
        &self,
        io: &Io<R>,
        piece: &Piece,
        data: &[Iovec<'_>],
        skip: usize,
    ) -> Result<(), Errno> {
        let (start, length) = (skip + piece.at as usize, piece.length as usize);
        if piece.hole {
            window(data, start, length).for_each(|range| self.buffer.zero(range));
            return Ok(());
        }
        let mut done = length.min(self.buffer.len());
        window(data, start, done).for_each(|range| self.buffer.take(range));
        let mut list = self.borrow_scratch();
        while done < length {
            let rest = window(data, start + done, length - done).take(MAX_RANGES);
            done += self.receive_some(io, &list.message(rest)).await?;
        }
        self.return_scratch(list);
        Ok(())
    }

    fn borrow_scratch(&self) -> MessageRanges {
        self.scratch.borrow_mut().pop().unwrap_or_default()
    }

    fn return_scratch(&self, list: MessageRanges) {
        self.scratch.borrow_mut().push(list);
    }
}

/// A request's place, given back in any case. A future that is dropped before its request has ended leaves the
/// stream in an unknown state: the connection is lost with it.
struct Ticket<'a, R: Ring> {
    connection: &'a Connection<R>,
    cookie: u64,
    /// The slot is using the socket.
    using: bool,
}

impl<R: Ring> Ticket<'_, R> {
    fn take_up(&mut self) {
        self.using = true;
        self.connection.busy.set(self.connection.busy.get() + 1);
    }

    fn put_down(&mut self) {
        if std::mem::take(&mut self.using) {
            self.connection.busy.set(self.connection.busy.get() - 1);
            if !self.connection.up.get() {
                self.connection.wake(&self.connection.receiver);
            }
        }
    }
}

impl<R: Ring> Drop for Ticket<'_, R> {
    fn drop(&mut self) {
        self.put_down();
        if self.connection.inflight.borrow_mut().remove(self.cookie) {
            self.connection.disconnect("a request was abandoned");
        }
    }
}
