//! A VMM that behaves, on the same worker: it writes and reads one block each time it is asked to.

use super::messages::{PATIENCE, Wire, code};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

const SIZE: u16 = 8;
const BYTES: u64 = 0x4000;
/// Where things are in its memory, which begins at guest address 0.
const DESC: u64 = 0;
const AVAIL: u64 = 0x400;
const USED: u64 = 0x800;
const HEADER: u64 = 0xc00;
const STATUS: u64 = 0xd00;
const DATA: u64 = 0x1000;
/// The VMM's own address of guest address 0.
const USER: u64 = 0x7e00_0000_0000;

/// See the module.
pub(super) struct Neighbour {
    /// Keeps the connection.
    wire: Wire,
    memory: File,
    kick: EventFd,
    _call: EventFd,
    offered: u16,
    count: u64,
}

impl Neighbour {
    /// Shakes hands, and starts one vring.
    pub fn new(socket: UnixStream) -> Neighbour {
        let memory = File::from(memfd_create(c"fuzz-neighbour", MFdFlags::MFD_CLOEXEC).unwrap());
        memory.set_len(BYTES).unwrap();
        let event = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap();
        let (kick, call) = (event(), event());
        let mut wire = Wire::new(socket);
        let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        let pair = |first: u32, second: u32| [first.to_le_bytes(), second.to_le_bytes()].concat();
        wire.tell(code::SET_OWNER, &[], &[]);
        wire.tell(code::GET_FEATURES, &[], &[]).unwrap();
        // REPLY_ACK; VERSION_1, and that there are protocol features.
        wire.tell(code::SET_PROTOCOL_FEATURES, &words(&[1 << 3]), &[]).unwrap();
        wire.tell(code::SET_FEATURES, &words(&[1 << 32 | 1 << 30]), &[]).unwrap();
        wire.tell(code::SET_MEM_TABLE, &words(&[1, 0, BYTES, USER, 0]), &[memory.as_raw_fd()]).unwrap();
        wire.tell(code::SET_VRING_NUM, &pair(0, SIZE.into()), &[]).unwrap();
        wire.tell(code::SET_VRING_BASE, &pair(0, 0), &[]).unwrap();
        wire.tell(code::SET_VRING_ADDR, &words(&[0, USER + DESC, USER + USED, USER + AVAIL, 0]), &[])
            .unwrap();
        wire.tell(code::SET_VRING_CALL, &words(&[0]), &[call.as_raw_fd()]).unwrap();
        wire.tell(code::SET_VRING_KICK, &words(&[0]), &[kick.as_raw_fd()]).unwrap();
        wire.tell(code::SET_VRING_ENABLE, &pair(0, 1), &[]).unwrap();
        Neighbour { wire, memory, kick, _call: call, offered: 0, count: 0 }
    }

    /// A block is written, and is there.
    pub fn work(&mut self) {
        assert!(!self.wire.over, "the neighbour was hung up on");
        self.count += 1;
        let block = [self.count.to_le_bytes(); 64].concat();
        self.put(DATA, &block);
        self.request(1, 0);
        self.put(DATA, &[0; 512]);
        self.request(0, 2);
        let mut found = vec![0; 512];
        self.memory.read_exact_at(&mut found, DATA).unwrap();
        assert_eq!(found, block, "the neighbour's block");
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, at).unwrap();
    }

    /// One request to sector 8 from start to end. `flag`: of the data's descriptor.
    fn request(&mut self, kind: u32, flag: u16) {
        self.put(HEADER, &[u64::from(kind).to_le_bytes(), 8u64.to_le_bytes()].concat());
        self.put(STATUS, &[0xaa]);
        let parts = [(HEADER, 16u32, 1u16, 1u16), (DATA, 512, 1 | flag, 2), (STATUS, 1, 2, 0)];
        for (place, (addr, len, flags, next)) in (0..).zip(parts) {
            let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
            self.put(DESC + 16 * place, &[addr.to_le_bytes(), rest.to_le_bytes()].concat());
        }
        self.put(AVAIL + 4 + 2 * u64::from(self.offered % SIZE), &[0, 0]);
        self.offered = self.offered.wrapping_add(1);
        self.put(AVAIL + 2, &self.offered.to_le_bytes());
        self.kick.write(1).unwrap();
        let began = Instant::now();
        loop {
            let mut idx = [0; 2];
            self.memory.read_exact_at(&mut idx, USED + 2).unwrap();
            if u16::from_le_bytes(idx) == self.offered {
                break;
            }
            assert!(began.elapsed() < PATIENCE, "the neighbour gets no answer");
            thread::sleep(Duration::from_micros(10));
        }
        let mut status = [0];
        self.memory.read_exact_at(&mut status, STATUS).unwrap();
        assert_eq!(status, [0], "the neighbour's request");
    }
}
