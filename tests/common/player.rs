//! Plays a VMM by its [`Profile`]: the one place where handshakes are made. It says what that VMM says, no more and in
//! its order, and signals nothing that it does not signal.

use super::PATIENCE;
use super::memory::GuestMemory;
use super::profile::{Acks, Base, Profile, Say};
use super::queue::{Layout, RawQueue};
use super::ring::Ring;
use super::vmm::{BASE, EVENT_IDX};
use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;
use vhost::vhost_user::message::{
    BackendReq, VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight,
    VhostUserProtocolFeatures as Protocol,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

/// Bit 30 of the features: there are protocol features.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// More queues than any of our services has.
const MAX_QUEUES: u64 = 64;

/// Any step of a handshake, when the service dies in it or refuses it.
pub type Broken = Box<dyn Error>;

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
        Line {
            memory: ring.memory.clone(),
            config: ring.config(),
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

    fn used_idx(&self) -> u16 {
        self.index(self.used)
    }

    fn in_flight(&self) -> u16 {
        self.index(self.avail).wrapping_sub(self.used_idx())
    }
}

/// Hangs up on a service that does not answer: the vhost crate itself would wait without end.
struct Deadline {
    _done: Sender<()>,
}

impl Deadline {
    fn of(stream: &UnixStream, limit: Duration) -> Result<Deadline, Broken> {
        let stream = stream.try_clone()?;
        let (done, over) = channel();
        std::thread::spawn(move || {
            if over.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                let _ = stream.shutdown(Shutdown::Both);
            }
        });
        Ok(Deadline { _done: done })
    }
}

/// A connection, as far as it is without a guest.
pub struct Connection {
    pub frontend: Frontend,
    stream: UnixStream,
    /// For each handshake, and each answer.
    limit: Duration,
    profile: &'static Profile,
    /// Features that the device offers.
    pub offered: u64,
    /// Protocol features: offered, then taken.
    protocol: Protocol,
    /// The configuration space, as the VMM asked for it.
    pub config: Vec<u8>,
    /// Where the device says that it has changed.
    channel: Option<UnixStream>,
    /// What masked calls are written to.
    masked: Vec<EventFd>,
    /// It has shown all regions, and shows none twice.
    shown: bool,
}

impl Connection {
    /// The VMM starts. `queues`: how many its user wants; without `notes` it takes none of what is in flight.
    pub fn open(
        profile: &'static Profile,
        socket: &Path,
        limit: Duration,
        queues: usize,
        notes: bool,
    ) -> Result<Connection, Broken> {
        Connection::say_all(profile, profile.connect, socket, limit, queues, notes)
    }

    fn say_all(
        profile: &'static Profile,
        script: &[Say],
        socket: &Path,
        limit: Duration,
        queues: usize,
        notes: bool,
    ) -> Result<Connection, Broken> {
        let stream = UnixStream::connect(socket)?;
        let _deadline = Deadline::of(&stream, limit)?;
        let mut protocol = profile.protocol;
        protocol.set(Protocol::INFLIGHT_SHMFD, notes && protocol.contains(Protocol::INFLIGHT_SHMFD));
        let mut connection = Connection {
            frontend: Frontend::from_stream(stream.try_clone()?, MAX_QUEUES),
            stream,
            limit,
            profile,
            offered: 0,
            protocol,
            config: Vec::new(),
            channel: None,
            masked: Vec::new(),
            shown: false,
        };
        for step in script {
            connection.say(*step, queues)?;
        }
        Ok(connection)
    }

    /// Whether this VMM wants this message acknowledged.
    fn acks(&self, step: Say) -> bool {
        match self.profile.acks {
            Acks::Never => false,
            Acks::Memory => matches!(step, Say::Table | Say::Regions | Say::Channel),
            // Before it knows that it may.
            Acks::Always => !matches!(step, Say::Owner | Say::AskFeatures | Say::AskProtocol | Say::Protocol),
        }
    }

    fn prepare(&self, step: Say) {
        let acks = self.protocol.contains(Protocol::REPLY_ACK) && self.acks(step);
        let flags = if acks { VhostUserHeaderFlag::NEED_REPLY } else { VhostUserHeaderFlag::empty() };
        self.frontend.set_hdr_flags(flags);
    }

    /// A step that needs no guest.
    fn say(&mut self, step: Say, queues: usize) -> Result<(), Broken> {
        self.prepare(step);
        let frontend = &mut self.frontend;
        match step {
            Say::Owner => frontend.set_owner()?,
            Say::AskFeatures => self.offered = frontend.get_features()?,
            Say::AskProtocol => self.protocol &= frontend.get_protocol_features()?,
            Say::Protocol => frontend.set_protocol_features(self.protocol)?,
            Say::AskQueues => {
                let offered = frontend.get_queue_num()?;
                if offered < queues as u64 {
                    return Err(format!("{queues} queues, of which the device has {offered}").into());
                }
            }
            Say::AskSlots => _ = frontend.get_max_mem_slots()?,
            Say::Channel => {
                let (ours, theirs) = UnixStream::pair()?;
                frontend.set_backend_request_fd(&theirs)?;
                self.channel = Some(ours);
            }
            Say::AskConfig => self.config = self.ask_config()?,
            Say::Each(steps) => {
                for index in 0..queues {
                    for step in steps {
                        let event = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?;
                        match step {
                            Say::MaskedCall => self.frontend.set_vring_call(index, &event)?,
                            // Kept, and none of the guest's yet.
                            Say::Err => self.frontend.set_vring_err(index, &event)?,
                            other => unreachable!("{other:?} needs a guest"),
                        }
                        self.masked.push(event);
                    }
                }
            }
            other => unreachable!("{other:?} needs a guest"),
        }
        Ok(())
    }

    fn ask_config(&mut self) -> Result<Vec<u8>, Broken> {
        let (offset, len) = self.profile.config;
        let flags = VhostUserConfigFlags::WRITABLE;
        self.prepare(Say::AskConfig);
        let _deadline = Deadline::of(&self.stream, self.limit)?;
        Ok(self.frontend.get_config(offset, len, flags, &vec![0; len as usize])?.1)
    }

    /// Sectors of the disk, as last read.
    pub fn capacity(&self) -> u64 {
        u64::from_le_bytes(self.config[..8].try_into().expect("a VMM reads the capacity at least"))
    }

    /// Waits until the device says that its configuration space has changed, and reads it again.
    pub fn await_change(&mut self, limit: Duration) -> Result<(), Broken> {
        let channel = self.channel.as_mut().ok_or("this VMM is told nothing")?;
        channel.set_read_timeout(Some(limit))?;
        let mut header = [0; 12];
        channel.read_exact(&mut header)?;
        if header[..4] != u32::from(BackendReq::CONFIG_CHANGE_MSG).to_ne_bytes() {
            return Err(format!("the device says {header:?}").into());
        }
        self.look_again()
    }

    /// Reads the configuration space again.
    pub fn look_again(&mut self) -> Result<(), Broken> {
        self.config = self.ask_config()?;
        Ok(())
    }
}

/// A VMM that starts, and its guest's driver: so many queues, with so many slots each.
pub fn everyday(
    profile: &'static Profile,
    socket: &Path,
    limit: Duration,
    (queues, slots): (usize, usize),
) -> Result<(Player, Vec<RawQueue>), Broken> {
    let connection = Connection::open(profile, socket, limit, queues, true)?;
    let (ring_bytes, each) = (Ring::bytes(profile.size), RawQueue::bytes(profile.size, slots));
    let memory = Arc::new(GuestMemory::new(BASE, each * queues as u64));
    let features = connection.offered & profile.features;
    let layout = if profile.segments { Layout::Pieces } else { Layout::Plain };
    let queue = |index: u64| {
        let at = BASE + index * each;
        let mut ring = Ring::new(&memory, at, profile.size, features & EVENT_IDX != 0);
        if profile.blocking {
            ring.block();
        }
        RawQueue::new(ring, layout, at + ring_bytes, slots)
    };
    let queues: Vec<RawQueue> = (0..queues as u64).map(queue).collect();
    let rings = queues.iter().map(|queue| &queue.ring);
    let mut vmm = Player::new(&memory, rings, features, connection);
    vmm.start()?;
    Ok((vmm, queues))
}

/// A VMM with a guest, connected or not.
pub struct Player {
    pub profile: &'static Profile,
    pub memory: Arc<GuestMemory>,
    pub lines: Vec<Line>,
    /// What the driver accepted, at first and again.
    pub features: u64,
    /// Where requests in flight are noted; none for a VMM that knows nothing of it.
    pub inflight: Option<Option<(VhostUserInflight, File)>>,
    connection: Option<Connection>,
}

impl Player {
    /// A VMM whose guest has these rings in this memory, with a connection that has not begun to serve them.
    pub fn new<'a>(
        memory: &Arc<GuestMemory>,
        rings: impl Iterator<Item = &'a Ring>,
        features: u64,
        connection: Connection,
    ) -> Player {
        let notes = connection.protocol.contains(Protocol::INFLIGHT_SHMFD);
        Player {
            profile: connection.profile,
            memory: memory.clone(),
            lines: rings.map(Line::of).collect(),
            features: features | PROTOCOL_FEATURES,
            inflight: notes.then_some(None),
            connection: Some(connection),
        }
    }

    /// The driver is ready: has the device serve its rings.
    pub fn start(&mut self) -> Result<(), Broken> {
        let mut connection = self.connection.take().ok_or("not connected")?;
        let _deadline = Deadline::of(&connection.stream, connection.limit)?;
        for step in self.profile.start {
            self.say(*step, &mut connection)?;
        }
        self.connection = Some(connection);
        Ok(())
    }

    /// Comes back, and has the device go on.
    pub fn reconnect(&mut self, socket: &Path, limit: Duration) -> Result<(), Broken> {
        self.connection = None;
        let script = self.profile.again.ok_or("this VMM never comes back")?;
        let (queues, notes) = (self.lines.len(), self.inflight.is_some());
        let connection = Connection::say_all(self.profile, script, socket, limit, queues, notes)?;
        if self.features & !connection.offered != 0 {
            let gone = self.features & !connection.offered;
            return Err(format!("the device no longer offers {gone:#x}").into());
        }
        self.connection = Some(connection);
        self.start()
    }

    fn say(&mut self, step: Say, connection: &mut Connection) -> Result<(), Broken> {
        connection.prepare(step);
        let frontend = &mut connection.frontend;
        match step {
            Say::Features => frontend.set_features(self.features)?,
            Say::LowFeatures => frontend.set_features(self.features & u64::from(u32::MAX))?,
            Say::Table => _ = frontend.set_mem_table(&self.memory.infos())?,
            Say::Regions if std::mem::replace(&mut connection.shown, true) => {}
            Say::Regions => {
                for region in self.memory.infos() {
                    frontend.add_mem_region(&region)?;
                }
            }
            Say::Inflight => self.keep_notes(frontend)?,
            Say::Each(steps) => {
                for index in 0..self.lines.len() {
                    for step in steps {
                        self.say_of(*step, index, connection)?;
                    }
                }
            }
            other => unreachable!("{other:?} is not said here"),
        }
        Ok(())
    }

    fn keep_notes(&mut self, frontend: &mut Frontend) -> Result<(), Broken> {
        let (queues, size) = (self.lines.len() as u16, self.lines[0].config.queue_size);
        let Some(inflight) = &mut self.inflight else { return Ok(()) };
        if inflight.is_none() {
            let (given, file) = frontend.get_inflight_fd(&VhostUserInflight::new(0, 0, queues, size))?;
            let shape = VhostUserInflight { num_queues: queues, queue_size: size, ..given };
            *inflight = Some((shape, file));
        }
        let (shape, file) = inflight.as_ref().expect("it was asked for");
        Ok(frontend.set_inflight_fd(shape, file.as_raw_fd())?)
    }

    fn say_of(&self, step: Say, index: usize, connection: &mut Connection) -> Result<(), Broken> {
        connection.prepare(step);
        let (line, frontend) = (&self.lines[index], &mut connection.frontend);
        match step {
            Say::Num => frontend.set_vring_num(index, line.config.queue_size)?,
            Say::Base => {
                let base = match self.profile.base {
                    Base::Used => line.used_idx(),
                    Base::Avail => line.index(line.avail),
                };
                frontend.set_vring_base(index, base)?;
            }
            Say::Addr => frontend.set_vring_addr(index, &line.config)?,
            Say::Err => frontend.set_vring_err(index, &line.err)?,
            Say::Kick => {
                if self.profile.kicks {
                    line.kick.write(1)?;
                }
                frontend.set_vring_kick(index, &line.kick)?;
            }
            Say::Call => frontend.set_vring_call(index, &line.call)?,
            Say::Enable => frontend.set_vring_enable(index, true)?,
            other => unreachable!("{other:?} is not said for each queue"),
        }
        Ok(())
    }

    /// The guest resets its device: every queue stops. Where each stood.
    pub fn reset(&mut self) -> Result<Vec<u16>, Broken> {
        let connection = self.connection.as_mut().ok_or("not connected")?;
        connection.prepare(Say::Enable);
        let _deadline = Deadline::of(&connection.stream, connection.limit)?;
        let mut bases = Vec::new();
        for index in 0..self.lines.len() {
            connection.frontend.set_vring_enable(index, false)?;
            bases.push(connection.frontend.get_vring_base(index)? as u16);
        }
        // The guest's next driver knows nothing of what this one had.
        if let Some(inflight) = &mut self.inflight {
            *inflight = None;
        }
        Ok(bases)
    }

    /// Hangs up, as a VMM that was killed.
    pub fn disconnect(&mut self) {
        self.connection = None;
    }

    /// The connection, for what is not part of a handshake.
    pub fn connection(&mut self) -> Option<&mut Connection> {
        self.connection.as_mut()
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

/// A guest of a VMM: its rings, and slots for requests.
pub struct Played {
    pub vmm: Player,
    pub queues: Vec<RawQueue>,
}

impl Played {
    /// The VMM starts, and its guest's driver, with so many queues.
    pub fn new(profile: &'static Profile, socket: &Path, queues: usize) -> Played {
        let (vmm, queues) = everyday(profile, socket, PATIENCE, (queues, 4)).unwrap();
        Played { vmm, queues }
    }
}
