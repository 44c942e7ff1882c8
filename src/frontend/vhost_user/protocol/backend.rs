//! What the relay needs to know of the device behind it, and what it has that do.

#![forbid(unsafe_code)]

use super::Shape;
use crate::frontend::vhost_user::budget::Charge;
use crate::frontend::vhost_user::inflight::Inflight;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

/// A session's side of the relay.
pub trait Backend {
    /// Queues and descriptors in each, at most.
    fn shape(&self) -> Shape;

    /// Virtio features that a driver may accept.
    fn offered_features(&self) -> u64;

    /// What a VMM may accept of the protocol.
    fn offered(&self) -> VhostUserProtocolFeatures;

    /// To hang up by.
    fn socket(&self) -> &Arc<UnixStream>;

    /// Addresses for what the next change of the memory table brings.
    fn set_charges(&self, charges: Vec<(u64, Charge)>);

    /// Lets no vring take requests until it is enabled again.
    fn disable(&self);

    /// Has every vring note there what it has in flight. No message may be with the daemon meanwhile.
    fn set_inflight(&self, inflight: Inflight);
}
