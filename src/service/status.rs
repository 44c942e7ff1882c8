//! What a running service tells about itself: the bodies of the control API, shared by its two ends.
//!
//! Readers take unknown keys in their stride, so that a newer service can be asked by an older `ringblk list`.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The answer to `GET /v1/status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the running program.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Worker threads.
    pub workers: usize,
    /// Set once a stop was asked for.
    pub stopping: bool,
    /// Every volume.
    pub volumes: Vec<VolumeStatus>,
    /// Every export.
    pub exports: Vec<ExportStatus>,
}

/// A volume as it was opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Its name in the configuration.
    pub name: String,
    /// `file`, `memory`, `null` or `nbd`.
    pub driver: String,
    /// What the driver was pointed at.
    pub target: String,
    /// Capacity.
    pub size_bytes: u64,
    /// Logical block in bytes.
    pub block_size: u32,
    /// Writes are refused.
    pub read_only: bool,
}

/// An export as it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum ExportStatus {
    /// A ublk disk.
    Ublk(UblkStatus),
    /// A vhost-user socket.
    VhostUser(VhostUserStatus),
}

/// What the kernel made of a ublk export.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UblkStatus {
    /// Name of the volume.
    pub volume: String,
    /// `/dev/ublkbN`.
    pub device: PathBuf,
    /// `/dev/ringblk/NAME`.
    pub link: PathBuf,
    /// Hardware queues, as the kernel granted them.
    pub queues: u16,
    /// Requests in flight a queue.
    pub depth: u16,
    /// Whether zero copy is in use.
    pub zero_copy: bool,
    /// Writes are refused.
    pub read_only: bool,
}

/// A vhost-user export and its VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VhostUserStatus {
    /// Name of the volume.
    pub volume: String,
    /// The socket it listens on.
    pub socket: PathBuf,
    /// The most queues a VMM may use.
    pub queues: u16,
    /// The largest vring a VMM may set up.
    pub queue_size: u16,
    /// Whether a VMM is connected now.
    pub connected: bool,
    /// Writes are refused.
    pub read_only: bool,
}

impl ExportStatus {
    /// Name of the export: `ublk:root` or `vhost-user:/run/x.sock`.
    pub fn name(&self) -> String {
        match self {
            ExportStatus::Ublk(ublk) => format!("ublk:{}", ublk.volume),
            ExportStatus::VhostUser(vhost_user) => {
                format!("vhost-user:{}", vhost_user.socket.display())
            }
        }
    }

    /// Name of the volume behind it.
    pub fn volume(&self) -> &str {
        match self {
            ExportStatus::Ublk(ublk) => &ublk.volume,
            ExportStatus::VhostUser(vhost_user) => &vhost_user.volume,
        }
    }
}

/// The answer to `POST /v1/stop`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stopping {
    /// Always true.
    pub stopping: bool,
}

/// The body of every error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiError {
    /// What went wrong, for people.
    pub error: String,
}

/// One status with an export of each kind, for tests of either end.
#[cfg(test)]
pub(crate) fn sample() -> Status {
    Status {
        version: "0.1.0".into(),
        pid: 42,
        workers: 2,
        stopping: false,
        volumes: vec![VolumeStatus {
            name: "root".into(),
            driver: "file".into(),
            target: "/srv/root.img".into(),
            size_bytes: 1 << 30,
            block_size: 512,
            read_only: false,
        }],
        exports: vec![
            ExportStatus::Ublk(UblkStatus {
                volume: "root".into(),
                device: "/dev/ublkb0".into(),
                link: "/dev/ringblk/root".into(),
                queues: 2,
                depth: 128,
                zero_copy: true,
                read_only: false,
            }),
            ExportStatus::VhostUser(VhostUserStatus {
                volume: "root".into(),
                socket: "/run/ringblk/root.sock".into(),
                queues: 2,
                queue_size: 256,
                connected: false,
                read_only: true,
            }),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_shape() {
        let json = serde_json::to_value(sample()).unwrap();
        assert_eq!(json["volumes"][0]["size_bytes"], 1 << 30);
        assert_eq!(json["exports"][0]["kind"], "ublk");
        assert_eq!(json["exports"][0]["device"], "/dev/ublkb0");
        assert_eq!(json["exports"][1]["kind"], "vhost-user");
        assert_eq!(json["exports"][1]["socket"], "/run/ringblk/root.sock");
        assert_eq!(serde_json::from_value::<Status>(json).unwrap(), sample());
    }

    #[test]
    fn keys_of_a_newer_service_are_passed_over() {
        let mut json = serde_json::to_value(sample()).unwrap();
        json["uptime_seconds"] = 3.into();
        json["exports"][0]["errors"] = 0.into();
        assert_eq!(serde_json::from_value::<Status>(json).unwrap(), sample());
    }

    #[test]
    fn exports_have_names() {
        let names: Vec<_> = sample().exports.iter().map(ExportStatus::name).collect();
        assert_eq!(names, ["ublk:root", "vhost-user:/run/ringblk/root.sock"]);
    }
}
