//! What the kernel we run on offers, and what is missing where it offers nothing.

#![forbid(unsafe_code)]

use super::config::{Recovery, ZeroCopy};
use super::thread::detached;
use libublk::ctrl::UblkCtrl;
use libublk::{UblkError, UblkFlags, sys};
use rustix::thread::CapabilitySet;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Duration;

/// The device that ublk's commands go to.
pub const CONTROL: &str = "/dev/ublk-control";

/// An answer that takes longer than this does not come.
const PATIENCE: Duration = Duration::from_secs(10);

/// A ublk driver that answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Features {
    /// `UBLK_F_*` bits of `linux/ublk_cmd.h`.
    pub bits: u64,
    /// The kernel's release, as `uname -r` prints it.
    pub release: String,
}

/// Why there is no ublk here, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// Neither built in nor a module.
    #[error(
        "the kernel ({release}) has no ublk driver: run one that is built with CONFIG_BLK_DEV_UBLK, \
         Linux 6.12 or later"
    )]
    NoDriver {
        /// Of the kernel.
        release: String,
    },
    /// A module that is not loaded.
    #[error("the ublk driver is not loaded: run `modprobe ublk_drv`")]
    NotLoaded,
    /// No driver to be seen, and no list of the kernel's modules either.
    #[error(
        "there is no {CONTROL}: run `modprobe ublk_drv` (in a container: on the host, and then pass \
         {CONTROL} and the devices through)"
    )]
    Unknown,
    /// The driver is there and its device file is not.
    #[error("the ublk driver is loaded but there is no {CONTROL}: is /dev that of a container?")]
    NoNode,
    /// The device file is not for us.
    #[error("{CONTROL} may not be opened: run as root, or with CAP_SYS_ADMIN and access to that file")]
    NotPermitted(#[source] io::Error),
    /// Devices may be looked at, but not added.
    #[error(
        "adding ublk devices needs CAP_SYS_ADMIN: run as root (the driver's unprivileged devices know no recovery and no \
         zero copy, and a request that takes 30 s ends their server, so none are made)"
    )]
    NoCapability,
    /// It does not open, for another reason.
    #[error("{CONTROL} cannot be opened")]
    Control(#[source] io::Error),
    /// The kernel does not let us have an io_uring.
    #[error("io_uring, which ublk needs, cannot be used: see /proc/sys/kernel/io_uring_disabled")]
    NoRing(#[source] io::Error),
    /// A driver that cannot tell its features.
    #[error("the ublk driver of this kernel ({release}) is too old: Linux 6.12 or later is needed")]
    TooOld {
        /// Of the kernel.
        release: String,
    },
    /// A driver that does not answer.
    #[error("the ublk driver did not answer in {} s", PATIENCE.as_secs())]
    Silent,
}

/// Why there is no zero copy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoZeroCopy {
    /// The data passes through us.
    #[error("the volume's data is not moved by the kernel alone (only file volumes' is)")]
    Volume,
    /// `UBLK_F_AUTO_BUF_REG` is missing.
    #[error("the kernel ({release}) is too old: UBLK_F_AUTO_BUF_REG came with Linux 6.16")]
    Kernel {
        /// Of the kernel.
        release: String,
    },
    /// The driver offered it and then did not grant it.
    #[error("the kernel offered UBLK_F_AUTO_BUF_REG and did not grant it")]
    NotGranted,
}

/// Why a disk would not outlive its server as it was asked to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoRecovery {
    /// There would be nothing to serve.
    #[error("the data of a memory volume ends with the service: only recovery=off is possible")]
    Volume,
    /// The feature is missing.
    #[error("the kernel ({release}) cannot do it: UBLK_F_{feature} came with Linux {since}")]
    Kernel {
        /// Of the kernel.
        release: String,
        /// Its name, without the prefix.
        feature: &'static str,
        /// The first kernel that has it.
        since: &'static str,
    },
}

/// A feature of the driver.
#[derive(Clone, Copy, Debug)]
pub struct Feature {
    /// `UBLK_F_*`.
    pub bit: u64,
    /// Its name there.
    pub name: &'static str,
    /// The first kernel that has it.
    pub since: &'static str,
    /// What it is good for, in a line.
    pub about: &'static str,
    /// Whether we make use of it.
    pub used: bool,
}

const fn feature(bit: u32, name: &'static str, since: &'static str, about: &'static str) -> Feature {
    Feature { bit: bit as u64, name, since, about, used: false }
}

const fn used(feature: Feature) -> Feature {
    Feature { used: true, ..feature }
}

/// Every feature that `linux/ublk_cmd.h` of Linux 7.1 knows.
pub const FEATURES: [Feature; 20] = [
    feature(
        sys::UBLK_F_SUPPORT_ZERO_COPY,
        "SUPPORT_ZERO_COPY",
        "6.15",
        "zero copy by commands for each request",
    ),
    feature(sys::UBLK_F_URING_CMD_COMP_IN_TASK, "URING_CMD_COMP_IN_TASK", "6.0", "completions by task work"),
    feature(sys::UBLK_F_NEED_GET_DATA, "NEED_GET_DATA", "6.1", "buffers chosen for each write"),
    used(feature(sys::UBLK_F_USER_RECOVERY, "USER_RECOVERY", "6.1", "a disk outlives its server")),
    used(feature(
        sys::UBLK_F_USER_RECOVERY_REISSUE,
        "USER_RECOVERY_REISSUE",
        "6.1",
        "requests in flight are issued again",
    )),
    feature(sys::UBLK_F_UNPRIVILEGED_DEV, "UNPRIVILEGED_DEV", "6.3", "devices without CAP_SYS_ADMIN"),
    used(feature(sys::UBLK_F_CMD_IOCTL_ENCODE, "CMD_IOCTL_ENCODE", "6.4", "commands numbered like ioctls")),
    feature(sys::UBLK_F_USER_COPY, "USER_COPY", "6.5", "data by pread and pwrite"),
    feature(sys::UBLK_F_ZONED, "ZONED", "6.6", "zoned disks"),
    used(feature(
        sys::UBLK_F_USER_RECOVERY_FAIL_IO,
        "USER_RECOVERY_FAIL_IO",
        "6.13",
        "requests fail while no server runs",
    )),
    used(feature(sys::UBLK_F_UPDATE_SIZE, "UPDATE_SIZE", "6.16", "resize while in use")),
    used(feature(sys::UBLK_F_AUTO_BUF_REG, "AUTO_BUF_REG", "6.16", "zero copy without extra commands")),
    used(feature(sys::UBLK_F_QUIESCE, "QUIESCE", "6.16", "hand-over to a new server")),
    feature(sys::UBLK_F_PER_IO_DAEMON, "PER_IO_DAEMON", "6.16", "several threads a queue"),
    feature(sys::UBLK_F_BUF_REG_OFF_DAEMON, "BUF_REG_OFF_DAEMON", "6.16", "zero copy from any thread"),
    feature(sys::UBLK_F_BATCH_IO, "BATCH_IO", "7.0", "requests fetched and committed in batches"),
    feature(sys::UBLK_F_INTEGRITY, "INTEGRITY", "7.0", "protection information"),
    used(feature(sys::UBLK_F_SAFE_STOP_DEV, "SAFE_STOP_DEV", "7.0", "stop only a disk that nobody has open")),
    feature(sys::UBLK_F_NO_AUTO_PART_SCAN, "NO_AUTO_PART_SCAN", "7.0", "no look for partitions at the start"),
    feature(sys::UBLK_F_SHMEM_ZC, "SHMEM_ZC", "7.1", "zero copy from memory shared with the client"),
];

/// Asks the driver what it offers. Bounded in time.
///
/// # Errors
/// Why there is no driver that answers.
pub fn probe() -> Result<Features, Unavailable> {
    let release = release();
    match fs::OpenOptions::new().read(true).write(true).open(CONTROL) {
        // A device file that nobody serves is as good as none.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO)) => {
            return Err(missing(Path::new("/"), release));
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Err(Unavailable::NotPermitted(error));
        }
        Err(error) => return Err(Unavailable::Control(error)),
        Ok(_) => {}
    }
    // Where this cannot be read, the kernel tells when a device is added.
    if rustix::thread::capabilities(None).is_ok_and(|sets| !sets.effective.contains(CapabilitySet::SYS_ADMIN))
    {
        return Err(Unavailable::NoCapability);
    }
    let (sender, answer) = channel();
    // Its own thread, because libublk's ring belongs to the thread and its commands cannot be interrupted.
    detached("ringblk-probe", move || {
        let asked = UblkCtrl::new(None, -1, 0, 0, 0, 0, 0, UblkFlags::empty());
        let _ = sender.send(asked.map(|control| control.get_driver_features()));
    })
    .map_err(Unavailable::Control)?;
    match answer.recv_timeout(PATIENCE) {
        Ok(Ok(Some(features))) => Ok(Features { bits: features, release }),
        Ok(Ok(None)) => Err(Unavailable::TooOld { release }),
        // The control device has just been opened, so what failed is the ring.
        Ok(Err(UblkError::IOError(error))) => Err(Unavailable::NoRing(error)),
        Ok(Err(error)) => Err(Unavailable::Control(io::Error::other(error.to_string()))),
        Err(_) => Err(Unavailable::Silent),
    }
}

impl Features {
    /// Whether a device gets zero copy.
    ///
    /// # Errors
    /// When it was asked for and is not possible.
    pub fn zero_copy(&self, spec: ZeroCopy, volume: bool) -> Result<bool, NoZeroCopy> {
        if spec == ZeroCopy::Off {
            return Ok(false);
        }
        let obstacle = if !volume {
            NoZeroCopy::Volume
        } else if self.bits & u64::from(sys::UBLK_F_AUTO_BUF_REG) == 0 {
            NoZeroCopy::Kernel { release: self.release.clone() }
        } else {
            return Ok(true);
        };
        if spec == ZeroCopy::On { Err(obstacle) } else { Ok(false) }
    }

    /// Whether a disk in use can get another size.
    pub fn resizes(&self) -> bool {
        self.bits & u64::from(sys::UBLK_F_UPDATE_SIZE) != 0
    }

    /// Whether the kernel notices at once that a server has died, whatever requests it had: since Linux 6.15, and there
    /// is no flag that tells, so that of the next version must do.
    pub fn detects_server_exit(&self) -> bool {
        self.bits & u64::from(sys::UBLK_F_QUIESCE) != 0
    }

    /// What becomes of a disk of a volume that `persists` or not, when its server dies.
    ///
    /// # Errors
    /// When it was asked for and is not possible.
    pub fn recovery(&self, spec: Option<Recovery>, persists: bool) -> Result<Recovery, NoRecovery> {
        let recovery = match spec {
            None if persists => Recovery::Reissue,
            None | Some(Recovery::Off) => return Ok(Recovery::Off),
            Some(_) if !persists => return Err(NoRecovery::Volume),
            Some(recovery) => recovery,
        };
        let missing = |bit: &u64| self.bits & bit == 0;
        let flags = recovery.flags();
        match FEATURES.iter().find(|feature| flags & feature.bit != 0 && missing(&feature.bit)) {
            None => Ok(recovery),
            Some(Feature { name, since, .. }) => {
                Err(NoRecovery::Kernel { release: self.release.clone(), feature: name, since })
            }
        }
    }
}

impl Recovery {
    /// The `UBLK_F_*` that a device is added with for it.
    pub(super) fn flags(self) -> u64 {
        let flags = match self {
            Recovery::Reissue => sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE,
            Recovery::Queue => sys::UBLK_F_USER_RECOVERY,
            Recovery::FailIo => sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_FAIL_IO,
            Recovery::Off => 0,
        };
        flags.into()
    }
}

/// Which of the reasons it is that there is no control device, below the root directory `root`.
fn missing(root: &Path, release: String) -> Unavailable {
    if root.join("sys/module/ublk_drv").exists() {
        return Unavailable::NoNode;
    }
    let modules = root.join("lib/modules").join(&release);
    let lists = |name: &str| fs::read_to_string(modules.join(name)).ok();
    // A line is a path, with a colon and more paths behind it in modules.dep.
    let driver = |line: &str| line.rsplit_once('/').map_or(line, |(_, file)| file).starts_with("ublk_drv.ko");
    let has = |list: &str| list.lines().any(|line| driver(line.split(':').next().unwrap_or(line)));
    match (lists("modules.builtin"), lists("modules.dep")) {
        (Some(builtin), _) if has(&builtin) => Unavailable::NoNode,
        (_, Some(dependencies)) if has(&dependencies) => Unavailable::NotLoaded,
        (_, Some(_)) => Unavailable::NoDriver { release },
        (_, None) => Unavailable::Unknown,
    }
}

/// The kernel's release.
fn release() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    text.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_driver_is_told_from_one_not_loaded() {
        let root = tempfile::tempdir().unwrap();
        let modules = root.path().join("lib/modules/6.12.1");
        let found = || missing(root.path(), "6.12.1".into());
        assert!(matches!(found(), Unavailable::Unknown));

        fs::create_dir_all(&modules).unwrap();
        fs::write(modules.join("modules.dep"), "kernel/drivers/block/loop.ko:\n").unwrap();
        assert!(matches!(found(), Unavailable::NoDriver { release } if release == "6.12.1"));

        fs::write(modules.join("modules.dep"), "kernel/drivers/block/ublk_drv.ko.xz:\n").unwrap();
        assert!(found().to_string().contains("modprobe ublk_drv"));

        fs::write(modules.join("modules.builtin"), "kernel/drivers/block/ublk_drv.ko\n").unwrap();
        assert!(matches!(found(), Unavailable::NoNode));

        fs::remove_dir_all(root.path().join("lib")).unwrap();
        fs::create_dir_all(root.path().join("sys/module/ublk_drv")).unwrap();
        assert!(matches!(found(), Unavailable::NoNode));
    }

    #[test]
    fn zero_copy_needs_both_sides() {
        let features = |features: u32| Features { bits: features.into(), release: "6.12.1".into() };
        let (new, old) = (features(sys::UBLK_F_AUTO_BUF_REG), features(sys::UBLK_F_SUPPORT_ZERO_COPY));
        for (features, volume, possible) in [(&new, true, true), (&new, false, false), (&old, true, false)] {
            assert_eq!(features.zero_copy(ZeroCopy::Auto, volume), Ok(possible));
            assert_eq!(features.zero_copy(ZeroCopy::Off, volume), Ok(false));
        }
        assert_eq!(new.zero_copy(ZeroCopy::On, true), Ok(true));
        assert_eq!(new.zero_copy(ZeroCopy::On, false), Err(NoZeroCopy::Volume));
        let refused = old.zero_copy(ZeroCopy::On, true).unwrap_err().to_string();
        assert!(refused.contains("6.12.1") && refused.contains("6.16"), "{refused}");
    }

    #[test]
    fn recovery_needs_kernel_and_volume() {
        let old = sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE;
        let features = |features: u32| Features { bits: features.into(), release: "6.12.1".into() };
        let (old, new) = (features(old), features(old | sys::UBLK_F_USER_RECOVERY_FAIL_IO));
        assert_eq!(old.recovery(None, true), Ok(Recovery::Reissue));
        assert_eq!(old.recovery(None, false), Ok(Recovery::Off));
        assert_eq!(old.recovery(Some(Recovery::Off), true), Ok(Recovery::Off));
        assert_eq!(old.recovery(Some(Recovery::Queue), true), Ok(Recovery::Queue));
        assert_eq!(old.recovery(Some(Recovery::Queue), false), Err(NoRecovery::Volume));
        assert_eq!(new.recovery(Some(Recovery::FailIo), true), Ok(Recovery::FailIo));
        let refused = old.recovery(Some(Recovery::FailIo), true).unwrap_err().to_string();
        for word in ["6.12.1", "USER_RECOVERY_FAIL_IO", "6.13"] {
            assert!(refused.contains(word), "{refused}");
        }
    }

    #[test]
    fn every_feature_is_listed_once_and_in_order() {
        for (index, feature) in FEATURES.iter().enumerate() {
            assert_eq!(feature.bit, 1 << index, "{}", feature.name);
        }
    }
}
