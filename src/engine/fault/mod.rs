//! A layer for testers: a disk that misbehaves on demand, so that what stands on it can show how it copes.
//!
//! Which request meets which fault is drawn from the seed and the number of the request. The same requests in the same
//! order meet the same faults again; several queues bring them in an order that is theirs.

#![forbid(unsafe_code)]

mod config;
#[cfg(test)]
mod tests;

pub use config::{Chance, FaultConfig, FaultError, Operations};

use super::Volume;
use super::driver::{Capabilities, Driver};
use super::layer::{Layer, Over};
use super::losses::Losses;
use super::node::Edge;
use crate::block::{Errno, Geometry, GeometryError, Op, Request, SECTOR};
use crate::ring::{Io, Ring};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Between two looks of a late request at whether it is to be late still: well below what a service that gives up waits
/// for its requests.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The layer, as all workers share it.
pub struct Fault {
    config: FaultConfig,
    on: AtomicBool,
    /// Nothing is late any more.
    abandoned: AtomicBool,
    /// Requests that were in reach of a fault so far.
    count: AtomicU64,
    /// What was acknowledged and dropped, which the next flush tells of.
    losses: Losses,
}

/// Has the layers of the kind that `volume` stands on, itself perhaps, make faults or none. How many there are.
pub fn switch(volume: &Volume, on: bool) -> usize {
    volume.switch(FaultConfig::NAME, on)
}

/// The store of a volume with it.
pub(super) type FaultStore = Over<Fault>;

impl Fault {
    fn new(config: &FaultConfig) -> Fault {
        Fault {
            on: AtomicBool::new(config.enabled),
            abandoned: AtomicBool::new(false),
            config: config.clone(),
            count: AtomicU64::new(0),
            losses: Losses::default(),
        }
    }

    /// Whether faults are made just now.
    fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Keeps a request waiting, for as long as the faults are not switched off and nobody has given it up.
    async fn delay<R: Ring>(&self, io: &Io<R>) {
        let mut left = Duration::from_millis(self.config.delay);
        while !left.is_zero()
            && self.is_on()
            && !io.is_interrupted()
            && !self.abandoned.load(Ordering::Relaxed)
        {
            let pause = left.min(LONGEST_PAUSE);
            io.rest_for(pause).await;
            left -= pause;
        }
    }

    /// Whether a request is of the operations and the range that faults are for.
    fn reaches(&self, request: &Request<'_>) -> bool {
        let (from, to) = (self.config.from.bytes(), self.config.to.map_or(u64::MAX, |to| to.bytes()));
        // Cannot overflow: it lies within a volume.
        let (start, end) = (request.sector * SECTOR, request.sector * SECTOR + request.len());
        self.config.operations.contains(request.op) && (request.op == Op::Flush || start < to && end > from)
    }
}

/// The chances that one request takes, one after the other.
struct Draw(u64);

impl Draw {
    /// The next number of a sequence that the seed makes (splitmix64).
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn meets(&mut self, chance: Chance) -> bool {
        // Drawn in any case, so that a chance that changes moves none of the others.
        self.next() % u64::from(Chance::CERTAIN) < u64::from(chance.per_million())
    }

    /// From 0 to `most`, which is below 2^32: the numbers are as good as equally likely.
    fn up_to(&mut self, most: u32) -> u32 {
        (self.next() % (u64::from(most) + 1)) as u32
    }
}

impl Layer for Fault {
    fn geometry(&self, below: Geometry) -> Result<Geometry, GeometryError> {
        // Who is not told of a cache does not flush, and would never hear of what was lost.
        let volatile_cache = below.volatile_cache || self.config.lost_writes != Chance::NEVER;
        Ok(Geometry { volatile_cache, ..below })
    }

    fn capabilities(&self, below: Capabilities) -> Capabilities {
        below
    }

    fn bytes_below(&self, bytes: u64) -> u64 {
        bytes
    }

    fn bytes_above(&self, bytes: u64) -> u64 {
        bytes
    }

    fn losses(&self) -> Option<&Losses> {
        Some(&self.losses)
    }

    fn switch(&self, on: bool) -> bool {
        self.on.store(on, Ordering::Relaxed);
        true
    }

    fn abandon(&self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }

    async fn submit<R: Ring>(&self, io: &Io<R>, request: &Request<'_>, below: &Edge<R>) -> Result<(), Errno> {
        if !self.is_on() || !self.reaches(request) {
            return below.submit(io, request).await;
        }
        let config = &self.config;
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let mut draw = Draw(config.seed ^ number.wrapping_mul(0xd134_2543_de82_ef95));
        if draw.meets(config.delays) {
            self.delay(io).await;
            if !self.is_on() {
                // Switched off meanwhile: nothing else is to happen to it.
                return below.submit(io, request).await;
            }
        }
        if draw.meets(config.errors) {
            return Err(config.error.errno());
        }
        let (cut, lose) = match request.op {
            Op::Read => (draw.meets(config.short_reads), false),
            Op::Write => (draw.meets(config.torn_writes), draw.meets(config.lost_writes)),
            Op::Flush | Op::Discard | Op::WriteZeroes => (false, false),
        };
        if cut {
            let block = below.geometry().logical_block / SECTOR as u32;
            let blocks = request.sectors / block;
            // At least the last one is missing.
            let whole = draw.up_to(blocks.saturating_sub(1)) * block;
            below.submit(io, &request.part(0, whole)).await?;
            return Err(Errno::EIO);
        }
        // What was to be durable is either that or an error.
        if lose && !request.flags.fua {
            self.losses.report();
            return Ok(());
        }
        below.submit(io, request).await
    }
}
