//! What the control API may ask of a running service.

use super::{Shared, lock};
use crate::engine::config::VolumeConfig;
use crate::engine::{PolicyState, Volume};
use crate::service::control::{Managed, Refusal};
use crate::service::exports::{Export, Farewell};
use crate::service::status::{Refresh, Resize, Resized, Resume, Resumed, Status, Stop, VolumeStatus};
use std::sync::atomic::Ordering;

impl Managed for Shared {
    fn status(&self) -> Status {
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            workers: self.placement.workers(),
            stopping: self.stopping.load(Ordering::Relaxed),
            sandbox: self.sandbox.clone(),
            volumes: self.volume_status.iter().map(|status| self.as_it_is(status)).collect(),
            exports: lock(&self.exports).iter().map(Export::status).collect(),
        }
    }

    fn request_stop(&self, wanted: &Stop) -> Result<(), Refusal> {
        let how = if wanted.hand_over { Farewell::HandOver } else { Farewell::Stop };
        let mut farewell = lock(&self.farewell);
        match (*farewell, how) {
            (None, Farewell::HandOver) => {
                let refused: Vec<String> =
                    lock(&self.exports).iter().filter_map(|export| export.can_hand_over().err()).collect();
                if !refused.is_empty() {
                    return Err(Refusal::Impossible(refused.join("; ")));
                }
            }
            (Some(Farewell::Stop), Farewell::HandOver) => {
                let reason = "the service is stopping already, and its disks go with it";
                return Err(Refusal::Impossible(reason.into()));
            }
            _ => {}
        }
        farewell.get_or_insert(how);
        self.stop.notify_one();
        Ok(())
    }

    fn resize(&self, volume: &str, wanted: &Resize) -> Result<Resized, Refusal> {
        self.change_size(volume, |volume, exports| volume.resize(wanted.size, wanted.force, exports))
    }

    fn refresh(&self, volume: &str, wanted: &Refresh) -> Result<Resized, Refusal> {
        self.change_size(volume, |volume, exports| volume.refresh(wanted.force, exports))
    }

    fn resume(&self, name: &str, wanted: &Resume) -> Result<Resumed, Refusal> {
        let volume = self.volumes.get(name).ok_or_else(|| Refusal::Unknown(name.into()))?;
        Ok(Resumed { volume: name.into(), requests: volume.resume(wanted.give_up) })
    }
}

impl Shared {
    /// A volume's status, with what may have changed since it was opened.
    fn as_it_is(&self, opened: &VolumeStatus) -> VolumeStatus {
        let volume = &self.volumes[&opened.name];
        let PolicyState { paused, waiting, .. } = volume.policy_state();
        VolumeStatus { size_bytes: volume.geometry().bytes(), paused, waiting, ..opened.clone() }
    }
}

/// A volume's status as it was opened.
pub(super) fn volume_status(volume: &Volume, config: &VolumeConfig) -> VolumeStatus {
    VolumeStatus {
        name: volume.name().into(),
        driver: config.driver().into(),
        target: config.target(),
        size_bytes: volume.geometry().bytes(),
        block_size: volume.geometry().logical_block,
        read_only: volume.geometry().read_only,
        policy: volume.policy_state().policy.into(),
        paused: false,
        waiting: 0,
    }
}
