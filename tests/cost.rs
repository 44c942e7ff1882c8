//! What a request costs in the steady state: no allocation.

mod common;

use common::prepared::{Prepared, READ_4K, Shape};
use ringblk::block::Size;
use ringblk::engine::Volume;
use ringblk::engine::config::{FileConfig, MemoryConfig, NullConfig, VolumeConfig};
use ringblk::service::served_vring::ServedVring;
use ringblk::worker::{ExportVolume, Worker, WorkerConfig};
use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// The system's allocator, which counts what one thread asks of it.
struct Counting;

/// The thread, or 0 for none.
static WATCHED: AtomicI32 = AtomicI32::new(0);
static COUNT: AtomicU64 = AtomicU64::new(0);

fn count() {
    let watched = WATCHED.load(Relaxed);
    if watched != 0 && watched == nix::unistd::gettid().as_raw() {
        COUNT.fetch_add(1, Relaxed);
    }
}

// SAFETY: every call is the system allocator's, with what was asked of us.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count();
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The thread of this process with that name.
fn thread(name: &str) -> i32 {
    let mut threads = fs::read_dir("/proc/self/task").unwrap().map(|entry| entry.unwrap());
    let of = threads.find(|entry| fs::read_to_string(entry.path().join("comm")).unwrap().trim() == name);
    of.expect("the worker's thread").file_name().to_str().unwrap().parse().unwrap()
}

const BATCHES: u32 = 50;

/// Calls of the allocator by a worker in each of several runs of batches of such requests: until one makes none, or
/// there were too many runs. A slot gets its memory when a request first comes to it, and how many are in use at once
/// is up to chance.
fn calls(config: &VolumeConfig, shape: Shape) -> Vec<u64> {
    let worker_config = WorkerConfig {
        busy_poll: Duration::from_micros(50),
        slow_after: Duration::from_secs(10),
        shared: false,
    };
    let worker = Worker::start(7, worker_config).unwrap();
    let volume = Arc::new(Volume::open("cost", config).unwrap());
    let mut guest = Prepared::new(shape);
    ServedVring::start(worker.handle(), guest.setup(true), ExportVolume::new(volume, 1)).unwrap();
    let mut runs = Vec::new();
    while runs.last() != Some(&0) && runs.len() < 10 {
        COUNT.store(0, Relaxed);
        WATCHED.store(thread("ringblk-7"), Relaxed);
        (0..BATCHES).for_each(|_| guest.batch());
        WATCHED.store(0, Relaxed);
        runs.push(COUNT.load(Relaxed));
    }
    guest.check();
    drop(worker);
    runs
}

/// One test, since there is one counter.
#[test]
fn no_allocation_for_a_request() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("image");
    fs::write(&path, vec![7; 4 << 20]).unwrap();
    let file = |path: &Path, direct| {
        let path = path.to_owned();
        VolumeConfig::File(FileConfig {
            path,
            direct,
            read_only: false,
            lock: true,
            format: None,
            block_size: None,
        })
    };
    let volumes = [
        VolumeConfig::Null(NullConfig { size: Size(1 << 30), block_size: None }),
        VolumeConfig::Memory(MemoryConfig { size: Size(64 << 20), block_size: None }),
        file(&path, false),
        file(&path, true),
    ];
    assert_ne!(calls(&volumes[0], READ_4K)[0], 0, "the counter counts those of the first requests");
    for volume in &volumes {
        for write in [false, true] {
            for (segments, indirect) in [(1, false), (4, false), (4, true)] {
                for bytes in [4096, 64 << 10] {
                    let shape = Shape { write, segments, indirect, bytes, ..READ_4K };
                    let calls = calls(volume, shape);
                    assert_eq!(calls.last(), Some(&0), "{calls:?} for {shape:?} on {volume:?}");
                }
            }
        }
    }
}
