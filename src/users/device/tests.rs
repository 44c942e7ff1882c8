//! Machines that are directories.

use super::*;
use std::os::unix::fs::symlink;

/// A machine with the disk 7, which has a partition, and the disk 77.
fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let disk = [
        ("sys/block/ublkb7/dev", "259:1\n"),
        ("sys/block/ublkb7/ublkb7p1/dev", "259:2\n"),
        ("sys/block/ublkb7/ublkb7p1/partition", "1\n"),
        ("sys/block/ublkb77/dev", "259:3\n"),
        ("proc/swaps", "Filename Type Size Used Priority\n/dev/vda2 partition 1 0 -2\n"),
    ];
    for (path, text) in disk.iter().chain(files) {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    fs::create_dir_all(dir.path().join("sys/dev/block")).unwrap();
    symlink("../../block/ublkb7", dir.path().join("sys/dev/block/259:1")).unwrap();
    symlink("../../block/ublkb7/ublkb7p1", dir.path().join("sys/dev/block/259:2")).unwrap();
    dir
}

fn told(device: &Device) -> Vec<String> {
    device.users().iter().map(User::to_string).collect()
}

fn users(files: &[(&str, &str)]) -> Vec<String> {
    told(&Device::named_in(machine(files).path(), "ublkb7"))
}

#[test]
fn mounts_are_found_in_every_namespace() {
    let own = "22 1 259:3 / / rw - ext4 /dev/ublkb77 rw\n36 22 259:2 / /mnt/my\\040disk rw shared:1 - ext4 /dev/x rw\n";
    assert_eq!(users(&[("proc/self/mountinfo", own)]), ["mounted on /mnt/my disk"]);
    let other = "36 22 259:2 /sub /data rw - xfs /dev/x rw\n";
    // Where we may look.
    assert!(users(&[("proc/123/mountinfo", other)]).is_empty());
    // Once for each namespace, not for each process.
    let dir = machine(&[
        ("proc/1/mountinfo", other),
        ("proc/2/mountinfo", "36 2 259:1 / /twice rw - xfs /dev/x rw\n"),
    ]);
    for pid in ["1", "2"] {
        fs::create_dir_all(dir.path().join("proc").join(pid).join("ns")).unwrap();
        symlink("mnt:[4026531841]", dir.path().join("proc").join(pid).join("ns/mnt")).unwrap();
    }
    assert_eq!(told(&Device::named_in(dir.path(), "ublkb7")), ["mounted on /data"]);
    // Where nobody lets us look, the file system says so.
    assert_eq!(users(&[("sys/fs/ext4/ublkb7p1/errors_count", "0")]), ["mounted somewhere, with ext4"]);
}

#[test]
fn nobody_makes_a_disk_look_mounted() {
    // What anybody may mount in a user namespace of his own, or with FUSE.
    let forged = "36 22 0:45 / /a rw - tmpfs /dev/ublkb7 rw\n\
                  37 22 0:46 / /b rw - fuse.x /dev/ublkb7p1 rw\n\
                  38 22 0:47 / /c rw - fuse.btrfs /dev/ublkb7 rw\n\
                  39 22 0:48 / /d rw - overlay /dev/ublkb7 rw\n\
                  40 22 0:49 / /e rw - btrfs /dev/ublkb7 rw\n";
    assert!(users(&[("proc/self/mountinfo", forged)]).is_empty());
    // A file that somebody has udisks attach.
    for file in ["/home/me/ublkb7", "/tmp/dev/ublkb7p1", "/dev/ublkb7 (deleted)", "/dev/shm/ublkb7"] {
        assert!(users(&[("sys/block/loop3/loop/backing_file", file)]).is_empty(), "{file}");
    }
    // A swap file may be called like a disk.
    let swaps = "Filename Type Size Used Priority\n/srv/dev/ublkb7 file 1 0 -2\n";
    assert!(users(&[("proc/swaps", swaps)]).is_empty());
}

#[test]
fn what_is_mounted_below_sysfs_does_not_count() {
    // On this machine itself: nothing of the kernel's is mounted in a temporary directory.
    let dir = machine(&[("sys/fs/ext4/ublkb7/x", "")]);
    let other = Path::new("/proc/self");
    symlink(other, dir.path().join("sys/fs/bpf")).unwrap();
    // A directory of another file system that has an entry of the disk's name.
    fs::rename(dir.path().join("sys/block/ublkb7"), dir.path().join("sys/block/fd")).unwrap();
    assert!(other.join("fd").exists());
    assert!(told(&Device::named_in(dir.path(), "fd")).is_empty());
}

#[test]
fn a_file_system_of_several_devices_is_found() {
    let devices = ("sys/fs/btrfs/0c1c/devices/ublkb7p1", "");
    assert_eq!(users(&[devices]), ["mounted somewhere, with btrfs"]);
    assert!(users(&[("sys/fs/btrfs/0c1c/devices/ublkb77", "")]).is_empty());
    let mount = "36 22 0:45 /sub /data rw - btrfs /dev/ublkb7p1 rw\n";
    assert_eq!(users(&[devices, ("proc/self/mountinfo", mount)]), ["mounted on /data"]);
    // It shows another of its devices.
    let mount = "36 22 0:45 /sub /data rw - btrfs /dev/ublkb77 rw\n";
    assert_eq!(users(&[devices, ("proc/self/mountinfo", mount)]), ["mounted somewhere, with btrfs"]);
    let dir = machine(&[("sys/fs/bcachefs/0c1c/dev-0/label", "")]);
    symlink("../../../../block/ublkb7", dir.path().join("sys/fs/bcachefs/0c1c/dev-0/block")).unwrap();
    assert_eq!(told(&Device::named_in(dir.path(), "ublkb7")), ["mounted somewhere, with bcachefs"]);
}

#[test]
fn what_is_built_on_it_is_found() {
    let swaps =
        "Filename Type Size Used Priority\n/dev/ublkb7p1 partition 1 0 -2\n/dev/ublkb77 partition 1 0 -3\n";
    assert_eq!(users(&[("proc/swaps", swaps)]), ["swap on /dev/ublkb7p1"]);
    let holders = [
        ("sys/block/ublkb7/holders/dm-0/x", ""),
        ("sys/block/dm-0/dm/name", "vg-root\n"),
        ("sys/block/ublkb7/ublkb7p1/holders/md0/x", ""),
        ("sys/block/ublkb77/holders/dm-1/x", ""),
    ];
    assert_eq!(users(&holders), ["part of dm-0 (vg-root)", "part of md0"]);
    assert_eq!(users(&[("sys/block/loop3/loop/backing_file", "/dev/ublkb7\n")]), ["behind loop3"]);
    assert!(users(&[]).is_empty());
    assert!(Device::named_in(Path::new("/nowhere"), "ublkb7").users().is_empty());
}

#[test]
fn a_partition_has_a_disk_and_a_disk_has_partitions() {
    let mount = "36 22 259:2 / /part rw - ext4 /dev/x rw\n37 22 259:1 / /disk rw - ext4 /dev/x rw\n";
    let dir = machine(&[("proc/self/mountinfo", mount)]);
    let of = |minor| told(&Device::numbered_in(dir.path(), rustix::fs::makedev(259, minor)));
    assert_eq!(of(1), ["mounted on /disk", "its partition ublkb7p1: mounted on /part"]);
    assert_eq!(of(2), ["mounted on /part", "its disk ublkb7: mounted on /disk"]);
    assert!(of(9).is_empty());
}

#[test]
fn lines_of_mountinfo() {
    let line = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
    let mount = Mount { number: "98:0", place: "/mnt2", kind: "ext3", source: "/dev/root" };
    assert_eq!(Mount::of(line), Some(mount));
    for broken in ["36 35 98:0", "", " - ", "36 35 98:0 / /x rw - tmpfs"] {
        assert_eq!(Mount::of(broken), None, "{broken}");
    }
}

#[test]
fn octal_is_undone() {
    assert_eq!(unescaped("/a\\040b\\134"), "/a b\\");
    assert_eq!(unescaped("/a\\04"), "/a\\04");
}
