//! A volume's operations as requests to its server.

#![forbid(unsafe_code)]

use super::inflight::Failure;
use super::pool::Pool;
use super::protocol::*;
use super::{MAX_RANGE, NbdVolume, Remote};
use crate::block::{Data, Errno, Iovec};
use crate::engine::backend::Backend;
use crate::engine::losses::Losses;
use crate::ring::{Core, Io, Ring};
use std::rc::Rc;
use std::sync::Arc;

/// One worker's use of an export.
pub struct NbdOps<R: Ring> {
    remote: Arc<Remote>,
    pub(super) pool: Rc<Pool<R>>,
}

impl<R: Ring> NbdOps<R> {
    /// Starts connecting; requests wait for the first attempt. Nothing blocks.
    pub fn new(core: &Rc<Core<R>>, volume: &NbdVolume) -> NbdOps<R> {
        let remote = volume.remote.clone();
        let pool = Pool::join(core, &remote);
        NbdOps { remote, pool }
    }

    /// See [`Losses`].
    pub fn losses(&self) -> &Losses {
        &self.remote.losses
    }

    /// Ends its connections, and with them every request, with an error.
    pub fn abandon(&self) {
        self.pool.abandon();
    }

    /// See [`Pool::hang_up`].
    pub fn hang_up(&self) {
        self.pool.hang_up();
    }

    /// Has one request carried out, over as many connections as it takes.
    async fn perform(&self, io: &Io<R>, request: &Request, data: &[Iovec], skip: usize) -> Result<(), Errno> {
        let mut lost = None;
        loop {
            let connection = self.pool.any(io).await?;
            let era = self.remote.ledger.era();
            // The server answers a durable write as its own `fsync(2)` ended, which may tell of other writes.
            let durable = request.flags & NBD_CMD_FLAG_FUA != 0;
            let _sync = durable.then(|| self.losses().begin());
            match connection.transact(io, request, data, skip).await {
                Ok(()) => {
                    self.book(request, era);
                    return Ok(());
                }
                Err(Failure::Server(errno)) => {
                    if durable {
                        self.losses().report();
                    }
                    return Err(errno);
                }
                Err(Failure::Lost) if io.is_interrupted() => return Err(Errno::ERESTART),
                Err(Failure::Lost) => self.pool.again(&mut lost)?,
            }
        }
    }

    /// Remembers what a flush has to cover.
    fn book(&self, request: &Request, era: u64) {
        let writes = matches!(request.command, Command::NBD_CMD_WRITE | Command::NBD_CMD_WRITE_ZEROES);
        if writes && request.flags & NBD_CMD_FLAG_FUA == 0 && self.remote.has(NBD_FLAG_SEND_FLUSH) {
            self.remote.ledger.acknowledge(era);
        }
    }

    /// A read or write, in pieces that the server takes.
    async fn transfer(
        &self,
        io: &Io<R>,
        command: Command,
        flags: u16,
        data: Data<'_>,
        len: u64,
        offset: u64,
    ) -> Result<(), Errno> {
        let Data::Iovecs(window) = data else { return Err(Errno::EINVAL) };
        let (iovecs, skip) = window.as_raw();
        let mut done = 0;
        while done < len {
            let length = (len - done).min(self.remote.max_payload.into()) as u32;
            let request = Request { flags, command, offset: offset + done, length };
            self.perform(io, &request, iovecs, skip + done as usize).await?;
            done += u64::from(length);
        }
        Ok(())
    }

    /// A request over a range without payload, in pieces whose length fits.
    async fn range(
        &self,
        io: &Io<R>,
        command: Command,
        flags: u16,
        offset: u64,
        len: u64,
    ) -> Result<(), Errno> {
        let mut done = 0;
        while done < len {
            let length = (len - done).min(MAX_RANGE.into()) as u32;
            self.perform(io, &Request { flags, command, offset: offset + done, length }, &[], 0).await?;
            done += u64::from(length);
        }
        Ok(())
    }
}

impl<R: Ring> Backend<R> for NbdOps<R> {
    async fn read(&self, io: &Io<R>, data: Data<'_>, len: u64, offset: u64) -> Result<(), Errno> {
        self.transfer(io, Command::NBD_CMD_READ, 0, data, len, offset).await
    }

    async fn write(&self, io: &Io<R>, data: Data<'_>, len: u64, offset: u64, fua: bool) -> Result<(), Errno> {
        let native = fua && self.remote.has(NBD_FLAG_SEND_FUA);
        let flags = if native { NBD_CMD_FLAG_FUA } else { 0 };
        self.transfer(io, Command::NBD_CMD_WRITE, flags, data, len, offset).await?;
        if fua && !native { self.flush(io).await } else { Ok(()) }
    }

    /// Goes over a connection that can vouch for every write that is not flushed yet; see
    /// [`ledger`](super::ledger). A server without flush has nothing to flush.
    async fn flush(&self, io: &Io<R>) -> Result<(), Errno> {
        if !self.remote.has(NBD_FLAG_SEND_FLUSH) {
            return Ok(());
        }
        let ledger = &self.remote.ledger;
        let request = Request { flags: 0, command: Command::NBD_CMD_FLUSH, offset: 0, length: 0 };
        let mut lost = None;
        loop {
            // Whether there is one at all; which one depends on the debt at that time.
            self.pool.any(io).await?;
            let debt = ledger.debt();
            let Some(connection) = self.pool.pick(|connection| debt.covered_by(connection.era())) else {
                log::error!(
                    "{:?}: writes that were not flushed may be lost with their connection",
                    self.remote.address
                );
                // In this order: a flush that finds the books closed finds the loss, too.
                self.losses().report();
                ledger.flushed(debt);
                return Err(Errno::EIO);
            };
            let _sync = self.losses().begin();
            match connection.transact(io, &request, &[], 0).await {
                Ok(()) => {
                    ledger.flushed(debt);
                    return Ok(());
                }
                Err(Failure::Server(errno)) => {
                    self.losses().report();
                    return Err(errno);
                }
                Err(Failure::Lost) if io.is_interrupted() => return Err(Errno::ERESTART),
                Err(Failure::Lost) => self.pool.again(&mut lost)?,
            }
        }
    }

    async fn discard(&self, io: &Io<R>, offset: u64, len: u64) -> Result<(), Errno> {
        self.range(io, Command::NBD_CMD_TRIM, 0, offset, len).await
    }

    async fn write_zeroes(&self, io: &Io<R>, offset: u64, len: u64, unmap: bool) -> Result<(), Errno> {
        if !self.remote.has(NBD_FLAG_SEND_WRITE_ZEROES) {
            return Err(Errno::EOPNOTSUPP);
        }
        let flags = if unmap { 0 } else { NBD_CMD_FLAG_NO_HOLE };
        self.range(io, Command::NBD_CMD_WRITE_ZEROES, flags, offset, len).await
    }
}

impl<R: Ring> Drop for NbdOps<R> {
    fn drop(&mut self) {
        self.pool.leave();
    }
}
