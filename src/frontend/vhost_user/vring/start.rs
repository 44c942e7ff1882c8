//! What a vring starts with, and what it makes of it.

#![forbid(unsafe_code)]

use super::{NOBODY, PASS_BYTES, Vring, kept};
use crate::frontend::vhost_user::config_space;
use crate::frontend::vhost_user::device::Device;
use crate::frontend::vhost_user::eventfd::CallFd;
use crate::frontend::vhost_user::inflight::{InflightLog, InflightQueue, QueueMark};
use crate::frontend::vhost_user::memory::Memory;
use crate::frontend::vhost_user::split_ring::{Avail, Used};
use crate::ring::{Kind, UserData};
use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::sync::Arc;

/// Everything a vring starts with. The addresses are the guest's.
pub struct VringSetup {
    /// Its index in the device, for messages.
    pub index: usize,
    /// What requests need of the device.
    pub device: Arc<Device>,
    /// The VMM's memory, kept until the vring is gone.
    pub memory: Arc<Memory>,
    /// Descriptors: a power of two, 1 to 32768.
    pub size: u16,
    /// Descriptor table.
    pub desc_table: u64,
    /// Driver area.
    pub avail_ring: u64,
    /// Device area.
    pub used_ring: u64,
    /// Where in the avail ring to go on.
    pub next_avail: u16,
    /// Heads that were taken before that, and not completed: see [`Stopped::unfinished`](super::Stopped).
    pub unfinished: Vec<u16>,
    /// Takes requests from the start.
    pub enabled: bool,
    /// Writes are refused.
    pub read_only: bool,
    /// The driver's accepted features.
    pub features: u64,
    /// EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Readable when there are new requests.
    pub kick: Arc<File>,
    /// Signalled when requests are complete, and once at the start: nobody knows what the driver was told before.
    pub call: Option<CallFd>,
    /// Signalled when the vring is broken.
    pub err: Option<Arc<File>>,
    /// Where to note what is in flight, and to find what was when we were killed.
    pub inflight: Option<InflightQueue>,
}

impl VringSetup {
    fn refuse<T>(&self, what: &str) -> io::Result<T> {
        let message = format!("vring {}: {what}", self.index);
        Err(io::Error::new(io::ErrorKind::InvalidInput, message))
    }

    /// Finds what was in flight: the heads in the order in which they were taken, the in-flight log brought up to date, and whether
    /// there were any from before.
    fn recover(&mut self, next_used: u16) -> io::Result<(Vec<u16>, Option<InflightLog>, bool)> {
        let mut heads = std::mem::take(&mut self.unfinished);
        let Some(queue) = self.inflight.take() else { return Ok((heads, None, false)) };
        if queue.size() < self.size {
            let (size, room) = (self.size, queue.size());
            return self.refuse(&format!("{size} descriptors, but room to note {room} in flight"));
        }
        let found = queue.recover(next_used)?;
        if !found.fresh {
            // What the VMM remembers is the used index: it cannot know how much had been taken.
            self.next_avail = next_used.wrapping_add(found.heads.len() as u16);
        }
        if !found.heads.is_empty() {
            let (device, count) = (&self.device, found.heads.len());
            let what = format_args!("vring {}: {count} requests are carried out again", self.index);
            device.log().info("carried out again", what);
        }
        let inflight_log = InflightLog::new(queue, found.counter);
        // Those that we had without notes, or in others: the VMM has only now given us these.
        let noted: HashSet<u16> = found.heads.iter().copied().collect();
        heads.retain(|head| !noted.contains(head));
        if heads.iter().all(|head| *head < self.size) {
            heads.iter().for_each(|head| inflight_log.begin(*head));
        }
        Ok(([found.heads, heads].concat(), Some(inflight_log), !found.fresh))
    }
}

impl Vring {
    /// Resolves the rings, and calls the driver.
    ///
    /// # Errors
    /// `InvalidInput` for a size that is no power of two, an area that is misaligned or not the guest's, or notes
    /// of what was in flight that make no sense.
    pub fn new(mut setup: VringSetup) -> io::Result<Vring> {
        let (size, memory) = (setup.size, &setup.memory);
        if !size.is_power_of_two() || size > 32768 {
            return setup.refuse(&format!("size {size} is not a power of two up to 32768"));
        }
        // Lengths and alignments: virtio 1.3 section 2.7.
        if memory.resolve(setup.desc_table, 16 * u64::from(size), 16).is_none() {
            return setup.refuse("its descriptor table is not in the guest's memory");
        }
        let Some(avail) = Avail::resolve(memory, setup.avail_ring, size) else {
            return setup.refuse("its avail ring is not in the guest's memory");
        };
        let Some(used) = Used::resolve(memory, setup.used_ring, size) else {
            return setup.refuse("its used ring is not in the guest's memory");
        };
        let next_used = used.idx();
        let table = kept(memory).table(setup.desc_table, size);
        let server = setup.device.geometry().server.clone();
        let mark = setup.inflight.as_ref().map_or(QueueMark::default(), InflightQueue::mark);
        let doubtful = server.as_ref().is_some_and(|server| mark.is_doubtful(server.get()));
        let (mut again, inflight_log, noted) = setup.recover(next_used)?;
        if again.iter().any(|head| *head >= size) {
            return setup.refuse("a descriptor that it does not have is noted as in flight");
        }
        again.reverse();
        let call = setup.call.take();
        let vring = Vring {
            table,
            indirect: config_space::indirect(setup.features),
            avail,
            used,
            next_avail: Cell::new(setup.next_avail),
            seen_avail: Cell::new(setup.next_avail),
            next_used: Cell::new(next_used),
            published: Cell::new(next_used),
            signalled_used: Cell::new(next_used),
            peak_depth: Cell::new(0),
            taken: Cell::new(0),
            bytes_left: Cell::new(PASS_BYTES),
            expects_kick_soon: Cell::new(false),
            idle_passes: Cell::new(0),
            free: RefCell::new((0..size).rev().collect()),
            turn: Cell::new(NOBODY),
            head_in_flight: vec![Cell::new(0); size as usize].into(),
            sequence: Cell::new(0),
            in_flight: Cell::new(0),
            server: server.filter(|_| inflight_log.is_some()),
            inflight_log,
            noted,
            doubtful,
            resubmit: RefCell::new(again),
            unfinished: RefCell::default(),
            enabled: Cell::new(setup.enabled),
            stopped: Cell::new(false),
            interrupted: Cell::new(None),
            broken: Cell::new(false),
            call: RefCell::new(call),
            kick: Cell::new(UserData::new(Kind::Kick, 0, 0)),
            kicks_wanted: Cell::new(true),
            held: RefCell::default(),
            hold: Cell::default(),
            setup,
        };
        vring.call_driver();
        Ok(vring)
    }
}
