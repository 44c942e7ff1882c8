//! A volume on an NBD server: any that speaks fixed newstyle, over a unix socket or TCP, with TLS or without.
//!
//! What is where: [`uri`] says where the server is, [`protocol`] reads and writes the bytes, [`handshake`] and [`connect`] make a connection
//! (blocking, on the service thread and on helper threads alone), [`tls`] encrypts it, [`reconnect`] is such a helper, [`pending`]
//! keeps the requests of a connection, [`unflushed`] what is not flushed yet, [`connection`] moves bytes on the
//! worker's ring ([`exchange`] for the requests, [`tasks`] for itself), [`pool`] keeps a worker's connections
//! alive, and [`ops`] makes requests out of operations.
//!
//! Contracts:
//! - A server may say what it likes: it is answered with an error or loses the connection. It cannot make us
//!   panic, write outside a request's memory, or use more memory than a request's place in a table.
//! - The worker never blocks. Making connections is a helper thread's work, one for each connection that is
//!   down.
//! - A lost connection fails its requests with `EIO` at once, and new ones with `ENOTCONN` while there is
//!   none (`reconnect` = 0); or they are sent again, over another connection or the next one, for up to
//!   `reconnect` seconds. Either way the connection is tried again for as long as the volume is in use: at
//!   once, then with pauses from 0.1 to 5 seconds.
//! - A request is sent again only when no reply came. The server may carry it out twice, and a server that
//!   outlives its connection may carry out the first copy late. Nobody can tell that from outside; the other
//!   clients that reconnect (the kernel's, QEMU's) live with the same.
//! - A server that takes requests and stays silent loses the connection after `timeout` seconds: see [`watch`]. Over
//!   TCP the kernel's keepalive notices one that is gone without a word, if that takes longer than the kernel needs.
//! - A server that comes back with a larger export, or one that can do more, is taken; one that lacks what clients were
//!   promised is not, and is tried again: see [`export`].
//! - A flush that succeeds covers all writes acknowledged before it, also those that went over connections
//!   which are lost: see [`unflushed`].

#![forbid(unsafe_code)]

mod buffer;
mod config;
mod connect;
mod connection;
mod reconnect;
mod exchange;
mod export;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod handshake;
mod pending;
mod unflushed;
mod ops;
mod pool;
mod protocol;
mod store;
mod stream;
mod tasks;
mod tls;
pub(super) mod uri;
mod watch;

#[cfg(test)]
mod tests;

pub use config::NbdConfig;
pub(super) use ops::NbdOps;
pub use tls::farewell;
pub use uri::{Address as Server, is_uri};

use super::losses::Losses;
use crate::block::{DiscardLimits, Geometry, GeometryError, Instance};
use crate::log_limit::LogLimit;
use connect::Connected;
use export::{Offer, Promise};
use handshake::{Blocks, Export};
use protocol::*;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tls::Tls;
use unflushed::UnflushedWrites;
use uri::{Address, Uri};

/// Why an export cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not an address.
    #[error("{0}")]
    Uri(String),
    /// Nobody there.
    #[error("{}", connect::failure(.0))]
    Connect(#[source] io::Error),
    /// The connection failed during the handshake.
    #[error("{}", handshake::failure(.0))]
    Io(#[source] io::Error),
    /// Not a server of the kind we speak with.
    #[error("the server is not usable: {0}")]
    Protocol(&'static str),
    /// The server's own decision.
    #[error("the server refuses the export: {reason}{}{text}", if text.is_empty() { "" } else { ": " })]
    Refused {
        /// What its code means.
        reason: &'static str,
        /// In its own words, perhaps none.
        text: String,
    },
    /// Certificates that cannot be used, or a server that cannot or will not be trusted.
    #[error("TLS: {0}")]
    Tls(String),
    /// Block sizes that make no sense, or that no disk can have.
    #[error(
        "the server's block sizes are not usable: minimum {minimum}, preferred {preferred}, maximum {maximum}"
    )]
    Blocks {
        /// In bytes.
        minimum: u32,
        /// In bytes.
        preferred: u32,
        /// In bytes.
        maximum: u32,
    },
    /// Another disk than before is behind the address.
    #[error("the export is not what it was: {0}")]
    Changed(String),
    /// See [`GeometryError`].
    #[error(transparent)]
    Geometry(#[from] GeometryError),
}

impl Error {
    /// It may be there in a moment, and nothing is wrong with the configuration: the server cannot be reached, or goes away.
    pub fn is_passing(&self) -> bool {
        match self {
            Error::Connect(_) | Error::Io(_) => true,
            Error::Refused { reason, .. } => *reason == handshake::SHUTTING_DOWN,
            _ => false,
        }
    }
}

/// The server that `uri` names.
///
/// # Errors
/// [`Error::Uri`].
pub fn server(uri: &str) -> Result<Server, Error> {
    Uri::parse(uri).map(|uri| uri.address).map_err(Error::Uri)
}

/// Whether two URIs name the same export of the same server, as far as they tell: whether it is encrypted is no matter.
pub fn is_same(one: &str, other: &str) -> bool {
    match (Uri::parse(one), Uri::parse(other)) {
        (Ok(one), Ok(other)) => (one.address, one.name) == (other.address, other.name),
        _ => one == other,
    }
}

/// How long a connection may take to be made.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// How long a server may take to tell an export's size: shorter than the control API's clients wait.
const ASK_TIME: Duration = Duration::from_secs(3);

/// Connections of each worker where the server allows several and the user does not say.
const CONNECTIONS: u16 = 4;

/// The most bytes of payload in one request, whatever the server allows.
const MAX_PAYLOAD: u32 = 32 << 20;

/// The most bytes in a request without payload: a power of two below what fits its 32 bits, small enough for
/// a server that does it the long way to answer in reasonable time.
const MAX_RANGE: u32 = 1 << 30;

/// An export, as all workers share it.
#[derive(Clone, Debug)]
pub struct NbdStore {
    remote: Arc<Remote>,
    /// See [`tail`](Self::tail).
    tail: u64,
}

/// What is known of the server and owed to its users.
#[derive(Debug)]
struct Remote {
    /// The URI, for people.
    label: String,
    /// For lines about the server, which it brings about.
    log: LogLimit,
    address: Address,
    name: Vec<u8>,
    /// `None`: in the clear.
    tls: Option<Tls>,
    promise: Promise,
    /// What the connections offer that are up.
    offer: Offer,
    /// How long requests outlive their connection.
    reconnect: Duration,
    /// How long a server may be silent that has requests; zero for ever.
    timeout: Duration,
    /// Of each worker.
    connections: usize,
    /// Workers that have connections.
    pools: AtomicUsize,
    unflushed: UnflushedWrites,
    /// The server's run that the last connection was made to.
    instance: Instance,
    losses: Losses,
    /// The connection made at open, until a worker takes it.
    first: Mutex<Option<Connected>>,
}

/// What is known of a server before it is asked, with all the files read that it takes.
#[derive(Clone, Debug)]
pub struct Target {
    uri: Uri,
    tls: Option<Tls>,
}

impl Target {
    /// What `config` names.
    ///
    /// # Errors
    /// [`Error::Uri`] and [`Error::Tls`].
    pub fn of(config: &NbdConfig) -> Result<Target, Error> {
        let uri = Uri::parse(&config.uri).map_err(Error::Uri)?;
        let tls = Tls::load(config, &uri)?;
        Ok(Target { uri, tls })
    }
}

impl NbdStore {
    /// Connects to the server and asks for the export. Nothing is changed there.
    ///
    /// # Errors
    /// When the server cannot be reached, refuses, makes no sense, or has something that is no disk.
    pub fn open(config: &NbdConfig) -> Result<(NbdStore, Geometry), Error> {
        NbdStore::open_at(config, &Target::of(config)?, CONNECT_TIME)
    }

    /// The same, where all that could be done beforehand is done, within `limit` (and no longer than it may always take).
    ///
    /// # Errors
    /// See [`open`](Self::open).
    pub fn open_at(
        config: &NbdConfig,
        target: &Target,
        limit: Duration,
    ) -> Result<(NbdStore, Geometry), Error> {
        let Target { uri: Uri { address, name, .. }, tls } = target.clone();
        let timeout = Duration::from_secs(config.timeout.min(NbdConfig::MAX_TIMEOUT));
        let most = limit.min(CONNECT_TIME);
        let limit = if timeout.is_zero() { most } else { most.min(timeout) };
        let connected = address.connect(&name, tls.as_ref(), limit)?;
        let export = connected.negotiated.export.clone();
        let mut geometry = geometry(&export)?;
        geometry.read_only |= config.read_only;
        let tail = export.size - geometry.bytes();
        let instance = Instance::default();
        instance.set(connected.instance);
        geometry.server = geometry.volatile_cache.then(|| instance.clone());
        let several = export.flags & NBD_FLAG_CAN_MULTI_CONN != 0;
        let connections = if several { config.connections.unwrap_or(CONNECTIONS).max(1) } else { 1 };
        if let Some(asked) = config.connections.filter(|asked| *asked > connections) {
            log::warn!("{}: the server allows one connection at a time, not {asked}", config.uri);
        }
        let remote = Remote {
            log: LogLimit::new(config.uri.escape_debug().to_string()),
            label: config.uri.escape_debug().to_string(),
            address,
            name,
            tls,
            reconnect: Duration::from_secs(config.reconnect.min(NbdConfig::MAX_RECONNECT)),
            timeout,
            connections: connections.into(),
            promise: Promise {
                flags: export.flags,
                logical_block: geometry.logical_block,
                read_only: geometry.read_only,
                capacity: geometry.capacity.clone(),
            },
            offer: Offer::default(),
            pools: AtomicUsize::new(0),
            unflushed: UnflushedWrites::default(),
            instance,
            losses: Losses::default(),
            first: Mutex::new(Some(connected)),
        };
        Ok((NbdStore { remote: Arc::new(remote), tail }, geometry))
    }

    /// Losses of acknowledged writes.
    pub(super) fn losses(&self) -> &Losses {
        &self.remote.losses
    }

    /// Bytes behind the last whole block when it was opened.
    pub fn tail(&self) -> u64 {
        self.tail
    }

    /// Whether the server keeps several connections coherent, so that several workers may use it.
    pub fn multi_conn(&self) -> bool {
        self.remote.promise.has(NBD_FLAG_CAN_MULTI_CONN)
    }

    /// Has `to` told the volume's name whenever its server offers more than is served.
    pub(super) fn tell_growth(&self, to: Sender<String>, volume: &str) {
        let Remote { offer, promise, .. } = &*self.remote;
        offer.tell(to, volume, promise);
    }

    /// Bytes that every connection offers; `None` while there is none.
    pub(super) fn offered(&self) -> Option<u64> {
        self.remote.offer.size()
    }

    /// Asks the server for the export's size, over a connection of its own.
    ///
    /// # Errors
    /// When it cannot be reached or has another export by now. It may be smaller, which is the caller's to judge.
    pub(super) fn ask_size(&self) -> Result<u64, Error> {
        let Remote { address, name, tls, .. } = &*self.remote;
        Ok(address.connect(name, tls.as_ref(), ASK_TIME)?.negotiated.export.size)
    }
}

impl Remote {
    /// The most bytes in a read or write: whole blocks, of which at least one fits, since the export was looked at.
    fn max_payload(&self, blocks: &Blocks) -> u32 {
        blocks.maximum.min(MAX_PAYLOAD) & !(self.promise.logical_block - 1)
    }

    /// A new connection to the same export, within `limit`.
    fn connect(&self, limit: Duration) -> Result<Connected, Error> {
        let limit = if self.timeout.is_zero() { limit } else { limit.min(self.timeout) };
        let connected = self.address.connect(&self.name, self.tls.as_ref(), limit)?;
        let several = self.connections > 1 || self.pools.load(Ordering::Relaxed) > 1;
        let differs = self.promise.differs(&connected.negotiated.export, several);
        if !differs.is_empty() {
            return Err(Error::Changed(differs.join("; ")));
        }
        self.instance.set(connected.instance);
        Ok(connected)
    }

    /// The connection made at open, once.
    fn take_first(&self) -> Option<Connected> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The disk that an export makes.
fn geometry(export: &Export) -> Result<Geometry, Error> {
    let Blocks { minimum, preferred, maximum } = export.blocks;
    let logical = minimum.max(512);
    if logical > 4096 || maximum < logical {
        return Err(Error::Blocks { minimum, preferred, maximum });
    }
    let has = |flag| export.flags & flag != 0;
    let mut geometry = Geometry::new(export.size, logical)?;
    // A server's preference may be a whole object of megabytes. Above a page it is a hint for request sizes,
    // not a sector size that a file system should take over.
    geometry.physical_block = preferred.clamp(logical, 4096);
    geometry.io_min = preferred.max(logical);
    geometry.read_only = has(NBD_FLAG_READ_ONLY);
    geometry.volatile_cache = has(NBD_FLAG_SEND_FLUSH);
    geometry.discard = has(NBD_FLAG_SEND_TRIM)
        .then_some(DiscardLimits { granularity: preferred.max(logical), max_sectors: MAX_RANGE / 512 });
    // Where the server has no such command the engine writes the zeroes; a request should still end some day.
    let most = if has(NBD_FLAG_SEND_WRITE_ZEROES) { MAX_RANGE } else { MAX_PAYLOAD };
    geometry.max_write_zeroes = most / 512;
    Ok(geometry)
}
