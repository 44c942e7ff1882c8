//! The bytes of the NBD protocol: requests written, replies and option replies read. No I/O here.
//!
//! Names and values are those of the protocol document (`doc/proto.md` of the NBD project). What comes from
//! the server is checked for form here and against the request it answers in [`pending`](super::pending).

#![forbid(unsafe_code)]
#![allow(dead_code, reason = "a family of values is given whole, whichever of them we use")]

use crate::block::Errno;

/// First eight bytes of any server.
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second eight bytes of a newstyle server, and the first of each option sent to it.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// Second eight bytes of an oldstyle server.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// First eight bytes of an option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Handshake flags, and the client's answer to each (`NBD_FLAG_C_*`).
pub const NBD_FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
pub const NBD_FLAG_NO_ZEROES: u16 = 1 << 1;

/// Transmission flags.
pub const NBD_FLAG_HAS_FLAGS: u16 = 1 << 0;
pub const NBD_FLAG_READ_ONLY: u16 = 1 << 1;
pub const NBD_FLAG_SEND_FLUSH: u16 = 1 << 2;
pub const NBD_FLAG_SEND_FUA: u16 = 1 << 3;
pub const NBD_FLAG_SEND_TRIM: u16 = 1 << 5;
pub const NBD_FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
pub const NBD_FLAG_CAN_MULTI_CONN: u16 = 1 << 8;

/// Options.
pub const NBD_OPT_EXPORT_NAME: u32 = 1;
pub const NBD_OPT_ABORT: u32 = 2;
pub const NBD_OPT_STARTTLS: u32 = 5;
pub const NBD_OPT_GO: u32 = 7;
pub const NBD_OPT_STRUCTURED_REPLY: u32 = 8;

/// Option reply types; all errors have bit 31.
pub const NBD_REP_ACK: u32 = 1;
pub const NBD_REP_INFO: u32 = 3;
pub const NBD_REP_FLAG_ERROR: u32 = 1 << 31;
pub const NBD_REP_ERR_UNSUP: u32 = NBD_REP_FLAG_ERROR | 1;
pub const NBD_REP_ERR_POLICY: u32 = NBD_REP_FLAG_ERROR | 2;
pub const NBD_REP_ERR_INVALID: u32 = NBD_REP_FLAG_ERROR | 3;
pub const NBD_REP_ERR_PLATFORM: u32 = NBD_REP_FLAG_ERROR | 4;
pub const NBD_REP_ERR_TLS_REQD: u32 = NBD_REP_FLAG_ERROR | 5;
pub const NBD_REP_ERR_UNKNOWN: u32 = NBD_REP_FLAG_ERROR | 6;
pub const NBD_REP_ERR_SHUTDOWN: u32 = NBD_REP_FLAG_ERROR | 7;
pub const NBD_REP_ERR_BLOCK_SIZE_REQD: u32 = NBD_REP_FLAG_ERROR | 8;

/// Kinds of information in `NBD_REP_INFO`.
pub const NBD_INFO_EXPORT: u16 = 0;
pub const NBD_INFO_BLOCK_SIZE: u16 = 3;

/// Requests.
pub const NBD_REQUEST_MAGIC: u32 = 0x2560_9513;
pub const NBD_CMD_FLAG_FUA: u16 = 1 << 0;
pub const NBD_CMD_FLAG_NO_HOLE: u16 = 1 << 1;

/// Replies.
pub const NBD_SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub const NBD_STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
pub const NBD_REPLY_FLAG_DONE: u16 = 1 << 0;
pub const NBD_REPLY_TYPE_NONE: u16 = 0;
pub const NBD_REPLY_TYPE_OFFSET_DATA: u16 = 1;
pub const NBD_REPLY_TYPE_OFFSET_HOLE: u16 = 2;
pub const NBD_REPLY_TYPE_BLOCK_STATUS: u16 = 5;
pub const NBD_REPLY_FLAG_ERROR: u16 = 1 << 15;
pub const NBD_REPLY_TYPE_ERROR: u16 = NBD_REPLY_FLAG_ERROR | 1;
pub const NBD_REPLY_TYPE_ERROR_OFFSET: u16 = NBD_REPLY_FLAG_ERROR | 2;

/// Errors.
pub const NBD_EPERM: u32 = 1;
pub const NBD_EIO: u32 = 5;
pub const NBD_ENOMEM: u32 = 12;
pub const NBD_EINVAL: u32 = 22;
pub const NBD_ENOSPC: u32 = 28;
pub const NBD_EOVERFLOW: u32 = 75;
pub const NBD_ENOTSUP: u32 = 95;
pub const NBD_ESHUTDOWN: u32 = 108;

/// A string of the protocol is never longer, in bytes.
pub const MAX_STRING: usize = 4096;

/// What a client does to an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
#[allow(non_camel_case_types, reason = "the protocol's names")]
pub enum Command {
    NBD_CMD_READ = 0,
    NBD_CMD_WRITE = 1,
    NBD_CMD_DISC = 2,
    NBD_CMD_FLUSH = 3,
    NBD_CMD_TRIM = 4,
    NBD_CMD_WRITE_ZEROES = 6,
}

/// A request, without the payload of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// `NBD_CMD_FLAG_*`.
    pub flags: u16,
    /// What to do.
    pub command: Command,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

impl Request {
    /// Bytes of a request header.
    pub const SIZE: usize = 28;

    /// As it goes over the wire. The server's reply carries the cookie.
    pub fn encode(&self, cookie: u64) -> [u8; Request::SIZE] {
        let mut bytes = [0; Request::SIZE];
        bytes[0..4].copy_from_slice(&NBD_REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&(self.command as u16).to_be_bytes());
        bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// Bytes of payload that follow the header.
    pub fn payload(&self) -> usize {
        if self.command == Command::NBD_CMD_WRITE { self.length as usize } else { 0 }
    }
}

/// What a server did that no server may. The connection is of no use any more: where the next reply starts
/// cannot be known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Neither kind of reply starts so.
    #[error("a reply starts with {0:#010x}")]
    Magic(u32),
    /// The chunk's length does not fit its type.
    #[error("a reply chunk of type {kind:#x} has {length} bytes")]
    Length {
        /// As sent.
        kind: u16,
        /// As sent.
        length: u32,
    },
    /// A type that we did not ask for.
    #[error("a reply chunk has type {0:#x}")]
    Type(u16),
    /// `NBD_REPLY_TYPE_NONE` ends a reply.
    #[error("an empty reply chunk without the done flag")]
    NotDone,
    /// Error 0.
    #[error("an error chunk without an error")]
    NoError,
    /// No request in flight has this cookie.
    #[error("a reply has cookie {0:#018x}, which no request has")]
    Cookie(u64),
    /// A reply to something that was not sent yet.
    #[error("a reply before its request")]
    Early,
    /// Structured replies were not negotiated.
    #[error("a structured reply, which was not negotiated")]
    Unasked,
    /// With structured replies negotiated a read is answered by nothing else.
    #[error("a simple reply to a read, in spite of structured replies")]
    Simple,
    /// Only a read is answered with data.
    #[error("data in reply to {0:?}")]
    Data(Command),
    /// Outside what was asked for.
    #[error("{length} bytes at {offset} in reply to a read of other bytes")]
    Range {
        /// As sent.
        offset: u64,
        /// As sent.
        length: u32,
    },
    /// The same byte twice.
    #[error("{length} bytes at {offset} were sent twice in one reply")]
    Overlap {
        /// As sent.
        offset: u64,
        /// As sent.
        length: u32,
    },
    /// More separate pieces than a sane server makes.
    #[error("a reply in too many pieces")]
    Pieces,
    /// Success claimed too soon.
    #[error("a read ended without all of its data")]
    Incomplete,
}

/// The head of a reply or of a chunk of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Of the request.
    pub cookie: u64,
    /// Nothing more comes for this request.
    pub done: bool,
    /// What it says.
    pub body: Body,
}

/// What a frame says. The bytes of `Simple` success on a read and of `Data` follow the frame's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// A simple reply; 0 is success.
    Simple { error: u32 },
    /// No more.
    None,
    /// Data of the export at `offset` follows.
    Data { offset: u64, length: u32 },
    /// The export reads zero there.
    Hole { offset: u64, length: u32 },
    /// The request failed; `skip` bytes of text for people (and details) follow.
    Error { error: u32, skip: u32 },
}

/// What was made of the bytes at hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// Call again with at least this many bytes.
    More(usize),
    /// The head takes `size` bytes; what follows it, `frame` says.
    Frame { size: usize, frame: Frame },
}

/// Enough bytes for any frame's head.
pub const MAX_HEAD: usize = CHUNK + 12;
const SIMPLE: usize = 16;
const CHUNK: usize = 20;

/// Longest text of an error chunk, with what a future error type may add.
const MAX_ERROR: u32 = 6 + 65_535 + 1024;

/// Reads the head of the next frame from the bytes at hand, of which there may be too few or too many.
///
/// # Errors
/// When no server may send this.
pub fn decode(bytes: &[u8]) -> Result<Decoded, Violation> {
    if bytes.len() < SIMPLE {
        return Ok(Decoded::More(SIMPLE));
    }
    match be32(bytes, 0) {
        NBD_SIMPLE_REPLY_MAGIC => {
            let body = Body::Simple { error: be32(bytes, 4) };
            Ok(Decoded::Frame { size: SIMPLE, frame: Frame { cookie: be64(bytes, 8), done: true, body } })
        }
        NBD_STRUCTURED_REPLY_MAGIC if bytes.len() < CHUNK => Ok(Decoded::More(CHUNK)),
        NBD_STRUCTURED_REPLY_MAGIC => chunk(bytes),
        other => Err(Violation::Magic(other)),
    }
}

fn chunk(bytes: &[u8]) -> Result<Decoded, Violation> {
    let (flags, kind, length) = (be16(bytes, 4), be16(bytes, 6), be32(bytes, 16));
    let wrong = Violation::Length { kind, length };
    let done = flags & NBD_REPLY_FLAG_DONE != 0;
    // How much of the payload belongs to the head.
    let fixed = match kind {
        NBD_REPLY_TYPE_NONE if length != 0 => return Err(wrong),
        NBD_REPLY_TYPE_NONE if !done => return Err(Violation::NotDone),
        NBD_REPLY_TYPE_NONE => 0,
        NBD_REPLY_TYPE_OFFSET_DATA if length < 9 => return Err(wrong),
        NBD_REPLY_TYPE_OFFSET_DATA => 8,
        NBD_REPLY_TYPE_OFFSET_HOLE if length != 12 => return Err(wrong),
        NBD_REPLY_TYPE_OFFSET_HOLE => 12,
        NBD_REPLY_TYPE_ERROR_OFFSET if length < 14 => return Err(wrong),
        _ if kind & NBD_REPLY_FLAG_ERROR != 0 && !(6..=MAX_ERROR).contains(&length) => return Err(wrong),
        _ if kind & NBD_REPLY_FLAG_ERROR != 0 => 6,
        other => return Err(Violation::Type(other)),
    };
    let size = CHUNK + fixed;
    if bytes.len() < size {
        return Ok(Decoded::More(size));
    }
    let body = match kind {
        NBD_REPLY_TYPE_NONE => Body::None,
        NBD_REPLY_TYPE_OFFSET_DATA => Body::Data { offset: be64(bytes, CHUNK), length: length - 8 },
        NBD_REPLY_TYPE_OFFSET_HOLE => match be32(bytes, CHUNK + 8) {
            0 => return Err(wrong),
            length => Body::Hole { offset: be64(bytes, CHUNK), length },
        },
        _ => {
            let text = u32::from(be16(bytes, CHUNK + 4));
            let rest = if kind == NBD_REPLY_TYPE_ERROR_OFFSET { 8 } else { 0 };
            if text > length - 6 - rest {
                return Err(wrong);
            }
            match be32(bytes, CHUNK) {
                0 => return Err(Violation::NoError),
                error => Body::Error { error, skip: length - 6 },
            }
        }
    };
    Ok(Decoded::Frame { size, frame: Frame { cookie: be64(bytes, 8), done, body } })
}

/// An error of the protocol as Linux has it. One that the protocol does not list counts as `EINVAL`, as the
/// document says.
pub fn errno(error: u32) -> Errno {
    Errno::new(match error {
        NBD_EPERM => libc::EPERM,
        NBD_EIO => libc::EIO,
        NBD_ENOMEM => libc::ENOMEM,
        NBD_ENOSPC => libc::ENOSPC,
        NBD_EOVERFLOW => libc::EOVERFLOW,
        NBD_ENOTSUP => libc::EOPNOTSUPP,
        NBD_ESHUTDOWN => libc::ESHUTDOWN,
        _ => libc::EINVAL,
    })
}

/// Big-endian numbers at a place the caller knows to be there; a short slice reads as if zeroes followed.
pub fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(array(bytes, at))
}

/// See [`be16`].
pub fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array(bytes, at))
}

/// See [`be16`].
pub fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(array(bytes, at))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    let rest = bytes.get(at..).unwrap_or_default();
    let count = N.min(rest.len());
    array[..count].copy_from_slice(&rest[..count]);
    array
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A simple reply, as a server writes it.
    pub fn simple(cookie: u64, error: u32) -> Vec<u8> {
        let head = [NBD_SIMPLE_REPLY_MAGIC.to_be_bytes(), error.to_be_bytes()].concat();
        [head, cookie.to_be_bytes().to_vec()].concat()
    }

    /// A chunk, as a server writes it; `length` is the true one.
    pub fn structured(cookie: u64, done: bool, kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = NBD_STRUCTURED_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend(u16::from(done).to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend((payload.len() as u32).to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    fn frame(bytes: &[u8]) -> (usize, Frame) {
        // Every shorter prefix asks for more, and for no more than there is.
        for len in 0..bytes.len() {
            match decode(&bytes[..len]) {
                Ok(Decoded::More(wanted)) => assert!(len < wanted && wanted <= MAX_HEAD),
                Ok(Decoded::Frame { size, .. }) => assert!(size <= len),
                Err(violation) => panic!("{violation} in a prefix of a good frame"),
            }
        }
        match decode(bytes) {
            Ok(Decoded::Frame { size, frame }) => (size, frame),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_request_is_28_bytes_in_network_order() {
        let request = Request {
            flags: NBD_CMD_FLAG_FUA,
            command: Command::NBD_CMD_WRITE,
            offset: 0x0102_0304_0506_0708,
            length: 0x090a_0b0c,
        };
        let bytes = request.encode(0x1112_1314_1516_1718);
        let expected = [
            0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18, 1, 2, 3, 4,
            5, 6, 7, 8, 9, 10, 11, 12,
        ];
        assert_eq!(bytes, expected);
        assert_eq!(request.payload(), 0x090a_0b0c);
        assert_eq!(Request { command: Command::NBD_CMD_READ, ..request }.payload(), 0);
    }

    #[test]
    fn frames_are_read_whole() {
        assert_eq!(
            frame(&simple(7, 5)),
            (16, Frame { cookie: 7, done: true, body: Body::Simple { error: 5 } })
        );
        assert_eq!(
            frame(&structured(8, true, NBD_REPLY_TYPE_NONE, &[])),
            (20, Frame { cookie: 8, done: true, body: Body::None })
        );
        let data = [9u64.to_be_bytes().as_slice(), &[1, 2, 3]].concat();
        assert_eq!(
            frame(&structured(8, false, NBD_REPLY_TYPE_OFFSET_DATA, &data)),
            (28, Frame { cookie: 8, done: false, body: Body::Data { offset: 9, length: 3 } })
        );
        let hole = [9u64.to_be_bytes().as_slice(), &512u32.to_be_bytes()].concat();
        assert_eq!(
            frame(&structured(8, true, NBD_REPLY_TYPE_OFFSET_HOLE, &hole)),
            (32, Frame { cookie: 8, done: true, body: Body::Hole { offset: 9, length: 512 } })
        );
        let error = [28u32.to_be_bytes().as_slice(), &4u16.to_be_bytes(), b"full", &[0; 8]].concat();
        for kind in [NBD_REPLY_TYPE_ERROR, NBD_REPLY_TYPE_ERROR_OFFSET, 0xffff] {
            assert_eq!(
                frame(&structured(8, true, kind, &error)),
                (26, Frame { cookie: 8, done: true, body: Body::Error { error: 28, skip: 12 } })
            );
        }
    }

    #[test]
    fn frames_that_cannot_be_are_refused() {
        let refused = |bytes: &[u8]| decode(bytes).unwrap_err();
        assert_eq!(refused(&[0xff; 40]), Violation::Magic(0xffff_ffff));
        assert_eq!(refused(&structured(1, false, NBD_REPLY_TYPE_NONE, &[])), Violation::NotDone);
        assert_eq!(refused(&structured(1, true, NBD_REPLY_TYPE_BLOCK_STATUS, &[0; 12])), Violation::Type(5));
        let length = |kind, payload: &[u8]| {
            let length = payload.len() as u32;
            assert_eq!(refused(&structured(1, true, kind, payload)), Violation::Length { kind, length });
        };
        length(NBD_REPLY_TYPE_NONE, &[0]);
        length(NBD_REPLY_TYPE_OFFSET_DATA, &[0; 8]);
        length(NBD_REPLY_TYPE_OFFSET_HOLE, &[1; 11]);
        length(NBD_REPLY_TYPE_OFFSET_HOLE, &[0; 12]);
        length(NBD_REPLY_TYPE_ERROR, &[1; 5]);
        length(NBD_REPLY_TYPE_ERROR, &[0, 0, 0, 5, 0, 1]);
        length(NBD_REPLY_TYPE_ERROR_OFFSET, &[0, 0, 0, 5, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
        length(NBD_REPLY_TYPE_ERROR, &vec![1; MAX_ERROR as usize + 1]);
        assert_eq!(refused(&structured(1, true, NBD_REPLY_TYPE_ERROR, &[0; 6])), Violation::NoError);
    }

    #[test]
    fn errors_become_linux_errors() {
        assert_eq!(errno(NBD_ENOSPC), Errno::ENOSPC);
        assert_eq!(errno(NBD_ENOTSUP), Errno::EOPNOTSUPP);
        for unknown in [0, 2, 1000, u32::MAX] {
            assert_eq!(errno(unknown), Errno::EINVAL);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(
            structured: bool,
            kind in prop_oneof![0u16..7, 0x8000u16..0x8004, any::<u16>()],
            length in prop_oneof![0u32..40, any::<u32>()],
            rest in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let magic = if structured { NBD_STRUCTURED_REPLY_MAGIC } else { NBD_SIMPLE_REPLY_MAGIC };
            let mut bytes = magic.to_be_bytes().to_vec();
            bytes.extend([0, rest.first().copied().unwrap_or(1)]);
            bytes.extend(kind.to_be_bytes());
            bytes.extend(7u64.to_be_bytes());
            bytes.extend(length.to_be_bytes());
            bytes.extend(&rest);
            match decode(&bytes) {
                Ok(Decoded::More(wanted)) => prop_assert!(bytes.len() < wanted && wanted <= MAX_HEAD),
                Ok(Decoded::Frame { size, frame }) => {
                    prop_assert!(size <= bytes.len() && size <= MAX_HEAD);
                    if let Body::Error { error, skip } = frame.body {
                        prop_assert!(error != 0 && skip <= MAX_ERROR);
                    }
                }
                Err(_) => {}
            }
        }
    }
}
