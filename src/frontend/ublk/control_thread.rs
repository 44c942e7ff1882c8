//! A device's commands, sent from a thread of the device's own.
//!
//! Some of them wait for I/O that we serve (a start for its partition scan, a stop for requests in flight). The caller
//! waits with a time limit, and a thread that is stuck is left behind. Its command still names its memory, which
//! therefore stays.

#![forbid(unsafe_code)]

use super::commands::{ControlDevice, Failed};
use super::deadline::{POLL_INTERVAL, until};
use super::error::{ControlOp, Error};
use super::info;
use super::params::Params;
use super::thread::detached;
use crate::block::Errno;
use crate::ring::set_io_flusher;
use libublk::sys;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

/// The longest that a start may take. The kernel reads the partition table from us meanwhile, and the store
/// may be slow.
const START_LIMIT: Duration = Duration::from_secs(60);

/// How long a stop waits for the device's number.
const FREE_LIMIT: Duration = Duration::from_secs(1);

/// The way to a device's thread, which ends with it.
pub(super) struct ControlThread {
    sender: Sender<ControlCommand>,
    /// Set when a start is not worth waiting for.
    hopeless: Arc<AtomicBool>,
}

/// What the control thread is told.
struct ControlCommand {
    op: ControlOp,
    /// Sectors, or milliseconds.
    data: u64,
    reply: Sender<Result<(), Failed>>,
}

/// The kernel's answer to a command, which comes or does not.
pub struct Answer {
    op: ControlOp,
    since: Instant,
    reply: Receiver<Result<(), Failed>>,
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
            Ok(Ok(())) => Some(Ok(())),
            Ok(Err(Failed::Refused(errno))) => Some(Err(Error::Refused { op: self.op, errno, id: None })),
            Ok(Err(Failed::NoAnswer)) => Some(Err(self.no_answer())),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(ended())),
        }
    }

    fn no_answer(&self) -> Error {
        Error::TimedOut { op: self.op, after: self.since.elapsed() }
    }
}

impl ControlThread {
    /// Starts the thread, for device `id`, which gets `params` when it is first started.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn new(id: u32, params: Params) -> Result<ControlThread, Error> {
        let (sender, inbox) = channel();
        let hopeless = Arc::new(AtomicBool::new(false));
        let flag = hopeless.clone();
        let body = move || {
            // A command may wait for I/O on the disk, and must not wait for memory meanwhile.
            set_io_flusher();
            take_commands(id, &params, &inbox, &flag);
        };
        detached("ringblk-ublk", body).map_err(Error::Thread)?;
        Ok(ControlThread { sender, hopeless })
    }

    /// Has `op` done. `data` is a number of sectors, or of milliseconds.
    pub fn submit(&self, op: ControlOp, data: u64) -> Answer {
        let (reply, answer) = channel();
        // A thread that is gone has dropped its inbox, and with it the reply: `wait` will tell.
        let _ = self.sender.send(ControlCommand { op, data, reply });
        Answer { op, since: Instant::now(), reply: answer }
    }

    /// Gives up a start that cannot come to its end.
    pub fn give_up_start(&self) {
        self.hopeless.store(true, Ordering::Relaxed);
    }
}

/// On the control thread: carries commands out until nobody submits any.
fn take_commands(id: u32, params: &Params, inbox: &Receiver<ControlCommand>, hopeless: &AtomicBool) {
    for ControlCommand { op, data, reply } in inbox {
        let _ = reply.send(run(id, params, op, data, hopeless));
    }
}

/// Each with a ring of its own, which cancels the command when it was given up.
fn run(id: u32, params: &Params, op: ControlOp, data: u64, hopeless: &AtomicBool) -> Result<(), Failed> {
    let mut driver = ControlDevice::open()?;
    let mut in_time = until(START_LIMIT);
    let mut go_on = || in_time() && !hopeless.load(Ordering::Relaxed);
    let us = u64::from(std::process::id());
    match op {
        ControlOp::Start => {
            driver.set_params(id, params, &mut go_on)?;
            driver.plain(sys::UBLK_U_CMD_START_DEV, id, us, go_on)
        }
        ControlOp::TakeOver => driver.plain(sys::UBLK_U_CMD_END_USER_RECOVERY, id, us, go_on),
        // It waits for requests in flight, however long the store takes for them.
        ControlOp::Stop => driver.plain(sys::UBLK_U_CMD_STOP_DEV, id, 0, || true),
        // It fails where anybody has the disk open, and then changes nothing.
        ControlOp::TryStop => driver.plain(sys::UBLK_U_CMD_TRY_STOP_DEV, id, 0, || true),
        ControlOp::Resize => driver.plain(sys::UBLK_U_CMD_UPDATE_SIZE, id, data, in_time),
        ControlOp::Quiesce => driver.plain(sys::UBLK_U_CMD_QUIESCE_DEV, id, data, || true),
        ControlOp::Delete => delete(&mut driver, id),
        ControlOp::Add | ControlOp::Open | ControlOp::Look | ControlOp::Recover => {
            Err(Failed::Refused(Errno::EINVAL))
        }
    }
}

/// Deletes a device, and gives its number some time to become free, so that who starts us again gets it. It stays
/// taken for as long as anybody has the dead disk open, which is not waited for.
pub(super) fn delete(driver: &mut ControlDevice, id: u32) -> Result<(), Failed> {
    driver.plain(sys::UBLK_U_CMD_DEL_DEV_ASYNC, id, 0, || true)?;
    let mut go_on = until(FREE_LIMIT);
    while driver.info(id, || true).is_ok() {
        if !go_on() {
            let device = info::path(id);
            log::info!("{} is gone; its number is free when nobody has it open any more", device.display());
            break;
        }
        thread::sleep(POLL_INTERVAL);
    }
    Ok(())
}

fn ended() -> Error {
    Error::Thread(io::Error::other("it has ended"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_may_be_waited_for_again() {
        let (sender, reply) = channel();
        let answer = Answer { op: ControlOp::Stop, since: Instant::now(), reply };
        let error = answer.wait(Instant::now()).unwrap_err();
        assert!(matches!(error, Error::TimedOut { op: ControlOp::Stop, .. }), "{error}");
        assert!(answer.try_wait(Instant::now()).is_none());
        sender.send(Ok(())).unwrap();
        answer.wait(Instant::now() + Duration::from_secs(1)).unwrap();
        sender.send(Err(Failed::NoAnswer)).unwrap();
        assert!(matches!(answer.wait(Instant::now()), Err(Error::TimedOut { .. })));
        sender.send(Err(Failed::Refused(Errno::EBUSY))).unwrap();
        assert!(matches!(answer.wait(Instant::now()), Err(Error::Refused { errno: Errno::EBUSY, .. })));
        drop(sender);
        assert!(matches!(answer.wait(Instant::now()), Err(Error::Thread(_))));
    }
}
