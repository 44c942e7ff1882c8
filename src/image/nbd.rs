//! An export of an NBD server as an end of a copy: the engine's own client, on a thread with a ring of its own.
//!
//! The copy's tasks send their orders through a channel, write to an eventfd that the thread's ring polls, and wait for the
//! answers. Bytes are copied once on the way, between a task's buffer and the memory that the ring works on.

#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Ready;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ImageError;
use crate::block::{Data, Errno, Flags, Format, Op, Request, SECTOR};
use crate::engine::config::VolumeConfig;
use crate::engine::{Flushers, OpenError, Volume, VolumeChannel, nbd, submit};
use crate::ring::{Core, Io, Kind, Mapping, Ring, Setup, Sqe, Target, Tasks, Uring};

/// The most bytes of one order.
pub(super) const CHUNK: usize = 1 << 20;

/// Orders carried out at once; more wait for their turn.
const AT_ONCE: usize = 16;

/// How long a connection may take to end in good order.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

/// Whether it names an export, and not a file.
pub(super) fn is_uri(path: &Path) -> bool {
    nbd::is_uri(&path.to_string_lossy())
}

/// A connected export.
#[derive(Debug)]
pub(super) struct Export {
    /// As it was given.
    pub uri: PathBuf,
    /// Bytes, with those that fill no block.
    pub size: u64,
    /// Bytes in whole blocks.
    whole: u64,
    /// What offsets and lengths are multiples of. What is behind the last whole block can be read in any piece.
    pub block: u32,
    /// It takes no writes.
    pub read_only: bool,
    most_zeroes: u64,
    orders: Option<Sender<Order>>,
    wakeup: Arc<EventFd>,
    ended: Receiver<()>,
}

/// What is to be done with `range` of a buffer, or so many bytes without one.
#[derive(Debug)]
struct Order {
    op: Op,
    offset: u64,
    length: u64,
    buffer: Vec<u8>,
    range: Range<usize>,
    reply: oneshot::Sender<(Result<(), Errno>, Vec<u8>)>,
}

impl Export {
    /// Connects, and asks for the export.
    ///
    /// # Errors
    /// A URI that is none, a server that is not there or refuses, no memory for a ring.
    pub fn open(uri: &Path, read_only: bool) -> Result<Export, ImageError> {
        let refuse = |reason: String| ImageError::unsuitable(uri, reason);
        let Some(text) = uri.to_str() else {
            return Err(refuse("is not UTF-8: write such bytes of a URI as %XX".into()));
        };
        let settings = serde_json::json!({ "uri": text, "read-only": read_only });
        let config = VolumeConfig::from_driver("nbd", settings).map_err(|error| refuse(error.to_string()))?;
        config.check().map_err(|(_, reason)| refuse(reason))?;
        let volume = Volume::open("image", &config).map_err(|error| match error {
            OpenError::Nbd { source, .. } => refuse(source.to_string()),
            other => refuse(other.to_string()),
        })?;
        let geometry = volume.geometry();
        let (whole, block, read_only) = (geometry.bytes(), geometry.logical_block, geometry.read_only);
        let size = whole + volume.tail();
        let most_zeroes = u64::from(geometry.max_write_zeroes) * SECTOR;
        let start = |source| ImageError::system("start a client for", uri)(source);
        let wakeup = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(start)?);
        let (orders, inbox) = channel();
        let (end, ended) = channel();
        let own = wakeup.clone();
        let run = move || {
            if let Err(error) = serve(&volume, inbox, own) {
                log::error!("the client of an NBD server ended: {error}");
            }
            // Nobody may listen any more.
            let _ = end.send(());
        };
        thread::Builder::new().name("ringblk-nbd".into()).spawn(run).map_err(start)?;
        let uri = uri.to_owned();
        Ok(Export { uri, size, whole, block, read_only, most_zeroes, orders: Some(orders), wakeup, ended })
    }

    async fn order(
        &self,
        op: Op,
        offset: u64,
        length: u64,
        buffer: Vec<u8>,
        range: Range<usize>,
    ) -> (io::Result<()>, Vec<u8>) {
        let gone = || io::Error::other("the connection's thread has ended");
        let (reply, answer) = oneshot::channel();
        let Some(orders) = &self.orders else { return (Err(gone()), buffer) };
        if orders.send(Order { op, offset, length, buffer, range, reply }).is_err() {
            return (Err(gone()), Vec::new());
        }
        // Full after 2^64 orders that nobody looked at.
        let _ = self.wakeup.write(1);
        match answer.await {
            Ok((result, buffer)) => {
                (result.map_err(|errno| io::Error::from_raw_os_error(errno.raw())), buffer)
            }
            Err(_) => (Err(gone()), Vec::new()),
        }
    }

    /// Fills `range` of the buffer (`Op::Read`), perhaps less, or stores it (`Op::Write`): at most [`CHUNK`] bytes, whole
    /// blocks but for a read's end at that of the export.
    pub async fn transfer(
        &self,
        op: Op,
        buffer: Vec<u8>,
        range: Range<usize>,
        offset: u64,
    ) -> (io::Result<usize>, Vec<u8>) {
        let blocks = usize::try_from(self.whole.saturating_sub(offset)).unwrap_or(usize::MAX);
        let length = if blocks == 0 { range.len() } else { range.len().min(blocks) };
        let range = range.start..range.start + length;
        let (result, buffer) = self.order(op, offset, length as u64, buffer, range).await;
        let result = result.map_err(|error| match blocks {
            0 => {
                let (tail, block) = (self.size - self.whole, self.block);
                let text = format!("its last {tail} bytes, which fill no block of {block}: {error}");
                io::Error::new(error.kind(), text)
            }
            _ => error,
        });
        (result.map(|()| length), buffer)
    }

    /// Makes whole blocks read as zeroes.
    pub async fn zero(&self, mut start: u64, end: u64) -> io::Result<()> {
        while start < end {
            let length = (end - start).min(self.most_zeroes);
            self.order(Op::WriteZeroes, start, length, Vec::new(), 0..0).await.0?;
            start += length;
        }
        Ok(())
    }

    /// Brings what was written to stable storage.
    pub async fn flush(&self) -> io::Result<()> {
        self.order(Op::Flush, 0, 0, Vec::new(), 0..0).await.0
    }

    /// See [`Format::detect`].
    pub async fn format(&self) -> io::Result<Option<Format>> {
        let block = u64::from(self.block).max(Format::LOOK as u64);
        let head = self.bytes(0, block).await?;
        let from = (self.size - Format::LOOK as u64) / block * block;
        let tail = self.bytes(from, self.size).await?;
        Ok(Format::detect(&head[..Format::LOOK], &tail[tail.len() - Format::LOOK..]))
    }

    /// What is there from `start`, on a block, to `end`, which is on one or the export's.
    async fn bytes(&self, start: u64, end: u64) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; (end - start) as usize];
        let mut done = 0;
        while done < buffer.len() {
            let range = done..buffer.len();
            let (result, back) = self.transfer(Op::Read, buffer, range, start + done as u64).await;
            buffer = back;
            done += result?;
        }
        Ok(buffer)
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.orders = None;
        let _ = self.wakeup.write(1);
        // A server that does not answer is left to the end of the process.
        let _ = self.ended.recv_timeout(SHUTDOWN_GRACE);
    }
}

/// What the thread's slots share.
struct Desk {
    inbox: Receiver<Order>,
    wakeup: Arc<EventFd>,
    orders: RefCell<VecDeque<Order>>,
    /// Slots with nothing to do.
    idle: RefCell<Vec<u32>>,
    /// Slots that have not ended.
    working: Cell<usize>,
    /// There will be no more orders.
    closed: Cell<bool>,
}

/// The thread: until nobody has orders any more.
fn serve(volume: &Volume, inbox: Receiver<Order>, wakeup: Arc<EventFd>) -> io::Result<()> {
    let core = Core::new(Uring::new(Setup { entries: 128, completions: 1024, ..Setup::default() })?);
    let mut tasks: Tasks<Uring, Ready<()>> = Tasks::new(core.clone());
    let channel = Rc::new(volume.attach(&core, false));
    let flushers = Rc::new(Flushers::new(volume, 1));
    let desk = Rc::new(Desk {
        inbox,
        wakeup,
        orders: RefCell::default(),
        idle: RefCell::default(),
        working: Cell::new(AT_ONCE),
        closed: Cell::new(false),
    });
    let listener = desk.clone();
    let of_listener = core.clone();
    core.spawn(|io| listen(io, of_listener, listener));
    for _ in 0..AT_ONCE {
        let memory = Mapping::anonymous(CHUNK)?;
        let (channel, flushers, desk) = (channel.clone(), flushers.clone(), desk.clone());
        core.spawn(|io| work(io, memory, channel, flushers, desk));
    }
    while desk.working.get() > 0 {
        pass(&core, &mut tasks)?;
    }
    drop((channel, desk));
    let limit = Instant::now() + SHUTDOWN_GRACE / 2;
    tasks.run_ready();
    while core.in_flight() > 0 && Instant::now() < limit {
        core.ring().enter(false)?;
        reap(&core, &mut tasks);
        tasks.run_ready();
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn pass(core: &Rc<Core<Uring>>, tasks: &mut Tasks<Uring, Ready<()>>) -> io::Result<()> {
    tasks.run_ready();
    core.ring().enter(core.is_quiet())?;
    reap(core, tasks);
    Ok(())
}

fn reap(core: &Rc<Core<Uring>>, tasks: &mut Tasks<Uring, Ready<()>>) {
    let mut completions = Vec::new();
    core.ring().reap(&mut completions);
    for completion in completions.iter().filter(|done| done.user_data.kind() == Some(Kind::Slot)) {
        tasks.complete(completion);
    }
}

/// Takes orders in.
async fn listen(io: Io<Uring>, core: Rc<Core<Uring>>, desk: Rc<Desk>) {
    while !desk.closed.get() {
        loop {
            match desk.inbox.try_recv() {
                Ok(order) => desk.orders.borrow_mut().push_back(order),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    desk.closed.set(true);
                    break;
                }
            }
        }
        let all = desk.closed.get();
        let wanted = if all { usize::MAX } else { desk.orders.borrow().len() };
        for _ in 0..wanted {
            let Some(slot) = desk.idle.borrow_mut().pop() else { break };
            core.wake(slot);
        }
        if !all {
            io.submit(&Sqe::PollOnce { file: Target::Fd(desk.wakeup.as_raw_fd()) }).await;
            // Empty already when it was written for an order that was taken before.
            let _ = desk.wakeup.read();
        }
    }
}

/// Carries orders out, one after the other.
async fn work(
    io: Io<Uring>,
    memory: Mapping,
    volume: Rc<VolumeChannel<Uring>>,
    flushers: Rc<Flushers>,
    desk: Rc<Desk>,
) {
    loop {
        let next = desk.orders.borrow_mut().pop_front();
        match next {
            Some(mut order) => {
                let result = perform(&io, &memory, &volume, &flushers, &mut order).await;
                // Whoever asked may have been interrupted.
                let _ = order.reply.send((result, order.buffer));
            }
            None if desk.closed.get() => break,
            None => {
                desk.idle.borrow_mut().push(io.slot());
                io.park().await;
            }
        }
    }
    desk.working.set(desk.working.get() - 1);
}

async fn perform(
    io: &Io<Uring>,
    memory: &Mapping,
    volume: &VolumeChannel<Uring>,
    flushers: &Flushers,
    order: &mut Order,
) -> Result<(), Errno> {
    let bytes = order.buffer.get_mut(order.range.clone()).ok_or(Errno::EINVAL)?;
    if bytes.len() > CHUNK {
        return Err(Errno::EINVAL);
    }
    if order.op == Op::Write {
        memory.copy_in(0, bytes);
    }
    let iovecs = [memory.iovec(0, bytes.len())];
    let data = if bytes.is_empty() { Data::None } else { Data::of(&iovecs) };
    if order.op == Op::Read && order.offset >= volume.geometry().bytes() {
        volume.read_tail(io, data, order.length, order.offset).await?;
        memory.copy_out(0, bytes);
        return Ok(());
    }
    let (sector, sectors) = (order.offset / SECTOR, (order.length / SECTOR) as u32);
    let flags = Flags { unmap: true, ..Flags::default() };
    let request = Request { op: order.op, flags, sector, sectors, data };
    submit(volume, io, flushers.queue(0), &request).await?;
    if order.op == Op::Read {
        memory.copy_out(0, bytes);
    }
    Ok(())
}
