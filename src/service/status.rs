//! What a running service tells about itself: the bodies of the control API, shared by its two ends.
//!
//! Readers take unknown keys in their stride, so that a newer service can be asked by an older `ringblk list`.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
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
    /// What the service has given up.
    #[serde(default)]
    pub sandbox: SandboxStatus,
    /// Every volume.
    pub volumes: Vec<VolumeStatus>,
    /// Every export.
    pub exports: Vec<ExportStatus>,
}

/// What a service has given up, and what of it the kernel could take.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxStatus {
    /// `on`, `log` or `off`.
    pub mode: String,
    /// Version of landlock in force; `None`: none.
    pub landlock_abi: Option<i32>,
    /// What happens to other system calls: `refuse`, `log` or `none`.
    pub seccomp: String,
    /// Capabilities that are left.
    pub capabilities: Vec<String>,
}

impl fmt::Display for SandboxStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.landlock_abi {
            Some(abi) => write!(f, "landlock {abi}")?,
            None => write!(f, "no landlock")?,
        }
        write!(f, ", seccomp {}, ", self.seccomp)?;
        match &self.capabilities[..] {
            [] => write!(f, "no capabilities"),
            some => write!(f, "{}", some.join(" ")),
        }
    }
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
    /// What becomes of requests that the store fails: `report`, `retry` or `stop`.
    #[serde(default)]
    pub policy: String,
    /// The store failed, and requests wait for `ringblk resume`.
    #[serde(default)]
    pub paused: bool,
    /// Requests that wait for that, or to be tried again.
    #[serde(default)]
    pub waiting: usize,
    /// Why it is not served yet: it could not be opened, or an export of its not be started, and that is tried again. Its
    /// sizes are 0 as long as it is not open.
    #[serde(default)]
    pub unavailable: Option<String>,
    /// It has no exports, and is opened with its first. Its sizes are 0 until then.
    #[serde(default)]
    pub idle: bool,
    /// Its limits of operations and bytes in a second, by their names; none: no limits.
    #[serde(default)]
    pub limits: BTreeMap<String, u64>,
    /// The volumes of one group share one set of limits.
    #[serde(default)]
    pub group: Option<String>,
    /// How long its queues have waited for its limits so far, all together, in milliseconds.
    #[serde(default)]
    pub throttled_ms: u64,
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
    /// Memory of the requests' own, which the kernel copies to and from: none with zero copy.
    #[serde(default)]
    pub buffer_bytes: u64,
    /// Whether that is sure to stay in memory, so that the disk may be swapped to.
    #[serde(default)]
    pub buffers_locked: bool,
    /// Writes are refused.
    pub read_only: bool,
    /// Workers of its own; `None`: it shares those of the service.
    #[serde(default)]
    pub workers: Option<usize>,
    /// Its volume is not there yet, and so this disk is not served; `device` is empty.
    #[serde(default)]
    pub waiting: bool,
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
    /// Whether another one waits for that one to go.
    #[serde(default)]
    pub vmm_waiting: bool,
    /// Writes are refused.
    pub read_only: bool,
    /// Workers of its own; `None`: it shares those of the service.
    #[serde(default)]
    pub workers: Option<usize>,
    /// Its volume is not there yet, and so nobody listens on the socket.
    #[serde(default)]
    pub waiting: bool,
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

    /// `ublk` or `vhost-user`.
    pub fn frontend(&self) -> &'static str {
        match self {
            ExportStatus::Ublk(_) => "ublk",
            ExportStatus::VhostUser(_) => "vhost-user",
        }
    }
}

/// The answer to `POST /v1/stop`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stopping {
    /// Always true.
    pub stopping: bool,
}

/// The body of `POST /v1/stop`; none asks for the same as an empty one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stop {
    /// ublk disks stay, and wait for the next service.
    #[serde(default)]
    pub hand_over: bool,
    /// ublk disks go, also those that somebody uses. Else those stay, as with `hand_over`.
    #[serde(default)]
    pub force: bool,
    /// Volumes whose disks somebody is known to use, in a way that the service may not see.
    #[serde(default)]
    pub keep: Vec<String>,
}

/// The body of `POST /v1/volumes/NAME/resize`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// The new capacity in bytes.
    pub size: u64,
    /// Even if the volume shrinks.
    #[serde(default)]
    pub force: bool,
}

/// The body of `POST /v1/volumes/NAME/refresh`; none asks for the same as an empty one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refresh {
    /// Even if the volume shrinks.
    #[serde(default)]
    pub force: bool,
}

/// The body of `POST /v1/volumes/NAME/resume`; none asks for the same as an empty one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resume {
    /// Requests that wait fail, instead of being tried again.
    #[serde(default)]
    pub give_up: bool,
}

/// The answer to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resumed {
    /// The volume.
    pub volume: String,
    /// How many requests were waiting.
    pub requests: usize,
}

/// The body of `POST /v1/volumes`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddVolume {
    /// As `serve --volume` takes it: `NAME=DRIVER:TARGET[,key=value...]`.
    pub volume: String,
}

/// The body of `POST /v1/exports`: one of these.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddExport {
    /// As `serve --vhost-user` takes it: `VOLUME=SOCKET[,key=value...]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_user: Option<String>,
    /// As `serve --ublk` takes it: `VOLUME[,key=value...]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ublk: Option<String>,
}

/// The body of `POST /v1/exports/remove`: one of these.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoveExport {
    /// The socket, as it was said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_user: Option<PathBuf>,
    /// The disk's volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ublk: Option<String>,
    /// Whoever uses it.
    #[serde(default)]
    pub force: bool,
}

/// The answer to what adds or removes something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// Of the volume or the export.
    pub name: String,
    /// False where it was so already.
    pub changed: bool,
}

/// The body of `POST /v1/volumes/NAME/fault`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// Whether the volume's fault layers make faults from now on.
    pub enabled: bool,
}

/// The answer to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Faulted {
    /// The volume.
    pub volume: String,
    /// As asked.
    pub enabled: bool,
}

/// The answer to `GET /v1/volumes/NAME/limit`, and to a `POST` there, whose body has the numbers that are to change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitsStatus {
    /// The volume.
    pub volume: String,
    /// As they are now: see [`VolumeStatus::limits`].
    pub limits: BTreeMap<String, u64>,
    /// See [`VolumeStatus::group`].
    pub group: Option<String>,
    /// See [`VolumeStatus::throttled_ms`].
    pub throttled_ms: u64,
}

/// The answer to a resize or refresh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resized {
    /// The volume.
    pub volume: String,
    /// Capacity before.
    pub from_bytes: u64,
    /// Capacity now; the same where nothing changed.
    pub size_bytes: u64,
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
        sandbox: SandboxStatus {
            mode: "on".into(),
            landlock_abi: Some(6),
            seccomp: "refuse".into(),
            capabilities: vec!["cap_sys_admin".into()],
        },
        volumes: vec![VolumeStatus {
            name: "root".into(),
            driver: "file".into(),
            target: "/srv/root.img".into(),
            size_bytes: 1 << 30,
            block_size: 512,
            read_only: false,
            policy: "stop".into(),
            paused: true,
            waiting: 3,
            unavailable: None,
            idle: false,
            limits: BTreeMap::new(),
            group: None,
            throttled_ms: 0,
        }],
        exports: vec![
            ExportStatus::Ublk(UblkStatus {
                volume: "root".into(),
                device: "/dev/ublkb0".into(),
                link: "/dev/ringblk/root".into(),
                queues: 2,
                depth: 128,
                zero_copy: true,
                buffer_bytes: 0,
                buffers_locked: true,
                read_only: false,
                workers: None,
                waiting: false,
            }),
            ExportStatus::VhostUser(VhostUserStatus {
                volume: "root".into(),
                socket: "/run/ringblk/root.sock".into(),
                queues: 2,
                queue_size: 256,
                connected: false,
                vmm_waiting: false,
                read_only: true,
                workers: Some(1),
                waiting: false,
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
        let policy = ["policy", "paused", "waiting"].map(|key| json["volumes"][0][key].to_string());
        assert_eq!(policy, ["\"stop\"", "true", "3"]);
        assert_eq!(json["exports"][0]["kind"], "ublk");
        assert_eq!(json["exports"][0]["device"], "/dev/ublkb0");
        assert_eq!(json["exports"][0]["workers"], serde_json::Value::Null);
        assert_eq!(json["exports"][1]["workers"], 1);
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
