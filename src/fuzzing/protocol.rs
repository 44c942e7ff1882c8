//! What the relay reads of a VMM's messages, and what it makes of those about memory.

use super::Input;
use crate::frontend::vhost_user::budget::MemoryBudget;
use crate::frontend::vhost_user::protocol::{Message, Receive, Refusal, Regions, Shape, check};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

/// No message is longer, nor comes with more descriptors.
const MOST_BYTES: usize = 4096;
const MOST_DESCRIPTORS: usize = 32;

/// Of the file behind every descriptor.
const FILE: u64 = 1 << 20;

/// Of the device.
const SHAPE: Shape = Shape { queues: 4, queue_size: 256 };

/// Any bytes: how they are cut, then the stream. A message that is let pass is no longer than messages are, and is
/// what was sent; memory that is let pass lies inside its file.
pub fn protocol(bytes: &[u8]) {
    let mut input = Input(bytes);
    let (step, fds) = (1 + usize::from(input.u8()), usize::from(input.u8()));
    let mut stream = Stream { rest: input.0, step, fds, given: 0 };
    let mut regions = Regions::none(MemoryBudget::of_process(1).share());
    loop {
        let before = stream.rest;
        stream.given = 0;
        let Ok(Some(mut message)) = Message::read(&mut stream) else { return };
        let used = before.len() - stream.rest.len();
        assert!(message.body.len() <= MOST_BYTES && message.descriptors.len() <= MOST_DESCRIPTORS);
        assert_eq!(message.descriptors.len(), stream.given, "descriptors are neither lost nor kept");
        let flags = if message.need_reply { 8 } else { 0 };
        assert_eq!(Message::compose(message.request.into(), flags, &message.body), before[..used]);
        message.number();
        message.is_question();
        let count = message.descriptors.len();
        match regions.after(&mut message) {
            Ok(Some(change)) => regions = change.regions,
            Ok(None) => {}
            Err(_) => return,
        }
        if check(&mut message, SHAPE, &regions).is_err() {
            return;
        }
        assert_eq!(message.descriptors.len(), count, "descriptors are neither lost nor kept");
    }
}

/// A connection whose bytes come a few at a time, and whose descriptors all at once.
struct Stream<'a> {
    rest: &'a [u8],
    step: usize,
    fds: usize,
    given: usize,
}

thread_local! {
    static MEMORY: File = {
        let file = File::from(memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(FILE).unwrap();
        file
    };
}

impl Receive for Stream<'_> {
    fn receive(&mut self, bytes: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> Result<usize, Refusal> {
        let count = bytes.len().min(self.step).min(self.rest.len());
        let (now, rest) = self.rest.split_at(count);
        bytes[..count].copy_from_slice(now);
        self.rest = rest;
        // Bit 6: with the body and not the header; the rest, up to more than there may be: how many.
        let body = bytes.len() != 12;
        if self.given == 0 && (self.fds & 64 != 0) == body {
            self.given = self.fds & 63;
            MEMORY.with(|file| {
                descriptors.extend((0..self.given).map(|_| file.as_fd().try_clone_to_owned().unwrap()));
            });
        }
        Ok(count)
    }
}
