//! How many system calls a worker of the real service makes for a request: those of its batch, and no other. Where they
//! cannot be watched, the tests are listed as ignored, with the reason on standard error.

mod common;

use common::eventually;
use common::load::Load;
use common::service::{Service, Setup};
use libtest_mimic::{Arguments, Failed, Trial};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

fn main() -> ExitCode {
    let trials = vec![
        trial("of_a_file_for_a_polling_guest", || for_a_request("file", true)),
        trial("of_a_file_for_an_event_driven_guest", || for_a_request("file", false)),
        trial("of_null_for_a_polling_guest", || for_a_request("null", true)),
        trial("of_memory_for_an_event_driven_guest", || for_a_request("memory", false)),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn trial(name: &str, run: impl FnOnce() + Send + 'static) -> Trial {
    match can_watch() {
        Ok(()) => Trial::test(name, move || {
            run();
            Ok(())
        }),
        Err(reason) => {
            eprintln!("SKIP {name}: {reason}");
            let failed = move || Err(Failed::from(format!("cannot be run here: {reason}")));
            Trial::test(name, failed).with_ignored_flag(true)
        }
    }
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

/// One enter and one call a batch at most. How large batches are is the worker's choice; with 32 requests in flight
/// they have 4 on average at least.
fn for_a_request(driver: &str, polls: bool) {
    let setup = Setup::new();
    let what = match driver {
        "file" => {
            let image = setup.image(16 << 20);
            fs::write(&image, vec![7; 16 << 20]).unwrap();
            format!("file:{}", image.display())
        }
        other => format!("{other}:16M"),
    };
    let service = setup.args(["--workers", "1"]).volume("a", &what).door("a", "a", "").start();
    let mut load = Load::connect(&service.path("a"), false, 4096, DEPTH, polls);
    load.run(REQUESTS / 10);
    let log = service.path("strace");
    let watch = Watch::start(worker(&service), &log).unwrap();
    load.run(REQUESTS);
    let mut counts = watch.end();
    fs::remove_file(log).unwrap();
    eprintln!("{driver}, polls: {polls}: {REQUESTS} requests, {counts:?}");
    let (mut enters, mut calls) = (0, 0);
    counts.retain(|name, count| {
        let Some(ring) = name.strip_prefix("io_uring_enter ") else { return true };
        *(if self::calls(&service, ring) { &mut calls } else { &mut enters }) += *count;
        false
    });
    assert!(enters <= REQUESTS / BATCH, "{enters} enters");
    assert!(calls <= if polls { 0 } else { REQUESTS / BATCH }, "{calls} calls");
    assert!(counts.is_empty(), "{counts:?}");
    drop(load);
    eventually("the watch is over", || {
        let status = fs::read_to_string(format!("/proc/{}/status", worker(&service))).unwrap();
        status.lines().any(|line| line.split_whitespace().eq(["TracerPid:", "0"]))
    });
}
