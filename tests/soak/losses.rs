//! A store that loses acknowledged writes and tells of it once, as the kernel does: a loop device whose file is on a
//! tmpfs that is full.

use super::common::model::{Op, Queue, Random};
use super::common::player::everyday;
use super::common::profile::QEMU;
use super::service::{Program, image};
use super::store;
use std::ffi::OsString;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Nothing takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(30);
/// Bytes of the disk; more than the store has.
const BYTES: u64 = 8 << 20;
/// Bytes of a write.
const CHUNK: usize = 64 << 10;

/// Why there can be no such store here; `None` where there can.
pub fn unavailable(mounts: bool) -> Option<String> {
    if !mounts {
        return Some("no mounts of its own".into());
    }
    match losetup(&["--find"]) {
        Ok(_) => None,
        Err(why) => Some(format!("no loop devices: {why}")),
    }
}

fn losetup(args: &[&str]) -> Result<String, String> {
    let output = Command::new("losetup").args(args).output().map_err(|error| error.to_string())?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}

/// A loop device, and the tmpfs below it.
struct Device<'a> {
    path: String,
    dir: &'a Path,
}

impl Device<'_> {
    fn new(dir: &Path) -> Device<'_> {
        store::scarce(dir).expect("a mount of our own");
        let file = dir.join("disk.img");
        image(&file, BYTES);
        let path = losetup(&["--find", "--show", file.to_str().expect("a path of ours")]);
        Device { path: path.expect("there are loop devices"), dir }
    }
}

impl Drop for Device<'_> {
    fn drop(&mut self) {
        let _ = losetup(&["--detach", &self.path]);
        store::remove(self.dir);
    }
}

/// Rounds: whoever was told of one loss is told of the next.
const ROUNDS: usize = 2;

/// One queue writes more than the store can hold. Then each queue of each export flushes, in any order: every one of
/// them is told once, whoever the kernel told, and only once.
pub fn each_queue_hears_of_a_loss(ringblk: &Path, dir: &Path, seed: u64) {
    let mut random = Random::new(seed);
    let dir = tempfile::tempdir_in(dir).expect("a directory");
    let mount = tempfile::tempdir_in(dir.path()).expect("a directory");
    let device = Device::new(mount.path());
    let names = &["a", "b", "c"][..1 + random.below(3) as usize];
    let workers = 1 + random.below(2);
    let socket = |name: &str| dir.path().join(name);
    let mut args: Vec<OsString> = vec![
        "serve".into(),
        "--control".into(),
        socket("control.sock").into(),
        "--workers".into(),
        workers.to_string().into(),
        "--volume".into(),
        format!("disk=file:{}", device.path).into(),
    ];
    for name in names {
        args.push("--vhost-user".into());
        args.push(format!("disk={},queues=2", socket(name).display()).into());
    }
    let program = Program { path: ringblk.into(), args, log: socket("log") };
    // Before the device is detached.
    let service = program.start();
    let attach = |name: &&str| {
        let began = Instant::now();
        loop {
            match everyday(&QEMU, &socket(name), LIMIT, (QEMU.queues, 4)) {
                Ok(attached) => return attached,
                Err(error) if began.elapsed() > LIMIT => panic!("{error}:\n{}", service.log_tail()),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    };
    let mut guests: Vec<_> = names.iter().map(attach).collect();
    let mut queues: Vec<_> = guests.iter_mut().flat_map(|(_, queues)| queues).collect();
    let data = random.bytes(CHUNK);
    for round in 0..ROUNDS {
        let writer = random.below(queues.len() as u64) as usize;
        assert_eq!(queues[writer].max_len(), CHUNK);
        for sector in (0..BYTES / 512).step_by(CHUNK / 512) {
            assert_eq!(queues[writer].write(sector, &data), 0, "a write to the page cache");
        }
        let mut order: Vec<usize> = (0..queues.len()).collect();
        for at in (1..order.len()).rev() {
            order.swap(at, random.below(at as u64 + 1) as usize);
        }
        for &index in &order {
            let status = queues[index].one(Op::Flush, &[]).0;
            assert_eq!(status, 1, "seed {seed}, round {round}: queue {index} vouches for what was lost");
        }
        for &index in &order {
            let status = queues[index].one(Op::Flush, &[]).0;
            assert_eq!(status, 0, "seed {seed}, round {round}: queue {index} is told twice");
        }
    }
    drop(queues);
    drop(service);
}
