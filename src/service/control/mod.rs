//! The control API: HTTP/1.1 and JSON on a Unix socket, for the user who runs the service and for root.
//!
//! [`serve`] answers on a socket until told to stop. What can be asked is a table in [`routes`]: a new endpoint is
//! one line there and one function, and a method of [`ControlHandler`] if it needs something new from the service.
//!
//! Limits: [`MAX_CONNECTIONS`] at a time (others wait in the listen queue), one request each, [`REQUEST_TIME`] in all,
//! request bodies of at most 4 KiB of JSON, and headers of at most [`MAX_HEADERS`] bytes.

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
use super::stats::Stats;
use super::status::{
    AddExport, AddVolume, Changed, Fault, Faulted, LimitsStatus, Refresh, RemoveExport, Resize, Resized,
    Resume, Resumed, Status, Stop,
};
use crate::engine::limits::LimitsChange;
use crate::log_limit::LogLimit;

/// Clients served at the same time.
pub const MAX_CONNECTIONS: u32 = 16;
/// From the first byte to the end of the answer. A resize may take most of it: each ublk disk is given 10 s, and requests
/// that it waits for 5 s.
const REQUEST_TIME: Duration = Duration::from_secs(30);
/// For the request line and the headers.
const HEADER_TIME: Duration = Duration::from_secs(5);
/// For the body.
const BODY_TIME: Duration = Duration::from_secs(5);
/// Bytes of request line and headers; hyper will not have less than 8 KiB of buffer.
const MAX_HEADERS: usize = 8 << 10;
/// How long answers that are on their way may take once the service stops.
const FAREWELL_TIME: Duration = Duration::from_secs(1);
/// Rest after a failed accept: out of descriptors, most likely, and trying at once would only burn the CPU.
const ACCEPT_REST: Duration = Duration::from_millis(200);

/// The service, as the control API sees it. Each call comes on a thread of its own, which it may block.
pub trait ControlHandler: Send + Sync {
    /// How things are.
    fn status(&self) -> Status;
    /// What was done so far.
    fn stats(&self) -> Stats;
    /// Begins a clean stop. Asking again changes nothing.
    ///
    /// # Errors
    /// When disks cannot be handed over.
    fn request_stop(&self, wanted: &Stop) -> Result<(), ControlError>;
    /// Changes the size of a volume.
    ///
    /// # Errors
    /// When there is no such volume, or it cannot be.
    fn resize(&self, volume: &str, wanted: &Resize) -> Result<Resized, ControlError>;
    /// Has a volume take the size that its store has now.
    ///
    /// # Errors
    /// As for [`resize`](Self::resize).
    fn refresh(&self, volume: &str, wanted: &Refresh) -> Result<Resized, ControlError>;
    /// Lets the requests go on that wait because a volume's store failed.
    ///
    /// # Errors
    /// When there is no such volume.
    fn resume(&self, volume: &str, wanted: &Resume) -> Result<Resumed, ControlError>;
    /// Has a volume's fault layers make faults, or none.
    ///
    /// # Errors
    /// When there is no such volume, or it has none.
    fn fault(&self, volume: &str, wanted: &Fault) -> Result<Faulted, ControlError>;
    /// A volume's limits of operations and bytes in a second.
    ///
    /// # Errors
    /// When there is no such volume.
    fn limits(&self, volume: &str) -> Result<LimitsStatus, ControlError>;
    /// Has a volume be known, for exports to come.
    ///
    /// # Errors
    /// When it cannot be, there is another of that name, or the service takes no additions.
    fn add_volume(&self, wanted: &AddVolume) -> Result<Changed, ControlError>;
    /// Forgets a volume.
    ///
    /// # Errors
    /// When it has exports, or others stand on it.
    fn remove_volume(&self, volume: &str) -> Result<Changed, ControlError>;
    /// Starts an export.
    ///
    /// # Errors
    /// When it cannot be.
    fn add_export(&self, wanted: &AddExport) -> Result<Changed, ControlError>;
    /// Ends an export.
    ///
    /// # Errors
    /// When somebody uses it and it is not forced, or its requests do not end.
    fn remove_export(&self, wanted: &RemoveExport) -> Result<Changed, ControlError>;
    /// Changes those that are named. What waits for them goes on by the new ones.
    ///
    /// # Errors
    /// When there is no such volume, or they would contradict each other.
    fn limit(&self, volume: &str, wanted: &LimitsChange) -> Result<LimitsStatus, ControlError>;
}

/// Why nothing was done.
#[derive(Debug)]
pub enum ControlError {
    /// There is no volume of this name.
    Unknown(String),
    /// The body does not say what is wanted.
    Body(String),
    /// It cannot be done, and why.
    Impossible(String),
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
    managed: Arc<dyn ControlHandler>,
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

async fn accept(listener: UnixListener, managed: Arc<dyn ControlHandler>, connections: Arc<Semaphore>) {
    let log = Arc::new(LogLimit::new("control"));
    // The semaphore is never closed, so the loop runs until the task is aborted.
    while let Ok(permit) = Arc::clone(&connections).acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::task::spawn_local(connection(stream, Arc::clone(&managed), Arc::clone(&log), permit));
            }
            Err(error) => {
                log.warn("accept", format_args!("cannot accept a connection: {error}"));
                sleep(ACCEPT_REST).await;
            }
        }
    }
}

async fn connection(
    stream: UnixStream,
    managed: Arc<dyn ControlHandler>,
    log: Arc<LogLimit>,
    _permit: OwnedSemaphorePermit,
) {
    let mut welcome = true;
    match stream.peer_cred() {
        Ok(peer) if may_control(peer.uid(), Uid::effective()) => {}
        Ok(peer) => {
            log.warn("turned away", format_args!("turned away a client of user {}", peer.uid()));
            welcome = false;
        }
        Err(error) => {
            log.warn("unknown", format_args!("cannot tell who is asking: {error}"));
            welcome = false;
        }
    }
    let service = service_fn(|request| {
        let managed = Arc::clone(&managed);
        async move {
            Ok::<_, Infallible>(if welcome {
                routes::answer(managed, request).await
            } else {
                routes::turned_away()
            })
        }
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
    use crate::service::stats::ExportStats;
    use crate::service::status::sample;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::path::{Path, PathBuf};
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread::JoinHandle;
    use tokio::sync::oneshot;

    #[derive(Default)]
    struct Fake {
        stops: AtomicUsize,
        asked: Mutex<Vec<String>>,
    }

    impl ControlHandler for Fake {
        fn status(&self) -> Status {
            sample()
        }

        fn stats(&self) -> Stats {
            let counts = crate::stats::Counts::default();
            let exports =
                sample().exports.iter().map(|status| ExportStats::new(status, counts.clone())).collect();
            Stats { uptime_ns: 7, exports, ..Stats::default() }
        }

        fn request_stop(&self, wanted: &Stop) -> Result<(), ControlError> {
            if wanted.hand_over {
                return Err(ControlError::Impossible("too old".into()));
            }
            self.stops.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }

        fn resize(&self, volume: &str, wanted: &Resize) -> Result<Resized, ControlError> {
            self.asked.lock().unwrap().push(format!("{volume} {wanted:?}"));
            match volume {
                "root" if wanted.force => Err(ControlError::Impossible("not today".into())),
                "root" => Ok(Resized { volume: volume.into(), from_bytes: 1, size_bytes: wanted.size }),
                _ => Err(ControlError::Unknown(volume.into())),
            }
        }

        fn refresh(&self, volume: &str, wanted: &Refresh) -> Result<Resized, ControlError> {
            self.resize(volume, &Resize { size: 7, force: wanted.force })
        }

        fn resume(&self, volume: &str, wanted: &Resume) -> Result<Resumed, ControlError> {
            self.asked.lock().unwrap().push(format!("{volume} {wanted:?}"));
            Ok(Resumed { volume: volume.into(), requests: 3 })
        }

        fn fault(&self, volume: &str, wanted: &Fault) -> Result<Faulted, ControlError> {
            self.asked.lock().unwrap().push(format!("{volume} {wanted:?}"));
            Ok(Faulted { volume: volume.into(), enabled: wanted.enabled })
        }

        fn add_volume(&self, wanted: &AddVolume) -> Result<Changed, ControlError> {
            self.asked.lock().unwrap().push(format!("{wanted:?}"));
            Ok(Changed { name: "new".into(), changed: true })
        }

        fn remove_volume(&self, volume: &str) -> Result<Changed, ControlError> {
            self.asked.lock().unwrap().push(format!("remove {volume}"));
            Ok(Changed { name: volume.into(), changed: false })
        }

        fn add_export(&self, wanted: &AddExport) -> Result<Changed, ControlError> {
            self.asked.lock().unwrap().push(format!("{wanted:?}"));
            Ok(Changed { name: "new".into(), changed: true })
        }

        fn remove_export(&self, wanted: &RemoveExport) -> Result<Changed, ControlError> {
            self.asked.lock().unwrap().push(format!("{wanted:?}"));
            Err(ControlError::Impossible("it is connected".into()))
        }

        fn limits(&self, volume: &str) -> Result<LimitsStatus, ControlError> {
            self.limit(volume, &LimitsChange::default())
        }

        fn limit(&self, volume: &str, wanted: &LimitsChange) -> Result<LimitsStatus, ControlError> {
            self.asked.lock().unwrap().push(format!("{volume} {:?}", wanted.numbers().collect::<Vec<_>>()));
            let limits = wanted.numbers().map(|(key, value)| (key.to_owned(), value)).collect();
            Ok(LimitsStatus { volume: volume.into(), limits, group: None, throttled_ms: 7 })
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
            let managed: Arc<dyn ControlHandler> = Arc::clone(&fake) as _;
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
        client.stop(&Stop::default()).unwrap();
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
        assert_eq!(post(&server, "/v1/stop", r#"{"hand_over": false}"#).0, "202");
        let stops = || server.fake.stops.load(Ordering::SeqCst);
        assert_eq!(stops(), 2);
        let error = Client::new(&server.path).stop(&Stop { hand_over: true, ..Stop::default() }).unwrap_err();
        assert_eq!(error.to_string(), "the service refused: too old (409 Conflict)");
        assert_eq!(stops(), 2);
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
            ("GET /v1/status HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}", "400"),
            ("GET /v1/volumes HTTP/1.1\r\nhost: x\r\n\r\n", "405"),
            ("POST /v1/volumes/a/b/resize HTTP/1.1\r\nhost: x\r\n\r\n", "404"),
            ("GET /v1/volumes/root/resize HTTP/1.1\r\nhost: x\r\n\r\n", "405"),
        ] {
            let answer = server.raw(request.as_bytes());
            assert_eq!(status_of(&answer), status, "{request}{answer}");
            assert!(answer.contains("{\"error\":\""), "{answer}");
        }
        let answer = server.raw(b"GET /v1/stop HTTP/1.1\r\nhost: x\r\n\r\n");
        assert!(answer.contains("allow: POST"), "{answer}");
        assert_eq!(server.fake.stops.load(Ordering::SeqCst), 0);
    }

    /// One request with a body, and the answer's status and body.
    fn post(server: &Server, path: &str, body: &str) -> (String, serde_json::Value) {
        let length = body.len();
        let request = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n{body}");
        let answer = server.raw(request.as_bytes());
        let json = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer}")).1;
        (status_of(&answer).to_owned(), serde_json::from_str(json).unwrap())
    }

    #[test]
    fn a_resize_says_what_became_of_it() {
        let server = Server::start();
        let client = Client::new(&server.path);
        let (status, answer) = post(&server, "/v1/volumes/root/resize", r#"{"size": 4096}"#);
        let expected = serde_json::json!({"volume": "root", "from_bytes": 1, "size_bytes": 4096});
        assert_eq!((&*status, answer), ("200", expected));
        let (status, answer) = post(&server, "/v1/volumes/root/refresh", r#"{"force": true}"#);
        assert_eq!((&*status, &answer["error"]), ("409", &"not today".into()));
        let (status, answer) = post(&server, "/v1/volumes/roof/refresh", "");
        assert_eq!((&*status, &answer["error"]), ("404", &"there is no volume \"roof\"".into()));
        assert_eq!(client.resize("root", 512, false).unwrap().size_bytes, 512);
        assert_eq!(client.refresh("root", false).unwrap().size_bytes, 7);
        for name in ["roof", "", "a b", "a/b", "\r\n", "ä"] {
            let error = client.resize(name, 512, false).unwrap_err();
            assert!(error.to_string().contains("there is no volume"), "{name:?}: {error}");
        }
        let asked = ["root Resize { size: 4096, force: false }", "root Resize { size: 7, force: true }"];
        assert_eq!(server.fake.asked.lock().unwrap()[..2], asked);
    }

    #[test]
    fn volumes_and_exports_come_and_go() {
        let server = Server::start();
        let client = Client::new(&server.path);
        assert!(client.add_volume("a=memory:1M").unwrap().changed);
        assert!(!client.remove_volume("a").unwrap().changed);
        let export = AddExport { ublk: Some("a".into()), ..AddExport::default() };
        assert!(client.add_export(&export).unwrap().changed);
        let export = RemoveExport { vhost_user: Some("/run/a".into()), ..RemoveExport::default() };
        let error = client.remove_export(&export).unwrap_err().to_string();
        assert!(error.contains("it is connected (409"), "{error}");
        let asked = server.fake.asked.lock().unwrap();
        assert!(asked[0].contains("a=memory:1M") && asked[1] == "remove a", "{asked:?}");
        assert!(asked[3].contains("/run/a") && asked[3].contains("force: false"), "{asked:?}");
        drop(asked);
        for body in ["", "{}", "[\"a\"]", r#"{"volume": 3}"#, r#"{"volume": "a", "x": 1}"#] {
            assert_eq!(post(&server, "/v1/volumes", body).0, "400", "{body}");
        }
    }

    #[test]
    fn a_fault_switch_says_which_way() {
        let server = Server::start();
        let client = Client::new(&server.path);
        assert!(!client.fault("bad", false).unwrap().enabled);
        assert_eq!(*server.fake.asked.lock().unwrap(), ["bad Fault { enabled: false }"]);
        assert_eq!(post(&server, "/v1/volumes/bad/fault", "").0, "400");
    }

    #[test]
    fn limits_are_looked_at_and_changed() {
        let server = Server::start();
        let client = Client::new(&server.path);
        assert_eq!(client.limits("root").unwrap().throttled_ms, 7);
        let mut change = LimitsChange::default();
        assert!(change.set("iops-total", 2000) && change.set("bps-read", 0));
        assert_eq!(client.limit("root", &change).unwrap().limits["iops-total"], 2000);
        let (status, answer) = post(&server, "/v1/volumes/root/limit", r#"{"bps-write": "1M"}"#);
        assert_eq!((&*status, &answer["limits"]["bps-write"]), ("200", &(1 << 20).into()));
        for body in ["", "3", "{\"iops\": 3}", "{\"iops-total\": -3}", "{\"iops-read\": 1, \"iops-read\": 1}"]
        {
            assert_eq!(post(&server, "/v1/volumes/root/limit", body).0, "400", "{body}");
        }
        let answer = server.raw(b"DELETE /v1/volumes/root/limit HTTP/1.1\r\nhost: x\r\n\r\n");
        assert!(status_of(&answer) == "405" && answer.contains("allow: GET, POST"), "{answer}");
        let asked = ["root []", "root [(\"iops-total\", 2000), (\"bps-read\", 0)]"];
        assert_eq!(server.fake.asked.lock().unwrap()[..2], asked);
    }

    #[test]
    fn a_resume_may_say_nothing_or_give_up() {
        let server = Server::start();
        let client = Client::new(&server.path);
        let (status, answer) = post(&server, "/v1/volumes/root/resume", "");
        assert_eq!((&*status, answer), ("200", serde_json::json!({"volume": "root", "requests": 3})));
        assert_eq!(client.resume("root", true).unwrap().requests, 3);
        assert_eq!(post(&server, "/v1/volumes/root/resume", r#"{"force": true}"#).0, "400");
        let asked = ["root Resume { give_up: false }", "root Resume { give_up: true }"];
        assert_eq!(*server.fake.asked.lock().unwrap(), asked);
    }

    #[test]
    fn bodies_say_exactly_what_is_wanted() {
        let server = Server::start();
        for body in [
            "",
            "{}",
            "null",
            "4096",
            "[4096]x",
            "[4096]",
            " [4096, true]",
            "{\"size\": -1}",
            "{\"size\": 1.5}",
            "{\"size\": \"1G\"}",
            "{\"size\": 18446744073709551616}",
            "{\"size\": 4096",
            "{\"size\": 4096} {}",
            "{\"size\": 4096, \"size\": 8192}",
            "{\"size\": 4096, \"force\": 1}",
            "{\"size\": 4096, \"forse\": true}",
            "\0\0\0\0",
            &"[".repeat(4096),
        ] {
            let (status, answer) = post(&server, "/v1/volumes/root/resize", body);
            assert_eq!(status, "400", "{body}: {answer}");
        }
        let (status, _) = post(&server, "/v1/stop", r#"{"soon": true}"#);
        assert_eq!(status, "400");
        let spaces = format!("{{\"size\": 1{}}}", " ".repeat(4 << 10));
        assert_eq!(post(&server, "/v1/volumes/root/resize", &spaces).0, "413");
        let head = "POST /v1/volumes/root/resize HTTP/1.1\r\nhost: x\r\n";
        let chunk = format!("1000\r\n{}\r\n", " ".repeat(4096));
        let chunked = format!("{head}transfer-encoding: chunked\r\n\r\n{}", chunk.repeat(16));
        assert_eq!(status_of(&server.raw(chunked.as_bytes())), "413");
        let huge = format!("{head}content-length: 999999999999\r\n\r\n{}", " ".repeat(8 << 10));
        assert_eq!(status_of(&server.raw(huge.as_bytes())), "413");
        assert!(server.fake.asked.lock().unwrap().is_empty());
        assert_eq!(server.fake.stops.load(Ordering::SeqCst), 0);
        // One that does not come is not waited for without end.
        let silent = server.raw(format!("{head}content-length: 10\r\n\r\n").as_bytes());
        assert_eq!(status_of(&silent), "408");
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
