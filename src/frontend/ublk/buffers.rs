//! The memory of a device's requests, which is bounded, there from the start, and locked.
//!
//! The kernel copies a request's data into the buffer of its tag while it may be short of memory: were the page to be
//! found only then, it might have to be written out first, to this very disk.

#![forbid(unsafe_code)]

use crate::ring::Mapping;
use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Bytes that a device's buffers take where the user does not say how large a request may be.
const BUDGET: u64 = 32 << 20;

/// The largest request, in bytes, where the user says nothing: what zero copy gets, which takes no memory.
const MOST: u32 = 512 << 10;

/// And the smallest such limit. Less would cost more than it saves.
const LEAST: u32 = 64 << 10;

/// The largest request of a device with so many tags in all, where the user does not say.
pub fn default_max_io(zero_copy: bool, queues: u16, depth: u16) -> u32 {
    if zero_copy {
        return MOST;
    }
    let each = BUDGET / (u64::from(queues) * u64::from(depth)).max(1);
    let power = u32::try_from(each.max(1)).map_or(MOST, |each| 1 << each.ilog2());
    power.clamp(LEAST, MOST)
}

/// Of all devices of this process.
static TAKEN: AtomicU64 = AtomicU64::new(0);

/// What a device's buffers take.
#[derive(Debug, Default)]
pub struct BufferUse {
    bytes: AtomicU64,
    unlocked: AtomicBool,
}

impl BufferUse {
    /// Bytes of memory.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Whether all of it is sure to stay in memory.
    pub fn locked(&self) -> bool {
        !self.unlocked.load(Ordering::Relaxed)
    }
}

/// Memory for the buffers of a queue.
#[derive(Debug)]
pub(super) struct Buffers {
    memory: Mapping,
    share: Share,
    of: Arc<BufferUse>,
}

/// Bytes of what all may take together, for as long as this lives.
#[derive(Debug)]
struct Share {
    taken: &'static AtomicU64,
    bytes: u64,
}

impl Share {
    /// Takes them before there is any memory for them, in one step: disks are started side by side, and what one is about
    /// to fill counts for the others.
    ///
    /// # Errors
    /// What it would come to, where that is more than `most`.
    fn take(taken: &'static AtomicU64, bytes: u64, most: u64) -> Result<Share, u64> {
        let sum = |taken: u64| taken.checked_add(bytes).filter(|sum| *sum <= most);
        match taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, sum) {
            Ok(_) => Ok(Share { taken, bytes }),
            Err(taken) => Err(taken.saturating_add(bytes)),
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.taken.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Buffers {
    /// Takes `bytes`, which are resident afterwards, and locked where that is allowed.
    ///
    /// # Errors
    /// When all devices' buffers would take more than a quarter of the machine's memory, or there is not so much.
    pub fn new(bytes: usize, of: &Arc<BufferUse>) -> io::Result<Buffers> {
        Buffers::within(&TAKEN, total_memory(), bytes, of)
    }

    /// The same on a machine of so much memory, where it says.
    fn within(
        taken: &'static AtomicU64,
        machine: Option<u64>,
        bytes: usize,
        of: &Arc<BufferUse>,
    ) -> io::Result<Buffers> {
        let most = machine.map_or(u64::MAX, |machine| machine / 4);
        let share = Share::take(taken, bytes as u64, most).map_err(|sum| {
            io::Error::other(format!(
                "its requests need {} MiB of memory, which makes {} MiB with those of the other queues: more than a quarter \
                 of this machine's {} MiB. Use a smaller depth, max-io or number of queues",
                bytes >> 20,
                sum >> 20,
                machine.unwrap_or(u64::MAX) >> 20
            ))
        })?;
        let memory = Mapping::sparse(bytes)?;
        if let Err(error) = memory.lock() {
            memory.populate()?;
            if !of.unlocked.swap(true, Ordering::Relaxed) {
                log::warn!(
                    "{} MiB of request buffers are not locked in memory ({error}): raise RLIMIT_MEMLOCK (LimitMEMLOCK=infinity)",
                    bytes >> 20
                );
            }
        }
        of.bytes.fetch_add(share.bytes, Ordering::Relaxed);
        Ok(Buffers { memory, share, of: of.clone() })
    }

    /// Its first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.memory.as_ptr()
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        self.of.bytes.fetch_sub(self.share.bytes, Ordering::Relaxed);
    }
}

/// Of the machine, in bytes.
fn total_memory() -> Option<u64> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_takes_no_more_than_its_budget() {
        assert_eq!(default_max_io(true, 64, 4096), MOST);
        assert_eq!(default_max_io(false, 1, 8), MOST);
        assert_eq!(default_max_io(false, 1, 128), 256 << 10);
        assert_eq!(default_max_io(false, 2, 128), 128 << 10);
        // As little as is sensible, where so many tags are asked for.
        assert_eq!(default_max_io(false, 64, 4096), LEAST);
    }

    #[test]
    fn buffers_are_there_from_the_start() {
        let of = Arc::new(BufferUse::default());
        let bytes = 1 << 20;
        let buffers = Buffers::new(bytes, &of).unwrap();
        assert_eq!(of.bytes(), bytes as u64);
        assert_eq!(buffers.memory.resident().unwrap(), bytes);
        drop(buffers);
        assert_eq!(of.bytes(), 0);
        let most = total_memory().unwrap();
        let error = Buffers::new(most as usize, &of).unwrap_err().to_string();
        assert!(error.contains("max-io"), "{error}");
        assert_eq!(of.bytes(), 0);
    }

    #[test]
    fn several_at_once_stay_below_the_bound() {
        static TAKEN: AtomicU64 = AtomicU64::new(0);
        const BYTES: usize = 8 << 20;
        let machine = Some(4 * 2 * BYTES as u64);
        let together = std::sync::Barrier::new(8);
        let one = || {
            together.wait();
            Buffers::within(&TAKEN, machine, BYTES, &Arc::default()).ok()
        };
        let had: Vec<Buffers> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(one)).collect();
            threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(had.len(), 2, "two are a quarter of that machine");
        assert_eq!(TAKEN.load(Ordering::Relaxed), 2 * BYTES as u64);
        drop(had);
        assert_eq!(TAKEN.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_could_not_be_had_is_given_back() {
        static TAKEN: AtomicU64 = AtomicU64::new(0);
        // More than there is address space.
        Buffers::within(&TAKEN, None, 1 << 60, &Arc::default()).unwrap_err();
        assert_eq!(TAKEN.load(Ordering::Relaxed), 0);
    }
}
