//! A volume as one worker uses it: a tree, and the checkpoint on each of its edges.
//!
//! An [`Edge`] leads to a driver's channel. Whoever stands above it, the root for its clients or a layer for its own
//! purposes, [submits](Edge::submit) requests to it, and each of them is checked there: bounds, alignment, read-only, the
//! limits of its operation. What the driver need not know is settled there too: write-zeroes where it has no such thing.

use super::driver::AnyChannel;
use super::losses::Losses;
use crate::block::{Data, Errno, Flags, Geometry, Op, Request};
use crate::ring::{Io, Ring};

/// The operations of a volume that keeps bytes, as one worker uses it.
///
/// The [edge](Edge) has checked every argument: ranges lie inside the volume on logical blocks, `data` holds exactly
/// `len` bytes, a read-only volume sees no write. An operation is complete or failed when it returns: none of them is ever
/// short.
pub trait Leaf<R: Ring> {
    /// Fills `data` with `len` bytes from `offset`.
    async fn read(&self, io: &Io<R>, data: Data<'_>, len: u64, offset: u64) -> Result<(), Errno>;

    /// Stores `len` bytes of `data` at `offset`; with `fua` on stable storage before it returns.
    async fn write(&self, io: &Io<R>, data: Data<'_>, len: u64, offset: u64, fua: bool) -> Result<(), Errno>;

    /// Brings every write that completed before to stable storage.
    async fn flush(&self, io: &Io<R>) -> Result<(), Errno>;

    /// Gives the range back; what it holds afterwards is undefined.
    async fn discard(&self, io: &Io<R>, offset: u64, len: u64) -> Result<(), Errno>;

    /// Makes the range read zero, and only with `unmap` gives its blocks back. `EOPNOTSUPP` means "write them yourself",
    /// and the edge does.
    async fn write_zeroes(&self, io: &Io<R>, offset: u64, len: u64, unmap: bool) -> Result<(), Errno>;

    /// Where losses of acknowledged writes are kept; `None` where there can be none, and nothing to flush.
    fn losses(&self) -> Option<&Losses>;

    /// Whether a flush that failed so may be tried again: it never left, and what it was to cover is still known.
    fn may_flush_again(&self, errno: Errno) -> bool;

    /// Whom its requests wait for, for people.
    fn waits_for(&self) -> &'static str;

    /// Waits no more for the answers of a server to requests whose slots are interrupted. What it does with them is not
    /// known then, as after any loss of a connection.
    fn hang_up(&self);

    /// Fails the requests that wait for somebody else than the kernel, which completes its own.
    fn abandon(&self);
}

/// The way to a volume's channel, or to that of one below it.
pub struct Edge<R: Ring> {
    geometry: Geometry,
    channel: AnyChannel<R>,
}

/// The flush that whoever is above may make.
const FLUSH: Request<'static> = Request {
    op: Op::Flush,
    flags: Flags { fua: false, unmap: false },
    sector: 0,
    sectors: 0,
    data: Data::None,
};

impl<R: Ring> Edge<R> {
    pub(super) fn new(geometry: Geometry, channel: AnyChannel<R>) -> Edge<R> {
        Edge { geometry, channel }
    }

    /// Shape and abilities of what it leads to.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Carries `request` out, wholly or with the error that stopped it. FUA is for writes alone: whoever submits a
    /// write-zeroes that is to be durable flushes after it.
    ///
    /// # Errors
    /// See [`validate`](Self::validate); otherwise what the volume says.
    pub async fn submit(&self, io: &Io<R>, request: &Request<'_>) -> Result<(), Errno> {
        self.validate(request)?;
        self.perform(io, request, request.flags.fua).await
    }

    /// Carries out what was [validated](Self::validate): see [`AnyChannel::perform`].
    pub(super) fn perform(
        &self,
        io: &Io<R>,
        request: &Request<'_>,
        fua: bool,
    ) -> impl Future<Output = Result<(), Errno>> {
        self.channel.perform(io, request, fua)
    }

    /// See [`AnyChannel::read_tail`].
    pub(super) async fn read_tail(
        &self,
        io: &Io<R>,
        data: Data<'_>,
        len: u64,
        offset: u64,
    ) -> Result<(), Errno> {
        self.channel.read_tail(io, data, len, offset).await
    }

    /// Brings every write that completed before to stable storage.
    ///
    /// # Errors
    /// The volume's.
    pub async fn flush(&self, io: &Io<R>) -> Result<(), Errno> {
        self.perform(io, &FLUSH, false).await
    }

    /// Refuses what no volume should see. Costs a handful of comparisons.
    ///
    /// # Errors
    /// `EROFS` for a change to a read-only volume, `ENOSPC` for a write and `EIO` for anything else past the end (what the
    /// kernel's own block layer answers), `EINVAL` for a range that is not on logical blocks or longer than the volume
    /// offers for its operation, `EOPNOTSUPP` for a discard where there is none.
    pub(super) fn validate(&self, request: &Request<'_>) -> Result<(), Errno> {
        let geometry = &self.geometry;
        let changes = matches!(request.op, Op::Write | Op::Discard | Op::WriteZeroes);
        if changes && geometry.read_only {
            return Err(Errno::EROFS);
        }
        if request.op == Op::Discard && geometry.discard.is_none() {
            return Err(Errno::EOPNOTSUPP);
        }
        if !geometry.contains(request.sector, request.sectors) {
            return Err(if changes { Errno::ENOSPC } else { Errno::EIO });
        }
        if !geometry.aligned(request.sector, request.sectors) {
            return Err(Errno::EINVAL);
        }
        debug_assert!(fits(request), "the data does not fit its request: {request:?}");
        // A store does these in one go, and what comes after them waits: hence the limits, which are the client's to keep.
        let most = match request.op {
            Op::Discard => geometry.discard.map_or(0, |limits| limits.max_sectors),
            Op::WriteZeroes => geometry.max_write_zeroes,
            Op::Read | Op::Write | Op::Flush => return Ok(()),
        };
        if request.sectors > most { Err(Errno::EINVAL) } else { Ok(()) }
    }

    /// See [`AnyChannel::may_flush_again`].
    pub(super) fn may_flush_again(&self, errno: Errno) -> bool {
        self.channel.may_flush_again(errno)
    }

    /// See [`AnyChannel::waits_for`].
    pub(super) fn waits_for(&self) -> &'static str {
        self.channel.waits_for()
    }

    /// See [`AnyChannel::hang_up`].
    pub(super) fn hang_up(&self) {
        self.channel.hang_up();
    }

    /// See [`AnyChannel::abandon`].
    pub(super) fn abandon(&self) {
        self.channel.abandon();
    }

    /// Whether anything below has something to flush.
    pub(super) fn flushes(&self) -> bool {
        self.channel.losses().is_some() || !self.channel.below().is_empty()
    }

    /// How often stores told of lost writes so far, all of them together.
    pub(super) fn loss_reports(&self) -> u64 {
        let own = self.channel.losses().map_or(0, Losses::reports);
        match self.channel.below() {
            [] => own,
            below => own + below.iter().map(Edge::loss_reports).sum::<u64>(),
        }
    }

    /// Losses so far, all together.
    pub(super) fn epoch(&self) -> u64 {
        let below = self.channel.below().iter().map(Edge::epoch).sum::<u64>();
        below + self.channel.losses().map_or(0, Losses::epoch)
    }

    /// Counts one loss more, wherever losses are kept first.
    pub(super) fn count_loss(&self) {
        match (self.channel.losses(), self.channel.below()) {
            (Some(losses), _) => losses.count(),
            (None, [first, ..]) => first.count_loss(),
            (None, []) => {}
        }
    }

    /// See [`Losses::settle`]: of all below, one after the other. How many losses there are then.
    ///
    /// # Errors
    /// `ERESTART` when the slot is interrupted.
    pub(super) async fn settle(&self, io: &Io<R>) -> Result<u64, Errno> {
        let mut epoch = match self.channel.losses() {
            Some(losses) => losses.settle(io).await?,
            None => 0,
        };
        for below in self.channel.below() {
            epoch += Box::pin(below.settle(io)).await?;
        }
        Ok(epoch)
    }
}

/// Whether the data of a request is of its length. A registered buffer says nothing of its own.
fn fits(request: &Request<'_>) -> bool {
    match &request.data {
        Data::None => !matches!(request.op, Op::Read | Op::Write) || request.is_empty(),
        Data::Iovecs(window) => window.len() == request.len(),
        Data::Registered { .. } => true,
    }
}
