//! Limits of volumes, while they are served.

#![forbid(unsafe_code)]

use super::Shared;
use crate::engine::Volume;
use crate::engine::limits::LimitsChange;
use crate::service::control::ControlError;
use crate::service::status::LimitsStatus;
use crate::worker::WorkerHandle;

/// A volume's limits as they are now.
pub(super) fn shown(volume: &Volume) -> LimitsStatus {
    let (limits, config) = (volume.limits(), volume.limits().config());
    LimitsStatus {
        volume: volume.name().into(),
        limits: config.numbers(),
        // A group's numbers may have come from another member.
        group: limits.group().map(str::to_owned),
        throttled_ms: u64::try_from(limits.throttled().as_millis()).unwrap_or(u64::MAX),
    }
}

impl Shared {
    /// Changes what is named of a volume's limits, and of those that share them. What waits for them goes on by the new ones.
    pub(super) fn change_limits(
        &self,
        name: &str,
        wanted: &LimitsChange,
    ) -> Result<LimitsStatus, ControlError> {
        let volume = self.volume(name)?;
        let changed = volume.limits().change(wanted);
        let changed =
            changed.map_err(|(key, reason)| ControlError::Impossible(format!("{key}: {reason}")))?;
        // Volumes of the same group may be on any of them.
        self.handles.iter().for_each(WorkerHandle::limits_changed);
        let now =
            changed.numbers().into_iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>();
        let now = if now.is_empty() { "none".into() } else { now.join(", ") };
        match volume.limits().group() {
            Some(group) => log::info!("volume {name}: the limits of group {group}: {now}"),
            None => log::info!("volume {name}: its limits: {now}"),
        }
        Ok(shown(&volume))
    }
}
