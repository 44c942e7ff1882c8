//! A volume behind the ublk frontend: the device, its queues on the workers, and its stable name.

#![forbid(unsafe_code)]

mod shut_down;

use crate::block::SECTOR;
use crate::engine::{Identity, Volume};
use crate::frontend::ublk::config::{Recovery, UblkConfig, ZeroCopy};
use crate::frontend::ublk::features::{self, Features, NoZeroCopy};
use crate::frontend::ublk::{self, Claim, Device, DeviceSpec, Found, NoResize, Record, StableName};
use crate::service::status::UblkStatus;
use crate::stats::ExportStats;
use crate::worker::{ExportVolume, NewQueue, WorkerHandle};
use shut_down::Phase;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

/// How often a start is looked at for a reason why it will never finish.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// The longest that a new size may take.
const RESIZE_LIMIT: Duration = Duration::from_secs(10);

/// A ublk disk in service. [`stop`](Self::stop) it or [`hand it over`](Self::hand_over); one that is only dropped
/// stays in the kernel, as if we had died.
pub struct UblkExport {
    device: Device,
    name: StableName,
    status: UblkStatus,
    volume: Arc<Volume>,
    stats: Arc<ExportStats>,
    handles: Vec<WorkerHandle>,
    features: Features,
    recovery: Recovery,
    /// Queues that have not ended: each hears when it has.
    ends: Vec<Receiver<()>>,
    phase: Phase,
    /// What keeps others from mounting a disk that goes.
    claim: Option<Claim>,
}

/// The devices that there are, with their stores as this version names them; none where the driver does not answer: the
/// start of an export will say why.
pub fn found() -> Vec<Found> {
    let mut found = ublk::ours().unwrap_or_default();
    for record in found.iter_mut().filter_map(|found| found.record.as_mut()) {
        record.store = Identity::noted(&record.store).as_str().to_owned();
    }
    found
}

/// What an export is started beside.
#[derive(Clone, Debug)]
pub struct Others<'a> {
    /// All volumes that get ublk disks.
    pub volumes: Vec<&'a str>,
    /// Where the volume's store is, as the user wrote it.
    pub target: &'a str,
    /// The devices that there are.
    pub found: &'a [Found],
    /// Set when nobody wants the export any more.
    pub given_up: &'a AtomicBool,
}

/// Why a volume is not behind the ublk frontend.
#[derive(Debug, thiserror::Error)]
#[error("ublk export of volume {volume}")]
pub struct Error {
    /// Its name.
    pub volume: String,
    /// What was wrong.
    pub source: ublk::Error,
}

impl UblkExport {
    /// Makes the device, or takes over the one that an earlier server of the volume left, and serves its queues on
    /// `handles`, one for each queue that is asked for (the kernel may grant fewer). Returns when the disk and its
    /// stable name are there.
    ///
    /// # Errors
    /// When it is [given up](Others::given_up); when the name is not free, there is no ublk to be used, the kernel cannot do what was asked, or does
    /// not do it in time; or when there is a device already that another configuration made, or another process
    /// serves. What had been made by then is undone; a device that was there before stays.
    pub fn start(
        config: &UblkConfig,
        volume: &Arc<Volume>,
        handles: &[WorkerHandle],
        others: &Others<'_>,
    ) -> Result<UblkExport, Error> {
        let failed = |source| Error { volume: config.volume.clone(), source };
        let since = Instant::now();
        let mut export = UblkExport::get(config, volume, handles, others).map_err(failed)?;
        match export.serve(config, others.given_up) {
            Ok(()) => {
                if export.device.recovered() {
                    let (device, took) = (export.status.device.display(), since.elapsed().as_millis());
                    log::info!("{device}: recovered, {took} ms after it was found");
                }
                Ok(export)
            }
            Err(error) => {
                export.undo();
                Err(failed(error))
            }
        }
    }

    /// Checks all that can be checked, and adds or recovers the device.
    fn get(
        config: &UblkConfig,
        volume: &Arc<Volume>,
        handles: &[WorkerHandle],
        others: &Others<'_>,
    ) -> Result<UblkExport, ublk::Error> {
        if others.given_up.load(Ordering::Relaxed) {
            return Err(ublk::Error::GivenUp);
        }
        let features = features::probe()?;
        let copy = match config.zero_copy {
            ZeroCopy::Auto if !volume.capabilities().prefers_registered => ZeroCopy::Off,
            spec => spec,
        };
        let zero_copy = features.zero_copy(copy, volume.capabilities().registered)?;
        let recovery =
            features.recovery(config.recovery, volume.capabilities().persists).map_err(|source| {
                ublk::Error::Recovery { spec: config.recovery.unwrap_or(Recovery::Reissue), source }
            })?;
        let queues = u16::try_from(handles.len()).unwrap_or(UblkConfig::MAX_QUEUES);
        let spec = DeviceSpec {
            record: Record::new(&config.volume, volume.identity().as_str(), others.target),
            id: config.id,
            queues,
            depth: config.depth,
            max_io: config.max_io.unwrap_or_else(|| ublk::default_max_io(zero_copy, queues, config.depth)),
            zero_copy,
            recovery,
            features: features.bits,
        };
        let found = ublk::find(&spec.record, &others.volumes, others.found, others.given_up)?;
        let path = found.as_ref().map(|found| found.info.path());
        let name = StableName::check(&config.volume, path.as_deref())?;
        let device = match found {
            None => Device::add(&spec, volume.geometry())?,
            Some(found) => {
                let info = &found.info;
                let (device, server) =
                    (info.path(), info.server.map_or(String::new(), |pid| format!(" {pid}")));
                log::info!(
                    "{}: waits for a server since process{server} ended: recovering",
                    device.display()
                );
                ublk::check(&found, &spec, volume.geometry())?;
                Device::recover(info, &spec, volume.geometry(), others.given_up)?
            }
        };
        let status = UblkStatus {
            volume: config.volume.clone(),
            device: device.path(),
            link: name.path().into(),
            queues: 0,
            depth: device.depth(),
            zero_copy: device.zero_copy(),
            buffer_bytes: 0,
            buffers_locked: true,
            read_only: volume.geometry().read_only,
            workers: config.workers.map(|workers| usize::from(workers).min(handles.len())),
            waiting: false,
        };
        let (volume, handles) = (volume.clone(), handles.to_vec());
        // Until there are queues.
        let stats = Arc::new(ExportStats::new(0));
        let (ends, phase, claim) = (Vec::new(), Phase::Live, None);
        Ok(UblkExport {
            device,
            name,
            status,
            volume,
            stats,
            handles,
            features,
            recovery,
            ends,
            phase,
            claim,
        })
    }

    /// How it runs.
    pub fn status(&self) -> UblkStatus {
        let memory = self.device.memory();
        UblkStatus { buffer_bytes: memory.bytes(), buffers_locked: memory.locked(), ..self.status.clone() }
    }

    /// What is counted of it.
    pub fn stats(&self) -> &ExportStats {
        &self.stats
    }

    /// Whether the disk can be given another size.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn can_resize(&self) -> Result<(), ublk::Error> {
        if !self.features.resizes() {
            return Err(NoResize::Kernel { release: self.features.release.clone() }.into());
        }
        match self.phase {
            Phase::Live => Ok(()),
            _ => Err(NoResize::NotLive.into()),
        }
    }

    /// Gives the disk `sectors`. The volume must have them all by then.
    ///
    /// # Errors
    /// See [`can_resize`](Self::can_resize); also when they are no whole blocks, or the kernel refuses.
    pub fn resize(&mut self, sectors: u64) -> Result<(), ublk::Error> {
        self.can_resize()?;
        let block = self.volume.geometry().logical_block;
        if !(sectors * SECTOR).is_multiple_of(block.into()) {
            return Err(NoResize::Ragged { sectors, block }.into());
        }
        self.device.update_size(sectors).wait(Instant::now() + RESIZE_LIMIT)
    }

    /// Hands the queues out, starts the device and names it.
    fn serve(&mut self, config: &UblkConfig, given_up: &AtomicBool) -> Result<(), ublk::Error> {
        if config.zero_copy == ZeroCopy::On && !self.status.zero_copy {
            return Err(NoZeroCopy::NotGranted.into());
        }
        let queues = self.device.queues();
        let export = ExportVolume::new(self.volume.clone(), queues.len().try_into().unwrap_or(u16::MAX));
        self.stats = export.stats.clone();
        for (setup, handle) in queues.into_iter().zip(&self.handles) {
            let queue = setup.queue;
            let new = NewQueue { export: export.clone(), number: queue.into(), read_only: setup.read_only };
            let served = handle.serve(new, move |core| ublk::Queue::new(core, setup));
            self.ends.push(served.map_err(|source| ublk::Error::Queue { queue, source })?.ended);
            self.status.queues += 1;
        }
        self.wait_for_start(given_up)?;
        self.name.point_to(&self.status.device)?;
        if self.recovery != Recovery::Off
            && !self.features.detects_server_exit()
            && let Err(error) = self.device.set_short_io_timeout()
        {
            let device = self.status.device.display();
            log::info!("{device}: recovery may take half a minute: its io_timeout cannot be set: {error}");
        }
        if self.device.recovered() {
            self.catch_up();
        }
        Ok(())
    }

    /// Gives a recovered disk the size that its volume has by now, where that is possible.
    fn catch_up(&mut self) {
        let (own, volume) = (self.device.sectors(), self.volume.geometry().sectors());
        if own == volume {
            return;
        }
        let device = self.status.device.display().to_string();
        match self.resize(volume) {
            Ok(()) => {
                log::info!("{device}: resized from {own} to {volume} sectors, as its volume was meanwhile")
            }
            Err(error) => {
                log::warn!("{device}: its volume has grown, and it keeps its {own} sectors: {error}")
            }
        }
    }

    /// Starts the device, unless a queue ends first: then its fetches were refused, and the kernel would wait
    /// for them for ever. Nor is a store waited for, when the kernel reads the partition table, once it is given up.
    fn wait_for_start(&self, given_up: &AtomicBool) -> Result<(), ublk::Error> {
        let answer = self.device.start();
        loop {
            if let Some(result) = answer.try_wait(Instant::now() + POLL_INTERVAL) {
                return result;
            }
            let dead = |end: &Receiver<()>| !matches!(end.try_recv(), Err(TryRecvError::Empty));
            if let Some(queue) = self.ends.iter().position(dead) {
                self.device.give_up_start();
                return Err(ublk::Error::Fetch { queue });
            }
            if given_up.load(Ordering::Relaxed) {
                self.device.give_up_start();
                return Err(ublk::Error::GivenUp);
            }
        }
    }
}
