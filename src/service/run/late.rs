//! Volumes that could not be opened when the service began: tried again and again, while the others are served.
//!
//! Their sockets are there with their owners and modes, and nobody listens on them: a VMM is told at once that the
//! connection is refused, which all of them take better than a socket that takes them and says nothing (QEMU would hold
//! up its whole machine). Their ublk disks are added, or taken over from a service that crashed, when the volume is there.

use super::{Error, Served, Shared, lock};
use crate::block::Causes;
use crate::engine::config::{PolicyConfig, VolumeConfig};
use crate::engine::{Opener, Volume};
use crate::frontend::ublk;
use crate::frontend::ublk::config::UblkConfig;
use crate::frontend::vhost_user::config::VhostUserConfig;
use crate::service::exports::Export;
use crate::service::exports::ublk::{Others, UblkExport, found};
use crate::service::exports::vhost_user::Endpoint;
use crate::service::status::{ExportStatus, UblkStatus, VhostUserStatus, VolumeStatus};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

/// The first pause between two attempts; each is twice as long as the one before it.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);

/// The longest one.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A volume that is not there yet.
pub(super) struct Waiting {
    status: VolumeStatus,
    exports: Vec<WaitingExport>,
    /// Dropped with this: that ends the attempts.
    _stop: Sender<()>,
}

/// One of its exports. `on`: the workers of its queues.
pub(super) enum WaitingExport {
    VhostUser {
        config: VhostUserConfig,
        queues: u16,
        endpoint: Endpoint,
        on: Vec<usize>,
    },
    Ublk {
        config: UblkConfig,
        on: Vec<usize>,
        /// All volumes that get ublk disks.
        beside: Vec<String>,
        /// Where the volume's store is, as the user wrote it.
        target: String,
    },
}

/// What tries it, before it begins.
pub(super) struct Attempts {
    name: String,
    opener: Opener,
    cause: String,
    stopped: Receiver<()>,
}

/// A volume whose first attempt failed, and what goes on with it.
pub(super) fn waiting(
    name: &str,
    config: &VolumeConfig,
    opener: Opener,
    cause: String,
) -> (Waiting, Attempts) {
    log::warn!("{cause}: it is tried again, and its exports wait");
    let status = configured(name, config, opener.policy());
    let status = VolumeStatus { unavailable: Some(cause.clone()), ..status };
    let (stop, stopped) = channel();
    let attempts = Attempts { name: name.into(), opener, cause, stopped };
    (Waiting { status, exports: Vec::new(), _stop: stop }, attempts)
}

impl Waiting {
    /// Has one more export.
    pub fn add(&mut self, export: WaitingExport) {
        self.exports.push(export);
    }

    pub fn volume_status(&self) -> VolumeStatus {
        self.status.clone()
    }

    pub fn export_status(&self) -> impl Iterator<Item = ExportStatus> {
        self.exports.iter().map(|export| match export {
            WaitingExport::VhostUser { config, queues, on, .. } => ExportStatus::VhostUser(VhostUserStatus {
                volume: config.volume.clone(),
                socket: config.socket.clone(),
                queues: *queues,
                queue_size: config.queue_size,
                connected: false,
                vmm_waiting: false,
                read_only: config.read_only || self.status.read_only,
                workers: config.workers.is_some().then_some(on.len()),
                waiting: true,
            }),
            WaitingExport::Ublk { config, on, .. } => ExportStatus::Ublk(UblkStatus {
                volume: config.volume.clone(),
                device: "".into(),
                link: ublk::link(&config.volume),
                queues: u16::try_from(on.len()).unwrap_or(u16::MAX),
                depth: config.depth,
                zero_copy: false,
                buffer_bytes: 0,
                buffers_locked: false,
                read_only: self.status.read_only,
                workers: config.workers.map(|workers| usize::from(workers).min(on.len())),
                waiting: true,
            }),
        })
    }

    /// Sends those away who cannot be kept from connecting.
    fn turn_away(&self) {
        for export in &self.exports {
            if let WaitingExport::VhostUser { endpoint, .. } = export {
                endpoint.turn_away();
            }
        }
    }

    /// Why it cannot be used.
    pub fn cause(&self) -> String {
        self.status.unavailable.clone().unwrap_or_default()
    }
}

impl Attempts {
    /// Files that the attempts will read: see [`Opener::unread`].
    pub fn unread(&self) -> Vec<&Path> {
        self.opener.unread()
    }

    /// Goes on until the volume is there with all its exports, or is not wanted any more.
    pub fn start(self, shared: &Arc<Shared>) -> Result<(), Error> {
        let shared = Arc::downgrade(shared);
        let spawned = thread::Builder::new().name("ringblk-wait".into()).spawn(move || self.run(&shared));
        spawned.map(drop).map_err(Error::Control)
    }

    fn run(mut self, shared: &Weak<Shared>) {
        let (mut pause, mut failures) = (SHORTEST_PAUSE, 1u64);
        loop {
            if self.stopped.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            let opened = shared.upgrade().map(|shared| shared.served(&self.name).is_some());
            let result = match opened {
                None => return,
                Some(true) => Ok(None),
                Some(false) => {
                    self.opener.open(Duration::MAX).map(Some).map_err(|error| Causes(&error).to_string())
                }
            };
            let Some(shared) = shared.upgrade() else { return };
            match result.and_then(|volume| shared.bring_up(&self.name, volume)) {
                Ok(()) => return,
                Err(cause) => {
                    failures += 1;
                    let seen = failures.is_power_of_two() || cause != self.cause;
                    let level = if seen { log::Level::Warn } else { log::Level::Debug };
                    log::log!(level, "attempt {failures}: {cause}");
                    if let Some(waiting) = lock(&shared.waiting).get_mut(&self.name) {
                        waiting.status.unavailable = Some(cause.clone());
                        waiting.turn_away();
                    }
                    self.cause = cause;
                }
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

impl Shared {
    /// Takes a volume into service that has come up (`None`: that has before), with its exports that wait.
    ///
    /// # Errors
    /// Why exports cannot be started yet. The others have been.
    fn bring_up(&self, name: &str, volume: Option<Volume>) -> Result<(), String> {
        // A stop waits for this, and nothing comes up after it.
        let Some(_arrival) = self.arrivals.begin() else { return Ok(()) };
        if let Some(volume) = volume {
            let Some(status) = lock(&self.waiting).get(name).map(Waiting::volume_status) else {
                return Ok(());
            };
            let served = Arc::new(Served::new(volume, status));
            lock(&self.volumes).insert(name.into(), served.clone());
            if let Some(tell) = &*lock(&self.growth) {
                served.volume.tell_growth(tell.clone());
            }
            if let Some(waiting) = lock(&self.waiting).get_mut(name) {
                waiting.status.unavailable = None;
            }
            log::info!("volume {name}: it is there");
        }
        let Some(served) = self.served(name) else { return Ok(()) };
        let count = lock(&self.waiting).get(name).map_or(0, |waiting| waiting.exports.len());
        let mut failures = Vec::new();
        for _ in 0..count {
            // Out of the list only while it is made: the list is not locked meanwhile, since that may take a time.
            let next = match lock(&self.waiting).get_mut(name) {
                Some(waiting) => waiting.exports.remove(0),
                // They are not wanted any more.
                None => return Ok(()),
            };
            match self.start_late(next, &served.volume) {
                Ok((place, export)) => {
                    log::info!("volume {name} is served {place}");
                    lock(&self.exports).push(export);
                }
                Err((cause, again)) => {
                    failures.push(cause);
                    if let Some(waiting) = lock(&self.waiting).get_mut(name) {
                        waiting.exports.push(*again);
                    }
                }
            }
        }
        if failures.is_empty() {
            lock(&self.waiting).remove(name);
            return Ok(());
        }
        Err(failures.join("; "))
    }

    /// Starts an export of a volume that is there. What it is, and where.
    ///
    /// # Errors
    /// Why it did not start, and what there is to be tried again.
    fn start_late(
        &self,
        export: WaitingExport,
        volume: &Arc<Volume>,
    ) -> Result<(String, Export), (String, Box<WaitingExport>)> {
        match export {
            WaitingExport::VhostUser { config, queues, endpoint, on } => {
                let socket = config.socket.display().to_string();
                match self.start_vhost_user(&config, queues, endpoint, &on, volume) {
                    Ok(export) => Ok((format!("on {socket}"), Export::VhostUser(export))),
                    Err((endpoint, source)) => {
                        let cause = Causes(&Error::VhostUser { socket, source }).to_string();
                        let again = WaitingExport::VhostUser { config, queues, endpoint, on };
                        Err((cause, Box::new(again)))
                    }
                }
            }
            WaitingExport::Ublk { config, on, beside, target } => {
                let volumes = beside.iter().map(String::as_str).collect();
                let found = found();
                let given_up = self.arrivals.closed();
                let others = Others { volumes, target: &target, found: &found, given_up };
                match UblkExport::start(&config, volume, &self.handles(&on), &others) {
                    Ok(export) => {
                        let link = export.status().link;
                        Ok((format!("at {}", link.display()), Export::Ublk(Box::new(export))))
                    }
                    Err(error) => {
                        let again = WaitingExport::Ublk { config, on, beside, target };
                        Err((Causes(&error).to_string(), Box::new(again)))
                    }
                }
            }
        }
    }
}

/// What the configuration says of a volume.
pub(super) fn configured(name: &str, config: &VolumeConfig, policy: &PolicyConfig) -> VolumeStatus {
    VolumeStatus {
        name: name.into(),
        driver: config.driver().into(),
        target: config.target(),
        size_bytes: 0,
        block_size: 0,
        read_only: config.summary().read_only,
        policy: policy.on_error.name().into(),
        paused: false,
        waiting: 0,
        unavailable: None,
        idle: false,
        limits: BTreeMap::new(),
        group: None,
        throttled_ms: 0,
    }
}
