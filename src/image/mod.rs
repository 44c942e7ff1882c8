//! Offline jobs on images: make one, look at one, check one, copy one. No service is needed and none is asked.
//!
//! What makes or copies runs on `tokio-uring`'s runtime, started here, so these functions block and must not be called
//! from inside another runtime. A new image appears under its name complete or not at all: it is written out of sight and
//! gets its name at the end, and SIGINT, SIGTERM or SIGHUP end a job with everything half-done removed.
//!
//! Jobs take the locks that volumes and QEMU take: an image that somebody writes is not read, and one that somebody uses
//! is neither replaced nor overwritten.

#![forbid(unsafe_code)]

mod attributes;
mod copy;
mod create;
mod end;
mod extents;
mod info;
mod interrupt;
mod nbd;
mod qcow2;
mod scratch;
mod store;
mod target;

use crate::ring;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};

pub use copy::{CopyOptions, CopySummary, Progress, copy};
pub use create::create;
pub use info::{Info, Kind, info};
pub use qcow2::{Backing, BackingFormat, check, create_qcow2};
pub use store::Reading;

use crate::block::Format;

/// Why a job was not done.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The system refused.
    #[error("cannot {action} {}", path.display())]
    System {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The destination is there and may not be replaced.
    #[error("{}: already exists", .0.display())]
    Exists(PathBuf),
    /// Somebody has it.
    #[error("{}: is in use by {by} ({way_out})", path.display())]
    InUse {
        /// The image or device.
        path: PathBuf,
        /// Who.
        by: String,
        /// What can be done.
        way_out: &'static str,
    },
    /// It is no raw image, and was not said to be taken for one.
    #[error(
        "{}: is a {format} image, not a raw one: convert it (qemu-img convert -O raw), or have its bytes taken as they \
         are with --format=raw",
        path.display()
    )]
    Format {
        /// The image or device.
        path: PathBuf,
        /// What it looks like.
        format: Format,
    },
    /// Source and destination are one.
    #[error("{} and {} are the same", source_path.display(), destination.display())]
    Same {
        /// What was to be read.
        source_path: PathBuf,
        /// What was to be written.
        destination: PathBuf,
    },
    /// A path or a value that the job cannot use.
    #[error("{}: {reason}", path.display())]
    Unsuitable {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A setting out of its range.
    #[error("{0}")]
    Setting(String),
    /// A signal ended the job.
    #[error("interrupted, nothing was kept")]
    Interrupted,
    /// A signal ended a copy to a device.
    #[error("interrupted, {} is written in part", .0.display())]
    InterruptedDevice(PathBuf),
}

impl ImageError {
    /// For `map_err` on a system call about `path`.
    fn system(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImageError {
        let path = path.to_owned();
        move |source| {
            let source = match source.raw_os_error() {
                Some(libc::EFBIG) => io::Error::new(
                    source.kind(),
                    format!(
                        "{source}: more than this process may write (ulimit -f), or the file system holds in a file"
                    ),
                ),
                _ => source,
            };
            ImageError::System { action, path, source }
        }
    }

    fn unsuitable(path: &Path, reason: impl Into<String>) -> ImageError {
        ImageError::Unsuitable { path: path.to_owned(), reason: reason.into() }
    }
}

/// Refuses an NBD URI where a path is wanted.
fn is_path(path: &Path) -> Result<(), ImageError> {
    match nbd::is_uri(path) {
        true => Err(ImageError::unsuitable(path, "is an NBD server's, which only `image copy` takes")),
        false => Ok(()),
    }
}

/// Runs one job on `tokio-uring`'s runtime, `path` being what it is about.
fn run<T>(path: &Path, job: impl Future<Output = Result<T, ImageError>>) -> Result<T, ImageError> {
    ring::runtime().map_err(ImageError::system("work on", path))?.block_on(job)
}
