//! A worker's loop.

mod limited;

use super::affinity::Affinity;
use super::mailbox::Mailbox;
use super::patience::Patience;
use super::slot::{Client, Queue, Seat, sit};
use super::throttle::{Admission, ThrottleTimer};
use super::watch::{Watch, Watchdog};
use super::{Command, Habits, Lent, Reply, VringId};
use crate::block::Errno;
use crate::engine::limits::Limits;
use crate::engine::{Attached, QueueStart, Volume};
use crate::frontend::{ublk, vhost_user};
use crate::ring::{
    Core, Cqe, Kind, Ring, Setup, Sqe, Target, Tasks, Uring, UserData, set_io_flusher, use_stack,
};
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Registered buffers a worker has room for: the tags of its zero-copy ublk queues. The kernel's limit is
/// 16384; an entry is a pointer.
const BUFFERS: u32 = 4096;

/// The most slots that the vrings of one export get here, 10 KiB each at the most (with room for a chain of 254
/// segments). What a guest brings beyond that waits in its ring, and takes no memory of ours.
const MOST_SLOTS: usize = 4096;

/// What each vring gets all the same, so that none waits for another.
const LEAST_SLOTS: usize = 32;

/// A queue's place in the worker.
struct Place {
    queue: Queue,
    volume: Rc<Attached<Uring>>,
    client: Client,
    admission: Rc<Admission>,
    /// Slots of all its queues here.
    export_slots: Rc<Cell<usize>>,
    /// The slot of each tag. A vring's are made as its depth is first reached: an idle one has none.
    slots: Vec<u32>,
    /// What each of them is at.
    watches: Vec<Rc<Watch>>,
    alive: Rc<Cell<usize>>,
    /// Its requests do not wait for their store.
    interrupted: bool,
    /// Told when a ublk queue has ended.
    ended: Option<Reply<()>>,
}

impl Place {
    /// Whether the vring here can be given a slot for one more request: an idle one, or one that is made for it. Where it
    /// cannot, it has requests in flight, and goes on when one of them completes.
    fn has_slot(&self, vring: &vhost_user::Vring) -> bool {
        usize::from(vring.tags_in_use()) < self.slots.len().max(LEAST_SLOTS)
            || self.export_slots.get() < MOST_SLOTS
    }
}

/// A worker that has its ring, before it serves.
pub(super) struct Run {
    core: Rc<Core<Uring>>,
    mailbox: Arc<Mailbox>,
    habits: Habits,
}

impl Run {
    /// Makes the calling thread a worker's.
    pub fn new(mailbox: &Arc<Mailbox>, habits: Habits) -> io::Result<Run> {
        let ring = Uring::new(Setup { buffers: BUFFERS, ..Setup::default() })?;
        set_io_flusher();
        use_stack();
        let core = Core::new(ring);
        core.set_shared(habits.shared);
        Ok(Run { core, mailbox: mailbox.clone(), habits })
    }

    /// Serves until told to quit.
    pub fn until_quit(self) {
        Loop {
            tasks: Tasks::new(self.core.clone()),
            core: self.core,
            mailbox: self.mailbox,
            make: sit,
            places: Vec::new(),
            affinity: Affinity::of_this_thread(),
            attached: Vec::new(),
            active: Vec::new(),
            stopping: Vec::new(),
            deserted: Rc::default(),
            kicks: 0,
            patience: Patience::up_to(self.habits.patience),
            watchdog: Watchdog::new(self.habits.slow_after),
            throttle: ThrottleTimer::new(),
            quit: false,
        }
        .run();
    }
}

/// The loop's state. `F` is the type of a slot's future, which has no name; `M` makes one.
struct Loop<F, M> {
    core: Rc<Core<Uring>>,
    mailbox: Arc<Mailbox>,
    tasks: Tasks<Uring, F>,
    make: M,
    places: Vec<Option<Place>>,
    affinity: Affinity,
    patience: Patience,
    watchdog: Watchdog,
    throttle: ThrottleTimer,
    /// Volumes that are or were in use here: the queues of one share what it keeps for a worker. That lives as long as the
    /// volume, because a connection may have to vouch for writes when all queues are gone that brought them.
    attached: Vec<(Weak<Volume>, Rc<Attached<Uring>>)>,
    /// Vrings to look at in each pass: kicked, or with requests in flight. Idle ones cost nothing.
    active: Vec<u32>,
    /// Vrings that drain.
    stopping: Vec<(u32, Reply<Option<vhost_user::Stopped>>)>,
    deserted: Rc<RefCell<Vec<u32>>>,
    /// Kick descriptors armed so far: tells a late kick of a vring that is gone.
    kicks: u32,
    quit: bool,
}

const MAILBOX: UserData = UserData::new(Kind::Mailbox, 0, 0);
const NOBODY: UserData = UserData::new(Kind::Nobody, 0, 0);

/// How long an ending worker waits for volumes to take their leave.
const GOODBYE: Duration = Duration::from_secs(1);

impl<F: Future<Output = ()>, M: Fn(Seat) -> F> Loop<F, M> {
    /// One pass: completions, commands, woken slots, new requests, then one `enter`. A pass that found nothing to
    /// do looks again for a while, if a guest may bring more, and then sleeps: an idle worker uses no CPU.
    fn run(mut self) {
        self.listen();
        let mut cqes: Vec<Cqe> = Vec::with_capacity(Setup::default().completions as usize);
        while !self.quit {
            self.core.ring().reap(&mut cqes);
            let mut worked = !cqes.is_empty();
            for cqe in cqes.drain(..) {
                match cqe.user_data.kind() {
                    Some(Kind::Slot) => self.tasks.complete(&cqe),
                    Some(Kind::Kick) => self.kicked(&cqe),
                    Some(Kind::Mailbox) => self.read_mail(&cqe),
                    Some(Kind::Watch) => self.tell_slow(),
                    Some(Kind::Throttle) => self.throttle_expired(&cqe),
                    Some(Kind::Nobody) | None => {}
                }
            }
            worked |= self.tasks.run_ready();
            worked |= self.pump();
            worked |= self.part();
            if worked {
                self.patience.worked();
                // Without vrings only a completion can bring more: one system call instead of two.
                self.enter(self.active.is_empty() && self.core.is_quiet() && !self.quit);
                continue;
            }
            let expects_more = self.expects_more();
            if expects_more && self.patience.look_again() {
                // Runs what the kernel has deferred, if it says that there is something.
                self.enter(false);
                std::hint::spin_loop();
            } else if self.rest() {
                self.patience.sleeps(expects_more);
                self.enter(true);
            }
        }
        self.say_goodbye(cqes);
    }

    fn enter(&self, wait: bool) {
        self.watchdog.arm(&self.core);
        self.arm_throttle();
        if let Err(error) = self.core.ring().enter(wait) {
            // Nothing in flight can complete any more. The process ends, and every client hears of it;
            // silence would leave them waiting.
            log::error!("io_uring_enter: {error}: giving up");
            std::process::abort();
        }
    }

    /// Logs the requests that take too long.
    fn tell_slow(&self) {
        let all = self.places.iter().flatten().flat_map(|place| {
            place.watches.iter().enumerate().map(move |(tag, watch)| ((place, tag), &**watch))
        });
        for ((place, tag), doing, age) in self.watchdog.look(all) {
            let waits_for = place.volume.waits_for(place.slots[tag]);
            let (queue, seconds) = (place.queue.label(), age.as_secs());
            let doing = format_args!("{queue}: tag {tag}: {doing}");
            let log = place.volume.log();
            log.warn("slow", format_args!("{doing}: not done after {seconds} s: it waits for {waits_for}"));
        }
    }

    /// Lets go of every volume, and gives what they have left to say (an NBD disconnect) a moment.
    fn say_goodbye(mut self, mut cqes: Vec<Cqe>) {
        self.core.push(&Sqe::Timeout { after: GOODBYE }, NOBODY);
        for at in 0..self.places.len() {
            self.remove(at as u32);
        }
        self.attached.clear();
        let mut over = false;
        while !over && self.core.in_flight() > 0 {
            self.tasks.run_ready();
            self.enter(self.core.in_flight() > 0);
            self.core.ring().reap(&mut cqes);
            for cqe in cqes.drain(..) {
                match cqe.user_data.kind() {
                    Some(Kind::Slot) => self.tasks.complete(&cqe),
                    Some(Kind::Nobody) => over |= cqe.outcome() == Err(Errno::ETIME),
                    _ => {}
                }
            }
        }
    }

    fn listen(&self) {
        self.core.push(&Sqe::PollMultishot { file: Target::Fd(self.mailbox.as_raw_fd()) }, MAILBOX);
    }

    fn read_mail(&mut self, cqe: &Cqe) {
        if !cqe.more {
            self.listen();
        }
        for command in self.mailbox.take() {
            match command {
                Command::AddUblk { setup, lent, ready, ended } => {
                    ready.send(self.add_ublk(setup, lent, ended));
                }
                Command::StartVring { setup, lent, reply } => {
                    reply.send(self.start_vring(setup, lent));
                }
                Command::StopVring { id, reply } => match self.vring(id.0) {
                    Some(vring) => {
                        vring.stop();
                        self.stopping.push((id.0, reply));
                    }
                    None => reply.send(None),
                },
                Command::InterruptVring { id, mode } => self.interrupt_vring(id.0, mode),
                Command::EnableVring { id, enabled, reply } => {
                    if let Some(vring) = self.vring(id.0) {
                        vring.enable(enabled);
                        self.activate(id.0);
                    }
                    reply.send(());
                }
                Command::CallVring { id, call, reply } => {
                    if let Some(vring) = self.vring(id.0) {
                        vring.set_call(call);
                    }
                    reply.send(());
                }
                Command::Flush { lent, limit, reply } => self.flush(lent, limit, reply),
                Command::Drain { volume, limit, reply } => self.drain(&volume, limit, reply),
                Command::Busy { reply } => reply.send(self.watchdog.busy()),
                Command::LimitsChanged => self.limits_changed(),
                Command::Abandon => {
                    self.attached.iter().for_each(|(_, attached)| attached.abandon());
                }
                Command::Quit => self.quit = true,
            }
        }
    }

    fn flush(&mut self, lent: Lent, limit: Duration, reply: Reply<Result<(), Errno>>) {
        let (attached, core) = (self.attach(&lent.volume, false), self.core.clone());
        // Each ends the other; a slot may be somebody else's once its task has ended.
        let alive = Rc::new(Cell::new([None; 2]));
        let (flush, timer) = (alive.clone(), alive.clone());
        let end_other = move |alive: &Cell<[Option<u32>; 2]>, own: usize| {
            if let Some(other) = alive.take()[1 - own] {
                core.interrupt(other);
            }
        };
        let end = end_other.clone();
        let first = self.core.spawn(|io| async move {
            // Not as a request: those may wait for a word from outside, and this is for somebody who leaves.
            let result = attached.flush_for(&io, lent.flushers.queue(0)).await;
            reply.send(
                result.map_err(|errno| if errno == Errno::ERESTART { Errno::ETIMEDOUT } else { errno }),
            );
            end(&flush, 0);
        });
        let second = self.core.spawn(|io| async move {
            io.rest_for(limit).await;
            end_other(&timer, 1);
        });
        alive.set([Some(first), Some(second)]);
    }

    /// Ends the waits of a vring's requests for their store, now and from now on; the second time, those for a server
    /// that has a request and does not answer.
    fn interrupt_vring(&mut self, at: u32, mode: vhost_user::StopMode) {
        let Some(vring) = self.vring(at) else { return };
        vring.interrupt(mode);
        let Some(place) = self.places[at as usize].as_mut() else { return };
        if place.interrupted {
            place.volume.hang_up();
        }
        place.interrupted = true;
        place.slots.iter().for_each(|slot| self.core.interrupt(*slot));
    }

    fn drain(&mut self, volume: &Arc<Volume>, limit: Duration, reply: Reply<bool>) {
        let ours = |of: &Weak<Volume>| of.as_ptr() == Arc::as_ptr(volume);
        let used: Vec<_> =
            self.attached.iter().filter(|(of, _)| ours(of)).map(|(_, at)| at.clone()).collect();
        self.core.spawn(|io| async move {
            let mut drained = true;
            for attached in used {
                drained &= attached.drain(&io, limit).await;
            }
            reply.send(drained);
        });
    }

    /// The volume as this worker uses it: one for all its queues here.
    fn attach(&mut self, volume: &Arc<Volume>, read_only: bool) -> Rc<Attached<Uring>> {
        self.attached.retain(|(of, _)| of.strong_count() > 0);
        let same = self.attached.iter().find(|(of, attached)| {
            of.as_ptr() == Arc::as_ptr(volume)
                && attached.geometry().read_only == (read_only || volume.geometry().read_only)
        });
        if let Some((_, attached)) = same {
            return attached.clone();
        }
        let attached = Rc::new(volume.attach(&self.core, read_only));
        self.attached.push((Arc::downgrade(volume), attached.clone()));
        attached
    }

    fn add_ublk(&mut self, setup: ublk::QueueSetup, lent: Lent, ended: Reply<()>) -> io::Result<()> {
        let attached = self.attach(&lent.volume, setup.read_only);
        let client = Client { flushers: lent.flushers, queue: setup.queue.into() };
        let queue = Rc::new(ublk::Queue::new(&self.core, setup)?);
        let depth = queue.depth();
        let place = self.place(Queue::Ublk(queue), attached, client, lent.volume.limits(), Some(ended));
        for tag in 0..depth {
            self.add_slot(place, tag);
        }
        // The device's start waits until the kernel has every fetch.
        self.core.ring().enter(false)
    }

    fn start_vring(&mut self, setup: vhost_user::VringSetup, lent: Lent) -> io::Result<VringId> {
        let attached = self.attach(&lent.volume, setup.read_only);
        let (log, client) = (attached.clone(), Client { flushers: lent.flushers, queue: setup.index });
        self.kicks = self.kicks.wrapping_add(1);
        let vring = Rc::new(vhost_user::Vring::new(setup)?);
        let start = QueueStart {
            vmm: vring.vmm(),
            at: vring.next_avail(),
            noted: vring.is_noted(),
            doubtful: vring.is_doubtful(),
        };
        if client.flushers.start(&lent.volume, client.queue, start) {
            let vring = vring.label();
            let message = format_args!(
                "{vring}: writes that were not flushed before this service began may be lost with their server: the next flush fails"
            );
            log.log().warn("doubtful", message);
        }
        let place = self.place(Queue::Vring(vring.clone()), attached, client, lent.volume.limits(), None);
        vring.arm_kick(&self.core, UserData::new(Kind::Kick, self.kicks, place));
        // Requests may have been made available before the kick descriptor was ours.
        self.activate(place);
        Ok(VringId(place))
    }

    fn place(
        &mut self,
        queue: Queue,
        volume: Rc<Attached<Uring>>,
        client: Client,
        limits: &Arc<Limits>,
        ended: Option<Reply<()>>,
    ) -> u32 {
        let (slots, watches, alive) = (Vec::new(), Vec::new(), Rc::default());
        let sibling = self.places.iter().flatten().find(|place| place.client.export() == client.export());
        let export_slots = sibling.map(|place| place.export_slots.clone()).unwrap_or_default();
        let interrupted = false;
        let admission = Rc::new(self.throttle.admission(limits));
        let place = Place {
            queue,
            volume,
            client,
            admission,
            export_slots,
            slots,
            watches,
            alive,
            interrupted,
            ended,
        };
        let free = self.places.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.places.push(None);
            self.places.len() - 1
        });
        self.places[index] = Some(place);
        self.suit_queues();
        index as u32
    }

    /// Gives the next tag of a queue its slot.
    fn add_slot(&mut self, index: u32, tag: u16) {
        let Some(place) = self.places[index as usize].as_mut() else { return };
        place.alive.set(place.alive.get() + 1);
        place.export_slots.set(place.export_slots.get() + 1);
        let watch = self.watchdog.watch();
        place.watches.push(watch.clone());
        let slot = self.tasks.add(|io| {
            (self.make)(Seat {
                io,
                queue: place.queue.clone(),
                volume: place.volume.clone(),
                client: place.client.clone(),
                admission: place.admission.clone(),
                tag,
                watch,
                place: index,
                alive: place.alive.clone(),
                deserted: self.deserted.clone(),
            })
        });
        place.slots.push(slot);
        if place.interrupted {
            self.core.interrupt(slot);
        }
    }

    /// Runs where the queues' requests come from.
    fn suit_queues(&mut self) {
        self.affinity.suit(self.places.iter().flatten().map(|place| match &place.queue {
            Queue::Ublk(queue) => Some(queue.cpus()),
            Queue::Vring(_) => None,
        }));
    }

    fn vring(&self, place: u32) -> Option<&Rc<vhost_user::Vring>> {
        match &self.places.get(place as usize)?.as_ref()?.queue {
            Queue::Vring(vring) => Some(vring),
            Queue::Ublk(_) => None,
        }
    }

    fn kicked(&mut self, cqe: &Cqe) {
        let place = cqe.user_data.number();
        let Some(vring) = self.vring(place) else { return };
        if vring.kicked(&self.core, cqe.user_data, cqe.more) {
            self.patience.kicked();
            self.activate(place);
        }
    }

    fn activate(&mut self, place: u32) {
        if !self.active.contains(&place) {
            self.active.push(place);
        }
    }

    /// Looks at every active vring: publishes what completed, takes what is new, so much of each that all get on.
    /// Whether there was any.
    fn pump(&mut self) -> bool {
        let mut worked = false;
        let mut index = 0;
        while let Some(&at) = self.active.get(index) {
            index += 1;
            let Some(vring) = self.vring(at).cloned() else { continue };
            let news = vring.publish();
            vring.tell(news);
            worked |= news;
            while let Some(place) = self.places[at as usize].as_ref() {
                let Some(tag) = place.admission.take(&vring, self.core.ring(), || place.has_slot(&vring))
                else {
                    break;
                };
                worked = true;
                match place.slots.get(tag as usize) {
                    Some(slot) => self.tasks.poll(*slot),
                    None => self.add_slot(at, tag),
                }
            }
            if vring.falls_asleep() {
                index -= 1;
                self.active.swap_remove(index);
            }
        }
        worked
    }

    /// Takes leave of queues that have ended or drained. Whether there were any.
    fn part(&mut self) -> bool {
        let mut parted = false;
        while let Some(at) = { self.deserted.borrow_mut().pop() } {
            if let Some(ended) = self.remove(at).and_then(|place| place.ended) {
                ended.send(());
            }
            parted = true;
        }
        let drained =
            |vring: Option<&Rc<vhost_user::Vring>>| vring.is_none_or(|vring| vring.in_flight() == 0);
        while let Some(index) = self.stopping.iter().position(|(at, _)| drained(self.vring(*at))) {
            let (at, reply) = self.stopping.swap_remove(index);
            let stopped = self.vring(at).map(|vring| {
                vring.publish();
                vring.tell(false);
                vring.disarm_kick(&self.core);
                vring.stopped()
            });
            self.remove(at);
            reply.send(stopped);
            parted = true;
        }
        parted
    }

    fn remove(&mut self, at: u32) -> Option<Place> {
        let place = self.places[at as usize].take()?;
        self.active.retain(|active| *active != at);
        if let Queue::Vring(vring) = &place.queue {
            place.client.flushers.stop(place.client.queue, vring.next_avail());
        }
        place.export_slots.set(place.export_slots.get() - place.slots.len());
        for slot in &place.slots {
            self.tasks.remove(*slot);
        }
        self.suit_queues();
        Some(place)
    }

    /// Whether a guest may bring work soon: looking for it instead of sleeping may pay.
    fn expects_more(&self) -> bool {
        self.active.iter().any(|at| self.vring(*at).is_some_and(|vring| vring.expects_more()))
    }

    /// Asks every active vring for a kick, and looks once more. Whether the worker may sleep.
    fn rest(&mut self) -> bool {
        let mut may_sleep = true;
        let places = &self.places;
        self.active.retain(|at| match places[*at as usize].as_ref().map(|place| (place, &place.queue)) {
            // What it has beyond its slots and its limits is nothing to stay awake for.
            Some((place, Queue::Vring(vring))) if place.admission.waits() || !place.has_slot(vring) => true,
            Some((_, Queue::Vring(vring))) => {
                let quiet = vring.ask_for_kick();
                may_sleep &= quiet;
                !quiet || vring.in_flight() > 0
            }
            _ => false,
        });
        may_sleep
    }
}
