//! A VMM by the virtio-driver crate: what another project thinks a driver should do.

use super::memory::GuestMemory;
use super::model::{Op, Queue};
use super::{PATIENCE, readable};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue,
    VirtioBlkReqBuf, VirtioBlkTransport, VirtioFeatureFlags,
};

/// Bytes in a slot's buffer.
const BUFFER: usize = 64 << 10;

/// A connected VMM; its queues work as long as it lives, so each holds on to it.
#[derive(Clone)]
pub struct Client {
    transport: Arc<Mutex<Box<VirtioBlkTransport>>>,
}

/// A queue with its buffers.
pub struct ClientQueue {
    queue: VirtioBlkQueue<'static, usize>,
    notifier: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    memory: GuestMemory,
    slots: usize,
    /// The queue's memory is the transport's, so it goes last.
    _client: Client,
}

impl Client {
    /// Accepts everything that the crate knows of; EVENT_IDX if asked to.
    pub fn connect(socket: &Path, event_idx: bool) -> Client {
        let mut mask = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_INDIRECT_DESC.bits()
            | VirtioBlkFeatureFlags::all().bits();
        if event_idx {
            mask |= VirtioFeatureFlags::RING_EVENT_IDX.bits();
        }
        let transport =
            VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(socket.to_str().unwrap(), mask).unwrap();
        Client { transport: Arc::new(Mutex::new(Box::new(transport))) }
    }

    /// Features in force.
    pub fn features(&self) -> u64 {
        self.transport.lock().unwrap().get_features()
    }

    /// The configuration space.
    pub fn config(&self) -> VirtioBlkConfig {
        self.transport.lock().unwrap().get_config().unwrap()
    }

    /// Starts `count` queues of `size` descriptors, each with room for `slots` requests.
    pub fn queues(&self, count: usize, size: u16, slots: usize) -> Vec<ClientQueue> {
        let mut transport = self.transport.lock().unwrap();
        let queues = VirtioBlkQueue::setup_queues(&mut **transport, count, size).unwrap();
        let queues = queues.into_iter().enumerate().map(|(index, mut queue)| {
            // While the vrings run, so each addition is a memory change under them.
            let memory = GuestMemory::new(0, (slots * BUFFER) as u64);
            let at = memory.ptr(0, slots * BUFFER) as usize;
            transport.map_mem_region(at, slots * BUFFER, memory.fd(), 0).unwrap();
            queue.set_used_notif_enabled(true);
            ClientQueue {
                queue,
                notifier: transport.get_submission_notifier(index),
                call: transport.get_completion_fd(index),
                memory,
                slots,
                _client: self.clone(),
            }
        });
        queues.collect()
    }
}

impl Queue for ClientQueue {
    fn slots(&self) -> usize {
        self.slots
    }

    fn max_len(&self) -> usize {
        BUFFER
    }

    fn put(&mut self, slot: usize, bytes: &[u8]) {
        self.memory.write((slot * BUFFER) as u64, bytes);
    }

    fn get(&self, slot: usize, bytes: &mut [u8]) {
        self.memory.read((slot * BUFFER) as u64, bytes);
    }

    fn submit(&mut self, slot: usize, op: Op) {
        let buffer = self.memory.ptr((slot * BUFFER) as u64, BUFFER);
        let (at, len) = (|sector: u64| sector * 512, |sectors: u32| sectors as usize * 512);
        match op {
            Op::Read { sector, sectors } => {
                // SAFETY: the buffer lives as long as the queue, and nobody else uses the slot's.
                unsafe { self.queue.read_raw(at(sector), buffer, len(sectors), slot) }
            }
            Op::Write { sector, sectors } => {
                // SAFETY: as above.
                unsafe { self.queue.write_raw(at(sector), buffer, len(sectors), slot) }
            }
            Op::Flush => self.queue.flush(slot),
            Op::Discard { sector, sectors } => self.queue.discard(at(sector), len(sectors) as u64, slot),
            Op::WriteZeroes { sector, sectors, unmap } => {
                self.queue.write_zeroes(at(sector), len(sectors) as u64, unmap, slot)
            }
            Op::GetId => unimplemented!("the crate has no GET_ID"),
        }
        .unwrap();
    }

    fn kick(&mut self) {
        if self.queue.avail_notif_needed() {
            self.notifier.notify().unwrap();
        }
    }

    fn wait(&mut self) -> Vec<(usize, u8)> {
        loop {
            let done: Vec<(usize, u8)> = self
                .queue
                .completions()
                .map(|completion| {
                    let status = match -completion.ret {
                        0 => 0,
                        libc::EIO => 1,
                        libc::ENOTSUP => 2,
                        other => panic!("unknown status, errno {other}"),
                    };
                    (completion.context, status)
                })
                .collect();
            if !done.is_empty() {
                return done;
            }
            assert!(readable(self.call.as_fd(), PATIENCE), "requests never complete");
            self.call.read().unwrap();
        }
    }
}
