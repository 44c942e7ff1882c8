//! A VMM's message: header, body and descriptors, read whole and held to the limits of its kind.

use super::Refusal;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use vhost::vhost_user::message::{
    FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE, VhostUserConfig, VhostUserHeaderFlag,
    VhostUserInflight, VhostUserMemory, VhostUserSingleMemoryRegion, VhostUserVringAddr, VhostUserVringState,
};

/// Request, flags, size of the body: 32 bits each, in the machine's order.
pub const HEADER: usize = 12;

/// The one version of the protocol.
const VERSION: u32 = 1;

/// Where messages come from.
pub trait Receive {
    /// Receives up to `bytes.len()` bytes, and the descriptors that come with them. How many bytes; 0 when no more
    /// will come.
    ///
    /// # Errors
    /// When the VMM is to be dropped.
    fn receive(&mut self, bytes: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> Result<usize, Refusal>;
}

/// A message whose size and number of descriptors are those of its kind. What it says is not looked at yet.
#[derive(Debug)]
pub struct Message {
    /// What is asked.
    pub request: FrontendReq,
    /// An acknowledgement is wanted, where there is no other answer.
    pub need_reply: bool,
    /// All that follows the header.
    pub body: Vec<u8>,
    /// What came with it.
    pub descriptors: Vec<OwnedFd>,
}

/// The limits of a kind of message.
struct Shape {
    body: RangeInclusive<usize>,
    descriptors: RangeInclusive<usize>,
}

/// `None` for what no device of ours offers.
fn shape(request: FrontendReq) -> Option<Shape> {
    use FrontendReq::*;
    const WORD: usize = size_of::<u64>();
    // Without the padding that some add at the end.
    const INFLIGHT: usize = 20;
    let exactly = |bytes| bytes..=bytes;
    let (body, descriptors) = match request {
        GET_FEATURES | GET_PROTOCOL_FEATURES | GET_QUEUE_NUM | GET_MAX_MEM_SLOTS => (exactly(0), 0..=0),
        SET_OWNER | RESET_OWNER => (exactly(0), 0..=0),
        SET_FEATURES | SET_PROTOCOL_FEATURES => (exactly(WORD), 0..=0),
        SET_MEM_TABLE => {
            let most = size_of::<VhostUserMemory>()
                + MAX_ATTACHED_FD_ENTRIES * (size_of::<VhostUserSingleMemoryRegion>() - WORD);
            (size_of::<VhostUserMemory>()..=most, 1..=MAX_ATTACHED_FD_ENTRIES)
        }
        ADD_MEM_REG => (exactly(size_of::<VhostUserSingleMemoryRegion>()), 1..=1),
        // Some send the region's descriptor along.
        REM_MEM_REG => (exactly(size_of::<VhostUserSingleMemoryRegion>()), 0..=1),
        SET_VRING_NUM | SET_VRING_BASE | GET_VRING_BASE | SET_VRING_ENABLE => {
            (exactly(size_of::<VhostUserVringState>()), 0..=0)
        }
        SET_VRING_ADDR => (exactly(size_of::<VhostUserVringAddr>()), 0..=0),
        SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => (exactly(WORD), 0..=1),
        GET_CONFIG | SET_CONFIG => (size_of::<VhostUserConfig>() + 1..=MAX_MSG_SIZE, 0..=0),
        SET_BACKEND_REQ_FD => (exactly(0), 1..=1),
        GET_INFLIGHT_FD => (INFLIGHT..=size_of::<VhostUserInflight>(), 0..=0),
        SET_INFLIGHT_FD => (INFLIGHT..=size_of::<VhostUserInflight>(), 1..=1),
        _ => return None,
    };
    Some(Shape { body, descriptors })
}

impl Message {
    /// Reads the next message. `None` when there is none: the VMM is gone, be it in the middle of one.
    ///
    /// # Errors
    /// When it breaks a limit, or [`Receive::receive`] fails.
    pub fn read(from: &mut impl Receive) -> Result<Option<Message>, Refusal> {
        let mut descriptors = Vec::new();
        let mut header = [0; HEADER];
        if !fill(from, &mut header, &mut descriptors)? {
            return Ok(None);
        }
        let word =
            |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (code, flags, bytes) = (word(0), word(4), word(8) as usize);
        let request = FrontendReq::try_from(code).map_err(|()| Refusal::Unknown(code))?;
        let shape = shape(request).ok_or(Refusal::Unknown(code))?;
        let need_reply = VhostUserHeaderFlag::NEED_REPLY.bits();
        if flags & !need_reply != VERSION {
            return Err(Refusal::Flags { request: code, flags });
        }
        if !shape.body.contains(&bytes) {
            return Err(Refusal::Body { request, bytes });
        }
        let mut body = vec![0; bytes];
        if !fill(from, &mut body, &mut descriptors)? {
            return Ok(None);
        }
        if !shape.descriptors.contains(&descriptors.len()) {
            return Err(Refusal::Descriptors { request, count: descriptors.len() });
        }
        Ok(Some(Message { request, need_reply: flags & need_reply != 0, body, descriptors }))
    }

    /// Whether there is an answer in any case, so that no acknowledgement is asked for.
    pub fn is_question(&self) -> bool {
        use FrontendReq::*;
        matches!(
            self.request,
            GET_FEATURES
                | GET_PROTOCOL_FEATURES
                | GET_QUEUE_NUM
                | GET_MAX_MEM_SLOTS
                | GET_VRING_BASE
                | GET_CONFIG
                | GET_INFLIGHT_FD
        )
    }

    /// The body of a message that is one 64-bit number; 0 in any other.
    pub fn number(&self) -> u64 {
        self.body.as_slice().try_into().map_or(0, u64::from_ne_bytes)
    }

    /// A message as bytes; `flags` without the version.
    pub fn compose(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        for word in [request, flags | VERSION, body.len() as u32] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(body);
        bytes
    }
}

/// Fills `bytes` to the end. False when no more came.
fn fill(from: &mut impl Receive, bytes: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> Result<bool, Refusal> {
    let mut done = 0;
    while done < bytes.len() {
        match from.receive(&mut bytes[done..], descriptors)? {
            0 => return Ok(false),
            count => done += count,
        }
        if descriptors.len() > MAX_ATTACHED_FD_ENTRIES {
            return Err(Refusal::TooManyFds);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    /// Bytes that come a few at a time, with the descriptors before the first.
    struct Script<'a>(&'a [u8], usize, Vec<OwnedFd>);

    impl Receive for Script<'_> {
        fn receive(&mut self, bytes: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> Result<usize, Refusal> {
            descriptors.append(&mut self.2);
            let count = bytes.len().min(self.1).min(self.0.len());
            bytes[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }

    fn read(bytes: &[u8], descriptors: usize) -> Result<Option<Message>, Refusal> {
        let descriptors = (0..descriptors).map(|_| File::open("/dev/null").unwrap().into()).collect();
        Message::read(&mut Script(bytes, 3, descriptors))
    }

    fn compose(request: FrontendReq, body: usize) -> Vec<u8> {
        Message::compose(request.into(), 0, &vec![7; body])
    }

    #[test]
    fn a_message_is_read_whole_and_the_next_is_left() {
        let bytes = [compose(FrontendReq::SET_FEATURES, 8), compose(FrontendReq::SET_OWNER, 0)].concat();
        let mut script = Script(&bytes, 5, Vec::new());
        let first = Message::read(&mut script).unwrap().unwrap();
        assert_eq!((first.request, first.need_reply), (FrontendReq::SET_FEATURES, false));
        assert_eq!(first.number(), 0x0707_0707_0707_0707);
        assert_eq!(Message::read(&mut script).unwrap().unwrap().request, FrontendReq::SET_OWNER);
        assert!(Message::read(&mut script).unwrap().is_none());
    }

    #[test]
    fn a_message_that_is_cut_off_is_none() {
        let bytes = compose(FrontendReq::SET_FEATURES, 8);
        for len in 0..bytes.len() {
            assert!(read(&bytes[..len], 0).unwrap().is_none());
        }
        assert!(read(&bytes, 0).unwrap().is_some());
    }

    #[test]
    fn every_kind_has_its_size() {
        use FrontendReq::*;
        let sizes: [(FrontendReq, &[usize], usize); 12] = [
            (GET_FEATURES, &[0], 0),
            (SET_OWNER, &[0], 0),
            (SET_PROTOCOL_FEATURES, &[8], 0),
            (SET_MEM_TABLE, &[8, 40, 8 + 32 * 32], 1),
            (ADD_MEM_REG, &[40], 1),
            (REM_MEM_REG, &[40], 0),
            (SET_VRING_NUM, &[8], 0),
            (SET_VRING_ADDR, &[40], 0),
            (SET_VRING_KICK, &[8], 1),
            (SET_CONFIG, &[13, 4096], 0),
            (SET_BACKEND_REQ_FD, &[0], 1),
            (SET_INFLIGHT_FD, &[20, 24], 1),
        ];
        for (request, good, descriptors) in sizes {
            for size in good {
                assert!(read(&compose(request, *size), descriptors).is_ok(), "{request:?} of {size}");
            }
            let (least, most) = (good[0], good[good.len() - 1]);
            for size in [least.wrapping_sub(1), most + 1, most + 8] {
                if size < 1 << 16 {
                    let refused = read(&compose(request, size), descriptors);
                    assert!(matches!(refused, Err(Refusal::Body { .. })), "{request:?} of {size}");
                }
            }
        }
    }

    #[test]
    fn descriptors_are_counted() {
        use FrontendReq::*;
        for (request, body, good, bad) in [
            (SET_OWNER, 0, 0, 1),
            (SET_VRING_CALL, 8, 1, 2),
            (ADD_MEM_REG, 40, 1, 0),
            (ADD_MEM_REG, 40, 1, 2),
            (REM_MEM_REG, 40, 1, 2),
            (SET_BACKEND_REQ_FD, 0, 1, 0),
            (SET_INFLIGHT_FD, 24, 1, 2),
            (SET_MEM_TABLE, 40, 32, 0),
        ] {
            let bytes = compose(request, body);
            assert_eq!(read(&bytes, good).unwrap().unwrap().descriptors.len(), good);
            assert!(matches!(read(&bytes, bad), Err(Refusal::Descriptors { .. })), "{request:?} with {bad}");
        }
        assert!(matches!(read(&compose(SET_MEM_TABLE, 40), 33), Err(Refusal::TooManyFds)));
    }

    #[test]
    fn headers_that_mean_nothing() {
        let header = |code: u32, flags: u32, size: u32| {
            let words = [code, flags, size];
            words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>()
        };
        for flags in [0, 2, 3, 1 | 4, 1 | 16, 1 | 1 << 31] {
            assert!(matches!(read(&header(1, flags, 0), 0), Err(Refusal::Flags { .. })), "{flags:#x}");
        }
        assert!(read(&header(1, 1 | 8, 0), 0).unwrap().unwrap().need_reply);
        for code in [0, 6, 7, 22, 33, 42, 45, 1000, u32::MAX] {
            assert!(matches!(read(&header(code, 1, 0), 0), Err(Refusal::Unknown(_))), "{code}");
        }
        // Refused before anything is made for the body.
        assert!(matches!(read(&header(1, 1, u32::MAX), 0), Err(Refusal::Body { .. })));
    }
}
