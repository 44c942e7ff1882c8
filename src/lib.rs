//! ringblk: one storage engine behind two frontends, ublk disks and vhost-user-blk, on one io_uring a worker.
//!
//! The map of the crate. A module may use those above it and none below; `engine` and `frontend` do not know
//! each other and meet in `worker` alone. `tests/architecture.rs` holds us to it, and to where `unsafe` may be.

#![warn(unsafe_op_in_unsafe_fn)]
// The documentation is for people who have the source before them.
#![allow(rustdoc::private_intra_doc_links)]

// A limit on log lines that a client can cause.
pub mod log_limit;
// Text of others in a line of ours.
pub mod escape;
// Who uses a block device or a file of this machine.
pub mod users;
// Requests, geometry, errors: the words every layer uses. No I/O.
pub mod block;
// What was done, and how long it took: counters with one writer each.
pub mod stats;
// The only owner of io_uring: operations, slots, the futures that wait for them.
pub mod ring;
// Volumes: file, memory, null, nbd.
pub mod engine;
// The two frontends: protocols turned into requests.
pub mod frontend;
// One thread, one ring, any mix of queues.
pub mod worker;
// What runs around the workers: configuration, exports, the control API.
pub mod service;
// Offline jobs on raw images.
pub mod image;
// Arguments turned into calls of the above.
pub mod cli;
// The promises that `fuzz/` tries to break, given any bytes.
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
