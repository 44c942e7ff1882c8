//! What becomes of a write beyond the limit on file sizes.

use std::io;

/// Has the kernel answer a write or a cut beyond `RLIMIT_FSIZE` with `EFBIG` alone. Its signal for that (SIGXFSZ of
/// `setrlimit(2)`) would end the process, and with it every export; one volume's error is for its own client.
///
/// For the whole process, and what it starts.
///
/// # Errors
/// None that the kernel has for this signal.
pub fn ignore_file_size_signal() -> io::Result<()> {
    // SAFETY: no function of ours is called for it, and nobody else in the process has one for it that would be lost.
    let before = unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    if before == libc::SIG_ERR { Err(io::Error::last_os_error()) } else { Ok(()) }
}
