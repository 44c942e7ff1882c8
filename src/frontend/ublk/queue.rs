//! The data path: one hardware queue of a ublk device on a worker's ring.
//!
//! Each tag has one command in the kernel (a fetch) or one request with us, never both. A commit hands the
//! result back and fetches the next request in the same submission, so a request costs two submissions in
//! all: its own I/O, and this.
//!
//! The kernel wants a queue's commands from the thread that fetched first, which is the worker's.

use super::buffers::{self, BufferUse};
use super::descriptor::{Asked, Descriptor};
use super::quiesce_flag::QuiesceFlag;
use crate::block::{Data, Errno, Iovec, Request};
use crate::frontend::{self, LimitWait, Source};
use crate::ring::{Core, DriverCommand, Io, Mapping, Ring, Sqe, Target, Uring};
use libublk::sys;
use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::rc::Rc;
use std::sync::Arc;

/// What a worker needs to serve one queue of a device. Keeps the device's file open.
pub struct QueueSetup {
    pub(super) device: Arc<File>,
    /// Number of the queue, from 0.
    pub queue: u16,
    /// Tags.
    pub depth: u16,
    /// Bytes of the largest request.
    pub max_io: u32,
    /// The kernel puts each request's pages into the ring's buffer table (`UBLK_F_AUTO_BUF_REG`).
    pub zero_copy: bool,
    /// Writes are refused.
    pub read_only: bool,
    /// Another server may get the device after us.
    pub recoverable: bool,
    /// Stops the queue from taking requests.
    pub quiesce_flag: Arc<QuiesceFlag>,
    /// CPUs whose requests come to this queue.
    pub cpus: Vec<usize>,
    /// What the device's buffers take.
    pub memory: Arc<BufferUse>,
}

/// A queue being served. Dropped only when all its tags have ended, since the kernel copies into its memory
/// until then.
pub struct Queue {
    core: Rc<Core<Uring>>,
    file: Target,
    descriptors: Mapping,
    buffers: Buffers,
    queue: u16,
    depth: u16,
    max_io: u32,
    cpus: Vec<usize>,
    quiesce_flag: Arc<QuiesceFlag>,
    complained: Cell<bool>,
    /// Behind `file`, which is a number. Last, so that it is closed after everything else is gone.
    _device: Arc<File>,
}

/// Where the data of requests is.
enum Buffers {
    /// `max_io` bytes a tag; the kernel copies.
    Copied(buffers::Buffers),
    /// A place in the ring's buffer table a tag; nobody copies.
    Registered(Vec<u16>),
}

/// Where a tag is in its round.
#[derive(Debug)]
pub struct Tag {
    step: Step,
    /// What a copied request's [`Data::Iovecs`] borrows.
    iovec: [Iovec<'static>; 1],
}

impl Default for Tag {
    fn default() -> Tag {
        Tag { step: Step::Fresh, iovec: [Iovec::EMPTY] }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Nothing fetched yet.
    Fresh,
    /// The kernel has a command.
    Fetching,
    /// A request is with us; `full` is the result that says it was done.
    Lent { full: i32 },
    /// A result waits to be committed.
    Done(i32),
}

impl Queue {
    /// Gets the memory of a queue. Nothing is fetched before [`next`](Source::next).
    ///
    /// # Errors
    /// When the descriptors cannot be mapped, there is no address space for the buffers, (zero copy) the worker's
    /// buffer table has not `depth` places left, or (with recovery) its file table none.
    pub fn new(core: &Rc<Core<Uring>>, setup: QueueSetup) -> io::Result<Queue> {
        let QueueSetup {
            device,
            queue,
            depth,
            max_io,
            zero_copy,
            recoverable,
            quiesce_flag,
            cpus,
            memory,
            ..
        } = setup;
        let bytes = usize::from(depth) * size_of::<Descriptor>();
        let descriptors = Mapping::shared_read(device.as_fd(), area(queue, page_size()), bytes)?;
        let buffers = if zero_copy {
            let places = core.ring().reserve_buffers(depth.into()).ok_or_else(|| {
                io::Error::other(format!(
                    "zero copy needs {depth} places in the buffer table of its worker, which has fewer left: \
                     use more workers, a smaller depth, or zero-copy=off"
                ))
            })?;
            Buffers::Registered(places)
        } else {
            Buffers::Copied(buffers::Buffers::new(usize::from(depth) * max_io as usize, &memory)?)
        };
        let file = core.ring().register(device.as_raw_fd());
        // It is the file table that keeps the device ours until our last write to the store is over, whatever
        // becomes of us: see `recover`.
        if recoverable && matches!(file, Target::Fd(_)) {
            if let Buffers::Registered(places) = &buffers {
                core.ring().return_buffers(places);
            }
            return Err(io::Error::other(
                "recovery needs a place in the file table of its worker, which has none left: use more workers, or \
                 recovery=off",
            ));
        }
        Ok(Queue {
            core: core.clone(),
            file,
            descriptors,
            buffers,
            queue,
            depth,
            max_io,
            cpus,
            quiesce_flag,
            complained: Cell::new(false),
            _device: device,
        })
    }

    /// Copies the descriptor of `tag`, once.
    fn descriptor(&self, tag: u16) -> Descriptor {
        let area = self.descriptors.as_ptr().cast::<Descriptor>();
        assert!(tag < self.depth);
        // SAFETY: the mapping holds `depth` descriptors, and `tag` is one of them; it is page
        // aligned and a descriptor is 24 bytes of plain numbers. The kernel wrote it before the completion
        // that brought us here and writes it again only after the next commit; volatile, because that is
        // the kernel's promise and not the compiler's to rely on.
        unsafe { area.add(tag.into()).read_volatile() }
    }

    /// The data of a request, which fits: [`Asked::read`] checked it.
    fn data<'a>(&self, tag: u16, bytes: u32, iovec: &'a mut [Iovec<'static>; 1]) -> Data<'a> {
        match &self.buffers {
            _ if bytes == 0 => Data::None,
            Buffers::Registered(places) => Data::Registered { index: places[usize::from(tag)], skip: 0 },
            Buffers::Copied(memory) => {
                // SAFETY: the tag's own `max_io` bytes of the mapping, of which no reference is ever made. The
                // queue, and with it the mapping, outlives its slots' futures, where requests live; and the
                // kernel leaves the bytes alone until the commit.
                iovec[0] = unsafe { Iovec::new(self.buffer(memory, tag), bytes as usize) };
                Data::of(iovec)
            }
        }
    }

    fn buffer(&self, memory: &buffers::Buffers, tag: u16) -> *mut u8 {
        memory.as_ptr().wrapping_add(usize::from(tag) * self.max_io as usize)
    }

    /// Fetches, or commits `result` and fetches.
    fn command(&self, tag: u16, op: u32, result: i32) -> Sqe<'static> {
        let (buffer, addr) = match &self.buffers {
            Buffers::Copied(memory) => (self.buffer(memory, tag) as u64, 0),
            Buffers::Registered(places) => {
                let index = places[usize::from(tag)];
                let place = sys::ublk_auto_buf_reg { index, ..Default::default() };
                (0, sys::ublk_auto_buf_reg_to_sqe_addr(&place))
            }
        };
        // SAFETY: the tag's own buffer, as in `data`; or a place in the ring's buffer table, which is no address.
        let command = unsafe { DriverCommand::new(op, command(self.queue, tag, result, buffer), addr) };
        Sqe::Command { file: self.file, command }
    }
}

impl Source<Uring> for Queue {
    type State = Tag;

    async fn next<'a>(&'a self, io: &Io<Uring>, tag: u16, state: &'a mut Tag) -> Option<Request<'a>> {
        let asked = loop {
            let command = match state.step {
                Step::Fresh => self.command(tag, sys::UBLK_U_IO_FETCH_REQ, 0),
                Step::Done(result) => self.command(tag, sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ, result),
                broken => unreachable!("queue {} tag {tag}: next after {broken:?}", self.queue),
            };
            state.step = Step::Fetching;
            let result = io.submit(&command).await;
            if result != sys::UBLK_IO_RES_OK as i32 {
                self.ended(tag, result);
                return None;
            }
            match Asked::read(&self.descriptor(tag), self.max_io) {
                Ok(asked) => break asked,
                Err(errno) => state.step = Step::Done(-errno.raw()),
            }
        };
        if self.quiesce_flag.is_set() {
            // It stays ours, so the kernel gives it to the next server.
            std::future::pending::<()>().await;
        }
        state.step = Step::Lent { full: asked.bytes as i32 };
        let Asked { op, flags, sector, sectors, bytes } = asked;
        Some(Request { op, flags, sector, sectors, data: self.data(tag, bytes, &mut state.iovec) })
    }

    fn complete(&self, tag: u16, state: &mut Tag, result: Result<(), Errno>) {
        let Step::Lent { full } = state.step else {
            unreachable!("queue {} tag {tag}: complete after {:?}", self.queue, state.step)
        };
        state.step = Step::Done(result.map_or_else(|errno| -errno.raw(), |()| full));
    }

    fn limit_wait(&self) -> Option<LimitWait> {
        Some(self.quiesce_flag.limit_wait())
    }
}

impl frontend::Queue for Queue {
    fn label(&self) -> String {
        format!("ublk queue {}", self.queue)
    }

    /// Empty where the kernel did not say.
    fn cpus(&self) -> Option<&[usize]> {
        Some(&self.cpus)
    }

    fn delivered_tags(&self) -> u16 {
        self.depth
    }
}

impl Queue {
    /// Says why a tag ends, once a queue, unless it is the ordinary reason: the device was stopped.
    fn ended(&self, tag: u16, result: i32) {
        if result != sys::UBLK_IO_RES_ABORT && !self.complained.replace(true) {
            let error = Errno::new(result.saturating_neg());
            log::error!("ublk queue {} tag {tag}: the kernel refused a fetch: {error}", self.queue);
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.core.ring().release(self.file);
        if let Buffers::Registered(places) = &self.buffers {
            self.core.ring().return_buffers(places);
        }
    }
}

/// Where the descriptors of `queue` are in the device's file: each queue has whole pages, enough for the
/// deepest there can be.
fn area(queue: u16, page: usize) -> u64 {
    let each = sys::UBLK_MAX_QUEUE_DEPTH as usize * size_of::<Descriptor>();
    u64::from(sys::UBLKSRV_CMD_BUF_OFFSET) + u64::from(queue) * each.next_multiple_of(page) as u64
}

/// The kernel's page size in bytes.
fn page_size() -> usize {
    // SAFETY: it takes no pointer and changes nothing.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

/// `struct ublksrv_io_cmd` of `linux/ublk_cmd.h`.
pub fn command(queue: u16, tag: u16, result: i32, buffer: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0..2].copy_from_slice(&queue.to_ne_bytes());
    bytes[2..4].copy_from_slice(&tag.to_ne_bytes());
    bytes[4..8].copy_from_slice(&result.to_ne_bytes());
    bytes[8..16].copy_from_slice(&buffer.to_ne_bytes());
    bytes
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<sys::ublksrv_io_cmd>() == 16);
    assert!(offset_of!(sys::ublksrv_io_cmd, q_id) == 0 && offset_of!(sys::ublksrv_io_cmd, tag) == 2);
    assert!(offset_of!(sys::ublksrv_io_cmd, result) == 4 && offset_of!(sys::ublksrv_io_cmd, addr) == 8);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_do_not_overlap_on_any_page_size() {
        // 4096 descriptors of 24 bytes are 24 pages of 4 KiB, but one and a half of 64 KiB.
        assert_eq!((area(0, 4096), area(1, 4096), area(3, 4096)), (0, 98304, 3 * 98304));
        assert_eq!(area(1, 65536), 131072);
        assert!(page_size().is_power_of_two());
    }

    #[test]
    fn a_command_is_laid_out_as_the_kernel_reads_it() {
        let bytes = command(0x0102, 0x0304, -5, 0x1122_3344_5566_7788);
        let number = |range: std::ops::Range<usize>| {
            bytes[range].iter().rev().fold(0u64, |number, byte| number << 8 | u64::from(*byte))
        };
        if cfg!(target_endian = "little") {
            assert_eq!((number(0..2), number(2..4)), (0x0102, 0x0304));
            assert_eq!(number(4..8) as u32 as i32, -5);
            assert_eq!(number(8..16), 0x1122_3344_5566_7788);
        }
    }
}
