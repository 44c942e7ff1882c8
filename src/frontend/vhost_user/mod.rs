//! The vhost-user-blk frontend: a virtio disk for a VMM, over a Unix socket.
//!
//! `protocol` owns the VMM's connection and lets through what is in order. `session` speaks the protocol, by
//! vhost-user-backend without threads of its own, and turns every change of a vring's state into a start or a stop on
//! the worker that owns it. `vring` is what the worker drives.
//!
//! The rule that makes every race of the protocol harmless: a running vring is immutable. Whatever the VMM
//! changes, the vring is stopped first, which waits until the kernel is done with the guest's memory.

mod atomic;
mod backing;
pub mod budget;
pub mod config;
mod config_space;
mod device;
mod eventfd;
mod inflight;
mod memory;
pub mod protocol;
mod request;
mod session;
mod session_vring;
mod sigbus;
mod split_ring;
mod vring;

pub use device::Device;
pub use eventfd::CallFd;
#[cfg(any(test, fuzzing))]
pub use inflight::Inflight;
pub use memory::{Memory, MemoryError};
pub use session::{Session, SessionError};
pub use session_vring::{Host, Running};
/// The guest's side of a vring.
#[cfg(test)]
pub(crate) use vring::tests::driver;
pub use vring::{StopMode, Stopped, Vring, VringSetup};
