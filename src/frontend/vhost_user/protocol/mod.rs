//! The relay: between a VMM's connection and vhost-user-backend, which it shields and completes.
//!
//! It owns the VMM's socket and passes each message on over a private connection, once it is whole and within the
//! limits of its kind, and once what it says makes sense; the answer comes back the same way. Some requests it answers
//! itself: GET_INFLIGHT_FD, SET_INFLIGHT_FD and SET_BACKEND_REQ_FD, because the crate cannot, and GET_MAX_MEM_SLOTS,
//! because the crate does not know. What it refuses has changed nothing; the VMM is dropped.
//!
//! One message at a time: the next is read when the crate has answered the last, so that nothing ever happens on
//! both sides of it at once. The relay has no thread of its own. It runs on its export's, which sleeps
//! while the VMM says nothing; data never passes here.

#![forbid(unsafe_code)]

mod backend;
mod channel;
mod message;
mod loopback;
mod regions;
mod relay;
mod socket;
mod vrings;

pub(super) use backend::Backend;
pub use channel::{BackendChannel, NotifyResult};
pub(super) use loopback::connection;
pub use message::{Message, Receive};
pub use regions::{Change, Regions};
pub(super) use relay::{Ended, Relay};
pub use socket::{Interest, Vmm, Wake, Wakeups};
pub use vrings::{Shape, check};

use std::time::Duration;
use vhost::vhost_user::message::FrontendReq;

/// Why a VMM is dropped.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// A request that we do not know or did not offer.
    #[error("request {0} was not offered")]
    Unknown(u32),
    /// Not version 1, or a reply, or bits that mean nothing.
    #[error("request {request} with flags {flags:#x}")]
    Flags {
        /// Its number.
        request: u32,
        /// As they came.
        flags: u32,
    },
    /// Shorter or longer than any such message.
    #[error("{request:?} with {bytes} bytes")]
    Body {
        /// What was asked.
        request: FrontendReq,
        /// Of its body.
        bytes: usize,
    },
    /// Too many or too few.
    #[error("{request:?} with {count} descriptors")]
    Descriptors {
        /// What was asked.
        request: FrontendReq,
        /// How many came.
        count: usize,
    },
    /// More than any message has, or than this process may open.
    #[error("more descriptors than can be taken")]
    TooManyFds,
    /// The rest of a message did not come.
    #[error("half a message, and no more within {0:?}")]
    ReceiveTimeout(Duration),
    /// It does not read.
    #[error("it did not take an answer within {0:?}")]
    SendTimeout(Duration),
    /// A request that belongs to a protocol feature it did not accept.
    #[error("{0:?} without its protocol feature")]
    Feature(FrontendReq),
    /// Accepted, but never offered.
    #[error("protocol features {0:#x} were not offered")]
    Unoffered(u64),
    /// The same of virtio features.
    #[error("features {0:#x} were not offered")]
    UnofferedFeatures(u64),
    /// What a request says cannot be.
    #[error("{request:?}: {cause}")]
    Content {
        /// What was asked.
        request: FrontendReq,
        /// What is wrong with it.
        cause: String,
    },
    /// The connection itself.
    #[error("its connection: {0}")]
    Connection(#[from] std::io::Error),
}
