//! A service's life: everything is checked and opened before anything is made, and what was made is taken
//! away again, in the opposite order.

mod managed;
mod resize;
mod signals;

use super::config::{Config, ConfigError, DEFAULT_CONTROL};
use super::control;
use super::exports::ublk::UblkExport;
use super::exports::vhost_user::{Endpoint, VhostUserExport, passed_sockets};
use super::exports::{Export, Farewell, Placement};
use super::sandbox;
use super::socket::{Access, SocketError, SocketFile};
use super::status::{SandboxStatus, VolumeStatus};
use crate::block::Errno;
use crate::engine::{OpenError, Volume};
use crate::frontend::ublk::StableName;
use crate::frontend::vhost_user::budget::MemoryBudget;
use crate::ring;
use crate::worker::{Habits, Lent, Link, Worker};
use nix::unistd::Uid;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signals::Signals;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
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
    /// See [`OpenError`].
    #[error(transparent)]
    Volume(#[from] OpenError),
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
    #[error("worker {number} cannot be started")]
    Worker {
        /// Counted from 0.
        number: usize,
        /// The kernel's answer.
        source: io::Error,
    },
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
    let runtime = ring::runtime().map_err(Error::Control)?;
    // Signals first: from here on one asks for a clean end, whatever is being made.
    let signals = runtime.block_on(async { Signals::new() }).map_err(Error::Control)?;
    let service = Service::start(&config)?;
    let result = runtime.block_on(service.until_stopped(signals));
    // Its end would wait for what the control API has others do: a change of size that its store does not answer.
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
    shared: Arc<Shared>,
}

/// What the control API and the end of the service look at.
struct Shared {
    /// In the order in which they were made.
    exports: Mutex<Vec<Export>>,
    /// The export that is being stopped.
    leaving: Mutex<Option<String>>,
    volumes: BTreeMap<String, Arc<Volume>>,
    /// The same for flushes of our own.
    lent: Vec<Lent>,
    volume_status: Vec<VolumeStatus>,
    workers: Mutex<Vec<Worker>>,
    /// Ways to them.
    links: Vec<Link>,
    /// The last flushes are under way.
    flushing: AtomicBool,
    placement: Placement,
    sandbox: SandboxStatus,
    stopping: AtomicBool,
    /// The stop that was asked for first, if one was.
    farewell: Mutex<Option<Farewell>>,
    stop: Notify,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Service {
    /// Opens every volume and takes every socket, then starts workers and exports. An error on the way takes
    /// away what was made.
    fn start(config: &Config) -> Result<Service, Error> {
        let mut volumes = BTreeMap::new();
        for (name, volume) in &config.volumes {
            let volume = Volume::open(name, volume)?.with_topology(config.topologies[name])?;
            let volume = volume.with_policy(config.policies[name]);
            volumes.insert(name.clone(), Arc::new(volume));
        }
        let mut passed = passed_sockets();
        let control = SocketFile::bind(&config.control, Access::PRIVATE).map_err(|error| match error {
            SocketError::System { .. }
                if config.control == Path::new(DEFAULT_CONTROL) && !Uid::effective().is_root() =>
            {
                Error::NotRoot(error)
            }
            other => other.into(),
        })?;
        let mut endpoints = Vec::new();
        for export in &config.vhost_user {
            endpoints.push(Endpoint::open(export, &mut passed)?);
        }
        for unused in passed {
            log::warn!("a socket passed by systemd is no export's: {:?}", unused.local_addr());
        }

        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let placement = Placement::of(config, |name| volumes[name].single_worker(), cpus);
        let habits = |number| Habits {
            patience: Duration::from_micros(config.poll_us.into()),
            slow_after: Duration::from_secs(config.slow_after),
            shared: placement.is_shared(number),
        };
        if !config.ublk.is_empty() {
            StableName::prepare();
        }
        let memory = MemoryBudget::of_process(config.vhost_user.len());
        // From here on we are no longer alone: what is given up, is given up by all.
        let sandbox = sandbox::enter(&sandbox::Plan::of(config))?;
        let mut workers = Vec::new();
        for number in 0..placement.workers() {
            let worker = Worker::start(number, habits(number));
            workers.push(worker.map_err(|source| Error::Worker { number, source })?);
        }
        let shared = Shared {
            exports: Mutex::default(),
            leaving: Mutex::default(),
            volume_status: config
                .volumes
                .iter()
                .map(|(name, of)| managed::volume_status(&volumes[name], of))
                .collect(),
            lent: volumes.values().map(|volume| Lent::new(volume.clone(), 1)).collect(),
            volumes,
            links: workers.iter().map(|worker| worker.link().clone()).collect(),
            flushing: AtomicBool::new(false),
            workers: Mutex::new(workers),
            placement,
            sandbox,
            stopping: AtomicBool::new(false),
            farewell: Mutex::default(),
            stop: Notify::new(),
        };
        let service = Service { control, shared: Arc::new(shared) };
        match service.shared.add_exports(config, endpoints, &memory) {
            Ok(()) => {
                service.shared.follow_growth();
                Ok(service)
            }
            Err(error) => {
                if let Err(left) = service.shared.take_down(Farewell::Withdraw) {
                    log::error!("{left}");
                }
                Err(error)
            }
        }
    }

    /// Answers on the control socket until told to stop, and stops.
    async fn until_stopped(self, mut signals: Signals) -> Result<(), Error> {
        let Service { control, shared } = self;
        let (gone, all_gone) = oneshot::channel::<()>();
        let answering = tokio::task::spawn_local(control::serve(control, shared.clone(), async {
            // An error is the sender's being dropped, which says the same.
            let _ = all_gone.await;
        }));
        let mut signalled = tokio::select! {
            () = signals.next() => true,
            () = shared.stop.notified() => false,
        };
        shared.stopping.store(true, Ordering::Relaxed);
        let farewell = *lock(&shared.farewell).get_or_insert(Farewell::Stop);
        log::info!("stopping: waiting for requests in flight");
        let (done, mut finished) = oneshot::channel();
        let stopper = shared.clone();
        thread::Builder::new()
            .name("ringblk-stop".into())
            .spawn(move || done.send(stopper.take_down(farewell)))
            .map_err(Error::Control)?;
        let held_up = async {
            loop {
                shared.volumes.values().filter_map(|volume| volume.held_up()).for_each(|why| {
                    log::warn!("stopping: {why}");
                });
                tokio::time::sleep(HELD_UP_EVERY).await;
            }
        };
        tokio::pin!(held_up);
        let result = loop {
            tokio::select! {
                () = &mut held_up => unreachable!("it goes on for ever"),
                result = &mut finished => break result.unwrap_or(Ok(())),
                () = signals.next() => {}
            }
            // systemd sends its own when the command that asked for a hand-over has taken too long.
            if !std::mem::replace(&mut signalled, true) {
                log::info!("stopping already: one more signal gives up on what is in flight");
                continue;
            }
            let asked = shared.clone();
            let left = tokio::task::spawn_blocking(move || asked.in_flight()).await.unwrap_or_default();
            let Some(left) = left else {
                log::info!("stopping already, and nothing is in flight that could be given up");
                continue;
            };
            log::warn!("giving up on what is in flight: {left}");
            shared.links.iter().for_each(Link::abandon);
            // A ublk device keeps the process until its requests are answered, if only with an error.
            let _ = tokio::time::timeout(ABANDON_LIMIT, finished).await;
            break Err(Error::Abandoned(left));
        };
        drop(gone);
        match answering.await {
            Ok(answered) => answered.map_err(Error::Control)?,
            Err(error) => log::warn!("control: {error}"),
        }
        if result.is_ok() {
            log::info!("stopped");
        }
        result
    }
}

impl Shared {
    /// Starts every export, in the order of the configuration: sockets, then disks, whose start makes the
    /// kernel read them.
    fn add_exports(
        &self,
        config: &Config,
        endpoints: Vec<Endpoint>,
        memory: &Arc<MemoryBudget>,
    ) -> Result<(), Error> {
        let links = |on: &[usize]| on.iter().map(|worker| self.links[*worker].clone()).collect::<Vec<_>>();
        for ((export, endpoint), (queues, on)) in
            config.vhost_user.iter().zip(endpoints).zip(&self.placement.vhost_user)
        {
            let volume = &self.volumes[&export.volume];
            let started =
                VhostUserExport::start(export, *queues, endpoint, volume, links(on), memory.share())
                    .map_err(|source| Error::VhostUser {
                        socket: export.socket.display().to_string(),
                        source,
                    })?;
            lock(&self.exports).push(Export::VhostUser(started));
            log::info!("volume {} is served on {}", export.volume, export.socket.display());
        }
        for (export, on) in config.ublk.iter().zip(&self.placement.ublk) {
            let started = UblkExport::start(export, &self.volumes[&export.volume], &links(on))?;
            log::info!("volume {} is served at {}", export.volume, started.status().link.display());
            lock(&self.exports).push(Export::Ublk(Box::new(started)));
        }
        Ok(())
    }

    /// From now on volumes whose stores grow by themselves grow with them.
    fn follow_growth(self: &Arc<Self>) {
        let (tell, told) = channel();
        self.volumes.values().for_each(|volume| volume.tell_growth(tell.clone()));
        let shared = Arc::downgrade(self);
        let follow = move || resize::follow_growth(&shared, &told);
        if let Err(error) = thread::Builder::new().name("ringblk-growth".into()).spawn(follow) {
            log::warn!("new sizes of NBD exports need a refresh: no thread to follow them: {error}");
        }
    }

    /// Ways to the workers that may have requests to a volume, and to no others: those may be held up by theirs.
    fn links_of(&self, volume: &Volume) -> Vec<Link> {
        let serving = self.placement.serving(volume.name());
        serving.filter_map(|number| self.links.get(number)).cloned().collect()
    }

    /// Ends every export, flushes every volume, ends the workers.
    fn take_down(&self, how: Farewell) -> Result<(), Error> {
        let mut left = Vec::new();
        let deadline = Instant::now() + STOP_LIMIT;
        // Taken out in a statement of its own, so that the list is not locked while we wait.
        let next = || lock(&self.exports).pop();
        while let Some(mut export) = next() {
            let name = export.status().name();
            *lock(&self.leaving) = Some(name.clone());
            let least = Instant::now() + STOP_LEAST;
            if let Err(abandoned) = export.leave(how, deadline.max(least)) {
                left.push(format!("{name}: {abandoned}"));
            }
        }
        *lock(&self.leaving) = None;
        let mut result = Ok(());
        let deadline = deadline.max(Instant::now() + FLUSH_LEAST);
        let written = |of: &Volume| !of.geometry().read_only && of.geometry().volatile_cache;
        let flushes = self.lent.iter().filter(|lent| written(&lent.volume)).filter_map(|lent| {
            // Where a single connection has the writes, it alone can vouch for them.
            let link = self.links_of(&lent.volume).into_iter().next()?;
            Some((lent.volume.name(), link.flush(lent.clone(), STORE_LIMIT)))
        });
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
        self.flushing.store(false, Ordering::Relaxed);
        if !left.is_empty() {
            return Err(Error::Abandoned(left.join("; ")));
        }
        let mut workers = lock(&self.workers);
        match how {
            Farewell::Stop => workers.clear(),
            // Where the kernel cannot give the fetches of a disk back, they end with the process, and a worker that
            // is told to end would wait for them.
            Farewell::HandOver | Farewell::Withdraw => workers.drain(..).for_each(std::mem::forget),
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
            return None;
        }
        let answers: Vec<_> = self.links.iter().map(Link::busy).collect();
        let deadline = Instant::now() + BUSY_LIMIT;
        let busy = answers.into_iter().map(|answer| {
            answer.recv_timeout(deadline.saturating_duration_since(Instant::now())).unwrap_or(1)
        });
        (busy.sum::<usize>() > 0).then(|| names.join(", "))
    }
}

/// Between two lines about requests that a stop waits for because the store failed.
const HELD_UP_EVERY: Duration = Duration::from_secs(5);

/// For a worker to say how many requests it has.
const BUSY_LIMIT: Duration = Duration::from_secs(1);

/// How long requests that were given up may take to fail.
const ABANDON_LIMIT: Duration = Duration::from_secs(5);

/// The exports' stops and the last flushes take no longer than this together; what does is reported and left.
const STOP_LIMIT: Duration = Duration::from_secs(120);

/// What an export has in any case, for what does not depend on its store.
const STOP_LEAST: Duration = Duration::from_secs(5);

/// How long the last flush of a volume may wait for its store to come back.
const STORE_LIMIT: Duration = Duration::from_secs(5);

/// What the last flushes have in any case. With this, and what a worker may take to end, a stop that a store holds up is
/// over before systemd loses patience (`TimeoutStopSec` in `systemd/`).
const FLUSH_LEAST: Duration = Duration::from_secs(15);
