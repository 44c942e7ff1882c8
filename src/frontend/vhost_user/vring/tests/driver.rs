//! The other two sides of a vring: a driver that lays its rings out by hand, and a worker with a disk in
//! memory.

#![forbid(unsafe_code)]

use crate::block::{Data, Errno, Flags, Geometry, Op, Request};
use crate::frontend::vhost_user::device::Device;
use crate::frontend::vhost_user::eventfd::CallFd;
use crate::frontend::vhost_user::memory::Memory;
use crate::frontend::vhost_user::vring::{Vring, VringSetup};
use crate::frontend::{Queue, Source};
use crate::ring::sim::{Faults, Random, SimRing};
use crate::ring::{Core, Cqe, Io, Ring, Sqe, Target, Tasks};
use libc::{FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, RWF_DSYNC};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::future::Future;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, LazyLock};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Sectors of the disk.
pub const SECTORS: u64 = 512;

pub const DESC: u64 = 0;
pub const AVAIL: u64 = 0x8000;
pub const USED: u64 = 0x1_0000;
/// Each head's header, status, indirect table and data, in a page and a half.
const AREAS: u64 = 0x2_0000;
const AREA: u64 = 0x2000;
const STATUS: u64 = 16;
const INDIRECT_TABLE: u64 = 0x100;
const ROOM: u64 = 0x1000;

/// An eventfd, and whether it was written to since the last look.
pub struct Event(EventFd);

impl Event {
    pub fn new() -> Event {
        Event(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap())
    }

    pub fn take(&self) -> bool {
        self.count() > 0
    }

    /// How often it was written to since the last look.
    pub fn count(&self) -> u64 {
        self.0.read().unwrap_or(0)
    }

    pub fn ring(&self) {
        self.0.write(1).unwrap();
    }

    pub fn file(&self) -> File {
        File::from(self.0.as_fd().try_clone_to_owned().unwrap())
    }

    pub fn call(&self) -> CallFd {
        CallFd::new(&self.file()).unwrap()
    }
}

/// The driver. It owns the guest's memory.
pub struct Driver {
    memory: Arc<GuestMemoryMmap<()>>,
    pub size: u16,
    pub event_idx: bool,
    /// Its indices: where the next request goes, and the next completion is expected.
    pub avail: u16,
    pub seen: u16,
    free: Vec<u16>,
    /// The descriptors of each chain in flight.
    chains: HashMap<u16, Vec<u16>>,
    pub call: Event,
    pub kick: Event,
    pub err: Event,
}

impl Driver {
    /// A driver whose indices stand at `start`.
    pub fn new(size: u16, event_idx: bool, start: u16) -> Driver {
        let len = AREAS + AREA * u64::from(size);
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len as usize)]).unwrap());
        let driver = Driver {
            memory,
            size,
            event_idx,
            avail: start,
            seen: start,
            free: (0..size).collect(),
            chains: HashMap::new(),
            call: Event::new(),
            kick: Event::new(),
            err: Event::new(),
        };
        driver.put_u16(AVAIL + 2, start);
        driver.put_u16(USED + 2, start);
        driver
    }

    /// What a worker starts our vring with.
    pub fn setup(&self, device: Device, features: u64) -> VringSetup {
        VringSetup {
            index: 0,
            device: Arc::new(device),
            memory: Arc::new(Memory::new(self.memory.clone()).unwrap()),
            size: self.size,
            desc_table: DESC,
            avail_ring: AVAIL,
            used_ring: USED,
            next_avail: self.avail,
            unfinished: Vec::new(),
            enabled: true,
            read_only: false,
            features,
            event_idx: self.event_idx,
            kick: Arc::new(self.kick.file()),
            call: Some(self.call.call()),
            err: Some(Arc::new(self.err.file())),
            inflight: None,
        }
    }

    /// Where its memory is mapped.
    pub fn host(&self, at: u64) -> u64 {
        self.memory.get_host_address(GuestAddress(at)).unwrap() as u64
    }

    /// What takes a copy of all of its memory.
    pub fn memory(&self) -> impl Fn() -> Vec<u8> + 'static {
        let (memory, len) = (self.memory.clone(), AREAS + AREA * u64::from(self.size));
        move || {
            let mut bytes = vec![0; len as usize];
            memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
            bytes
        }
    }

    fn put_u16(&self, at: u64, value: u16) {
        self.memory.write_slice(&value.to_le_bytes(), GuestAddress(at)).unwrap();
    }

    fn get_u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.get(at, 2).try_into().unwrap())
    }

    pub fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Writes bytes into the guest's memory.
    pub fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub fn put_descriptor(&self, at: u64, (addr, len, flags): (u64, usize, u16), next: u16) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend((len as u32).to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    pub fn area(&self, head: u16) -> u64 {
        AREAS + AREA * u64::from(head)
    }

    /// The status byte of a chain.
    pub fn status(&self, head: u16) -> u8 {
        self.get(self.area(head) + STATUS, 1)[0]
    }

    /// The data of a chain.
    pub fn data(&self, head: u16, len: usize) -> Vec<u8> {
        self.get(self.area(head) + ROOM, len)
    }

    /// Lays a request out and makes it available, in an indirect table when asked or when the ring is too
    /// small for its descriptors; `None` when there are none left. `data` is what the device reads, `room`
    /// what it may write.
    pub fn add(&mut self, kind: u32, sector: u64, data: &[u8], room: usize, indirect: bool) -> Option<u16> {
        let parts = 2 + usize::from(!data.is_empty()) + usize::from(room > 0);
        let indirect = indirect || parts > self.size as usize;
        let own = self.free.len().checked_sub(if indirect { 1 } else { parts })?;
        let chain = self.free.split_off(own);
        let head = chain[0];
        let area = self.area(head);
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), &[0xff]].concat();
        self.memory.write_slice(&header, GuestAddress(area)).unwrap();
        self.memory.write_slice(data, GuestAddress(area + ROOM)).unwrap();
        let mut list = vec![(area, 16, 0)];
        if !data.is_empty() {
            list.push((area + ROOM, data.len(), 0));
        }
        if room > 0 {
            list.push((area + ROOM, room, WRITE));
        }
        list.push((area + STATUS, 1, WRITE));
        for (index, (addr, len, flags)) in list.iter().enumerate() {
            let next = if index + 1 < list.len() { NEXT } else { 0 };
            let (at, link) = if indirect {
                (area + INDIRECT_TABLE + 16 * index as u64, index as u16 + 1)
            } else {
                (DESC + 16 * u64::from(chain[index]), chain.get(index + 1).copied().unwrap_or(0))
            };
            self.put_descriptor(at, (*addr, *len, flags | next), link);
        }
        if indirect {
            let table = (area + INDIRECT_TABLE, 16 * list.len(), INDIRECT);
            self.put_descriptor(DESC + 16 * u64::from(head), table, 0);
        }
        self.chains.insert(head, chain);
        self.offer(head);
        Some(head)
    }

    /// A completion of `head` will come, of a chain that was laid out by hand.
    pub fn expect(&mut self, head: u16) {
        self.chains.insert(head, Vec::new());
    }

    /// Moves the last descriptor of a chain, its status. Where it was.
    pub fn move_status(&self, head: u16, to: u64) -> u64 {
        let last = DESC + 16 * u64::from(*self.chains[&head].last().unwrap());
        let before = u64::from_le_bytes(self.get(last, 8).try_into().unwrap());
        self.put(last, &to.to_le_bytes());
        before
    }

    /// Makes the chain at `head` available, whatever that is.
    pub fn offer(&mut self, head: u16) {
        self.put_u16(AVAIL + 4 + 2 * u64::from(self.avail % self.size), head);
        self.move_avail(self.avail.wrapping_add(1));
    }

    pub fn move_avail(&mut self, avail: u16) {
        self.avail = avail;
        self.put_u16(AVAIL + 2, avail);
    }

    /// Whether the device wants to hear of what was made available since `old`.
    pub fn must_kick(&self, old: u16) -> bool {
        if self.event_idx {
            let event = self.get_u16(USED + 4 + 8 * u64::from(self.size));
            crossed(old, self.avail, event)
        } else {
            self.used_flags() == 0
        }
    }

    pub fn used_flags(&self) -> u16 {
        self.get_u16(USED)
    }

    /// `None`: no calls, as far as that can be said. Otherwise a call when the completion with that index is
    /// there.
    pub fn want_call(&self, at: Option<u16>) {
        self.put_u16(AVAIL, u16::from(at.is_none() && !self.event_idx));
        self.put_u16(AVAIL + 4 + 2 * u64::from(self.size), at.unwrap_or(self.seen.wrapping_sub(1)));
    }

    /// Takes the completions that are there: heads, and the bytes that were written for each.
    pub fn harvest(&mut self) -> Vec<(u16, u32)> {
        let mut seen = Vec::new();
        while self.anything() {
            let at = USED + 4 + 8 * u64::from(self.seen % self.size);
            let word = |at| u32::from_le_bytes(self.get(at, 4).try_into().unwrap());
            let (head, len) = (word(at), word(at + 4));
            let head = u16::try_from(head).unwrap();
            let chain = self.chains.remove(&head).unwrap_or_else(|| panic!("{head} is not in flight"));
            // Used again in another order, so that heads and tags soon have nothing to do with each other.
            self.free.extend(chain);
            self.seen = self.seen.wrapping_add(1);
            seen.push((head, len));
        }
        seen
    }

    /// Whether there is a completion to harvest.
    pub fn anything(&self) -> bool {
        self.seen != self.used_idx()
    }

    /// The device's end of the used ring: all that a VMM knows of a device that was killed.
    pub fn used_idx(&self) -> u16 {
        self.get_u16(USED + 2)
    }

    /// Its own index, as it stands in memory.
    pub fn avail_idx(&self) -> u16 {
        self.get_u16(AVAIL + 2)
    }

    /// The head in an element of the used ring.
    pub fn used_head(&self, at: u16) -> u32 {
        let at = USED + 4 + 8 * u64::from(at % self.size);
        u32::from_le_bytes(self.get(at, 4).try_into().unwrap())
    }

    pub fn in_flight(&self) -> usize {
        self.chains.len()
    }
}

/// Whether an index that moves from `old` to `new` passes `event` (virtio 1.3 section 2.7.7).
fn crossed(old: u16, new: u16, event: u16) -> bool {
    let mut at = old;
    while at != new {
        if at == event {
            return true;
        }
        at = at.wrapping_add(1);
    }
    false
}

/// A request as the disk saw it.
pub type Seen = (Op, Flags, u64, u32);

/// A disk of [`SECTORS`] on a simulated ring: what an engine does, without its care.
struct Disk {
    file: Target,
    seen: RefCell<Vec<Seen>>,
}

impl Disk {
    async fn perform(&self, io: &Io<SimRing>, request: &Request<'_>) -> Result<(), Errno> {
        let Request { op, flags, sector, sectors, .. } = *request;
        self.seen.borrow_mut().push((op, flags, sector, sectors));
        if sector.checked_add(u64::from(sectors)).is_none_or(|end| end > SECTORS) {
            return Err(Errno::EIO);
        }
        let (file, offset, len) = (self.file, sector * 512, request.len());
        let zero = |mode| Sqe::Fallocate { file, mode: mode | FALLOC_FL_KEEP_SIZE, offset, len };
        let ranges = match &request.data {
            Data::Iovecs(window) => window.as_raw().0,
            _ => &[],
        };
        let sqe = match op {
            Op::Read => Sqe::Readv { file, ranges, offset },
            Op::Write => {
                let rw_flags = if flags.fua { RWF_DSYNC } else { 0 };
                Sqe::Writev { file, ranges, offset, rw_flags }
            }
            Op::Flush => Sqe::Fdatasync { file },
            Op::Discard => zero(FALLOC_FL_PUNCH_HOLE),
            Op::WriteZeroes => zero(FALLOC_FL_ZERO_RANGE),
        };
        let moved = Errno::split(io.submit(&sqe).await)?;
        assert!(ranges.is_empty() || u64::from(moved) == len, "the data is not as long as the request");
        Ok(())
    }
}

type Slot = Pin<Box<dyn Future<Output = ()>>>;

/// What a worker does for one vring, pass by pass.
pub struct Worker {
    pub core: Rc<Core<SimRing>>,
    tasks: Tasks<SimRing, Slot>,
    pub vring: Rc<Vring>,
    disk: Rc<Disk>,
    slots: Vec<u32>,
}

impl Worker {
    pub fn new(setup: VringSetup, seed: u64, faults: Faults) -> Worker {
        let image = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&image, &PATTERN, 0).unwrap();
        let core = Core::new(SimRing::new(seed, faults));
        let disk = Rc::new(Disk { file: core.ring().register(image.as_raw_fd()), seen: RefCell::default() });
        let vring = Rc::new(Vring::new(setup).unwrap());
        Worker { tasks: Tasks::new(core.clone()), core, vring, disk, slots: Vec::new() }
    }

    /// Completions, then new requests; what they submit is in the ring afterwards. Whether there were any.
    pub fn pass(&mut self) -> bool {
        let mut cqes: Vec<Cqe> = Vec::new();
        self.core.ring().reap(&mut cqes);
        for cqe in &cqes {
            self.tasks.complete(cqe);
        }
        let news = self.vring.begin_pass();
        let mut worked = !cqes.is_empty() | news;
        while let Some(tag) = self.vring.poll() {
            worked = true;
            match self.slots.get(tag as usize) {
                Some(slot) => self.tasks.poll(*slot),
                None => {
                    assert_eq!(tag as usize, self.slots.len(), "tags are first used in their order");
                    let (vring, disk) = (self.vring.clone(), self.disk.clone());
                    self.slots.push(self.tasks.add(|io| Box::pin(serve(io, vring, disk, tag)) as Slot));
                }
            }
        }
        self.core.ring().enter(false).unwrap();
        worked
    }

    /// Passes until there is nothing to do and nothing in flight.
    pub fn settle(&mut self) {
        while self.pass() || self.core.in_flight() > 0 {}
    }

    /// The requests the disk saw since the last look.
    pub fn seen(&self) -> Vec<Seen> {
        self.disk.seen.take()
    }
}

async fn serve(io: Io<SimRing>, vring: Rc<Vring>, disk: Rc<Disk>, tag: u16) {
    let mut state = <Vring as Source<SimRing>>::State::default();
    while let Some(request) = vring.next(&io, tag, &mut state).await {
        let result = disk.perform(&io, &request).await;
        Source::<SimRing>::complete(&*vring, tag, &mut state, result);
    }
}

/// What the disk holds at first.
pub static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| Random(7).bytes(SECTORS as usize * 512));

/// A device on the disk.
pub fn device() -> Device {
    let mut geometry = Geometry::new(SECTORS * 512, 512).unwrap();
    geometry.volatile_cache = true;
    Device::new("a-volume", "/test.sock", geometry, false)
}
