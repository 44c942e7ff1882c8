//! What a device is to be.

#![forbid(unsafe_code)]

use super::config::Recovery;
use super::info::{Info, State};
use super::record::Record;
use libublk::sys;

/// What a device is to be.
#[derive(Clone, Debug)]
pub struct DeviceSpec {
    /// What it is of.
    pub record: Record,
    /// N of `/dev/ublkbN`; `None`: the kernel picks.
    pub id: Option<u32>,
    /// Hardware queues; the kernel may grant fewer.
    pub queues: u16,
    /// Tags a queue.
    pub depth: u16,
    /// Bytes of the largest request.
    pub max_io: u32,
    /// Ask for `UBLK_F_AUTO_BUF_REG`.
    pub zero_copy: bool,
    /// What becomes of it without us.
    pub recovery: Recovery,
    /// What the driver offers: `UBLK_F_*`.
    pub features: u64,
}

impl DeviceSpec {
    /// As the driver is asked for it.
    pub(super) fn info(&self) -> Info {
        let mut flags = u64::from(sys::UBLK_F_CMD_IOCTL_ENCODE) | self.recovery.flags();
        if self.zero_copy {
            flags |= u64::from(sys::UBLK_F_AUTO_BUF_REG);
        }
        let mut optional = u64::from(sys::UBLK_F_UPDATE_SIZE);
        if self.recovery != Recovery::Off {
            optional |= u64::from(sys::UBLK_F_QUIESCE);
        }
        Info {
            id: self.id.unwrap_or(u32::MAX),
            queues: self.queues,
            depth: self.depth,
            max_io: self.max_io,
            state: State::Dead,
            server: Some(std::process::id()),
            flags: flags | self.features & optional,
            owner_tag: self.record.owner_tag(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_what_was_asked_for_and_what_the_driver_has() {
        let spec = |recovery, features| DeviceSpec {
            record: Record::new("v", "null", "1G"),
            id: None,
            queues: 1,
            depth: 1,
            max_io: 4096,
            zero_copy: true,
            recovery,
            features,
        };
        let extra = u64::from(sys::UBLK_F_QUIESCE | sys::UBLK_F_UPDATE_SIZE);
        let info = spec(Recovery::Reissue, extra).info();
        assert_eq!(info.id, u32::MAX, "the kernel picks");
        assert_eq!(info.flags & extra, extra);
        assert!(info.has(sys::UBLK_F_USER_RECOVERY_REISSUE) && info.has(sys::UBLK_F_AUTO_BUF_REG));
        // QUIESCE without recovery is an error to the driver.
        assert!(!spec(Recovery::Off, u64::MAX).info().has(sys::UBLK_F_QUIESCE));
        assert!(!spec(Recovery::Queue, 0).info().has(sys::UBLK_F_QUIESCE));
        assert!(!spec(Recovery::FailIo, u64::MAX).info().has(sys::UBLK_F_USER_RECOVERY_REISSUE));
        assert!(
            !spec(Recovery::Off, u64::MAX).info().has(sys::UBLK_F_BATCH_IO),
            "nothing that was not asked for"
        );
    }
}
