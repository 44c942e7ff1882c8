//! Why there is no device, and what to do.

#![forbid(unsafe_code)]

use super::commands::Failed;
use super::config::Recovery;
use super::features::{NoRecovery, NoZeroCopy, Unavailable};
use super::symlink::NameError;
use crate::block::Errno;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// A step in a device's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControlOp {
    /// `UBLK_U_CMD_ADD_DEV`.
    Add,
    /// Opening its character device.
    Open,
    /// `UBLK_U_CMD_GET_DEV_INFO` and the like.
    Look,
    /// `UBLK_U_CMD_START_USER_RECOVERY`.
    Recover,
    /// `UBLK_U_CMD_END_USER_RECOVERY`.
    TakeOver,
    /// `UBLK_U_CMD_START_DEV`.
    Start,
    /// `UBLK_U_CMD_UPDATE_SIZE`.
    Resize,
    /// `UBLK_U_CMD_QUIESCE_DEV`.
    Quiesce,
    /// `UBLK_U_CMD_STOP_DEV`.
    Stop,
    /// `UBLK_U_CMD_TRY_STOP_DEV`.
    TryStop,
    /// `UBLK_U_CMD_DEL_DEV`.
    Delete,
}

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody wants it any more.
    #[error("given up, since the service is stopping")]
    GivenUp,
    /// There is no ublk to be used.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// Zero copy was asked for.
    #[error("zero-copy=on is not possible")]
    ZeroCopy(#[from] NoZeroCopy),
    /// A way to outlive the service was asked for.
    #[error("recovery={spec} is not possible")]
    Recovery {
        /// What was asked for.
        spec: Recovery,
        /// Why not.
        source: NoRecovery,
    },
    /// A live server has the volume's device.
    #[error("{} is volume {volume}'s already, and process {pid} serves it: is another ringblk running?", .device.display())]
    Served {
        /// Its disk.
        device: PathBuf,
        /// The volume.
        volume: String,
        /// The server.
        pid: u32,
    },
    /// A live server has a device that was to be removed.
    #[error("{} is served by process {pid}: stop that (`ringblk stop`) instead", .device.display())]
    InService {
        /// Its disk.
        device: PathBuf,
        /// The server.
        pid: u32,
    },
    /// A dead server's descriptors do not go away.
    #[error(
        "{}: {} s after its server died the kernel still waits for that server's requests; is its store stuck?",
        .device.display(), .after.as_secs()
    )]
    Exiting {
        /// Its disk.
        device: PathBuf,
        /// Waited for so long.
        after: Duration,
    },
    /// Which one it is cannot be told.
    #[error(
        "{devices} all wait for a server of volume {volume}: remove all but one with `ringblk remove DEVICE`"
    )]
    Several {
        /// The disks.
        devices: String,
        /// The volume.
        volume: String,
    },
    /// A disk cannot be changed while it waits.
    #[error(
        "{} waits for a server of volume {volume}, and cannot be served with this configuration: {differences}. \
         Serve it with the one that it was made with, or give it up with `ringblk remove {volume}` (then what it \
         waits for fails)",
        .device.display()
    )]
    Differs {
        /// Its disk.
        device: PathBuf,
        /// The volume.
        volume: String,
        /// All of them.
        differences: String,
    },
    /// Its store is another disk's.
    #[error(
        "{} waits for a server of volume {other}, which has the same store as volume {volume}: serve it under that name, \
         or give it up with `ringblk remove {other}` (then what it waits for fails)", .device.display()
    )]
    OtherName {
        /// Its disk.
        device: PathBuf,
        /// The volume that the disk is of.
        other: String,
        /// The volume.
        volume: String,
    },
    /// What it is of cannot be kept.
    #[error("a disk's record cannot be kept in {}", .directory.display())]
    Record {
        /// Where it would be.
        directory: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The size of a disk stays as it is.
    #[error(transparent)]
    NoResize(#[from] NoResize),
    /// The stable name is not free.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The kernel said no.
    #[error("the kernel refused to {op} the device{}: {errno}", hint(*.op, *.errno, *.id))]
    Refused {
        /// To do what.
        op: ControlOp,
        /// Its answer.
        errno: Errno,
        /// The number that was asked for.
        id: Option<u32>,
    },
    /// The kernel said nothing.
    #[error("the kernel did not {op} the device in {} s", .after.as_secs())]
    TimedOut {
        /// What was asked.
        op: ControlOp,
        /// Waited for so long.
        after: Duration,
    },
    /// No thread for the control side, or it ended.
    #[error("the device's control thread")]
    Thread(#[source] io::Error),
    /// A worker could not take a queue.
    #[error("queue {queue}")]
    Queue {
        /// Its number.
        queue: u16,
        /// Why.
        source: io::Error,
    },
    /// The kernel waits for fetches that it has refused.
    #[error("queue {queue}: the kernel refused its fetches; the log says why")]
    Fetch {
        /// Its number, from 0.
        queue: usize,
    },
}

/// Why a disk keeps its size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoResize {
    /// `UBLK_F_UPDATE_SIZE` is missing.
    #[error(
        "the kernel ({release}) cannot change the size of a ublk disk: UBLK_F_UPDATE_SIZE came with Linux 6.16; \
         the disk gets its new size when it is made again (stop the service and start it)"
    )]
    Kernel {
        /// Of the kernel.
        release: String,
    },
    /// Not whole blocks, which the driver would take all the same.
    #[error("{sectors} sectors are no whole number of logical blocks of {block} bytes")]
    Ragged {
        /// Asked for.
        sectors: u64,
        /// Of the disk, in bytes.
        block: u32,
    },
    /// It is being stopped, or handed over.
    #[error("the disk is not in service")]
    NotLive,
}

impl Error {
    /// What became of a command, which was waited for no longer than `limit`.
    pub(super) fn of(op: ControlOp, failed: Failed, id: Option<u32>, limit: Duration) -> Error {
        match failed {
            Failed::Refused(errno) => Error::Refused { op, errno, id },
            Failed::NoAnswer => Error::TimedOut { op, after: limit },
        }
    }
}

/// What an errno means for a command, where that is known.
fn hint(op: ControlOp, errno: Errno, id: Option<u32>) -> String {
    match (op, errno.raw(), id) {
        (ControlOp::Add, libc::EPERM, _) => " (it wants CAP_SYS_ADMIN: run as root)".into(),
        (ControlOp::Open, libc::EACCES | libc::EPERM, Some(id)) => {
            format!(" (/dev/ublkc{id} is not ours to open: run as root)")
        }
        (ControlOp::Recover, libc::EBUSY, Some(id)) => {
            format!(" /dev/ublkb{id} (its old server, or another one, has it open)")
        }
        (ControlOp::Recover, libc::EINVAL, Some(id)) => format!(
            " /dev/ublkb{id} (a server died while it recovered it, or it was made without recovery: give it up with \
             `ringblk remove /dev/ublkb{id}`)"
        ),
        (ControlOp::Add, libc::EEXIST, Some(id)) => format!(
            " (number {id} is taken by a running device, by one whose server died, or by one that is gone and \
             still open somewhere: choose another, or leave the choice to the kernel)"
        ),
        (ControlOp::Add, libc::EINVAL, _) => " (max-io must be whole pages)".into(),
        _ => String::new(),
    }
}

impl fmt::Display for ControlOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ControlOp::Add => "add",
            ControlOp::Open => "open",
            ControlOp::Look => "describe",
            ControlOp::Recover => "recover",
            ControlOp::TakeOver => "take over",
            ControlOp::Start => "start",
            ControlOp::Resize => "resize",
            ControlOp::Quiesce => "quiesce",
            ControlOp::Stop | ControlOp::TryStop => "stop",
            ControlOp::Delete => "delete",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_say_what_to_do() {
        let told = |op, raw, id| Error::Refused { op, errno: Errno::new(raw), id }.to_string();
        assert!(told(ControlOp::Add, libc::EPERM, None).contains("CAP_SYS_ADMIN"));
        assert!(told(ControlOp::Add, libc::EEXIST, Some(7)).contains("number 7 is taken"));
        assert!(told(ControlOp::Recover, libc::EINVAL, Some(7)).contains("ringblk remove /dev/ublkb7"));
        assert!(
            told(ControlOp::Start, libc::EIO, None).starts_with("the kernel refused to start the device: ")
        );
    }
}
