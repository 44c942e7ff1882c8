//! The vhost-user-blk door: a virtio disk for a VMM, over a Unix socket.
//!
//! `gate` owns the VMM's connection and lets through what is in order. `session` speaks the protocol, by
//! vhost-user-backend without threads of its own, and turns every change of a vring's state into a start or a stop on
//! the worker that owns it. `vring` is what the worker drives.
//!
//! The rule that makes every race of the protocol harmless: a running vring is immutable. Whatever the VMM
//! changes, the vring is stopped first, which waits until the kernel is done with the guest's memory.

mod areas;
mod atomic;
mod backing;
pub mod budget;
mod config;
mod device;
mod fault;
pub mod gate;
mod inflight;
mod memory;
mod notify;
pub mod options;
mod request;
mod session;
mod session_vring;
mod vring;

pub use device::Device;
#[cfg(any(test, fuzzing))]
pub use inflight::Inflight;
pub use memory::{Memory, MemoryError};
pub use notify::CallFd;
pub use session::{Session, SessionError};
pub use session_vring::{Host, Running};
pub use vring::{StopMode, Stopped, Vring, VringSetup};
