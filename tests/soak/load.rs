//! What is asked of a disk: reads, writes and the rest in random places and sizes, some of it again and again in the
//! same few blocks, so that writes overlap in flight.

use super::common::model::{Op, Random};

/// The most sectors in one request.
pub const MAX: u64 = 64;
/// Places where writes meet, of 4 KiB each.
const HOT: u64 = 6;
const PAGE: u64 = 8;

/// A kind of load.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Percent of the requests that read.
    pub reads: u64,
    /// Percent of the writes that go to the few hot blocks.
    pub hot: u64,
    /// Percent of the requests that flush, discard, or zero.
    pub others: u64,
    /// Sectors in a logical block: what ranges are multiples of.
    pub block: u64,
    /// Whether the others may discard and zero; otherwise they flush.
    pub zeroes: bool,
}

impl Load {
    /// Any.
    pub fn any(random: &mut Random, block: u64, zeroes: bool) -> Load {
        Load {
            reads: [20, 35, 60][random.below(3) as usize],
            hot: [0, 20, 90][random.below(3) as usize],
            others: [0, 5, 12][random.below(3) as usize],
            block,
            zeroes,
        }
    }

    /// The next request to a disk of so many sectors.
    pub fn next(&self, random: &mut Random, capacity: u64) -> Op {
        let dice = random.below(100);
        if dice < self.others {
            let (sector, sectors) = self.range(random, capacity);
            return match random.below(4) {
                0 | 1 => Op::Flush,
                _ if !self.zeroes => Op::Flush,
                2 => Op::Discard { sector, sectors },
                _ => Op::WriteZeroes { sector, sectors, unmap: random.below(2) == 0 },
            };
        }
        let hot = random.below(100) < self.hot;
        let (sector, sectors) = if hot {
            (random.below(HOT) * (capacity / HOT / PAGE * PAGE), PAGE as u32)
        } else {
            self.range(random, capacity)
        };
        if dice < self.others + self.reads {
            Op::Read { sector, sectors }
        } else {
            Op::Write { sector, sectors }
        }
    }

    /// Mostly 4 KiB, some single blocks, some long and crooked.
    fn range(&self, random: &mut Random, capacity: u64) -> (u64, u32) {
        let sectors = match random.below(10) {
            0..=6 => PAGE,
            7 | 8 => self.block,
            _ => (1 + random.below(MAX / self.block)) * self.block,
        };
        let grain = if sectors == PAGE { PAGE } else { self.block };
        (random.below((capacity - sectors) / grain + 1) * grain, sectors as u32)
    }
}
