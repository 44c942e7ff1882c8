//! A vring as the protocol sees it: a set of settings that may be changed at any time.
//!
//! vhost-user-backend keeps the settings and tells us of each change through its `VringT`. Each is passed on
//! to the crate's own vring, which remembers it, and then to the worker, as a start, a stop, or one of the two
//! changes a running vring takes.

#![forbid(unsafe_code)]

use super::device::Device;
use super::eventfd::{CallFd, check_eventfd, signal_error};
use super::inflight::Inflight;
use super::memory::Memory;
use super::vring::{StopMode, Stopped, VringSetup};
use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error as QueueError, QueueT};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// The crate's handle to a memory table that may change.
pub(super) type GuestMemoryHandle = GuestMemoryAtomic<GuestMemoryMmap<()>>;

/// Runs vrings: the service, with a worker for each queue.
pub trait Host: Send + Sync {
    /// Starts queue `setup.index`.
    ///
    /// # Errors
    /// When its rings are not where they should be.
    fn start(&self, setup: VringSetup) -> io::Result<Box<dyn Running>>;

    /// Brings every acknowledged write of the volume to stable storage.
    ///
    /// # Errors
    /// The store's.
    fn flush(&self) -> io::Result<()>;
}

/// A vring that runs on a worker.
pub trait Running: Send {
    /// Stops it, and waits until the kernel has none of its requests. Those that wait for their store end as `mode`
    /// says: in a moment, whatever becomes of the store.
    fn stop(self: Box<Self>, mode: StopMode) -> Stopped;
    /// Lets it take requests or not.
    fn enable(&self, enabled: bool);
    /// Replaces its call descriptor.
    fn set_call(&self, call: Option<CallFd>);
}

/// What the vrings of a session share.
pub(super) struct Shared {
    pub device: Arc<Device>,
    pub host: Arc<dyn Host>,
    /// Virtio features the driver accepted.
    pub features: AtomicU64,
    /// The memory table in force; `None` before the first.
    pub memory: Mutex<Option<Arc<Memory>>>,
    /// Where the vrings note what is in flight; `None` for a VMM that keeps no such log.
    pub inflight: Mutex<Option<Inflight>>,
}

impl Shared {
    /// A vring starts at `base` of its ring, for the `first` time in this session. One that is not at its beginning had a
    /// cache mode before us: where nobody tells of that, its driver may count on every write being durable.
    fn decide_writeback(&self, base: u16, first: bool) {
        let known = self.device.decide();
        let goes_on = first && base != 0 && !self.device.is_chosen();
        if goes_on {
            self.device.set_writeback(false);
        }
        if (goes_on || !known)
            && let Some(inflight) = &*lock(&self.inflight)
        {
            inflight.set_writeback(self.device.writeback());
        }
    }
}

/// One vring of a session.
#[derive(Clone)]
pub struct SessionVring {
    inner: VringMutex<GuestMemoryHandle>,
    link: Arc<VringLink>,
}

struct VringLink {
    index: usize,
    shared: Arc<Shared>,
    /// The VMM has said where its rings are: until then they are not at address 0.
    placed: AtomicBool,
    /// It has been started.
    begun: AtomicBool,
    kick: Mutex<Option<Arc<File>>>,
    call: Mutex<Option<Arc<File>>>,
    err: Mutex<Option<Arc<File>>>,
    /// What it took, did not complete, and has to go on with.
    unfinished: Mutex<Vec<u16>>,
    running: Mutex<Option<Box<dyn Running>>>,
}

/// Vrings in the making: see [`SessionVring::make_for`].
struct VringFactory {
    shared: Arc<Shared>,
    made: Vec<SessionVring>,
}

thread_local! {
    static NURSERY: RefCell<Option<VringFactory>> = const { RefCell::new(None) };
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SessionVring {
    /// Runs `make`, in which the crate makes its vrings, and returns them in order with what `make` returned.
    ///
    /// The crate calls `VringT::new` with neither an index nor anything of ours and keeps what it gets, so
    /// the session waits for them here, on the thread that makes them.
    pub(super) fn make_for<T>(shared: &Arc<Shared>, make: impl FnOnce() -> T) -> (T, Vec<SessionVring>) {
        NURSERY.set(Some(VringFactory { shared: shared.clone(), made: Vec::new() }));
        let result = make();
        let made = NURSERY.take().map(|factory| factory.made).unwrap_or_default();
        (result, made)
    }

    /// Starts it if it has all it needs: ready, addresses, a kick descriptor and memory. It goes on where it stopped.
    pub(super) fn start(&self) {
        let link = &self.link;
        let setup = {
            let state = self.inner.get_ref();
            let queue = state.get_queue();
            let ready = queue.ready() && link.placed.load(Ordering::Relaxed);
            let (true, Some(kick)) = (ready, lock(&link.kick).clone()) else { return };
            let Some(memory) = lock(&link.shared.memory).clone() else { return };
            let first = !link.begun.swap(true, Ordering::Relaxed);
            link.shared.decide_writeback(queue.next_avail(), first);
            let call = match lock(&link.call).as_deref().map(CallFd::new).transpose() {
                Ok(call) => call,
                Err(error) => return self.complain("its driver cannot be called", &error),
            };
            VringSetup {
                index: link.index,
                device: link.shared.device.clone(),
                memory,
                size: queue.size(),
                desc_table: queue.desc_table(),
                avail_ring: queue.avail_ring(),
                used_ring: queue.used_ring(),
                next_avail: queue.next_avail(),
                unfinished: lock(&link.unfinished).clone(),
                enabled: state.is_enabled(),
                read_only: link.shared.device.geometry().read_only,
                features: link.shared.features.load(Ordering::Relaxed),
                event_idx: queue.event_idx_enabled(),
                kick,
                call,
                err: lock(&link.err).clone(),
                inflight: lock(&link.shared.inflight)
                    .as_ref()
                    .and_then(|inflight| inflight.queue(link.index)),
            }
        };
        match link.shared.host.start(setup) {
            Ok(running) => {
                lock(&link.unfinished).clear();
                *lock(&link.running) = Some(running);
            }
            Err(error) => self.complain("it cannot be started", &error),
        }
    }

    fn complain(&self, what: &str, error: &io::Error) {
        let (index, log) = (self.link.index, self.link.shared.device.log());
        log.error("vring complaint", format_args!("vring {index}: {what}: {error}"));
        if let Some(err) = &*lock(&self.link.err) {
            signal_error(err);
        }
    }

    /// Stops it, if it runs. Whether it did.
    pub(super) fn stop(&self, mode: StopMode) -> bool {
        let unfinished = &self.link.unfinished;
        if mode != StopMode::Restart {
            // Whatever it begins with next, it does not go on with these.
            lock(unfinished).clear();
        }
        // Taken out first: the lock is not held while we wait.
        let Some(running) = lock(&self.link.running).take() else { return false };
        let stopped = running.stop(mode);
        self.inner.set_queue_next_avail(stopped.next_avail);
        if mode == StopMode::Restart {
            *lock(unfinished) = stopped.unfinished;
        }
        true
    }

    /// Descriptors that it has, or may have at most as long as the VMM has not said.
    pub(super) fn size(&self) -> u16 {
        self.inner.get_ref().get_queue().size()
    }

    /// Stops it and lets it go on, with what the session knows now.
    pub(super) fn restart(&self) {
        self.between(|| ());
    }

    /// Stops it, makes a change, and lets it go on.
    fn between<T>(&self, change: impl FnOnce() -> T) -> T {
        let ran = self.stop(StopMode::Restart);
        let result = change();
        if ran {
            self.start();
        }
        result
    }

    fn is_running(&self) -> bool {
        lock(&self.link.running).is_some()
    }
}

impl<'a> VringStateGuard<'a, GuestMemoryHandle> for SessionVring {
    type G = MutexGuard<'a, VringState<GuestMemoryHandle>>;
}

impl<'a> VringStateMutGuard<'a, GuestMemoryHandle> for SessionVring {
    type G = MutexGuard<'a, VringState<GuestMemoryHandle>>;
}

impl VringT<GuestMemoryHandle> for SessionVring {
    fn new(memory: GuestMemoryHandle, max_queue_size: u16) -> Result<Self, QueueError> {
        let inner = VringMutex::new(memory, max_queue_size)?;
        NURSERY.with_borrow_mut(|factory| {
            // `make_for` is the only way here: its caller makes the daemon, which makes the vrings.
            let factory = factory.as_mut().ok_or(QueueError::QueueNotReady)?;
            let link = Arc::new(VringLink {
                index: factory.made.len(),
                shared: factory.shared.clone(),
                placed: AtomicBool::new(false),
                begun: AtomicBool::new(false),
                kick: Mutex::new(None),
                call: Mutex::new(None),
                err: Mutex::new(None),
                unfinished: Mutex::default(),
                running: Mutex::new(None),
            });
            let vring = SessionVring { inner, link };
            factory.made.push(vring.clone());
            Ok(vring)
        })
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, GuestMemoryHandle>>::G {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, GuestMemoryHandle>>::G {
        self.inner.get_mut()
    }

    fn add_used(&self, head: u16, len: u32) -> Result<(), QueueError> {
        self.inner.add_used(head, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.inner.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, QueueError> {
        self.inner.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), QueueError> {
        self.inner.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, QueueError> {
        self.inner.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.inner.set_enabled(enabled);
        if let Some(running) = &*lock(&self.link.running) {
            running.enable(enabled);
        }
    }

    fn set_queue_info(&self, desc_table: u64, avail_ring: u64, used_ring: u64) -> Result<(), QueueError> {
        let (ready, same) = {
            let state = self.inner.get_ref();
            let queue = state.get_queue();
            let now = (queue.desc_table(), queue.avail_ring(), queue.used_ring());
            (queue.ready(), now == (desc_table, avail_ring, used_ring))
        };
        // QEMU repeats the addresses when it starts to log: nothing to do.
        if same && self.is_running() {
            return Ok(());
        }
        self.stop(StopMode::Restart);
        self.inner.set_queue_info(desc_table, avail_ring, used_ring)?;
        self.link.placed.store(true, Ordering::Relaxed);
        if ready {
            self.start();
        }
        Ok(())
    }

    fn queue_next_avail(&self) -> u16 {
        self.inner.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.between(|| self.inner.set_queue_next_avail(base));
    }

    fn set_queue_next_used(&self, idx: u16) {
        // Ours is read from the used ring when the vring starts.
        self.inner.set_queue_next_used(idx);
    }

    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        self.inner.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        self.between(|| self.inner.set_queue_size(num));
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        let now = self.inner.get_ref().get_queue().event_idx_enabled();
        if now != enabled {
            self.between(|| self.inner.set_queue_event_idx(enabled));
        }
    }

    fn set_queue_ready(&self, ready: bool) {
        // When it is to stop, `Session::stop_vring` follows, and waits.
        self.inner.set_queue_ready(ready);
        if ready {
            self.start();
        }
    }

    fn set_kick(&self, file: Option<File>) {
        let checked = file.as_ref().map(|file| check_eventfd(file).and_then(|()| file.try_clone()));
        match checked.transpose() {
            Ok(kick) => self.between(|| {
                *lock(&self.link.kick) = kick.map(Arc::new);
                self.inner.set_kick(file);
            }),
            Err(error) => self.complain("its kick descriptor", &error),
        }
    }

    fn read_kick(&self) -> io::Result<bool> {
        self.inner.read_kick()
    }

    fn set_call(&self, file: Option<File>) {
        // Twice: one is the running vring's, the other is kept for those to come.
        let call = file.as_ref().map(|file| Ok::<_, io::Error>((CallFd::new(file)?, file.try_clone()?)));
        self.inner.set_call(file);
        match call.transpose().map(Option::unzip) {
            Ok((call, file)) => {
                *lock(&self.link.call) = file.map(Arc::new);
                if let Some(running) = &*lock(&self.link.running) {
                    running.set_call(call);
                }
            }
            Err(error) => self.complain("its call descriptor", &error),
        }
    }

    fn set_err(&self, file: Option<File>) {
        match file.map(|file| check_eventfd(&file).map(|()| Arc::new(file))).transpose() {
            Ok(err) => self.between(|| *lock(&self.link.err) = err),
            Err(error) => self.complain("its error descriptor", &error),
        }
    }
}
