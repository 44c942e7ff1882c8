//! Threads that the kernel may wait for when memory is short.

#![forbid(unsafe_code)]

/// Tells the kernel that the calling thread serves a block device: what it writes memory out to may be a disk of ours,
/// so while we allocate it must not wait for that (`PR_SET_IO_FLUSHER` of `prctl(2)`). Threads that are started later
/// inherit it. Needs CAP_SYS_RESOURCE; without it we serve all the same.
pub fn set_io_flusher() {
    if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
        log::debug!("PR_SET_IO_FLUSHER: {error}");
    }
}
