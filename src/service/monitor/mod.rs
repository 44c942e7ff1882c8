//! The read-only address: a service's numbers for whoever can connect to it, over HTTP/1.1. Off unless configured.
//!
//! Nothing can be changed here, so nobody is asked who they are. They may be hostile all the same: there are at most
//! [`MAX_CLIENTS`] at a time (for a newcomer the oldest has to go), each for [`CLIENT_TIME`] at most, with one request of at
//! most [`MAX_HEADERS`] bytes whose body is not read. One look at the service is taken at a time, and each serves everybody
//! for [`FRESH`]: however many ask, the service does not work more than that for them. The control socket has its own
//! limits, and workers never wait for a reader.

#![forbid(unsafe_code)]

mod look;

use super::config::MetricsAddress;
use super::control::ControlHandler;
use super::socket::{SocketError, SocketFile};
use crate::log_limit::LogLimit;
use http_body_util::Full;
use hyper::body::{Body, Bytes};
use hyper::header::{
    ACCEPT, ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue,
    X_CONTENT_TYPE_OPTIONS,
};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use look::{Looks, What};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::{sleep, timeout};

/// Clients at a time.
pub const MAX_CLIENTS: usize = 16;
/// From the first byte to the end of the answer.
const CLIENT_TIME: Duration = Duration::from_secs(10);
/// For the request line and the headers.
const HEADER_TIME: Duration = Duration::from_secs(5);
/// Bytes of request line and headers; hyper will not have less than 8 KiB of buffer.
const MAX_HEADERS: usize = 8 << 10;
/// How long an answer is taken for a new one.
const FRESH: Duration = Duration::from_millis(100);
/// Rest after a failed accept: out of descriptors, most likely.
const ACCEPT_REST: Duration = Duration::from_millis(200);

/// What may be fetched, for those who ask for something else.
const PATHS: &str = "there are /metrics and /v1/stats\n";

/// Why the numbers are not shown.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The Unix socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The address.
    #[error("metrics: cannot listen on {address}")]
    Address {
        /// As configured.
        address: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// The listening socket. Dropping it removes its file, if it has one.
pub struct Monitor(Endpoint);

enum Endpoint {
    Tcp(TcpListener),
    Unix(SocketFile),
}

impl Monitor {
    /// Listens. Nobody is answered before [`serve`](Self::serve).
    ///
    /// # Errors
    /// When the address or the path cannot be had.
    pub fn bind(address: &MetricsAddress) -> Result<Monitor, MonitorError> {
        let endpoint = match address {
            MetricsAddress::Unix(socket) => Endpoint::Unix(SocketFile::bind(&socket.path, socket.access())?),
            MetricsAddress::Tcp(address) => {
                let failed = |source| MonitorError::Address { address: *address, source };
                let listener = TcpListener::bind(address).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                // The port may be any.
                log::info!("metrics: http://{}/metrics", listener.local_addr().map_err(failed)?);
                Endpoint::Tcp(listener)
            }
        };
        Ok(Monitor(endpoint))
    }

    /// Answers until it is dropped. Must run inside a current-thread tokio runtime with a `LocalSet`, time and I/O. Between
    /// requests nothing wakes up.
    pub async fn serve(self, service: Arc<dyn ControlHandler>) {
        let served = match &self.0 {
            Endpoint::Tcp(listener) => match listener.try_clone().and_then(tokio::net::TcpListener::from_std)
            {
                Ok(listener) => accept(service, async || Ok(listener.accept().await?.0)).await,
                Err(error) => Err(error),
            },
            Endpoint::Unix(socket) => match socket.listener().and_then(tokio::net::UnixListener::from_std) {
                Ok(listener) => accept(service, async || Ok(listener.accept().await?.0)).await,
                Err(error) => Err(error),
            },
        };
        if let Err(error) = served {
            log::error!("metrics: {error}: they are not shown");
        }
    }
}

/// Those that are being answered, the oldest first. They go with it.
#[derive(Default)]
struct Clients(VecDeque<JoinHandle<()>>);

impl Clients {
    fn add(&mut self, client: JoinHandle<()>) {
        self.0.retain(|client| !client.is_finished());
        if self.0.len() >= MAX_CLIENTS
            && let Some(oldest) = self.0.pop_front()
        {
            oldest.abort();
        }
        self.0.push_back(client);
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

/// Answers everybody whom `next` brings, without end.
async fn accept<S: AsyncRead + AsyncWrite + Unpin + 'static>(
    service: Arc<dyn ControlHandler>,
    next: impl AsyncFn() -> io::Result<S>,
) -> io::Result<()> {
    let (log, mut clients) = (LogLimit::new("metrics"), Clients::default());
    let looks = Arc::new(Looks::new(service));
    loop {
        match next().await {
            Ok(stream) => clients.add(spawn_local(client(stream, Arc::clone(&looks)))),
            Err(error) => {
                log.warn("accept", format_args!("cannot accept a connection: {error}"));
                sleep(ACCEPT_REST).await;
            }
        }
    }
}

async fn client(stream: impl AsyncRead + AsyncWrite + Unpin + 'static, looks: Arc<Looks>) {
    let service = service_fn(|request| {
        let looks = Arc::clone(&looks);
        async move { Ok::<_, Infallible>(answer(&looks, &request).await) }
    });
    let serving = http1::Builder::new()
        .keep_alive(false)
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .max_buf_size(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(CLIENT_TIME, serving).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => log::debug!("metrics: {error}"),
        Err(_) => log::debug!("metrics: a client took too long"),
    }
}

async fn answer(looks: &Arc<Looks>, request: &Request<impl Body>) -> Response<Full<Bytes>> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut answer = plain(StatusCode::METHOD_NOT_ALLOWED, "nothing can be changed here\n");
        answer.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return answer;
    }
    let accept = request.headers().get(ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    let what = match request.uri().path() {
        "/metrics" => What::metrics(accept),
        "/v1/stats" => What::Stats,
        _ => return plain(StatusCode::NOT_FOUND, PATHS),
    };
    match looks.at(what).await {
        Some(text) => with_type(StatusCode::OK, what.content_type(), text),
        None => plain(StatusCode::INTERNAL_SERVER_ERROR, "the numbers cannot be had\n"),
    }
}

fn plain(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    with_type(status, "text/plain; charset=utf-8", Bytes::from_static(text.as_bytes()))
}

fn with_type(status: StatusCode, kind: &'static str, text: Bytes) -> Response<Full<Bytes>> {
    /// Names are others' words: a browser is to take none of them for a program.
    const HEADERS: [(HeaderName, &str); 3] = [
        (CACHE_CONTROL, "no-store"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (CONTENT_SECURITY_POLICY, "default-src 'none'"),
    ];
    let mut answer = Response::new(Full::new(text));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    for (name, value) in HEADERS {
        answer.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    answer
}
