//! One VMM's connection, from its first message to its last.

#![forbid(unsafe_code)]

use super::config;
use super::device::Device;
use super::memory::Memory;
use super::session_vring::{Host, SessionVring, Shared, Table};
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{Error as DaemonError, ShutdownHandle, VhostUserBackend, VhostUserDaemon};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

/// Why a session ended, other than by the VMM's leaving.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct SessionError(DaemonError);

impl From<DaemonError> for SessionError {
    fn from(error: DaemonError) -> SessionError {
        SessionError(error)
    }
}

/// Ends a session from outside.
pub type Hangup = ShutdownHandle;

/// The device as one VMM negotiates it.
pub struct Session {
    shared: Arc<Shared>,
    queues: u16,
    queue_size: u16,
    vrings: OnceLock<Vec<SessionVring>>,
}

impl Session {
    /// Serves the connection that waits on `listener`, until either side ends it. When it returns, every
    /// request of the VMM's is complete and nothing of its memory is in use.
    ///
    /// `connected` is given the way to end it.
    ///
    /// # Errors
    /// When the VMM broke the protocol.
    pub fn serve(
        listener: &UnixListener,
        device: &Arc<Device>,
        host: &Arc<dyn Host>,
        (queues, queue_size): (u16, u16),
        connected: impl FnOnce(Option<Hangup>),
    ) -> Result<(), SessionError> {
        let shared = Arc::new(Shared {
            device: device.clone(),
            host: host.clone(),
            features: AtomicU64::new(0),
            memory: Mutex::new(None),
        });
        let session =
            Arc::new(Session { shared: shared.clone(), queues, queue_size, vrings: OnceLock::new() });
        let table: Table = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let (daemon, vrings) = SessionVring::make_for(&shared, || {
            VhostUserDaemon::new("ringblk-session".into(), session.clone(), table)
        });
        let mut daemon = daemon?;
        let vrings = session.vrings.get_or_init(|| vrings);
        let result = listener
            .try_clone()
            .map_err(DaemonError::StartDaemon)
            .and_then(|listener| daemon.start(&mut Listener::from(listener)))
            .and_then(|()| {
                connected(daemon.shutdown_handle());
                daemon.wait()
            });
        for vring in vrings {
            vring.stop();
        }
        match result {
            Err(DaemonError::HandleRequest(
                vhost::vhost_user::Error::Disconnected | vhost::vhost_user::Error::PartialMessage,
            )) => Ok(()),
            other => Ok(other?),
        }
    }

    fn vrings(&self) -> &[SessionVring] {
        self.vrings.get().map_or(&[], Vec::as_slice)
    }
}

impl VhostUserBackend for Session {
    type Bitmap = ();
    type Vring = SessionVring;

    fn num_queues(&self) -> usize {
        self.queues.into()
    }

    fn max_queue_size(&self) -> usize {
        self.queue_size.into()
    }

    fn features(&self) -> u64 {
        config::features(self.shared.device.geometry()) | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
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
    }

    fn set_event_idx(&self, _: bool) {
        // Each vring is told.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let device = &self.shared.device;
        let space = config::space(device.geometry(), self.queues, self.queue_size, device.writeback());
        let wanted = offset as usize..(offset as usize).saturating_add(size as usize);
        // An empty answer is the protocol's way to say that there is no such place.
        space.get(wanted).map(<[u8]>::to_vec).unwrap_or_default()
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        match bytes {
            [on @ (0 | 1)] if offset == config::WRITEBACK => {
                self.shared.device.set_writeback(*on == 1);
                if *on == 0 {
                    // From the next write on each is durable; what the cache holds of earlier ones is not
                    // until it is flushed.
                    self.shared.host.flush()?;
                }
            }
            _ => {
                let len = bytes.len();
                log::warn!(
                    "{}: {len} bytes at {offset} of its configuration are not to be written",
                    self.shared.device.name()
                );
            }
        }
        Ok(())
    }

    fn update_memory(&self, table: Table) -> io::Result<()> {
        // The old table's mappings live until the last vring that uses them has drained.
        let memory = Memory::new(table.memory().into_inner()).map_err(|error| {
            log::error!("{}: {error}", self.shared.device.name());
            io::Error::new(io::ErrorKind::InvalidInput, error)
        })?;
        for vring in self.vrings() {
            vring.stop();
        }
        *self.shared.memory.lock().unwrap_or_else(PoisonError::into_inner) = Some(memory);
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
            vring.stop();
        }
        Ok(())
    }

    fn handle_event(&self, _: u16, _: EventSet, _: &[SessionVring], _: usize) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
