//! One VMM's connection, from its first message to its last.

#![forbid(unsafe_code)]

use super::budget::{Charge, MemoryShare};
use super::config_space;
use super::device::Device;
use super::inflight::Inflight;
use super::memory::Memory;
use super::protocol::{Backend, BackendChannel, Ended, Refusal, Relay, Shape, Vmm, connection};
use super::session_vring::{GuestMemoryHandle, Host, SessionVring, Shared};
use super::vring::StopMode;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{Error as DaemonError, VhostUserBackend, VhostUserDaemon, VringT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

/// Why a session ended, other than by the VMM's leaving or a stop.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The relay refused a message, or gave up on the VMM.
    #[error("{0}")]
    Refused(#[from] Refusal),
    /// A request cannot be carried out.
    #[error("{request:?}: {cause}")]
    Failed {
        /// What was asked.
        request: FrontendReq,
        /// What vhost-user-backend says.
        cause: String,
    },
    /// It truncated a file that it had shown us as memory.
    #[error("it took away memory that it had shown us")]
    MemoryGone,
    /// There are no descriptors, threads or memory for it.
    #[error("no session for it: {0}")]
    Start(DaemonError),
    /// The connection between the relay and the daemon.
    #[error("its daemon cannot be reached: {0}")]
    Private(io::Error),
}

/// The device as one VMM negotiates it.
pub struct Session {
    shared: Arc<Shared>,
    shape: Shape,
    /// The VMM's own, to hang up by.
    socket: Arc<UnixStream>,
    /// Addresses for the memory that the next change brings.
    charges: Mutex<Vec<(u64, Charge)>>,
    vrings: OnceLock<Vec<SessionVring>>,
}

impl Session {
    /// Serves one VMM, until either side ends it. When it returns, every request of the VMM's is complete and nothing
    /// of its memory is in use; only then does the VMM see that we hung up.
    ///
    /// `channel` is open for as long as the VMM has one. Its memory comes out of `share`.
    ///
    /// # Errors
    /// When the VMM broke the protocol.
    pub fn serve(
        mut vmm: Vmm<'_>,
        device: &Arc<Device>,
        host: &Arc<dyn Host>,
        shape: Shape,
        channel: &BackendChannel,
        share: &Arc<MemoryShare>,
    ) -> Result<(), SessionError> {
        let shared = Arc::new(Shared {
            device: Arc::new(device.renewed()),
            host: host.clone(),
            features: AtomicU64::new(0),
            memory: Mutex::new(None),
            inflight: Mutex::new(None),
        });
        let socket = Arc::new(vmm.socket().map_err(SessionError::Private)?);
        let vrings = OnceLock::new();
        let (shared, charges) = (shared.clone(), Mutex::default());
        let session = Arc::new(Session { shared: shared.clone(), shape, socket, charges, vrings });
        let table: GuestMemoryHandle = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let (daemon, vrings) = SessionVring::make_for(&shared, || {
            VhostUserDaemon::new("ringblk-session".into(), session.clone(), table)
        });
        let mut daemon = daemon.map_err(SessionError::Start)?;
        let vrings = session.vrings.get_or_init(|| vrings);
        let (listener, private) = connection().map_err(SessionError::Private)?;
        daemon.start(&mut Listener::from(listener)).map_err(SessionError::Start)?;
        // The relay hangs up on the daemon when it returns.
        let result = Relay::new(&mut vmm, private, &*session, channel, share).run();
        let ended = daemon.wait();
        for vring in vrings {
            vring.stop(StopMode::Disconnect);
        }
        session.settle();
        channel.close();
        if session.is_lost() {
            return Err(SessionError::MemoryGone);
        }
        result.map_err(|error| match error {
            Ended::Refused(refusal) => refusal.into(),
            Ended::Private(error) => SessionError::Private(error),
            Ended::Daemon(request) => SessionError::Failed { request, cause: explain(ended) },
        })
    }

    /// Whether the VMM took memory away that it had shown.
    fn is_lost(&self) -> bool {
        let inflight = self.shared.inflight.lock().unwrap_or_else(PoisonError::into_inner);
        self.memory().as_ref().is_some_and(|memory| memory.is_lost())
            || inflight.as_ref().is_some_and(Inflight::is_lost)
    }

    fn inflight(&self) -> MutexGuard<'_, Option<Inflight>> {
        self.shared.inflight.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves no write in doubt for whoever serves the VMM next: a server may lose what is not flushed. No vring runs.
    fn settle(&self) {
        let Some(inflight) = self.inflight().take() else { return };
        if inflight.is_unflushed() {
            match self.shared.host.flush() {
                Ok(()) => inflight.set_flushed(),
                Err(error) => {
                    let message = format_args!("its last writes are not flushed: {error}");
                    self.shared.device.log().warn("unflushed", message);
                }
            }
        }
    }

    /// Descriptors that a chain may have in any vring. One in a table of its own may be longer than its vring, and
    /// drivers know that.
    fn longest_chain(&self) -> u16 {
        let smallest = self.vrings().iter().map(SessionVring::size).min();
        let indirect = config_space::indirect(self.shared.features.load(Ordering::Relaxed));
        let most = self.shape.queue_size;
        if indirect { most } else { smallest.unwrap_or(most).min(most) }
    }

    fn memory(&self) -> MutexGuard<'_, Option<Arc<Memory>>> {
        self.shared.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn vrings(&self) -> &[SessionVring] {
        self.vrings.get().map_or(&[], Vec::as_slice)
    }
}

impl Backend for Session {
    fn shape(&self) -> Shape {
        self.shape
    }

    fn offered_features(&self) -> u64 {
        self.features()
    }

    fn offered(&self) -> VhostUserProtocolFeatures {
        self.protocol_features()
    }

    fn socket(&self) -> &Arc<UnixStream> {
        &self.socket
    }

    fn set_charges(&self, charges: Vec<(u64, Charge)>) {
        *self.charges.lock().unwrap_or_else(PoisonError::into_inner) = charges;
    }

    fn disable(&self) {
        self.vrings().iter().for_each(|vring| vring.set_enabled(false));
    }

    fn set_inflight(&self, inflight: Inflight) {
        match inflight.writeback() {
            Some(writeback) => self.shared.device.set_writeback(writeback),
            // New ones, for a driver that has begun.
            None if self.shared.device.is_decided() => inflight.set_writeback(self.shared.device.writeback()),
            None => {}
        }
        *self.inflight() = Some(inflight);
        self.vrings().iter().for_each(SessionVring::restart);
    }
}

impl VhostUserBackend for Session {
    type Bitmap = ();
    type Vring = SessionVring;

    fn num_queues(&self) -> usize {
        self.shape.queues.into()
    }

    fn max_queue_size(&self) -> usize {
        self.shape.queue_size.into()
    }

    fn features(&self) -> u64 {
        config_space::features(self.shared.device.geometry())
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        if self.shared.features.swap(features, Ordering::Relaxed) != features {
            self.vrings().iter().for_each(SessionVring::restart);
        }
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            // The relay serves these; the daemon never sees a message of theirs.
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::BACKEND_REQ
    }

    fn set_event_idx(&self, _: bool) {
        // Each vring is told.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let device = &self.shared.device;
        let (queues, longest) = (self.shape.queues, self.longest_chain());
        let space = config_space::space(device.geometry(), queues, longest, device.writeback());
        let fields = space.into_iter().skip(config_space::offset(offset) as usize);
        // What no field is at reads zero.
        fields.chain(std::iter::repeat(0)).take(size as usize).collect()
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        match bytes {
            [on @ (0 | 1)] if config_space::offset(offset) == config_space::WRITEBACK => {
                self.shared.device.set_writeback(*on == 1);
                if let Some(inflight) = &*self.inflight() {
                    inflight.set_writeback(*on == 1);
                }
                if *on == 0 {
                    // From the next write on each is durable; what the cache holds of earlier ones is not
                    // until it is flushed.
                    self.shared.host.flush()?;
                }
            }
            _ => {
                let (len, log) = (bytes.len(), self.shared.device.log());
                log.warn(
                    "configuration",
                    format_args!("{len} bytes at {offset} of its configuration are not to be written"),
                );
            }
        }
        Ok(())
    }

    fn update_memory(&self, table: GuestMemoryHandle) -> io::Result<()> {
        // The old table's mappings live until the last vring that uses them has drained.
        let charges = std::mem::take(&mut *self.charges.lock().unwrap_or_else(PoisonError::into_inner));
        let mappings = table.memory().into_inner();
        let memory = Memory::guarded(mappings, &self.socket, self.memory().as_deref(), charges);
        let memory = memory.map_err(|error| {
            self.shared.device.log().error("memory", format_args!("{error}"));
            io::Error::new(io::ErrorKind::InvalidInput, error)
        })?;
        for vring in self.vrings() {
            vring.stop(StopMode::Restart);
        }
        *self.memory() = Some(Arc::new(memory));
        for vring in self.vrings() {
            vring.start();
        }
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        // No thread of the crate's: the workers serve the vrings.
        Vec::new()
    }

    fn stop_vring(&self, index: u32) -> io::Result<()> {
        if let Some(vring) = self.vrings().get(index as usize) {
            vring.stop(StopMode::Quiesce);
        }
        Ok(())
    }

    fn handle_event(&self, _: u16, _: EventSet, _: &[SessionVring], _: usize) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// What the daemon said at its end.
fn explain(ended: Result<(), DaemonError>) -> String {
    match ended {
        Ok(()) => "the daemon hung up".into(),
        Err(DaemonError::HandleRequest(error)) => error.to_string(),
        Err(error) => error.to_string(),
    }
}
