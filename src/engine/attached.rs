//! A volume as one worker uses it.

use super::backend::Backend;
use super::file::FileOps;
use super::grace::{Admitted, Grace};
use super::losses::{Flusher, Losses};
use super::memory::Memory;
use super::nbd::NbdOps;
use super::null::Null;
use super::policy::Policy;
use crate::block::{Data, Errno, Geometry};
use crate::log_limit::LogLimit;
use crate::ring::{Io, Ring};
use std::sync::Arc;
use std::time::Duration;

/// One worker's use of a volume. Which kind is a match, not a pointer: the compiler sees through it.
pub struct Attached<R: Ring> {
    geometry: Geometry,
    ops: Ops<R>,
    grace: Grace,
    policy: Arc<Policy>,
}

/// The kinds. Layered volumes to come are boxed here.
pub(super) enum Ops<R: Ring> {
    File(FileOps<R>),
    Memory(Memory),
    Null(Null),
    Nbd(NbdOps<R>),
}

impl<R: Ring> Attached<R> {
    pub(super) fn new(geometry: Geometry, ops: Ops<R>, policy: Arc<Policy>) -> Attached<R> {
        Attached { geometry, ops, grace: Grace::default(), policy }
    }

    /// For lines that its clients bring about.
    pub fn log(&self) -> &LogLimit {
        self.policy.log()
    }

    /// Name of the volume.
    pub fn name(&self) -> &str {
        self.policy.volume()
    }

    /// What becomes of the requests that the store fails.
    pub(super) fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Where losses of acknowledged writes are kept; `None` where there can be none.
    fn losses(&self) -> Option<&Losses> {
        match &self.ops {
            Ops::File(file) => Some(file.losses()),
            Ops::Nbd(nbd) => Some(nbd.losses()),
            Ops::Memory(_) | Ops::Null(_) => None,
        }
    }

    /// Brings every write that completed before to stable storage, for a client that wants to know of each loss of
    /// acknowledged writes that it was not told of. The volume's [policy](super::policy) has no say in it.
    ///
    /// # Errors
    /// The store's, or `EIO` for a loss that the store told somebody else; `ERESTART` when the slot is interrupted, which
    /// tells the client nothing.
    pub async fn flush_for(&self, io: &Io<R>, flusher: &Flusher) -> Result<(), Errno> {
        let Some(losses) = self.losses() else { return Ok(()) };
        let heard = flusher.heard();
        match self.flush(io).await {
            Ok(()) => {
                let epoch = losses.settle(io).await?;
                if epoch == heard && !flusher.is_doubtful() {
                    return Ok(());
                }
                flusher.hear(epoch);
                Err(Errno::EIO)
            }
            // It is not told yet: the flush is made again, by us or by whoever goes on with its queue.
            Err(Errno::ERESTART) => Err(Errno::ERESTART),
            Err(errno) if self.may_flush_again(errno) && self.policy.covers(errno) => Err(errno),
            Err(errno) => {
                flusher.hear(losses.epoch());
                Err(errno)
            }
        }
    }

    /// How often the store told of lost writes so far.
    pub(super) fn loss_reports(&self) -> u64 {
        self.losses().map_or(0, Losses::reports)
    }

    /// Vouches for a durable write that the store has acknowledged, and that began when there were `before` reports of
    /// losses.
    ///
    /// # Errors
    /// `EIO` when writes were lost meanwhile, which may be these; `ERESTART` when the slot is interrupted.
    pub(super) async fn vouch(&self, io: &Io<R>, before: u64) -> Result<(), Errno> {
        let Some(losses) = self.losses() else { return Ok(()) };
        losses.settle(io).await?;
        if losses.reports() == before { Ok(()) } else { Err(Errno::EIO) }
    }

    /// A write that is not durable is about to be acknowledged, and began when there were `before` reports of losses.
    pub(super) fn catch_up(&self, before: u64) {
        if let Some(losses) = self.losses() {
            losses.catch_up(before);
        }
    }

    /// Whether a flush that failed so may be tried again: it never left, and what it was to cover is still known.
    pub(super) fn may_flush_again(&self, errno: Errno) -> bool {
        matches!(self.ops, Ops::Nbd(_)) && errno == Errno::ENOTCONN
    }

    /// What the request in `slot` waits for, for people.
    pub fn waits_for(&self, slot: u32) -> String {
        self.policy.waits(slot).unwrap_or_else(|| match self.ops {
            Ops::Nbd(_) => "the NBD server".to_owned(),
            _ => "the store".to_owned(),
        })
    }

    /// What the export looks like.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Counts a request among those that [`drain`](Self::drain) waits for, until what it returns is dropped.
    pub(super) fn admitted(&self) -> Admitted<'_> {
        self.grace.enter()
    }

    /// Waits until every request of this worker is over that was admitted before the call, while new ones go on.
    /// False when that takes longer than `limit`.
    pub async fn drain(&self, io: &Io<R>, limit: Duration) -> bool {
        self.grace.pass(io, limit).await
    }

    /// Whether requests may carry a registered buffer: only what the kernel moves without our looking.
    pub fn takes_registered(&self) -> bool {
        matches!(self.ops, Ops::File(_))
    }
}

impl<R: Ring> Attached<R> {
    /// Waits no more for the answers of a server to requests whose slots are interrupted. What it does with them is not
    /// known then, as after any loss of a connection.
    pub fn hang_up(&self) {
        if let Ops::Nbd(nbd) = &self.ops {
            nbd.hang_up();
        }
    }

    /// Fails the requests that wait for somebody else: a server that does not answer, or a resume. Those that the kernel
    /// has it completes itself. For a service that ends and was told to wait no longer.
    pub fn abandon(&self) {
        self.policy.abandon();
        if let Ops::Nbd(nbd) = &self.ops {
            nbd.abandon();
        }
    }
}

/// The same call on whichever kind it is.
macro_rules! each {
    ($self:expr, $volume:ident => $call:expr) => {
        match &$self.ops {
            Ops::File($volume) => $call,
            Ops::Memory($volume) => $call,
            Ops::Null($volume) => $call,
            Ops::Nbd($volume) => $call,
        }
    };
}

impl<R: Ring> Backend<R> for Attached<R> {
    async fn read(&self, io: &Io<R>, data: Data<'_>, len: u64, offset: u64) -> Result<(), Errno> {
        each!(self, volume => volume.read(io, data, len, offset).await)
    }

    async fn write(&self, io: &Io<R>, data: Data<'_>, len: u64, offset: u64, fua: bool) -> Result<(), Errno> {
        each!(self, volume => volume.write(io, data, len, offset, fua).await)
    }

    async fn flush(&self, io: &Io<R>) -> Result<(), Errno> {
        each!(self, volume => volume.flush(io).await)
    }

    async fn discard(&self, io: &Io<R>, offset: u64, len: u64) -> Result<(), Errno> {
        each!(self, volume => volume.discard(io, offset, len).await)
    }

    async fn write_zeroes(&self, io: &Io<R>, offset: u64, len: u64, unmap: bool) -> Result<(), Errno> {
        each!(self, volume => volume.write_zeroes(io, offset, len, unmap).await)
    }
}
