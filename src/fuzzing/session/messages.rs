//! Messages of the vhost-user protocol as bytes, and their answers.

use crate::frontend::vhost_user::protocol::{Interest, Receive, Vmm, Wake, Wakeups};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use std::time::Instant;

pub(super) mod code {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

/// Nothing takes longer, unless it hangs.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// Requests that have an answer by themselves.
const QUESTIONS: [u32; 7] = [1, 11, 15, 17, 24, 31, 36];

/// Asks for an acknowledgement.
const NEED_REPLY: u32 = 8;
/// Protocol feature bit.
const REPLY_ACK: u64 = 1 << 3;

/// The VMM's end of a connection.
pub(super) struct Wire {
    socket: UnixStream,
    /// Messages are acknowledged where they want it.
    acks: bool,
    /// The other end has hung up.
    pub over: bool,
}

/// The body of an answer, and a descriptor that came with it.
pub(super) type Answer = (Vec<u8>, Option<File>);

impl Wire {
    pub fn new(socket: UnixStream) -> Wire {
        Wire { socket, acks: false, over: false }
    }

    /// Sends a whole message and waits until it is dealt with, as far as that can be known. What it was answered.
    pub fn tell(&mut self, request: u32, body: &[u8], files: &[RawFd]) -> Option<Answer> {
        self.send(request, 1 | NEED_REPLY, body, files);
        if request == code::SET_PROTOCOL_FEATURES {
            // The message that accepts acknowledgements is the first to have one.
            let features = body.first_chunk().map_or(0, |bits| u64::from_le_bytes(*bits));
            self.acks = features & REPLY_ACK != 0;
        }
        if self.acks || QUESTIONS.contains(&request) { self.answer() } else { None }
    }

    /// Sends a whole message.
    pub fn send(&mut self, request: u32, flags: u32, body: &[u8], files: &[RawFd]) {
        let header = [request, flags, body.len() as u32];
        let mut bytes: Vec<u8> = header.iter().flat_map(|word| word.to_ne_bytes()).collect();
        bytes.extend_from_slice(body);
        self.send_bytes(&bytes, files);
    }

    /// Sends anything.
    pub fn send_bytes(&mut self, bytes: &[u8], files: &[RawFd]) {
        let control = [ControlMessage::ScmRights(files)];
        let control = if files.is_empty() { &control[..0] } else { &control[..] };
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        let sent = sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None);
        self.over |= sent != Ok(bytes.len());
    }

    /// The next answer; none when the other end has hung up.
    pub fn answer(&mut self) -> Option<Answer> {
        let mut files = Vec::new();
        let header = self.receive(12, &mut files)?;
        let size = u32::from_ne_bytes(*header.last_chunk()?);
        assert!(size <= 4096, "an answer of {size} bytes");
        let body = self.receive(size as usize, &mut files)?;
        assert!(files.len() <= 1, "an answer with {} descriptors", files.len());
        Some((body, files.pop().map(File::from)))
    }

    fn receive(&mut self, count: usize, files: &mut Vec<OwnedFd>) -> Option<Vec<u8>> {
        let mut bytes = vec![0; count];
        let mut incoming = Vmm::new(self.socket.try_clone().unwrap(), &Answered);
        let mut done = 0;
        while done < count && !self.over {
            match incoming.receive(&mut bytes[done..], files) {
                Ok(more @ 1..) => done += more,
                _ => self.over = true,
            }
        }
        (done == count).then_some(bytes)
    }
}

/// Waits for an answer.
struct Answered;

impl Wakeups for Answered {
    fn wait(&self, fd: BorrowedFd<'_>, _: Interest, _: Option<Instant>) -> io::Result<Wake> {
        let limit = PollTimeout::try_from(PATIENCE).unwrap();
        let ready = poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], limit)?;
        assert!(ready > 0, "neither an answer nor a hang-up");
        Ok(Wake::Ready)
    }
}
