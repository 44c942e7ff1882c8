//! The other end of the control API: what the commands for a running service ask it.

#![forbid(unsafe_code)]

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::engine::limits::LimitsChange;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::CONTENT_TYPE;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::config::DEFAULT_CONTROL;
use super::socket::is_served;
use super::stats::Stats;
use super::status::{
    AddExport, AddVolume, ApiError, Changed, Fault, Faulted, LimitsStatus, Refresh, RemoveExport, Resize,
    Resized, Resume, Resumed, Status, Stop, Stopping,
};

/// For one question and its answer. Longer than a server takes for any answer, and a full one to turn silent clients
/// out.
const ANSWER_TIME: Duration = Duration::from_secs(40);
/// A larger answer is not one of ours.
const MAX_ANSWER: usize = 16 << 20;
/// Between two looks at whether a stopping service is gone.
const STOP_REST: Duration = Duration::from_millis(50);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the control socket.
    #[error("no ringblk is serving at {}{}", .0.display(), elsewhere(.0))]
    NotRunning(PathBuf),
    /// The control socket is somebody else's.
    #[error("you may not ask the service at {}: only root and the user who runs it may", .0.display())]
    Denied(PathBuf),
    /// The socket could not be used.
    #[error("cannot reach the service at {}", path.display())]
    Connect {
        /// The control socket.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// It did not answer in time.
    #[error("the service at {} does not answer", .0.display())]
    Silent(PathBuf),
    /// It answered with an error.
    #[error("the service refused: {reason} ({status})")]
    Refused {
        /// HTTP status.
        status: StatusCode,
        /// The service's own words.
        reason: String,
    },
    /// No volume can have this name.
    #[error("there is no volume {0:?}")]
    Name(String),
    /// What came back is no answer of ours.
    #[error("no proper answer from {}", path.display())]
    Protocol {
        /// The control socket.
        path: PathBuf,
        /// What was wrong with it.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The service is still there after a stop.
    #[error("the service at {} is still stopping", .0.display())]
    StillThere(PathBuf),
}

/// A service by its control socket. Every call is a connection of its own, and blocks.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// Names the socket; nothing is opened.
    pub fn new(path: impl AsRef<Path>) -> Client {
        Client { path: path.as_ref().to_owned() }
    }

    /// How things are with the service.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn status(&self) -> Result<Status, ClientError> {
        self.ask(Method::GET, "/v1/status", Bytes::new())
    }

    /// What was done so far.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn stats(&self) -> Result<Stats, ClientError> {
        self.ask(Method::GET, "/v1/stats", Bytes::new())
    }

    /// Asks for a clean stop and returns at once.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn stop(&self, wanted: &Stop) -> Result<(), ClientError> {
        self.post::<Stopping>("/v1/stop", wanted).map(drop)
    }

    /// Changes the size of a volume, to `size` bytes.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn resize(&self, volume: &str, size: u64, force: bool) -> Result<Resized, ClientError> {
        self.post(&path_of(volume, "resize")?, &Resize { size, force })
    }

    /// Has a volume take the size that its store has now.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn refresh(&self, volume: &str, force: bool) -> Result<Resized, ClientError> {
        self.post(&path_of(volume, "refresh")?, &Refresh { force })
    }

    /// Waits until nobody listens on the control socket any more. A service gives it up as its last act.
    ///
    /// # Errors
    /// [`ClientError::StillThere`] after `limit`.
    pub fn wait_gone(&self, limit: Duration) -> Result<(), ClientError> {
        let start = Instant::now();
        while is_served(&self.path).unwrap_or(true) {
            if start.elapsed() >= limit {
                return Err(ClientError::StillThere(self.path.clone()));
            }
            std::thread::sleep(STOP_REST);
        }
        Ok(())
    }

    /// Lets the requests of a volume go on that wait because its store failed, or fails them.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn resume(&self, volume: &str, give_up: bool) -> Result<Resumed, ClientError> {
        self.post(&path_of(volume, "resume")?, &Resume { give_up })
    }

    /// Has a volume be known, as `serve --volume` takes it, for exports to come.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn add_volume(&self, volume: &str) -> Result<Changed, ClientError> {
        self.post("/v1/volumes", &AddVolume { volume: volume.into() })
    }

    /// Forgets a volume that has no exports.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn remove_volume(&self, volume: &str) -> Result<Changed, ClientError> {
        self.ask(Method::POST, &path_of(volume, "remove")?, Bytes::new())
    }

    /// Starts an export.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn add_export(&self, wanted: &AddExport) -> Result<Changed, ClientError> {
        self.post("/v1/exports", wanted)
    }

    /// Ends an export.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn remove_export(&self, wanted: &RemoveExport) -> Result<Changed, ClientError> {
        self.post("/v1/exports/remove", wanted)
    }

    /// Has a volume's fault layers make faults, or none.
    ///
    /// # Errors
    /// As for [`resize`](Self::resize).
    pub fn fault(&self, volume: &str, enabled: bool) -> Result<Faulted, ClientError> {
        self.post(&path_of(volume, "fault")?, &Fault { enabled })
    }

    /// A volume's limits of operations and bytes in a second.
    ///
    /// # Errors
    /// As for [`resize`](Self::resize).
    pub fn limits(&self, volume: &str) -> Result<LimitsStatus, ClientError> {
        self.ask(Method::GET, &path_of(volume, "limit")?, Bytes::new())
    }

    /// Changes those that are named.
    ///
    /// # Errors
    /// As for [`resize`](Self::resize).
    pub fn limit(&self, volume: &str, change: &LimitsChange) -> Result<LimitsStatus, ClientError> {
        self.post(&path_of(volume, "limit")?, change)
    }

    fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| self.protocol(error.into()))?;
        self.ask(Method::POST, path, body.into())
    }

    fn ask<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<T, ClientError> {
        let connect_failed = |source| ClientError::Connect { path: self.path.clone(), source };
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(connect_failed)?.block_on(
            async {
                tokio::time::timeout(ANSWER_TIME, self.exchange(method, path, body))
                    .await
                    .unwrap_or_else(|_| Err(ClientError::Silent(self.path.clone())))
            },
        )
    }

    async fn exchange<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let stream = UnixStream::connect(&self.path).await.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ClientError::NotRunning(self.path.clone())
            }
            io::ErrorKind::PermissionDenied => ClientError::Denied(self.path.clone()),
            _ => ClientError::Connect { path: self.path.clone(), source },
        })?;
        let (status, body) =
            self.send(stream, method, path, body).await.map_err(|source| self.protocol(source))?;
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|error| self.protocol(error.into()));
        }
        let reason = serde_json::from_slice::<ApiError>(&body)
            .map_or_else(|_| "no reason given".to_owned(), |error| error.error);
        Err(ClientError::Refused { status, reason })
    }

    /// One request on a fresh connection.
    async fn send(
        &self,
        stream: UnixStream,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), Box<dyn Error + Send + Sync>> {
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // The request's own future reports what goes wrong on the connection.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "ringblk")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await?;
        Ok((status, body.to_bytes()))
    }

    fn protocol(&self, source: Box<dyn Error + Send + Sync>) -> ClientError {
        ClientError::Protocol { path: self.path.clone(), source }
    }
}

/// For whoever did not say where.
fn elsewhere(path: &Path) -> &'static str {
    if path == Path::new(DEFAULT_CONTROL) { " (--control SOCKET asks one elsewhere)" } else { "" }
}

/// Where a volume is asked for `what`. A name that would need escapes in a path is no volume's.
fn path_of(volume: &str, what: &str) -> Result<String, ClientError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    if volume.is_empty() || !volume.bytes().all(plain) {
        return Err(ClientError::Name(volume.to_owned()));
    }
    Ok(format!("/v1/volumes/{volume}/{what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    /// A server that gives every client the same bytes, once.
    fn with_answer(bytes: &'static [u8]) -> Result<Status, ClientError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).unwrap();
            let _ = stream.write_all(bytes);
        });
        let result = Client::new(&path).status();
        server.join().unwrap();
        result
    }

    #[test]
    fn nobody_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock");
        let error = Client::new(&path).status().unwrap_err();
        assert!(matches!(error, ClientError::NotRunning(_)), "{error}");
        assert!(error.to_string().contains("c.sock"));
        drop(UnixListener::bind(&path).unwrap());
        assert!(matches!(Client::new(&path).stop(&Stop::default()), Err(ClientError::NotRunning(_))));
        Client::new(&path).wait_gone(Duration::ZERO).unwrap();
    }

    #[test]
    fn answers_of_strangers_are_errors() {
        for bytes in [
            &b""[..],
            b"220 mail.example ESMTP\r\n",
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\n\r\nnot json",
            b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n",
        ] {
            let error = with_answer(bytes).unwrap_err();
            assert!(matches!(error, ClientError::Protocol { .. }), "{error}");
        }
    }

    #[test]
    fn refusals_are_passed_on() {
        let error =
            with_answer(b"HTTP/1.1 503 x\r\ncontent-length: 16\r\n\r\n{\"error\":\"busy\"}").unwrap_err();
        assert_eq!(error.to_string(), "the service refused: busy (503 Service Unavailable)");
        let error = with_answer(b"HTTP/1.1 404 x\r\ncontent-length: 0\r\n\r\n").unwrap_err();
        assert!(error.to_string().contains("no reason given"), "{error}");
    }

    #[test]
    fn waiting_for_the_end_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let client = Client::new(&path);
        let error = client.wait_gone(Duration::ZERO).unwrap_err();
        assert!(matches!(error, ClientError::StillThere(_)), "{error}");
        drop(listener);
        client.wait_gone(Duration::ZERO).unwrap();
    }
}
