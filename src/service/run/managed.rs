//! What the control API may ask of a running service.

use super::late::Waiting;
use super::{Served, Shared, late, limits, lock};
use crate::engine::limits::LimitsChange;
use crate::engine::{PolicyState, Volume, fault};
use crate::service::control::{ControlError, ControlHandler};
use crate::service::exports::{Export, ShutdownMode};
use crate::service::stats::{ExportStats, Stats, VolumeStats, WorkerTime};
use crate::service::status::{
    AddExport, AddVolume, Changed, Fault, Faulted, LimitsStatus, Refresh, RemoveExport, Resize, Resized,
    Resume, Resumed, Status, Stop, VolumeStatus,
};
use crate::stats::Clock;
use crate::worker::ExportVolume;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

impl ControlHandler for Shared {
    fn status(&self) -> Status {
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            workers: self.handles.len(),
            stopping: self.stopping.load(Ordering::Relaxed),
            sandbox: self.sandbox.clone(),
            volumes: self.volumes_status(),
            exports: {
                let waiting = lock(&self.waiting);
                let waiting = waiting.values().flat_map(Waiting::export_status).collect::<Vec<_>>();
                lock(&self.exports).iter().map(Export::status).chain(waiting).collect()
            },
        }
    }

    fn stats(&self) -> Stats {
        let exports = lock(&self.exports);
        let exports = exports.iter().map(|export| ExportStats::new(&export.status(), export.stats().read()));
        Stats {
            uptime_ns: Clock::get().now(),
            exports: exports.collect(),
            volumes: self.all_served().iter().map(|served| served.stats()).collect(),
            workers: self.worker_stats.iter().map(|stats| WorkerTime::from(&**stats)).collect(),
        }
    }

    fn request_stop(&self, wanted: &Stop) -> Result<(), ControlError> {
        let how = match (wanted.hand_over, wanted.force) {
            (true, true) => {
                let reason = "hand_over leaves the disks, and force takes them away: ask for one";
                return Err(ControlError::Impossible(reason.into()));
            }
            (true, false) => ShutdownMode::HandOver,
            (false, true) => ShutdownMode::Force,
            (false, false) => ShutdownMode::Stop,
        };
        let mut farewell = lock(&self.farewell);
        match (*farewell, how) {
            (None, ShutdownMode::HandOver) => {
                let refused: Vec<String> =
                    lock(&self.exports).iter().filter_map(|export| export.can_hand_over().err()).collect();
                if !refused.is_empty() {
                    return Err(ControlError::Impossible(refused.join("; ")));
                }
            }
            (None, ShutdownMode::Stop) => {
                if let Some(reason) = self.in_use() {
                    return Err(ControlError::Impossible(reason));
                }
            }
            (Some(ShutdownMode::Stop | ShutdownMode::Force), ShutdownMode::HandOver) => {
                let reason = "the service is stopping already, and its disks go with it";
                return Err(ControlError::Impossible(reason.into()));
            }
            _ => {}
        }
        lock(&self.keep).extend(wanted.keep.iter().cloned());
        farewell.get_or_insert(how);
        self.stop.notify_one();
        Ok(())
    }

    fn resize(&self, volume: &str, wanted: &Resize) -> Result<Resized, ControlError> {
        self.change_size(volume, |volume, exports| volume.resize(wanted.size, wanted.force, exports))
    }

    fn refresh(&self, volume: &str, wanted: &Refresh) -> Result<Resized, ControlError> {
        self.change_size(volume, |volume, exports| volume.refresh(wanted.force, exports))
    }

    fn resume(&self, name: &str, wanted: &Resume) -> Result<Resumed, ControlError> {
        let volume = self.volume(name)?;
        Ok(Resumed { volume: name.into(), requests: volume.resume(wanted.give_up) })
    }

    fn fault(&self, name: &str, wanted: &Fault) -> Result<Faulted, ControlError> {
        let Fault { enabled } = *wanted;
        if fault::switch(&*self.volume(name)?, enabled) == 0 {
            let reason =
                format!("volume {name} has no faults to switch: it stands on no volume of the driver fault");
            return Err(ControlError::Impossible(reason));
        }
        log::info!("volume {name}: its faults are switched {}", if enabled { "on" } else { "off" });
        Ok(Faulted { volume: name.into(), enabled })
    }

    fn add_volume(&self, wanted: &AddVolume) -> Result<Changed, ControlError> {
        Shared::add_volume(self, wanted)
    }

    fn remove_volume(&self, name: &str) -> Result<Changed, ControlError> {
        Shared::remove_volume(self, name)
    }

    fn add_export(&self, wanted: &AddExport) -> Result<Changed, ControlError> {
        Shared::add_export(self, wanted)
    }

    fn remove_export(&self, wanted: &RemoveExport) -> Result<Changed, ControlError> {
        Shared::remove_export(self, wanted)
    }

    fn limits(&self, name: &str) -> Result<LimitsStatus, ControlError> {
        Ok(limits::shown(&*self.volume(name)?))
    }

    fn limit(&self, name: &str, wanted: &LimitsChange) -> Result<LimitsStatus, ControlError> {
        self.change_limits(name, wanted)
    }
}

impl Shared {
    /// All volumes by name: those that are there, or are waited for, and those without exports that no other stands on.
    fn volumes_status(&self) -> Vec<VolumeStatus> {
        let desired = lock(&self.desired).clone();
        let mut names: BTreeSet<String> = lock(&self.waiting).keys().cloned().collect();
        names.extend(lock(&self.volumes).keys().cloned());
        let stood_on: BTreeSet<&str> =
            desired.volumes.values().filter_map(|volume| volume.summary().base).collect();
        let idle = |name: &&String| !stood_on.contains(name.as_str());
        names.extend(desired.volumes.keys().filter(idle).cloned());
        let idle = |name: &str| {
            let (volume, policy) = (desired.volumes.get(name)?, desired.policies.get(name)?);
            Some(VolumeStatus { idle: true, ..late::configured(name, volume, policy) })
        };
        names.iter().filter_map(|name| self.volume_status(name).or_else(|| idle(name))).collect()
    }

    /// A volume's status as it is now.
    fn volume_status(&self, name: &str) -> Option<VolumeStatus> {
        // In this order: it is served before it does not wait any more.
        let waiting = lock(&self.waiting).get(name).map(Waiting::volume_status);
        let Some(served) = self.served(name) else { return waiting };
        let Served { volume, status, .. } = &*served;
        // What it is served without, if there is such an export.
        let unavailable = waiting.and_then(|status| status.unavailable);
        let PolicyState { paused, waiting, .. } = volume.policy_state();
        let size_bytes = volume.geometry().bytes();
        let LimitsStatus { limits, group, throttled_ms, .. } = limits::shown(volume);
        let status = status.clone();
        Some(VolumeStatus { size_bytes, paused, waiting, unavailable, limits, group, throttled_ms, ..status })
    }

    /// The volume of this name.
    ///
    /// # Errors
    /// When there is none, or it is not there yet.
    pub(super) fn volume(&self, name: &str) -> Result<Arc<Volume>, ControlError> {
        if let Some(served) = self.served(name) {
            return Ok(served.volume.clone());
        }
        let cause = lock(&self.waiting).get(name).map(Waiting::cause);
        Err(match cause {
            Some(cause) => ControlError::Impossible(format!("it is not there yet: {cause}")),
            None => {
                let desired = lock(&self.desired).clone();
                match desired.bases().find(|(base, _)| *base == name) {
                    Some((_, root)) => ControlError::Impossible(format!(
                        "volume {name} is not served by itself: ask for {root}, which stands on it"
                    )),
                    None if desired.volumes.contains_key(name) => ControlError::Impossible(format!(
                        "volume {name} is not served: it has no export (ringblk export add)"
                    )),
                    None => ControlError::Unknown(name.into()),
                }
            }
        })
    }
}

impl Served {
    /// What became of it so far.
    fn stats(&self) -> VolumeStats {
        let volume = &self.volume;
        VolumeStats {
            name: volume.name().into(),
            throttled_ns: u64::try_from(volume.limits().throttled().as_nanos()).unwrap_or(u64::MAX),
            losses: volume.losses(),
            resizes: self.resizes.load(Ordering::Relaxed),
        }
    }

    /// A volume that was opened. `status`: what is known of it from the configuration.
    pub(super) fn new(volume: Volume, status: VolumeStatus) -> Served {
        let volume = Arc::new(volume);
        let geometry = volume.geometry();
        let status = VolumeStatus {
            block_size: geometry.logical_block,
            read_only: geometry.read_only,
            unavailable: None,
            ..status
        };
        Served { export: ExportVolume::new(volume.clone(), 1), volume, status, resizes: AtomicU64::new(0) }
    }
}
