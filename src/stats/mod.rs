//! What was done for whom, and how long it took: counted by the worker that does it, read by anybody.
//!
//! A queue is one worker's at a time, so each of its counters has one writer: a load and a store, no lock and no locked
//! instruction. A request costs one reading of the [clock](Clock) and some ten stores to memory of its queue, 5 to 8 ns in
//! all. Where several are read, they may be of different moments; each for itself never goes back.

mod clock;
mod histogram;

use crate::block::{Errno, Op};
pub use clock::Clock;
pub use histogram::{Histogram, Times};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

/// A number that one thread at a time adds to, and any thread reads.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds to it. By one thread at a time.
    #[inline]
    pub fn add(&self, more: u64) {
        // No read-modify-write: there is no other writer.
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
    }

    /// As it is now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Every operation, in the order in which they are counted.
pub const OPS: [Op; 5] = [Op::Read, Op::Write, Op::Flush, Op::Discard, Op::WriteZeroes];

const fn index(op: Op) -> usize {
    match op {
        Op::Read => 0,
        Op::Write => 1,
        Op::Flush => 2,
        Op::Discard => 3,
        Op::WriteZeroes => 4,
    }
}

/// Requests of one operation, of one queue.
#[derive(Debug, Default)]
struct OpStats {
    bytes: Count,
    times: Histogram,
    errors: Count,
}

/// Different errors that are told apart.
const ERRNOS: usize = 8;

/// What one queue did.
#[derive(Debug, Default)]
pub struct QueueStats {
    begun: Count,
    ended: Count,
    ops: [OpStats; OPS.len()],
    /// Error numbers in the order in which they were met; 0 for none yet.
    errnos: [(AtomicI32, Count); ERRNOS],
    /// What failed with yet another error.
    other_errnos: Count,
}

impl QueueStats {
    /// A request begins.
    #[inline]
    pub fn begin(&self) {
        self.begun.add(1);
    }

    /// A request of so many bytes ends, so many nanoseconds after it began. One that is left to somebody else (`ERESTART`)
    /// is neither a success nor a failure, and is counted by whoever completes it.
    #[inline]
    pub fn end(&self, op: Op, bytes: u64, nanoseconds: u64, result: Result<(), Errno>) {
        self.ended.add(1);
        let stats = &self.ops[index(op)];
        match result {
            Ok(()) => {
                stats.bytes.add(bytes);
                stats.times.record(nanoseconds);
            }
            Err(errno) => self.failed(stats, nanoseconds, errno),
        }
    }

    #[cold]
    fn failed(&self, stats: &OpStats, nanoseconds: u64, errno: Errno) {
        if errno == Errno::ERESTART {
            return;
        }
        stats.times.record(nanoseconds);
        stats.errors.add(1);
        for (known, count) in &self.errnos {
            match known.load(Ordering::Relaxed) {
                0 => known.store(errno.raw(), Ordering::Relaxed),
                other if other != errno.raw() => continue,
                _ => {}
            }
            return count.add(1);
        }
        self.other_errnos.add(1);
    }
}

/// What an export did, on all its queues, since it was started: its clients may come and go.
#[derive(Debug)]
pub struct ExportStats {
    /// A queue that never had a request takes no memory but this.
    queues: Box<[OnceLock<Box<QueueStats>>]>,
}

impl ExportStats {
    /// Of an export with so many queues.
    pub fn new(queues: u16) -> ExportStats {
        ExportStats { queues: (0..queues).map(|_| OnceLock::new()).collect() }
    }

    /// Of queue `index`, for the worker that serves it.
    ///
    /// # Panics
    /// When the export has no such queue.
    pub fn queue(&self, index: usize) -> &QueueStats {
        self.queues[index].get_or_init(Box::default)
    }

    /// All its queues together, as they are now.
    pub fn read(&self) -> Counts {
        let mut counts = Counts::default();
        for queue in self.queues.iter().filter_map(OnceLock::get) {
            counts.add(queue);
        }
        counts
    }
}

/// What was read of an export's counters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests under way.
    pub in_flight: u64,
    /// By operation, in the order of [`OPS`].
    pub ops: [OpCounts; OPS.len()],
    /// Failures by error number, the first met first.
    pub errnos: Vec<(Errno, u64)>,
    /// Failures with further error numbers.
    pub other_errnos: u64,
}

/// What was read of one operation's counters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpCounts {
    /// Of requests that succeeded.
    pub bytes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// How long each request took, those that failed among them.
    pub times: Times,
}

impl Counts {
    fn add(&mut self, queue: &QueueStats) {
        // In this order: never less than nothing.
        let ended = queue.ended.get();
        self.in_flight += queue.begun.get().saturating_sub(ended);
        for (counts, stats) in self.ops.iter_mut().zip(&queue.ops) {
            counts.bytes += stats.bytes.get();
            counts.errors += stats.errors.get();
            stats.times.add_to(&mut counts.times);
        }
        for (errno, count) in &queue.errnos {
            let raw = errno.load(Ordering::Relaxed);
            if raw == 0 {
                continue;
            }
            let errno = Errno::new(raw);
            match self.errnos.iter_mut().find(|(known, _)| *known == errno) {
                Some((_, sum)) => *sum += count.get(),
                None => self.errnos.push((errno, count.get())),
            }
        }
        self.other_errnos += queue.other_errnos.get();
    }
}

/// How a worker spent its time.
#[derive(Debug, Default)]
pub struct WorkerStats {
    /// Nanoseconds in which there was work.
    pub busy: Count,
    /// Nanoseconds in which it looked for work, and there was none.
    pub polling: Count,
    /// Nanoseconds in which it slept.
    pub asleep: Count,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_is_all_its_queues() {
        let stats = ExportStats::new(3);
        assert_eq!(stats.read(), Counts::default());
        for queue in [0, 2, 2] {
            let queue = stats.queue(queue);
            queue.begin();
            queue.begin();
            queue.end(Op::Write, 4096, 5000, Ok(()));
        }
        stats.queue(0).end(Op::Read, 512, 7000, Err(Errno::EIO));
        stats.queue(2).end(Op::Read, 512, 7000, Err(Errno::ERESTART));
        let counts = stats.read();
        assert_eq!(counts.in_flight, 1);
        let [read, write, ..] = &counts.ops;
        assert_eq!((write.bytes, write.errors, write.times.count()), (3 * 4096, 0, 3));
        assert_eq!((read.bytes, read.errors, read.times.count()), (0, 1, 1));
        assert_eq!(counts.errnos, [(Errno::EIO, 1)]);
    }

    #[test]
    fn more_errors_than_have_names_are_counted_all_the_same() {
        let stats = ExportStats::new(1);
        for errno in 1..=ERRNOS as i32 + 3 {
            stats.queue(0).begin();
            stats.queue(0).end(Op::Flush, 0, 1, Err(Errno::new(errno)));
        }
        let counts = stats.read();
        assert_eq!((counts.errnos.len(), counts.other_errnos, counts.ops[2].errors), (ERRNOS, 3, 11));
    }
}
