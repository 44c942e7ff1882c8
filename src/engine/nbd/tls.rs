//! TLS to a server (`nbds`), by rustls.
//!
//! The handshake is made where every connection is made, in blocking calls. Then a thread of the connection's own
//! **relays**: between the server's socket, in records, and a pair of sockets, in the clear, of which the worker's ring gets
//! the other end. So a worker does not know about TLS, encrypts nothing, and does not pay for it on other connections. The
//! relay has a buffer of a record's size or two for each direction and takes no more from one side than the other has taken,
//! and it sleeps while nothing comes.
//!
//! Certificates are read once, before the service gives up the rights to do so.

#![forbid(unsafe_code)]

use super::Error;
use super::stream::Stream;
use super::uri::{Address, Uri};
use crate::engine::config::NbdConfig;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme};
use std::fmt;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes in the clear that the relay has of each direction.
const BUFFER: usize = 64 << 10;

/// How long the last bytes to a server may take to leave.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// How long the end of a process waits for all of them.
const FAREWELL: Duration = Duration::from_secs(1);

/// Whom to trust, and who we are.
#[derive(Clone)]
pub struct Tls {
    config: Arc<ClientConfig>,
    /// What the server's certificate has to be for.
    server: ServerName<'static>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TLS to {:?}", self.server)
    }
}

impl Tls {
    /// Reads the certificates; `None` where the URI does not ask for TLS.
    ///
    /// # Errors
    /// [`Error::Tls`], with the file.
    pub fn load(config: &NbdConfig, uri: &Uri) -> Result<Option<Tls>, Error> {
        if !uri.tls {
            return Ok(None);
        }
        let name = match (&config.tls_hostname, &uri.address) {
            (Some(name), _) => name.clone(),
            (None, Address::Tcp { host, .. }) => host.split('%').next().unwrap_or(host).to_owned(),
            (None, Address::Unix(_)) => "localhost".to_owned(),
        };
        let server = ServerName::try_from(name.clone()).map_err(|_| {
            Error::Tls(format!("tls-hostname: \"{}\" is no name of a host", name.escape_debug()))
        })?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let other = |error: &dyn fmt::Display| Error::Tls(error.to_string());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| other(&error))?;
        let builder = if config.tls_verify {
            let roots = Arc::new(roots(config.tls_ca.as_deref())?);
            let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider).build();
            builder.with_webpki_verifier(verifier.map_err(|error| other(&error))?)
        } else {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(Anybody(provider)))
        };
        let client = match (&config.tls_cert, &config.tls_key) {
            (Some(cert), Some(key)) => {
                let bad =
                    |error: &dyn fmt::Display| Error::Tls(format!("tls-key {}: {error}", key.display()));
                let chain = certificates("tls-cert", cert)?;
                let secret = PrivateKeyDer::from_pem_file(key).map_err(|error| bad(&error))?;
                builder.with_client_auth_cert(chain, secret).map_err(|error| bad(&error))?
            }
            _ => builder.with_no_client_auth(),
        };
        // Once, however often the files were looked for before.
        if !config.tls_verify {
            log::warn!("{}: tls-verify=off: anybody may answer as this server", config.uri.escape_debug());
        }
        Ok(Some(Tls { config: Arc::new(client), server }))
    }

    /// Begins a session on `stream`, which has agreed to it: certificates are exchanged and judged.
    ///
    /// # Errors
    /// See [`Error`]; what the other side says of our certificate may come later.
    pub fn negotiate<S: Read + Write>(&self, stream: &mut S) -> Result<ClientConnection, Error> {
        let client = ClientConnection::new(self.config.clone(), self.server.clone());
        let mut client = client.map_err(|error| Error::Tls(error.to_string()))?;
        client.set_buffer_limit(None);
        while client.is_handshaking() {
            client.complete_io(stream).map_err(|error| judge(Error::Io(error)))?;
        }
        Ok(client)
    }
}

/// What a library's error means: that of a session, which another attempt would not mend, or that of the stream below.
pub fn judge(error: Error) -> Error {
    match error {
        Error::Io(error) if error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) => {
            Error::Tls(error.to_string())
        }
        other => other,
    }
}

fn roots(file: Option<&Path>) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    let Some(file) = file else {
        let found = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(found.certs);
        return match roots.is_empty() {
            true => Err(Error::Tls(
                "this system has no certificates of authorities: name one by tls-ca=FILE".into(),
            )),
            false => Ok(roots),
        };
    };
    for certificate in certificates("tls-ca", file)? {
        let bad = |error| Error::Tls(format!("tls-ca {}: {error}", file.display()));
        roots.add(certificate).map_err(bad)?;
    }
    Ok(roots)
}

/// All the certificates in a file.
fn certificates(key: &str, file: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let bad = |error: &dyn fmt::Display| Error::Tls(format!("{key} {}: {error}", file.display()));
    let found = CertificateDer::pem_file_iter(file).map_err(|error| bad(&error))?;
    let found = found.collect::<Result<Vec<_>, _>>().map_err(|error| bad(&error))?;
    if found.is_empty() { Err(bad(&"there is no certificate in it")) } else { Ok(found) }
}

/// `tls-verify=off`: whoever answers is the server, as long as it has the key of the certificate that it shows.
#[derive(Debug)]
struct Anybody(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Relays a session to a socket in the clear, until either side ends it.
///
/// # Errors
/// When there are no descriptors or threads left.
pub fn relay(client: ClientConnection, server: Stream, label: &str) -> io::Result<OwnedFd> {
    let (ours, local) = UnixStream::pair()?;
    local.set_nonblocking(true)?;
    server.set_nonblocking(true)?;
    let label = label.to_owned();
    RELAYS.fetch_add(1, Ordering::SeqCst);
    let alive = Alive;
    let relay = Relay { client, server, local, inward: vec![0; BUFFER].into(), taken: 0, filled: 0 };
    thread::Builder::new().name("ringblk-tls".into()).spawn(move || {
        let _alive = alive;
        if let Err(error) = relay.run() {
            log::warn!("{label}: TLS: {error}");
        }
    })?;
    Ok(ours.into())
}

/// Relays there are.
static RELAYS: AtomicUsize = AtomicUsize::new(0);

/// One of them, until it is dropped.
struct Alive;

impl Drop for Alive {
    fn drop(&mut self) {
        RELAYS.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Waits until the relays have sent what was said last, for a process that is about to end; not for long.
pub fn farewell() {
    let deadline = Instant::now() + FAREWELL;
    while RELAYS.load(Ordering::SeqCst) > 0 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
}

struct Relay {
    client: ClientConnection,
    server: Stream,
    /// The worker is at its other end.
    local: UnixStream,
    /// What the server said, from the first byte on that the worker has not taken.
    inward: Box<[u8]>,
    taken: usize,
    filled: usize,
}

/// Whether a side goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    On,
    Ended,
}

impl Relay {
    fn run(mut self) -> io::Result<()> {
        let mut outward = vec![0; BUFFER];
        // It may have come with the handshake.
        let mut flow = self.pass_in()?;
        while flow == Flow::On {
            let (server, local) = self.wait()?;
            if server.intersects(PollFlags::POLLOUT) {
                self.send()?;
            }
            let gone = local.contains(PollFlags::POLLHUP);
            if gone || (!local.is_empty() && self.take_out(&mut outward)? == Flow::Ended) {
                return self.say_goodbye(&mut outward);
            }
            if server.intersects(!PollFlags::POLLOUT) {
                flow = self.receive()?;
            }
            if flow == Flow::On {
                flow = self.pass_in()?;
            }
        }
        // The worker gets what it was sent, and then the end.
        let _ = self.local.shutdown(Shutdown::Both);
        Ok(())
    }

    /// Sleeps until there is something to be done: what happened to the server's and to the worker's socket.
    fn wait(&self) -> io::Result<(PollFlags, PollFlags)> {
        let (mut server, mut local) = (PollFlags::empty(), PollFlags::empty());
        match self.taken == self.filled {
            true => server |= PollFlags::POLLIN,
            false => local |= PollFlags::POLLOUT,
        }
        match self.client.wants_write() {
            true => server |= PollFlags::POLLOUT,
            false => local |= PollFlags::POLLIN,
        }
        // The worker's end is always of interest, the server's only while something can be done about it.
        let mut fds = [PollFd::new(self.local.as_fd(), local), PollFd::new(self.server.as_fd(), server)];
        let count = if server.is_empty() { 1 } else { 2 };
        match poll(&mut fds[..count], PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let [local, server] = fds.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        Ok((server, local))
    }

    /// Takes what the worker has to say, if there is no more to be sent of what it said before.
    fn take_out(&mut self, buffer: &mut [u8]) -> io::Result<Flow> {
        if self.client.wants_write() {
            return Ok(Flow::On);
        }
        match self.local.read(buffer) {
            Ok(0) => Ok(Flow::Ended),
            Ok(count) => {
                self.client.writer().write_all(&buffer[..count])?;
                self.send()?;
                Ok(Flow::On)
            }
            Err(error) if later(&error) => Ok(Flow::On),
            Err(_) => Ok(Flow::Ended),
        }
    }

    /// Sends records, as far as the server takes them.
    fn send(&mut self) -> io::Result<()> {
        while self.client.wants_write() {
            match self.client.write_tls(&mut self.server) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if later(&error) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes records from the server, when all that was in the last ones has been passed on.
    fn receive(&mut self) -> io::Result<Flow> {
        if self.taken < self.filled {
            return Ok(Flow::On);
        }
        match self.client.read_tls(&mut self.server) {
            Ok(0) => return Ok(Flow::Ended),
            Ok(_) => {}
            Err(error) if later(&error) => return Ok(Flow::On),
            Err(error) => return Err(error),
        }
        if let Err(error) = self.client.process_new_packets() {
            // With an alert that says why.
            let _ = self.send();
            return Err(io::Error::other(error));
        }
        // Records of its own that it answers, such as new keys.
        self.send()?;
        Ok(Flow::On)
    }

    /// Passes on to the worker what was received, as far as it takes it.
    fn pass_in(&mut self) -> io::Result<Flow> {
        loop {
            if self.taken == self.filled {
                match self.client.reader().read(&mut self.inward) {
                    // It said good-bye.
                    Ok(0) => return Ok(Flow::Ended),
                    Ok(count) => (self.taken, self.filled) = (0, count),
                    Err(error) if later(&error) => return Ok(Flow::On),
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Flow::Ended),
                    Err(error) => return Err(error),
                }
            }
            match self.local.write(&self.inward[self.taken..self.filled]) {
                Ok(count) => self.taken += count,
                Err(error) if later(&error) => return Ok(Flow::On),
                // The worker does not want it any more. What it has said last is still to be sent.
                Err(_) => self.taken = self.filled,
            }
        }
    }

    /// The worker has hung up: its last words go out, and then ours.
    fn say_goodbye(mut self, buffer: &mut [u8]) -> io::Result<()> {
        let deadline = Instant::now() + SHUTDOWN_GRACE;
        while let Ok(count @ 1..) = self.local.read(buffer) {
            self.client.writer().write_all(&buffer[..count])?;
        }
        self.client.send_close_notify();
        loop {
            // It may be gone already, which is no trouble any more.
            if self.send().is_err() || !self.client.wants_write() {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(time) = PollTimeout::try_from(left) else { return Ok(()) };
            if left.is_zero() {
                return Ok(());
            }
            let _ = poll(&mut [PollFd::new(self.server.as_fd(), PollFlags::POLLOUT)], time);
        }
    }
}

fn later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
