//! The control side: a device's life, for the most part through libublk's control half.
//!
//! libublk keeps its control ring in a thread-local, so all commands of a device come from one thread, the
//! device's own. Some of them wait for I/O that we serve (a start for its partition scan, a stop for requests
//! in flight), and libublk's cannot be interrupted; so the caller waits with a time limit, and a thread that
//! is stuck is left behind. Its command still names its memory, which therefore stays.
//!
//! Two commands are sent without libublk: the parameters, because its struct for them has no DMA alignment,
//! and with them the start, because ours can be given up, and a stop then still gets through.
//!
//! Nothing of libublk's own is left on the system: it writes its JSON files only when it starts a device.

#![forbid(unsafe_code)]

use super::error::{Error, Verb};
use super::params::Params;
use super::queue::QueueSetup;
use super::support::CONTROL;
use crate::block::{Errno, Geometry};
use crate::ring::CommandRing;
use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder, UblkQueueAffinity};
use libublk::{UblkError, UblkFlags, sys};
use nix::sys::signal::SigSet;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

/// The longest that adding a device may take.
const ADD_LIMIT: Duration = Duration::from_secs(30);

/// The longest that udev may take to make the character device, and make it ours.
const UDEV_LIMIT: Duration = Duration::from_secs(5);

/// The longest that a start may take. The kernel reads the partition table from us meanwhile, and the store
/// may be slow.
const START_LIMIT: Duration = Duration::from_secs(60);

/// How long a stop waits for the device's number.
const FREE_LIMIT: Duration = Duration::from_secs(1);

/// What a device is to be.
#[derive(Clone, Debug)]
pub struct Wish {
    /// For logs.
    pub name: String,
    /// N of `/dev/ublkbN`; `None`: the kernel picks.
    pub id: Option<u32>,
    /// Hardware queues; the kernel may grant fewer.
    pub queues: u16,
    /// Tags a queue.
    pub depth: u16,
    /// Bytes of the largest request.
    pub max_io: u32,
    /// Ask for `UBLK_F_AUTO_BUF_REG`.
    pub zero_copy: bool,
}

/// A device in the kernel. Dropped without [`delete`](Device::delete), it is deleted in the background.
pub struct Device {
    info: sys::ublksrv_ctrl_dev_info,
    read_only: bool,
    cpus: Vec<Vec<usize>>,
    /// The character device, until we let go of it.
    file: Option<Arc<File>>,
    orders: Sender<Order>,
    /// Set when a start is not worth waiting for.
    hopeless: Arc<AtomicBool>,
}

/// What the control thread is told.
struct Order {
    verb: Verb,
    reply: Sender<Outcome>,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    Refused(Errno),
    /// Given up.
    NoAnswer,
}

/// The kernel's answer to a command, which comes or does not.
pub struct Answer {
    verb: Verb,
    since: Instant,
    reply: Receiver<Outcome>,
}

impl Answer {
    /// Waits until `deadline`; may be called again after a time-out, and goes on waiting then.
    ///
    /// # Errors
    /// The kernel's refusal, or that it has not answered yet.
    pub fn wait(&self, deadline: Instant) -> Result<(), Error> {
        self.try_wait(deadline).unwrap_or_else(|| Err(self.no_answer()))
    }

    /// The same, where no answer yet is `None`.
    pub fn try_wait(&self, deadline: Instant) -> Option<Result<(), Error>> {
        match self.reply.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Outcome::Done) => Some(Ok(())),
            Ok(Outcome::Refused(errno)) => Some(Err(Error::Refused { verb: self.verb, errno, id: None })),
            Ok(Outcome::NoAnswer) => Some(Err(self.no_answer())),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(ended())),
        }
    }

    fn no_answer(&self) -> Error {
        Error::TimedOut { verb: self.verb, after: self.since.elapsed() }
    }
}

impl Device {
    /// Adds a device that shows `geometry`. Nobody sees a disk before [`start`](Self::start).
    ///
    /// # Errors
    /// The kernel's refusal, or that it did not answer in half a minute.
    pub fn add(wish: &Wish, geometry: &Geometry) -> Result<Device, Error> {
        // libublk must not be the one to find out: when the kernel refuses to add a number, it deletes the
        // device of that number, which is somebody else's.
        if let Some(id) = wish.id
            && Path::new(&format!("/sys/class/ublk-char/ublkc{id}")).exists()
        {
            return Err(Error::Refused { verb: Verb::Add, errno: Errno::new(libc::EEXIST), id: wish.id });
        }
        let (orders, inbox) = channel();
        let (reply, added) = channel();
        let hopeless = Arc::new(AtomicBool::new(false));
        let (asked, shape, flag) = (wish.clone(), geometry.clone(), hopeless.clone());
        spawn(move || match add(&asked) {
            Ok((device, made)) => {
                let params = Params::new(&shape, made.info.max_io_buf_bytes, zero_copy(&made.info));
                // When nobody waits any more, the device goes with its handle.
                if reply.send(Ok(made)).is_ok() {
                    obey(&device, &params, &inbox, &flag);
                }
            }
            Err(error) => drop(reply.send(Err(errno(error)))),
        })?;
        let made = match added.recv_timeout(ADD_LIMIT) {
            Ok(Ok(made)) => made,
            Ok(Err(errno)) => return Err(Error::Refused { verb: Verb::Add, errno, id: wish.id }),
            Err(RecvTimeoutError::Timeout) => {
                return Err(Error::TimedOut { verb: Verb::Add, after: ADD_LIMIT });
            }
            Err(RecvTimeoutError::Disconnected) => return Err(ended()),
        };
        let Made { info, file, cpus } = made;
        let file = Some(Arc::new(file));
        Ok(Device { info, read_only: geometry.read_only, cpus, file, orders, hopeless })
    }

    /// The disk's path, which is there once it is started.
    pub fn path(&self) -> PathBuf {
        format!("/dev/ublkb{}", self.info.dev_id).into()
    }

    /// Tags a queue.
    pub fn depth(&self) -> u16 {
        self.info.queue_depth
    }

    /// Whether zero copy is in force: what the kernel granted, not what was asked for.
    pub fn zero_copy(&self) -> bool {
        zero_copy(&self.info)
    }

    /// The queues that the kernel granted, for the workers. None after [`close`](Self::close).
    pub fn queues(&self) -> Vec<QueueSetup> {
        let Some(file) = &self.file else { return Vec::new() };
        let setup = |queue: u16| QueueSetup {
            device: file.clone(),
            queue,
            depth: self.info.queue_depth,
            max_io: self.info.max_io_buf_bytes,
            zero_copy: self.zero_copy(),
            read_only: self.read_only,
            cpus: self.cpus.get(usize::from(queue)).cloned().unwrap_or_default(),
        };
        (0..self.info.nr_hw_queues).map(setup).collect()
    }

    /// Shows the disk. Every queue must be fetching, since the kernel reads the partition table first. After a
    /// minute the start is given up; the device can be stopped then.
    pub fn start(&self) -> Answer {
        self.order(Verb::Start)
    }

    /// Gives up a start that cannot come to its end.
    pub fn give_up_start(&self) {
        self.hopeless.store(true, Ordering::Relaxed);
    }

    /// Takes the disk away: new requests fail, those in flight are waited for, then every fetch is aborted.
    /// A device that was not started only has its fetches aborted.
    pub fn stop(&self) -> Answer {
        self.order(Verb::Stop)
    }

    /// Lets go of the character device. Queues that still serve keep it open.
    pub fn close(&mut self) {
        self.file = None;
    }

    /// Deletes the device. [`close`](Self::close) it, and see the queues end, before: the kernel keeps the
    /// number until nobody has the character device or the disk open any more.
    pub fn delete(&self) -> Answer {
        self.order(Verb::Delete)
    }

    fn order(&self, verb: Verb) -> Answer {
        let (sender, reply) = channel();
        // A thread that is gone has dropped its inbox, and with it the reply: `wait` will tell.
        let _ = self.orders.send(Order { verb, reply: sender });
        Answer { verb, since: Instant::now(), reply }
    }
}

/// Whether the kernel granted it.
fn zero_copy(info: &sys::ublksrv_ctrl_dev_info) -> bool {
    info.flags & u64::from(sys::UBLK_F_AUTO_BUF_REG) != 0
}

/// What adding gave.
struct Made {
    info: sys::ublksrv_ctrl_dev_info,
    file: File,
    cpus: Vec<Vec<usize>>,
}

/// On the control thread: adds the device and opens its file.
fn add(wish: &Wish) -> Result<(UblkCtrl, Made), UblkError> {
    let mut flags = sys::UBLK_F_CMD_IOCTL_ENCODE;
    if wish.zero_copy {
        flags |= sys::UBLK_F_AUTO_BUF_REG;
    }
    let device = UblkCtrlBuilder::default()
        .name(&wish.name)
        .id(wish.id.and_then(|id| i32::try_from(id).ok()).unwrap_or(-1))
        .nr_queues(wish.queues)
        .depth(wish.depth)
        .io_buf_bytes(wish.max_io)
        .ctrl_flags(flags.into())
        .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV | UblkFlags::UBLK_DEV_F_DEL_DEV_ASYNC)
        .build()?;
    // The kernel clamps queues to CPUs and drops flags that it does not know.
    device.read_dev_info()?;
    let info = device.dev_info();
    let file = open(&device.get_cdev_path())?;
    let cpus = |queue: u16| {
        let mut mask = UblkQueueAffinity::new();
        match device.get_queue_affinity(queue.into(), &mut mask) {
            Ok(_) => mask.to_bits_vec(),
            Err(error) => {
                log::debug!("{} queue {queue}: no affinity: {}", device.get_bdev_path(), errno(error));
                Vec::new()
            }
        }
    };
    let cpus = (0..info.nr_hw_queues).map(cpus).collect();
    Ok((device, Made { info, file, cpus }))
}

/// Opens the character device, once udev has made it and given it to us.
fn open(path: &str) -> io::Result<File> {
    let limit = Instant::now() + UDEV_LIMIT;
    loop {
        match File::options().read(true).write(true).open(path) {
            Err(_) if Instant::now() < limit => thread::sleep(Duration::from_millis(10)),
            result => return result,
        }
    }
}

/// On the control thread: carries orders out until nobody gives any. Then `device` is dropped, which deletes
/// it if it still is there.
fn obey(device: &UblkCtrl, params: &Params, inbox: &Receiver<Order>, hopeless: &AtomicBool) {
    let outcome = |result: Result<i32, UblkError>| match result.map(Errno::split) {
        Ok(Ok(_)) => Outcome::Done,
        // Libublk takes EBUSY for a success.
        Ok(Err(errno)) => Outcome::Refused(errno),
        Err(error) => Outcome::Refused(errno(error)),
    };
    for Order { verb, reply } in inbox {
        let outcome = match verb {
            Verb::Start => start(device.dev_info().dev_id, params, hopeless)
                .unwrap_or_else(|error| Outcome::Refused(error.into())),
            // Not stop_dev, which also looks after JSON files.
            Verb::Stop => outcome(device.kill_dev()),
            Verb::Delete => outcome(device.del_dev().inspect(|_| wait_until_free(device))),
            Verb::Add => Outcome::Refused(Errno::EINVAL),
        };
        let _ = reply.send(outcome);
    }
}

/// Gives the number of a deleted device some time to become free, so that who starts us again gets it. It stays
/// taken for as long as anybody has the dead disk open, which we do not wait for.
fn wait_until_free(device: &UblkCtrl) {
    let limit = Instant::now() + FREE_LIMIT;
    while device.read_dev_info().is_ok() {
        if Instant::now() >= limit {
            log::info!(
                "{} is gone; its number is free when nobody has it open any more",
                device.get_bdev_path()
            );
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Sets the parameters and starts device `id`. On a ring of its own, which cancels the start when it is
/// dropped.
fn start(id: u32, params: &Params, hopeless: &AtomicBool) -> io::Result<Outcome> {
    let control = File::options().read(true).write(true).open(CONTROL)?;
    let mut ring = CommandRing::new()?;
    let limit = Instant::now() + START_LIMIT;
    let params = params.bytes();
    let len = params.len() as u16;
    let commands = [
        (sys::UBLK_U_CMD_SET_PARAMS, params, len, 0),
        (sys::UBLK_U_CMD_START_DEV, Box::default(), 0, u64::from(std::process::id())),
    ];
    for (op, payload, len, data) in commands {
        let go_on = || Instant::now() < limit && !hopeless.load(Ordering::Relaxed);
        let command = |addr| command(id, if len > 0 { addr } else { 0 }, len, data);
        match ring.run(control.as_fd(), op, payload, command, go_on)?.map(Errno::split) {
            Some(Ok(_)) => {}
            Some(Err(errno)) => return Ok(Outcome::Refused(errno)),
            None => return Ok(Outcome::NoAnswer),
        }
    }
    Ok(Outcome::Done)
}

/// `struct ublksrv_ctrl_cmd` of `linux/ublk_cmd.h`, with room behind it.
fn command(id: u32, addr: u64, len: u16, data: u64) -> [u8; 80] {
    let mut bytes = [0; 80];
    bytes[0..4].copy_from_slice(&id.to_ne_bytes());
    // No queue: it is a command for the device.
    bytes[4..6].copy_from_slice(&u16::MAX.to_ne_bytes());
    bytes[6..8].copy_from_slice(&len.to_ne_bytes());
    bytes[8..16].copy_from_slice(&addr.to_ne_bytes());
    bytes[16..24].copy_from_slice(&data.to_ne_bytes());
    bytes
}

const _: () = {
    use std::mem::offset_of;
    type Command = sys::ublksrv_ctrl_cmd;
    assert!(size_of::<Command>() == 32);
    assert!(offset_of!(Command, dev_id) == 0 && offset_of!(Command, queue_id) == 4);
    assert!(offset_of!(Command, len) == 6 && offset_of!(Command, addr) == 8);
    assert!(offset_of!(Command, data) == 16);
};

/// A thread for commands. It may outlive us, so it is not joined.
fn spawn(body: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    let body = || {
        block_signals();
        // As for workers: a command may wait for I/O on the disk, and must not wait for memory meanwhile.
        if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
            log::debug!("PR_SET_IO_FLUSHER: {error}");
        }
        body();
    };
    thread::Builder::new().name("ringblk-ublk".into()).spawn(body).map_err(Error::Thread)?;
    Ok(())
}

/// Keeps signals away from this thread: one of them would make libublk give up on a command that the kernel
/// goes on with.
pub(super) fn block_signals() {
    if let Err(error) = SigSet::all().thread_block() {
        log::debug!("signals stay unblocked: {error}");
    }
}

fn ended() -> Error {
    Error::Thread(io::Error::other("it has ended"))
}

/// What libublk's error comes from.
fn errno(error: UblkError) -> Errno {
    match error {
        UblkError::UringIOError(result) | UblkError::OtherError(result) => {
            Errno::new(result.saturating_neg())
        }
        UblkError::IOError(error) => error.into(),
        UblkError::InvalidVal => Errno::EINVAL,
        UblkError::UringTimeout | UblkError::UringIoQueued | UblkError::QueueIsDown => Errno::EIO,
        UblkError::JsonError(_) => Errno::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libublks_errors_keep_their_number() {
        for (error, raw) in [
            (UblkError::UringIOError(-libc::EEXIST), libc::EEXIST),
            (UblkError::OtherError(-libc::EACCES), libc::EACCES),
            (UblkError::IOError(io::Error::from_raw_os_error(libc::EPERM)), libc::EPERM),
            (UblkError::InvalidVal, libc::EINVAL),
            (UblkError::QueueIsDown, libc::EIO),
        ] {
            assert_eq!(errno(error).raw(), raw);
        }
    }

    #[test]
    fn an_answer_may_be_waited_for_again() {
        let (sender, reply) = channel();
        let answer = Answer { verb: Verb::Stop, since: Instant::now(), reply };
        let error = answer.wait(Instant::now()).unwrap_err();
        assert!(matches!(error, Error::TimedOut { verb: Verb::Stop, .. }), "{error}");
        assert!(answer.try_wait(Instant::now()).is_none());
        sender.send(Outcome::Done).unwrap();
        answer.wait(Instant::now() + Duration::from_secs(1)).unwrap();
        sender.send(Outcome::NoAnswer).unwrap();
        assert!(matches!(answer.wait(Instant::now()), Err(Error::TimedOut { .. })));
        drop(sender);
        assert!(matches!(answer.wait(Instant::now()), Err(Error::Thread(_))));
    }
}
