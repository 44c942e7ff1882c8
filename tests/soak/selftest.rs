//! What `cargo test` runs: a short soak, and proof that each kind of wrong is seen.

use super::common::eventually;
use super::common::memory::GuestMemory;
use super::common::model::{Queue, Random};
use super::common::profile::{PROFILES, QEMU};
use super::common::queue::{Layout, RawQueue};
use super::common::ring::Ring;
use super::common::vmm::BASE;
use super::load::Load;
use super::log::{Fault, Kind, Log};
use super::losses;
use super::native::{self, Plan};
use super::queue::{Driver, Shared};
use super::report::{Event, Report, Wrong};
use super::round::Round;
use super::stamp::{Content, SECTOR, Stamp};
use libtest_mimic::{Arguments, Trial};
use nix::sys::signal::Signal;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tempfile::TempDir;

/// `mounts`: stores may be mounted.
pub fn main(mounts: bool) -> ExitCode {
    let unavailable = losses::unavailable(mounts);
    if let Some(why) = &unavailable {
        eprintln!("soak: each_queue_hears_of_a_loss is ignored: {why}");
    }
    let trials = vec![
        trial("each_queue_hears_of_a_loss", each_queue_hears_of_a_loss)
            .with_ignored_flag(unavailable.is_some()),
        trial("a_short_soak", move || a_short_soak(mounts)),
        trial("a_write_that_vanished_is_a_loss", || damaged(Damage::Undone)),
        trial("garbage_is_a_loss", || damaged(Damage::Garbage)),
        trial("blocks_that_swapped_places_are_a_loss", || damaged(Damage::Moved)),
        trial("zeroes_are_a_loss", || damaged(Damage::Zeroed)),
        trial("a_second_completion_is_a_duplicate", a_second_completion),
        trial("a_completion_without_a_call_is_a_hang", a_missing_call),
        trial("a_service_that_stands_still_is_a_hang", a_service_that_stands_still),
        trial("the_log_allows_what_is_in_flight_and_nothing_older", the_log),
        trial("the_log_keeps_failed_writes_apart", failed_writes),
        trial("the_log_minds_when_a_read_began", reads_under_way),
        trial("a_stamp_is_whole_or_torn", stamps),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn trial(name: &str, run: impl FnOnce() + Send + 'static) -> Trial {
    Trial::test(name, move || {
        run();
        Ok(())
    })
}

fn plan(limit: Duration) -> Plan {
    Plan {
        ringblk: env!("CARGO_BIN_EXE_ringblk").into(),
        dir: env!("CARGO_TARGET_TMPDIR").into(),
        profiles: PROFILES.to_vec(),
        seed: 20_261_122,
        kills: 2 * PROFILES.len() as u64,
        inflight: true,
        mounts: false,
        limit,
    }
}

fn each_queue_hears_of_a_loss() {
    let (ringblk, dir) = (env!("CARGO_BIN_EXE_ringblk").as_ref(), env!("CARGO_TARGET_TMPDIR").as_ref());
    (1..=4).for_each(|seed| losses::each_queue_hears_of_a_loss(ringblk, dir, seed));
}

fn a_short_soak(mounts: bool) {
    let report = Arc::new(Report::default());
    native::run(&Plan { mounts, ..plan(Duration::from_secs(30)) }, &report);
    report.print("native");
    assert!(report.passed());
    assert!(report.events(Event::Kill) >= 2 * PROFILES.len() as u64);
    for profile in PROFILES {
        assert!(report.tally_of(profile.name).requests > 0, "{} did nothing", profile.name);
    }
    assert!(report.recoveries() >= 3);
    assert!(report.requests() > 1000);
}

/// A service and a guest that has written for a while.
fn running(limit: Duration) -> (Round, Arc<Report>, TempDir) {
    let report = Arc::new(Report::default());
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let plan = Plan { inflight: false, ..plan(limit) };
    let (mut round, _) = native::start(&plan, &QEMU, dir.path(), plan.seed, &report);
    assert!(round.boot().is_ok());
    assert!(round.scan().is_ok());
    (round, report, dir)
}

/// What is done to an image behind the service's back.
enum Damage {
    /// An acknowledged write is taken back.
    Undone,
    Garbage,
    /// A written block is copied to another place.
    Moved,
    Zeroed,
}

fn damaged(damage: Damage) {
    let (mut round, report, _dir) = running(Duration::from_secs(30));
    let image = OpenOptions::new().read(true).write(true).open(&round.paths.image).unwrap();
    let read = || {
        let mut bytes = vec![0; image.metadata().unwrap().len() as usize];
        image.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    round.rest();
    let before = read();
    round.go_on();
    assert!(round.scan().is_ok());
    round.rest();
    let after = read();
    let is_stamp = |bytes: &[u8], sector: usize| {
        matches!(Content::of(&bytes[sector * SECTOR..][..SECTOR]), Content::Stamp(_))
    };
    let changed = |sector: &usize| {
        let range = sector * SECTOR..(sector + 1) * SECTOR;
        before[range.clone()] != after[range] && is_stamp(&before, *sector) && is_stamp(&after, *sector)
    };
    // In the second half, away from the blocks that are written most.
    let half = before.len() / SECTOR / 2;
    let sector = (half..2 * half).find(changed).expect("something was written twice");
    let of = |bytes: &[u8], sector: usize| bytes[sector * SECTOR..][..SECTOR].to_vec();
    let bad = match damage {
        Damage::Undone => of(&before, sector),
        Damage::Garbage => vec![0x5a; SECTOR],
        Damage::Moved => of(&after, (sector + 1..2 * half).find(|at| is_stamp(&after, *at)).unwrap()),
        Damage::Zeroed => vec![0; SECTOR],
    };
    round.check_image();
    assert!(report.passed(), "undamaged, it is right");
    image.write_all_at(&bad, (sector * SECTOR) as u64).unwrap();
    round.check_image();
    assert_eq!(report.count(Wrong::Loss), 1);
    // And through the export, where nobody writes it again before the scan comes there.
    round.only_read();
    round.go_on();
    assert!(round.scan().is_ok());
    assert!(report.count(Wrong::Loss) >= 2);
}

/// A queue whose device is this test.
fn with_a_device_of_ours(limit: Duration, play: impl FnOnce(&mut Device)) -> Arc<Report> {
    let report = Arc::new(Report::default());
    let shared = Arc::new(Shared::new(Log::new(1, 1 << 10), limit, &report));
    let bytes = RawQueue::bytes(16, 1);
    let memory = Arc::new(GuestMemory::new(BASE, bytes));
    let ring = Ring::new(&memory, BASE, 16, true);
    let mut device =
        Device { call: ring.call.try_clone().unwrap(), used: ring.used, avail: ring.avail, memory, at: 0 };
    let queue = RawQueue::new(ring, Layout::Plain, BASE + Ring::bytes(16), 1);
    assert_eq!(queue.slots(), 1);
    let load = Load { reads: 0, hot: 0, others: 0, block: 1, zeroes: true };
    let driver = Driver::new(queue, 0, &shared, load, false, 1);
    *shared.back.lock().unwrap() = Some(std::time::Instant::now());
    let thread = std::thread::spawn(|| driver.run());
    play(&mut device);
    thread.join().unwrap();
    report
}

/// The device's side of a ring of 16.
struct Device {
    call: vmm_sys_util::eventfd::EventFd,
    memory: Arc<GuestMemory>,
    avail: u64,
    used: u64,
    at: u16,
}

impl Device {
    /// Waits for the next head.
    fn head(&mut self) -> u16 {
        eventually("a request", || {
            u16::from_le(self.memory.half(self.avail + 2).load(Ordering::Acquire)) != self.at
        });
        let place = self.avail + 4 + 2 * u64::from(self.at % 16);
        u16::from_le(self.memory.half(place).load(Ordering::Acquire))
    }

    /// Says that it is done, `count` times.
    fn complete(&mut self, head: u16, count: u16) {
        for _ in 0..count {
            let place = self.used + 4 + 8 * u64::from(self.at % 16);
            self.memory.write(place, &u32::from(head).to_le_bytes());
            self.at += 1;
        }
        self.memory.half(self.used + 2).store(self.at.to_le(), Ordering::Release);
    }
}

fn a_second_completion() {
    let report = with_a_device_of_ours(Duration::from_secs(1), |device| {
        let head = device.head();
        device.complete(head, 2);
        device.call.write(1).unwrap();
    });
    // The first has no status, the second no request.
    assert_eq!(report.count(Wrong::Duplicate), 2);
}

fn a_missing_call() {
    let report = with_a_device_of_ours(Duration::from_secs(1), |device| {
        let head = device.head();
        // Long enough for the driver to have gone to sleep.
        std::thread::sleep(Duration::from_millis(300));
        device.complete(head, 1);
    });
    assert_eq!((report.count(Wrong::Hang), report.count(Wrong::Duplicate)), (1, 0));
}

fn a_service_that_stands_still() {
    let (mut round, report, _dir) = running(Duration::from_secs(2));
    round.service.signal(Signal::SIGSTOP);
    assert!(round.scan().is_err());
    assert!(report.count(Wrong::Hang) >= 1);
    assert_eq!(report.count(Wrong::Loss), 0);
}

fn kinds(log: &mut Log, sector: u64, content: Content) -> Vec<Kind> {
    let began = log.begin_read();
    log.read(began, sector, &[content]).iter().map(|fault| fault.kind).collect()
}

fn stamp(version: u64) -> Content {
    Content::Stamp(Stamp { seed: 7, sector: 3, version })
}

fn the_log() {
    let mut log = Log::new(7, 8);
    assert_eq!(kinds(&mut log, 3, Content::Zeroes), []);
    let first = log.write(2..4, false);
    assert_eq!((kinds(&mut log, 3, Content::Zeroes), kinds(&mut log, 3, stamp(first))), (vec![], vec![]));
    log.written(first, true);
    assert_eq!(
        (kinds(&mut log, 3, Content::Zeroes), kinds(&mut log, 3, stamp(first))),
        (vec![Kind::Lost], vec![])
    );
    // Of two in flight together either may be last, whichever was acknowledged first.
    let (second, third) = (log.write(3..5, false), log.write(0..8, false));
    log.written(third, true);
    assert_eq!(kinds(&mut log, 3, stamp(first)), [Kind::Lost]);
    log.written(second, true);
    assert_eq!((kinds(&mut log, 3, stamp(second)), kinds(&mut log, 3, stamp(third))), (vec![], vec![]));
    assert_eq!(kinds(&mut log, 3, stamp(99)), [Kind::Foreign]);
    assert_eq!(kinds(&mut log, 4, stamp(second)), [Kind::Foreign]);
    assert_eq!(kinds(&mut log, 3, Content::Torn), [Kind::Torn]);
    // A write of zeroes is a write like any other.
    let fourth = log.write(3..4, true);
    log.written(fourth, true);
    assert_eq!(
        (kinds(&mut log, 3, Content::Zeroes), kinds(&mut log, 3, stamp(third))),
        (vec![], vec![Kind::Lost])
    );
}

fn failed_writes() {
    let mut log = Log::new(7, 8);
    let first = log.write(3..4, false);
    log.written(first, false);
    assert_eq!((kinds(&mut log, 3, Content::Zeroes), kinds(&mut log, 3, stamp(first))), (vec![], vec![]));
    let second = log.write(3..4, false);
    log.abandon();
    assert_eq!((kinds(&mut log, 3, stamp(first)), kinds(&mut log, 3, stamp(second))), (vec![], vec![]));
    let third = log.write(3..4, false);
    log.written(third, true);
    assert_eq!(
        (kinds(&mut log, 3, stamp(second)), kinds(&mut log, 3, stamp(third))),
        (vec![Kind::Lost], vec![])
    );
}

fn reads_under_way() {
    let mut log = Log::new(7, 8);
    let first = log.write(3..4, false);
    log.written(first, true);
    let early = log.begin_read();
    let second = log.write(3..4, false);
    log.written(second, true);
    let late = log.begin_read();
    let third = log.write(3..4, false);
    let faults = |faults: Vec<Fault>| faults.len();
    assert_eq!(faults(log.read(late, 3, &[stamp(first)])), 1);
    assert_eq!(faults(log.read(early, 3, &[stamp(first)])), 0);
    // Part of a write, while it is under way and no longer.
    assert_eq!(kinds(&mut log, 3, Content::Torn), []);
    log.written(third, true);
    assert_eq!(kinds(&mut log, 3, Content::Torn), [Kind::Torn]);
}

fn stamps() {
    let mut random = Random::new(1);
    let mut bytes = vec![0; SECTOR];
    assert_eq!(Content::of(&bytes), Content::Zeroes);
    let stamp = Stamp { seed: 1, sector: 2, version: 3 };
    stamp.write(&mut bytes);
    assert_eq!(Content::of(&bytes), Content::Stamp(stamp));
    for _ in 0..100 {
        let mut torn = bytes.clone();
        torn[random.below(SECTOR as u64) as usize] ^= 1 << random.below(8);
        assert_eq!(Content::of(&torn), Content::Torn);
    }
    let mut other = vec![0; SECTOR];
    Stamp { version: 4, ..stamp }.write(&mut other);
    other[..256].copy_from_slice(&bytes[..256]);
    assert_eq!(Content::of(&other), Content::Torn);
}
