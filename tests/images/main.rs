//! The `image` commands beside services, virtual machines, mounts and limits, and what is left of them when they are
//! killed. Where something is missing, the test is listed as ignored, with the reason on standard error.

mod attributes;
#[path = "../common/mod.rs"]
mod common;
mod exports;

use common::eventually;
use common::service::Setup;
use common::trial::{run_trials, trial};
use common::vmm::everyday;
use nix::unistd::Uid;
use ringblk::service::client::Client as Control;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output, Stdio};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const OK: u8 = 0;

fn main() -> ExitCode {
    let trials = vec![
        trial("a_served_image_is_neither_replaced_nor_copied", Ok(()), |()| served()),
        trial("qemu_img_and_we_keep_off_each_others_images", tool("qemu-img"), |()| qemu()),
        trial("what_is_replaced_keeps_owner_and_mode", root(), |()| attributes::owner()),
        trial(
            "what_is_replaced_keeps_its_lists_and_attributes",
            attributes::attributes(),
            attributes::keeps_attributes,
        ),
        trial("what_is_new_is_its_owners_alone", Ok(()), |()| attributes::private()),
        trial("what_is_replaced_is_no_more_open", attributes::lists(), attributes::more_open),
        trial("another_users_image_is_not_made_ones_own", attributes::stranger(), |dir| {
            attributes::strangers(&dir)
        }),
        trial("without_links_images_are_made_and_replaced", Ok(()), |()| without_links()),
        trial("a_limit_on_file_sizes_is_an_error", Ok(()), |()| limited()),
        trial("a_killed_copy_leaves_nothing", Ok(()), |()| killed(&[])),
        trial("a_killed_copy_without_nameless_files_is_cleared", Ok(()), |()| killed(&[libc::SYS_linkat])),
        trial("exports_are_copied_from_and_to", common::nbd::server(), |()| exports::exports()),
        trial("an_export_that_cannot_be_an_end", common::nbd::server(), |()| exports::unsuitable_exports()),
        trial("an_export_is_copied_to_its_last_byte", common::nbd::server(), |()| exports::odd()),
        trial("a_mounted_device_is_in_use", mounted(), |mount| in_use(&mount)),
    ];
    run_trials(trials)
}

fn root() -> Result<(), String> {
    if Uid::effective().is_root() { Ok(()) } else { Err("only root may do that".into()) }
}

fn tool(name: &str) -> Result<(), String> {
    let found = Command::new(name).arg("--version").stdout(Stdio::null()).status();
    if found.is_ok_and(|status| status.success()) { Ok(()) } else { Err(format!("no {name} here")) }
}

/// A directory on a disk, where the build is: the system's temporary one may be in memory.
fn place() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn image(path: &Path, bytes: &[u8], size: u64) {
    fs::write(path, bytes).unwrap();
    File::options().write(true).open(path).unwrap().set_len(size).unwrap();
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringblk"));
    command.args(args).stdin(Stdio::null());
    command
}

fn copy_command(options: &[&str], source: &Path, destination: &Path) -> Command {
    let mut command = command(&["image", "copy", "--quiet"]);
    command.args(options).arg(source).arg(destination);
    command
}

fn copy(options: &[&str], source: &Path, destination: &Path) -> (i32, String) {
    said(copy_command(options, source, destination).output().unwrap())
}

fn said(output: Output) -> (i32, String) {
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code().unwrap_or_else(|| panic!("{}: {error}", output.status)), error)
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Has a command's process refused these system calls.
fn without(mut command: Command, calls: &[i64]) -> Command {
    if calls.is_empty() {
        return command;
    }
    let rules: BTreeMap<i64, _> = calls.iter().map(|call| (*call, Vec::new())).collect();
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let filter: BpfProgram =
        SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch).unwrap().try_into().unwrap();
    // SAFETY: one system call with memory that is ready.
    unsafe { command.pre_exec(move || seccompiler::apply_filter(&filter).map_err(std::io::Error::other)) };
    command
}

fn served() {
    let dir = place();
    let (source, other) = (dir.path().join("source"), dir.path().join("other"));
    image(&source, &[1; 4096], MIB);
    let setup = Setup::new();
    let disk = setup.image(MIB);
    let service = setup.volume("v", &format!("file:{}", disk.display())).vhost_user("v", "a", "").start();
    let (_vmm, mut queue) = everyday(&service.path("a"));
    assert_eq!(queue.write(0, &[7; 4096]), OK);
    let inode = fs::metadata(&disk).unwrap().ino();
    let (code, error) = copy(&["--force"], &source, &disk);
    assert!(code == 1 && error.contains("in use") && error.contains("ringblk (process "), "{code}: {error}");
    let (code, error) = copy(&[], &disk, &other);
    assert!(code == 1 && error.contains("--force-share") && !other.exists(), "{code}: {error}");
    let info =
        |options: &[&str]| said(command(&["image", "info"]).args(options).arg(&disk).output().unwrap());
    let (code, error) = info(&[]);
    assert!(code == 1 && error.contains("--force-share"), "{code}: {error}");
    assert_eq!(info(&["-U", "--json"]).0, 0);
    assert_eq!(fs::metadata(&disk).unwrap().ino(), inode);
    let (code, error) = copy(&["-U"], &disk, &other);
    assert_eq!(code, 0, "{error}");
    assert_eq!(fs::read(&other).unwrap()[..4096], [7; 4096]);
    assert_eq!(queue.read(0, 8), (OK, vec![7; 4096]));
    drop((_vmm, queue));
    // One that is served read-only may be read by others.
    let setup = Setup::new().volume("v", &format!("file:{},read-only=on", other.display()));
    let _service = setup.vhost_user("v", "a", "").start();
    assert_eq!(copy(&[], &other, &dir.path().join("third")).0, 0);
    assert_eq!(copy(&["--force"], &source, &other).0, 1);
}

fn qemu() {
    let dir = place();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    image(&a, &[1; 4096], MIB);
    image(&b, &[2; 4096], MIB);
    // It has the image until its standard input ends, and greets once it has it.
    let mut writer = Command::new("qemu-io");
    let writer = writer.args(["-f", "raw"]).arg(&b).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut writer = writer.spawn().unwrap();
    std::io::Read::read_exact(writer.stdout.as_mut().unwrap(), &mut [0; 1]).unwrap();
    let (code, error) = copy(&["--force"], &a, &b);
    assert!(code == 1 && error.contains("qemu-io (process "), "{code}: {error}");
    assert_eq!(copy(&[], &b, &dir.path().join("c")).0, 1);
    assert_eq!(copy(&["--force-share"], &b, &dir.path().join("c")).0, 0);
    drop(writer.stdin.take());
    writer.wait().unwrap();
    eventually("its lock goes with it", || copy(&["--force"], &a, &b).0 == 0);
    // What it makes is no raw image.
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(dir.path().join("q"))
        .arg("1M")
        .status();
    assert!(made.unwrap().success());
    let (code, error) = copy(&[], &dir.path().join("q"), &dir.path().join("d"));
    assert!(code == 1 && error.contains("qcow2") && error.contains("--format=raw"), "{error}");
    let info = command(&["image", "info", "--json"]).arg(dir.path().join("q")).output().unwrap();
    assert!(String::from_utf8_lossy(&info.stdout).contains("\"format\": \"qcow2\""));
    let volume = |options: &str| format!("file:{}{options}", dir.path().join("q").display());
    let (code, error) = Setup::new().volume("v", &volume("")).vhost_user("v", "a", "").refused();
    assert!(code == 1 && error.contains("qcow2") && error.contains("format=raw"), "{code}: {error}");
    drop(Setup::new().volume("v", &volume(",format=raw")).vhost_user("v", "a", "").start());
}

fn without_links() {
    let dir = place();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let calls = [libc::SYS_linkat, libc::SYS_link];
    let mut create = command(&["image", "create"]);
    create.arg(&a).arg("1M");
    assert_eq!(said(without(create, &calls).output().unwrap()).0, 0);
    File::options().write(true).open(&a).unwrap().write_all_at(&[1; 4096], 0).unwrap();
    for options in [&[][..], &["--force"]] {
        let (code, error) = said(without(copy_command(options, &a, &b), &calls).output().unwrap());
        assert_eq!(code, 0, "{error}");
        assert!(fs::read(&a).unwrap() == fs::read(&b).unwrap());
    }
    let (code, error) = said(without(copy_command(&[], &a, &b), &calls).output().unwrap());
    assert!(code == 1 && error.contains("already exists"), "{error}");
    // Nor a rename that replaces nothing.
    let calls = [libc::SYS_linkat, libc::SYS_link, libc::SYS_renameat2];
    let c = dir.path().join("c");
    let (code, error) = said(without(copy_command(&[], &a, &c), &calls).output().unwrap());
    assert!(code == 1 && error.contains("Operation not permitted"), "a refusal is one: {error}");
    assert_eq!(names(dir.path()), ["a", "b"]);
}

/// With a limit on the size of what the process writes.
fn limited() {
    let dir = place();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    image(&a, &[1; 4096], 4 * MIB);
    let limit = |mut command: Command| {
        let limit = libc::rlimit { rlim_cur: 2 * MIB, rlim_max: 2 * MIB };
        // SAFETY: one system call, which is allowed between fork and exec.
        unsafe {
            command.pre_exec(move || match libc::setrlimit(libc::RLIMIT_FSIZE, &limit) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            })
        };
        command
    };
    let b_name = b.to_str().unwrap();
    let create = |size| limit(command(&["image", "create", b_name, size]));
    let preallocate = limit(command(&["image", "create", "--preallocate", b_name, "4M"]));
    for job in [create("4M"), preallocate, limit(copy_command(&[], &a, &b))] {
        let (code, error) = said({ job }.output().unwrap());
        assert!(
            code == 1 && error.contains("File too large") && error.contains("ulimit -f"),
            "{code}: {error}"
        );
        assert_eq!(names(dir.path()), ["a"]);
    }
    assert_eq!(said(create("1M").output().unwrap()).0, 0);
    // A service goes on, for whoever stays within the limit.
    let setup = Setup::new();
    let disk = setup.image(MIB);
    let setup = setup.volume("v", &format!("file:{}", disk.display())).vhost_user("v", "a", "");
    let command = limit(setup.command());
    let service = setup.start_as(command);
    let (_vmm, mut queue) = everyday(&service.path("a"));
    let error = Control::new(service.control()).resize("v", 4 * MIB, false).unwrap_err().to_string();
    assert!(error.contains("File too large"), "{error}");
    assert_eq!(fs::metadata(&disk).unwrap().len(), MIB);
    assert_eq!(queue.write(0, &[7; 4096]), OK);
}

/// A copy that is killed when it has begun to write, and another one after it.
fn killed(calls: &[i64]) {
    let dir = place();
    let (source, target) = (dir.path().join("source"), dir.path().join("target"));
    image(&source, &vec![1; 64 << 20], 65 * MIB);
    // An empty file may be the one that tries links out, which has a name for a moment.
    let has_begun = |process: u32| {
        let mut open = fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().flatten();
        let is_target = |path: &Path| {
            fs::read_link(path).is_ok_and(|file| file.starts_with(dir.path()) && file != source)
                && fs::metadata(path).is_ok_and(|file| file.len() > 0)
        };
        open.any(|file| is_target(&file.path()))
    };
    let mut met = 0;
    eventually("a copy is met in the middle", || {
        let mut job = without(copy_command(&["--depth", "1"], &source, &target), calls).spawn().unwrap();
        while job.try_wait().unwrap().is_none() {
            if has_begun(job.id()) {
                met += 1;
                job.kill().unwrap();
            }
        }
        if target.exists() {
            assert!(fs::read(&target).unwrap() == fs::read(&source).unwrap(), "whole, or not there");
            fs::remove_file(&target).unwrap();
        } else if calls.is_empty() {
            assert_eq!(names(dir.path()), ["source"]);
        }
        met >= 3
    });
    // What is left for certain: of a job that had a name for its file, and died.
    let left = dir.path().join(".ringblk-1-0.tmp");
    fs::write(&left, [0; 4096]).unwrap();
    // One that lives is not touched.
    let lives = dir.path().join(".ringblk-1-1.tmp");
    fs::write(&lives, [0; 4096]).unwrap();
    let owner = File::open(&lives).unwrap();
    assert_eq!(ringblk::engine::file::try_take(&owner, ringblk::engine::file::Access::Write), Ok(true));
    eventually("locks of the dead are gone", || {
        let _ = fs::remove_file(&target);
        let (code, error) = said(without(copy_command(&[], &source, &target), calls).output().unwrap());
        assert_eq!(code, 0, "{error}");
        names(dir.path()) == [".ringblk-1-1.tmp", "source", "target"]
    });
}

/// A file system on a loop device, mounted; gone when this is dropped.
struct Mount {
    dir: TempDir,
    device: PathBuf,
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.dir.path().join("mnt")).status();
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
    }
}

fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(args).output().map_err(|error| format!("{program}: {error}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        false => Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

fn mounted() -> Result<Mount, String> {
    root()?;
    let dir = place();
    let [disk, mnt] = ["disk", "mnt"].map(|name| dir.path().join(name).display().to_string());
    image(Path::new(&disk), &[], 32 * MIB);
    fs::create_dir(&mnt).map_err(|error| error.to_string())?;
    run("mkfs.ext4", &["-q", &disk])?;
    let device = run("losetup", &["--find", "--show", &disk])?;
    let mount = Mount { dir, device: device.clone().into() };
    run("mount", &[&device, &mnt]).map(|_| mount)
}

fn in_use(mount: &Mount) {
    let (mnt, source, other) =
        (mount.dir.path().join("mnt"), mount.dir.path().join("source"), mount.dir.path().join("other"));
    image(&source, &[1; 4096], MIB);
    let serve = |options: &str| {
        let setup = Setup::new().volume("v", &format!("file:{}{options}", mount.device.display()));
        setup.vhost_user("v", "a", "")
    };
    let (code, error) = serve("").refused();
    assert!(code == 1 && error.contains("lock=off"), "{code}: {error}");
    assert!(error.contains(&format!("mounted at {}", mnt.display())), "{error}");
    let (code, error) = copy(&["--force"], &source, &mount.device);
    assert!(code == 1 && error.contains("mounted at"), "{code}: {error}");
    let (code, error) = copy(&[], &mount.device, &other);
    assert!(code == 1 && error.contains("--force-share"), "{code}: {error}");
    assert_eq!(copy(&["-U"], &mount.device, &other).0, 0);
    assert_eq!(said(command(&["image", "info"]).arg(&mount.device).output().unwrap()).0, 0);
    // Read-only, and at one's own risk.
    drop(serve(",read-only=on").start());
    drop(serve(",lock=off").start());
    assert!(Command::new("umount").arg(&mnt).status().unwrap().success());
    let service = serve("").start();
    let again = run("mount", &[mount.device.to_str().unwrap(), mnt.to_str().unwrap()]);
    assert!(again.is_err(), "what is served is not mounted");
    let (code, error) = copy(&["--force"], &source, &mount.device);
    assert!(code == 1 && error.contains("ringblk (process "), "{code}: {error}");
    drop(service);
    assert_eq!(copy(&["--force"], &source, &mount.device).0, 0);
    assert_eq!(copy(&["--force"], &mount.device, &other).0, 0);
    let (whole, part) = (fs::read(&other).unwrap(), fs::read(&source).unwrap());
    assert!(whole.len() == 32 << 20 && whole[..part.len()] == part);
}
