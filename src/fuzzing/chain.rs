//! A vring and everything below it, given a driver that writes what it likes where it likes.
//!
//! The driver's deeds and the device's steps alternate. Around each step of the device the guest's memory is compared:
//! nothing may have changed but the used ring, and what the chain that the step served names as writable. And each
//! chain that was taken comes back once, with no more bytes written than it had room for.

use super::Input;
use crate::engine::config::{MemoryConfig, NullConfig, VolumeConfig};
use crate::engine::{Flusher, Volume, VolumeChannel, submit};
use crate::frontend::vhost_user::{Device, Inflight, Memory, Vring, VringSetup};
use crate::frontend::{Queue, Source};
use crate::ring::{Core, Io, Setup, Tasks, Uring};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::future::Future;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The guest's memory: two regions that touch, and one apart.
const REGIONS: [(u64, usize); 3] = [(0, 0x4000), (0x4000, 0x2000), (0x8000, 0x1000)];
const END: u64 = 0x9000;

/// Where a well-behaved driver has things; one that is not puts them anywhere.
const DESC: u64 = 0;
const AVAIL: u64 = 0x400;
const USED: u64 = 0x800;
const INDIRECT: u64 = 0xc00;
const BUFFERS: u64 = 0x1000;

const DISK: u64 = 64 << 10;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

/// Any bytes: a set-up, then deeds of the driver and passes of the device.
pub fn chain(bytes: &[u8]) {
    let mut input = Input(bytes);
    let Some(mut machine) = Machine::new(&mut input) else { return };
    while !input.is_empty() {
        match input.u8() % 8 {
            0 => machine.put_descriptor(&mut input),
            1 => machine.put_bytes(&mut input),
            2 => machine.put_request(&mut input),
            3 => machine.offer(input.u8().into()),
            4 => machine.move_avail(input.u16()),
            5 => machine.delay.set(input.flag()),
            6 => machine.wake(),
            _ => machine.pass(input.u8()),
        }
    }
    machine.settle();
}

type Slot = Pin<Box<dyn Future<Output = ()>>>;
type Places = Vec<Range<u64>>;
type Snapshot = [Vec<u8>; 3];

/// A chain that the device has.
struct Taken {
    /// `None` for one that is carried out again: which one that is, the device knows.
    head: Option<u16>,
    /// Where it may be written to.
    places: Places,
    room: u64,
}

struct Machine {
    guest: Arc<GuestMemoryMmap<()>>,
    volume: Rc<VolumeChannel<Uring>>,
    vring: Rc<Vring>,
    tasks: Tasks<Uring, Slot>,
    core: Rc<Core<Uring>>,
    /// The slot of each tag.
    slots: Vec<u32>,
    /// Tags whose requests wait to be carried out; new ones do when `delay` is set.
    parked: Rc<RefCell<VecDeque<u16>>>,
    delay: Rc<Cell<bool>>,
    taken: HashMap<u16, Taken>,
    at: Setting,
    /// Completions so far, and where the first of them is in the used ring.
    completed: u16,
    first: u16,
    /// The driver wrote to the used ring, or named it as a buffer: what it says is not the device's alone any more.
    muddled: Cell<bool>,
    /// Room for what the guest's memory holds before and after a step.
    before: Snapshot,
    after: Snapshot,
}

#[derive(Clone, Copy)]
struct Setting {
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
}

impl Setting {
    fn used_ring(&self) -> Range<u64> {
        self.used..self.used + 6 + 8 * u64::from(self.size)
    }
}

thread_local! {
    // Made once: what one run leaves in them, no other can see.
    static CORE: Rc<Core<Uring>> =
        Core::new(Uring::new(Setup { entries: 8, completions: 64, ..Setup::default() }).unwrap());
    static GUEST: Arc<GuestMemoryMmap<()>> =
        Arc::new(GuestMemoryMmap::from_ranges(&REGIONS.map(|(at, len)| (GuestAddress(at), len))).unwrap());
    static EVENT: EventFd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    static VOLUMES: [Volume; 2] = [
        Volume::open("memory", &VolumeConfig::Memory(MemoryConfig {
            size: crate::block::Size(DISK), block_size: None,
        })).unwrap(),
        Volume::open("null", &VolumeConfig::Null(NullConfig {
            size: crate::block::Size(DISK), block_size: Some(4096),
        })).unwrap(),
    ];
}

fn event() -> File {
    EVENT.with(|event| File::from(event.as_fd().try_clone_to_owned().unwrap()))
}

impl Machine {
    /// `None` for a set-up that the device refuses.
    fn new(input: &mut Input) -> Option<Machine> {
        let guest = GUEST.with(Arc::clone);
        for (at, len) in REGIONS {
            guest.write_slice(&vec![0; len], GuestAddress(at)).unwrap();
        }
        let (shape, features, start) = (input.u8(), input.u64(), input.u16());
        let size = 1 << (shape & 7).min(5);
        let mut at = Setting { size, desc: DESC, avail: AVAIL, used: USED };
        if shape & 8 != 0 {
            at.desc = address(input);
            at.avail = address(input);
            at.used = address(input);
        }
        let _ = guest.write_slice(&start.to_le_bytes(), GuestAddress(at.avail.wrapping_add(2)));
        let _ = guest.write_slice(&start.to_le_bytes(), GuestAddress(at.used.wrapping_add(2)));
        let inflight = if shape & 16 != 0 { Some(notes(input)?) } else { None };
        let null = usize::from(shape & 32 != 0);
        let (volume, geometry) = VOLUMES.with(|volumes| {
            let volume = &volumes[null];
            (CORE.with(|core| volume.attach(core, shape & 64 != 0)), volume.geometry().clone())
        });
        let setup = VringSetup {
            index: 0,
            device: Arc::new(Device::new("a-volume", "/fuzz.sock", geometry, shape & 64 != 0)),
            memory: Arc::new(Memory::new(guest.clone()).unwrap()),
            size,
            desc_table: at.desc,
            avail_ring: at.avail,
            used_ring: at.used,
            next_avail: start,
            unfinished: Vec::new(),
            enabled: true,
            read_only: shape & 64 != 0,
            features,
            event_idx: shape & 128 != 0,
            kick: Arc::new(event()),
            // Making one takes longer than a run.
            call: None,
            err: Some(Arc::new(event())),
            inflight: inflight.as_ref().and_then(|inflight| inflight.queue(0)),
        };
        let vring = Rc::new(Vring::new(setup).ok()?);
        let core = CORE.with(Rc::clone);
        let mut machine = Machine {
            first: 0,
            guest,
            volume: Rc::new(volume),
            vring,
            tasks: Tasks::new(core.clone()),
            core,
            slots: Vec::new(),
            parked: Rc::default(),
            delay: Rc::default(),
            taken: HashMap::new(),
            at,
            completed: 0,
            muddled: Cell::new(false),
            before: Snapshot::default(),
            after: Snapshot::default(),
        };
        machine.first = machine.u16_at(at.used + 2);
        Some(machine)
    }

    fn u16_at(&self, at: u64) -> u16 {
        self.guest.read_obj::<u16>(GuestAddress(at)).unwrap()
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        let used = self.at.used_ring();
        self.muddle(at < used.end && used.start < at.saturating_add(bytes.len() as u64));
        // A driver cannot write where it has no memory either.
        let _ = self.guest.write(bytes, GuestAddress(at));
    }

    fn muddle(&self, so: bool) {
        self.muddled.set(self.muddled.get() | so);
    }

    fn descriptor_at(&self, at: u64, (addr, len, flags, next): (u64, u32, u16, u16)) {
        let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.put(at, &[addr.to_le_bytes(), rest.to_le_bytes()].concat());
    }

    fn put_descriptor(&self, input: &mut Input) {
        let slot = u64::from(input.u8());
        let base = if slot & 0x80 == 0 { self.at.desc } else { INDIRECT };
        let addr = if slot & 0x40 == 0 { address(input) } else { INDIRECT };
        let (len, flags, next) = (length(input), input.u8().into(), input.u8().into());
        self.descriptor_at(base.wrapping_add(16 * (slot & 0x3f)), (addr, len, flags, next));
    }

    fn put_bytes(&self, input: &mut Input) {
        let at = address(input);
        let count = usize::from(input.u8() & 63);
        self.put(at, input.bytes(count));
    }

    /// A request as drivers make them, at least for its first few bytes.
    fn put_request(&mut self, input: &mut Input) {
        let kind: u32 = input.one_of(&[0, 1, 4, 8, 11, 13, 0, 1, 2, u32::MAX]);
        let sector: u64 = match input.u8() {
            255 => input.u64(),
            small => small.into(),
        };
        let (head, layout) = (u16::from(input.u8()) % self.at.size, input.u8());
        let buffer = BUFFERS + 0x800 * u64::from(head);
        self.put(buffer, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
        let writes = if [0, 8].contains(&kind) { F_WRITE } else { 0 };
        let mut parts = match layout & 3 {
            0 => vec![(buffer, 16, 0)],
            1 => vec![(buffer, 5, 0), (buffer + 5, 0, 0), (buffer + 5, 11, 0)],
            // The header and the first range of a discard in one.
            2 => vec![(buffer, 32, 0)],
            _ => vec![(buffer, 16, 0), (address(input), length(input), writes)],
        };
        for _ in 0..(layout >> 2 & 3) {
            parts.push((buffer + 0x20, length(input), writes));
        }
        if [11, 13].contains(&kind) {
            let ranges =
                [sector.to_le_bytes(), (input.u8() as u64 | (input.flag() as u64) << 32).to_le_bytes()];
            (0..3).for_each(|n| self.put(buffer + 0x10 + 0x10 * n, &ranges.concat()));
        }
        parts.push((buffer + 0x7ff, 1, F_WRITE));
        let indirect = layout & 16 != 0;
        let base = if indirect { INDIRECT + 0x80 * u64::from(head & 7) } else { self.at.desc };
        let start = if indirect { 0 } else { head };
        for (place, (addr, len, flags)) in (start..).zip(&parts) {
            let last = usize::from(place - start) + 1 == parts.len();
            let next = if last { 0 } else { F_NEXT };
            self.descriptor_at(
                base.wrapping_add(16 * u64::from(place)),
                (*addr, *len, flags | next, place + 1),
            );
        }
        if indirect {
            let bytes = 16 * parts.len() as u32;
            self.descriptor_at(self.at.desc.wrapping_add(16 * u64::from(head)), (base, bytes, F_INDIRECT, 0));
        }
        if layout & 32 == 0 {
            self.offer(head);
        }
    }

    fn offer(&self, head: u16) {
        let idx = self.u16_at(self.at.avail + 2);
        self.put(self.at.avail + 4 + 2 * u64::from(idx % self.at.size), &head.to_le_bytes());
        self.move_avail(idx.wrapping_add(1));
    }

    fn move_avail(&self, idx: u16) {
        self.put(self.at.avail + 2, &idx.to_le_bytes());
    }

    /// What a worker does each time around.
    fn pass(&mut self, how: u8) {
        self.watched(None, |machine| machine.vring.begin_pass());
        // A pass is bounded by itself; this is to notice if it were not.
        for _ in 0..64 {
            let head = self.next_head();
            let tag = self.watched(None, |machine| machine.vring.poll());
            let Some(tag) = tag else { break };
            // Now, since its end may be written to the used ring, and a driver may have its descriptors there.
            let taking = self.chain_at(head);
            assert!(tag < self.at.size, "tag {tag} of {}", self.at.size);
            assert!(self.taken.insert(tag, taking).is_none(), "tag {tag} is in use");
            self.watched(Some(tag), |machine| machine.poll(tag));
        }
        if how & 1 != 0 {
            self.watched(None, |machine| machine.vring.arm_kick());
        }
        if how & 2 != 0 {
            self.vring.enable(how & 4 != 0);
        }
    }

    fn poll(&mut self, tag: u16) {
        match self.slots.get(usize::from(tag)) {
            Some(slot) => self.tasks.poll(*slot),
            None => {
                assert_eq!(usize::from(tag), self.slots.len(), "tags are first used in their order");
                let (vring, volume) = (self.vring.clone(), self.volume.clone());
                let (parked, delay) = (self.parked.clone(), self.delay.clone());
                let slot =
                    self.tasks.add(|io| Box::pin(serve(io, vring, volume, tag, parked, delay)) as Slot);
                self.slots.push(slot);
            }
        }
        self.take_turns();
    }

    /// Goes on until nobody waits for a [turn](Io::turn): what is written is then written in the step of its own chain.
    fn take_turns(&mut self) {
        while !self.core.is_quiet() {
            self.tasks.run_ready();
        }
    }

    /// Carries out the request that has waited longest.
    fn wake(&mut self) {
        let Some(tag) = self.parked.borrow_mut().pop_front() else { return };
        self.watched(Some(tag), |machine| {
            machine.core.wake(machine.slots[usize::from(tag)]);
            machine.take_turns();
        });
    }

    /// Everything the device has comes back.
    fn settle(&mut self) {
        self.delay.set(false);
        self.vring.stop();
        // Requests that an earlier device had are carried out even now.
        while self.vring.in_flight() > 0 {
            let before = self.completed;
            while !self.parked.borrow().is_empty() {
                self.wake();
            }
            self.pass(0);
            assert!(self.completed != before || self.vring.in_flight() == 0, "the device hangs");
        }
        assert!(self.taken.is_empty(), "taken, and never given back: {:?}", self.taken.keys());
        self.watched(None, |machine| machine.vring.publish());
        if !self.muddled.get() {
            let idx = self.u16_at(self.at.used + 2);
            assert_eq!(idx, self.first.wrapping_add(self.completed), "one completion a chain");
        }
    }

    /// A step of the device, on behalf of the chain of `tag` or of none.
    fn watched<T>(&mut self, tag: Option<u16>, step: impl FnOnce(&mut Machine) -> T) -> T {
        let mut before = std::mem::take(&mut self.before);
        self.snapshot(&mut before);
        let broken = self.vring.is_broken();
        let result = step(self);
        let mut after = std::mem::take(&mut self.after);
        self.snapshot(&mut after);
        let used = self.at.used_ring();
        let taken = tag.and_then(|tag| self.taken.get(&tag));
        let may = |at: u64| {
            used.contains(&at)
                || taken.is_some_and(|taken| taken.places.iter().any(|place| place.contains(&at)))
        };
        for ((base, _), (old, new)) in REGIONS.iter().zip(before.iter().zip(&after)) {
            if old == new {
                continue;
            }
            for (at, (old, new)) in (*base..).zip(old.iter().zip(new)) {
                assert!(old == new || may(at), "the device wrote to {at:#x}");
            }
        }
        (self.before, self.after) = (before, after);
        if let (Some(tag), Some(taken)) = (tag, taken) {
            self.muddle(taken.places.iter().any(|place| place.start < used.end && used.start < place.end));
            if !broken && self.vring.is_broken() {
                // Nothing can be told of this chain, so nothing is.
                assert!(self.before == self.after || self.muddled.get(), "a vring is given up with a word");
                self.taken.remove(&tag);
            } else if usize::from(self.vring.tags_in_use()) < self.taken.len() {
                self.completes(tag);
            }
        }
        result
    }

    fn completes(&mut self, tag: u16) {
        let Some(taken) = self.taken.remove(&tag) else { return };
        let place = self.first.wrapping_add(self.completed) % self.at.size;
        self.completed = self.completed.wrapping_add(1);
        if self.muddled.get() {
            return;
        }
        let element = self.at.used + 4 + 8 * u64::from(place);
        let word = |at| self.guest.read_obj::<u32>(GuestAddress(at)).unwrap();
        let (head, written) = (word(element), word(element + 4));
        assert!(taken.head.is_none_or(|taken| u32::from(taken) == head), "the completion of {head}");
        assert!(u64::from(written) <= taken.room, "{written} bytes written to {}", taken.room);
        assert!(written > 0, "a completion without a status");
        if taken.head.is_some()
            && let Some(last) = taken.places.iter().rfind(|place| !place.is_empty())
        {
            let status = self.guest.read_obj::<u8>(GuestAddress(last.end - 1)).unwrap();
            assert!(status <= 2, "status {status}");
        }
    }

    fn snapshot(&self, into: &mut Snapshot) {
        for ((at, len), bytes) in REGIONS.into_iter().zip(into) {
            bytes.resize(len, 0);
            self.guest.read_slice(bytes, GuestAddress(at)).unwrap();
        }
    }

    /// The head of the chain that the device would take now; `None` when it carries one out again, which it chooses.
    fn next_head(&self) -> Option<u16> {
        let again = usize::from(self.vring.in_flight()) > self.taken.len();
        let next = self.vring.next_avail() % self.at.size;
        (!again).then(|| self.u16_at(self.at.avail + 4 + 2 * u64::from(next)))
    }

    fn chain_at(&self, head: Option<u16>) -> Taken {
        let mut places = Places::new();
        match head {
            Some(head) => self.follow(head, &mut places),
            None => (0..self.at.size).for_each(|head| self.follow(head, &mut places)),
        }
        let room = places.iter().map(|place| place.end - place.start).sum();
        Taken { head, places, room }
    }

    /// Walks a chain as far as it goes, and notes what it has to write to.
    fn follow(&self, head: u16, places: &mut Places) {
        let (mut table, mut len, mut index) = (self.at.desc, self.at.size, head);
        let mut nested = false;
        for _ in 0..600 {
            if index >= len {
                return;
            }
            let mut bytes = [0; 16];
            let at = table.checked_add(16 * u64::from(index));
            let Some(Ok(())) = at.map(|at| self.guest.read_slice(&mut bytes, GuestAddress(at))) else {
                return;
            };
            let mut fields = Input(&bytes);
            let (addr, bytes, flags, next) = (fields.u64(), fields.u32(), fields.u16(), fields.u16());
            if flags & F_INDIRECT != 0 {
                if nested {
                    return;
                }
                (table, len, index, nested) = (addr, (bytes / 16).min(u16::MAX.into()) as u16, 0, true);
                continue;
            }
            if flags & F_WRITE != 0 {
                places.push(addr..addr.saturating_add(bytes.into()));
            }
            if flags & F_NEXT == 0 {
                return;
            }
            index = next;
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for slot in self.slots.drain(..) {
            self.tasks.remove(slot);
        }
    }
}

async fn serve(
    io: Io<Uring>,
    vring: Rc<Vring>,
    volume: Rc<VolumeChannel<Uring>>,
    tag: u16,
    parked: Rc<RefCell<VecDeque<u16>>>,
    delay: Rc<Cell<bool>>,
) {
    let mut state = <Vring as Source<Uring>>::State::default();
    while let Some(request) = vring.next(&io, tag, &mut state).await {
        if delay.get() {
            parked.borrow_mut().push_back(tag);
            io.park().await;
        }
        let result = submit(&volume, &io, &Flusher::default(), &request).await;
        Source::<Uring>::complete(&*vring, tag, &mut state, result);
    }
}

/// What an earlier device is said to have had in flight; `None` where that is refused.
fn notes(input: &mut Input) -> Option<Inflight> {
    let (queues, size) = (input.u16() % 4, input.u16() % 64);
    let (file, bytes) = Inflight::create(queues, size).ok()?;
    let count = usize::from(input.u8());
    let from = u64::from(input.u8());
    file.write_all_at(input.bytes(count.min((bytes.saturating_sub(from)) as usize)), from).ok()?;
    let (bytes, offset) = if input.flag() { (input.u64(), input.u64()) } else { (bytes, 0) };
    Inflight::open(file, bytes, offset, queues, size).ok()
}

/// Mostly inside the guest's memory, and often at an edge of it.
fn address(input: &mut Input) -> u64 {
    let (how, at) = (input.u8(), u64::from(input.u16()));
    match how & 3 {
        0 => at % END,
        1 => REGIONS[usize::from(how >> 2) % 3].0.wrapping_add(at).wrapping_sub(0x20),
        2 => BUFFERS + at % 0x5000 / 16 * 16,
        _ => input.u64(),
    }
}

fn length(input: &mut Input) -> u32 {
    match input.u8() {
        255 => input.u32(),
        254 => input.u16().into(),
        sectors @ 128.. => 512 * u32::from(sectors & 15),
        small => small.into(),
    }
}
