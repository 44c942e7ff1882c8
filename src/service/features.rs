//! What this kernel and this build offer, and what is missing and why.
//!
//! The report is for people and for programs: `ringblk features` prints it, `--json` gives it as it stands.

#![forbid(unsafe_code)]

use crate::frontend::ublk::features::{self as driver, FEATURES, Unavailable};
use crate::ring::{Setup, Uring};
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::fmt;
use std::fs;

/// The whole report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    /// Version of this program.
    pub version: String,
    /// Release of the kernel, as `uname -r` prints it.
    pub kernel: String,
    /// What the engine runs on.
    pub io_uring: Group,
    /// The frontend to this host.
    pub ublk: Group,
    /// The frontend to guests.
    pub vhost_user: Group,
}

/// A part of the program and what it can do here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Whether it works at all.
    pub available: bool,
    /// If not: why, and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// One by one.
    pub features: Vec<Feature>,
}

/// One thing that it can do, or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Feature {
    /// Its name where it is defined.
    pub name: String,
    /// Whether it is there.
    pub available: bool,
    /// Whether ringblk makes use of it where it is there.
    pub used: bool,
    /// What it is good for, in a line.
    pub about: String,
    /// If it is not there: why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Looks. Takes milliseconds, and some seconds at worst, where a driver does not answer. Changes nothing.
pub fn report() -> Features {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
    let ring = Uring::new(Setup::default()).map(drop).map_err(|error| error.to_string());
    Features {
        version: env!("CARGO_PKG_VERSION").into(),
        io_uring: io_uring(&kernel, ring),
        ublk: ublk(driver::probe()),
        vhost_user: vhost_user(),
        kernel,
    }
}

/// What the ring is used for that not every kernel with a usable ring has, and since when.
const RING: [(&str, (u32, u32), &str); 2] = [
    ("BLOCK_URING_CMD_DISCARD", (6, 12), "discard on block devices without a thread"),
    ("IORING_URING_CMD_FIXED", (6, 16), "registered buffers that ublk fills in: zero copy"),
];

fn io_uring(kernel: &str, ring: Result<(), String>) -> Group {
    let release = parse(kernel);
    let working = ring.is_ok();
    let mut features = vec![Feature {
        name: "DEFER_TASKRUN".into(),
        available: working,
        used: true,
        about: "completions in batches, on the thread that waits for them".into(),
        reason: (!working).then(|| "no ring could be made".into()),
    }];
    features.extend(RING.map(|(name, since, about)| {
        let available = working && release.is_some_and(|release| release >= since);
        Feature {
            name: name.into(),
            available,
            used: true,
            about: about.into(),
            reason: (!available).then(|| format!("came with Linux {}.{}", since.0, since.1)),
        }
    }));
    let reason = ring.err().map(|error| format!("no ring for a worker: {error}"));
    Group { available: working, reason, features }
}

fn ublk(probed: Result<driver::Features, Unavailable>) -> Group {
    let (bits, reason) = match probed {
        Ok(offer) => (Some(offer.bits), None),
        Err(why) => (None, Some(chain(&why))),
    };
    let features = FEATURES.iter().map(|feature| {
        let available = bits.is_some_and(|bits| bits & feature.bit != 0);
        Feature {
            name: format!("UBLK_F_{}", feature.name),
            available,
            used: feature.used,
            about: feature.about.into(),
            reason: (!available).then(|| match bits {
                Some(_) => format!("not in this kernel: came with Linux {}", feature.since),
                None => "no ublk here".into(),
            }),
        }
    });
    Group { available: bits.is_some(), reason, features: features.collect() }
}

/// Built in, whatever the kernel.
const VHOST_USER: [(&str, &str); 14] = [
    ("VIRTIO_F_VERSION_1", "virtio 1.x devices"),
    ("VIRTIO_RING_F_EVENT_IDX", "fewer kicks and calls"),
    ("VIRTIO_RING_F_INDIRECT_DESC", "long chains in one descriptor"),
    ("VIRTIO_BLK_F_MQ", "several queues"),
    ("VIRTIO_BLK_F_SEG_MAX", "a limit on segments"),
    ("VIRTIO_BLK_F_BLK_SIZE", "logical blocks other than 512 bytes"),
    ("VIRTIO_BLK_F_TOPOLOGY", "physical blocks and preferred sizes"),
    ("VIRTIO_BLK_F_FLUSH", "writes brought to stable storage"),
    ("VIRTIO_BLK_F_CONFIG_WCE", "the guest may turn the write cache off"),
    ("VIRTIO_BLK_F_DISCARD", "blocks given back to the store"),
    ("VIRTIO_BLK_F_WRITE_ZEROES", "zeroes without sending them"),
    ("VIRTIO_BLK_F_RO", "read-only exports"),
    ("VHOST_USER_PROTOCOL_F_MQ", "the VMM asks for the number of queues"),
    ("VHOST_USER_PROTOCOL_F_CONFIG", "the VMM asks for the disk's size and limits"),
];

fn vhost_user() -> Group {
    let features = VHOST_USER.map(|(name, about)| Feature {
        name: name.into(),
        available: true,
        used: true,
        about: about.into(),
        reason: None,
    });
    Group { available: true, reason: None, features: features.into() }
}

/// An error and what it comes from, in a line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
}

/// For people: a paragraph for each part, a line for each feature.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "ringblk {} on Linux {}", self.version, self.kernel)?;
        for (name, group) in
            [("io_uring", &self.io_uring), ("ublk", &self.ublk), ("vhost-user", &self.vhost_user)]
        {
            match &group.reason {
                None => writeln!(f, "\n{name}: available")?,
                Some(reason) => writeln!(f, "\n{name}: NOT available: {reason}")?,
            }
            for feature in &group.features {
                let mark = match (feature.available, feature.used) {
                    (false, _) => '-',
                    (true, true) => '*',
                    (true, false) => '+',
                };
                write!(f, "  {mark} {:<32} {}", feature.name, feature.about)?;
                match &feature.reason {
                    Some(reason) if group.available => writeln!(f, " ({reason})")?,
                    _ => writeln!(f)?,
                }
            }
        }
        writeln!(f, "\n* there and used   + there, not used   - not there")
    }
}

/// The first two numbers of a release.
fn parse(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn releases_are_read() {
        assert_eq!(parse("6.12.95+deb12-cloud-amd64"), Some((6, 12)));
        assert_eq!(parse("7.3-rc1"), Some((7, 3)));
        assert_eq!(parse("6"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn a_kernel_without_ublk_says_why_and_what_is_missing() {
        let refused = io::Error::from_raw_os_error(libc::EACCES);
        let group = ublk(Err(Unavailable::NotPermitted(refused)));
        assert!(!group.available);
        let reason = group.reason.unwrap();
        assert!(reason.contains("run as root") && reason.contains("Permission denied"), "{reason}");
        assert!(group.features.iter().all(|feature| !feature.available && feature.reason.is_some()));
    }

    #[test]
    fn what_is_missing_names_the_kernel_that_has_it() {
        let all_but_zero_copy = !(1 << 11);
        let group = ublk(Ok(driver::Features { bits: all_but_zero_copy, release: "6.12.1".into() }));
        assert!(group.available && group.reason.is_none());
        let missing: Vec<_> = group.features.iter().filter(|feature| !feature.available).collect();
        assert_eq!(missing.len(), 1);
        assert_eq!(missing[0].name, "UBLK_F_AUTO_BUF_REG");
        assert!(missing[0].reason.as_ref().unwrap().contains("6.16"));
    }

    #[test]
    fn a_ring_that_cannot_be_made_takes_all_with_it() {
        let group = io_uring("6.12.1", Err("forbidden by kernel.io_uring_disabled".into()));
        assert!(!group.available && group.features.iter().all(|feature| !feature.available));
        assert!(group.reason.unwrap().contains("io_uring_disabled"));

        let group = io_uring("6.12.1", Ok(()));
        let there: Vec<_> = group.features.iter().map(|feature| feature.available).collect();
        assert_eq!(there, [true, true, false]);
    }

    #[test]
    fn people_see_every_feature_and_why_one_is_missing() {
        let offer = driver::Features { bits: 1 << 6, release: "6.12.1".into() };
        let text = Features { ublk: ublk(Ok(offer)), ..report() }.to_string();
        let line = |name: &str| text.lines().find(|line| line.contains(name)).unwrap().trim().to_owned();
        assert!(line("UBLK_F_CMD_IOCTL_ENCODE").starts_with('*'));
        assert!(
            line("UBLK_F_AUTO_BUF_REG").starts_with("- ") && line("UBLK_F_AUTO_BUF_REG").contains("6.16")
        );
        assert!(line("VIRTIO_BLK_F_DISCARD").starts_with('*'));
    }

    #[test]
    fn the_report_survives_json() {
        let report = report();
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Features>(&text).unwrap(), report);
    }
}
