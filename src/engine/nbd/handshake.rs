//! The handshake: fixed newstyle, blocking, for the service thread and the connecting threads.
//!
//! Contract: it ends. The number of replies and the length of each are bounded here, the time by the stream
//! (see [`connect`](super::connect)).

#![forbid(unsafe_code)]

use super::Error;
use super::protocol::*;
use std::io::{self, Read, Write};

/// What the server says of an export, for as long as it is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// Bytes.
    pub size: u64,
    /// `NBD_FLAG_*`.
    pub flags: u16,
    /// What requests have to keep to.
    pub blocks: Blocks,
}

/// Block sizes in bytes, as `NBD_INFO_BLOCK_SIZE` has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// What offsets and lengths are multiples of: a power of two, at most 64 KiB.
    pub minimum: u32,
    /// What they had better be: a power of two.
    pub preferred: u32,
    /// The most a read or a write may carry.
    pub maximum: u32,
}

impl Default for Blocks {
    /// What the document has a client assume of a server that does not say.
    fn default() -> Blocks {
        Blocks { minimum: 512, preferred: 4096, maximum: 32 << 20 }
    }
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The export.
    pub export: Export,
    /// Reads are answered with structured replies.
    pub structured: bool,
}

/// A server's reason that goes by itself.
pub const SHUTTING_DOWN: &str = "it is shutting down";

/// What the server did when the stream failed.
pub fn failure(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "the server hung up during the handshake",
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            "the server broke the connection off during the handshake"
        }
        io::ErrorKind::TimedOut => "the server is silent during the handshake",
        _ => "the handshake failed",
    }
}

/// Replies to one option that we listen to.
const MAX_REPLIES: usize = 64;

/// The whole of it without TLS.
#[cfg(any(test, fuzzing))]
pub fn negotiate<S: Read + Write>(stream: &mut S, name: &[u8]) -> Result<Negotiated, Error> {
    let greeting = greet(stream)?;
    agree(stream, greeting, name)
}

/// How a server greeted us.
#[derive(Clone, Copy, Debug)]
pub struct Greeting {
    /// It leaves zeroes out that mean nothing.
    no_zeroes: bool,
}

/// Listens to the server's greeting and answers it.
///
/// # Errors
/// As for [`agree`].
pub fn greet<S: Read + Write>(stream: &mut S) -> Result<Greeting, Error> {
    let greeting: [u8; 16] = read(stream)?;
    match (be64(&greeting, 0), be64(&greeting, 8)) {
        (NBDMAGIC, IHAVEOPT) => {}
        (NBDMAGIC, OLDSTYLE_MAGIC) => return Err(Error::Protocol("it only knows the oldstyle handshake")),
        _ => return Err(Error::Protocol("it is no NBD server: its greeting is another one")),
    }
    let flags = u16::from_be_bytes(read(stream)?);
    if flags & NBD_FLAG_FIXED_NEWSTYLE == 0 {
        return Err(Error::Protocol("it does not know the fixed newstyle handshake"));
    }
    let no_zeroes = flags & NBD_FLAG_NO_ZEROES != 0;
    let flags = u32::from(flags & (NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES));
    stream.write_all(&flags.to_be_bytes()).map_err(Error::Io)?;
    Ok(Greeting { no_zeroes })
}

/// Asks for TLS, which is to begin then. Nothing of what was said before it counts.
///
/// # Errors
/// As for [`agree`]; also when the server has no TLS: there is no way without it.
pub fn start_tls<S: Read + Write>(stream: &mut S) -> Result<(), Error> {
    match ask(stream, NBD_OPT_STARTTLS, &[])? {
        Answer::Acknowledged(_) => Ok(()),
        Answer::Refused { code, text } => {
            let _ = send(stream, NBD_OPT_ABORT, &[]);
            let text = if text.is_empty() { reason(code).to_owned() } else { text };
            Err(Error::Tls(format!("the server does not offer it: {text}")))
        }
    }
}

/// Asks for the export called `name` and enters the transmission phase.
///
/// # Errors
/// What the stream says, what the server refuses, and what it may not say.
pub fn agree<S: Read + Write>(stream: &mut S, greeting: Greeting, name: &[u8]) -> Result<Negotiated, Error> {
    let structured = match ask(stream, NBD_OPT_STRUCTURED_REPLY, &[])? {
        Answer::Acknowledged(_) => true,
        // Whatever the reason, what it means is simple replies; what is really wrong the next option tells.
        Answer::Refused { .. } => false,
    };
    let export = match ask(stream, NBD_OPT_GO, &go(name))? {
        Answer::Acknowledged(infos) => export(&infos)?,
        Answer::Refused { code: NBD_REP_ERR_UNSUP, .. } => export_name(stream, name, greeting.no_zeroes)?,
        Answer::Refused { code, text } => {
            // A courtesy: what the server makes of it does not matter any more.
            let _ = send(stream, NBD_OPT_ABORT, &[]);
            return Err(Error::Refused { reason: reason(code), text });
        }
    };
    Ok(Negotiated { export, structured })
}

/// The data of `NBD_OPT_GO`: the name, and the kinds of information asked for.
fn go(name: &[u8]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name);
    data.extend(1u16.to_be_bytes());
    data.extend(NBD_INFO_BLOCK_SIZE.to_be_bytes());
    data
}

/// The old way in, which tells no reason when it fails.
fn export_name<S: Read + Write>(stream: &mut S, name: &[u8], no_zeroes: bool) -> Result<Export, Error> {
    send(stream, NBD_OPT_EXPORT_NAME, name)?;
    let bytes: [u8; 10] = read(stream).map_err(|error| match error {
        Error::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => Error::Refused {
            reason: "it hung up, as old servers do for an unknown name",
            text: String::new(),
        },
        other => other,
    })?;
    if !no_zeroes {
        read::<124, _>(stream)?;
    }
    Ok(Export { size: be64(&bytes, 0), flags: transmission(be16(&bytes, 8)), blocks: Blocks::default() })
}

/// Flags without `NBD_FLAG_HAS_FLAGS` are none.
fn transmission(flags: u16) -> u16 {
    if flags & NBD_FLAG_HAS_FLAGS == 0 { 0 } else { flags }
}

/// Puts together what `NBD_REP_INFO` said.
fn export(infos: &[Vec<u8>]) -> Result<Export, Error> {
    let mut found = None;
    let mut blocks = Blocks::default();
    for info in infos {
        match (be16(info, 0), info.len()) {
            (NBD_INFO_EXPORT, 12) => found = Some((be64(info, 2), transmission(be16(info, 10)))),
            (NBD_INFO_BLOCK_SIZE, 14) => {
                blocks = Blocks { minimum: be32(info, 2), preferred: be32(info, 6), maximum: be32(info, 10) };
                check(&blocks)?;
            }
            (NBD_INFO_EXPORT | NBD_INFO_BLOCK_SIZE, _) => {
                return Err(Error::Protocol("it describes the export in a wrong length"));
            }
            // Not asked for, and may be ignored.
            _ => {}
        }
    }
    let (size, flags) = found.ok_or(Error::Protocol("it did not tell the export's size"))?;
    Ok(Export { size, flags, blocks })
}

fn check(blocks: &Blocks) -> Result<(), Error> {
    let Blocks { minimum, preferred, maximum } = *blocks;
    let fits = minimum.is_power_of_two()
        && minimum <= 1 << 16
        && preferred.is_power_of_two()
        && minimum <= preferred
        && minimum <= maximum;
    if fits { Ok(()) } else { Err(Error::Blocks { minimum, preferred, maximum }) }
}

/// The server's answer to an option.
enum Answer {
    /// With what it told before.
    Acknowledged(Vec<Vec<u8>>),
    /// With a text for people, perhaps empty.
    Refused { code: u32, text: String },
}

fn send<S: Write>(stream: &mut S, option: u32, data: &[u8]) -> Result<(), Error> {
    let mut bytes = IHAVEOPT.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    stream.write_all(&bytes).map_err(Error::Io)
}

fn ask<S: Read + Write>(stream: &mut S, option: u32, data: &[u8]) -> Result<Answer, Error> {
    send(stream, option, data)?;
    let mut infos = Vec::new();
    while infos.len() <= MAX_REPLIES {
        let head: [u8; 20] = read(stream)?;
        let (kind, length) = (be32(&head, 12), be32(&head, 16) as usize);
        if be64(&head, 0) != OPTION_REPLY_MAGIC {
            return Err(Error::Protocol("its answer to an option starts with something else"));
        }
        if be32(&head, 8) != option {
            return Err(Error::Protocol("it answered an option that was not sent"));
        }
        if length > 2 * MAX_STRING {
            return Err(Error::Protocol("its answer to an option is longer than any may be"));
        }
        let mut data = vec![0; length];
        stream.read_exact(&mut data).map_err(ended)?;
        match kind {
            NBD_REP_ACK if length == 0 => return Ok(Answer::Acknowledged(infos)),
            NBD_REP_ACK => return Err(Error::Protocol("its consent to an option carries data")),
            NBD_REP_INFO if option == NBD_OPT_GO => infos.push(data),
            code if code & NBD_REP_FLAG_ERROR != 0 => {
                return Ok(Answer::Refused { code, text: printable(&data) });
            }
            _ => return Err(Error::Protocol("its answer to an option is of an unknown type")),
        }
    }
    Err(Error::Protocol("it answers an option without end"))
}

/// A server's text as it may stand in a log: one line, no control characters.
fn printable(text: &[u8]) -> String {
    String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).take(512).collect()
}

fn reason(code: u32) -> &'static str {
    match code {
        NBD_REP_ERR_UNSUP => "it does not know it",
        NBD_REP_ERR_POLICY => "not allowed",
        NBD_REP_ERR_INVALID => "invalid request",
        NBD_REP_ERR_PLATFORM => "not possible there",
        NBD_REP_ERR_TLS_REQD => "it requires TLS: write nbds:// or nbds+unix:// in the URI",
        NBD_REP_ERR_UNKNOWN => "no such export",
        NBD_REP_ERR_SHUTDOWN => SHUTTING_DOWN,
        NBD_REP_ERR_BLOCK_SIZE_REQD => "it wants other block sizes",
        _ => "for a reason of its own",
    }
}

/// Without what `read_exact` makes of the end of a stream.
fn ended(error: io::Error) -> Error {
    Error::Io(if error.kind() == io::ErrorKind::UnexpectedEof { error.kind().into() } else { error })
}

fn read<const N: usize, S: Read>(stream: &mut S) -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).map_err(ended)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A server's words, all ready, and what we said.
    struct Script {
        says: io::Cursor<Vec<u8>>,
        heard: Vec<u8>,
    }

    impl Read for Script {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            self.says.read(into)
        }
    }

    impl Write for Script {
        fn write(&mut self, from: &[u8]) -> io::Result<usize> {
            self.heard.write(from)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn run(parts: &[Vec<u8>]) -> (Result<Negotiated, Error>, Vec<u8>) {
        let mut script = Script { says: io::Cursor::new(parts.concat()), heard: Vec::new() };
        let result = negotiate(&mut script, b"disk");
        (result, script.heard)
    }

    fn greeting(flags: u16) -> Vec<u8> {
        [NBDMAGIC.to_be_bytes().as_slice(), &IHAVEOPT.to_be_bytes(), &flags.to_be_bytes()].concat()
    }

    fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
        let head = [option.to_be_bytes(), kind.to_be_bytes(), (data.len() as u32).to_be_bytes()].concat();
        [OPTION_REPLY_MAGIC.to_be_bytes().as_slice(), &head, data].concat()
    }

    fn info(kind: u16, fields: &[&[u8]]) -> Vec<u8> {
        reply(NBD_OPT_GO, NBD_REP_INFO, &[kind.to_be_bytes().as_slice(), &fields.concat()].concat())
    }

    fn good() -> Vec<Vec<u8>> {
        vec![
            greeting(3),
            reply(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, &[]),
            info(NBD_INFO_EXPORT, &[&(1u64 << 20).to_be_bytes(), &5u16.to_be_bytes()]),
            info(
                NBD_INFO_BLOCK_SIZE,
                &[&1u32.to_be_bytes(), &4096u32.to_be_bytes(), &65536u32.to_be_bytes()],
            ),
            info(77, &[b"something new"]),
            reply(NBD_OPT_GO, NBD_REP_ACK, &[]),
        ]
    }

    #[test]
    fn a_good_server_is_understood() {
        let (negotiated, heard) = run(&good());
        let negotiated = negotiated.unwrap();
        assert!(negotiated.structured);
        assert_eq!((negotiated.export.size, negotiated.export.flags), (1 << 20, 5));
        assert_eq!(negotiated.export.blocks, Blocks { minimum: 1, preferred: 4096, maximum: 65536 });
        let expected = [
            b"\0\0\0\x03".as_slice(),
            b"IHAVEOPT\0\0\0\x08\0\0\0\0",
            b"IHAVEOPT\0\0\0\x07\0\0\0\x0c\0\0\0\x04disk\0\x01\0\x03",
        ];
        assert_eq!(heard, expected.concat());
    }

    #[test]
    fn an_older_server_is_asked_the_old_way() {
        for zeroes in [false, true] {
            let mut parts = vec![
                greeting(if zeroes { 1 } else { 3 }),
                reply(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ERR_UNSUP, b""),
                reply(NBD_OPT_GO, NBD_REP_ERR_UNSUP, b"what?"),
                [(1u64 << 20).to_be_bytes().as_slice(), &7u16.to_be_bytes()].concat(),
            ];
            if zeroes {
                assert!(matches!(run(&parts).0, Err(Error::Io(_))), "124 zeroes are waited for");
                parts.push(vec![0; 124]);
            }
            let negotiated = run(&parts).0.unwrap();
            assert_eq!(negotiated.export, Export { size: 1 << 20, flags: 7, blocks: Blocks::default() });
            assert!(!negotiated.structured);
        }
    }

    #[test]
    fn a_refusal_is_told_with_its_reason() {
        let mut parts = good();
        parts.truncate(2);
        parts.push(reply(NBD_OPT_GO, NBD_REP_ERR_UNKNOWN, b"no\x1b[2J disk\n"));
        let Err(Error::Refused { reason, text }) = run(&parts).0 else { panic!("accepted") };
        assert_eq!((reason, text.as_str()), ("no such export", "no[2J disk"));
    }

    #[test]
    fn servers_that_make_no_sense_are_refused() {
        let protocol = |parts: &[Vec<u8>]| {
            let result = run(parts).0;
            assert!(matches!(result, Err(Error::Protocol(_))), "{result:?}");
        };
        protocol(&[b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()]);
        protocol(&[[NBDMAGIC.to_be_bytes(), OLDSTYLE_MAGIC.to_be_bytes()].concat()]);
        protocol(&[greeting(2)]);
        let replace = |index: usize, part: Vec<u8>| {
            let mut parts = good();
            parts[index] = part;
            parts
        };
        protocol(&replace(1, reply(NBD_OPT_GO, NBD_REP_ACK, &[])));
        protocol(&replace(1, reply(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, &[1])));
        protocol(&replace(1, reply(NBD_OPT_STRUCTURED_REPLY, NBD_REP_INFO, &[0; 12])));
        protocol(&replace(1, vec![0; 20]));
        protocol(&replace(2, info(77, &[])));
        protocol(&replace(2, info(NBD_INFO_EXPORT, &[&[0; 11]])));
        protocol(&replace(2, info(77, &[&[0; 9000]])));
        protocol(&[vec![greeting(3), good()[1].clone()], vec![info(77, &[]); 100]].concat());
        for sizes in [[0, 4096, 4096], [3, 4096, 4096], [512, 1000, 4096], [512, 256, 4096], [512, 512, 0]] {
            let fields = sizes.map(u32::to_be_bytes).concat();
            let result = run(&replace(3, info(NBD_INFO_BLOCK_SIZE, &[&fields]))).0;
            assert!(matches!(result, Err(Error::Blocks { .. })), "{result:?}");
        }
    }

    proptest! {
        #[test]
        fn damaged_words_never_panic(at in 0usize..260, with: u8, cut in 0usize..300) {
            let mut bytes = good().concat();
            let len = bytes.len();
            bytes[at % len] ^= with;
            bytes.truncate(cut.max(1));
            let mut script = Script { says: io::Cursor::new(bytes), heard: Vec::new() };
            if let Ok(negotiated) = negotiate(&mut script, b"disk") {
                prop_assert!(check(&negotiated.export.blocks).is_ok());
            }
        }
    }
}
