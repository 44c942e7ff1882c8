//! The control side: a device's life.

#![forbid(unsafe_code)]

use super::brake::Brake;
use super::buffers::BufferUse;
use super::claim::{Claim, claim_patiently};
use super::driver::{Driver, Failed};
use super::error::{Error, Verb};
use super::info::{Info, Standing};
use super::orders::{Answer, Orders};
use super::params::Params;
use super::queue::QueueSetup;
use super::record::{self, Record};
use super::recover::PARTING_LIMIT;
use super::wish::Wish;
use crate::block::{Errno, Geometry};
use libublk::sys;
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// The longest that adding a device may take.
const ADD_LIMIT: Duration = Duration::from_secs(30);

/// The longest that udev may take to make the character device, and make it ours.
const UDEV_LIMIT: Duration = Duration::from_secs(5);

/// Between two looks at something that comes about by itself.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(10);

/// A device in the kernel, which stays there until [`delete`](Device::delete).
pub struct Device {
    info: Info,
    read_only: bool,
    /// Sectors of the disk when we got it.
    sectors: u64,
    cpus: Vec<Vec<usize>>,
    /// The character device, until we let go of it.
    file: Option<Arc<File>>,
    brake: Arc<Brake>,
    memory: Arc<BufferUse>,
    /// Another server had it before us.
    recovered: bool,
    orders: Orders,
}

impl Device {
    /// Adds a device that shows `geometry`. Nobody sees a disk before [`start`](Self::start).
    ///
    /// # Errors
    /// The kernel's refusal, or that it did not answer in half a minute.
    pub fn add(wish: &Wish, geometry: &Geometry) -> Result<Device, Error> {
        let go_on = until(ADD_LIMIT);
        let failed = |failed| Error::of(Verb::Add, failed, wish.id, ADD_LIMIT);
        let mut driver = Driver::open().map_err(|error| failed(error.into()))?;
        // The kernel clamps queues to CPUs and drops flags that it does not know: what it granted counts.
        let info = driver.add(&wish.info(), go_on).map_err(failed)?;
        let params = Params::new(geometry, info.max_io, zero_copy(&info));
        let made = match wish.record.write(info.id) {
            Ok(()) => Device::open(&mut driver, info, params, geometry, false),
            Err(source) => Err(Error::Record { directory: record::directory(), source }),
        };
        made.inspect_err(|_| {
            Record::remove(info.id);
            let _ = driver.plain(sys::UBLK_U_CMD_DEL_DEV_ASYNC, info.id, 0, until(ADD_LIMIT));
        })
    }

    /// Takes over `found`, a device that waits for a server and is as `wish` would have made it (see
    /// [`check`](super::recover::check)). Its requests wait until [`start`](Self::start).
    ///
    /// # Errors
    /// When its old server's descriptors do not go away in a minute, or before it is `given_up`; when it is not
    /// recoverable.
    pub fn recover(
        found: &Info,
        wish: &Wish,
        geometry: &Geometry,
        given_up: &AtomicBool,
    ) -> Result<Device, Error> {
        let refused = |failed| Error::of(Verb::Recover, failed, Some(found.id), PARTING_LIMIT);
        let mut driver = Driver::open().map_err(|error| refused(error.into()))?;
        let mut go_on = until(PARTING_LIMIT);
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
                    if let Standing::Served(pid) = info.standing() {
                        let (device, volume) = (info.path(), wish.record.volume.clone());
                        return Err(Error::Served { device, volume, pid });
                    }
                    thread::sleep(LOOK_EVERY);
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
        driver: &mut Driver,
        info: Info,
        params: Params,
        geometry: &Geometry,
        recovered: bool,
    ) -> Result<Device, Error> {
        let open =
            |error: io::Error| Error::Refused { verb: Verb::Open, errno: error.into(), id: Some(info.id) };
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
            brake: Arc::default(),
            memory: Arc::default(),
            recovered,
            orders: Orders::new(info.id, params)?,
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
            brake: self.brake.clone(),
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
    pub fn brake(&self) -> &Brake {
        &self.brake
    }

    /// Shows the disk, or serves again the one that was there. Every queue must be fetching, since requests come
    /// at once. After a minute the start is given up; a new device can be stopped then.
    pub fn start(&self) -> Answer {
        self.orders.give(if self.recovered { Verb::TakeOver } else { Verb::Start }, 0)
    }

    /// Gives up a start that cannot come to its end.
    pub fn give_up_start(&self) {
        self.orders.give_up_start();
    }

    /// Takes the disk away: new requests fail, those in flight are waited for, then every fetch is aborted.
    /// A device that was not started only has its fetches aborted.
    pub fn stop(&self) -> Answer {
        self.orders.give(Verb::Stop, 0)
    }

    /// The same, unless somebody has the disk open: then the answer is `EBUSY`, and nothing has changed. For a device
    /// that [`tells`](Self::tells_whether_open).
    pub fn try_stop(&self) -> Answer {
        self.orders.give(Verb::TryStop, 0)
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
        self.orders.give(Verb::Resize, sectors)
    }

    /// Keeps new requests back in the kernel and aborts every fetch that has no request, for a device that
    /// [`quiesces`](Self::quiesces). Fetches that follow a commit are not aborted: say it again until every queue has ended.
    /// There is no way back: the disk then waits for a recovery, or a stop.
    pub fn quiesce(&self, limit: Duration) -> Answer {
        // 0 would be for ever.
        self.orders.give(Verb::Quiesce, limit.as_millis().clamp(1, 60_000) as u64)
    }

    /// Has the kernel look every second whether the server of a request that takes long still lives, for a started
    /// device on a kernel before 6.16. There, when a server dies that has a request for every tag of a queue, only this
    /// look finds out, and by default comes half a minute later. Nothing else depends on it.
    ///
    /// # Errors
    /// When sysfs is not ours to write to.
    pub fn look_often(&self) -> io::Result<()> {
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
        self.orders.give(Verb::Delete, 0)
    }
}

/// Whether the kernel granted it.
fn zero_copy(info: &Info) -> bool {
    info.has(sys::UBLK_F_AUTO_BUF_REG)
}

/// Says yes until `limit` from now.
pub(super) fn until(limit: Duration) -> impl FnMut() -> bool {
    let limit = Instant::now() + limit;
    move || Instant::now() < limit
}

/// Opens the character device, once udev has made it and given it to us.
fn open_node(id: u32) -> io::Result<File> {
    let mut go_on = until(UDEV_LIMIT);
    loop {
        match File::options().read(true).write(true).open(format!("/dev/ublkc{id}")) {
            Err(_) if go_on() => thread::sleep(LOOK_EVERY),
            result => return result,
        }
    }
}
