//! How many system calls a worker of the real service makes for a request: those of its batch, and no other. Where they
//! cannot be watched, the tests are listed as ignored, with the reason on standard error.

mod common;

use common::eventually;
use common::load::Load;
use common::nbd::Server;
use common::service::{Service, Setup};
use common::trial::{run_trials, trial};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

fn main() -> ExitCode {
    let trials = vec![
        trial("of_a_file_for_a_polling_guest", can_watch(), |()| for_a_request("file", true)),
        trial("of_a_file_for_an_event_driven_guest", can_watch(), |()| for_a_request("file", false)),
        trial("of_null_for_a_polling_guest", can_watch(), |()| for_a_request("null", true)),
        trial("of_memory_for_an_event_driven_guest", can_watch(), |()| for_a_request("memory", false)),
        trial("of_a_buffered_write", can_watch(), |()| for_a_buffered_write()),
        trial("of_misaligned_direct_io", has_direct().and_then(|()| can_watch()), |()| {
            for_misaligned_direct_io()
        }),
        trial("of_an_nbd_write", common::nbd::server().and_then(|()| can_watch()), |()| for_an_nbd_write()),
    ];
    run_trials(trials)
}

/// Whether strace is there and may attach to a process that is not its child.
fn can_watch() -> Result<(), String> {
    let mut child = Command::new("sleep").arg("10").spawn().map_err(|error| format!("sleep: {error}"))?;
    let watch = Watch::start(child.id(), Path::new("/dev/null"));
    let result = watch.map(|watch| drop(watch.end()));
    let _ = child.kill();
    let _ = child.wait();
    result
}

/// Whether files that images are made in can be opened for direct I/O.
fn has_direct() -> Result<(), String> {
    let file =
        tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).map_err(|error| error.to_string())?;
    let opened = fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(file.path());
    opened.map(drop).map_err(|error| format!("no direct I/O where the build is: {error}"))
}

/// A strace on one thread.
struct Watch {
    strace: Child,
    log: std::path::PathBuf,
}

impl Watch {
    /// Returns when it sees everything that the thread does.
    fn start(thread: u32, log: &Path) -> Result<Watch, String> {
        let mut strace = Command::new("strace")
            .args(["-o".as_ref(), log.as_os_str(), "-p".as_ref(), thread.to_string().as_ref()])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("strace: {error}"))?;
        loop {
            if let Some(status) = strace.try_wait().map_err(|error| error.to_string())? {
                return Err(format!("strace cannot attach ({status})"));
            }
            let status = fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
            let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
            if tracer.is_some_and(|pid| pid.trim() == strace.id().to_string()) {
                return Ok(Watch { strace, log: log.to_owned() });
            }
        }
    }

    /// Lets the thread go: how often it made which call, those into a ring apart by its descriptor.
    fn end(mut self) -> BTreeMap<String, usize> {
        kill(Pid::from_raw(self.strace.id() as i32), Signal::SIGINT).unwrap();
        self.strace.wait().unwrap();
        let mut counts = BTreeMap::new();
        for line in fs::read_to_string(&self.log).unwrap().lines() {
            if let Some((name, arguments)) = line.split_once('(')
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            {
                let ring = arguments.split_once(',').filter(|_| name == "io_uring_enter");
                let name = ring.map_or(name.to_owned(), |(ring, _)| format!("{name} {ring}"));
                *counts.entry(name).or_insert(0) += 1;
            }
        }
        counts
    }
}

/// The thread that serves, of a service with one worker.
fn worker(service: &Service) -> u32 {
    let tasks = format!("/proc/{}/task", service.pid());
    let mut tasks = fs::read_dir(tasks).unwrap().map(|entry| entry.unwrap());
    let worker =
        tasks.find(|task| fs::read_to_string(task.path().join("comm")).unwrap().trim() == "ringblk-0");
    worker.expect("a worker").file_name().to_str().unwrap().parse().unwrap()
}

/// Whether a ring is of one entry: one that calls a driver, and no worker's.
fn calls(service: &Service, ring: &str) -> bool {
    let info = fs::read_to_string(format!("/proc/{}/fdinfo/{ring}", service.pid())).unwrap();
    info.lines().any(|line| line.split_whitespace().eq(["SqMask:", "0x0"]))
}

const DEPTH: u32 = 32;
const REQUESTS: usize = 40_000;
const BATCH: usize = 4;

/// Of stores that take longer.
const FEWER: usize = 4000;

/// What is asked of a worker.
struct Work {
    volume: String,
    write: bool,
    polls: bool,
    /// Of the data in guest memory.
    skew: u64,
    requests: usize,
}

/// How often the worker of a service with one volume made which call for it: enters of its own ring, those by which it
/// calls the driver, and the others.
fn made(setup: Setup, work: &Work) -> (usize, usize, BTreeMap<String, usize>) {
    let service = setup.args(["--workers", "1"]).volume("a", &work.volume).vhost_user("a", "a", "").start();
    let mut load = Load::skewed(&service.path("a"), work.write, 4096, DEPTH, work.polls, work.skew);
    load.run(work.requests / 10);
    let log = service.path("strace");
    let watch = Watch::start(worker(&service), &log).unwrap();
    load.run(work.requests);
    let mut counts = watch.end();
    fs::remove_file(log).unwrap();
    eprintln!(
        "{}, write: {}, polls: {}: {} requests, {counts:?}",
        work.volume, work.write, work.polls, work.requests
    );
    let (mut enters, mut calls) = (0, 0);
    counts.retain(|name, count| {
        let Some(ring) = name.strip_prefix("io_uring_enter ") else { return true };
        *(if self::calls(&service, ring) { &mut calls } else { &mut enters }) += *count;
        false
    });
    drop(load);
    eventually("the watch is over", || {
        let status = fs::read_to_string(format!("/proc/{}/status", worker(&service))).unwrap();
        status.lines().any(|line| line.split_whitespace().eq(["TracerPid:", "0"]))
    });
    (enters, calls, counts)
}

fn image(setup: &Setup) -> PathBuf {
    let image = setup.image(16 << 20);
    fs::write(&image, vec![7; 16 << 20]).unwrap();
    image
}

/// One enter and one call a batch at most. How large batches are is the worker's choice; with 32 requests in flight
/// they have 4 on average at least.
fn for_a_request(driver: &str, polls: bool) {
    let setup = Setup::new();
    let volume = match driver {
        "file" => format!("file:{}", image(&setup).display()),
        other => format!("{other}:16M"),
    };
    let work = Work { volume, write: false, polls, skew: 0, requests: REQUESTS };
    let (enters, calls, others) = made(setup, &work);
    assert!(enters <= REQUESTS / BATCH, "{enters} enters");
    assert!(calls <= if polls { 0 } else { REQUESTS / BATCH }, "{calls} calls");
    assert!(others.is_empty(), "{others:?}");
}

/// Where the kernel would hand a buffered write to a thread of its own, the worker makes it: one call each, at most.
fn for_a_buffered_write() {
    let setup = Setup::new();
    let volume = format!("file:{}", image(&setup).display());
    let work = Work { volume, write: true, polls: true, skew: 0, requests: REQUESTS };
    let (enters, calls, mut others) = made(setup, &work);
    let writes = others.remove("pwritev2").unwrap_or(0);
    assert!(writes <= REQUESTS && enters <= REQUESTS && calls == 0, "{writes} writes, {enters} enters");
    assert!(others.is_empty(), "{others:?}");
}

/// The buffers that misaligned data is copied through are there already: no mapping comes or goes.
fn for_misaligned_direct_io() {
    for write in [false, true] {
        let setup = Setup::new();
        let volume = format!("file:{},direct=on", image(&setup).display());
        let work = Work { volume, write, polls: true, skew: 1, requests: FEWER };
        let (_, _, others) = made(setup, &work);
        assert!(others.is_empty(), "{others:?}");
    }
}

/// Everything goes through the ring, and nobody else has the locks that a write takes.
fn for_an_nbd_write() {
    let server = Server::start(&[]);
    let volume = format!("nbd:{}", server.uri());
    let work = Work { volume, write: true, polls: true, skew: 0, requests: FEWER };
    let (_, _, mut others) = made(Setup::new(), &work);
    // The memory allocator may grow its heap once or twice, as requests first wait for replies; not for each.
    let grown = others.remove("mprotect").unwrap_or(0);
    assert!(grown < 16 && others.is_empty(), "{grown} times more heap, {others:?}");
}
