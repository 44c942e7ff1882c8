//! What all runs share: a worker, its volumes, and a neighbour on it.

use super::messages::PATIENCE;
use super::neighbour::Neighbour;
use crate::engine::Volume;
use crate::engine::config::{FileConfig, MemoryConfig, VolumeConfig};
use crate::frontend::vhost_user::budget::{MemoryBudget, MemoryShare};
use crate::frontend::vhost_user::protocol::{BackendChannel, Interest, Shape, Vmm, Wake, Wakeups};
use crate::frontend::vhost_user::{CallFd, Device, Host, Running, Session, StopMode, Stopped, VringSetup};
use crate::service::served_vring::ServedVring;
use crate::worker::{ExportVolume, Worker, WorkerConfig, WorkerHandle};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Queues, and descriptors in each, of every device here.
pub(super) const SHAPE: Shape = Shape { queues: 2, queue_size: 64 };

/// The name of the hostile VMM's memory, which shows in `/proc`.
pub(super) const MEMORY: &str = "fuzz-session";

/// Bytes of each disk.
const DISK: u64 = 64 << 10;

/// See the module.
pub(super) struct World {
    _worker: Mutex<Worker>,
    host: Arc<dyn Host>,
    device: Arc<Device>,
    share: Arc<MemoryShare>,
    witness: Mutex<Witness>,
}

/// Who would notice.
struct Witness {
    neighbour: Neighbour,
    /// What there is without a VMM.
    before: Trace,
}

static WORLD: OnceLock<World> = OnceLock::new();

/// Plays one run, alone, and looks afterwards whether anything is left of it or anybody was harmed.
pub(super) fn watched(play: impl FnOnce(&World)) {
    let world = WORLD.get_or_init(World::new);
    let mut witness = world.witness.lock().unwrap_or_else(PoisonError::into_inner);
    let Witness { neighbour, before } = &mut *witness;
    play(world);
    neighbour.work();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let after = Trace::now();
        if after.is_nothing_since(before) {
            return;
        }
        assert!(Instant::now() < deadline, "left behind: {before:?} became {after:?}");
        thread::sleep(Duration::from_micros(100));
    }
}

/// What a VMM may leave in this process.
#[derive(Debug)]
struct Trace {
    mapped: usize,
    open: Vec<String>,
}

impl Trace {
    fn now() -> Trace {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let mapped = maps.lines().filter(|line| line.contains(MEMORY)).count();
        let files = fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| {
            // What was closed since it was listed is not open.
            Some(fs::read_link(entry.unwrap().path()).ok()?.to_string_lossy().into_owned())
        });
        // Among other tests nothing can be said of descriptors without a name.
        // The sanitizer starts a symbolizer when it likes, and speaks to it through pipes.
        let is_ours = |target: &String| {
            if cfg!(fuzzing) { !target.starts_with("pipe:") } else { target.contains(MEMORY) }
        };
        let open = files.filter(is_ours).collect();
        Trace { mapped, open }
    }

    fn is_nothing_since(&self, before: &Trace) -> bool {
        self.mapped <= before.mapped && self.open.len() <= before.open.len()
    }
}

impl World {
    fn new() -> World {
        let config =
            WorkerConfig { busy_poll: Duration::from_micros(20), slow_after: Duration::ZERO, shared: false };
        let worker = Worker::start(0, config).unwrap();
        // A file, of which the device has flushes, discards and a cache mode.
        let image = File::from(memfd_create(c"fuzz-image", MFdFlags::MFD_CLOEXEC).unwrap());
        image.set_len(DISK).unwrap();
        let path = format!("/proc/self/fd/{}", image.as_raw_fd()).into();
        let config =
            FileConfig { path, direct: false, read_only: false, lock: false, format: None, block_size: None };
        let (volume, device) = disk("hostile", &VolumeConfig::File(config));
        drop(image);
        let config = MemoryConfig { size: crate::block::Size(DISK), block_size: None };
        let (neighbours_volume, neighbours_device) = disk("neighbour", &VolumeConfig::Memory(config));
        let (ours, theirs) = UnixStream::pair().unwrap();
        // It ends with the process.
        let budget = MemoryBudget::of_process(2);
        let neighbours_host = host(worker.handle(), neighbours_volume);
        drop(serve(theirs, &neighbours_device, &neighbours_host, &budget.share()));
        let host = host(worker.handle(), volume);
        let mut neighbour = Neighbour::new(ours);
        // All that is made at the first request is made now.
        neighbour.work();
        let witness = Mutex::new(Witness { neighbour, before: Trace::now() });
        World { _worker: Mutex::new(worker), host, device, share: budget.share(), witness }
    }

    /// A session of the hostile VMM's: its socket, and what says that it has ended.
    pub(super) fn session(&self) -> (UnixStream, Ended) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (ours, serve(theirs, &self.device, &self.host, &self.share))
    }
}

fn disk(name: &str, config: &VolumeConfig) -> (Arc<Volume>, Arc<Device>) {
    let volume = Volume::open(name, config).unwrap();
    let device = Device::new(name, "/fuzz.sock", volume.geometry().clone(), false);
    (Arc::new(volume), Arc::new(device))
}

/// What waits for the end of a session.
pub(super) struct Ended {
    ended: Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl Ended {
    /// Waits.
    pub fn wait(&mut self) {
        self.ended.recv_timeout(PATIENCE).expect("a session does not end");
        // Nothing of its own is left, either.
        if let Some(thread) = self.thread.take() {
            thread.join().expect("a session's thread");
        }
    }
}

fn serve(stream: UnixStream, device: &Arc<Device>, host: &Arc<dyn Host>, share: &Arc<MemoryShare>) -> Ended {
    let (end, ended) = channel();
    let (device, host, share) = (device.clone(), host.clone(), share.clone());
    let thread = thread::spawn(move || {
        // A VMM that breaks the protocol is an error, and the session's right to end.
        let vmm = Vmm::new(stream, &Awake);
        if let Err(error) = Session::serve(vmm, &device, &host, SHAPE, &BackendChannel::default(), &share) {
            log::debug!("{error}");
        }
        let _ = end.send(());
    });
    Ended { ended, thread: Some(thread) }
}

/// Who waits for a VMM's messages and is never told to stop.
struct Awake;

impl Wakeups for Awake {
    fn wait(&self, fd: BorrowedFd<'_>, interest: Interest, deadline: Option<Instant>) -> io::Result<Wake> {
        let interest = match interest {
            Interest::Read => PollFlags::POLLIN,
            Interest::Write => PollFlags::POLLOUT,
        };
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.map_or(PollTimeout::NONE, |left| (left.as_millis() as u16).into());
        match poll(&mut [PollFd::new(fd, interest)], timeout)? {
            0 => Ok(Wake::Late),
            _ => Ok(Wake::Ready),
        }
    }
}

fn host(handle: &WorkerHandle, volume: Arc<Volume>) -> Arc<dyn Host> {
    Arc::new(OneWorker { handle: handle.clone(), export: ExportVolume::new(volume, SHAPE.queues) })
}

/// Runs all vrings on one worker.
struct OneWorker {
    handle: WorkerHandle,
    export: ExportVolume,
}

impl Host for OneWorker {
    fn start(&self, setup: VringSetup) -> io::Result<Box<dyn Running>> {
        Ok(Box::new(OnWorker(ServedVring::start(&self.handle, setup, self.export.clone())?)))
    }

    fn flush(&self) -> io::Result<()> {
        let flushed = self.handle.flush(self.export.clone(), PATIENCE).recv_timeout(PATIENCE);
        Ok(flushed.expect("the worker hangs")?)
    }
}

struct OnWorker(ServedVring);

impl Running for OnWorker {
    fn stop(self: Box<Self>, _: StopMode) -> Stopped {
        let stopped = self.0.stop().recv_timeout(PATIENCE);
        stopped.expect("a vring does not stop").expect("the vring was there")
    }

    fn enable(&self, enabled: bool) {
        self.0.enable(enabled).unwrap();
    }

    fn set_call(&self, call: Option<CallFd>) {
        self.0.set_call(call).unwrap();
    }
}
