//! The two front doors. Each turns its own protocol into [`Request`]s and their results back; neither knows
//! what a volume is.

pub mod ublk;
pub mod vhost_user;

use crate::block::{Errno, Request};
use crate::ring::{Io, Ring};

/// Where a worker's requests come from: one queue of one export.
///
/// A queue has a fixed number of tags. Each has one slot for as long as the queue lives, and one request at
/// most: `next`, carry out, `complete`, and again.
#[allow(async_fn_in_trait, reason = "a slot's future stays on its thread")]
pub trait Source<R: Ring> {
    /// What a tag keeps between the calls. It lives in the slot's future.
    type State: Default;

    /// Waits for the next request of `tag`. After `None` nothing more comes and the slot ends.
    async fn next<'a>(&'a self, io: &Io<R>, tag: u16, state: &'a mut Self::State) -> Option<Request<'a>>;

    /// Takes how the request of `tag` ended; once for each request. The client learns of it when the tag
    /// next waits, or at the end of the batch.
    fn complete(&self, tag: u16, state: &mut Self::State, result: Result<(), Errno>);
}
