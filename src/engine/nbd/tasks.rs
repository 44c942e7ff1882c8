//! A connection's own side: its sender and its receiver.

#![forbid(unsafe_code)]

use super::connection::Connection;
use super::pending::Event;
use super::protocol::{self, Body, Command, Decoded, Request};
use crate::block::{Errno, Iovec};
use crate::ring::{Io, MessageRanges, Ring, Sqe};
use std::rc::Rc;

/// Headers sent together.
const BATCH: usize = 64;

impl<R: Ring> Connection<R> {
    /// The sender's life: as long as the connection is not closed.
    pub async fn send(self: Rc<Self>, io: Io<R>) {
        let mut headers = Vec::with_capacity(BATCH * Request::SIZE);
        let mut ranges = MessageRanges::default();
        while !self.closing.get() {
            if !self.up.get() {
                io.park().await;
                continue;
            }
            headers.clear();
            let grant = self.gather(&mut headers);
            if !headers.is_empty() {
                self.send_headers(&io, &mut ranges, &mut headers).await;
            }
            match grant.filter(|_| self.up.get()) {
                Some(cookie) => self.grant(&io, cookie).await,
                None if headers.is_empty() => io.park().await,
                None => {}
            }
        }
        if self.up.get() {
            let good_bye = Request { flags: 0, command: Command::NBD_CMD_DISC, offset: 0, length: 0 };
            self.send_headers(&io, &mut ranges, &mut good_bye.encode(0)).await;
            self.disconnect("closed");
        }
        self.sender.set(None);
    }

    /// Takes requests from the queue: headers that go out alone, up to a batch of them or to the first request
    /// with a payload, whose cookie is given.
    fn gather(&self, headers: &mut Vec<u8>) -> Option<u64> {
        let mut queue = self.queue.borrow_mut();
        let mut inflight = self.inflight.borrow_mut();
        while headers.len() < BATCH * Request::SIZE {
            let cookie = queue.pop_front()?;
            match inflight.request(cookie) {
                Some(request) if request.payload() > 0 => return Some(cookie),
                Some(request) => {
                    inflight.turn(cookie);
                    headers.extend(request.encode(cookie));
                }
                None => {}
            }
        }
        None
    }

    async fn send_headers(&self, io: &Io<R>, ranges: &mut MessageRanges, headers: &mut [u8]) {
        self.busy.set(self.busy.get() + 1);
        let mut sent = 0;
        while let Some(rest) = headers.get_mut(sent..).filter(|rest| !rest.is_empty()) {
            let message = ranges.message([Iovec::of(rest)].into_iter());
            match self.send_some(io, &message).await {
                Ok(count) => sent += count,
                Err(errno) => {
                    self.disconnect(&format!("sending failed: {errno}"));
                    break;
                }
            }
        }
        self.busy.set(self.busy.get() - 1);
        self.wake(&self.receiver);
    }

    /// Lends the stream out to a request's slot, and waits for it to come back.
    async fn grant(&self, io: &Io<R>, cookie: u64) {
        let Some(slot) = self.inflight.borrow_mut().turn(cookie) else { return };
        self.granted.set(Some(cookie));
        self.core.wake(slot);
        while self.granted.get().is_some() {
            io.park().await;
        }
    }

    /// The receiver's work from [`raise`](Self::raise) on, until something goes wrong: what that was.
    pub async fn receive(&self, io: &Io<R>) -> String {
        loop {
            if !self.up.get() {
                return "already".into();
            }
            let mut head = [0; protocol::MAX_HEAD];
            let count = self.buffer.peek(&mut head);
            let (size, frame) = match protocol::decode(&head[..count]) {
                Ok(Decoded::Frame { size, frame }) => (size, frame),
                Ok(Decoded::More(_)) => match self.fill(io).await {
                    Ok(()) => continue,
                    Err(why) => return why,
                },
                Err(violation) => return format!("the server broke the protocol: {violation}"),
            };
            self.buffer.consume(size);
            if let Body::Error { skip, .. } = frame.body
                && let Err(why) = self.skip(io, skip as usize).await
            {
                return why;
            }
            let event = self.inflight.borrow_mut().accept(&frame);
            match event {
                Ok(Event::Nothing) => {}
                Ok(Event::Ended { slot }) => {
                    self.proven.set(true);
                    self.core.wake(slot);
                }
                Ok(Event::Piece { slot, cookie }) => {
                    self.proven.set(true);
                    self.core.wake(slot);
                    while self.inflight.borrow_mut().has_piece(cookie) {
                        io.park().await;
                    }
                }
                Ok(Event::Shutdown) => return "the server is shutting down".into(),
                Err(violation) => return format!("the server broke the protocol: {violation}"),
            }
        }
    }

    /// Receives some more bytes ahead.
    async fn fill(&self, io: &Io<R>) -> Result<(), String> {
        let range = self.buffer.space();
        match self.some(io, |file| Sqe::Recv { file, range, flags: 0 }).await {
            Ok(count) => {
                self.buffer.filled(count);
                self.hear();
                Ok(())
            }
            Err(Errno::ENOTCONN) => Err("the server closed it".into()),
            Err(errno) => Err(format!("receiving failed: {errno}")),
        }
    }

    /// Drops the next bytes of the stream.
    async fn skip(&self, io: &Io<R>, mut count: usize) -> Result<(), String> {
        loop {
            let here = count.min(self.buffer.len());
            self.buffer.consume(here);
            count -= here;
            if count == 0 {
                return Ok(());
            }
            self.fill(io).await?;
        }
    }
}
