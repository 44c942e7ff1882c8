//! Ends a job when the user says so.

#![forbid(unsafe_code)]

use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::task::Poll;

use tokio::signal::unix::{SignalKind, signal};

/// Runs `job` until it is done, or until SIGINT, SIGTERM or SIGHUP: then it is dropped and there is no result.
///
/// # Errors
/// When the signals cannot be watched.
pub(super) async fn unless_interrupted<T>(job: impl Future<Output = T>) -> io::Result<Option<T>> {
    let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
    unless_signalled(job, &kinds).await
}

async fn unless_signalled<T>(job: impl Future<Output = T>, kinds: &[SignalKind]) -> io::Result<Option<T>> {
    let mut signals = kinds.iter().map(|kind| signal(*kind)).collect::<io::Result<Vec<_>>>()?;
    let mut job = pin!(job);
    Ok(poll_fn(|context| {
        if let Poll::Ready(result) = job.as_mut().poll(context) {
            return Poll::Ready(Some(result));
        }
        // Every one has to be polled, or it would not wake us.
        let mut caught = false;
        for signal in &mut signals {
            caught |= signal.poll_recv(context).is_ready();
        }
        match caught {
            true => Poll::Ready(None),
            false => Poll::Pending,
        }
    })
    .await)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::{Signal, raise};

    #[test]
    fn a_signal_drops_the_job() {
        struct Dropped<'a>(&'a std::cell::Cell<bool>);
        impl Drop for Dropped<'_> {
            fn drop(&mut self) {
                self.0.set(true);
            }
        }

        let dropped = std::cell::Cell::new(false);
        let guard = Dropped(&dropped);
        let runtime = tokio_uring::Runtime::new(&tokio_uring::builder()).unwrap();
        // A signal of its own: every watcher in the process sees it, and other tests run jobs of their own.
        let kinds = [SignalKind::user_defined2()];
        let job = async {
            let _guard = guard;
            // It is watched by now.
            raise(Signal::SIGUSR2).unwrap();
            std::future::pending().await
        };
        let result: Option<()> = runtime.block_on(unless_signalled(job, &kinds)).unwrap();
        assert_eq!(result, None);
        assert!(dropped.get());
    }

    #[test]
    fn a_job_that_ends_has_its_result() {
        let runtime = tokio_uring::Runtime::new(&tokio_uring::builder()).unwrap();
        let result = runtime.block_on(unless_interrupted(async { 7 })).unwrap();
        assert_eq!(result, Some(7));
    }
}
