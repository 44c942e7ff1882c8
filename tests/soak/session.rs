//! A VMM's connection: the handshake as QEMU makes it, at first and after the service was gone.

use super::common::memory::GuestMemory;
use super::common::ring::Ring;
use std::error::Error;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures as Protocol,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

/// Bit 30 of the features: there are protocol features.
const PROTOCOL_FEATURES: u64 = 1 << 30;

/// What the VMM needs of a ring that the guest's driver owns.
pub struct Line {
    memory: Arc<GuestMemory>,
    config: VringConfigData,
    avail: u64,
    used: u64,
    kick: EventFd,
    call: EventFd,
    err: EventFd,
}

impl Line {
    /// Of a ring.
    pub fn of(ring: &Ring) -> Line {
        let same = |event: &EventFd| event.try_clone().expect("a descriptor can be doubled");
        let config = ring.config();
        let memory = ring.memory.clone();
        Line {
            memory,
            config,
            avail: ring.avail,
            used: ring.used,
            kick: same(&ring.kick),
            call: same(&ring.call),
            err: same(&ring.err),
        }
    }

    fn index(&self, ring: u64) -> u16 {
        u16::from_le(self.memory.half(ring + 2).load(Ordering::Acquire))
    }

    /// The device's index, as it stands in memory.
    fn used_idx(&self) -> u16 {
        self.index(self.used)
    }

    /// Requests that the device was given and has not answered.
    fn in_flight(&self) -> u16 {
        self.index(self.avail).wrapping_sub(self.used_idx())
    }
}

/// What a VMM is, connected or not.
pub struct Vmm {
    pub memory: Arc<GuestMemory>,
    pub lines: Vec<Line>,
    /// What the driver accepted at first, and again.
    pub features: u64,
    /// Where requests in flight are noted; none for a VMM that knows nothing of it.
    pub inflight: Option<Option<(VhostUserInflight, File)>>,
    frontend: Option<Frontend>,
}

/// Any step of a handshake, when the service dies in it.
pub type Broken = Box<dyn Error>;

/// Says who we are and what we take: what the device offers.
fn greet(socket: &Path, limit: Duration) -> Result<(Frontend, u64), Broken> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let mut frontend = Frontend::from_stream(stream, 64);
    frontend.set_owner()?;
    let offered = frontend.get_features()?;
    let wanted = Protocol::MQ
        | Protocol::CONFIG
        | Protocol::REPLY_ACK
        | Protocol::CONFIGURE_MEM_SLOTS
        | Protocol::INFLIGHT_SHMFD;
    let protocol = frontend.get_protocol_features()?;
    frontend.set_protocol_features(protocol & wanted)?;
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    Ok((frontend, offered))
}

/// What a device offers, by a connection of its own.
pub fn offered(socket: &Path, limit: Duration) -> Result<u64, Broken> {
    Ok(greet(socket, limit)?.1)
}

impl Vmm {
    /// A VMM whose guest has these rings in this memory.
    pub fn new<'a>(
        memory: &Arc<GuestMemory>,
        rings: impl Iterator<Item = &'a Ring>,
        features: u64,
        inflight: bool,
    ) -> Vmm {
        Vmm {
            memory: memory.clone(),
            lines: rings.map(Line::of).collect(),
            features: features | PROTOCOL_FEATURES,
            inflight: inflight.then_some(None),
            frontend: None,
        }
    }

    /// Connects, and has the device go on where the used rings end.
    pub fn connect(&mut self, socket: &Path, limit: Duration) -> Result<(), Broken> {
        self.frontend = None;
        let (mut frontend, offered) = greet(socket, limit)?;
        if self.features & !offered != 0 {
            return Err(format!("the device no longer offers {:#x}", self.features & !offered).into());
        }
        frontend.get_queue_num()?;
        let size = self.lines[0].config.queue_size;
        if let Some(inflight) = &mut self.inflight {
            if inflight.is_none() {
                let shape = VhostUserInflight::new(0, 0, self.lines.len() as u16, size);
                *inflight = Some(frontend.get_inflight_fd(&shape)?);
            }
            let (shape, file) = inflight.as_ref().expect("it was asked for");
            let shape = VhostUserInflight { num_queues: self.lines.len() as u16, queue_size: size, ..*shape };
            frontend.set_inflight_fd(&shape, file.as_raw_fd())?;
        }
        frontend.set_features(self.features)?;
        frontend.set_mem_table(&self.memory.infos())?;
        for (index, line) in self.lines.iter().enumerate() {
            frontend.set_vring_num(index, line.config.queue_size)?;
            frontend.set_vring_base(index, line.used_idx())?;
            frontend.set_vring_addr(index, &line.config)?;
            frontend.set_vring_err(index, &line.err)?;
            frontend.set_vring_kick(index, &line.kick)?;
            frontend.set_vring_call(index, &line.call)?;
        }
        for (index, line) in self.lines.iter().enumerate() {
            frontend.set_vring_enable(index, true)?;
            // What was made available while nobody listened.
            line.kick.write(1)?;
        }
        self.frontend = Some(frontend);
        Ok(())
    }

    /// Hangs up, as a VMM that was killed.
    pub fn disconnect(&mut self) {
        self.frontend = None;
    }

    /// Sectors of the disk, from its configuration space.
    pub fn capacity(&mut self) -> Result<u64, Broken> {
        let frontend = self.frontend.as_mut().ok_or("not connected")?;
        let (_, bytes) = frontend.get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8])?;
        Ok(u64::from_le_bytes(bytes[..8].try_into()?))
    }

    /// Requests that the device has not answered, in all queues.
    pub fn in_flight(&self) -> u64 {
        self.lines.iter().map(|line| u64::from(line.in_flight())).sum()
    }

    /// The device's indices, as they stand in memory.
    pub fn used(&self) -> Vec<u16> {
        self.lines.iter().map(Line::used_idx).collect()
    }
}
