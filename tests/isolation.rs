//! What one export's store or guest does to the others: nothing. The store that hangs is a file system that was frozen,
//! as one is that lies on a server which is gone. Where none can be had, the test is listed as ignored, with the reason on
//! standard error.

mod common;

use common::model::{Op, Queue};
use common::queue::RawQueue;
use common::service::{Service, Setup};
use common::trial::{run_trials, trial};
use common::vmm::{Vmm, everyday};
use nix::unistd::Uid;
use ringblk::service::client::Client as Control;
use ringblk::service::status::ExportStatus;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

const MIB: u64 = 1 << 20;
const OK: u8 = 0;

fn main() -> ExitCode {
    let trials = vec![
        trial("a_frozen_store_on_a_shared_worker", can_freeze(), |()| pending_reason("", "1")),
        trial("a_frozen_store_on_a_worker_of_its_own", can_freeze(), |()| pending_reason("workers=1", "1")),
        trial("a_frozen_store_beside_one_that_is_new", can_freeze(), |()| pending_reason("queues=1", "2")),
    ];
    run_trials(trials)
}

fn can_freeze() -> Result<(), String> {
    if !Uid::effective().is_root() {
        return Err("only root may mount and freeze a file system".into());
    }
    let disk = Disk::new()?;
    command("fsfreeze", &["--freeze".as_ref(), &disk.path])?;
    command("fsfreeze", &["--unfreeze".as_ref(), &disk.path])
}

fn command(program: &str, args: &[&Path]) -> Result<(), String> {
    let output = Command::new(program).args(args).output().map_err(|error| format!("{program}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    output.status.success().then_some(()).ok_or_else(|| format!("{program}: {}", said.trim()))
}

/// An ext4 of its own, mounted.
struct Disk {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Disk {
    fn new() -> Result<Disk, String> {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).map_err(|error| error.to_string())?;
        let (image, path) = (dir.path().join("image"), dir.path().join("mounted"));
        let made = File::create(&image).and_then(|file| file.set_len(64 * MIB));
        made.and_then(|()| std::fs::create_dir(&path)).map_err(|error| error.to_string())?;
        command("mkfs.ext4", &["-q".as_ref(), &image])?;
        command("mount", &["-o".as_ref(), "loop".as_ref(), &image, &path])?;
        Ok(Disk { _dir: dir, path })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = command("umount", &["-l".as_ref(), &self.path]);
    }
}

/// A file system that answers nothing, until this is dropped.
struct Frozen<'a>(&'a Disk);

impl<'a> Frozen<'a> {
    fn new(disk: &'a Disk) -> Frozen<'a> {
        command("fsfreeze", &["--freeze".as_ref(), &disk.path]).unwrap();
        Frozen(disk)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _ = command("fsfreeze", &["--unfreeze".as_ref(), &self.0.path]);
    }
}

fn served(disk: &Disk, options: &str, workers: &str) -> Service {
    let image = disk.path.join("disk");
    File::create(&image).unwrap().set_len(8 * MIB).unwrap();
    let setup = Setup::new().args(["--workers", workers]);
    let setup =
        setup.volume("frozen", &format!("file:{}", image.display())).vhost_user("frozen", "frozen", options);
    setup.volume("good", "memory:8M").vhost_user("good", "good", "").start()
}

fn write(queue: &mut RawQueue, slot: usize) {
    queue.submit(slot, Op::Write { sector: 8 * slot as u64, sectors: 8 });
    queue.kick();
}

/// A write hangs in its store. Meanwhile another export serves, takes a new VMM, and changes its size.
fn pending_reason(options: &str, workers: &str) {
    let disk = Disk::new().unwrap();
    let service = served(&disk, options, workers);
    let (_one, mut frozen) = everyday(&service.path("frozen"));
    let (other, mut good) = everyday(&service.path("good"));
    // The worker learns that it is quick with such writes.
    for slot in 0..16 {
        write(&mut frozen, slot);
        assert_eq!(frozen.wait(), [(slot, OK)]);
    }
    let ice = Frozen::new(&disk);
    write(&mut frozen, 0);
    // For the worker to get around to it.
    std::thread::sleep(Duration::from_millis(300));
    for _ in 0..100 {
        assert_eq!(good.read(0, 8).0, OK);
    }
    drop((other, good));
    service.await_free("good");
    let (_other, mut good) = everyday(&service.path("good"));
    assert_eq!(good.write(0, &[7; 512]), OK);
    let control = Control::new(service.control());
    control.resize("good", 4 * MIB, true).unwrap();
    assert_eq!(good.read(0, 1), (OK, vec![7; 512]));
    let status = control.status().unwrap();
    let own = status.exports.iter().find_map(|export| match export {
        ExportStatus::VhostUser(export) if export.volume == "frozen" => Some(export.workers),
        _ => None,
    });
    assert_eq!(own, Some(options.contains("workers").then_some(1)));
    assert_eq!(status.workers, if own == Some(Some(1)) { 2 } else { workers.parse().unwrap() });
    drop(ice);
    assert_eq!(frozen.wait(), [(0, OK)], "it was only held up");
    let _: &Vmm = &_one;
}
