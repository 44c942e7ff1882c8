//! What all queues of a vhost-user device share.

#![forbid(unsafe_code)]

use crate::block::Geometry;
use crate::log_limit::LogLimit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// `VIRTIO_BLK_ID_BYTES`.
const ID_LEN: usize = 20;

/// Devices made so far.
static DEVICES: AtomicU64 = AtomicU64::new(0);

/// A device as one VMM has it.
pub struct Device {
    name: String,
    /// Of the VMM's connection.
    vmm: u64,
    id: [u8; ID_LEN],
    geometry: Geometry,
    /// `writeback` of the configuration space. It is the VMM's, and no other's, for as long as that lives.
    writeback: AtomicBool,
    /// It is known: chosen, left by an earlier process, or as a device begins.
    decided: AtomicBool,
    /// It is known from somebody else than us.
    chosen: AtomicBool,
    /// Of the export: a VMM that reconnects gets no new lines by that.
    log: Arc<LogLimit>,
}

impl Device {
    /// A device whose identity, GET_ID's answer, is `serial`: of that the first 20 bytes.
    pub fn new(serial: &str, socket: &str, mut geometry: Geometry, read_only: bool) -> Device {
        geometry.read_only |= read_only;
        let mut id = [0; ID_LEN];
        let len = serial.len().min(ID_LEN);
        id[..len].copy_from_slice(&serial.as_bytes()[..len]);
        let writeback = AtomicBool::new(geometry.volatile_cache);
        let name = format!("vhost-user:{socket}");
        let log = Arc::new(LogLimit::new(name.clone()));
        Device {
            name,
            vmm: next(),
            id,
            geometry,
            writeback,
            decided: false.into(),
            chosen: false.into(),
            log,
        }
    }

    /// The same device for the next VMM.
    pub fn renewed(&self) -> Device {
        let writeback = AtomicBool::new(self.geometry.volatile_cache);
        let (name, id, geometry) = (self.name.clone(), self.id, self.geometry.clone());
        let (vmm, decided, chosen, log) = (next(), false.into(), false.into(), self.log.clone());
        Device { name, vmm, id, geometry, writeback, decided, chosen, log }
    }

    /// For messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Names the VMM's connection: no two have the same.
    pub fn vmm(&self) -> u64 {
        self.vmm
    }

    /// For every line that its VMM or its driver can cause. The lines begin with the device's name.
    pub fn log(&self) -> &LogLimit {
        &self.log
    }

    /// Padded with NUL (virtio 1.3 section 5.2.6).
    pub fn id(&self) -> &[u8; ID_LEN] {
        &self.id
    }

    /// As the guest sees it.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Whether a driver that decides about its cache wants one.
    pub fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Acquire)
    }

    /// Whether it is known what the driver wants.
    pub fn is_decided(&self) -> bool {
        self.decided.load(Ordering::Relaxed)
    }

    /// The same; it is from now on.
    pub fn decide(&self) -> bool {
        self.decided.swap(true, Ordering::Relaxed)
    }

    /// Whether the driver, or an earlier process, said so.
    pub fn is_chosen(&self) -> bool {
        self.chosen.load(Ordering::Relaxed)
    }

    /// The driver's decision. One that never asked for FLUSH has no cache to turn on.
    pub fn set_writeback(&self, on: bool) {
        self.decided.store(true, Ordering::Relaxed);
        self.chosen.store(true, Ordering::Relaxed);
        self.writeback.store(on && self.geometry.volatile_cache, Ordering::Release);
    }
}

fn next() -> u64 {
    DEVICES.fetch_add(1, Ordering::Relaxed)
}
