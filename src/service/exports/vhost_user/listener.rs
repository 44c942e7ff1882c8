//! An export's thread: it waits for VMMs, and serves one at a time.

#![forbid(unsafe_code)]

use super::Shared;
use crate::frontend::vhost_user::budget::MemoryShare;
use crate::frontend::vhost_user::protocol::{Interest, Shape, Vmm, Wake, Wakeups};
use crate::frontend::vhost_user::{Device, Host, Session};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{MsgFlags, getsockopt, recv};
use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A VMM that breaks the protocol is not served again for this long, so that one that does nothing else
/// costs little.
const BACK_OFF: Duration = Duration::from_millis(100);

/// Sessions begin at most this often: VMMs that connect and leave without end cost little, too.
const PACE: Duration = Duration::from_millis(10);

/// The export's thread.
pub(super) struct Listener {
    pub listener: UnixListener,
    pub device: Arc<Device>,
    pub host: Arc<dyn Host>,
    pub shape: Shape,
    /// What its VMMs may map.
    pub memory: Arc<MemoryShare>,
    pub shared: Arc<Shared>,
    /// A VMM that came while another was served, with what is known of it.
    pub next: RefCell<Option<(UnixStream, String)>>,
}

impl Listener {
    /// One session after the other. The next VMM waits until the last one's requests are complete: two never
    /// share the volume through one frontend.
    pub fn keep(&self) {
        let log = self.device.log();
        loop {
            let (stream, who) = match self.accept() {
                Ok(Some(vmm)) => vmm,
                Ok(None) => return,
                Err(error) => {
                    log.error("accept", format_args!("cannot accept a VMM: {error}"));
                    if self.pause(BACK_OFF) {
                        return;
                    }
                    continue;
                }
            };
            // One that leaves without a word costs no session, and no line in the log.
            match self.wait(stream.as_fd(), Interest::Read, None) {
                Ok(Wake::Ready) if speaks(&stream) => {}
                Ok(Wake::Stop) => return,
                _ => continue,
            }
            let begun = Instant::now();
            log.info("connect", format_args!("a VMM connects: {who}"));
            self.shared.connected.store(true, Ordering::Relaxed);
            let vmm = Vmm::new(stream, self);
            let channel = &self.shared.channel;
            let result = Session::serve(vmm, &self.device, &self.host, self.shape, channel, &self.memory);
            self.shared.connected.store(false, Ordering::Relaxed);
            let rest = match result {
                Ok(()) => {
                    log.info("gone", format_args!("the VMM is gone"));
                    PACE.saturating_sub(begun.elapsed())
                }
                Err(error) => {
                    log.error("dropped", format_args!("the VMM is dropped: {error}"));
                    BACK_OFF
                }
            };
            if self.pause(rest) {
                return;
            }
        }
    }

    /// The next VMM and who it is. `None` when the export is to stop.
    fn accept(&self) -> io::Result<Option<(UnixStream, String)>> {
        loop {
            if let Some(vmm) = self.next.take() {
                self.shared.waiting.store(false, Ordering::Relaxed);
                return Ok(Some(vmm));
            }
            if let Event::Stop = self.sleep(&[(self.listener.as_fd(), PollFlags::POLLIN)], None)? {
                return Ok(None);
            }
            *self.next.borrow_mut() = self.queued()?;
        }
    }

    /// A connection off the listen queue, if there is one.
    fn queued(&self) -> io::Result<Option<(UnixStream, String)>> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                let who = getsockopt(&stream, PeerCredentials)?;
                Ok(Some((stream, format!("pid {}, uid {}", who.pid(), who.uid()))))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sleeps for a time. Whether the export is to stop.
    fn pause(&self, time: Duration) -> bool {
        !matches!(self.sleep(&[], Some(Instant::now() + time)), Ok(Event::Late))
    }

    /// Sleeps until one of `fds` is ready, the deadline is over or the export is to stop.
    fn sleep(&self, fds: &[(BorrowedFd<'_>, PollFlags)], deadline: Option<Instant>) -> io::Result<Event> {
        let mut polled = vec![PollFd::new(self.shared.stop.as_fd(), PollFlags::POLLIN)];
        polled.extend(fds.iter().map(|(fd, interest)| PollFd::new(*fd, *interest)));
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            // Rounded up: not awake before it is time.
            let timeout = left.map_or(Ok(PollTimeout::NONE), |left| (left.as_millis() + 1).try_into());
            match poll(&mut polled, timeout.unwrap_or(PollTimeout::MAX)) {
                Err(nix::errno::Errno::EINTR) => continue,
                Err(error) => return Err(error.into()),
                Ok(_) if self.shared.stopping.load(Ordering::SeqCst) => return Ok(Event::Stop),
                Ok(_) => {}
            }
            if let Some(index) = polled[1..].iter().position(|fd| fd.any().unwrap_or(false)) {
                return Ok(Event::Ready(index));
            }
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(Event::Late);
            }
        }
    }
}

/// What ended a sleep.
enum Event {
    Stop,
    Late,
    /// The first descriptor that is ready.
    Ready(usize),
}

impl Wakeups for Listener {
    /// Meanwhile takes one more VMM off the listen queue, to say that it has to wait, until it loses patience.
    fn wait(&self, fd: BorrowedFd<'_>, interest: Interest, deadline: Option<Instant>) -> io::Result<Wake> {
        let interest = match interest {
            Interest::Read => PollFlags::POLLIN,
            Interest::Write => PollFlags::POLLOUT,
        };
        let mut listen = true;
        loop {
            let event = {
                let next = self.next.borrow();
                // Of one that waits, its end alone is of interest, which needs no asking for.
                let other = match &*next {
                    Some((stream, _)) => Some((stream.as_fd(), PollFlags::empty())),
                    None => listen.then(|| (self.listener.as_fd(), PollFlags::POLLIN)),
                };
                let fds = [Some((fd, interest)), other];
                self.sleep(&fds.into_iter().flatten().collect::<Vec<_>>(), deadline)?
            };
            match event {
                Event::Stop => return Ok(Wake::Stop),
                Event::Late => return Ok(Wake::Late),
                Event::Ready(0) => return Ok(Wake::Ready),
                Event::Ready(_) if self.next.take().is_some() => {
                    self.shared.waiting.store(false, Ordering::Relaxed);
                    self.device.log().info("wait", format_args!("the VMM that waits leaves"));
                }
                Event::Ready(_) => match self.queued() {
                    Ok(None) => {}
                    Ok(Some(vmm)) => {
                        let who = &vmm.1;
                        self.device.log().info("wait", format_args!("another VMM connects and waits: {who}"));
                        *self.next.borrow_mut() = Some(vmm);
                        self.shared.waiting.store(true, Ordering::Relaxed);
                    }
                    // It stays in the queue, for when this one is gone.
                    Err(error) => {
                        let message = format_args!("another VMM cannot be accepted: {error}");
                        self.device.log().warn("accept", message);
                        listen = false;
                    }
                },
            }
        }
    }
}

/// Whether a connection that is ready has something to say, and is not merely closed.
fn speaks(stream: &UnixStream) -> bool {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(stream.as_raw_fd(), &mut [0], flags).is_ok_and(|count| count > 0)
}
