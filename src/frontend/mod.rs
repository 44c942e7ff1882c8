//! The two frontends. Each turns its own protocol into [`Request`](crate::block::Request)s and their results back;
//! neither knows what a volume is, and a worker knows neither: it drives their queues through [`Queue`], and serves
//! the requests that come out of a [`Source`].

mod any_queue;
mod queue;
pub mod ublk;
pub mod vhost_user;

pub(crate) use any_queue::with_queue;
pub use any_queue::{AnyQueue, ListedQueue};
pub use queue::{LimitWait, Queue, Source};
