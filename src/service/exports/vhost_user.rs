//! A volume on a vhost-user socket: VMMs come and go, one at a time, and the export stays.

use super::Abandoned;
use crate::engine::Volume;
use crate::frontend::vhost_user::options::VhostUserConfig;
use crate::frontend::vhost_user::{CallFd, Device, Hangup, Host, Running, Session, VringSetup};
use crate::service::socket::{Access, SocketError, SocketFile};
use crate::service::status::VhostUserStatus;
use crate::worker::{Link, VringId};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// A VMM that breaks the protocol is not served again for this long, so that one that does nothing else
/// costs little.
const BACK_OFF: Duration = Duration::from_millis(100);

/// A drain that takes longer is told of, and again after as long.
const SLOW: Duration = Duration::from_secs(5);

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
        SocketFile::bind(&config.socket, access).map(Endpoint::Ours)
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
    ended: Receiver<()>,
}

/// What the export and its thread share.
struct Shared {
    stopping: AtomicBool,
    connected: AtomicBool,
    /// Readable once the export is to stop.
    stop: EventFd,
    hangup: Mutex<Option<Hangup>>,
}

impl VhostUserExport {
    /// Serves `volume` on `endpoint`, its queues on `links` in turn.
    ///
    /// # Errors
    /// When there are no descriptors or threads left.
    pub fn start(
        config: &VhostUserConfig,
        queues: u16,
        endpoint: Endpoint,
        volume: &Arc<Volume>,
        links: Vec<Link>,
    ) -> io::Result<VhostUserExport> {
        let status = VhostUserStatus {
            volume: config.volume.clone(),
            socket: config.socket.clone(),
            queues,
            queue_size: config.queue_size,
            connected: false,
            read_only: config.read_only || volume.geometry().read_only,
        };
        let shared = Arc::new(Shared {
            stopping: AtomicBool::new(false),
            connected: AtomicBool::new(false),
            stop: EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?,
            hangup: Mutex::new(None),
        });
        let socket = config.socket.display().to_string();
        let device =
            Arc::new(Device::new(volume.name(), &socket, volume.geometry().clone(), config.read_only));
        let door = Door {
            listener: endpoint.listener()?,
            device,
            host: Arc::new(Workers { links, volume: volume.clone() }),
            shape: (queues, config.queue_size),
            shared: shared.clone(),
        };
        let (end, ended) = channel();
        thread::Builder::new().name("ringblk-vhost".into()).spawn(move || {
            door.keep();
            let _ = end.send(());
        })?;
        Ok(VhostUserExport { status, _endpoint: endpoint, shared, ended })
    }

    /// As it is now.
    pub fn status(&self) -> VhostUserStatus {
        VhostUserStatus { connected: self.shared.connected.load(Ordering::Relaxed), ..self.status.clone() }
    }

    /// Lets the VMM go, when its requests are complete.
    ///
    /// # Errors
    /// When they are not by `deadline`.
    pub fn stop(&mut self, deadline: Instant) -> Result<(), Abandoned> {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let _ = self.shared.stop.write(1);
        if let Some(hangup) = &*self.shared.hangup() {
            hangup.shutdown();
        }
        let left = deadline.saturating_duration_since(Instant::now());
        match self.ended.recv_timeout(left) {
            Err(RecvTimeoutError::Timeout) => {
                Err(Abandoned("requests of its VMM are still in flight".into()))
            }
            _ => Ok(()),
        }
    }
}

impl Shared {
    fn hangup(&self) -> MutexGuard<'_, Option<Hangup>> {
        self.hangup.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps until `fd` is readable, the time is over or the export is to stop. False in the last case.
    fn wait(&self, fd: Option<&UnixListener>, time: PollTimeout) -> io::Result<bool> {
        let mut fds = vec![PollFd::new(self.stop.as_fd(), PollFlags::POLLIN)];
        fds.extend(fd.map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
        loop {
            match poll(&mut fds, time) {
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
                Ok(_) => return Ok(!self.stopping.load(Ordering::SeqCst)),
            }
        }
    }
}

/// The export's thread.
struct Door {
    listener: UnixListener,
    device: Arc<Device>,
    host: Arc<dyn Host>,
    shape: (u16, u16),
    shared: Arc<Shared>,
}

impl Door {
    /// One session after the other. The next VMM waits in the listen queue until the last one's requests are
    /// complete: two never share the volume through one door.
    fn keep(&self) {
        loop {
            match self.shared.wait(Some(&self.listener), PollTimeout::NONE) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => return log::error!("{}: cannot wait for a VMM: {error}", self.device.name()),
            }
            log::info!("{}: a VMM connects", self.device.name());
            let result = Session::serve(&self.listener, &self.device, &self.host, self.shape, |hangup| {
                self.shared.connected.store(true, Ordering::Relaxed);
                *self.shared.hangup() = hangup;
                // The stop may have come before there was anything to hang up.
                if self.shared.stopping.load(Ordering::SeqCst)
                    && let Some(hangup) = &*self.shared.hangup()
                {
                    hangup.shutdown();
                }
            });
            *self.shared.hangup() = None;
            self.shared.connected.store(false, Ordering::Relaxed);
            match result {
                Ok(()) => log::info!("{}: the VMM is gone", self.device.name()),
                Err(error) => {
                    log::warn!("{}: the VMM is dropped: {error}", self.device.name());
                    let time = PollTimeout::try_from(BACK_OFF).unwrap_or(PollTimeout::ZERO);
                    if !matches!(self.shared.wait(None, time), Ok(true)) {
                        return;
                    }
                }
            }
        }
    }
}

/// The workers as a session sees them: each queue has its own.
struct Workers {
    links: Vec<Link>,
    volume: Arc<Volume>,
}

impl Host for Workers {
    fn start(&self, setup: VringSetup) -> io::Result<Box<dyn Running>> {
        let link = self.links[setup.index % self.links.len()].clone();
        let name = format!("{}: vring {}", setup.device.name(), setup.index);
        let id = link.start_vring(setup, self.volume.clone())?;
        Ok(Box::new(OnWorker { link, id, name }))
    }

    fn flush(&self) -> io::Result<()> {
        let answer = self.links[0].flush(self.volume.clone()).recv();
        answer.map_err(io::Error::other)?.map_err(io::Error::from)
    }
}

/// A vring on its worker.
struct OnWorker {
    link: Link,
    id: VringId,
    name: String,
}

impl Running for OnWorker {
    fn stop(self: Box<Self>) -> u16 {
        let answer = self.link.stop_vring(self.id);
        loop {
            match answer.recv_timeout(SLOW) {
                // Answering before the kernel is done with the guest's memory would let the VMM use it for
                // something else, so there is no other way out of here.
                Err(RecvTimeoutError::Timeout) => {
                    log::warn!("{}: still waiting for its requests in flight", self.name);
                }
                Ok(Some(next)) => return next,
                // The worker is gone, with all that it had in flight: the process ends.
                Ok(None) | Err(RecvTimeoutError::Disconnected) => return 0,
            }
        }
    }

    fn enable(&self, enabled: bool) {
        if let Err(error) = self.link.enable_vring(self.id, enabled) {
            log::error!("{}: {error}", self.name);
        }
    }

    fn set_call(&self, call: Option<CallFd>) {
        if let Err(error) = self.link.call_vring(self.id, call) {
            log::error!("{}: {error}", self.name);
        }
    }
}

/// The Unix sockets that systemd passed (`sd_listen_fds(3)`).
pub fn passed_sockets() -> Vec<UnixListener> {
    let mut passed = listenfd::ListenFd::from_env();
    (0..passed.len()).filter_map(|index| passed.take_unix_listener(index).ok().flatten()).collect()
}
