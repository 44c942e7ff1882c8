//! Threads for what may never come back. Such a thread may outlive whoever started it, so it is not joined.

#![forbid(unsafe_code)]

use nix::sys::signal::SigSet;
use std::io;
use std::thread;

/// Starts a thread without signals, which are the main thread's.
///
/// # Errors
/// When there is no thread to be had.
pub(super) fn detached(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let body = || {
        if let Err(error) = SigSet::all().thread_block() {
            log::debug!("signals stay unblocked: {error}");
        }
        body();
    };
    thread::Builder::new().name(name.into()).spawn(body).map(drop)
}
