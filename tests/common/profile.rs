//! The VMMs that we know, as data: what each says and in which order, what it takes, and what it does when the service
//! goes away. From their sources: QEMU 10.0 (`hw/block/vhost-user-blk.c`, `hw/virtio/vhost{,-user}.c`), Cloud Hypervisor
//! 54 (`virtio-devices/src/vhost_user`), Firecracker 1.17 (`devices/virtio/{vhost_user.rs,block/vhost_user}`), crosvm of
//! 2026-08 (`devices/src/virtio/vhost_user_frontend`), virtio-drivers 0.13 (a driver, below QEMU).
//!
//! [`super::player`] plays them.

use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_GEOMETRY, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// A step of a handshake.
#[derive(Clone, Copy, Debug)]
pub enum Say {
    /// SET_OWNER
    Owner,
    /// GET_FEATURES
    AskFeatures,
    /// GET_PROTOCOL_FEATURES
    AskProtocol,
    /// SET_PROTOCOL_FEATURES, what it takes of them
    Protocol,
    /// GET_QUEUE_NUM
    AskQueues,
    /// GET_MAX_MEM_SLOTS
    AskSlots,
    /// SET_BACKEND_REQ_FD
    Channel,
    /// GET_CONFIG
    AskConfig,
    /// SET_FEATURES: those that the driver accepted
    Features,
    /// The same without the upper half, which the driver accepts last
    LowFeatures,
    /// SET_MEM_TABLE
    Table,
    /// ADD_MEM_REG for each region
    Regions,
    /// GET_INFLIGHT_FD unless it has one, SET_INFLIGHT_FD
    Inflight,
    /// For each queue, all of these
    Each(&'static [Say]),
    /// SET_VRING_NUM
    Num,
    /// SET_VRING_BASE
    Base,
    /// SET_VRING_ADDR
    Addr,
    /// SET_VRING_ERR
    Err,
    /// SET_VRING_KICK
    Kick,
    /// SET_VRING_CALL with a descriptor that nobody listens to
    MaskedCall,
    /// SET_VRING_CALL
    Call,
    /// SET_VRING_ENABLE, on
    Enable,
}

/// Which messages it wants acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acks {
    Never,
    /// Those about memory.
    Memory,
    Always,
}

/// Where it has a queue go on after a reconnect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// At the used index, as the ring has it.
    Used,
    /// At the available index: what was in flight is left to the notes.
    Avail,
}

/// How the guest learns of a new size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resize {
    /// By a message of ours.
    Told,
    /// When somebody has the VMM look.
    Asks,
    Never,
}

/// A VMM and its guest's driver.
#[derive(Debug)]
pub struct Profile {
    pub name: &'static str,
    /// Virtio features that it lets the driver have.
    pub features: u64,
    pub protocol: Protocol,
    pub acks: Acks,
    /// As it starts.
    pub connect: &'static [Say],
    /// As it comes back to a service that went away. `None` for one that does not.
    pub again: Option<&'static [Say]>,
    /// When the driver is ready, each time.
    pub start: &'static [Say],
    /// Offset and length of its GET_CONFIG.
    pub config: (u32, u32),
    pub base: Base,
    pub resize: Resize,
    /// A kick is in the descriptor when it starts, each time.
    pub kicks: bool,
    /// Its event descriptors are such that reading and writing may wait.
    pub blocking: bool,
    /// The most queues.
    pub queues: usize,
    /// Descriptors in each.
    pub size: u16,
    /// More than one data segment in a request.
    pub segments: bool,
    /// The driver looks at the used ring and does not wait for a call.
    pub polls: bool,
}

impl Profile {
    /// Whether the driver may have this feature, by its number.
    pub fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }
}

const fn bits(list: &[u32]) -> u64 {
    let (mut all, mut at) = (0, 0);
    while at < list.len() {
        all |= 1 << list[at];
        at += 1;
    }
    all
}

/// What a disk may have, and both vring features.
const EVERYTHING: u64 = bits(&[
    VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_GEOMETRY,
    VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_BLK_SIZE,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_CONFIG_WCE,
    VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_F_VERSION_1,
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTIO_RING_F_EVENT_IDX,
]);

const QEMU_CONNECT: &[Say] = &[
    Say::AskFeatures,
    Say::AskProtocol,
    Say::Protocol,
    Say::AskQueues,
    Say::AskSlots,
    Say::Channel,
    Say::Owner,
    Say::AskFeatures,
    Say::Each(&[Say::MaskedCall, Say::Err]),
    Say::AskConfig,
];

const QEMU_START: &[Say] = &[
    Say::Features,
    Say::Inflight,
    Say::Features,
    Say::Regions,
    Say::Each(&[Say::Num, Say::Base, Say::Addr, Say::Kick]),
    Say::Each(&[Say::Enable]),
    Say::Each(&[Say::Call]),
];

/// QEMU 5.1 and later.
pub const QEMU: Profile = Profile {
    name: "qemu",
    features: EVERYTHING,
    protocol: Protocol::MQ
        .union(Protocol::REPLY_ACK)
        .union(Protocol::BACKEND_REQ)
        .union(Protocol::CONFIG)
        .union(Protocol::INFLIGHT_SHMFD)
        .union(Protocol::CONFIGURE_MEM_SLOTS),
    acks: Acks::Memory,
    connect: QEMU_CONNECT,
    again: Some(QEMU_CONNECT.split_at(QEMU_CONNECT.len() - 1).0),
    start: QEMU_START,
    config: (0, 60),
    base: Base::Used,
    resize: Resize::Told,
    kicks: true,
    blocking: false,
    queues: 2,
    size: 128,
    segments: true,
    polls: false,
};

/// QEMU before 4.2: one memory table, no notes.
pub const QEMU_OLD: Profile = Profile {
    name: "qemu-4.1",
    protocol: Protocol::MQ.union(Protocol::REPLY_ACK).union(Protocol::BACKEND_REQ).union(Protocol::CONFIG),
    connect: &[
        Say::AskFeatures,
        Say::AskProtocol,
        Say::Protocol,
        Say::AskQueues,
        Say::Channel,
        Say::Owner,
        Say::AskFeatures,
        Say::Each(&[Say::MaskedCall]),
        Say::AskConfig,
    ],
    again: Some(&[
        Say::AskFeatures,
        Say::AskProtocol,
        Say::Protocol,
        Say::AskQueues,
        Say::Channel,
        Say::Owner,
        Say::AskFeatures,
        Say::Each(&[Say::MaskedCall]),
    ]),
    start: &[
        Say::Features,
        Say::Table,
        Say::Each(&[Say::Num, Say::Base, Say::Addr, Say::Kick]),
        Say::Each(&[Say::Enable]),
        Say::Each(&[Say::Call]),
    ],
    ..QEMU
};

/// Cloud Hypervisor from 51 on.
pub const CLOUD_HYPERVISOR: Profile = Profile {
    name: "cloud-hypervisor",
    features: EVERYTHING,
    protocol: Protocol::MQ
        .union(Protocol::REPLY_ACK)
        .union(Protocol::CONFIG)
        .union(Protocol::INFLIGHT_SHMFD)
        .union(Protocol::CONFIGURE_MEM_SLOTS),
    acks: Acks::Always,
    connect: &[Say::Owner, Say::AskFeatures, Say::AskProtocol, Say::Protocol, Say::AskQueues, Say::AskConfig],
    again: Some(&[Say::Owner, Say::AskFeatures, Say::Protocol]),
    start: &[
        Say::Features,
        Say::Table,
        Say::Each(&[Say::Num]),
        Say::Inflight,
        Say::Each(&[Say::Addr, Say::Base, Say::Call, Say::Kick]),
        Say::Each(&[Say::Enable]),
    ],
    config: (0, 60),
    base: Base::Avail,
    resize: Resize::Never,
    kicks: false,
    blocking: false,
    queues: 2,
    size: 128,
    segments: true,
    polls: false,
};

/// Cloud Hypervisor up to 50: it looks for the configuration where the vhost crate of the time had it begin.
pub const CLOUD_HYPERVISOR_OLD: Profile =
    Profile { name: "cloud-hypervisor-50", config: (0x100, 60), ..CLOUD_HYPERVISOR };

/// Firecracker.
pub const FIRECRACKER: Profile = Profile {
    name: "firecracker",
    features: bits(&[VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_FLUSH]),
    protocol: Protocol::CONFIG,
    acks: Acks::Never,
    connect: &[Say::Owner, Say::AskFeatures, Say::AskProtocol, Say::Protocol, Say::AskConfig],
    again: None,
    start: &[
        Say::Features,
        Say::Table,
        Say::Each(&[Say::Num]),
        Say::Each(&[Say::Addr, Say::Base, Say::Call, Say::Kick, Say::Enable]),
    ],
    config: (0, 60),
    base: Base::Avail,
    resize: Resize::Asks,
    kicks: false,
    blocking: false,
    queues: 1,
    size: 256,
    segments: false,
    polls: false,
};

/// crosvm.
pub const CROSVM: Profile = Profile {
    name: "crosvm",
    // Its devices have EVENT_IDX, and not INDIRECT_DESC.
    features: EVERYTHING & !(1 << VIRTIO_RING_F_INDIRECT_DESC),
    // It takes REPLY_ACK and asks for none.
    protocol: Protocol::MQ.union(Protocol::REPLY_ACK).union(Protocol::BACKEND_REQ).union(Protocol::CONFIG),
    acks: Acks::Never,
    connect: &[
        Say::Owner,
        Say::AskFeatures,
        Say::AskProtocol,
        Say::Protocol,
        Say::Channel,
        Say::AskQueues,
        Say::AskConfig,
    ],
    again: None,
    start: &[
        Say::LowFeatures,
        Say::Features,
        Say::Table,
        Say::Each(&[Say::Num, Say::Addr, Say::Base, Say::Call, Say::Kick, Say::Enable]),
    ],
    config: (0, 8),
    base: Base::Used,
    resize: Resize::Told,
    kicks: false,
    blocking: true,
    queues: 2,
    size: 256,
    segments: true,
    polls: false,
};

/// The driver of rcore's virtio-drivers, below QEMU.
pub const VIRTIO_DRIVERS: Profile = Profile {
    name: "virtio-drivers",
    features: bits(&[
        VIRTIO_BLK_F_RO,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
    ]),
    queues: 1,
    size: 16,
    segments: false,
    polls: true,
    ..QEMU
};

/// All of them.
pub const PROFILES: [&Profile; 7] =
    [&QEMU, &CLOUD_HYPERVISOR, &FIRECRACKER, &CROSVM, &VIRTIO_DRIVERS, &CLOUD_HYPERVISOR_OLD, &QEMU_OLD];
