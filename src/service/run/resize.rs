//! New sizes for volumes that are served.

use super::{Shared, lock};
use crate::engine::{self, ResizeError, Volume};
use crate::service::control::ControlError;
use crate::service::exports::Export;
use crate::service::status::Resized;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// The longest that a shrinking volume waits for requests which were admitted before. Shorter than the control API's
/// clients wait for their answer.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// For a worker to get around to its answer.
const SLACK: Duration = Duration::from_secs(1);

impl Shared {
    /// Changes the size of a volume with `how`.
    pub(super) fn change_size(
        &self,
        name: &str,
        how: impl FnOnce(&Volume, &Exports<'_>) -> Result<engine::Resized, ResizeError>,
    ) -> Result<Resized, ControlError> {
        let volume = self.volume(name)?;
        if self.stopping.load(Ordering::Relaxed) {
            return Err(ControlError::Impossible("the service is stopping".into()));
        }
        let exports = Exports { shared: self, volume: &volume };
        let resized = how(&volume, &exports)
            .map_err(|error| ControlError::Impossible(format!("volume {name}: {error}")))?;
        if resized.from != resized.to
            && let Some(served) = self.served(name)
        {
            served.resizes.fetch_add(1, Ordering::Relaxed);
        }
        Ok(Resized { volume: name.into(), from_bytes: resized.from, size_bytes: resized.to })
    }
}

/// How often a size that another change holds up is tried, a second apart.
const CATCH_UP_TRIES: u32 = 60;

/// Takes new sizes that stores tell of by themselves, for as long as there is a volume that may. `told` hears volumes' names.
pub(super) fn follow_growth(shared: &Weak<Shared>, told: &Receiver<String>) {
    while let Ok(name) = told.recv() {
        for tries in 1.. {
            let Some(shared) = shared.upgrade() else { return };
            let mut under_way = false;
            let result = shared.change_size(&name, |volume, exports| {
                let result = volume.catch_up(exports);
                under_way = matches!(result, Err(ResizeError::UnderWay));
                result
            });
            drop(shared);
            match result {
                Err(_) if under_way && tries < CATCH_UP_TRIES => std::thread::sleep(SLACK),
                // It has its own name in it.
                Err(ControlError::Impossible(reason)) => {
                    log::warn!("its store has grown, and its clients do not see it: {reason}");
                    break;
                }
                _ => break,
            }
        }
    }
}

/// The exports of one volume.
pub(super) struct Exports<'a> {
    shared: &'a Shared,
    volume: &'a Arc<Volume>,
}

impl Exports<'_> {
    /// Asks each; what they say against it, in one line.
    fn all(&self, mut ask: impl FnMut(&mut Export) -> Result<(), String>) -> Result<(), String> {
        let mut exports = lock(&self.shared.exports);
        let ours = exports.iter_mut().filter(|export| export.status().volume() == self.volume.name());
        let refused: Vec<String> = ours
            .filter_map(|export| {
                ask(export).err().map(|reason| format!("{}: {reason}", export.status().name()))
            })
            .collect();
        if refused.is_empty() { Ok(()) } else { Err(refused.join("; ")) }
    }
}

impl engine::Exports for Exports<'_> {
    fn can_resize(&self) -> Result<(), String> {
        self.all(|export| export.can_resize())
    }

    fn resize(&self, sectors: u64) -> Result<(), String> {
        self.all(|export| export.resize(sectors))
    }

    fn drain(&self) -> bool {
        let handles = self.shared.handles_of(self.volume);
        let answers: Vec<_> =
            handles.iter().map(|handle| handle.drain(self.volume.clone(), DRAIN_LIMIT)).collect();
        // A worker that has ended answers nothing, and nothing is in flight on it.
        let deadline = Instant::now() + DRAIN_LIMIT + SLACK;
        answers.into_iter().all(|answer| {
            let left = deadline.saturating_duration_since(Instant::now());
            !matches!(answer.recv_timeout(left), Ok(false) | Err(RecvTimeoutError::Timeout))
        })
    }
}
