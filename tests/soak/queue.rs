//! One virtqueue under load: a guest's driver that checks all it is told. It knows nothing of connections: the rings
//! are in memory, and whoever serves them may come and go.

use super::common::model::{Op, Queue, Random};
use super::common::queue::{RawQueue, UNTOUCHED};
use super::common::readable;
use super::load::Load;
use super::log::Log;
use super::report::{Report, Wrong};
use super::stamp::{Content, SECTOR, Stamp};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long a queue sleeps before it looks whether it shall end.
const REST: Duration = Duration::from_millis(10);
/// Between two looks of one that polls.
const POLL: Duration = Duration::from_micros(50);
/// Sectors in one read of a scan.
const STRIPE: u64 = 128;

/// What the queues of a guest and the one who kills share.
pub struct Shared {
    pub log: Mutex<Log>,
    pub report: Arc<Report>,
    /// Sectors that may be used.
    pub capacity: AtomicU64,
    /// The guest dies now.
    pub halt: AtomicBool,
    /// No more requests; those in flight are waited for.
    pub drain: AtomicBool,
    /// Requests may fail.
    pub lenient: AtomicBool,
    /// Scans asked for, and done.
    pub scan: AtomicU64,
    pub scanned: AtomicU64,
    /// Since when there is a service; none while there is none.
    pub back: Mutex<Option<Instant>>,
    /// The longest time for a request while there is one.
    pub limit: Duration,
}

impl Shared {
    /// For a volume with this log, and no service yet.
    pub fn new(log: Log, limit: Duration, report: &Arc<Report>) -> Shared {
        let capacity = AtomicU64::new(log.len());
        Shared {
            log: Mutex::new(log),
            report: report.clone(),
            capacity,
            halt: AtomicBool::new(false),
            drain: AtomicBool::new(false),
            lenient: AtomicBool::new(false),
            scan: AtomicU64::new(0),
            scanned: AtomicU64::new(0),
            back: Mutex::new(None),
            limit,
        }
    }
}

/// A request in flight.
#[derive(Clone, Copy)]
struct Pending {
    op: Op,
    /// Version of a write, or when a read began.
    token: u64,
    since: Instant,
    scan: bool,
}

/// A queue and what it has in flight.
pub struct Driver {
    pub queue: RawQueue,
    index: usize,
    shared: Arc<Shared>,
    pub load: Load,
    random: Random,
    pending: Vec<Option<Pending>>,
    /// Looks at the used ring, and waits for no call.
    polls: bool,
    /// The device knows that we sleep.
    armed: bool,
    /// The scan under way: its number, the next sector.
    scan: Option<(u64, u64)>,
}

impl Driver {
    /// A queue with as many requests in flight as it has slots. It `polls`, or sleeps until it is called.
    pub fn new(
        queue: RawQueue,
        index: usize,
        shared: &Arc<Shared>,
        load: Load,
        polls: bool,
        seed: u64,
    ) -> Driver {
        let pending = vec![None; queue.slots()];
        let (shared, random) = (shared.clone(), Random::new(seed));
        Driver { queue, index, shared, load, random, pending, polls, armed: false, scan: None }
    }

    /// Until the guest dies, or all is done.
    pub fn run(mut self) -> Driver {
        while !self.shared.halt.load(Ordering::Acquire) {
            if !self.shared.drain.load(Ordering::Acquire) {
                self.submit();
            } else if self.pending.iter().all(Option::is_none) {
                break;
            }
            self.settle();
            if self.is_stuck() {
                self.shared.report.wrong(Wrong::Hang, self.dump());
                self.shared.halt.store(true, Ordering::Release);
            }
        }
        self
    }

    /// Fills some of the free slots, and rings the bell if the device wants it.
    fn submit(&mut self) {
        let free: Vec<usize> = (0..self.pending.len()).filter(|slot| self.pending[*slot].is_none()).collect();
        if free.is_empty() {
            return;
        }
        let count = 1 + self.random.below(free.len() as u64) as usize;
        for slot in &free[..count] {
            let (op, scan) = self.next();
            let token = self.begin(*slot, op);
            self.pending[*slot] = Some(Pending { op, token, since: Instant::now(), scan });
            self.queue.submit(*slot, op);
        }
        self.queue.kick();
    }

    fn next(&mut self) -> (Op, bool) {
        let capacity = self.shared.capacity.load(Ordering::Acquire);
        let wanted = self.shared.scan.load(Ordering::Acquire);
        // One queue scans; the others go on as ever.
        if self.index == 0 && self.scan.is_none() && wanted != self.shared.scanned.load(Ordering::Acquire) {
            self.scan = Some((wanted, 0));
        }
        match &mut self.scan {
            Some((_, at)) if *at < capacity => {
                let sector = *at;
                *at = (sector + STRIPE).min(capacity);
                (Op::Read { sector, sectors: (*at - sector) as u32 }, true)
            }
            _ => (self.load.next(&mut self.random, capacity), false),
        }
    }

    /// Notes a request in the log and makes its data: version, or when it began.
    fn begin(&mut self, slot: usize, op: Op) -> u64 {
        let mut log = self.shared.log.lock().unwrap();
        match op {
            Op::Read { .. } => log.begin_read(),
            Op::Write { sector, sectors } => {
                let version = log.write(sector..sector + u64::from(sectors), false);
                let seed = log.seed();
                drop(log);
                let mut bytes = vec![0; sectors as usize * SECTOR];
                Stamp::write_all(seed, sector, version, &mut bytes);
                self.queue.put(slot, &bytes);
                version
            }
            Op::Discard { sector, sectors } | Op::WriteZeroes { sector, sectors, .. } => {
                log.write(sector..sector + u64::from(sectors), true)
            }
            Op::Flush | Op::GetId => 0,
        }
    }

    /// Takes what is done, or sleeps until something is. As a driver must, it looks only when it was called, or just
    /// before it sleeps: a call that never comes is a hang.
    fn settle(&mut self) {
        let ring = &mut self.queue.ring;
        let mut ready = self.polls;
        if self.polls {
            if ring.used_idx() == ring.next_used {
                std::thread::sleep(POLL);
            }
        } else if !self.armed {
            let event = ring.avail + 4 + 2 * u64::from(ring.size);
            ring.memory.half(event).store(ring.next_used.to_le(), Ordering::Relaxed);
            // Either the device sees that we want a call, or we see what it used.
            fence(Ordering::SeqCst);
            ready = ring.used_idx() != ring.next_used;
            self.armed = true;
        }
        if !ready {
            // SAFETY: the descriptor is open as long as the ring is.
            let call = unsafe { BorrowedFd::borrow_raw(ring.call.as_raw_fd()) };
            if !readable(call, REST) {
                return;
            }
            // Nobody else reads it, so it is there.
            ring.call.read().expect("a call");
        }
        self.armed = false;
        let used = ring.reap();
        for used in &used {
            match self.queue.completed(used.head) {
                Some((slot, status)) => self.done(slot, status),
                None => {
                    let text =
                        format!("queue {}: head {} completed and is not in flight", self.index, used.head);
                    self.shared.report.wrong(Wrong::Duplicate, text);
                }
            }
        }
        self.shared.report.completed(used.len() as u64);
        self.end_scan();
    }

    fn done(&mut self, slot: usize, status: u8) {
        let Pending { op, token, .. } = self.pending[slot].take().expect("a slot in use");
        let report = &self.shared.report;
        if status == UNTOUCHED {
            report
                .wrong(Wrong::Duplicate, format!("queue {}: {op:?} completed without a status", self.index));
        }
        let good = status == 0;
        if !good && status != UNTOUCHED {
            match self.shared.lenient.load(Ordering::Acquire) {
                true => report.fails(),
                false => {
                    report.wrong(
                        Wrong::Error,
                        format!("queue {}: {op:?} failed with status {status}", self.index),
                    );
                }
            }
        }
        match op {
            Op::Read { sector, sectors } => {
                let mut bytes = vec![0; if good { sectors as usize * SECTOR } else { 0 }];
                self.queue.get(slot, &mut bytes);
                let contents = Content::of_all(&bytes);
                report.faults(self.shared.log.lock().unwrap().read(token, sector, &contents));
            }
            Op::Write { .. } | Op::Discard { .. } | Op::WriteZeroes { .. } => {
                self.shared.log.lock().unwrap().written(token, good);
            }
            Op::Flush | Op::GetId => {}
        }
    }

    fn end_scan(&mut self) {
        let Some((number, at)) = self.scan else { return };
        let whole = at >= self.shared.capacity.load(Ordering::Acquire);
        if whole && !self.pending.iter().flatten().any(|pending| pending.scan) {
            self.scan = None;
            self.shared.report.rescanned();
            self.shared.scanned.store(number, Ordering::Release);
        }
    }

    /// Something is in flight for longer than it may be.
    fn is_stuck(&self) -> bool {
        let Some(back) = *self.shared.back.lock().unwrap() else { return false };
        let oldest = self.pending.iter().flatten().map(|pending| pending.since).min();
        oldest.is_some_and(|since| since.max(back).elapsed() > self.shared.limit)
    }

    /// The ring and what is in flight, for people.
    fn dump(&self) -> String {
        let ring = &self.queue.ring;
        let half = |at: u64| ring.memory.half(at).load(Ordering::Relaxed);
        let size = u64::from(ring.size);
        let mut text = format!(
            "queue {}: no completion for {:?}: avail idx {}, used idx {} (we are at {}), avail event {}, used event {}, \
             event_idx {}, in flight:",
            self.index,
            self.shared.limit,
            half(ring.avail + 2),
            ring.used_idx(),
            ring.next_used,
            half(ring.used + 4 + 8 * size),
            half(ring.avail + 4 + 2 * size),
            ring.event_idx,
        );
        for (slot, pending) in self.pending.iter().enumerate() {
            if let Some(Pending { op, since, .. }) = pending {
                text.push_str(&format!("\n  slot {slot}: {op:?} for {:?}", since.elapsed()));
            }
        }
        text
    }
}
