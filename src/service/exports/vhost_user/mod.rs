//! A volume on a vhost-user socket: VMMs come and go, one at a time, and the export stays.

mod listener;
mod workers;

use super::Abandoned;
use crate::engine::Volume;
use crate::frontend::vhost_user::Device;
use crate::frontend::vhost_user::budget::MemoryShare;
use crate::frontend::vhost_user::config::VhostUserConfig;
use crate::frontend::vhost_user::protocol::{BackendChannel, NotifyResult, Shape};
use crate::service::socket::{Access, SocketError, SocketFile};
use crate::service::status::VhostUserStatus;
use crate::stats::ExportStats;
use crate::worker::{ExportVolume, WorkerHandle};
use listener::Listener;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::cell::RefCell;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Instant;
use workers::Workers;

/// Where VMMs connect.
pub enum Endpoint {
    /// A socket we made, and remove.
    Ours(SocketFile),
    /// One that systemd made, and keeps.
    Passed(UnixListener),
}

impl Endpoint {
    /// Takes the socket that systemd passed for the configured path, or makes one.
    ///
    /// One that we make does not listen before it is told to.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn open(config: &VhostUserConfig, passed: &mut Vec<UnixListener>) -> Result<Endpoint, SocketError> {
        let ours = |listener: &UnixListener| {
            listener.local_addr().is_ok_and(|address| address.as_pathname() == Some(&config.socket))
        };
        if let Some(index) = passed.iter().position(ours) {
            return Ok(Endpoint::Passed(passed.swap_remove(index)));
        }
        // The configuration was checked: the owner is known.
        let (user, group) = config.owner_ids().unwrap_or((None, None));
        let access = Access { mode: config.mode, user, group };
        SocketFile::reserve(&config.socket, access).map(Endpoint::Ours)
    }

    /// From now on VMMs can connect.
    fn listen(&self) -> io::Result<()> {
        match self {
            Endpoint::Ours(socket) => socket.listen(),
            Endpoint::Passed(_) => Ok(()),
        }
    }

    /// Turns away who connects to a socket that systemd keeps listening, while its volume is not there: a VMM waits for
    /// what nobody says, and its machine with it.
    pub fn turn_away(&self) {
        if let Endpoint::Passed(listener) = self
            && listener.set_nonblocking(true).is_ok()
        {
            while listener.accept().is_ok() {}
        }
    }

    fn listener(&self) -> io::Result<UnixListener> {
        match self {
            Endpoint::Ours(socket) => socket.listener(),
            Endpoint::Passed(listener) => listener.try_clone(),
        }
    }
}

/// A running export.
pub struct VhostUserExport {
    status: VhostUserStatus,
    /// Removed with the export.
    _endpoint: Endpoint,
    shared: Arc<Shared>,
    stats: Arc<ExportStats>,
    ended: Receiver<()>,
}

/// What the export and its thread share.
struct Shared {
    stopping: AtomicBool,
    connected: AtomicBool,
    /// Another VMM waits for that one to go.
    waiting: AtomicBool,
    /// Readable once the export is to stop.
    stop: EventFd,
    channel: BackendChannel,
}

impl VhostUserExport {
    /// Serves `volume` on `endpoint`, its queues on `handles` in turn from the first on. Its VMMs' memory comes out of
    /// `memory`. From then on VMMs can connect.
    ///
    /// # Errors
    /// When there are no descriptors or threads left, or the socket does not [listen](SocketFile::listen). The endpoint
    /// comes back, since there may be no way to make its socket again, and takes no more VMMs than before.
    pub fn start(
        config: &VhostUserConfig,
        queues: u16,
        endpoint: Endpoint,
        volume: &Arc<Volume>,
        handles: Vec<WorkerHandle>,
        memory: Arc<MemoryShare>,
    ) -> Result<VhostUserExport, (Endpoint, io::Error)> {
        let status = VhostUserStatus {
            volume: config.volume.clone(),
            socket: config.socket.clone(),
            queues,
            queue_size: config.queue_size,
            connected: false,
            vmm_waiting: false,
            read_only: config.read_only || volume.geometry().read_only,
            workers: config.workers.is_some().then_some(handles.len()),
            waiting: false,
        };
        let export = ExportVolume::new(volume.clone(), queues);
        let stats = export.stats.clone();
        match begin(config, queues, &endpoint, export, handles, memory) {
            Ok((shared, ended)) => Ok(VhostUserExport { status, _endpoint: endpoint, shared, stats, ended }),
            Err(error) => Err((endpoint, error)),
        }
    }

    /// As it is now.
    pub fn status(&self) -> VhostUserStatus {
        let read = |flag: &AtomicBool| flag.load(Ordering::Relaxed);
        let (connected, vmm_waiting) = (read(&self.shared.connected), read(&self.shared.waiting));
        VhostUserStatus { connected, vmm_waiting, ..self.status.clone() }
    }

    /// What is counted of it.
    pub fn stats(&self) -> &ExportStats {
        &self.stats
    }

    /// Tells the VMM, if there is one, that the volume's size has changed: it reads the new one itself.
    pub fn resize(&self) {
        let name = self.status.socket.display();
        match self.shared.channel.config_changed() {
            NotifyResult::Sent => log::info!("vhost-user:{name}: the VMM is told of the new size"),
            NotifyResult::NoChannel if self.shared.connected.load(Ordering::Relaxed) => log::warn!(
                "vhost-user:{name}: the VMM cannot be told of the new size: it sees it when it reads the configuration again"
            ),
            NotifyResult::NoChannel => {}
            NotifyResult::Failed(error) => {
                log::warn!("vhost-user:{name}: the VMM cannot be told of the new size: {error}");
            }
        }
    }

    /// Lets the VMM go, when its requests are complete.
    ///
    /// # Errors
    /// When they are not by `deadline`.
    pub fn stop(&mut self, deadline: Instant) -> Result<(), Abandoned> {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let _ = self.shared.stop.write(1);
        let left = deadline.saturating_duration_since(Instant::now());
        match self.ended.recv_timeout(left) {
            Err(RecvTimeoutError::Timeout) => {
                Err(Abandoned("requests of its VMM are still in flight".into()))
            }
            _ => Ok(()),
        }
    }
}

/// Starts the thread that lets VMMs in, and has them come. What it shares with us, and its end.
fn begin(
    config: &VhostUserConfig,
    queues: u16,
    endpoint: &Endpoint,
    export: ExportVolume,
    handles: Vec<WorkerHandle>,
    memory: Arc<MemoryShare>,
) -> io::Result<(Arc<Shared>, Receiver<()>)> {
    let shared = Arc::new(Shared {
        stopping: AtomicBool::new(false),
        connected: AtomicBool::new(false),
        waiting: AtomicBool::new(false),
        stop: EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?,
        channel: BackendChannel::default(),
    });
    let socket = config.socket.display().to_string();
    let device =
        Arc::new(Device::new(&config.serial(), &socket, export.volume.geometry().clone(), config.read_only));
    let listener = endpoint.listener()?;
    // A connection may be gone again before it is accepted.
    listener.set_nonblocking(true)?;
    let listener = Listener {
        listener,
        device,
        host: Arc::new(Workers::new(handles, export)),
        shape: Shape { queues, queue_size: config.queue_size },
        memory,
        shared: shared.clone(),
        next: RefCell::new(None),
    };
    let ((end, ended), (go, listening)) = (channel(), channel());
    thread::Builder::new().name("ringblk-vhost".into()).spawn(move || {
        if listening.recv().is_ok() {
            listener.keep();
        }
        let _ = end.send(());
    })?;
    // Last of all: a VMM that has connected waits for us, and its whole machine with it.
    endpoint.listen()?;
    let _ = go.send(());
    Ok((shared, ended))
}

/// The Unix sockets that systemd passed (`sd_listen_fds(3)`).
pub fn passed_sockets() -> Vec<UnixListener> {
    let mut passed = listenfd::ListenFd::from_env();
    (0..passed.len()).filter_map(|index| passed.take_unix_listener(index).ok().flatten()).collect()
}
