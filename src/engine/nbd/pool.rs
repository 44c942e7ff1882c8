//! A worker's connections to one export: kept alive, and handed out to requests.
//!
//! Each has a task that has it made, receives on it, and starts again when it is lost. The first
//! connection is made at once; the others after it, so that a server which takes few connections has one for
//! each worker before any worker has a second.

#![forbid(unsafe_code)]

use super::Remote;
use super::connect::Connected;
use super::connection::Connection;
use super::reconnect::{self, Event, Reconnect};
use super::watch::{TICKS, Watch};
use crate::block::Errno;
use crate::ring::{Core, Io, Ring, Sqe, Target};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::AsRawFd;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Before the next attempt to start a thread that could not be started.
const NO_THREAD_PAUSE: Duration = Duration::from_secs(1);

thread_local! {
    /// The pools of this worker whose server takes one connection at a time: a second user of the volume
    /// shares it. Its entries are `Pool<R>` of whichever ring.
    static SINGLE: RefCell<Vec<Weak<dyn Any>>> = const { RefCell::new(Vec::new()) };
}

/// See the module.
pub struct Pool<R: Ring> {
    core: Rc<Core<R>>,
    remote: Arc<Remote>,
    connections: Vec<Place<R>>,
    pub(super) watch: Rc<Watch>,
    /// The next to get a request.
    next: Cell<usize>,
    /// There was a connection at some time.
    came_up: Cell<bool>,
    closing: Cell<bool>,
    users: Cell<usize>,
    /// Slots that wait for a connection.
    waiting: RefCell<Vec<u32>>,
}

struct Place<R: Ring> {
    connection: Rc<Connection<R>>,
    wakeup: Arc<EventFd>,
}

impl<R: Ring> Pool<R> {
    /// Starts connecting, or joins the connection there is where the server allows only one. Does not wait.
    /// Each call is to be matched by a [`leave`](Self::leave).
    pub fn join(core: &Rc<Core<R>>, remote: &Arc<Remote>) -> Rc<Pool<R>> {
        if let Some(pool) = Self::single(core, remote) {
            pool.users.set(pool.users.get() + 1);
            return pool;
        }
        remote.pools.fetch_add(1, Ordering::Relaxed);
        let watch = Rc::new(Watch::default());
        let mut connections = Vec::new();
        for index in 0..remote.connections {
            match Self::place(core, remote, &watch, index == 0) {
                Ok(place) => connections.push(place),
                // With fewer, or none: then requests fail, and the log says why.
                Err(error) => log::error!("{}: connection {index}: {error}", remote.label),
            }
        }
        let pool = Rc::new(Pool {
            core: core.clone(),
            remote: remote.clone(),
            connections,
            watch,
            next: Cell::new(0),
            came_up: Cell::new(false),
            closing: Cell::new(false),
            users: Cell::new(1),
            waiting: RefCell::default(),
        });
        for index in 0..pool.connections.len() {
            pool.start(index);
        }
        if !remote.timeout.is_zero() {
            core.spawn(|io| {
                pool.watch.set_slot(Some(io.slot()));
                pool.clone().watch_requests(io)
            });
        }
        if remote.connections == 1 {
            let any: Rc<dyn Any> = pool.clone();
            SINGLE.with_borrow_mut(|pools| pools.push(Rc::downgrade(&any)));
        }
        pool
    }

    fn single(core: &Rc<Core<R>>, remote: &Arc<Remote>) -> Option<Rc<Pool<R>>> {
        SINGLE.with_borrow_mut(|pools| {
            pools.retain(|pool| pool.strong_count() > 0);
            pools.iter().find_map(|pool| {
                let pool = pool.upgrade()?.downcast::<Pool<R>>().ok()?;
                let same = Rc::ptr_eq(&pool.core, core) && Arc::ptr_eq(&pool.remote, remote);
                (same && !pool.closing.get()).then_some(pool)
            })
        })
    }

    fn place(
        core: &Rc<Core<R>>,
        remote: &Arc<Remote>,
        watch: &Rc<Watch>,
        first: bool,
    ) -> io::Result<Place<R>> {
        Ok(Place {
            connection: Rc::new(Connection::new(core, remote, watch, first)?),
            wakeup: Arc::new(EventFd::new(EFD_NONBLOCK)?),
        })
    }

    fn start(self: &Rc<Self>, index: usize) {
        let connection = &self.connections[index].connection;
        self.core.spawn(|io| {
            connection.set_sender(io.slot());
            connection.clone().send(io)
        });
        let first = if index == 0 { self.remote.take_first() } else { None };
        self.core.spawn(|io| {
            connection.set_receiver(Some(io.slot()));
            self.clone().keep(index, first, io)
        });
    }

    /// Somebody does not use it any more; with the last user the connections are closed.
    pub fn leave(&self) {
        self.users.set(self.users.get() - 1);
        if self.users.get() > 0 {
            return;
        }
        self.closing.set(true);
        self.watch.end(&self.core);
        for place in &self.connections {
            place.connection.close();
            // A connection's task that waits for its connecting thread waits for this.
            let _ = place.wakeup.write(1);
        }
        self.wake_waiting();
    }

    /// Ends the connections under their requests, which fail.
    pub fn abandon(&self) {
        self.closing.set(true);
        self.watch.end(&self.core);
        for place in &self.connections {
            place.connection.close();
            place.connection.disconnect("given up");
            let _ = place.wakeup.write(1);
        }
        self.wake_waiting();
    }

    /// Those that are up and those that are not.
    pub fn connections(&self) -> impl Iterator<Item = &Connection<R>> {
        self.connections.iter().map(|place| &*place.connection)
    }

    /// Ends the connections on which a request waits for its answer whose slot is interrupted. Other requests there are
    /// sent again over another connection, as after any loss.
    pub fn hang_up(&self) {
        for Place { connection, .. } in &self.connections {
            if connection.inflight.borrow().waits(|slot| self.core.is_interrupted(slot)) {
                connection.disconnect("the server does not answer");
            }
        }
    }

    /// A connection to send something over, that may wait for one to be made.
    ///
    /// # Errors
    /// `ENOTCONN` when there is none, and none is worth waiting for; `ERESTART` when the slot is interrupted.
    pub async fn any(&self, io: &Io<R>) -> Result<&Connection<R>, Errno> {
        loop {
            if let Some(connection) = self.pick(|_| true) {
                return Ok(connection);
            }
            if !self.connections.iter().any(|place| place.connection.is_worth_waiting()) {
                return Err(Errno::ENOTCONN);
            }
            if io.is_interrupted() {
                return Err(Errno::ERESTART);
            }
            self.wait(io).await;
        }
    }

    /// The next connection in turn that is up and good enough.
    pub fn pick(&self, good: impl Fn(&Connection<R>) -> bool) -> Option<&Connection<R>> {
        let count = self.connections.len();
        let first = self.next.get();
        let index = (first..first + count).map(|index| index % count).find(|&index| {
            self.connections[index].connection.is_up() && good(&self.connections[index].connection)
        })?;
        self.next.set(index + 1);
        Some(&self.connections[index].connection)
    }

    async fn wait(&self, io: &Io<R>) {
        if !self.waiting.borrow().contains(&io.slot()) {
            self.waiting.borrow_mut().push(io.slot());
        }
        io.park().await;
    }

    fn wake_waiting(&self) {
        for slot in self.waiting.borrow_mut().drain(..) {
            self.core.wake(slot);
        }
    }

    /// Hangs up on a server that leaves a request unanswered for too long, as long as the pool is not closed: see
    /// [`watch`](super::watch).
    async fn watch_requests(self: Rc<Self>, io: Io<R>) {
        let limit = self.remote.timeout;
        while !self.closing.get() {
            if self.connections().all(|connection| connection.is_idle()) {
                self.watch.park(&io).await;
                continue;
            }
            io.rest_for(limit / TICKS as u32).await;
            for connection in self.connections().filter(|connection| connection.tick()) {
                let seconds = limit.as_secs();
                connection
                    .disconnect(&format!("the server has not answered a request for {seconds} s (timeout=)"));
            }
        }
        self.watch.set_slot(None);
    }

    /// A connection's task.
    async fn keep(self: Rc<Self>, index: usize, first: Option<Connected>, io: Io<R>) {
        let connection = &self.connections[index].connection;
        let mut ready = first;
        let mut pause = Duration::ZERO;
        while index > 0 && !self.came_up.get() && !self.closing.get() {
            self.wait(&io).await;
        }
        while !self.closing.get() {
            let connected = match ready.take() {
                Some(connected) => connected,
                None => match self.reconnect(index, pause, &io).await {
                    Some(connected) => connected,
                    None => break,
                },
            };
            connection.raise(connected);
            self.came_up.set(true);
            self.wake_waiting();
            let why = connection.receive(&io).await;
            connection.disconnect(&why);
            self.wake_waiting();
            connection.lower(&io).await;
            // A server that takes connections and drops them is not asked all the time.
            pause = if connection.is_proven() { Duration::ZERO } else { reconnect::longer(pause) };
        }
        connection.set_receiver(None);
    }

    /// Has a connection made; `None` when it is not wanted any more.
    async fn reconnect(&self, index: usize, pause: Duration, io: &Io<R>) -> Option<Connected> {
        let Place { connection, wakeup } = &self.connections[index];
        let since_lost = connection.lost_at().map_or(Duration::ZERO, |lost| lost.elapsed());
        let patience = self.remote.reconnect.saturating_sub(since_lost);
        let reconnect = loop {
            match Reconnect::start(self.remote.clone(), wakeup.clone(), pause, patience) {
                Ok(reconnect) => break reconnect,
                Err(error) => {
                    self.remote.log.error("thread", format_args!("no thread to connect: {error}"));
                    self.give_up_waiting(connection);
                    io.sleep(NO_THREAD_PAUSE).await;
                    if self.closing.get() {
                        return None;
                    }
                }
            }
        };
        let file = Target::Fd(wakeup.as_raw_fd());
        while !self.closing.get() {
            match reconnect.event() {
                Some(Event::Connected(connected)) => return Some(connected),
                Some(Event::OutOfPatience) => self.give_up_waiting(connection),
                None => {
                    io.submit(&Sqe::PollOnce { file }).await;
                    // Empty already when it was written for an event that we took before.
                    let _ = wakeup.read();
                }
            }
        }
        None
    }

    fn give_up_waiting(&self, connection: &Connection<R>) {
        connection.lose_patience();
        self.wake_waiting();
    }

    /// Whether a request whose connection was lost may be sent again. `first` keeps when that happened to it
    /// first.
    ///
    /// # Errors
    /// `EIO` when its time is up.
    pub fn again(&self, first: &mut Option<Instant>) -> Result<(), Errno> {
        let first = *first.get_or_insert_with(Instant::now);
        let limit = self.remote.reconnect;
        if self.closing.get() || limit.is_zero() || first.elapsed() >= limit {
            Err(Errno::EIO)
        } else {
            Ok(())
        }
    }
}
