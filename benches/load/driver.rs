//! What keeps requests in flight, on queues of any transport.

use crate::{Args, Histogram, Mode, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::time::Instant;

/// One queue of a server. A slot is the number of a request in flight, below the depth; it owns a buffer.
pub trait Queue {
    /// Prepares a request with the slot's buffer, at this byte of the disk; `flush` lets the server see it.
    fn submit(&mut self, write: bool, offset: u64, slot: usize) -> Result<()>;
    /// Shows the server what was submitted, in one go.
    fn flush(&mut self) -> Result<()>;
    /// Appends the slots whose requests are complete, without sleeping. An error of a request is this call's.
    fn complete(&mut self, slots: &mut Vec<usize>) -> Result<()>;
    /// What to sleep on when nothing is complete.
    fn wanted(&self) -> PollFd<'_>;
    /// Told when that woke the client.
    fn woken(&mut self) -> Result<()>;
    /// Takes leave of the server, which may have requests in flight.
    fn close(self) -> Result<()>;
}

/// Bytes of a write's data, and the first contents of any buffer: not compressible, or a compressing store would
/// look faster than it is.
pub fn fill(buffer: &mut [u8]) {
    let mut random = Random(0x853c_49e6_748f_ea9b);
    for chunk in buffer.chunks_mut(8) {
        chunk.copy_from_slice(&random.next().to_le_bytes()[..chunk.len()]);
    }
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// A queue under load.
struct Lane<Q> {
    queue: Q,
    /// When each slot's request was submitted.
    started: Vec<Instant>,
    /// Where the next sequential request is, in requests.
    next: u64,
}

pub struct Load<'a, Q> {
    args: &'a Args,
    lanes: Vec<Lane<Q>>,
    /// Requests of this size on the disk.
    places: u64,
    random: Random,
    pub histogram: Histogram,
    pub done: u64,
}

impl<'a, Q: Queue> Load<'a, Q> {
    /// Fills each queue to its depth. `capacity`: the disk's bytes.
    pub fn start(args: &'a Args, queues: Vec<Q>, capacity: u64) -> Result<Load<'a, Q>> {
        let span = args.span.map_or(capacity, |span| span.bytes().min(capacity));
        let places = span / args.bs.bytes();
        if places == 0 {
            return Err("the disk is smaller than one request".into());
        }
        let (count, depth) = (queues.len() as u64, usize::from(args.depth));
        let lane = |(index, queue)| Lane {
            queue,
            started: vec![Instant::now(); depth],
            next: index as u64 * places / count,
        };
        let lanes = queues.into_iter().enumerate().map(lane).collect();
        let random = Random(0x9e37_79b9_7f4a_7c15);
        let mut load = Load { args, lanes, places, random, histogram: Histogram::new(), done: 0 };
        for index in 0..load.lanes.len() {
            let now = Instant::now();
            for slot in 0..depth {
                load.submit(index, slot, now)?;
            }
            load.lanes[index].queue.flush()?;
        }
        Ok(load)
    }

    fn submit(&mut self, index: usize, slot: usize, now: Instant) -> Result<()> {
        let lane = &mut self.lanes[index];
        let place = match self.args.rw {
            Mode::Randread | Mode::Randwrite => self.random.next() % self.places,
            Mode::Read | Mode::Write => lane.next % self.places,
        };
        lane.next += 1;
        lane.started[slot] = now;
        lane.queue.submit(self.args.rw.writes(), place * self.args.bs.bytes(), slot)
    }

    /// Ends all queues, whatever is in flight.
    pub fn close(self) -> Result<()> {
        self.lanes.into_iter().try_for_each(|lane| lane.queue.close())
    }

    /// Takes what is complete in a queue and submits as many anew. How many there were.
    fn turn(&mut self, index: usize, finished: &mut Vec<usize>) -> Result<usize> {
        self.lanes[index].queue.complete(finished)?;
        let count = finished.len();
        if count == 0 {
            return Ok(0);
        }
        let now = Instant::now();
        for slot in finished.drain(..) {
            let nanos = now.duration_since(self.lanes[index].started[slot]).as_nanos();
            self.histogram.add(nanos as u64);
            self.submit(index, slot, now)?;
        }
        self.lanes[index].queue.flush()?;
        self.done += count as u64;
        Ok(count)
    }

    /// Sleeps until a queue has something.
    fn sleep(&mut self) -> Result<()> {
        let mut fds: Vec<PollFd> = self.lanes.iter().map(|lane| lane.queue.wanted()).collect();
        if poll(&mut fds, PollTimeout::from(10_000u16))? == 0 {
            return Err("no request completes for 10 seconds".into());
        }
        let woken: Vec<bool> = fds.iter().map(|fd| fd.revents() != Some(PollFlags::empty())).collect();
        for (lane, _) in self.lanes.iter_mut().zip(woken).filter(|(_, woken)| *woken) {
            lane.queue.woken()?;
        }
        Ok(())
    }

    /// Loads until `enough` of the requests done and the time says so.
    pub fn until(&mut self, enough: impl Fn(u64, Instant) -> bool) -> Result<()> {
        let mut finished = Vec::with_capacity(usize::from(self.args.depth));
        let mut passes = 0u32;
        loop {
            let mut worked = 0;
            for index in 0..self.lanes.len() {
                worked += self.turn(index, &mut finished)?;
            }
            passes = passes.wrapping_add(1);
            // The clock is read in `turn` anyway; a polling client that finds nothing need not look each time.
            if (worked > 0 || passes.is_multiple_of(256)) && enough(self.done, Instant::now()) {
                return Ok(());
            }
            if worked == 0 {
                if self.args.poll { std::hint::spin_loop() } else { self.sleep()? }
            }
        }
    }
}
