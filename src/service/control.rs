//! The control API: HTTP/1.1 and JSON on a Unix socket, for the user who runs the service and for root.
//!
//! [`serve`] answers on a socket until told to stop. What can be asked is a table in [`routes`]: a new endpoint is
//! one line there and one function, and a method of [`Managed`] if it needs something new from the service.
//!
//! Limits: [`MAX_CONNECTIONS`] at a time (others wait in the listen queue), one request each, [`REQUEST_TIME`] in all,
//! no request bodies, and headers of at most [`MAX_HEADERS`] bytes.

#![forbid(unsafe_code)]

mod routes;

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::unistd::Uid;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};

use super::socket::SocketFile;
use super::status::Status;

/// Clients served at the same time.
pub const MAX_CONNECTIONS: u32 = 16;
/// From the first byte to the end of the answer.
const REQUEST_TIME: Duration = Duration::from_secs(10);
/// For the request line and the headers.
const HEADER_TIME: Duration = Duration::from_secs(5);
/// Bytes of request line and headers; hyper will not have less than 8 KiB of buffer.
const MAX_HEADERS: usize = 8 << 10;
/// How long answers that are on their way may take once the service stops.
const FAREWELL_TIME: Duration = Duration::from_secs(1);
/// Rest after a failed accept: out of descriptors, most likely, and trying at once would only burn the CPU.
const ACCEPT_REST: Duration = Duration::from_millis(200);

/// The service, as the control API sees it. Calls come from the control thread and must not block.
pub trait Managed: Send + Sync {
    /// How things are.
    fn status(&self) -> Status;
    /// Begins a clean stop. Asking again changes nothing.
    fn request_stop(&self);
}

/// Answers on `socket` until `shutdown` is ready, then lets the answers under way finish, and removes the socket.
///
/// Must run inside `tokio_uring`'s runtime (or any current-thread tokio runtime with a `LocalSet`, time and I/O).
/// Between requests nothing wakes up.
///
/// # Errors
/// When the listener cannot be given to the runtime. Failures of single connections are logged.
pub async fn serve(
    socket: SocketFile,
    managed: Arc<dyn Managed>,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let listener = UnixListener::from_std(socket.listener()?)?;
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS as usize));
    let accepting = tokio::task::spawn_local(accept(listener, managed, Arc::clone(&connections)));
    shutdown.await;
    accepting.abort();
    // A connection gives its permit back at its end, so all permits together mean that none is left.
    if timeout(FAREWELL_TIME, connections.acquire_many(MAX_CONNECTIONS)).await.is_err() {
        log::warn!("control: a client is still being answered, giving up on it");
    }
    Ok(())
}

async fn accept(listener: UnixListener, managed: Arc<dyn Managed>, connections: Arc<Semaphore>) {
    // The semaphore is never closed, so the loop runs until the task is aborted.
    while let Ok(permit) = Arc::clone(&connections).acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::task::spawn_local(connection(stream, Arc::clone(&managed), permit));
            }
            Err(error) => {
                log::warn!("control: cannot accept a connection: {error}");
                sleep(ACCEPT_REST).await;
            }
        }
    }
}

async fn connection(stream: UnixStream, managed: Arc<dyn Managed>, _permit: OwnedSemaphorePermit) {
    match stream.peer_cred() {
        Ok(peer) if may_control(peer.uid(), Uid::effective()) => {}
        Ok(peer) => {
            log::warn!("control: turned away a client of user {}", peer.uid());
            return;
        }
        Err(error) => {
            log::warn!("control: cannot tell who is asking: {error}");
            return;
        }
    }
    let service = service_fn(|request| {
        let answer = routes::answer(&*managed, &request);
        async { Ok::<_, Infallible>(answer) }
    });
    let serving = http1::Builder::new()
        .keep_alive(false)
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .max_buf_size(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(REQUEST_TIME, serving).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => log::debug!("control: {error}"),
        Err(_) => log::debug!("control: a client took too long"),
    }
}

/// The socket's mode keeps others out already; this holds even when someone changed it.
fn may_control(peer: u32, own: Uid) -> bool {
    peer == 0 || peer == own.as_raw()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::client::{Client, ClientError};
    use crate::service::socket::Access;
    use crate::service::status::sample;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::path::{Path, PathBuf};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread::JoinHandle;
    use tokio::sync::oneshot;

    #[derive(Default)]
    struct Fake {
        stops: AtomicUsize,
    }

    impl Managed for Fake {
        fn status(&self) -> Status {
            sample()
        }

        fn request_stop(&self) {
            self.stops.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// A server on a thread of its own, on the runtime that the service uses.
    struct Server {
        path: PathBuf,
        fake: Arc<Fake>,
        shutdown: Option<oneshot::Sender<()>>,
        thread: Option<JoinHandle<()>>,
        _dir: tempfile::TempDir,
    }

    impl Server {
        fn start() -> Server {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("control.sock");
            let fake = Arc::new(Fake::default());
            let (sender, receiver) = oneshot::channel::<()>();
            let socket = SocketFile::bind(&path, Access::PRIVATE).unwrap();
            let managed: Arc<dyn Managed> = Arc::clone(&fake) as _;
            let thread = std::thread::spawn(move || {
                let runtime = tokio_uring::Runtime::new(&tokio_uring::builder()).unwrap();
                let shutdown = async { drop(receiver.await) };
                runtime.block_on(serve(socket, managed, shutdown)).unwrap();
            });
            Server { path, fake, shutdown: Some(sender), thread: Some(thread), _dir: dir }
        }

        fn stop(&mut self) {
            drop(self.shutdown.take());
            if let Some(thread) = self.thread.take() {
                thread.join().unwrap();
            }
        }

        /// Sends raw bytes and returns all that comes back.
        fn raw(&self, bytes: &[u8]) -> String {
            let mut stream = UnixStream::connect(&self.path).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            // The server may hang up on nonsense before all of it is sent.
            let _ = stream.write_all(bytes);
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            String::from_utf8(answer).unwrap()
        }
    }

    impl Drop for Server {
        fn drop(&mut self) {
            if !std::thread::panicking() {
                self.stop();
            }
        }
    }

    fn status_of(answer: &str) -> &str {
        answer.split(' ').nth(1).unwrap_or(answer)
    }

    #[test]
    fn a_round_trip() {
        let mut server = Server::start();
        let client = Client::new(&server.path);
        assert_eq!(client.status().unwrap(), sample());
        assert_eq!(server.fake.stops.load(Ordering::SeqCst), 0);
        client.stop().unwrap();
        assert_eq!(server.fake.stops.load(Ordering::SeqCst), 1);
        server.stop();
        assert!(!server.path.exists());
        assert!(matches!(client.status(), Err(ClientError::NotRunning(_))));
    }

    #[test]
    fn a_stop_is_answered_with_202() {
        let server = Server::start();
        let answer = server.raw(b"POST /v1/stop HTTP/1.1\r\nhost: x\r\n\r\n");
        assert_eq!(status_of(&answer), "202");
        assert!(answer.contains("content-type: application/json"), "{answer}");
        assert!(answer.ends_with("\r\n\r\n{\"stopping\":true}\n"), "{answer}");
    }

    #[test]
    fn what_does_not_exist_is_refused() {
        let server = Server::start();
        for (request, status) in [
            ("GET / HTTP/1.1\r\nhost: x\r\n\r\n", "404"),
            ("GET /v1/status/ HTTP/1.1\r\nhost: x\r\n\r\n", "404"),
            ("POST /v1/status HTTP/1.1\r\nhost: x\r\n\r\n", "405"),
            ("GET /v1/stop HTTP/1.1\r\nhost: x\r\n\r\n", "405"),
            ("BREW /v1/stop HTTP/1.1\r\nhost: x\r\n\r\n", "405"),
            ("POST /v1/stop HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}", "413"),
            ("POST /v1/stop HTTP/1.1\r\nhost: x\r\ncontent-length: 999999999999\r\n\r\n", "413"),
            ("POST /v1/stop HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n", "413"),
        ] {
            let answer = server.raw(request.as_bytes());
            assert_eq!(status_of(&answer), status, "{request}{answer}");
            assert!(answer.contains("{\"error\":\""), "{answer}");
        }
        let answer = server.raw(b"GET /v1/stop HTTP/1.1\r\nhost: x\r\n\r\n");
        assert!(answer.contains("allow: POST"), "{answer}");
        assert_eq!(server.fake.stops.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn nonsense_is_survived() {
        let server = Server::start();
        let long = format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "a".repeat(1 << 20));
        let headers = format!("GET /v1/status HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(1 << 14));
        for bytes in [
            &b"\0\0\0\0"[..],
            b"\r\n\r\n",
            b"HELO there\r\n\r\n",
            b"GET /v1/status HTTP/9.9\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"POST /v1/stop HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
            long.as_bytes(),
            headers.as_bytes(),
        ] {
            let answer = server.raw(bytes);
            assert!(answer.is_empty() || status_of(&answer).starts_with('4'), "{answer}");
        }
        assert_eq!(server.fake.stops.load(Ordering::SeqCst), 0);
        assert_eq!(Client::new(&server.path).status().unwrap(), sample());
    }

    #[test]
    fn silent_clients_are_hung_up_on_and_do_not_lock_others_out() {
        let server = Server::start();
        let mut silent: Vec<_> =
            (0..MAX_CONNECTIONS).map(|_| UnixStream::connect(&server.path).unwrap()).collect();
        silent[0].write_all(b"GET /v1/sta").unwrap();
        // All places are taken; this waits until the header time of the silent ones is over.
        assert_eq!(Client::new(&server.path).status().unwrap(), sample());
        for mut stream in silent {
            stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).unwrap();
        }
    }

    #[test]
    fn only_root_and_oneself_may_control() {
        let own = Uid::from_raw(1000);
        assert!(may_control(0, own));
        assert!(may_control(1000, own));
        assert!(!may_control(1001, own));
        assert!(!may_control(u32::MAX, own));
    }

    #[test]
    fn the_path_is_in_the_errors() {
        let error = SocketFile::bind(Path::new("/no/such/dir/x.sock"), Access::PRIVATE).unwrap_err();
        assert!(error.to_string().contains("/no/such/dir"), "{error}");
    }
}
