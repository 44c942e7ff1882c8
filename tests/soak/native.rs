//! The native soak: rounds of a service, a volume and a guest of random kinds, until enough were killed.

use super::common::model::Random;
use super::guest::Shape;
use super::load::Load;
use super::log::Log;
use super::report::{Event, Report, Wrong};
use super::round::{Over, Paths, Round, VOLUME};
use super::service::{Program, image};
use super::stamp::SECTOR;
use super::store;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Kills in a round; the next has another volume and another guest.
const A_ROUND: u64 = 10;
/// The same where no request survives a kill, since its VMM goes with it.
const A_ROUND_WITHOUT_NOTES: u64 = 3;

/// What to do.
pub struct Plan {
    pub ringblk: PathBuf,
    /// Where the images are: a real disk, or tmpfs.
    pub dir: PathBuf,
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
    fn any(random: &mut Random, mounts: bool) -> Volume {
        let scarce = ["report", "retry", "stop"].get(random.below(9) as usize).copied().filter(|_| mounts);
        let on_error = scarce.map(|policy| format!(",on-error={policy}")).unwrap_or_default();
        let block = [512, 512, 4096][random.below(3) as usize];
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
    while report.events(Event::Kill) < plan.kills && report.passed() {
        let seed = random.number();
        let target = (report.events(Event::Kill) + A_ROUND).min(plan.kills);
        if one(plan, seed, target, report).is_err() && report.passed() {
            report.wrong(Wrong::Hang, "a round ended early");
        }
        if !report.passed() {
            report.wrong(Wrong::Error, format!("the round's seed is {seed}"));
        }
    }
}

/// A round of any kind on a directory of its own; and whether its store is full.
pub fn start(plan: &Plan, dir: &Path, seed: u64, report: &Arc<Report>) -> (Round, Option<&'static str>) {
    let mut random = Random::new(seed);
    let volume = Volume::any(&mut random, plan.mounts);
    let mut shape = Shape::any(&mut random, volume.block);
    shape.inflight &= plan.inflight;
    if volume.scarce.is_some() {
        // So that it fills.
        shape.load = Load { reads: 20, hot: 0, others: 0, block: volume.block };
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
        "soak: seed {seed}: {} MiB{}, {workers} workers, {shape:?}",
        volume.sectors >> 11,
        volume.options
    );
    let args: Vec<OsString> = args.into();
    let service = Program { path: plan.ringblk.clone(), args, log: path("ringblk.log") }.start();
    let round = Round::new(shape, service, paths, Log::new(seed, volume.sectors), plan.limit, report);
    (round, volume.scarce)
}

fn one(plan: &Plan, seed: u64, target: u64, report: &Arc<Report>) -> Result<(), Over> {
    let dir =
        tempfile::Builder::new().prefix("soak-").tempdir_in(&plan.dir).expect("a directory for the images");
    let (round, scarce) = start(plan, dir.path(), seed, report);
    let done = go(round, scarce, target, report);
    if scarce.is_some() {
        store::remove(dir.path());
    }
    done
}

fn go(mut round: Round, scarce: Option<&str>, target: u64, report: &Report) -> Result<(), Over> {
    let target = match round.shape.inflight {
        true => target,
        false => target.min(report.events(Event::Kill) + A_ROUND_WITHOUT_NOTES),
    };
    round.boot()?;
    if let Some(policy) = scarce {
        round.starve(policy)?;
    }
    while report.events(Event::Kill) < target {
        std::thread::sleep(Duration::from_millis(5 + round.random.below(60)));
        match round.random.below(22) {
            // A VMM that does not know what was in flight survives only what ends well.
            0..12 if !round.shape.inflight => round.kill_both()?,
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
