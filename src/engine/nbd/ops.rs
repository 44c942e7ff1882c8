//! A volume's operations as requests to its server.

#![forbid(unsafe_code)]

use super::pending::Failure;
use super::pool::Pool;
use super::protocol::*;
use super::{MAX_PAYLOAD, MAX_RANGE, NbdStore, Remote};
use crate::block::{Data, Errno, Iovec};
use crate::engine::losses::Losses;
use crate::engine::node::Leaf;
use crate::ring::{Core, Io, Ring};
use std::rc::Rc;
use std::sync::Arc;

/// One worker's use of an export.
pub struct NbdOps<R: Ring> {
    remote: Arc<Remote>,
    pub(super) pool: Rc<Pool<R>>,
}

/// What a server has done of a request.
struct Done {
    /// Bytes, from its beginning.
    length: u32,
    /// It is to be on stable storage, and needs a flush for that.
    flush: bool,
}

impl<R: Ring> NbdOps<R> {
    /// Starts connecting; requests wait for the first attempt. Nothing blocks.
    pub fn new(core: &Rc<Core<R>>, volume: &NbdStore) -> NbdOps<R> {
        let remote = volume.remote.clone();
        let pool = Pool::join(core, &remote);
        NbdOps { remote, pool }
    }

    /// Has the server carry out as much of a request as it takes at once, over as many connections as that needs.
    async fn perform(
        &self,
        io: &Io<R>,
        request: &Request,
        data: &[Iovec<'_>],
        skip: usize,
    ) -> Result<Done, Errno> {
        let mut lost = None;
        loop {
            let connection = self.pool.any(io).await?;
            let Some((request, flush)) = connection.suit(*request) else { return Err(Errno::EOPNOTSUPP) };
            let epoch = self.remote.unflushed.epoch();
            // The server answers a durable write as its own `fsync(2)` ended, which may tell of other writes.
            let durable = request.flags & NBD_CMD_FLAG_FUA != 0;
            let _sync = durable.then(|| self.remote.losses.begin());
            // The connection may be another one by the time of the answer.
            let flushes = connection.has(NBD_FLAG_SEND_FLUSH);
            match connection.transact(io, &request, data, skip).await {
                Ok(()) => {
                    if flushes {
                        self.book(&request, epoch);
                    }
                    return Ok(Done { length: request.length, flush });
                }
                Err(Failure::Server(errno)) => {
                    if durable {
                        self.remote.losses.report();
                    }
                    return Err(errno);
                }
                Err(Failure::Lost) if io.is_interrupted() => return Err(Errno::ERESTART),
                Err(Failure::Lost) => self.pool.again(&mut lost)?,
            }
        }
    }

    /// Remembers what a flush has to cover.
    fn book(&self, request: &Request, epoch: u64) {
        let writes = matches!(request.command, Command::NBD_CMD_WRITE | Command::NBD_CMD_WRITE_ZEROES);
        if writes && request.flags & NBD_CMD_FLAG_FUA == 0 {
            self.remote.unflushed.acknowledge(epoch);
        }
    }

    /// A read or write, in pieces that the server takes. Whether a flush has to follow.
    async fn transfer(
        &self,
        io: &Io<R>,
        command: Command,
        flags: u16,
        data: Data<'_>,
        len: u64,
        offset: u64,
    ) -> Result<bool, Errno> {
        let Data::Iovecs(window) = data else { return Err(Errno::EINVAL) };
        let (iovecs, skip) = window.as_raw();
        let (mut done, mut flush) = (0, false);
        while done < len {
            let length = (len - done).min(MAX_PAYLOAD.into()) as u32;
            let request = Request { flags, command, offset: offset + done, length };
            let part = self.perform(io, &request, iovecs, skip + done as usize).await?;
            done += u64::from(part.length);
            flush |= part.flush;
        }
        Ok(flush)
    }

    /// A request over a range without payload, in pieces whose length fits. Whether a flush has to follow.
    async fn range(
        &self,
        io: &Io<R>,
        command: Command,
        flags: u16,
        offset: u64,
        len: u64,
    ) -> Result<bool, Errno> {
        let (mut done, mut flush) = (0, false);
        while done < len {
            let length = (len - done).min(MAX_RANGE.into()) as u32;
            let request = Request { flags, command, offset: offset + done, length };
            let part = self.perform(io, &request, &[], 0).await?;
            done += u64::from(part.length);
            flush |= part.flush;
        }
        Ok(flush)
    }
}

impl<R: Ring> Leaf<R> for NbdOps<R> {
    async fn read(&self, io: &Io<R>, data: Data<'_>, len: u64, offset: u64) -> Result<(), Errno> {
        self.transfer(io, Command::NBD_CMD_READ, 0, data, len, offset).await.map(drop)
    }

    async fn write(&self, io: &Io<R>, data: Data<'_>, len: u64, offset: u64, fua: bool) -> Result<(), Errno> {
        let flags = if fua { NBD_CMD_FLAG_FUA } else { 0 };
        let flush = self.transfer(io, Command::NBD_CMD_WRITE, flags, data, len, offset).await?;
        if flush { self.flush(io).await } else { Ok(()) }
    }

    /// Goes over a connection that can vouch for every write that is not flushed yet; see
    /// [`unflushed`](super::unflushed). A server without flush has nothing to flush.
    async fn flush(&self, io: &Io<R>) -> Result<(), Errno> {
        let unflushed = &self.remote.unflushed;
        if !self.remote.promise.has(NBD_FLAG_SEND_FLUSH) && unflushed.flush_point().oldest.is_none() {
            return Ok(());
        }
        let request = Request { flags: 0, command: Command::NBD_CMD_FLUSH, offset: 0, length: 0 };
        let mut lost = None;
        loop {
            // Whether there is one at all; which one depends on what is unflushed at that time.
            self.pool.any(io).await?;
            let flush_point = unflushed.flush_point();
            let Some(connection) = self.pool.pick(|connection| flush_point.covered_by(connection.epoch()))
            else {
                let message = "writes that were not flushed may be lost with their connection";
                self.remote.log.error("unflushed", format_args!("{message}"));
                // In this order: a flush that finds them settled finds the loss, too.
                self.remote.losses.report();
                unflushed.flushed(flush_point);
                return Err(Errno::EIO);
            };
            if !connection.has(NBD_FLAG_SEND_FLUSH) {
                return Ok(());
            }
            let _sync = self.remote.losses.begin();
            match connection.transact(io, &request, &[], 0).await {
                Ok(()) => {
                    unflushed.flushed(flush_point);
                    return Ok(());
                }
                Err(Failure::Server(errno)) => {
                    self.remote.losses.report();
                    return Err(errno);
                }
                Err(Failure::Lost) if io.is_interrupted() => return Err(Errno::ERESTART),
                Err(Failure::Lost) => self.pool.again(&mut lost)?,
            }
        }
    }

    async fn discard(&self, io: &Io<R>, offset: u64, len: u64) -> Result<(), Errno> {
        self.range(io, Command::NBD_CMD_TRIM, 0, offset, len).await.map(drop)
    }

    async fn write_zeroes(&self, io: &Io<R>, offset: u64, len: u64, unmap: bool) -> Result<(), Errno> {
        let flags = if unmap { 0 } else { NBD_CMD_FLAG_NO_HOLE };
        let flush = self.range(io, Command::NBD_CMD_WRITE_ZEROES, flags, offset, len).await?;
        if flush { self.flush(io).await } else { Ok(()) }
    }

    fn losses(&self) -> Option<&Losses> {
        Some(&self.remote.losses)
    }

    fn may_flush_again(&self, errno: Errno) -> bool {
        errno == Errno::ENOTCONN
    }

    fn waits_for(&self) -> &'static str {
        "the NBD server"
    }

    fn hang_up(&self) {
        self.pool.hang_up();
    }

    /// Ends its connections, and with them every request, with an error.
    fn abandon(&self) {
        self.pool.abandon();
    }
}

impl<R: Ring> Drop for NbdOps<R> {
    fn drop(&mut self) {
        self.pool.leave();
    }
}
