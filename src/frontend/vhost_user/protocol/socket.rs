//! A VMM's connection. Nothing it does or leaves undone keeps us longer than a time-out.

use super::{Message, Receive, Refusal};
use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::MAX_ATTACHED_FD_ENTRIES;

/// For a message to be whole once it has begun, and for an answer to be taken.
const TIME: Duration = Duration::from_secs(5);

/// What a wait is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// There is something to receive.
    Read,
    /// There is room to send.
    Write,
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// As was waited for.
    Ready,
    /// At the deadline.
    Late,
    /// The export is to stop.
    Stop,
}

/// Who sleeps while a VMM says nothing, and knows what else there is to wake up for.
pub trait Wakeups {
    /// Sleeps until `fd` is ready, or `deadline`, if there is one, is over, or the export is to stop.
    ///
    /// # Errors
    /// The kernel's.
    fn wait(&self, fd: BorrowedFd<'_>, interest: Interest, deadline: Option<Instant>) -> io::Result<Wake>;
}

/// A VMM's connection.
pub struct Vmm<'a> {
    stream: UnixStream,
    watch: &'a dyn Wakeups,
    /// When the message that has begun is to be whole.
    deadline: Option<Instant>,
}

impl<'a> Vmm<'a> {
    /// An accepted connection.
    pub fn new(stream: UnixStream, watch: &'a dyn Wakeups) -> Vmm<'a> {
        Vmm { stream, watch, deadline: None }
    }

    /// Its socket, for somebody who may have to hang up.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn socket(&self) -> io::Result<UnixStream> {
        self.stream.try_clone()
    }

    /// The next message. `None` when the VMM is gone or the export is to stop.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub fn message(&mut self) -> Result<Option<Message>, Refusal> {
        self.deadline = None;
        Message::read(self)
    }

    /// Sends an answer, with at most one descriptor. One that is gone, or that we leave, need not get it.
    ///
    /// # Errors
    /// When it does not take it in time.
    pub fn answer(&self, mut bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> Result<(), Refusal> {
        let deadline = Instant::now() + TIME;
        let mut descriptor = descriptor;
        while !bytes.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if let Some(descriptor) = descriptor.as_slice().first() {
                control.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(descriptor)));
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, flags) {
                Ok(count) => {
                    bytes = &bytes[count..];
                    descriptor = None;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    match self.watch.wait(self.stream.as_fd(), Interest::Write, Some(deadline))? {
                        Wake::Ready => {}
                        Wake::Late => return Err(Refusal::SendTimeout(TIME)),
                        Wake::Stop => return Ok(()),
                    }
                }
                Err(Errno::PIPE | Errno::CONNRESET) => return Ok(()),
                Err(error) => return Err(Refusal::Connection(error.into())),
            }
        }
        Ok(())
    }
}

impl Receive for Vmm<'_> {
    fn receive(&mut self, bytes: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> Result<usize, Refusal> {
        loop {
            match self.watch.wait(self.stream.as_fd(), Interest::Read, self.deadline)? {
                Wake::Ready => {}
                Wake::Late => return Err(Refusal::ReceiveTimeout(TIME)),
                Wake::Stop => return Ok(0),
            }
            // What arrived and is not taken out is closed with this buffer, however we leave.
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            match recvmsg(&self.stream, &mut [IoSliceMut::new(bytes)], &mut control, flags) {
                Ok(received) => {
                    if received.flags.contains(ReturnFlags::CTRUNC) {
                        return Err(Refusal::TooManyFds);
                    }
                    for message in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(rights) = message {
                            descriptors.extend(rights);
                        }
                    }
                    self.deadline.get_or_insert_with(|| Instant::now() + TIME);
                    return Ok(received.bytes);
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                // It left with answers of ours unread.
                Err(Errno::CONNRESET) => return Ok(0),
                Err(error) => return Err(Refusal::Connection(error.into())),
            }
        }
    }
}
