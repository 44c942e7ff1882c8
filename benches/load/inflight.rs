//! In-flight tracking for a VMM's side that has none: a relay that puts the messages in between.
//!
//! All it changes is the handshake; requests go through shared memory as ever.

use crate::Result;
use nix::cmsg_space;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use tempfile::TempDir;

const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_NUM: u32 = 8;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
const INFLIGHT_SHMFD: u64 = 1 << 12;

/// A message: request, flags and payload, with its descriptors.
struct Message {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

/// Where to connect to instead of `path`, for a device of so many queues of `size`. For one connection.
pub fn relay(path: &Path, queues: u16, size: u16) -> Result<(TempDir, PathBuf)> {
    let dir = tempfile::tempdir()?;
    let own = dir.path().join("relay");
    let listener = UnixListener::bind(&own)?;
    let server = UnixStream::connect(path)?;
    thread::spawn(move || {
        if let Err(error) =
            listener.accept().map_err(Into::into).and_then(|(client, _)| pass(&client, &server, queues, size))
        {
            eprintln!("load: the relay: {error}");
        }
    });
    Ok((dir, own))
}

/// Passes messages on, both ways, until either side is gone.
fn pass(client: &UnixStream, server: &UnixStream, queues: u16, size: u16) -> Result<()> {
    let mut tracked = false;
    loop {
        let mut fds = [client, server].map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN));
        poll(&mut fds, PollTimeout::NONE)?;
        let [from_client, from_server] = fds.map(|fd| fd.any().unwrap_or(true));
        if from_server {
            let Some(mut reply) = receive(server)? else { return Ok(()) };
            if reply.request() == GET_PROTOCOL_FEATURES && reply.word(12) & INFLIGHT_SHMFD == 0 {
                return Err("the server does not track what is in flight".into());
            }
            reply.send(client)?;
        } else if from_client {
            let Some(mut message) = receive(client)? else { return Ok(()) };
            if message.request() == SET_PROTOCOL_FEATURES {
                let features = message.word(12) | INFLIGHT_SHMFD;
                message.bytes[12..20].copy_from_slice(&features.to_ne_bytes());
            }
            if message.request() == SET_VRING_NUM && !tracked {
                track(server, queues, size)?;
                tracked = true;
            }
            message.send(server)?;
        }
    }
}

/// Asks for a region, and hands it back to be used.
fn track(server: &UnixStream, queues: u16, size: u16) -> Result<()> {
    let mut payload = [0; 24];
    payload[16..18].copy_from_slice(&queues.to_ne_bytes());
    payload[18..20].copy_from_slice(&size.to_ne_bytes());
    Message::new(GET_INFLIGHT_FD, &payload).send(server)?;
    let region = receive(server)?.ok_or("the server is gone")?;
    let mut answer = Message::new(SET_INFLIGHT_FD, &region.bytes[12..]);
    answer.fds = region.fds;
    answer.send(server)
}

impl Message {
    fn new(request: u32, payload: &[u8]) -> Message {
        // Version 1.
        let header = [request, 1, payload.len() as u32];
        let mut bytes: Vec<u8> = header.iter().flat_map(|word| word.to_ne_bytes()).collect();
        bytes.extend(payload);
        Message { bytes, fds: Vec::new() }
    }

    fn request(&self) -> u32 {
        u32::from_ne_bytes(self.bytes[..4].try_into().expect("four bytes"))
    }

    fn word(&self, at: usize) -> u64 {
        self.bytes.get(at..at + 8).map_or(0, |word| u64::from_ne_bytes(word.try_into().expect("eight bytes")))
    }

    fn send(&mut self, to: &UnixStream) -> Result<()> {
        let raw: Vec<RawFd> = self.fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
        let sent = sendmsg::<()>(
            to.as_raw_fd(),
            &[IoSlice::new(&self.bytes)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        if sent < self.bytes.len() { Err("a message was cut short".into()) } else { Ok(()) }
    }
}

/// The next message; `None` when there will be no more.
fn receive(from: &UnixStream) -> Result<Option<Message>> {
    let mut header = [0; 12];
    let Some(fds) = receive_part(from, &mut header)? else { return Ok(None) };
    let length = u32::from_ne_bytes(header[8..].try_into().expect("four bytes")) as usize;
    let mut bytes = header.to_vec();
    bytes.resize(12 + length, 0);
    if length > 0 && receive_part(from, &mut bytes[12..])?.is_none() {
        return Ok(None);
    }
    Ok(Some(Message { bytes, fds }))
}

fn receive_part(from: &UnixStream, into: &mut [u8]) -> Result<Option<Vec<OwnedFd>>> {
    let mut space = cmsg_space!([RawFd; 32]);
    let wanted = into.len();
    let mut parts = [IoSliceMut::new(into)];
    let flags = MsgFlags::MSG_WAITALL | MsgFlags::MSG_CMSG_CLOEXEC;
    let got = match recvmsg::<()>(from.as_raw_fd(), &mut parts, Some(&mut space), flags) {
        Err(nix::errno::Errno::ECONNRESET) => return Ok(None),
        got => got?,
    };
    let mut fds = Vec::new();
    for message in got.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = message {
            // SAFETY: the kernel has just made them for us.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if got.bytes < wanted { Ok(None) } else { Ok(Some(fds)) }
}
