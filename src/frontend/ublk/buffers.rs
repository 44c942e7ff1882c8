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
    of: Arc<BufferUse>,
}

impl Buffers {
    /// Takes `bytes`, which are resident afterwards, and locked where that is allowed.
    ///
    /// # Errors
    /// When all devices' buffers would take more than a quarter of the machine's memory, or there is not so much.
    pub fn new(bytes: usize, of: &Arc<BufferUse>) -> io::Result<Buffers> {
        let taken = TAKEN.load(Ordering::Relaxed) + bytes as u64;
        if let Some(machine) = total_memory()
            && taken > machine / 4
        {
            return Err(io::Error::other(format!(
                "its requests need {} MiB of memory, which makes {} MiB with those of the other queues: more than a quarter \
                 of this machine's {} MiB. Use a smaller depth, max-io or number of queues",
                bytes >> 20,
                taken >> 20,
                machine >> 20
            )));
        }
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
        TAKEN.fetch_add(bytes as u64, Ordering::Relaxed);
        of.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(Buffers { memory, of: of.clone() })
    }

    /// Its first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.memory.as_ptr()
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        let bytes = self.memory.len() as u64;
        TAKEN.fetch_sub(bytes, Ordering::Relaxed);
        self.of.bytes.fetch_sub(bytes, Ordering::Relaxed);
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
}
