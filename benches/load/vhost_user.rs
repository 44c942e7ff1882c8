//! vhost-user-blk: a VMM's side of it.

use crate::driver::{Queue, fill};
use crate::{Args, Result, inflight};
use nix::poll::{PollFd, PollFlags};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue,
    VirtioBlkReqBuf, VirtioBlkTransport, VirtioFeatureFlags,
};

/// A vring; a request's context is its slot.
pub struct Ring {
    ring: VirtioBlkQueue<'static, usize>,
    notifier: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    /// A buffer of `len` bytes for each slot.
    buffers: *mut u8,
    len: usize,
}

/// The transport, which must outlive the rings, the rings, and the disk's bytes.
pub fn connect(path: &Path, args: &Args) -> Result<(Box<VirtioBlkTransport>, Vec<Ring>, u64)> {
    let mut mask = VirtioFeatureFlags::VERSION_1.bits()
        | VirtioBlkFeatureFlags::MQ.bits()
        | VirtioBlkFeatureFlags::FLUSH.bits()
        | VirtioBlkFeatureFlags::BLK_SIZE.bits();
    if !args.no_event_idx {
        mask |= VirtioFeatureFlags::RING_EVENT_IDX.bits();
    }
    let (len, depth) = (args.bs.bytes() as usize, usize::from(args.depth));
    // Three descriptors a request.
    let size = u16::try_from((3 * depth).next_power_of_two()).map_err(|_| "the depth is too large")?;
    let relay = if args.inflight { Some(inflight::relay(path, args.queues, size)?) } else { None };
    let path = relay.as_ref().map_or(path, |(_, path)| path).to_str().ok_or("the path is not UTF-8")?;
    let mut transport: Box<VirtioBlkTransport> =
        Box::new(VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(path, mask)?);
    let capacity = u64::from(transport.get_config()?.capacity) * 512;

    let rings = VirtioBlkQueue::<usize>::setup_queues(&mut *transport, usize::from(args.queues), size)?;
    let base = buffers(&mut *transport, rings.len() * depth * len)?;
    let rings = rings.into_iter().enumerate().map(|(index, mut ring)| {
        ring.set_used_notif_enabled(!args.poll);
        let (notifier, call) = (transport.get_submission_notifier(index), transport.get_completion_fd(index));
        Ring { ring, notifier, call, buffers: base.wrapping_add(index * depth * len), len }
    });
    let rings = rings.collect();
    Ok((transport, rings, capacity))
}

/// Memory for all buffers, shared with the server, and kept to the end.
fn buffers(transport: &mut VirtioBlkTransport, bytes: usize) -> Result<*mut u8> {
    let file = File::from(memfd_create(c"buffers", MFdFlags::MFD_CLOEXEC)?);
    file.set_len(bytes as u64)?;
    let size = NonZeroUsize::new(bytes).ok_or("no buffers")?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let base = unsafe { mmap(None, size, protection, flags, &file, 0)? };
    let base = base.as_ptr().cast::<u8>();
    // SAFETY: all of the mapping, which nobody else has yet.
    fill(unsafe { std::slice::from_raw_parts_mut(base, bytes) });
    transport.map_mem_region(base as usize, bytes, file.as_raw_fd(), 0)?;
    Ok(base)
}

impl Queue for Ring {
    fn submit(&mut self, write: bool, offset: u64, slot: usize) -> Result<()> {
        // SAFETY: `slot * len` is inside the ring's part of the buffers, which stay to the end of the process.
        unsafe {
            let buffer = self.buffers.add(slot * self.len);
            if write {
                self.ring.write_raw(offset, buffer, self.len, slot)?;
            } else {
                self.ring.read_raw(offset, buffer, self.len, slot)?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if self.ring.avail_notif_needed() {
            self.notifier.notify()?;
        }
        Ok(())
    }

    fn complete(&mut self, slots: &mut Vec<usize>) -> Result<()> {
        for completion in self.ring.completions() {
            if completion.ret != 0 {
                return Err(std::io::Error::from_raw_os_error(-completion.ret).into());
            }
            slots.push(completion.context);
        }
        Ok(())
    }

    fn wanted(&self) -> PollFd<'_> {
        PollFd::new(self.call.as_fd(), PollFlags::POLLIN)
    }

    fn woken(&mut self) -> Result<()> {
        self.call.read()?;
        Ok(())
    }

    /// The socket closes with the transport, as when a VMM ends.
    fn close(self) -> Result<()> {
        Ok(())
    }
}
