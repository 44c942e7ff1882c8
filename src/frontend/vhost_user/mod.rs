//! The vhost-user-blk door: a virtio disk for a VMM, over a Unix socket.
//!
//! `session` speaks the protocol, by vhost-user-backend without threads of its own, and turns every change of
//! a vring's state into a start or a stop on the worker that owns it. `vring` is what the worker drives.
//!
//! The rule that makes every race of the protocol harmless: a running vring is immutable. Whatever the VMM
//! changes, the vring is stopped first, which waits until the kernel is done with the guest's memory.
//!
//! Not here yet: in-flight tracking and the gate in front of the crate that it needs, the resize notice.

mod areas;
mod config;
mod device;
mod memory;
mod notify;
pub mod options;
mod request;
mod session;
mod session_vring;
mod vring;

pub use device::Device;
pub use memory::{Memory, MemoryError};
pub use notify::CallFd;
pub use session::{Hangup, Session, SessionError};
pub use session_vring::{Host, Running};
pub use vring::{Vring, VringSetup};
