//! A worker's loop.

use super::affinity::Affinity;
use super::busy_poll::BusyPoll;
use super::entry::{Client, Finish, QueueEntry};
use super::mailbox::{Mailbox, OnWorker};
use super::meter::Meter;
use super::slot::SlotContext;
use super::slow_requests::SlowRequestLog;
use super::throttle::ThrottleTimer;
use super::{NewQueue, QueueId, WorkerConfig};
use crate::block::Errno;
use crate::engine::{Volume, VolumeChannel};
use crate::frontend::{AnyQueue, Queue};
use crate::ring::{
    Core, Cqe, Kind, Ring, Setup, Sqe, Target, Tasks, Uring, UserData, set_io_flusher, use_stack,
};
use crate::stats::{Count, WorkerStats};
use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Registered buffers a worker has room for: the tags of its zero-copy ublk queues. The kernel's limit is
/// 16384; an entry is a pointer.
const BUFFERS: u32 = 4096;

/// How long an ending worker waits for volumes to take their leave.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(1);

const MAILBOX: UserData = UserData::new(Kind::Mailbox, 0, 0);
const NOBODY: UserData = UserData::new(Kind::Nobody, 0, 0);

/// Makes the calling thread a worker's, with a ring.
pub(super) fn ring(config: WorkerConfig) -> io::Result<Rc<Core<Uring>>> {
    let ring = Uring::new(Setup { buffers: BUFFERS, ..Setup::default() })?;
    set_io_flusher();
    use_stack();
    let core = Core::new(ring);
    core.set_shared(config.shared);
    Ok(core)
}

/// The loop's state. `F` is the type of a slot's future, which has no name; `M` makes one.
pub(super) struct EventLoop<F, M> {
    core: Rc<Core<Uring>>,
    mailbox: Arc<Mailbox>,
    tasks: Tasks<Uring, F>,
    make: M,
    entries: Vec<Option<QueueEntry>>,
    affinity: Affinity,
    busy_poll: BusyPoll,
    slow_requests: SlowRequestLog,
    throttle: ThrottleTimer,
    /// Volumes that are or were in use here: the queues of one share what it keeps for a worker. That lives as long as the
    /// volume, because a connection may have to vouch for writes when all queues are gone that brought them.
    channels: Vec<(Weak<Volume>, Rc<VolumeChannel<Uring>>)>,
    meter: Rc<Meter>,
    /// Queues to look at in each pass: kicked, or with requests in flight. Idle ones cost nothing.
    active: Vec<u32>,
    /// Queues that drain.
    stopping: Vec<(QueueId, Finish)>,
    /// Queues whose last slot has ended.
    finished: Rc<RefCell<Vec<u32>>>,
    /// Queues that have asked for kicks so far: tells a late kick of one that is gone.
    kicks: u32,
    quit: bool,
}

impl<F: Future<Output = ()>, M: Fn(SlotContext) -> F> EventLoop<F, M> {
    /// On the calling thread, which has made `core`.
    pub fn new(
        core: Rc<Core<Uring>>,
        mailbox: Arc<Mailbox>,
        config: WorkerConfig,
        stats: Arc<WorkerStats>,
        make: M,
    ) -> Self {
        EventLoop {
            tasks: Tasks::new(core.clone()),
            core,
            mailbox,
            make,
            entries: Vec::new(),
            affinity: Affinity::of_this_thread(),
            busy_poll: BusyPoll::up_to(config.busy_poll),
            slow_requests: SlowRequestLog::new(config.slow_after),
            throttle: ThrottleTimer::new(),
            meter: Rc::new(Meter::new(stats)),
            channels: Vec::new(),
            active: Vec::new(),
            stopping: Vec::new(),
            finished: Rc::default(),
            kicks: 0,
            quit: false,
        }
    }

    /// Serves until told to quit. One pass: completions, messages, woken slots, new requests, then one `enter`. A pass that
    /// found nothing to do looks again for a while, if a guest may bring more, and then sleeps: an idle worker uses no CPU.
    pub fn run(mut self) {
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
                    Some(Kind::SlowRequests) => self.log_slow(),
                    Some(Kind::Throttle) => self.throttle_expired(&cqe),
                    Some(Kind::Nobody) | None => {}
                }
            }
            worked |= self.tasks.run_ready();
            worked |= self.poll_queues();
            worked |= self.remove_finished();
            if worked {
                self.busy_poll.worked();
                // With nothing to poll only a completion can bring more: one system call instead of two.
                if self.active.is_empty() && self.core.is_quiet() && !self.quit {
                    self.sleep(|stats| &stats.busy);
                } else {
                    self.enter(false);
                    self.meter.spent(|stats| &stats.busy);
                }
                continue;
            }
            let expects_more = self.expects_more();
            if expects_more && self.busy_poll.look_again() {
                // Runs what the kernel has deferred, if it says that there is something.
                self.enter(false);
                std::hint::spin_loop();
                self.meter.spent(|stats| &stats.polling);
            } else if self.arm_kicks() {
                self.busy_poll.sleeps(expects_more);
                self.sleep(|stats| &stats.polling);
            }
        }
        self.shut_down(cqes);
    }

    /// Waits for a completion. `before`: what the time up to now was spent on.
    fn sleep(&self, before: impl Fn(&WorkerStats) -> &Count) {
        self.meter.spent(before);
        self.enter(true);
        self.meter.spent(|stats| &stats.asleep);
    }

    fn enter(&self, wait: bool) {
        self.slow_requests.arm(&self.core);
        let dues = self.entries.iter().flatten().filter_map(|entry| entry.admission.due());
        self.throttle.arm(&self.core, dues);
        if let Err(error) = self.core.ring().enter(wait) {
            // Nothing in flight can complete any more. The process ends, and every client hears of it;
            // silence would leave them waiting.
            log::error!("io_uring_enter: {error}: giving up");
            std::process::abort();
        }
    }

    /// Looks at every active queue: shows what was completed, takes what is new, so much of each that all get on.
    /// Whether there was any.
    fn poll_queues(&mut self) -> bool {
        let mut worked = false;
        let mut index = 0;
        while let Some(&at) = self.active.get(index) {
            index += 1;
            let Some(entry) = self.entries[at as usize].as_ref() else { continue };
            worked |= entry.queue.begin_pass();
            while let Some(entry) = self.entries[at as usize].as_ref() {
                let Some(tag) = entry.poll(self.core.ring()) else { break };
                worked = true;
                match entry.slots.get(tag as usize) {
                    Some(slot) => self.tasks.poll(*slot),
                    None => self.add_slot(at, tag),
                }
            }
            if self.entry(at).is_some_and(|entry| entry.queue.try_idle()) {
                index -= 1;
                self.active.swap_remove(index);
            }
        }
        worked
    }

    /// Gives the next tag of a queue its slot, which takes the request that waits for it.
    fn add_slot(&mut self, at: u32, tag: u16) {
        let Some(entry) = self.entries[at as usize].as_mut() else { return };
        entry.alive.set(entry.alive.get() + 1);
        entry.export_slots.set(entry.export_slots.get() + 1);
        let current = self.slow_requests.slot();
        entry.current.push(current.clone());
        let slot = self.tasks.add(|io| {
            (self.make)(SlotContext {
                io,
                queue: entry.queue.clone(),
                channel: entry.channel.clone(),
                client: entry.client.clone(),
                admission: entry.admission.clone(),
                tag,
                current,
                meter: self.meter.clone(),
                entry: at,
                alive: entry.alive.clone(),
                finished: self.finished.clone(),
            })
        });
        entry.slots.push(slot);
        if entry.interrupted {
            self.core.interrupt(slot);
        }
    }

    /// Takes leave of queues that have ended or drained. Whether there were any.
    fn remove_finished(&mut self) -> bool {
        let mut removed = false;
        while let Some(at) = { self.finished.borrow_mut().pop() } {
            if let Some(entry) = self.remove(at) {
                // Whoever started it may be gone.
                let _ = entry.ended.send(());
            }
            removed = true;
        }
        let drained = |entry: Option<&QueueEntry>| entry.is_none_or(|entry| entry.queue.in_flight() == 0);
        while let Some(index) = self.stopping.iter().position(|(id, _)| drained(self.entry(id.0))) {
            let (id, finish) = self.stopping.swap_remove(index);
            let entry = self.remove(id.0);
            finish(entry.as_ref().map(|entry| {
                entry.queue.close(&self.core);
                &entry.queue
            }));
            removed = true;
        }
        removed
    }

    fn remove(&mut self, at: u32) -> Option<QueueEntry> {
        let entry = self.entries.get_mut(at as usize)?.take()?;
        self.active.retain(|active| *active != at);
        entry.export_slots.set(entry.export_slots.get() - entry.slots.len());
        for slot in &entry.slots {
            self.tasks.remove(*slot);
        }
        self.suit_queues();
        Some(entry)
    }

    fn entry(&self, at: u32) -> Option<&QueueEntry> {
        self.entries.get(at as usize)?.as_ref()
    }

    /// Runs where the queues' requests come from.
    fn suit_queues(&mut self) {
        self.affinity.suit(self.entries.iter().flatten().map(|entry| entry.queue.cpus()));
    }

    fn kicked(&mut self, cqe: &Cqe) {
        let at = cqe.user_data.number();
        let Some(entry) = self.entry(at) else { return };
        if entry.queue.kicked(&self.core, cqe.user_data, cqe.more) {
            self.busy_poll.kicked();
            self.activate(QueueId(at));
        }
    }

    /// Whether a guest may bring work soon: looking for it instead of sleeping may pay.
    fn expects_more(&self) -> bool {
        self.active.iter().any(|at| self.entry(*at).is_some_and(|entry| entry.queue.expects_more()))
    }

    /// Asks every active queue for a kick, and looks once more. Whether the worker may sleep.
    fn arm_kicks(&mut self) -> bool {
        let mut may_sleep = true;
        let entries = &self.entries;
        self.active.retain(|at| match &entries[*at as usize] {
            // What it has beyond its slots and its limits is nothing to stay awake for.
            Some(entry) if entry.is_held_back() => true,
            Some(entry) => {
                let quiet = entry.queue.arm_kick();
                may_sleep &= quiet;
                !quiet || entry.queue.in_flight() > 0
            }
            None => false,
        });
        may_sleep
    }

    fn listen(&self) {
        self.core.push(&Sqe::PollMultishot { file: Target::Fd(self.mailbox.as_raw_fd()) }, MAILBOX);
    }

    fn read_mail(&mut self, cqe: &Cqe) {
        if !cqe.more {
            self.listen();
        }
        for message in self.mailbox.take() {
            message(self);
        }
    }

    /// A timer of the limits is over: slots that wait ask again here, and polled queues when they are looked at.
    fn throttle_expired(&self, cqe: &Cqe) {
        if self.throttle.expired(cqe.user_data) {
            let now = self.core.ring().now();
            let is_due = |entry: &&QueueEntry| entry.admission.due().is_some_and(|due| due <= now);
            self.entries.iter().flatten().filter(is_due).for_each(|entry| entry.admission.wake(&self.core));
        }
    }

    /// Logs the requests that take too long.
    fn log_slow(&self) {
        let all = self.entries.iter().flatten().flat_map(|entry| {
            entry.current.iter().enumerate().map(move |(tag, current)| ((entry, tag), &**current))
        });
        for ((entry, tag), request, age) in self.slow_requests.look(all) {
            let waits_for = entry.channel.waits_for(entry.slots[tag]);
            let (queue, seconds) = (entry.queue.label(), age.as_secs());
            let request = format_args!("{queue}: tag {tag}: {request}");
            let log = entry.channel.log();
            log.warn("slow", format_args!("{request}: not done after {seconds} s: it waits for {waits_for}"));
        }
    }

    /// Lets go of every volume, and gives what they have left to say (an NBD disconnect) a moment.
    fn shut_down(mut self, mut cqes: Vec<Cqe>) {
        self.core.push(&Sqe::Timeout { after: SHUTDOWN_GRACE }, NOBODY);
        for at in 0..self.entries.len() {
            self.remove(at as u32);
        }
        self.channels.clear();
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
}

impl<F: Future<Output = ()>, M: Fn(SlotContext) -> F> OnWorker for EventLoop<F, M> {
    fn core(&self) -> &Rc<Core<Uring>> {
        &self.core
    }

    fn channel(&mut self, volume: &Arc<Volume>, read_only: bool) -> Rc<VolumeChannel<Uring>> {
        self.let_go();
        let same = self.channels.iter().find(|(of, channel)| {
            of.as_ptr() == Arc::as_ptr(volume)
                && channel.geometry().read_only == (read_only || volume.geometry().read_only)
        });
        if let Some((_, channel)) = same {
            return channel.clone();
        }
        let channel = Rc::new(volume.attach(&self.core, read_only));
        self.channels.push((Arc::downgrade(volume), channel.clone()));
        channel
    }

    fn channels(&self, of: Option<&Volume>) -> Vec<Rc<VolumeChannel<Uring>>> {
        let wanted = |volume: &Weak<Volume>| of.is_none_or(|of| std::ptr::eq(volume.as_ptr(), of));
        self.channels
            .iter()
            .filter(|(volume, _)| wanted(volume))
            .map(|(_, channel)| channel.clone())
            .collect()
    }

    fn let_go(&mut self) {
        self.channels.retain(|(of, _)| of.strong_count() > 0);
    }

    fn add(
        &mut self,
        queue: AnyQueue,
        channel: Rc<VolumeChannel<Uring>>,
        new: NewQueue,
        ended: Sender<()>,
    ) -> QueueId {
        let NewQueue { export, number, .. } = new;
        let client = Client { flushers: export.flushers, stats: export.stats, number };
        let sibling = self.entries.iter().flatten().find(|entry| entry.client.export() == client.export());
        let entry = QueueEntry {
            channel,
            admission: Rc::new(self.throttle.admission(export.volume.limits())),
            export_slots: sibling.map(|entry| entry.export_slots.clone()).unwrap_or_default(),
            client,
            slots: Vec::new(),
            current: Vec::new(),
            alive: Rc::default(),
            interrupted: false,
            ended,
            queue: queue.clone(),
        };
        let free = self.entries.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() - 1
        });
        self.entries[index] = Some(entry);
        self.suit_queues();
        let at = index as u32;
        for tag in 0..queue.delivered_tags() {
            self.add_slot(at, tag);
        }
        self.kicks = self.kicks.wrapping_add(1);
        queue.start(&self.core, UserData::new(Kind::Kick, self.kicks, at));
        // Requests may have been made available before the kicks were ours.
        self.activate(QueueId(at));
        QueueId(at)
    }

    fn queue(&self, id: QueueId) -> Option<&AnyQueue> {
        Some(&self.entry(id.0)?.queue)
    }

    fn activate(&mut self, id: QueueId) {
        if self.entry(id.0).is_some() && !self.active.contains(&id.0) {
            self.active.push(id.0);
        }
    }

    fn stop(&mut self, id: QueueId, then: Finish) {
        if let Some(entry) = self.entry(id.0) {
            entry.queue.stop();
        }
        self.stopping.push((id, then));
    }

    fn interrupt(&mut self, id: QueueId) {
        let Some(entry) = self.entries.get_mut(id.0 as usize).and_then(Option::as_mut) else { return };
        if entry.interrupted {
            entry.channel.hang_up();
        }
        entry.interrupted = true;
        entry.slots.iter().for_each(|slot| self.core.interrupt(*slot));
    }

    fn in_flight(&self) -> usize {
        self.slow_requests.in_flight()
    }

    fn limits_changed(&self) {
        self.entries.iter().flatten().for_each(|entry| entry.admission.look_again(&self.core));
    }

    fn quit(&mut self) {
        self.quit = true;
    }
}
