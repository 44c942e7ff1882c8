//! A volume on an NBD server: any that speaks fixed newstyle, over a unix socket or TCP, without TLS.
//!
//! What is where: [`protocol`] reads and writes the bytes, [`handshake`] and [`connect`] make a connection
//! (blocking, on the service thread and on helper threads alone), [`dial`] is such a helper, [`inflight`]
//! keeps the requests of a connection, [`ledger`] what is not flushed yet, [`connection`] moves bytes on the
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
//! - A server that takes a request and stays silent is waited for, as a disk is. Over TCP the
//!   kernel's keepalive notices one that is gone without a word, in the time that the system has set for it.
//! - A flush that succeeds covers all writes acknowledged before it, also those that went over connections
//!   which are lost: see [`ledger`].

#![forbid(unsafe_code)]

mod buffer;
mod connect;
mod connection;
mod dial;
mod exchange;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod handshake;
mod inflight;
mod ledger;
mod ops;
mod pool;
mod protocol;
mod tasks;

#[cfg(test)]
mod tests;

pub use connect::Address as Server;
pub(super) use ops::NbdOps;

use super::config::NbdConfig;
use super::losses::Losses;
use crate::block::{DiscardLimits, Geometry, GeometryError, Instance};
use connect::{Address, Connected};
use handshake::Export;
use ledger::Ledger;
use protocol::*;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Why an export cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not an address.
    #[error("{0}")]
    Uri(String),
    /// Nobody there.
    #[error("cannot connect: {0}")]
    Connect(#[source] io::Error),
    /// The connection failed during the handshake.
    #[error("the handshake failed: {0}")]
    Io(#[from] io::Error),
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
    #[error("the export is not the one it was: {0}")]
    Changed(String),
    /// See [`GeometryError`].
    #[error(transparent)]
    Geometry(#[from] GeometryError),
}

/// The server that `uri` names.
///
/// # Errors
/// [`Error::Uri`].
pub fn server(uri: &str) -> Result<Server, Error> {
    connect::parse(uri).map(|(server, _)| server)
}

/// How long a connection may take to be made.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// Connections of each worker where the server allows several and the user does not say.
const CONNECTIONS: u16 = 4;

/// The most bytes of payload in one request, whatever the server allows.
const MAX_PAYLOAD: u32 = 32 << 20;

/// The most bytes in a request without payload: a power of two below what fits its 32 bits, small enough for
/// a server that does it the long way to answer in reasonable time.
const MAX_RANGE: u32 = 1 << 30;

/// An export, as all workers share it.
#[derive(Clone, Debug)]
pub struct NbdVolume {
    remote: Arc<Remote>,
}

/// What is known of the server and owed to its users.
#[derive(Debug)]
struct Remote {
    address: Address,
    name: String,
    /// As it was when the volume was opened; it never changes.
    export: Export,
    /// How long requests outlive their connection.
    reconnect: Duration,
    /// Of each worker.
    connections: usize,
    /// The most bytes in a read or write.
    max_payload: u32,
    ledger: Ledger,
    /// The server's run that the last connection was made to.
    instance: Instance,
    losses: Losses,
    /// The connection made at open, until a worker takes it.
    first: Mutex<Option<Connected>>,
}

impl NbdVolume {
    /// Connects to the server and asks for the export. Nothing is changed there.
    ///
    /// # Errors
    /// When the server cannot be reached, refuses, makes no sense, or has something that is no disk.
    pub fn open(config: &NbdConfig) -> Result<(NbdVolume, Geometry), Error> {
        let (address, name) = connect::parse(&config.uri)?;
        let connected = address.connect(&name, CONNECT_TIME)?;
        let export = connected.agreed.export.clone();
        let mut geometry = geometry(&export)?;
        geometry.read_only |= config.read_only;
        let lost = export.size - geometry.bytes();
        if lost > 0 {
            let block = geometry.logical_block;
            log::warn!(
                "{}: its last {lost} bytes do not fill a block of {block} and are not served",
                config.uri
            );
        }
        let instance = Instance::default();
        instance.set(connected.instance);
        geometry.server = geometry.volatile_cache.then(|| instance.clone());
        let several = export.flags & NBD_FLAG_CAN_MULTI_CONN != 0;
        let connections = if several { config.connections.unwrap_or(CONNECTIONS).max(1) } else { 1 };
        if let Some(asked) = config.connections.filter(|asked| *asked > connections) {
            log::warn!("{}: the server allows one connection at a time, not {asked}", config.uri);
        }
        let remote = Remote {
            address,
            name,
            reconnect: Duration::from_secs(config.reconnect.min(NbdConfig::MAX_RECONNECT)),
            connections: connections.into(),
            // Whole blocks, of which at least one fits: `geometry` saw to it.
            max_payload: export.blocks.maximum.min(MAX_PAYLOAD) & !(geometry.logical_block - 1),
            export,
            ledger: Ledger::default(),
            instance,
            losses: Losses::default(),
            first: Mutex::new(Some(connected)),
        };
        Ok((NbdVolume { remote: Arc::new(remote) }, geometry))
    }

    /// Losses of acknowledged writes.
    pub(super) fn losses(&self) -> &Losses {
        &self.remote.losses
    }

    /// Whether the server keeps several connections coherent, so that several workers may use it.
    pub fn multi_conn(&self) -> bool {
        self.remote.has(NBD_FLAG_CAN_MULTI_CONN)
    }
}

impl Remote {
    /// Whether the export has a transmission flag.
    fn has(&self, flag: u16) -> bool {
        self.export.flags & flag != 0
    }

    /// A new connection to the same export, within `limit`.
    fn connect(&self, limit: Duration) -> Result<Connected, Error> {
        let connected = self.address.connect(&self.name, limit)?;
        let (was, is) = (&self.export, &connected.agreed.export);
        if was != is {
            return Err(Error::Changed(format!("it was {was:?} and is {is:?}")));
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
    let handshake::Blocks { minimum, preferred, maximum } = export.blocks;
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
