//! What a file is besides its contents, which one that takes its place keeps.

use super::{command, copy, copy_command, image, names, place, root, said, without};
use nix::unistd::Uid;
use rustix::fs::{XattrFlags, fgetxattr, fremovexattr, fsetxattr};
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use tempfile::TempDir;

pub fn owner() {
    let dir = place();
    let (source, disk) = (dir.path().join("source"), dir.path().join("disk"));
    image(&source, &[1; 4096], 4096);
    for calls in [&[][..], &[libc::SYS_linkat, libc::SYS_link]] {
        image(&disk, &[2; 512], 512);
        std::os::unix::fs::chown(&disk, Some(1000), Some(1001)).unwrap();
        fs::set_permissions(&disk, fs::Permissions::from_mode(0o6660)).unwrap();
        let copied = without(copy_command(&["--force"], &source, &disk), calls).output().unwrap();
        assert_eq!(said(copied).0, 0);
        let found = fs::metadata(&disk).unwrap();
        assert_eq!((found.uid(), found.gid(), found.mode() & 0o7777), (1000, 1001, 0o6660));
        assert_eq!(fs::read(&disk).unwrap(), [1; 4096]);
        assert_eq!(names(dir.path()), ["disk", "source"]);
    }
}

/// An access control list of `acl(5)` as the kernel keeps it: version 2, then tag, permissions and number of each entry.
/// One more user may read.
const LIST: &[u8] = b"\x02\0\0\0\
    \x01\0\x06\0\xff\xff\xff\xff\x02\0\x04\0\x07\0\0\0\x04\0\x04\0\xff\xff\xff\xff\
    \x10\0\x04\0\xff\xff\xff\xff\x20\0\0\0\xff\xff\xff\xff";

/// Names and values.
pub type Attributes = Vec<(&'static str, &'static [u8])>;

/// A place and the attributes that files can have there.
pub fn attributes() -> Result<(TempDir, Attributes), String> {
    let dir = place();
    let probe = File::create(dir.path().join("disk")).map_err(|error| error.to_string())?;
    let mut can = vec![("user.comment", &b"mine"[..]), ("system.posix_acl_access", LIST)];
    if Uid::effective().is_root() {
        can.push(("trusted.owner", b"root"));
    }
    for (name, value) in &can {
        fsetxattr(&probe, *name, value, XattrFlags::empty())
            .map_err(|errno| format!("no {name}: {errno}"))?;
    }
    Ok((dir, can))
}

pub fn keeps_attributes((dir, attributes): (TempDir, Attributes)) {
    let (source, disk) = (dir.path().join("source"), dir.path().join("disk"));
    image(&source, &[1; 4096], 4096);
    let before = fs::metadata(&disk).unwrap();
    assert_eq!(copy(&["--force"], &source, &disk).0, 0);
    let now = File::open(&disk).unwrap();
    let metadata = now.metadata().unwrap();
    assert_ne!(metadata.ino(), before.ino());
    assert_eq!(metadata.mode(), before.mode());
    for (name, value) in attributes {
        let mut found = [0; 256];
        let length = fgetxattr(&now, name, &mut found[..]).unwrap();
        assert_eq!(&found[..length], value, "{name}");
    }
}

/// Whatever the umask and the source say, with and without files without a name.
pub fn private() {
    let dir = place();
    let path = |name: &str| dir.path().join(name);
    let source = path("source");
    image(&source, &[1; 4096], 4096);
    fs::set_permissions(&source, fs::Permissions::from_mode(0o666)).unwrap();
    for (round, calls) in [&[][..], &[libc::SYS_linkat, libc::SYS_link]].into_iter().enumerate() {
        let [made, copied] = ["made", "copied"].map(|name| path(&format!("{name}{round}")));
        let mut create = command(&["image", "create"]);
        create.arg(&made).arg("1M");
        for (mut command, path) in [(create, &made), (copy_command(&[], &source, &copied), &copied)] {
            // SAFETY: one system call without memory.
            unsafe {
                command.pre_exec(|| {
                    libc::umask(0);
                    Ok(())
                })
            };
            assert_eq!(said(without(command, calls).output().unwrap()).0, 0);
            assert_eq!(fs::metadata(path).unwrap().mode() & 0o7777, 0o600, "{}", path.display());
        }
    }
}

/// The same list for what is made in a directory: as `LIST`, and the further user may write.
const INHERITED: &[u8] = b"\x02\0\0\0\
    \x01\0\x07\0\xff\xff\xff\xff\x02\0\x07\0\x07\0\0\0\x04\0\x07\0\xff\xff\xff\xff\
    \x10\0\x07\0\xff\xff\xff\xff\x20\0\x07\0\xff\xff\xff\xff";

/// A place whose files are made with a list.
pub fn lists() -> Result<TempDir, String> {
    let dir = place();
    let directory = File::open(dir.path()).map_err(|error| error.to_string())?;
    fsetxattr(&directory, "system.posix_acl_default", INHERITED, XattrFlags::empty())
        .map_err(|errno| format!("no default list: {errno}"))?;
    Ok(dir)
}

/// What the directory would give a new file is not given to one that takes another's place.
pub fn more_open(dir: TempDir) {
    let (source, disk) = (dir.path().join("source"), dir.path().join("disk"));
    image(&source, &[1; 4096], 4096);
    let list = |path: &Path| {
        let mut found = [0; 256];
        fgetxattr(File::open(path).unwrap(), "system.posix_acl_access", &mut found[..])
            .map(|length| found[..length].to_vec())
    };
    assert!(list(&source).is_ok());
    for calls in [&[][..], &[libc::SYS_linkat, libc::SYS_link]] {
        for given in [None, Some(LIST)] {
            image(&disk, &[2; 512], 512);
            let old = File::open(&disk).unwrap();
            fremovexattr(&old, "system.posix_acl_access").unwrap();
            fs::set_permissions(&disk, fs::Permissions::from_mode(0o640)).unwrap();
            if let Some(given) = given {
                fsetxattr(&old, "system.posix_acl_access", given, XattrFlags::empty()).unwrap();
            }
            let mode = old.metadata().unwrap().mode();
            let copied = without(copy_command(&["--force"], &source, &disk), calls).output().unwrap();
            assert_eq!(said(copied).0, 0);
            assert_eq!(fs::read(&disk).unwrap(), [1; 4096]);
            assert_eq!(list(&disk).ok().as_deref(), given);
            assert_eq!(fs::metadata(&disk).unwrap().mode(), mode);
            fs::remove_file(&disk).unwrap();
        }
    }
    // Where they cannot be taken away, nothing is replaced.
    image(&disk, &[2; 512], 512);
    fremovexattr(File::open(&disk).unwrap(), "system.posix_acl_access").unwrap();
    let copied = without(copy_command(&["--force"], &source, &disk), &[libc::SYS_fremovexattr]);
    let (code, error) = said({ copied }.output().unwrap());
    assert!(code == 1 && error.contains("posix_acl_access, which it does not have"), "{code}: {error}");
    assert_eq!(fs::read(&disk).unwrap(), [2; 512]);
    assert_eq!(names(dir.path()), ["disk", "source"]);
}

/// A place where another user may run the command.
pub fn stranger() -> Result<TempDir, String> {
    root()?;
    let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
    let binary = dir.path().join("ringblk");
    fs::copy(env!("CARGO_BIN_EXE_ringblk"), &binary).map_err(|error| error.to_string())?;
    for path in [dir.path(), &binary] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).map_err(|error| error.to_string())?;
    }
    let runs = Command::new(&binary).arg("--version").uid(65534).gid(65534).stdout(Stdio::null()).status();
    match runs {
        Ok(status) if status.success() => Ok(dir),
        other => Err(format!("another user cannot run {}: {other:?}", binary.display())),
    }
}

/// Who may not give it to its owner leaves it to him.
pub fn strangers(dir: &TempDir) {
    let (source, disk) = (dir.path().join("source"), dir.path().join("disk"));
    image(&source, &[1; 4096], 4096);
    image(&disk, &[2; 512], 512);
    let mut stranger = Command::new(dir.path().join("ringblk"));
    stranger.args(["image", "copy", "--quiet", "--force"]).arg(&source).arg(&disk).uid(65534).gid(65534);
    let (code, error) = said(stranger.output().unwrap());
    assert!(code == 1 && error.contains("owner (0:0)"), "{code}: {error}");
    assert_eq!(fs::read(&disk).unwrap(), [2; 512]);
    assert_eq!(names(dir.path()), ["disk", "ringblk", "source"]);
}
