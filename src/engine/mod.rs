//! Volumes: what is stored, and where.
//!
//! A [`Volume`] is opened once and shared by all workers; each worker [attaches](Volume::attach) to it and
//! serves requests through its own ring with [`execute()`], the one checkpoint that every request passes.
//! Volumes know nothing of the frontends.
//!
//! A new kind of volume is a file here, an arm of [`Volume`] and of [`Attached`], and its own options in
//! [`config`].

#![forbid(unsafe_code)]

mod attached;
mod backend;
pub mod config;
mod execute;
pub mod file;
mod grace;
mod identity;
mod losses;
mod memory;
pub mod nbd;
mod null;
mod policy;
mod resize;
#[cfg(test)]
mod tests;
mod transfer;
mod volume;

pub use attached::Attached;
pub use execute::execute;
pub use identity::Identity;
pub use losses::{Flusher, Flushers, QueueStart};
pub use policy::PolicyState;
pub use resize::{Exports, ResizeError, Resized};
pub use volume::{OpenError, Opener, Volume};
