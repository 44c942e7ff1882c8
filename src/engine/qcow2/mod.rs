//! A qcow2 image (QEMU's `docs/interop/qcow2.rst`), alone or over another volume.
//!
//! - [`header`] and [`entry`] say what the bytes mean.
//! - An [`Image`](image::Image) is what all workers share: the L1 table, a [`cache`] of slices of the L2
//!   tables, and under short locks what changes.
//! - A [`Qcow2Channel`](channel::Qcow2Channel) is one worker's use of it. Reads, and [writes](mod@write) to clusters that the disk
//!   has, are a look at the tables and the file's own operation: no lock, no copy. [First writes](mod@write) and
//!   [`zeroes`] change the tables in memory; a [`flush`] brings the changes to the image, in an order that no
//!   power cut can spoil; and [allocate] says when a cluster is free.
//!
//! Tables take at most `cache` bytes of memory (8 bytes for each cluster of 64 KiB that is at work: 128 MiB for a TiB), and
//! the L1 table another 16 KiB for a TiB.

#![forbid(unsafe_code)]

mod allocate;
mod cache;
mod channel;
mod check;
mod claims;
mod close;
mod compressed;
mod config;
mod create;
mod entry;
mod error;
mod flush;
mod header;
mod image;
mod owner;
mod read_packed;
mod refcounts;
mod resize;
mod store;
mod store_io;
#[cfg(test)]
mod tests;
mod write;
mod zeroes;

pub use check::{CheckError, Report, check};
pub use config::Qcow2Config;
pub use create::{CreateError, NewImage};
pub use error::Error;
pub use header::{Compression, Header};
