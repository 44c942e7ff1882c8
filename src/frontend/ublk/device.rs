//! The control side: a device's life.

#![forbid(unsafe_code)]

use super::buffers::BufferUse;
use super::claim::{Claim, claim_patiently};
use super::commands::{ControlDevice, Failed};
use super::control_thread::{Answer, ControlThread};
use super::deadline::{EXIT_LIMIT, POLL_INTERVAL, until};
use super::error::{ControlOp, Error};
use super::info::{Info, Ownership};
use super::params::Params;
use super::queue::QueueSetup;
use super::quiesce_flag::QuiesceFlag;
use super::record::{self, Record};
use super::spec::DeviceSpec;
use crate::block::{Errno, Geometry};
use libublk::sys;
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// The longest that adding a device may take.
const ADD_LIMIT: Duration = Duration::from_secs(30);

/// The longest that udev may take to make the character device, and make it ours.
const UDEV_LIMIT: Duration = Duration::from_secs(5);

/// A device in the kernel, which stays there until [`delete`](Device::delete).
pub struct Device {
    info: Info,
    read_only: bool,
    /// Sectors of the disk when we got it.
    sectors: u64,
    cpus: Vec<Vec<usize>>,
    /// The character device, until we let go of it.
    file: Option<Arc<File>>,
    quiesce_flag: Arc<QuiesceFlag>,
    memory: Arc<BufferUse>,
    /// Another server had it before us.
    recovered: bool,
    control_thread: ControlThread,
}

impl Device {
    /// Adds a device that shows `geometry`. Nobody sees a disk before [`start`](Self::start).
    ///
    /// # Errors
    /// The kernel's refusal, or that it did not answer in half a minute.
    pub fn add(spec: &DeviceSpec, geometry: &Geometry) -> Result<Device, Error> {
        let go_on = until(ADD_LIMIT);
        let failed = |failed| Error::of(ControlOp::Add, failed, spec.id, ADD_LIMIT);
        let mut driver = ControlDevice::open().map_err(|error| failed(error.into()))?;
        // The kernel clamps queues to CPUs and drops flags that it does not know: what it granted counts.
        let info = driver.add(&spec.info(), go_on).map_err(failed)?;
        let params = Params::new(geometry, info.max_io, zero_copy(&info));
        let made = match spec.record.write(info.id) {
            Ok(()) => Device::open(&mut driver, info, params, geometry, false),
            Err(source) => Err(Error::Record { directory: record::directory(), source }),
        };
        made.inspect_err(|_| {
            Record::remove(info.id);
            let _ = driver.plain(sys::UBLK_U_CMD_DEL_DEV_ASYNC, info.id, 0, until(ADD_LIMIT));
        })
    }

    /// Takes over `found`, a device that waits for a server and is as `spec` would have made it (see
    /// [`check`](super::recover::check)). Its requests wait until [`start`](Self::start).
    ///
    /// # Errors
    /// When its old server's descriptors do not go away in a minute, or before it is `given_up`; when it is not
    /// recoverable.
    pub fn recover(
        found: &Info,
        spec: &DeviceSpec,
        geometry: &Geometry,
        given_up: &AtomicBool,
    ) -> Result<Device, Error> {
        let refused = |failed| Error::of(ControlOp::Recover, failed, Some(found.id), EXIT_LIMIT);
        let mut driver = ControlDevice::open().map_err(|error| refused(error.into()))?;
        let mut go_on = until(EXIT_LIMIT);
        loop {
            let op = sys::UBLK_U_CMD_START_USER_RECOVERY;
            match driver.plain(op, found.id, 0, &mut go_on) {
                Ok(()) => break,
                Err(Failed::Refused(Errno::EBUSY)) if given_up.load(Ordering::Relaxed) => {
                    return Err(Error::GivenUp);
                }
                // The old server's descriptors, or another server that was quicker.
                Err(Failed::Refused(Errno::EBUSY)) if go_on() => {
                    let info = driver.info(found.id, &mut go_on).map_err(refused)?;
                    if let Ownership::Served(pid) = info.ownership() {
                        let (device, volume) = (info.path(), spec.record.volume.clone());
                        return Err(Error::Served { device, volume, pid });
                    }
                    thread::sleep(POLL_INTERVAL);
                }
                Err(failed) => return Err(refused(failed)),
            }
        }
        let info = driver.info(found.id, &mut go_on).map_err(refused)?;
        let params = driver.params(found.id, &mut go_on).map_err(refused)?;
        Device::open(&mut driver, info, params, geometry, true)
    }

    /// Opens the character device and starts the control thread.
    fn open(
        driver: &mut ControlDevice,
        info: Info,
        params: Params,
        geometry: &Geometry,
        recovered: bool,
    ) -> Result<Device, Error> {
        let open =
            |error: io::Error| Error::Refused { op: ControlOp::Open, errno: error.into(), id: Some(info.id) };
        let file = open_node(info.id).map_err(open)?;
        let cpus = |queue: u16| {
            driver.affinity(info.id, queue).unwrap_or_else(|failed| {
                log::debug!("{} queue {queue}: no affinity: {failed:?}", info.path().display());
                Vec::new()
            })
        };
        let cpus = (0..info.queues).map(cpus).collect();
        let sectors = params.sectors();
        Ok(Device {
            info,
            read_only: geometry.read_only,
            sectors,
            cpus,
            file: Some(Arc::new(file)),
            quiesce_flag: Arc::default(),
            memory: Arc::default(),
            recovered,
            control_thread: ControlThread::new(info.id, params)?,
        })
    }

    /// The disk's path, which is there once it is started.
    pub fn path(&self) -> PathBuf {
        self.info.path()
    }

    /// Tags a queue.
    pub fn depth(&self) -> u16 {
        self.info.depth
    }

    /// Whether zero copy is in force: what the kernel granted, not what was asked for.
    pub fn zero_copy(&self) -> bool {
        zero_copy(&self.info)
    }

    /// Sectors of the disk when it was added or recovered.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether it had another server before us.
    pub fn recovered(&self) -> bool {
        self.recovered
    }

    /// Whether the kernel can keep new requests back for the next server: see [`quiesce`](Self::quiesce).
    pub fn quiesces(&self) -> bool {
        self.info.has(sys::UBLK_F_QUIESCE)
    }

    /// The queues that the kernel granted, for the workers. None after [`close`](Self::close).
    pub fn queues(&self) -> Vec<QueueSetup> {
        let Some(file) = &self.file else { return Vec::new() };
        let setup = |queue: u16| QueueSetup {
            device: file.clone(),
            queue,
            depth: self.info.depth,
            max_io: self.info.max_io,
            zero_copy: self.zero_copy(),
            read_only: self.read_only,
            recoverable: self.info.has(sys::UBLK_F_USER_RECOVERY),
            quiesce_flag: self.quiesce_flag.clone(),
            memory: self.memory.clone(),
            cpus: self.cpus.get(usize::from(queue)).cloned().unwrap_or_default(),
        };
        (0..self.info.queues).map(setup).collect()
    }

    /// What the buffers of its queues take.
    pub fn memory(&self) -> &BufferUse {
        &self.memory
    }

    /// What stops the queues from taking requests.
    pub fn quiesce_flag(&self) -> &QuiesceFlag {
        &self.quiesce_flag
    }

    /// Shows the disk, or serves again the one that was there. Every queue must be fetching, since requests come
    /// at once. After a minute the start is given up; a new device can be stopped then.
    pub fn start(&self) -> Answer {
        self.control_thread.submit(if self.recovered { ControlOp::TakeOver } else { ControlOp::Start }, 0)
    }

    /// Gives up a start that cannot come to its end.
    pub fn give_up_start(&self) {
        self.control_thread.give_up_start();
    }

    /// Takes the disk away: new requests fail, those in flight are waited for, then every fetch is aborted.
    /// A device that was not started only has its fetches aborted.
    pub fn stop(&self) -> Answer {
        self.control_thread.submit(ControlOp::Stop, 0)
    }

    /// The same, unless somebody has the disk open: then the answer is `EBUSY`, and nothing has changed. For a device
    /// that [`tells`](Self::tells_whether_open).
    pub fn try_stop(&self) -> Answer {
        self.control_thread.submit(ControlOp::TryStop, 0)
    }

    /// Whether the kernel can tell that somebody has the disk open.
    pub fn tells_whether_open(&self) -> bool {
        self.info.has(sys::UBLK_F_SAFE_STOP_DEV)
    }

    /// Keeps others from mounting the disk, and the like, for as long as the claim lives; somebody who has claimed it may
    /// take `patience` to let go.
    ///
    /// # Errors
    /// `EBUSY` when somebody has claimed it; anything else says nothing of others.
    pub fn claim(&self, patience: Duration, pause: Duration) -> io::Result<Claim> {
        claim_patiently(&self.path(), patience, pause)
    }

    /// Who uses the disk, in words: see [`users`](super::users()).
    pub fn users(&self) -> Vec<String> {
        super::users(self.info.id)
    }

    /// Gives the disk another size, in sectors: whole logical blocks of it, which the driver does not check. For a
    /// started device, and drivers that have `UBLK_F_UPDATE_SIZE`.
    pub fn update_size(&self, sectors: u64) -> Answer {
        self.control_thread.submit(ControlOp::Resize, sectors)
    }

    /// Keeps new requests back in the kernel and aborts every fetch that has no request, for a device that
    /// [`quiesces`](Self::quiesces). Fetches that follow a commit are not aborted: say it again until every queue has ended.
    /// There is no way back: the disk then waits for a recovery, or a stop.
    pub fn quiesce(&self, limit: Duration) -> Answer {
        // 0 would be for ever.
        self.control_thread.submit(ControlOp::Quiesce, limit.as_millis().clamp(1, 60_000) as u64)
    }

    /// Has the kernel look every second whether the server of a request that takes long still lives, for a started
    /// device on a kernel before 6.16. There, when a server dies that has a request for every tag of a queue, only this
    /// look finds out, and by default comes half a minute later. Nothing else depends on it.
    ///
    /// # Errors
    /// When sysfs is not ours to write to.
    pub fn set_short_io_timeout(&self) -> io::Result<()> {
        fs::write(format!("/sys/block/ublkb{}/queue/io_timeout", self.info.id), "1000")
    }

    /// Lets go of the character device. Queues that still serve keep it open.
    pub fn close(&mut self) {
        self.file = None;
    }

    /// Deletes the device. [`close`](Self::close) it, and see the queues end, before: the kernel keeps the
    /// number until nobody has the character device or the disk open any more.
    pub fn delete(&self) -> Answer {
        Record::remove(self.info.id);
        self.control_thread.submit(ControlOp::Delete, 0)
    }
}

/// Whether the kernel granted it.
fn zero_copy(info: &Info) -> bool {
    info.has(sys::UBLK_F_AUTO_BUF_REG)
}

/// Opens the character device, once udev has made it and given it to us.
fn open_node(id: u32) -> io::Result<File> {
    let mut go_on = until(UDEV_LIMIT);
    loop {
        match File::options().read(true).write(true).open(format!("/dev/ublkc{id}")) {
            Err(_) if go_on() => thread::sleep(POLL_INTERVAL),
            result => return result,
        }
    }
}
