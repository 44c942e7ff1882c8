//! Volumes and exports that come and go while the others are served.
//!
//! What is asked for is first a configuration as a whole, held to all the rules of one that a service starts with
//! ([`Config::with_volume`] and its siblings); then it is made so, and only then it is what the service has. One change at a
//! time. A volume is opened with its first export and closed after its last.

use super::{Served, Shared, late, lock};
use crate::block::Causes;
use crate::engine::limits::Limits;
use crate::engine::{Opener, Volume};
use crate::frontend::ublk::config::UblkConfig;
use crate::frontend::vhost_user::config::VhostUserConfig;
use crate::service::config::{Config, ConfigError};
use crate::service::control::ControlError;
use crate::service::exports::ublk::{Others, UblkExport, found};
use crate::service::exports::vhost_user::Endpoint;
use crate::service::exports::{Export, ShutdownMode};
use crate::service::status::{AddExport, AddVolume, Changed, RemoveExport};
use crate::worker::WorkerHandle;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long a volume may take to open, and an export to go. Shorter than the control API's clients wait for their answer.
const LIMIT: Duration = Duration::from_secs(20);

fn refused(error: &(dyn std::error::Error + 'static)) -> ControlError {
    ControlError::Impossible(Causes(error).to_string())
}

impl From<ConfigError> for ControlError {
    fn from(error: ConfigError) -> ControlError {
        ControlError::Impossible(error.to_string())
    }
}

impl Shared {
    /// Has a volume be known, for exports to come.
    pub(super) fn add_volume(&self, wanted: &AddVolume) -> Result<Changed, ControlError> {
        let _changing = lock(&self.changing);
        let desired = self.may_change()?;
        let (name, next) = desired.with_volume(&wanted.volume)?;
        let changed = next != *desired;
        if changed {
            // That it can be opened is better known now: nobody waits for it yet.
            next.volumes[&name].examine().map_err(ControlError::Impossible)?;
            *lock(&self.desired) = Arc::new(next);
            log::info!("volume {name}: it is known now");
        }
        Ok(Changed { name, changed })
    }

    /// Forgets a volume that has no exports.
    pub(super) fn remove_volume(&self, name: &str) -> Result<Changed, ControlError> {
        let _changing = lock(&self.changing);
        let desired = self.may_change()?;
        let next = desired.without_volume(name).map_err(ControlError::Impossible)?;
        let changed = next != *desired;
        if changed {
            *lock(&self.desired) = Arc::new(next);
            log::info!("volume {name}: it is forgotten");
        }
        Ok(Changed { name: name.into(), changed })
    }

    /// Starts an export, and opens its volume if it is the first.
    pub(super) fn add_export(&self, wanted: &AddExport) -> Result<Changed, ControlError> {
        let _changing = lock(&self.changing);
        let desired = self.may_change()?;
        // A stop waits for this, and nothing comes up after it.
        let Some(_arrival) = self.arrivals.begin() else { return Err(stopping()) };
        let (name, next) = match (&wanted.vhost_user, &wanted.ublk) {
            (Some(text), None) => {
                let (export, next) = desired.with_vhost_user(text)?;
                let name = format!("vhost-user:{}", export.socket.display());
                if next == *desired {
                    return Ok(Changed { name, changed: false });
                }
                self.serve(&next, &export.volume, |served| self.add_socket(&export, served))?;
                (name, next)
            }
            (None, Some(text)) => {
                let (export, next) = desired.with_ublk(text)?;
                let name = format!("ublk:{}", export.volume);
                if next == *desired {
                    return Ok(Changed { name, changed: false });
                }
                self.serve(&next, &export.volume, |served| self.add_disk(&next, &export, served))?;
                (name, next)
            }
            _ => return Err(ControlError::Body("the body: say vhost_user or ublk, and not both".into())),
        };
        *lock(&self.desired) = Arc::new(next);
        log::info!("{name}: it is served");
        Ok(Changed { name, changed: true })
    }

    /// Ends an export, and closes its volume if it was the last.
    pub(super) fn remove_export(&self, wanted: &RemoveExport) -> Result<Changed, ControlError> {
        let _changing = lock(&self.changing);
        let desired = self.may_change()?;
        let Some(_arrival) = self.arrivals.begin() else { return Err(stopping()) };
        let name = match (&wanted.vhost_user, &wanted.ublk) {
            (Some(socket), None) => format!("vhost-user:{}", socket.display()),
            (None, Some(volume)) => format!("ublk:{volume}"),
            _ => return Err(ControlError::Body("the body: say vhost_user or ublk, and not both".into())),
        };
        let mut next = Config::clone(&desired);
        next.vhost_user.retain(|export| Some(&export.socket) != wanted.vhost_user.as_ref());
        next.ublk.retain(|export| Some(&export.volume) != wanted.ublk.as_ref());
        if next == *desired {
            return Ok(Changed { name, changed: false });
        }
        let export = {
            let mut exports = lock(&self.exports);
            let at = exports.iter().position(|export| export.status().name() == name);
            at.map(|at| exports.remove(at))
        };
        let Some(mut export) = export else {
            return Err(ControlError::Impossible(format!(
                "{name} is not there yet: its volume is waited for"
            )));
        };
        let volume = export.status().volume().to_owned();
        lock(&self.leaving).push(name.clone());
        let ended = self.end(&mut export, wanted.force);
        lock(&self.leaving).retain(|leaving| *leaving != name);
        if let Err(reason) = ended {
            // A disk whose end has begun is the service's still: its stop waits for it.
            lock(&self.exports).push(export);
            return Err(ControlError::Impossible(format!("{name}: {reason}")));
        }
        drop(export);
        *lock(&self.desired) = Arc::new(next);
        self.close_unless_exported(&volume)?;
        log::info!("{name}: it is gone");
        Ok(Changed { name, changed: true })
    }

    fn end(&self, export: &mut Export, force: bool) -> Result<(), String> {
        let deadline = Instant::now() + LIMIT;
        if force {
            return export.leave(ShutdownMode::Force, deadline).map_err(|error| error.to_string());
        }
        match export.stop_if_unused(deadline) {
            Ok(None) => Ok(()),
            Ok(Some(users)) => Err(format!("it is {users} (--force takes it away all the same)")),
            Err(error) => Err(error.to_string()),
        }
    }

    /// What there is to be, where that may be changed.
    fn may_change(&self) -> Result<Arc<Config>, ControlError> {
        if self.stopping.load(Ordering::Relaxed) {
            return Err(stopping());
        }
        let desired = lock(&self.desired).clone();
        match desired.may_grow() {
            true => Ok(desired),
            false => Err(ControlError::Impossible(
                "the service takes what it was started with: start it with --allow-path DIRECTORY, or --allow-ublk".into(),
            )),
        }
    }

    /// Has `start` start an export of a volume, which is opened if it is not there. An export that does not start leaves nothing.
    fn serve(
        &self,
        next: &Config,
        name: &str,
        start: impl FnOnce(&Arc<Served>) -> Result<Export, ControlError>,
    ) -> Result<(), ControlError> {
        if let Some(waiting) = lock(&self.waiting).get(name) {
            return Err(ControlError::Impossible(format!(
                "volume {name} is not there yet: {}",
                waiting.cause()
            )));
        }
        let served = match self.served(name) {
            Some(served) => served,
            None => {
                let volume = self.open(next, name)?;
                let status = late::configured(name, &next.volumes[name], &next.policies[name]);
                let served = Arc::new(Served::new(volume, status));
                if let Some(tell) = &*lock(&self.growth) {
                    served.volume.tell_growth(tell.clone());
                }
                lock(&self.volumes).insert(name.into(), served.clone());
                served
            }
        };
        match start(&served) {
            Ok(export) => {
                lock(&self.exports).push(export);
                Ok(())
            }
            Err(error) => {
                drop(served);
                // Why it does not start is of more use than what comes of that.
                let _ = self.close_unless_exported(name);
                Err(error)
            }
        }
    }

    fn open(&self, next: &Config, name: &str) -> Result<Volume, ControlError> {
        let (policy, topology, limits) = (next.policies[name], next.topologies[name], &next.limits[name]);
        let group = |served: &Arc<Served>| {
            let limits = served.volume.limits();
            (limits.group().is_some() && limits.group() == next.limits[name].group.as_deref())
                .then(|| limits.beside())
        };
        let limits = match self.all_served().iter().find_map(group) {
            Some(shared) => shared,
            None => Limits::of(&[(name.to_owned(), limits.clone())].into())[name].clone(),
        };
        let opener = Opener::new(name, &next.volumes, policy, topology).map_err(|error| refused(&error))?;
        opener.with_limits(limits).open(LIMIT).map_err(|error| refused(&error))
    }

    /// Workers for an export of a volume.
    fn place(&self, served: &Served, queues: Option<u16>) -> Result<Vec<usize>, ControlError> {
        let single = served.volume.capabilities().single_worker;
        let mut placement = lock(&self.placement);
        let on = placement.add(served.volume.name(), queues, single);
        if on.is_empty() {
            return Err(ControlError::Impossible("all workers belong to exports that have their own".into()));
        }
        for worker in on.iter().filter(|worker| placement.is_shared(**worker)) {
            self.handles[*worker].set_shared(true);
        }
        Ok(on)
    }

    fn add_socket(&self, export: &VhostUserConfig, served: &Arc<Served>) -> Result<Export, ControlError> {
        let endpoint = Endpoint::open(export, &mut Vec::new()).map_err(|error| refused(&error))?;
        let queues = export.most_queues();
        let on = self.place(served, Some(queues))?;
        let started = self.start_vhost_user(export, queues, endpoint, &on, &served.volume);
        started.map(Export::VhostUser).map_err(|(_, source)| refused(&source))
    }

    fn add_disk(
        &self,
        next: &Config,
        export: &UblkConfig,
        served: &Arc<Served>,
    ) -> Result<Export, ControlError> {
        let workers = self.place(served, export.queues)?;
        // As many queues as it is to have, on these in turn.
        let queues = export.queues.map_or(workers.len(), usize::from);
        let on: Vec<usize> = workers.iter().copied().cycle().take(queues).collect();
        let volumes = next.ublk.iter().map(|export| export.volume.as_str()).collect();
        let (found, target) = (found(), next.store_of(&export.volume));
        let others = Others { volumes, target: &target, found: &found, given_up: self.arrivals.closed() };
        let handles: Vec<WorkerHandle> = self.handles(&on);
        let started = UblkExport::start(export, &served.volume, &handles, &others);
        started.map(|export| Export::Ublk(Box::new(export))).map_err(|error| refused(&error))
    }

    /// Flushes and closes a volume that has no exports any more.
    fn close_unless_exported(&self, name: &str) -> Result<(), ControlError> {
        if lock(&self.exports).iter().any(|export| export.status().volume() == name) {
            return Ok(());
        }
        let Some(served) = lock(&self.volumes).remove(name) else { return Ok(()) };
        let geometry = served.volume.geometry();
        let handles = self.handles_of(&served.volume);
        lock(&self.placement).remove(name);
        let written = !geometry.read_only && geometry.volatile_cache;
        if let (true, Some(handle)) = (written, handles.first()) {
            let flushed = handle.flush(served.export.clone(), LIMIT).recv_timeout(LIMIT);
            let failed = match flushed {
                Ok(Ok(())) => None,
                Ok(Err(errno)) => Some(errno.to_string()),
                Err(_) => Some("there is no answer".into()),
            };
            if let Some(reason) = failed {
                log::error!("volume {name}: flush: {reason}");
                let lost =
                    format!("volume {name} could not be flushed: {reason}: what was not flushed may be lost");
                return Err(ControlError::Impossible(lost));
            }
        }
        served.volume.close();
        drop(served);
        let deadline = Instant::now() + LIMIT;
        for gone in handles.iter().map(WorkerHandle::let_go).collect::<Vec<_>>() {
            // One that a store holds up lets go later: its lock stays until then.
            let _ = gone.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        }
        log::info!("volume {name}: it is closed");
        Ok(())
    }
}

fn stopping() -> ControlError {
    ControlError::Impossible("the service is stopping".into())
}
