//! The native soak: rounds of a service, a volume and a guest of random kinds, until enough were killed.

use super::common::model::Random;
use super::common::profile::Profile;
use super::guest::Shape;
use super::load::Load;
use super::log::Log;
use super::losses;
use super::report::{Event, Report, Wrong};
use super::round::{Over, Paths, Round, VOLUME};
use super::service::{Program, image};
use super::stamp::SECTOR;
use super::store;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

/// The most kills in a round; the next has another VMM, another volume and another guest.
const A_ROUND: u64 = 10;

/// In so many rounds, one on a store that loses what it has acknowledged.
const LOSS_EACH: u64 = 3;

/// What to do.
pub struct Plan {
    pub ringblk: PathBuf,
    /// Where the images are: a real disk, or tmpfs.
    pub dir: PathBuf,
    /// Which VMMs are played, in turn.
    pub profiles: Vec<&'static Profile>,
    pub seed: u64,
    pub kills: u64,
    /// Whether VMMs may keep notes of what is in flight.
    pub inflight: bool,
    /// Whether this process has mounts of its own, and so may have a store that is full.
    pub mounts: bool,
    /// The longest that anything may take.
    pub limit: Duration,
}

/// A volume on a file.
struct Volume {
    sectors: u64,
    block: u64,
    options: String,
    /// Its store is full at first; what shall become of the requests.
    scarce: Option<&'static str>,
}

impl Volume {
    /// Any, for a VMM whose guest learns of blocks of so many sectors at most.
    fn any(random: &mut Random, most_block: u64, mounts: bool) -> Volume {
        let scarce = ["report", "retry", "stop"].get(random.below(9) as usize).copied().filter(|_| mounts);
        let on_error = scarce.map(|policy| format!(",on-error={policy}")).unwrap_or_default();
        let block = [512, 512, 4096][random.below(3) as usize].min(most_block * SECTOR as u64);
        // Not every kernel's tmpfs has O_DIRECT.
        let direct = if random.below(2) == 0 && scarce.is_none() { "on" } else { "off" };
        Volume {
            sectors: (4 + random.below(5)) << 11,
            block: block / SECTOR as u64,
            options: format!(",block-size={block},direct={direct}{on_error}"),
            scarce,
        }
    }
}

/// Runs it all.
pub fn run(plan: &Plan, report: &Arc<Report>) {
    let mut random = Random::new(plan.seed);
    // Each has its turn, even where the ones before it were killed more often than they were to be.
    let a_round = (plan.kills / plan.profiles.len() as u64).clamp(1, A_ROUND);
    let turns = plan.kills.min(plan.profiles.len() as u64);
    let lossy =
        losses::unavailable(plan.mounts).inspect(|why| eprintln!("soak: without losses: {why}")).is_none();
    for (turn, profile) in (0..).zip(plan.profiles.iter().cycle()) {
        let enough = turn >= turns && report.events(Event::Kill) >= plan.kills;
        if enough || !report.passed() {
            return;
        }
        let seed = random.number();
        let target = report.events(Event::Kill) + a_round;
        let before = report.tally();
        let done = one(plan, profile, seed, target, report);
        report.belongs_to(profile.name, before);
        if lossy && turn % LOSS_EACH == 0 {
            losses::each_queue_hears_of_a_loss(&plan.ringblk, &plan.dir, seed);
            report.event(Event::Loss);
        }
        if done.is_err() && report.passed() {
            report.wrong(Wrong::Hang, "a round ended early");
        }
        if !report.passed() {
            report.wrong(Wrong::Error, format!("the round's seed is {seed}"));
        }
    }
}

/// A round of any kind with this VMM on a directory of its own; and whether its store is full.
pub fn start(
    plan: &Plan,
    profile: &'static Profile,
    dir: &Path,
    seed: u64,
    report: &Arc<Report>,
) -> (Round, Option<&'static str>) {
    let mut random = Random::new(seed);
    let volume = Volume::any(&mut random, Shape::most_block(profile), plan.mounts);
    let mut shape = Shape::any(&mut random, profile, volume.block);
    shape.inflight = plan.inflight && profile.protocol.contains(Protocol::INFLIGHT_SHMFD);
    if volume.scarce.is_some() {
        // So that it fills.
        shape.load = Load { reads: 20, hot: 0, others: 0, ..shape.load };
        store::scarce(dir).expect("a mount of our own");
    }
    let path = |name: &str| dir.join(name);
    let paths = Paths { image: path("soak.img"), socket: path("soak.sock"), control: path("control.sock") };
    image(&paths.image, volume.sectors * SECTOR as u64);
    let workers = 1 + random.below(2);
    let args = [
        "serve".into(),
        "--control".into(),
        paths.control.clone().into(),
        "--workers".into(),
        workers.to_string().into(),
        "--volume".into(),
        format!("{VOLUME}=file:{}{}", paths.image.display(), volume.options).into(),
        "--vhost-user".into(),
        format!("{VOLUME}={},queues=2", paths.socket.display()).into(),
    ];
    eprintln!(
        "soak: {}, seed {seed}: {} MiB{}, {workers} workers, {} queues of {} deep, {:?}, event_idx {}, notes {}, {:?}",
        profile.name,
        volume.sectors >> 11,
        volume.options,
        shape.queues,
        shape.depth,
        shape.layout,
        shape.event_idx,
        shape.inflight,
        shape.load,
    );
    let args: Vec<OsString> = args.into();
    let service = Program { path: plan.ringblk.clone(), args, log: path("ringblk.log") }.start();
    let round = Round::new(shape, service, paths, Log::new(seed, volume.sectors), plan.limit, report);
    (round, volume.scarce)
}

fn one(
    plan: &Plan,
    profile: &'static Profile,
    seed: u64,
    target: u64,
    report: &Arc<Report>,
) -> Result<(), Over> {
    let dir =
        tempfile::Builder::new().prefix("soak-").tempdir_in(&plan.dir).expect("a directory for the images");
    let (round, scarce) = start(plan, profile, dir.path(), seed, report);
    let done = go(round, scarce, target, report);
    if scarce.is_some() {
        store::remove(dir.path());
    }
    done
}

fn go(mut round: Round, scarce: Option<&str>, target: u64, report: &Report) -> Result<(), Over> {
    round.boot()?;
    if let Some(policy) = scarce {
        round.starve(policy)?;
    }
    while report.events(Event::Kill) < target {
        std::thread::sleep(Duration::from_millis(5 + round.random.below(60)));
        match round.random.below(22) {
            // One that does not come back, or does not know what was in flight, goes with the service.
            0..12 if !round.shape.survives_kill() => round.kill_both()?,
            0..9 => round.kill()?,
            9..12 => round.kill_twice()?,
            12..14 => round.kill_both()?,
            14..16 => round.kill_vmm()?,
            16..20 => round.restart()?,
            _ => {
                let pages = 1 + round.random.below(64);
                round.grow(8 * pages)?;
            }
        }
        if round.random.below(3) != 0 {
            round.scan()?;
        }
    }
    round.finish()
}
