//! The protocol as bytes, for what no library would send.

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::io::{IoSlice, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Version 1.
pub const VERSION: u32 = 1;
/// Version 1, and an answer is wanted.
pub const NEED_REPLY: u32 = 1 | 1 << 3;

/// Request codes of the vhost-user specification.
pub mod code {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

/// A message.
pub fn message(code: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [code, flags, body.len() as u32] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(body);
    bytes
}

/// A body of 64-bit words.
pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A body of 32-bit words.
pub fn halves(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A connection.
pub struct Wire(pub UnixStream);

impl Wire {
    /// Connects and says nothing.
    pub fn connect(socket: &Path) -> Wire {
        Wire(UnixStream::connect(socket).unwrap())
    }

    /// Connects and gets as far as accepted features.
    pub fn greeted(socket: &Path) -> Wire {
        Wire::greeted_with(socket, 0)
    }

    /// The same, with more protocol features than everybody has.
    pub fn greeted_with(socket: &Path, more: u64) -> Wire {
        let wire = Wire::connect(socket);
        wire.send(&message(code::SET_OWNER, VERSION, &[]), &[]);
        wire.send(&message(code::GET_FEATURES, VERSION, &[]), &[]);
        let mut reply = [0; 20];
        (&wire.0).read_exact(&mut reply).unwrap();
        wire.send(
            &message(code::SET_PROTOCOL_FEATURES, VERSION, &words(&[1 | 1 << 3 | 1 << 9 | 1 << 15 | more])),
            &[],
        );
        wire.send(&message(code::SET_FEATURES, VERSION, &reply[12..]), &[]);
        wire
    }

    /// Sends bytes with descriptors. What the other end will not take any more is lost.
    pub fn send(&self, bytes: &[u8], fds: &[RawFd]) {
        let control = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &control[..0] } else { &control[..] };
        let flags = MsgFlags::MSG_NOSIGNAL;
        let _ = sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None);
    }

    /// Whether the other end hangs up within `limit`, after whatever it still says.
    pub fn hangs_up(&mut self, limit: Duration) -> bool {
        self.0.set_read_timeout(Some(limit)).unwrap();
        let mut rest = [0; 4096];
        loop {
            match self.0.read(&mut rest) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return true,
                Err(_) => return false,
            }
        }
    }

    /// The 64-bit answer to a message that wanted one; `None` when the other end hung up instead.
    pub fn answer(&mut self) -> Option<u64> {
        self.0.set_read_timeout(Some(super::PATIENCE)).unwrap();
        let mut reply = [0; 20];
        self.0.read_exact(&mut reply).ok()?;
        Some(u64::from_le_bytes(reply[12..].try_into().unwrap()))
    }
}
