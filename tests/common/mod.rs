//! What the native tests stand on: the real service, and both kinds of VMM.
//!
//! [`service`] runs the binary. [`client`] is a VMM by the virtio-driver crate: a well-behaved one. [`vmm`] shakes
//! hands by the vhost crate and drives [`ring`]s of its own in its own [`memory`], laid out as it likes. [`player`] shakes
//! hands as a VMM that people use, by its [`profile`]. [`wire`] speaks bytes. [`model`] knows what must be read back, whichever of them asks. [`load`] is many
//! requests and no questions. [`process`] is a server beside it. [`nbd`] is a store that tells what it was asked for. [`trial`] is for what a machine may lack. [`prepared`] drives a worker of this process, to count what it does.

#![allow(dead_code, reason = "each test program uses a part of it")]

pub mod client;
pub mod load;
pub mod memory;
pub mod model;
pub mod nbd;
pub mod player;
pub mod prepared;
pub mod process;
pub mod profile;
pub mod queue;
pub mod ring;
pub mod service;
pub mod trial;
pub mod vmm;
pub mod wire;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// Nothing here takes longer, on a machine however busy, unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Sleeps until `fd` is readable. False when it is not within `limit`.
pub fn readable(fd: BorrowedFd<'_>, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left.as_millis() as i32 + 1).unwrap();
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Ok(0) if !left.is_zero() => {}
            Err(nix::errno::Errno::EINTR) => {}
            Ok(count) => return count > 0,
            Err(error) => panic!("poll: {error}"),
        }
    }
}

/// Waits until `done`, or fails saying `what` did not happen.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
