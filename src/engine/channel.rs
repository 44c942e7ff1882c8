//! A volume as one worker uses it: the root of its tree, with what only the root has.

use super::drain_epochs::{DrainEpochs, EpochGuard};
use super::losses::Flusher;
use super::node::Edge;
use super::policy::Policy;
use crate::block::{Data, Errno, Geometry};
use crate::log_limit::LogLimit;
use crate::ring::{Io, Ring};
use std::sync::Arc;
use std::time::Duration;

/// One worker's use of a volume.
pub struct VolumeChannel<R: Ring> {
    edge: Edge<R>,
    drain_epochs: DrainEpochs,
    policy: Arc<Policy>,
}

impl<R: Ring> VolumeChannel<R> {
    pub(super) fn new(edge: Edge<R>, policy: Arc<Policy>) -> VolumeChannel<R> {
        VolumeChannel { edge, drain_epochs: DrainEpochs::default(), policy }
    }

    /// For lines that its clients bring about.
    pub fn log(&self) -> &LogLimit {
        self.policy.log()
    }

    /// Name of the volume.
    pub fn name(&self) -> &str {
        self.policy.volume()
    }

    /// The way to its driver.
    pub(super) fn edge(&self) -> &Edge<R> {
        &self.edge
    }

    /// What becomes of the requests that the store fails.
    pub(super) fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Brings every write that completed before to stable storage, for a client that wants to know of each loss of
    /// acknowledged writes that it was not told of. The volume's [policy](super::policy) has no say in it.
    ///
    /// # Errors
    /// The store's, or `EIO` for a loss that the store told somebody else; `ERESTART` when the slot is interrupted, which
    /// tells the client nothing.
    pub async fn flush_for(&self, io: &Io<R>, flusher: &Flusher) -> Result<(), Errno> {
        if !self.edge.flushes() {
            return Ok(());
        }
        let heard = flusher.heard();
        match self.edge.flush(io).await {
            Ok(()) => {
                let epoch = self.edge.settle(io).await?;
                if epoch == heard && !flusher.is_doubtful() {
                    return Ok(());
                }
                flusher.hear(epoch);
                Err(Errno::EIO)
            }
            // It is not told yet: the flush is made again, by us or by whoever goes on with its queue.
            Err(Errno::ERESTART) => Err(Errno::ERESTART),
            Err(errno) if self.edge.may_flush_again(errno) && self.policy.covers(errno) => Err(errno),
            Err(errno) => {
                flusher.hear(self.edge.epoch());
                Err(errno)
            }
        }
    }

    /// Vouches for a durable write that the store has acknowledged, and that began when there were `before` reports of
    /// losses.
    ///
    /// # Errors
    /// `EIO` when writes were lost meanwhile, which may be these; `ERESTART` when the slot is interrupted.
    pub(super) async fn vouch(&self, io: &Io<R>, before: u64) -> Result<(), Errno> {
        if !self.edge.flushes() {
            return Ok(());
        }
        self.edge.settle(io).await?;
        if self.edge.loss_reports() == before { Ok(()) } else { Err(Errno::EIO) }
    }

    /// A write is about to be acknowledged that is not durable, and began when there were `before` reports of losses. What
    /// the store told of meanwhile may have been this write, and whoever was told of it did not count on that; so everybody
    /// hears of one more loss.
    pub(super) fn catch_up(&self, before: u64) {
        if self.edge.loss_reports() != before {
            self.edge.count_loss();
        }
    }

    /// Reads what the store has behind the last whole block ([`Volume::tail`](super::Volume::tail)): for offline jobs, which
    /// keep every byte. What is asked for is not checked here, and passes by [`submit`](super::submit()).
    ///
    /// # Errors
    /// The store's.
    pub async fn read_tail(&self, io: &Io<R>, data: Data<'_>, len: u64, offset: u64) -> Result<(), Errno> {
        self.edge.read_tail(io, data, len, offset).await
    }

    /// What the request in `slot` waits for, for people.
    pub fn waits_for(&self, slot: u32) -> String {
        self.policy.waits(slot).unwrap_or_else(|| self.edge.waits_for().to_owned())
    }

    /// What the export looks like.
    pub fn geometry(&self) -> &Geometry {
        self.edge.geometry()
    }

    /// Counts a request among those that [`drain`](Self::drain) waits for, until what it returns is dropped.
    pub(super) fn admitted(&self) -> EpochGuard<'_> {
        self.drain_epochs.enter()
    }

    /// Waits until every request of this worker is over that was admitted before the call, while new ones go on.
    /// False when that takes longer than `limit`.
    pub async fn drain(&self, io: &Io<R>, limit: Duration) -> bool {
        self.drain_epochs.pass(io, limit).await
    }

    /// Waits no more for the answers of a server to requests whose slots are interrupted. What it does with them is not
    /// known then, as after any loss of a connection.
    pub fn hang_up(&self) {
        self.edge.hang_up();
    }

    /// Fails the requests that wait for somebody else: a server that does not answer, or a resume. Those that the kernel
    /// has it completes itself. For a service that ends and was told to wait no longer.
    pub fn abandon(&self) {
        self.policy.abandon();
        self.edge.abandon();
    }
}
