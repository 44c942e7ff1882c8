//! The same load on a disk that the kernel shows: a ublk disk whose ringblk is killed here, or a virtual machine's,
//! whose ringblk others kill.

use super::common::model::{Op, Random};
use super::load::{Load, MAX};
use super::log::Log;
use super::report::{Event, Report, Wrong};
use super::service::{Program, Service};
use super::stamp::{Content, SECTOR, Stamp};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use rustix::io::ReadWriteFlags;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What every O_DIRECT is content with.
const ALIGN: usize = 4096;
const REST: Duration = Duration::from_millis(1);

/// What to do.
pub struct Plan {
    pub path: PathBuf,
    /// Requests in flight.
    pub threads: usize,
    pub seed: u64,
    /// How often to kill the service.
    pub kills: u64,
    /// How often to have a service hand over to its successor.
    pub stops: u64,
    /// The longest that anything may take.
    pub limit: Duration,
}

struct Shared {
    file: File,
    log: Mutex<Log>,
    report: Arc<Report>,
    stop: AtomicBool,
    /// Since when each thread waits, in milliseconds since `start`.
    since: Vec<AtomicU64>,
    start: Instant,
}

/// Memory that O_DIRECT takes.
struct Buffer {
    bytes: Vec<u8>,
    skip: usize,
}

impl Buffer {
    fn new(len: usize) -> Buffer {
        let bytes = vec![0; len + ALIGN];
        let skip = bytes.as_ptr().align_offset(ALIGN);
        Buffer { bytes, skip }
    }

    fn part(&mut self, len: usize) -> &mut [u8] {
        &mut self.bytes[self.skip..self.skip + len]
    }
}

fn open(path: &Path, limit: Duration) -> io::Result<File> {
    let began = Instant::now();
    loop {
        let file = OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_DIRECT).open(path);
        match file {
            Err(_) if began.elapsed() < limit => std::thread::sleep(REST),
            done => return done,
        }
    }
}

impl Shared {
    fn work(&self, index: usize, seed: u64, load: Load) {
        let mut random = Random::new(seed);
        let mut buffer = Buffer::new(MAX as usize * SECTOR);
        let capacity = self.log.lock().unwrap().len();
        while !self.stop.load(Ordering::Acquire) {
            let op = load.next(&mut random, capacity);
            self.since[index].store(self.start.elapsed().as_millis() as u64, Ordering::Release);
            if let Err(error) = self.request(op, &mut buffer, random.below(8) == 0) {
                self.report.wrong(Wrong::Error, format!("{op:?}: {error}"));
            }
            self.since[index].store(u64::MAX, Ordering::Release);
            self.report.completed(1);
        }
    }

    /// One request from start to end. `durable`: a write is on stable storage when it is done.
    fn request(&self, op: Op, buffer: &mut Buffer, durable: bool) -> io::Result<()> {
        let log = || self.log.lock().unwrap();
        match op {
            Op::Read { sector, sectors } => self.read(sector, sectors, buffer),
            Op::Write { sector, sectors } => {
                let bytes = buffer.part(sectors as usize * SECTOR);
                let version = log().write(sector..sector + u64::from(sectors), false);
                Stamp::write_all(log().seed(), sector, version, bytes);
                let flags = if durable { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() };
                let at = sector * SECTOR as u64;
                let written = rustix::io::pwritev2(&self.file, &[IoSlice::new(bytes)], at, flags);
                log().written(version, written == Ok(bytes.len()));
                match written? == bytes.len() {
                    true => Ok(()),
                    false => Err(io::ErrorKind::WriteZero.into()),
                }
            }
            Op::Discard { sector, sectors } => self.zero(
                sector,
                sectors,
                FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            ),
            Op::WriteZeroes { sector, sectors, .. } => self.zero(
                sector,
                sectors,
                FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            ),
            Op::Flush | Op::GetId => self.file.sync_data(),
        }
    }

    fn read(&self, sector: u64, sectors: u32, buffer: &mut Buffer) -> io::Result<()> {
        let bytes = buffer.part(sectors as usize * SECTOR);
        let began = self.log.lock().unwrap().begin_read();
        let done = self.file.read_exact_at(bytes, sector * SECTOR as u64);
        let contents = if done.is_ok() { Content::of_all(bytes) } else { Vec::new() };
        let faults = self.log.lock().unwrap().read(began, sector, &contents);
        self.report.faults(faults);
        done
    }

    fn zero(&self, sector: u64, sectors: u32, how: FallocateFlags) -> io::Result<()> {
        let version = self.log.lock().unwrap().write(sector..sector + u64::from(sectors), true);
        let (at, len) = (sector * SECTOR as u64, u64::from(sectors) * SECTOR as u64);
        let done = loop {
            match fallocate(&self.file, how, at as i64, len as i64) {
                // It lets itself be interrupted, and may be told again.
                Err(Errno::EINTR) => {}
                done => break done,
            }
        };
        self.log.lock().unwrap().written(version, done.is_ok());
        Ok(done?)
    }

    /// The longest that a thread waits now.
    fn longest(&self) -> Duration {
        let now = self.start.elapsed().as_millis() as u64;
        let since = self.since.iter().map(|since| now.saturating_sub(since.load(Ordering::Acquire)));
        Duration::from_millis(since.max().unwrap_or(0))
    }

    fn scan(&self) -> io::Result<()> {
        let mut buffer = Buffer::new(MAX as usize * SECTOR);
        let capacity = self.log.lock().unwrap().len();
        for sector in (0..capacity).step_by(MAX as usize) {
            self.read(sector, MAX.min(capacity - sector) as u32, &mut buffer)?;
        }
        self.report.rescanned();
        Ok(())
    }
}

/// The load, and whoever looks after it.
struct Run<'a> {
    plan: &'a Plan,
    shared: &'a Shared,
    random: Random,
}

impl Run<'_> {
    fn is_over(&self) -> bool {
        if self.shared.longest() > self.plan.limit {
            let text = format!("a request takes longer than {:?}", self.plan.limit);
            self.shared.report.wrong(Wrong::Hang, text);
        }
        !self.shared.report.passed()
    }

    /// Waits for something to complete. False when the run is over.
    fn progress(&self, count: u64) -> bool {
        while self.shared.report.requests() < count {
            if self.is_over() {
                return false;
            }
            std::thread::sleep(REST);
        }
        true
    }

    /// Kills and hand-overs under load, as many as are wanted.
    fn abuse(&mut self, service: &mut Service, control: &Path) {
        let report = &self.shared.report;
        while report.events(Event::Kill) < self.plan.kills || report.events(Event::Stop) < self.plan.stops {
            std::thread::sleep(Duration::from_millis(self.random.below(1000)));
            let some = 1 + self.random.below(200);
            if !self.progress(report.requests() + some) {
                return;
            }
            let left = self.plan.stops - report.events(Event::Stop);
            let all = left + self.plan.kills - report.events(Event::Kill);
            let event = if self.random.below(all) < left { Event::Stop } else { Event::Kill };
            let began = Instant::now();
            match event {
                Event::Stop => {
                    let control = control.to_str().expect("a path of ours");
                    if let Err(error) = service.command(&["stop", "--hand-over", "--control", control]) {
                        return report.wrong(Wrong::Error, format!("no hand-over: {error}"));
                    }
                    service.kill();
                }
                _ => service.kill(),
            }
            report.event(event);
            // Who was already answered may only learn of it now.
            std::thread::sleep(10 * REST);
            let before = report.requests();
            service.start();
            while report.requests() == before {
                if self.is_over() {
                    return report
                        .wrong(Wrong::Hang, format!("the service's log ends:\n{}", service.log_tail()));
                }
                service.revive(report);
                std::thread::sleep(REST);
            }
            report.pause(event, began.elapsed());
        }
    }

    /// Notes how long others keep the load waiting, until we are told to end.
    fn watch(&self, ended: &AtomicBool) {
        let report = &self.shared.report;
        let (mut count, mut since) = (0, Instant::now());
        while !ended.load(Ordering::Acquire) && !self.is_over() {
            std::thread::sleep(REST);
            report.gap(since.elapsed());
            let now = report.requests();
            if now != count {
                (count, since) = (now, Instant::now());
            }
        }
    }
}

/// The load with a service of our own, `program`, or until `ended` is set.
pub fn run(
    plan: &Plan,
    program: Option<(Program, PathBuf)>,
    ended: &AtomicBool,
    report: &Arc<Report>,
) -> io::Result<()> {
    let mut service = program.map(|(program, control)| (program.start(), control));
    let mut file = open(&plan.path, plan.limit)?;
    let sectors = file.seek(SeekFrom::End(0))? / SECTOR as u64;
    let shared = Shared {
        file,
        log: Mutex::new(Log::new(plan.seed, sectors)),
        report: report.clone(),
        stop: AtomicBool::new(false),
        since: (0..plan.threads).map(|_| AtomicU64::new(u64::MAX)).collect(),
        start: Instant::now(),
    };
    let shared = Arc::new(shared);
    let mut run = Run { plan, shared: &shared, random: Random::new(plan.seed) };
    let load = Load { reads: 35, hot: 30, others: 6, block: 1, zeroes: true };
    let spawn = |index: usize| {
        let (shared, seed) = (shared.clone(), plan.seed ^ (index as u64 + 1));
        std::thread::spawn(move || shared.work(index, seed, load))
    };
    let threads: Vec<_> = (0..plan.threads).map(spawn).collect();
    if run.progress(plan.threads as u64) {
        println!("soak: the load is on {}", plan.path.display());
    }
    match &mut service {
        Some((service, control)) => run.abuse(service, control),
        None => run.watch(ended),
    }
    shared.stop.store(true, Ordering::Release);
    let began = Instant::now();
    while threads.iter().any(|thread| !thread.is_finished()) {
        if began.elapsed() > plan.limit {
            report.wrong(Wrong::Hang, "the load does not end");
            return Ok(());
        }
        std::thread::sleep(REST);
    }
    shared.scan()?;
    if let Some((service, _)) = &mut service {
        drop(threads);
        drop(shared);
        service.stop(plan.limit, report);
    }
    Ok(())
}
