//! The hostile VMM and its guest: what each deed does.

use super::super::Input;
use super::messages::{Wire, code};
use super::world::{Ended, MEMORY, SHAPE, World};
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::thread;

/// Bytes of each of its memory files at first.
pub(super) const FILE: u64 = 0x10000;
/// Where its memory usually begins.
pub(super) const BASE: u64 = 0x10000;
/// The VMM's own address of guest address 0.
const USER: u64 = 0x7f00_0000_0000;
/// From one vring's things to the next's.
const STRIDE: u64 = 0x4000;
/// Of those: the vring itself is at 0.
pub(super) const AVAIL: u64 = 0x400;
pub(super) const USED: u64 = 0x800;

/// A part of a file as guest memory.
#[derive(Clone, Copy)]
struct Region {
    gpa: u64,
    len: u64,
    file: usize,
    offset: u64,
}

impl Region {
    /// It shows one file at one place, where no other does.
    fn is_sound(&self) -> bool {
        (self.gpa, self.len, self.offset) == (BASE + self.file as u64 * 0x20000, FILE, 0)
    }
}

/// A vring as its driver has it.
#[derive(Clone)]
pub(super) struct Ring {
    pub at: u64,
    pub size: u16,
    pub used: u16,
    /// Requests that were made properly and have no answer: head to status byte.
    pub proper: HashMap<u16, u64>,
    /// Those have tables of their own.
    pub indirect: bool,
}

/// See the module.
pub(super) struct Guest<'a> {
    world: &'a World,
    wire: Option<Wire>,
    ended: Ended,
    files: [File; 2],
    pub events: [EventFd; 4],
    notes: Option<File>,
    notes_len: u64,
    regions: Vec<Region>,
    pub rings: [Ring; 2],
    /// The guest or its VMM did something after which nothing can be said about statuses.
    pub muddled: bool,
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn pair(first: u32, second: u32) -> Vec<u8> {
    [first.to_le_bytes(), second.to_le_bytes()].concat()
}

impl<'a> Guest<'a> {
    /// Connected, and nothing said.
    pub fn new(world: &'a World) -> Guest<'a> {
        let name = CString::new(MEMORY).unwrap();
        let file = || {
            let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
            let file = File::from(memfd_create(&*name, flags).unwrap());
            file.set_len(FILE).unwrap();
            file
        };
        let event = |flags| EventFd::from_flags(EfdFlags::EFD_CLOEXEC | flags).unwrap();
        let (quiet, blocking) = (EfdFlags::EFD_NONBLOCK, EfdFlags::empty());
        let semaphore = EfdFlags::EFD_SEMAPHORE | EfdFlags::EFD_NONBLOCK;
        let (socket, ended) = world.session();
        let ring = |index: u64| Ring {
            at: BASE + index * STRIDE,
            size: 16,
            used: 0,
            proper: HashMap::new(),
            indirect: false,
        };
        Guest {
            world,
            wire: Some(Wire::new(socket)),
            ended,
            files: [file(), file()],
            events: [event(quiet), event(quiet), event(blocking), event(semaphore)],
            notes: None,
            notes_len: 0,
            regions: Vec::new(),
            rings: [ring(0), ring(1)],
            muddled: false,
        }
    }

    fn wire(&mut self) -> Option<&mut Wire> {
        self.wire.as_mut().filter(|wire| !wire.over)
    }

    /// Says something and waits until it is dealt with.
    fn tell(&mut self, request: u32, body: &[u8], files: &[RawFd]) {
        if let Some(wire) = self.wire() {
            wire.tell(request, body, files);
        }
    }

    /// The beginning, as VMMs have it, with the features that the input wants.
    pub fn greet(&mut self, input: &mut Input) {
        let (protocol, wanted) = (u64::from(input.u16()), input.u16());
        self.tell(code::SET_OWNER, &[], &[]);
        let answer = self.wire().and_then(|wire| wire.tell(code::GET_FEATURES, &[], &[]));
        let Some((offered, _)) = answer else { return };
        let offered = offered.first_chunk().map_or(0, |bits| u64::from_le_bytes(*bits));
        // Mostly with acknowledgements, without which nothing is known of when a message is done.
        let bits = if wanted & 1 == 0 { protocol | 1 << 3 } else { protocol } & 0x9209 | 1 << 9;
        self.tell(code::SET_PROTOCOL_FEATURES, &words(&[bits]), &[]);
        let all = [9, 11, 13, 14, 28, 29, 12, 6];
        let taken = all.iter().enumerate().filter(|(place, _)| wanted >> (place + 1) & 1 != 0);
        let features = taken.fold(1 << 32 | 1 << 30, |all: u64, (_, bit)| all | 1 << bit);
        self.tell(code::SET_FEATURES, &words(&[features & offered]), &[]);
    }

    /// A region, mostly a sound one.
    fn region(&self, input: &mut Input) -> Region {
        let shape = input.u8();
        let file = usize::from(shape & 1);
        let sound = Region { gpa: BASE + file as u64 * 0x20000, len: FILE, file, offset: 0 };
        let odd = |input: &mut Input| {
            let value = input.u16();
            let pages = u64::from(value & 0xff) << 12;
            pages + u64::from(value >> 8)
        };
        match shape >> 1 & 7 {
            0..=2 => sound,
            3 => Region { len: odd(input), ..sound },
            4 => Region { gpa: odd(input), ..sound },
            5 => Region { gpa: odd(input), len: odd(input), offset: odd(input), file },
            6 => Region { gpa: BASE + 0x8000, len: 0x8000, offset: 0x8000, ..sound },
            _ => Region { gpa: input.u64(), ..sound },
        }
    }

    fn packed(region: &Region) -> Vec<u8> {
        words(&[region.gpa, region.len, USER.wrapping_add(region.gpa), region.offset])
    }

    /// SET_MEM_TABLE.
    pub fn show_memory(&mut self, input: &mut Input) {
        let count = 1 + usize::from(input.u8() & 3);
        let table: Vec<Region> = (0..count).map(|_| self.region(input)).collect();
        let mut body = words(&[count as u64]);
        table.iter().for_each(|region| body.extend(Guest::packed(region)));
        let files: Vec<RawFd> = table.iter().map(|region| self.files[region.file].as_raw_fd()).collect();
        // Requests of the old table may be anywhere.
        self.forget_requests();
        self.muddled |= !table.iter().all(Region::is_sound);
        self.regions = table;
        self.tell(code::SET_MEM_TABLE, &body, &files);
    }

    /// ADD_MEM_REG, REM_MEM_REG.
    pub fn change_memory(&mut self, input: &mut Input) {
        self.forget_requests();
        if input.flag() {
            let region = self.region(input);
            let file = self.files[region.file].as_raw_fd();
            self.muddled |= !region.is_sound();
            self.regions.push(region);
            self.tell(code::ADD_MEM_REG, &[words(&[0]), Guest::packed(&region)].concat(), &[file]);
        } else if !self.regions.is_empty() {
            let region = self.regions.swap_remove(usize::from(input.u8()) % self.regions.len());
            self.tell(code::REM_MEM_REG, &[words(&[0]), Guest::packed(&region)].concat(), &[]);
        }
    }

    /// What comes of requests from now on may be that of others. Those that are under way are waited for, in vain or not.
    fn forget_requests(&mut self) {
        if !self.settle(20) {
            self.muddled = true;
        }
        self.rings.iter_mut().for_each(|ring| ring.proper.clear());
    }

    /// Where a guest address is in which file.
    pub fn place(&self, gpa: u64) -> Option<(usize, u64)> {
        let region = self.regions.iter().find(|region| gpa.wrapping_sub(region.gpa) < region.len)?;
        Some((region.file, region.offset.wrapping_add(gpa.wrapping_sub(region.gpa))))
    }

    /// Writes to guest memory; what is not there, or far beyond the file's first end, is not written.
    pub fn put(&self, gpa: u64, bytes: &[u8]) {
        if let Some((file, at)) = self.place(gpa)
            && at < 4 * FILE
        {
            let _ = self.files[file].write_all_at(bytes, at);
        }
    }

    pub fn get<const N: usize>(&self, gpa: u64) -> Option<[u8; N]> {
        let (file, at) = self.place(gpa)?;
        let mut bytes = [0; N];
        self.files[file].read_exact_at(&mut bytes, at).ok()?;
        Some(bytes)
    }

    /// A whole set-up of a vring: mostly sound, in one of the orders that VMMs have.
    pub fn start_vring(&mut self, input: &mut Input) {
        let (shape, odd) = (input.u8(), input.u8());
        let index = usize::from(shape & 1);
        let size = [16, 16, 8, 64, 1, 2, 32, 4][usize::from(shape >> 1 & 7)];
        self.forget_requests();
        let ring = &mut self.rings[index];
        (ring.at, ring.size) = (BASE + index as u64 * STRIDE, size);
        if odd & 1 != 0 {
            ring.at = address(input);
        }
        let at = ring.at;
        let avail = self.get(at.wrapping_add(AVAIL + 2)).map_or(0, u16::from_le_bytes);
        let used = self.get(at.wrapping_add(USED + 2)).map(u16::from_le_bytes);
        // What it will find there when there is memory, it does not know.
        self.muddled |= used.is_none();
        let used = used.unwrap_or(0);
        self.rings[index].used = used;
        let base = if shape & 16 != 0 { avail } else { used };
        let kick = shape & 32 != 0;
        let queue = index as u32;
        self.tell(code::SET_VRING_NUM, &pair(queue, size.into()), &[]);
        self.tell(code::SET_VRING_BASE, &pair(queue, base.into()), &[]);
        self.tell_addresses(index, at);
        if kick {
            self.tell_event(code::SET_VRING_KICK, queue, 0);
            self.tell_event(code::SET_VRING_CALL, queue, 1);
        } else {
            self.tell_event(code::SET_VRING_CALL, queue, 1);
            self.tell_event(code::SET_VRING_KICK, queue, 0);
        }
        self.tell(code::SET_VRING_ENABLE, &pair(queue, u32::from(odd & 2 == 0)), &[]);
    }

    fn tell_addresses(&mut self, index: usize, at: u64) {
        let user = USER.wrapping_add(at);
        let addresses = [user, user.wrapping_add(USED), user.wrapping_add(AVAIL), 0];
        let body = [pair(index as u32, 0), words(&addresses)].concat();
        self.tell(code::SET_VRING_ADDR, &body, &[]);
    }

    fn tell_event(&mut self, request: u32, queue: u32, event: usize) {
        let file = self.events[event].as_raw_fd();
        self.tell(request, &words(&[queue.into()]), &[file]);
    }

    /// One change of one vring, sound or not.
    pub fn change_vring(&mut self, input: &mut Input) {
        let (what, queue, value) = (input.u8(), u32::from(input.u8() % 3), input.u16());
        let descriptor = usize::from(value & 3);
        self.forget_requests();
        match what % 9 {
            0 => self.tell(code::SET_VRING_NUM, &pair(queue, value.into()), &[]),
            1 => self.tell(code::SET_VRING_BASE, &pair(queue, value.into()), &[]),
            2 => {
                let at = address(input);
                let index = queue as usize % self.rings.len();
                self.rings[index].at = at;
                self.tell_addresses(index, at);
            }
            3 => self.tell_event(code::SET_VRING_KICK, queue, descriptor),
            4 => self.tell_event(code::SET_VRING_CALL, queue, descriptor),
            5 => self.tell_event(code::SET_VRING_ERR, queue, descriptor),
            // Without a descriptor.
            6 => {
                let request =
                    [code::SET_VRING_KICK, code::SET_VRING_CALL, code::SET_VRING_ERR][descriptor % 3];
                self.tell(request, &words(&[u64::from(queue) | 1 << 8]), &[]);
            }
            7 => self.tell(code::SET_VRING_ENABLE, &pair(queue, u32::from(value & 1)), &[]),
            _ => self.tell(code::GET_VRING_BASE, &pair(queue, 0), &[]),
        }
    }

    /// Any message, with descriptors of any kind.
    pub fn say_anything(&mut self, input: &mut Input) {
        let (request, shape) = (u32::from(input.u8() % 46), input.u8());
        let len = usize::from(input.u8());
        let body = input.bytes(len).to_vec();
        let files: Vec<File> = (0..shape & 3).filter_map(|_| self.descriptor(input)).collect();
        let files: Vec<RawFd> = files.iter().map(|file| file.as_raw_fd()).collect();
        self.muddled = true;
        let Some(wire) = self.wire() else { return };
        match shape >> 2 & 3 {
            // Half of it, and then nothing more.
            0 => {
                wire.send_bytes(&request.to_ne_bytes(), &files);
                wire.over = true;
            }
            1 => {
                wire.send(request, u32::from(input.u8()), &body, &files);
                // Whether that has an answer is hard to tell.
                wire.over = true;
            }
            _ => {
                wire.tell(request, &body, &files);
            }
        }
    }

    fn descriptor(&self, input: &mut Input) -> Option<File> {
        let same = |file: &File| file.try_clone().ok();
        match input.u8() % 9 {
            0 => same(&self.files[0]),
            1 => same(&self.files[1]),
            2 => File::open("/dev/null").ok(),
            3 => File::open("/proc/self").ok(),
            4 => self.notes.as_ref().and_then(same),
            // Read-only.
            5 => File::open(format!("/proc/self/fd/{}", self.files[0].as_raw_fd())).ok(),
            6 => nix::unistd::pipe().ok().map(|(read, _)| File::from(read)),
            7 => nix::unistd::pipe().ok().map(|(_, write)| File::from(write)),
            other => {
                let event = &self.events[usize::from(other) % self.events.len()];
                event.as_fd().try_clone_to_owned().ok().map(File::from)
            }
        }
    }

    /// GET_INFLIGHT_FD, what the guest's VMM does to the in-flight log, SET_INFLIGHT_FD.
    pub fn inflight(&mut self, input: &mut Input) {
        let (what, queues, size) = (input.u8(), u16::from(input.u8() % 4), 1u16 << (input.u8() % 8));
        self.forget_requests();
        let shape = |len: u64, offset: u64| {
            [words(&[len, offset]), queues.to_le_bytes().to_vec(), size.to_le_bytes().to_vec(), vec![0; 4]]
                .concat()
        };
        match what % 5 {
            0 | 1 => {
                let body = shape(0, 0);
                let answer = self.wire().and_then(|wire| wire.tell(code::GET_INFLIGHT_FD, &body, &[]));
                if let Some((body, Some(file))) = answer {
                    self.notes_len = body.first_chunk().map_or(0, |len| u64::from_le_bytes(*len));
                    self.notes = Some(file);
                }
            }
            2 => {
                // Written by somebody else than the service.
                let (at, count) = (u64::from(input.u8()), usize::from(input.u8() & 31));
                if let Some(notes) = &self.notes {
                    let _ = notes.write_all_at(input.bytes(count), at);
                }
            }
            3 => {
                let file = self.files[1].as_raw_fd();
                let body = shape(FILE, u64::from(input.u8()) << 12);
                self.tell(code::SET_INFLIGHT_FD, &body, &[file]);
            }
            _ => {
                let Some(file) = self.notes.as_ref().map(AsRawFd::as_raw_fd) else { return };
                let body = shape(self.notes_len, 0);
                self.tell(code::SET_INFLIGHT_FD, &body, &[file]);
            }
        }
    }

    /// GET_CONFIG, SET_CONFIG.
    pub fn configuration(&mut self, input: &mut Input) {
        let (what, offset, size) = (input.u8(), u32::from(input.u16()), usize::from(input.u8()));
        let (offset, size) = if what & 2 == 0 { (32, 1) } else { (offset, size) };
        let header: Vec<u8> = [offset, size as u32, 1].iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut body = input.bytes(size).to_vec();
        body.resize(size, 0);
        let request = if what & 1 == 0 { code::GET_CONFIG } else { code::SET_CONFIG };
        self.tell(request, &[header, body].concat(), &[]);
    }

    /// Truncates one of its files, makes it longer, or punches a hole.
    pub fn take_memory_away(&mut self, input: &mut Input) {
        let (what, pages) = (input.u8(), u64::from(input.u8() % 20) << 12);
        self.muddled = true;
        let file = &self.files[usize::from(what & 1)];
        if what & 2 == 0 {
            let _ = file.set_len(pages);
        } else {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let _ = fallocate(file, flags, pages as i64, 0x3000);
        }
    }

    /// Fills or empties a counter, or changes whether it blocks.
    pub fn abuse_event(&mut self, input: &mut Input) {
        let what = input.u8();
        let event = &self.events[usize::from(what & 3)];
        let quiet = fcntl(event, FcntlArg::F_GETFL).is_ok_and(|flags| flags & libc::O_NONBLOCK != 0);
        match what >> 2 & 3 {
            // We must not wait for it ourselves.
            0 if quiet => _ = event.write(u64::MAX - 1),
            1 if quiet => _ = event.read(),
            2 => _ = fcntl(event, FcntlArg::F_SETFL(OFlag::empty())),
            3 => _ = fcntl(event, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)),
            _ => {}
        }
    }

    /// The VMM dies, perhaps with a reset before.
    pub fn leave(&mut self, input: &mut Input) {
        if input.flag() {
            for queue in 0..u32::from(SHAPE.queues) {
                self.tell(code::GET_VRING_BASE, &pair(queue, 0), &[]);
            }
        }
        self.hang_up();
    }

    fn hang_up(&mut self) {
        self.wire = None;
        self.ended.wait();
        self.forget_requests();
    }

    /// And another begins, with the same memory and in-flight log.
    pub fn come_back(&mut self) {
        let (socket, ended) = self.world.session();
        (self.wire, self.ended) = (Some(Wire::new(socket)), ended);
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        if self.wire.is_some() && !thread::panicking() {
            self.hang_up();
        }
    }
}

/// Whether one can be added to a counter without a wait.
pub(super) fn writable(event: &EventFd) -> bool {
    poll(&mut [PollFd::new(event.as_fd(), PollFlags::POLLOUT)], PollTimeout::ZERO) == Ok(1)
}

/// A guest address, mostly one where there is something.
pub(super) fn address(input: &mut Input) -> u64 {
    let value = u64::from(input.u16());
    match input.u8() & 15 {
        0 => input.u64(),
        1 => BASE + FILE - (value & 0xff),
        2 | 3 => BASE + 0x20000 + value,
        _ => BASE + value,
    }
}
