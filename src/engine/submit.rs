//! The root: every request of every frontend passes here, on the way in and on the way out.
//!
//! What concerns a volume as its clients see it is settled here: what becomes of errors, who hears of losses, what a change
//! of size waits for. The checks are the [edge](super::node)'s, as for every request within the tree.

use super::policy::{Attempts, RequestLabel};
use super::{Flusher, VolumeChannel};
use crate::block::{Errno, Op, Request};
use crate::ring::{Io, Ring};

/// Carries `request` out, wholly or with the error that stopped it. Where the volume's [policy](super::policy) says
/// so, what the store fails is tried again, after a time or after a word from outside.
///
/// `flusher` is whose request it is: a flush of its succeeds only if no acknowledged write was lost since the last that it
/// was told of, and a write with FUA only if none was lost meanwhile.
///
/// # Errors
/// What [`Edge::validate`](super::node::Edge::validate) refuses; otherwise what the volume says.
pub async fn submit<R: Ring>(
    volume: &VolumeChannel<R>,
    io: &Io<R>,
    flusher: &Flusher,
    request: &Request<'_>,
) -> Result<(), Errno> {
    let policy = volume.policy();
    let stores = matches!(request.op, Op::Write | Op::WriteZeroes);
    let lost_before = if stores || request.flags.fua { volume.edge().loss_reports() } else { 0 };
    if policy.is_stopped() {
        // Boxed, as all that is rare: a slot's future has no room for it.
        Box::pin(wait_for_resume(volume, io, request)).await?;
    }
    let result = {
        // Before the look at the capacity: a volume that shrinks waits for requests which saw the old one.
        let _admitted = volume.admitted();
        volume.edge().validate(request)?;
        // A flush has only what comes afterwards.
        if request.op == Op::Flush { Ok(()) } else { perform(volume, io, request).await }
    };
    match result {
        Err(errno) if policy.covers(errno) => Box::pin(retry(volume, io, request, errno)).await?,
        other => reported(volume, io, request, other)?,
    }
    if needs_flush(volume, request) {
        match flush(volume, io, flusher, request).await {
            Err(errno) if policy.covers(errno) && volume.edge().may_flush_again(errno) => {
                Box::pin(flush_again(volume, io, flusher, request, errno)).await?;
            }
            other => reported(volume, io, request, other)?,
        }
    }
    if request.flags.fua {
        return reported(volume, io, request, volume.vouch(io, lost_before).await);
    }
    if stores {
        volume.catch_up(lost_before);
    }
    Ok(())
}

/// Leaves a line in the log where the store failed.
fn reported<R: Ring>(
    volume: &VolumeChannel<R>,
    io: &Io<R>,
    request: &Request<'_>,
    result: Result<(), Errno>,
) -> Result<(), Errno> {
    result.inspect_err(|errno| volume.policy().report(RequestLabel::of(request, io), *errno))
}

/// The flush that a request ends with.
async fn flush<R: Ring>(
    volume: &VolumeChannel<R>,
    io: &Io<R>,
    flusher: &Flusher,
    request: &Request<'_>,
) -> Result<(), Errno> {
    match request.op {
        Op::Flush => volume.flush_for(io, flusher).await,
        // Its own write is all that it tells of.
        _ => volume.edge().flush(io).await,
    }
}

/// What a request changes or reads; what it flushes comes afterwards.
fn perform<'a, R: Ring>(
    volume: &'a VolumeChannel<R>,
    io: &'a Io<R>,
    request: &'a Request<'_>,
) -> impl Future<Output = Result<(), Errno>> + use<'a, R> {
    let fua = request.flags.fua && request.op == Op::Write && !needs_flush(volume, request);
    volume.edge().perform(io, request, fua)
}

/// Whether a request ends with a flush. A write with FUA needs none, unless its own errors must be told from those of
/// other writes: see [`policy`](super::policy).
fn needs_flush<R: Ring>(volume: &VolumeChannel<R>, request: &Request<'_>) -> bool {
    match request.op {
        Op::Flush => true,
        Op::WriteZeroes => request.flags.fua && !request.is_empty(),
        Op::Write => request.flags.fua && !request.is_empty() && volume.policy().is_active(),
        Op::Read | Op::Discard => false,
    }
}

/// Waits while the volume is stopped. What no volume should see is refused without a wait.
async fn wait_for_resume<R: Ring>(
    volume: &VolumeChannel<R>,
    io: &Io<R>,
    request: &Request<'_>,
) -> Result<(), Errno> {
    volume.edge().validate(request)?;
    match volume.policy().wait_for_resume(io, RequestLabel::of(request, io)).await {
        // What waits is not complete, so a flush need not cover it; and it is not to wait any more.
        Err(Errno::ERESTART) if request.op == Op::Flush => Ok(()),
        other => other,
    }
}

/// Tries a request that failed, from its beginning, until it succeeds or its time is up.
async fn retry<R: Ring>(
    volume: &VolumeChannel<R>,
    io: &Io<R>,
    request: &Request<'_>,
    mut errno: Errno,
) -> Result<(), Errno> {
    let (policy, what, mut attempts) = (volume.policy(), RequestLabel::of(request, io), Attempts::new());
    loop {
        policy.failed(io, what, errno, &mut attempts).await?;
        // The volume may have become smaller meanwhile, and what waits is nothing that a shrink waits for.
        let _admitted = volume.admitted();
        volume.edge().validate(request)?;
        match perform(volume, io, request).await {
            Err(again) if policy.covers(again) => errno = again,
            other => return reported(volume, io, request, other),
        }
    }
}

/// The same for a flush.
async fn flush_again<R: Ring>(
    volume: &VolumeChannel<R>,
    io: &Io<R>,
    flusher: &Flusher,
    request: &Request<'_>,
    mut errno: Errno,
) -> Result<(), Errno> {
    let (policy, what, mut attempts) = (volume.policy(), RequestLabel::of(request, io), Attempts::new());
    loop {
        policy.failed(io, what, errno, &mut attempts).await?;
        match flush(volume, io, flusher, request).await {
            Err(again) if policy.covers(again) && volume.edge().may_flush_again(again) => errno = again,
            other => return reported(volume, io, request, other),
        }
    }
}
