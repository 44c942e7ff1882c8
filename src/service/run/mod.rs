//! A service's life: everything is checked and opened before anything is made, and what was made is taken
//! away again, in the opposite order.

mod arrivals;
mod disks;
mod grow;
mod late;
mod life;
mod shut_down;
mod limits;
mod managed;
mod open;
mod resize;
mod signals;

use super::config::{Config, ConfigError, DEFAULT_CONTROL};
use super::exports::vhost_user::{Endpoint, VhostUserExport, passed_sockets};
use super::exports::{Export, Placement, ShutdownMode};
use super::monitor::{Monitor, MonitorError};
use super::namespace;
use super::sandbox;
use super::socket::{Access, SocketError, SocketFile};
use super::status::{SandboxStatus, VolumeStatus};
use crate::block::{Causes, Errno};
use crate::engine::config::Need;
use crate::engine::{OpenError, Volume};
use crate::frontend::ublk::prepare_directories;
use crate::frontend::vhost_user::budget::MemoryBudget;
use crate::frontend::vhost_user::config::VhostUserConfig;
use crate::ring;
use crate::stats::{Clock, WorkerStats};
use crate::worker::{ExportVolume, Worker, WorkerConfig, WorkerHandle};
use arrivals::Arrivals;
use late::{Waiting, WaitingExport};
use nix::unistd::Uid;
use open::Opened;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signals::Signals;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, oneshot};

/// Why a service did not start, or did not end as it should.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// See [`ConfigError`].
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A volume that the service does not begin without, whatever is the matter with it.
    #[error("{} (required=no on {} has the service begin without it, and try it again)", Causes(.0), .0.whose())]
    Volume(OpenError),
    /// See [`sandbox::Error`].
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    /// See [`SocketError`].
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A ublk export.
    #[error(transparent)]
    Ublk(#[from] super::exports::ublk::Error),
    /// A worker could not be made.
    #[error("worker {number} of {workers} cannot be started")]
    Worker {
        /// Counted from 1.
        number: usize,
        /// How many there are to be.
        workers: usize,
        /// The kernel's answer.
        source: io::Error,
    },
    /// What starts the exports.
    #[error("no thread can be had that starts the exports")]
    Thread(#[source] io::Error),
    /// A vhost-user export.
    #[error("vhost-user export on {socket} cannot be started")]
    VhostUser {
        /// Where.
        socket: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The control API.
    #[error("the control API cannot be served")]
    Control(#[source] io::Error),
    /// The control socket where nobody said where it is to be.
    #[error("only root may make the control socket there: give --control SOCKET, in a directory of your own")]
    NotRoot(#[source] SocketError),
    /// A clean stop that was given up.
    #[error("abandoned with requests in flight: {0}")]
    Abandoned(String),
    /// The read-only address.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// Writes that were acknowledged but not flushed may be lost.
    #[error("volume {name} could not be flushed")]
    Flush {
        /// Of the volume.
        name: String,
        /// The store's answer.
        source: Errno,
    },
}

/// Serves `config` until told to stop: by SIGTERM, SIGINT or the control API. Further requests change nothing, but for a
/// second signal after a moment: it gives up on what is in flight.
///
/// # Errors
/// When it cannot be served whole, in which case nothing is left behind; or when it could not be stopped
/// cleanly.
pub fn run(config: Config) -> Result<(), Error> {
    raise_open_files();
    // Before the sandbox: it reads what may not be read later.
    Clock::get();
    let runtime = ring::runtime().map_err(Error::Control)?;
    // Signals first: from here on one asks for a clean end, whatever is being made.
    let mut signals = runtime.block_on(async { Signals::new() }).map_err(Error::Control)?;
    let config = Arc::new(config);
    if !config.ublk.is_empty() || config.allow_ublk {
        namespace::leave_mounts();
        // Before anything large is mapped.
        if let Err(error) = ring::lock_process() {
            log::warn!(
                "the service is not locked in memory, so where memory is short it may wait for its own disks: {error}"
            );
        }
    }
    let Some(opened) = life::open(&config, &runtime, &mut signals)? else {
        log::info!("stopped before anything was served");
        return Ok(());
    };
    let service = Service::start(config, opened)?;
    let result = runtime.block_on(service.until_stopped(signals));
    // Its end would wait for what the control API has others do: a change of size that its store does not answer.
    #[expect(clippy::mem_forget, reason = "the process is about to end")]
    std::mem::forget(runtime);
    result
}

/// Each export and each of its queues takes descriptors, and so do the regions of its VMM's memory: as many as we may have.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
    {
        log::warn!("the limit on open files (ulimit -n) stays at {:?}: {error}", limit.current);
    }
}

/// A running service.
struct Service {
    control: SocketFile,
    monitor: Option<Monitor>,
    shared: Arc<Shared>,
    /// Hears when every export is there that can be.
    begun: oneshot::Receiver<Result<(), Error>>,
}

/// What the control API and the end of the service look at.
struct Shared {
    /// In the order in which they were made.
    exports: Mutex<Vec<Export>>,
    /// The exports that are being stopped.
    leaving: Mutex<Vec<String>>,
    /// Volumes whose disks somebody is known to use: they stay.
    keep: Mutex<BTreeSet<String>>,
    /// What there is to be.
    desired: Mutex<Arc<Config>>,
    /// Held by whoever changes that, until it is so.
    changing: Mutex<()>,
    /// Volumes that are there.
    volumes: Mutex<BTreeMap<String, Arc<Served>>>,
    /// Volumes that are not there yet, or not with all their exports.
    waiting: Mutex<BTreeMap<String, Waiting>>,
    /// What comes up just now, and whether anything may.
    arrivals: Arc<Arrivals>,
    /// Hears the names of volumes that grow by themselves.
    growth: Mutex<Option<Sender<String>>>,
    workers: Mutex<Vec<Worker>>,
    /// Ways to them.
    handles: Vec<WorkerHandle>,
    worker_stats: Vec<Arc<WorkerStats>>,
    /// The last flushes are under way.
    flushing: AtomicBool,
    placement: Mutex<Placement>,
    memory: Arc<MemoryBudget>,
    sandbox: SandboxStatus,
    stopping: AtomicBool,
    /// The stop that was asked for first, if one was.
    farewell: Mutex<Option<ShutdownMode>>,
    stop: Notify,
}

/// Exports on sockets that may be added to a service and have memory for their VMMs set aside.
const MOST_ADDED: usize = 256;

/// A volume that is there.
struct Served {
    volume: Arc<Volume>,
    /// The same for flushes of our own.
    export: ExportVolume,
    /// As it was opened.
    status: VolumeStatus,
    /// How often its size has changed.
    resizes: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Service {
    /// Takes every socket, then starts the workers, and begins to start the exports. An error on the way takes away what
    /// was made.
    fn start(config: Arc<Config>, opened: Opened) -> Result<Service, Error> {
        let Opened { volumes, waiting, attempts } = opened;
        let mut passed = passed_sockets();
        let control = SocketFile::bind(&config.control, Access::PRIVATE).map_err(|error| match error {
            SocketError::System { .. }
                if config.control == Path::new(DEFAULT_CONTROL) && !Uid::effective().is_root() =>
            {
                Error::NotRoot(error)
            }
            other => other.into(),
        })?;
        let monitor = config.metrics.as_ref().map(Monitor::bind).transpose()?;
        let mut endpoints = Vec::new();
        for export in &config.vhost_user {
            endpoints.push(Endpoint::open(export, &mut passed)?);
        }
        for unused in passed {
            log::warn!("a socket passed by systemd is no export's: {:?}", unused.local_addr());
        }

        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let placement = Placement::of(
            &config,
            |name| match volumes.get(name) {
                Some(volume) => volume.capabilities().single_worker,
                // Whether its server keeps several connections coherent is not known yet.
                None => config.needs(name).any(|need| matches!(need, Need::Server(_))),
            },
            cpus,
        );
        let worker_config = |number| WorkerConfig {
            busy_poll: Duration::from_micros(config.poll_us.into()),
            slow_after: Duration::from_secs(config.slow_after),
            shared: placement.is_shared(number),
        };
        if !config.ublk.is_empty() || config.allow_ublk {
            prepare_directories();
        }
        let exports = config.vhost_user.len();
        let memory =
            MemoryBudget::of_process(if config.may_grow() { exports.max(MOST_ADDED) } else { exports });
        // From here on we are no longer alone: what is given up, is given up by all.
        let unread = attempts.iter().flat_map(|each| each.unread());
        let plan = sandbox::Plan::of(&config).waiting_for(&config, waiting.keys()).reading(unread);
        let sandbox = sandbox::enter(&plan)?;
        let mut workers = Vec::new();
        for number in 0..placement.workers() {
            let worker = Worker::start(number, worker_config(number));
            let failed = |source| Error::Worker { number: number + 1, workers: placement.workers(), source };
            workers.push(worker.map_err(failed)?);
        }
        let shared = Shared {
            exports: Mutex::default(),
            leaving: Mutex::default(),
            keep: Mutex::default(),
            desired: Mutex::new(config.clone()),
            changing: Mutex::default(),
            volumes: Mutex::new(
                volumes
                    .into_iter()
                    .map(|(name, volume)| {
                        let status = late::configured(&name, &config.volumes[&name], &config.policies[&name]);
                        (name, Arc::new(Served::new(volume, status)))
                    })
                    .collect(),
            ),
            waiting: Mutex::new(waiting),
            arrivals: Arc::default(),
            growth: Mutex::default(),
            handles: workers.iter().map(|worker| worker.handle().clone()).collect(),
            worker_stats: workers.iter().map(|worker| worker.stats().clone()).collect(),
            flushing: AtomicBool::new(false),
            workers: Mutex::new(workers),
            placement: Mutex::new(placement),
            memory,
            sandbox,
            stopping: AtomicBool::new(false),
            farewell: Mutex::default(),
            stop: Notify::new(),
        };
        let shared = Arc::new(shared);
        let begun = life::begin(&shared, config, endpoints, attempts)?;
        Ok(Service { control, monitor, shared, begun })
    }
}

impl Shared {
    /// Starts every export, in the order of the configuration: sockets, then disks, whose start makes the
    /// kernel read them.
    fn add_exports(&self, config: &Config, endpoints: Vec<Endpoint>) -> Result<(), Error> {
        let (vhost_user, ublk) = {
            let placement = lock(&self.placement);
            (placement.vhost_user.clone(), placement.ublk.clone())
        };
        for ((export, endpoint), (queues, on)) in config.vhost_user.iter().zip(endpoints).zip(vhost_user) {
            let Some(served) = self.served(&export.volume) else {
                let config = export.clone();
                self.waits(&export.volume, WaitingExport::VhostUser { config, queues, endpoint, on });
                continue;
            };
            let started = self.start_vhost_user(export, queues, endpoint, &on, &served.volume);
            let socket = || export.socket.display().to_string();
            let started = started.map_err(|(_, source)| Error::VhostUser { socket: socket(), source })?;
            lock(&self.exports).push(Export::VhostUser(started));
            log::info!("volume {} is served on {}", export.volume, export.socket.display());
        }
        let mut disks = Vec::new();
        for (export, on) in config.ublk.iter().zip(ublk) {
            match self.served(&export.volume) {
                Some(served) => disks.push((export, served.volume.clone(), self.handles(&on))),
                None => {
                    let beside = config.ublk.iter().map(|export| export.volume.clone()).collect();
                    let target = config.store_of(&export.volume);
                    let config = export.clone();
                    self.waits(&export.volume, WaitingExport::Ublk { config, on, beside, target });
                }
            }
        }
        self.add_disks(config, &disks)
    }

    /// Has VMMs connect to a volume that is there. `on`: the workers of its queues.
    fn start_vhost_user(
        &self,
        config: &VhostUserConfig,
        queues: u16,
        endpoint: Endpoint,
        on: &[usize],
        volume: &Arc<Volume>,
    ) -> Result<VhostUserExport, (Endpoint, io::Error)> {
        VhostUserExport::start(config, queues, endpoint, volume, self.handles(on), self.memory.share())
    }

    /// From now on volumes whose stores grow by themselves grow with them.
    fn follow_growth(self: &Arc<Self>) {
        let (tell, told) = channel();
        self.all_served().iter().for_each(|served| served.volume.tell_growth(tell.clone()));
        if !lock(&self.waiting).is_empty() || lock(&self.desired).may_grow() {
            *lock(&self.growth) = Some(tell);
        }
        let shared = Arc::downgrade(self);
        let follow = move || resize::follow_growth(&shared, &told);
        if let Err(error) = thread::Builder::new().name("ringblk-growth".into()).spawn(follow) {
            log::warn!("new sizes of NBD exports need a refresh: no thread to follow them: {error}");
        }
    }

    /// The volume of this name, where it is there.
    fn served(&self, name: &str) -> Option<Arc<Served>> {
        lock(&self.volumes).get(name).cloned()
    }

    /// Every volume that is there.
    fn all_served(&self) -> Vec<Arc<Served>> {
        lock(&self.volumes).values().cloned().collect()
    }

    /// An export is to be started with its volume.
    fn waits(&self, volume: &str, export: WaitingExport) {
        if let Some(waiting) = lock(&self.waiting).get_mut(volume) {
            waiting.add(export);
        }
    }

    /// Ways to these workers.
    fn handles(&self, on: &[usize]) -> Vec<WorkerHandle> {
        on.iter().filter_map(|number| self.handles.get(*number)).cloned().collect()
    }

    /// Ways to the workers that may have requests to a volume, and to no others: those may be held up by theirs.
    fn handles_of(&self, volume: &Volume) -> Vec<WorkerHandle> {
        let serving = lock(&self.placement).serving(volume.name()).collect::<Vec<_>>();
        self.handles(&serving)
    }

    /// Ends every export, flushes every volume, ends the workers.
    fn take_down(&self, how: ShutdownMode) -> Result<(), Error> {
        // What comes up just now may give up, and the sockets go of what has not begun to.
        self.arrivals.close();
        drop(std::mem::take(&mut *lock(&self.waiting)));
        let deadline = Instant::now() + STOP_LIMIT;
        let mut left = self.leave_all(how);
        // The others do not wait for it, but nothing is left behind half made. What has come up all the same goes too.
        if !self.arrivals.settle(deadline) {
            left.abandoned.push("an export is still being started".into());
        }
        left.add(self.leave_all(how));
        let mut result = Ok(());
        let deadline = deadline.max(Instant::now() + FLUSH_LEAST);
        let written = |of: &Volume| !of.geometry().read_only && of.geometry().volatile_cache;
        let all = self.all_served();
        let flushes =
            all.iter().map(|served| &served.export).filter(|export| written(&export.volume)).filter_map(
                |export| {
                    // Where a single connection has the writes, it alone can vouch for them.
                    let handle = self.handles_of(&export.volume).into_iter().next()?;
                    Some((export.volume.name(), handle.flush(export.clone(), STORE_LIMIT)))
                },
            );
        self.flushing.store(true, Ordering::Relaxed);
        // All at once: one that hangs takes no time from the others.
        for (name, answer) in flushes.collect::<Vec<_>>() {
            // A flush without an answer is a flush that failed: what was acknowledged may not be on stable storage.
            let answer = answer.recv_timeout(deadline.saturating_duration_since(Instant::now()));
            if let Err(source) = answer.unwrap_or(Err(Errno::ETIMEDOUT)) {
                log::error!("volume {name}: flush: {source}");
                result = Err(Error::Flush { name: name.into(), source });
            }
        }
        if result.is_ok() && left.abandoned.is_empty() {
            all.iter().for_each(|served| served.export.volume.close());
        }
        self.flushing.store(false, Ordering::Relaxed);
        if !left.abandoned.is_empty() {
            return Err(Error::Abandoned(left.abandoned.join("; ")));
        }
        let mut workers = lock(&self.workers);
        match how {
            ShutdownMode::Stop | ShutdownMode::Force if !left.kept => workers.clear(),
            // Where the kernel cannot give the fetches of a disk back, they end with the process, and a worker that
            // is told to end would wait for them.
            _ => workers.drain(..).for_each(std::mem::forget),
        }
        drop(workers);
        result
    }

    /// What a stop waits for that could be given up: requests, or the last flushes. `None` where it is only a matter of
    /// time. Waits a moment for the workers, one that does not answer being in a call that a store holds up.
    fn in_flight(&self) -> Option<String> {
        if self.flushing.load(Ordering::Relaxed) {
            return Some("the last flush".into());
        }
        // Taken out in a statement of its own: no lock is held while we wait.
        let leaving = lock(&self.leaving).clone();
        let waiting = lock(&self.exports).iter().map(|export| export.status().name()).collect::<Vec<_>>();
        let names = leaving.into_iter().chain(waiting).collect::<Vec<_>>();
        if names.is_empty() {
            let settled = self.arrivals.settle(Instant::now());
            return (!settled).then(|| "an export that is still being started".into());
        }
        let answers: Vec<_> = self.handles.iter().map(WorkerHandle::in_flight).collect();
        let deadline = Instant::now() + BUSY_LIMIT;
        let busy = answers.into_iter().map(|answer| {
            answer.recv_timeout(deadline.saturating_duration_since(Instant::now())).unwrap_or(1)
        });
        (busy.sum::<usize>() > 0).then(|| names.join(", "))
    }
}

/// For a worker to say how many requests it has.
const BUSY_LIMIT: Duration = Duration::from_secs(1);

/// The exports' stops and the last flushes take no longer than this together; what does is reported and left.
const STOP_LIMIT: Duration = Duration::from_secs(120);

/// What an export has in any case, for what does not depend on its store.
const STOP_LEAST: Duration = Duration::from_secs(5);

/// How long the last flush of a volume may wait for its store to come back.
const STORE_LIMIT: Duration = Duration::from_secs(5);

/// What the last flushes have in any case. With this, and what a worker may take to end, a stop that a store holds up is
/// over before systemd loses patience (`TimeoutStopSec` in `systemd/`).
const FLUSH_LEAST: Duration = Duration::from_secs(15);
