//! Volumes: what is stored, and where.
//!
//! A [`Volume`] is opened once and shared by all workers; each worker [attaches](Volume::attach) to it and serves requests
//! through its own ring with [`submit()`]. Below it is a tree: a leaf that keeps bytes, and layers that stand on others;
//! every [edge](node::Edge) of it is a checkpoint. Volumes know nothing of the frontends.
//!
//! A new kind of volume is a folder (or a file) here and one word in the list of [`driver`].

#![forbid(unsafe_code)]

mod channel;
pub mod config;
mod driver;
mod error;
mod submit;
pub mod fault;
pub mod file;
mod drain_epochs;
pub mod graph;
mod identity;
mod layer;
pub mod limits;
mod flushers;
mod losses;
mod memory;
pub mod nbd;
mod node;
mod null;
mod policy;
pub mod qcow2;
mod resize;
mod settings;
#[cfg(test)]
mod tests;
mod transfer;
mod until;
mod volume;

pub use channel::VolumeChannel;
pub use driver::Capabilities;
pub use error::{GraphError, OpenError, ResizeError};
pub use flushers::{Flushers, QueueStart};
pub use identity::Identity;
pub use losses::Flusher;
pub use policy::PolicyState;
pub use resize::{Exports, Resized};
pub use submit::submit;
pub use volume::{Opener, Volume};
