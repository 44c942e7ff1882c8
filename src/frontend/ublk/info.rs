//! What the driver knows of a device: `struct ublksrv_ctrl_dev_info` of `linux/ublk_cmd.h`.
//!
//! A device outlives its server, so a new server must be able to tell whose a device is. The driver keeps a number
//! for servers and does not look at it (`ublksrv_flags`): ours is a [`OwnerTag`] made from the volume's name and its
//! store, set when the device is added and there for as long as it is. What it was made from stands in the device's
//! [`Record`](super::record::Record).

#![forbid(unsafe_code)]

use libublk::sys;
use std::fs;
use std::path::PathBuf;

/// A device as the driver describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// N of `/dev/ublkbN`.
    pub id: u32,
    /// Hardware queues.
    pub queues: u16,
    /// Tags a queue.
    pub depth: u16,
    /// Bytes of the largest request.
    pub max_io: u32,
    /// Where it is in its life.
    pub state: State,
    /// The process that serves it, or did; `None` where the kernel does not know one that is alive.
    pub server: Option<u32>,
    /// `UBLK_F_*`.
    pub flags: u64,
    /// Whose it is.
    pub owner_tag: OwnerTag,
}

/// `UBLK_S_DEV_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// There is no disk: not yet, or not any more.
    Dead,
    /// Served, as far as the kernel has noticed.
    Live,
    /// Its server is gone, and requests wait for the next.
    Quiesced,
    /// Its server is gone, and requests fail.
    FailIo,
    /// Of a newer kernel.
    Unknown(u16),
}

/// Says that a device is ours, and which volume's and store's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnerTag(u64);

/// The upper 24 bits of every tag of ours.
const OURS: u64 = 0x72_62_6b;

/// Bits of the hash below them.
const HASH: u32 = 40;

impl OwnerTag {
    /// For the volume of that name on that store: `rbk`, and a hash (FNV-1a, folded) of both.
    pub fn of(volume: &str, store: &str) -> OwnerTag {
        let add = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        // No name has a byte 0.
        let hash = volume.bytes().chain([0]).chain(store.bytes()).fold(0xcbf2_9ce4_8422_2325, add);
        OwnerTag(OURS << HASH | (hash ^ hash >> HASH) & ((1 << HASH) - 1))
    }

    /// Whether a ringblk made it, for whatever volume.
    pub fn is_ours(self) -> bool {
        self.0 >> HASH == OURS
    }
}

impl Info {
    /// Bytes of the struct.
    pub(super) const LEN: usize = size_of::<sys::ublksrv_ctrl_dev_info>();

    /// As the kernel reads it.
    pub(super) fn bytes(&self) -> Box<[u8]> {
        let mut bytes = vec![0; Info::LEN];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &self.queues.to_ne_bytes());
        put(2, &self.depth.to_ne_bytes());
        put(8, &self.max_io.to_ne_bytes());
        put(12, &self.id.to_ne_bytes());
        put(16, &self.server.unwrap_or(0).to_ne_bytes());
        put(24, &self.flags.to_ne_bytes());
        put(32, &self.owner_tag.0.to_ne_bytes());
        bytes.into()
    }

    /// What the kernel wrote; `None` for too few bytes.
    pub(super) fn read(bytes: &[u8]) -> Option<Info> {
        let half = |at: usize| Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        let word = |at: usize| Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        let long = |at: usize| Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        let state = match half(4)? {
            state if u32::from(state) == sys::UBLK_S_DEV_DEAD => State::Dead,
            state if u32::from(state) == sys::UBLK_S_DEV_LIVE => State::Live,
            state if u32::from(state) == sys::UBLK_S_DEV_QUIESCED => State::Quiesced,
            state if u32::from(state) == sys::UBLK_S_DEV_FAIL_IO => State::FailIo,
            state => State::Unknown(state),
        };
        Some(Info {
            queues: half(0)?,
            depth: half(2)?,
            state,
            max_io: word(8)?,
            id: word(12)?,
            // A signed number: -1, or 0 before there was one.
            server: word(16).filter(|pid| (1..=i32::MAX as u32).contains(pid)),
            flags: long(24)?,
            owner_tag: OwnerTag(long(32)?),
        })
    }

    /// Whether the kernel granted `flag`, a `UBLK_F_*`.
    pub fn has(&self, flag: u32) -> bool {
        self.flags & u64::from(flag) != 0
    }

    /// `/dev/ublkbN`.
    pub fn path(&self) -> PathBuf {
        path(self.id)
    }

    /// Who has it just now. Only the kernel knows for sure, and says so when a recovery is tried; this is for
    /// choosing what to try.
    pub fn ownership(&self) -> Ownership {
        self.ownership_with(self.server.is_some_and(lives))
    }

    fn ownership_with(&self, server_lives: bool) -> Ownership {
        match (self.state, self.server) {
            (State::Live | State::Unknown(_), Some(server)) if server_lives => Ownership::Served(server),
            (State::Live | State::Unknown(_), _) => Ownership::Exiting,
            (State::Quiesced | State::FailIo, _) => Ownership::Waiting,
            (State::Dead, _) => Ownership::Stale,
        }
    }
}

/// Who has a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ownership {
    /// A process that lives.
    Served(u32),
    /// Its server is dead, and the kernel has not cleared up behind it yet.
    Exiting,
    /// Nobody: it waits for a server.
    Waiting,
    /// Nobody, and there is no disk: it was never started, or stopped and not deleted.
    Stale,
}

/// `/dev/ublkbN`.
pub(super) fn path(id: u32) -> PathBuf {
    format!("/dev/ublkb{id}").into()
}

/// Whether a process is there and not just waiting to be reaped.
fn lives(pid: u32) -> bool {
    // The state is behind the name, which is in parentheses and may hold anything.
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        !matches!(state, None | Some('Z' | 'X'))
    })
}

const _: () = {
    use std::mem::offset_of;
    type Kernel = sys::ublksrv_ctrl_dev_info;
    assert!(Info::LEN == 64);
    assert!(offset_of!(Kernel, nr_hw_queues) == 0 && offset_of!(Kernel, queue_depth) == 2);
    assert!(offset_of!(Kernel, state) == 4 && offset_of!(Kernel, max_io_buf_bytes) == 8);
    assert!(offset_of!(Kernel, dev_id) == 12 && offset_of!(Kernel, ublksrv_pid) == 16);
    assert!(offset_of!(Kernel, flags) == 24 && offset_of!(Kernel, ublksrv_flags) == 32);
};

/// A device in the middle of its life, for tests.
#[cfg(test)]
pub(super) fn sample() -> Info {
    Info {
        id: 3,
        queues: 2,
        depth: 128,
        max_io: 512 << 10,
        state: State::Quiesced,
        server: Some(42),
        flags: 0,
        owner_tag: OwnerTag::of("root", "null"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_survives_the_way_to_the_kernel_and_back() {
        let mut bytes = Info { flags: 1 << 40 | 8, ..sample() }.bytes();
        bytes[4] = 2;
        assert_eq!(Info::read(&bytes), Some(Info { flags: 1 << 40 | 8, ..sample() }));
        bytes[16..20].fill(0xff);
        assert_eq!(Info::read(&bytes).unwrap().server, None, "-1 is nobody");
        bytes[4] = 9;
        assert_eq!(Info::read(&bytes).unwrap().state, State::Unknown(9));
        assert_eq!(Info::read(&bytes[..39]), None);
    }

    #[test]
    fn marks_tell_volumes_apart_and_others_from_us() {
        let root = OwnerTag::of("root", "null");
        assert_eq!(root, OwnerTag::of("root", "null"));
        assert_ne!(root, OwnerTag::of("root2", "null"));
        assert_ne!(root, OwnerTag::of("root", "nbd x"));
        // Their names alone have the same hash in 32 bits.
        assert_ne!(OwnerTag::of("costarring", "null"), OwnerTag::of("liquid", "null"));
        assert!(OwnerTag::of("", "").is_ours());
        for other in [0, 1, u64::MAX, root.0 << 1] {
            assert!(!OwnerTag(other).is_ours(), "{other:x}");
        }
    }

    #[test]
    fn only_what_nobody_serves_may_be_recovered() {
        let ownership = |state, server, lives| Info { state, server, ..sample() }.ownership_with(lives);
        assert_eq!(ownership(State::Live, Some(42), true), Ownership::Served(42));
        assert_eq!(ownership(State::Live, Some(42), false), Ownership::Exiting);
        assert_eq!(ownership(State::Live, None, false), Ownership::Exiting);
        // The number of a dead server may be somebody else's by now.
        assert_eq!(ownership(State::Quiesced, Some(42), true), Ownership::Waiting);
        assert_eq!(ownership(State::FailIo, None, false), Ownership::Waiting);
        assert_eq!(ownership(State::Dead, None, false), Ownership::Stale);
    }

    #[test]
    fn the_living_are_told_from_the_dead() {
        assert!(lives(std::process::id()));
        assert!(!lives(u32::MAX));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id();
        // Dead, and not reaped: that is no server.
        let dead = (0..500).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            !lives(pid)
        });
        child.wait().unwrap();
        assert!(dead && !lives(pid));
    }
}
