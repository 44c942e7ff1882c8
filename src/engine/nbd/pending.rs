//! The requests of one connection that wait for their reply, and what a reply may say to them. No I/O here.
//!
//! Contract: a frame is [accepted](Inflight::accept) only if it fits the request that it names, byte for byte
//! inside what was asked for and no byte twice, and a read succeeds only when every byte came. After a
//! [`Violation`] the connection is closed; nothing that was accepted before it is undone.

#![forbid(unsafe_code)]

use super::protocol::{self, Body, Command, Frame, NBD_ESHUTDOWN, Request, Violation};
use crate::block::Errno;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The server refused it.
    Server(Errno),
    /// The connection went away first: whether the server did it is not known.
    Lost,
}

/// Bytes of a reply that belong in the request's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// From the start of the request, in bytes.
    pub at: u32,
    /// Bytes; inside the request.
    pub length: u32,
    /// Zeroes, which are not sent; otherwise the bytes come next in the stream.
    pub hole: bool,
}

/// What an accepted frame asks of the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Nothing yet.
    Nothing,
    /// The request of this slot has ended.
    Ended { slot: u32 },
    /// The slot has a piece to take in.
    Piece { slot: u32, cookie: u64 },
    /// The server is going away.
    Shutdown,
}

/// What a slot is to do next about its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Park.
    Wait,
    /// Send the request: the stream out is the slot's until [`Inflight::sent`].
    Send,
    /// Take the piece in: the stream in is the slot's until [`Inflight::taken`].
    Take(Piece),
    /// It has ended, and its place is free again.
    Ended(Result<(), Failure>),
}

/// How far the request is on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outward {
    Queued,
    /// The slot may send it.
    Turn,
    /// The slot is sending it.
    Sending,
    Sent,
}

/// How far the reply is on its way in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inward {
    Waiting,
    Piece(Piece),
    Ended(Result<(), Failure>),
}

#[derive(Debug)]
struct Entry {
    /// The tick in which it was taken in, or sent.
    since: u64,
    /// Counts the requests that had this place, so that a cookie is not used again soon.
    generation: u32,
    /// `None` for a free place.
    slot: Option<u32>,
    request: Request,
    outward: Outward,
    inward: Inward,
    /// The piece at hand is the last.
    done: bool,
    /// First error of a structured reply.
    error: Option<u32>,
    covered: Covered,
}

/// The table. Its places are used again: once it has grown to as many requests as the connection ever has in
/// flight, nothing is allocated.
#[derive(Debug, Default)]
pub struct Inflight {
    entries: Vec<Entry>,
    free: Vec<u32>,
    structured: bool,
    /// Ticks of the clock so far: see [`watch`](super::watch).
    now: u64,
    /// The last tick in which a request was sent that was answered since.
    answered: u64,
}

impl Inflight {
    /// Says which kind of replies the server now at the other end negotiated.
    pub fn set_structured(&mut self, structured: bool) {
        self.structured = structured;
        self.answered = 0;
    }

    /// Requests that have a place.
    pub fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// The clock's present tick.
    pub fn now(&self) -> u64 {
        self.now
    }

    /// Another tick of the clock. Whether a request has waited for more than `limit` of them, of a server that was last
    /// `heard` in that tick and last took or gave a byte in the tick `moved`.
    pub fn tick(&mut self, limit: u64, heard: u64, moved: u64) -> bool {
        self.now += 1;
        let old = |tick: u64| self.now.saturating_sub(tick) > limit;
        self.entries.iter().any(|entry| {
            let waits = entry.slot.is_some() && !matches!(entry.inward, Inward::Ended(_));
            waits
                && old(entry.since)
                && match entry.outward {
                    Outward::Sent => old(heard) || entry.since + limit < self.answered,
                    Outward::Queued | Outward::Turn | Outward::Sending => old(heard.max(moved)),
                }
        })
    }

    /// Takes a request of `slot` in and gives it a cookie.
    pub fn insert(&mut self, slot: u32, request: Request) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push(Entry {
                since: 0,
                generation: 0,
                slot: None,
                request,
                outward: Outward::Queued,
                inward: Inward::Waiting,
                done: false,
                error: None,
                covered: Covered::default(),
            });
            self.entries.len() as u32 - 1
        });
        let now = self.now;
        let entry = &mut self.entries[index as usize];
        entry.since = now;
        entry.generation = entry.generation.wrapping_add(1);
        entry.slot = Some(slot);
        entry.request = request;
        entry.outward = Outward::Queued;
        entry.inward = Inward::Waiting;
        entry.done = false;
        entry.error = None;
        entry.covered.clear();
        u64::from(entry.generation) << 32 | u64::from(index)
    }

    fn entry(&mut self, cookie: u64) -> Option<&mut Entry> {
        find(&mut self.entries, cookie)
    }

    /// A request that is still to be sent; `None` when it has ended while it waited.
    pub fn request(&mut self, cookie: u64) -> Option<Request> {
        let entry = self.entry(cookie)?;
        (entry.inward == Inward::Waiting).then_some(entry.request)
    }

    /// It is the request's turn to go out. One without a payload counts as sent, one with a payload is its
    /// slot's to send. Gives the slot, or `None` when it has ended while it waited.
    pub fn turn(&mut self, cookie: u64) -> Option<u32> {
        let now = self.now;
        let entry = self.entry(cookie).filter(|entry| entry.inward == Inward::Waiting)?;
        entry.since = now;
        entry.outward = if entry.request.payload() > 0 { Outward::Turn } else { Outward::Sent };
        entry.slot
    }

    /// The slot has given the stream out back, after all of the request or only a part. What was not sent was
    /// not done, whatever the server says of it.
    pub fn sent(&mut self, cookie: u64, whole: bool) {
        let now = self.now;
        if let Some(entry) = self.entry(cookie) {
            entry.since = now;
            entry.outward = Outward::Sent;
            if !whole {
                entry.inward = Inward::Ended(Err(Failure::Lost));
            }
        }
    }

    /// The slot has taken its piece in, which may end the request.
    pub fn taken(&mut self, cookie: u64) {
        let Some(entry) = self.entry(cookie) else { return };
        if let Inward::Piece(_) = entry.inward {
            entry.inward = if entry.done { Inward::Ended(entry.outcome()) } else { Inward::Waiting };
        }
    }

    /// Whether the slot still holds the stream in.
    pub fn has_piece(&mut self, cookie: u64) -> bool {
        self.entry(cookie).is_some_and(|entry| matches!(entry.inward, Inward::Piece(_)))
    }

    /// What the slot is to do. A cookie of a request that has ended before gives `Lost`.
    pub fn step(&mut self, cookie: u64) -> Step {
        let Some(entry) = self.entry(cookie) else { return Step::Ended(Err(Failure::Lost)) };
        match (entry.outward, entry.inward) {
            (_, Inward::Piece(piece)) => Step::Take(piece),
            (Outward::Turn, Inward::Waiting) => {
                entry.outward = Outward::Sending;
                Step::Send
            }
            (_, Inward::Ended(outcome)) => {
                self.remove(cookie);
                Step::Ended(outcome)
            }
            _ => Step::Wait,
        }
    }

    /// Frees the request's place, whatever it waits for. Whether there was such a request.
    pub fn remove(&mut self, cookie: u64) -> bool {
        let Some(entry) = self.entry(cookie) else { return false };
        entry.slot = None;
        self.free.push((cookie & 0xffff_ffff) as u32);
        true
    }

    /// Ends every request that has not ended, and tells whose they were.
    pub fn disconnect(&mut self, mut wake: impl FnMut(u32)) {
        for entry in &mut self.entries {
            if let (Some(slot), Inward::Waiting | Inward::Piece(_)) = (entry.slot, entry.inward) {
                entry.inward = Inward::Ended(Err(Failure::Lost));
                wake(slot);
            }
        }
    }

    /// Whether a request of such a slot has no answer yet.
    pub fn waits(&self, such: impl Fn(u32) -> bool) -> bool {
        let waits = |entry: &Entry| matches!(entry.inward, Inward::Waiting | Inward::Piece(_));
        self.entries.iter().any(|entry| waits(entry) && entry.slot.is_some_and(&such))
    }

    /// Applies a frame to the request it names.
    ///
    /// # Errors
    /// When it does not fit it.
    pub fn accept(&mut self, frame: &Frame) -> Result<Event, Violation> {
        let structured = self.structured;
        let cookie = frame.cookie;
        let entry = find(&mut self.entries, cookie).ok_or(Violation::Cookie(cookie))?;
        let (Some(slot), Inward::Waiting) = (entry.slot, entry.inward) else {
            return Err(Violation::Cookie(cookie));
        };
        if matches!(entry.outward, Outward::Queued | Outward::Turn) {
            return Err(Violation::Early);
        }
        if !structured && !matches!(frame.body, Body::Simple { .. }) {
            return Err(Violation::Unasked);
        }
        entry.done = frame.done;
        if frame.done {
            self.answered = self.answered.max(entry.since);
        }
        let read = entry.request.command == Command::NBD_CMD_READ;
        match frame.body {
            Body::Simple { error: NBD_ESHUTDOWN } | Body::Error { error: NBD_ESHUTDOWN, .. } => {
                return Ok(Event::Shutdown);
            }
            Body::Simple { error: 0 } if read && structured => return Err(Violation::Simple),
            Body::Simple { error: 0 } if read => {
                return entry.piece(slot, cookie, entry.request.offset, entry.request.length, false);
            }
            Body::Simple { error: 0 } => {}
            // The document wants a chunk for a failed read too; a simple error cannot be misunderstood.
            Body::Simple { error } | Body::Error { error, .. } => {
                entry.error.get_or_insert(error);
            }
            Body::Data { offset, length } => return entry.piece(slot, cookie, offset, length, false),
            Body::Hole { offset, length } => return entry.piece(slot, cookie, offset, length, true),
            Body::None => {}
        }
        if !frame.done {
            return Ok(Event::Nothing);
        }
        if read && entry.error.is_none() && entry.covered.bytes != entry.request.length {
            return Err(Violation::Incomplete);
        }
        entry.inward = Inward::Ended(entry.outcome());
        Ok(Event::Ended { slot })
    }
}

fn find(entries: &mut [Entry], cookie: u64) -> Option<&mut Entry> {
    let entry = entries.get_mut(usize::try_from(cookie & 0xffff_ffff).ok()?)?;
    (entry.slot.is_some() && u64::from(entry.generation) == cookie >> 32).then_some(entry)
}

impl Entry {
    fn outcome(&self) -> Result<(), Failure> {
        match self.error {
            None => Ok(()),
            Some(error) => Err(Failure::Server(protocol::errno(error))),
        }
    }

    fn piece(
        &mut self,
        slot: u32,
        cookie: u64,
        offset: u64,
        length: u32,
        hole: bool,
    ) -> Result<Event, Violation> {
        if self.request.command != Command::NBD_CMD_READ {
            return Err(Violation::Data(self.request.command));
        }
        let at = offset
            .checked_sub(self.request.offset)
            .and_then(|at| u32::try_from(at).ok())
            .filter(|at| at.checked_add(length).is_some_and(|end| end <= self.request.length))
            .ok_or(Violation::Range { offset, length })?;
        self.covered.add(at, length).map_err(|pieces| match pieces {
            Uncoverable::Overlap => Violation::Overlap { offset, length },
            Uncoverable::TooMany => Violation::Pieces,
        })?;
        if self.done && self.error.is_none() && self.covered.bytes != self.request.length {
            return Err(Violation::Incomplete);
        }
        self.inward = Inward::Piece(Piece { at, length, hole });
        Ok(Event::Piece { slot, cookie })
    }
}

/// Which bytes of a read have come: ranges in order, apart from each other.
#[derive(Debug, Default)]
struct Covered {
    ranges: Vec<(u32, u32)>,
    bytes: u32,
}

#[derive(Debug, PartialEq, Eq)]
enum Uncoverable {
    Overlap,
    TooMany,
}

impl Covered {
    /// The most ranges apart from each other. Pieces that come in order make one, however many they are.
    const MOST: usize = 1024;

    fn clear(&mut self) {
        self.ranges.clear();
        self.bytes = 0;
    }

    fn add(&mut self, start: u32, length: u32) -> Result<(), Uncoverable> {
        let end = start + length;
        // The first range that ends behind our start: all before it lie before us.
        let next = self.ranges.partition_point(|&(_, theirs)| theirs <= start);
        if self.ranges.get(next).is_some_and(|&(theirs, _)| theirs < end) {
            return Err(Uncoverable::Overlap);
        }
        let joins_before = next > 0 && self.ranges[next - 1].1 == start;
        let joins_after = self.ranges.get(next).is_some_and(|&(theirs, _)| theirs == end);
        match (joins_before, joins_after) {
            (true, true) => {
                self.ranges[next - 1].1 = self.ranges[next].1;
                self.ranges.remove(next);
            }
            (true, false) => self.ranges[next - 1].1 = end,
            (false, true) => self.ranges[next].0 = start,
            (false, false) if self.ranges.len() == Covered::MOST => return Err(Uncoverable::TooMany),
            (false, false) => self.ranges.insert(next, (start, end)),
        }
        self.bytes += length;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::protocol::tests::{simple, structured};
    use super::super::protocol::*;
    use super::*;
    use proptest::prelude::*;

    const READ: Request = Request { flags: 0, command: Command::NBD_CMD_READ, offset: 4096, length: 4096 };
    const FLUSH: Request = Request { flags: 0, command: Command::NBD_CMD_FLUSH, offset: 0, length: 0 };

    fn with(structured: bool, request: Request) -> (Inflight, u64) {
        let mut inflight = Inflight::default();
        inflight.set_structured(structured);
        let cookie = inflight.insert(3, request);
        inflight.turn(cookie).unwrap();
        (inflight, cookie)
    }

    fn data(cookie: u64, done: bool, offset: u64, length: u32) -> Frame {
        Frame { cookie, done, body: Body::Data { offset, length } }
    }

    #[test]
    fn only_silence_and_a_lost_answer_are_too_long() {
        let ticks = |inflight: &mut Inflight, count: u64, heard: u64, moved: u64| {
            (0..count).map(|_| inflight.tick(8, heard, moved)).collect::<Vec<_>>()
        };
        let silent = [[false; 8].as_slice(), &[true]].concat();
        // Sent: what we send does not count.
        let (mut inflight, _) = with(true, READ);
        assert_eq!(ticks(&mut inflight, 9, 0, 8), silent);
        assert!(!inflight.tick(8, 9, 0), "it says something");
        // Not sent: what moves counts.
        let mut inflight = Inflight::default();
        let cookie = inflight.insert(3, READ);
        assert_eq!(ticks(&mut inflight, 8, 0, 0), [false; 8]);
        assert_eq!(
            [inflight.tick(8, 0, 8), inflight.tick(8, 8, 0), inflight.tick(8, 0, 0)],
            [false, false, true]
        );
        inflight.turn(cookie).unwrap();
        assert!(!inflight.tick(8, 0, 0), "it is just sent");
        // A later one is answered, and this one is not.
        let (mut inflight, _) = with(true, READ);
        assert_eq!(ticks(&mut inflight, 8, 8, 8), [false; 8]);
        for expected in [false, true] {
            let later = inflight.insert(4, READ);
            inflight.turn(later).unwrap();
            inflight.accept(&data(later, true, 4096, 4096)).unwrap();
            inflight.taken(later);
            assert_eq!(inflight.step(later), Step::Ended(Ok(())));
            let now = inflight.now();
            assert_eq!(inflight.tick(8, now, now), expected, "{now}");
        }
        // One that has ended waits for nobody.
        let (mut inflight, cookie) = with(true, FLUSH);
        inflight.accept(&Frame { cookie, done: true, body: Body::None }).unwrap();
        assert_eq!(ticks(&mut inflight, 20, 0, 0), [false; 20]);
    }

    #[test]
    fn a_read_is_whole_in_any_order_of_its_pieces() {
        let (mut inflight, cookie) = with(true, READ);
        for (at, length, hole) in [(2048, 1024, false), (0, 512, true), (512, 1536, false)] {
            let offset = 4096 + u64::from(at);
            let body = if hole { Body::Hole { offset, length } } else { Body::Data { offset, length } };
            let frame = Frame { cookie, done: false, body };
            assert_eq!(inflight.accept(&frame), Ok(Event::Piece { slot: 3, cookie }));
            assert_eq!(inflight.step(cookie), Step::Take(Piece { at, length, hole }));
            // One piece at a time: the stream is the slot's.
            assert_eq!(inflight.accept(&frame), Err(Violation::Cookie(cookie)));
            inflight.taken(cookie);
            assert_eq!(inflight.step(cookie), Step::Wait);
        }
        let none = Frame { cookie, done: true, body: Body::None };
        assert_eq!(inflight.accept(&none), Err(Violation::Incomplete));
        inflight.accept(&data(cookie, true, 4096 + 3072, 1024)).unwrap();
        inflight.taken(cookie);
        assert_eq!(inflight.step(cookie), Step::Ended(Ok(())));
        assert_eq!(inflight.len(), 0);
    }

    #[test]
    fn pieces_outside_or_twice_are_refused() {
        let (mut inflight, cookie) = with(true, READ);
        for (offset, length) in
            [(4095, 1), (4095, 4097), (8192, 1), (8191, 2), (0, u32::MAX), (u64::MAX, 1), (4097, u32::MAX)]
        {
            let refused = inflight.accept(&data(cookie, false, offset, length));
            assert_eq!(refused, Err(Violation::Range { offset, length }));
        }
        inflight.accept(&data(cookie, false, 5000, 100)).unwrap();
        inflight.taken(cookie);
        for (offset, length) in [(5000, 100), (5099, 1), (4999, 2), (4096, 4096), (5050, 10)] {
            let refused = inflight.accept(&data(cookie, false, offset, length));
            assert_eq!(refused, Err(Violation::Overlap { offset, length }));
        }
        let (mut inflight, cookie) = with(true, READ);
        assert_eq!(inflight.accept(&data(cookie, true, 4096, 4095)), Err(Violation::Incomplete));
    }

    #[test]
    fn a_reply_in_crumbs_is_bounded() {
        let request = Request { length: 1 << 20, ..READ };
        let (mut inflight, cookie) = with(true, request);
        let mut crumbs = 0;
        let refused = (0..1 << 19).find_map(|n| {
            crumbs += 1;
            let refused = inflight.accept(&data(cookie, false, 4096 + 2 * n, 1)).err();
            inflight.taken(cookie);
            refused
        });
        assert_eq!(refused, Some(Violation::Pieces));
        assert_eq!(crumbs, Covered::MOST + 1);
    }

    #[test]
    fn an_error_chunk_fails_the_read_when_it_is_done() {
        let (mut inflight, cookie) = with(true, READ);
        let error = |error, done| Frame { cookie, done, body: Body::Error { error, skip: 0 } };
        assert_eq!(inflight.accept(&error(NBD_ENOSPC, false)), Ok(Event::Nothing));
        assert_eq!(inflight.accept(&error(NBD_EIO, false)), Ok(Event::Nothing));
        inflight.accept(&data(cookie, true, 4096, 10)).unwrap();
        inflight.taken(cookie);
        assert_eq!(inflight.step(cookie), Step::Ended(Err(Failure::Server(Errno::ENOSPC))));
    }

    #[test]
    fn replies_of_the_wrong_kind_are_refused() {
        let none = |cookie| Frame { cookie, done: true, body: Body::None };
        let plain = |cookie, error| Frame { cookie, done: true, body: Body::Simple { error } };
        let (mut inflight, cookie) = with(false, FLUSH);
        assert_eq!(inflight.accept(&none(cookie)), Err(Violation::Unasked));
        assert_eq!(inflight.accept(&plain(cookie, 0)), Ok(Event::Ended { slot: 3 }));
        assert_eq!(inflight.accept(&plain(cookie, 0)), Err(Violation::Cookie(cookie)), "answered twice");
        let (mut inflight, cookie) = with(true, FLUSH);
        assert_eq!(inflight.accept(&data(cookie, true, 0, 1)), Err(Violation::Data(Command::NBD_CMD_FLUSH)));
        assert_eq!(inflight.accept(&none(cookie ^ 1)), Err(Violation::Cookie(cookie ^ 1)));
        assert_eq!(inflight.accept(&none(cookie ^ 1 << 32)), Err(Violation::Cookie(cookie ^ 1 << 32)));
        assert_eq!(inflight.accept(&plain(cookie, NBD_ESHUTDOWN)), Ok(Event::Shutdown));
        assert_eq!(inflight.accept(&none(cookie)), Ok(Event::Ended { slot: 3 }));
        let (mut inflight, cookie) = with(true, READ);
        assert_eq!(inflight.accept(&plain(cookie, 0)), Err(Violation::Simple));
        assert_eq!(inflight.accept(&plain(cookie, NBD_EIO)), Ok(Event::Ended { slot: 3 }));
        let early = inflight.insert(4, FLUSH);
        assert_eq!(inflight.accept(&none(early)), Err(Violation::Early));
    }

    #[test]
    fn a_lost_request_waits_for_its_own_sending() {
        let (mut inflight, cookie) = with(true, Request { command: Command::NBD_CMD_WRITE, ..READ });
        assert_eq!(inflight.step(cookie), Step::Send);
        let mut woken = Vec::new();
        inflight.disconnect(|slot| woken.push(slot));
        assert_eq!(woken, [3]);
        assert_eq!(inflight.step(cookie), Step::Ended(Err(Failure::Lost)));
        assert_eq!(inflight.step(cookie), Step::Ended(Err(Failure::Lost)), "and stays so");
        inflight.taken(cookie);
        inflight.sent(cookie, true);
        assert!(!inflight.remove(cookie));
    }

    #[test]
    fn praise_for_half_a_write_counts_for_nothing() {
        let (mut inflight, cookie) = with(true, Request { command: Command::NBD_CMD_WRITE, ..READ });
        let none = Frame { cookie, done: true, body: Body::None };
        assert_eq!(inflight.accept(&none), Err(Violation::Early), "not begun");
        assert_eq!(inflight.step(cookie), Step::Send);
        assert_eq!(inflight.accept(&none), Ok(Event::Ended { slot: 3 }));
        inflight.sent(cookie, false);
        assert_eq!(inflight.step(cookie), Step::Ended(Err(Failure::Lost)));
    }

    proptest! {
        /// Whatever a server sends, pieces handed out never touch a byte twice or lie outside, and a read that
        /// succeeds has all of them.
        #[test]
        fn hostile_streams_do_no_harm(
            structured_replies: bool,
            moves in proptest::collection::vec((0u8..10, 0usize..3, 0u64..24, 0u32..12, any::<bool>()), 0..60),
        ) {
            let mut inflight = Inflight::default();
            inflight.set_structured(structured_replies);
            let mut cookies = [0; 3];
            let mut written = [[0u8; 16]; 3];
            for (n, cookie) in cookies.iter_mut().enumerate() {
                let command = [Command::NBD_CMD_READ, Command::NBD_CMD_READ, Command::NBD_CMD_FLUSH][n];
                *cookie = inflight.insert(n as u32, Request { flags: 0, command, offset: 4, length: 16 });
                inflight.turn(*cookie);
            }
            for (kind, which, offset, length, done) in moves {
                let cookie = cookies[which];
                let place = offset.to_be_bytes();
                let bytes = match kind {
                    0 => simple(cookie, length),
                    1 => structured(cookie, done, NBD_REPLY_TYPE_NONE, &[]),
                    2 | 3 => {
                        let hole = [place.as_slice(), &length.to_be_bytes()].concat();
                        structured(cookie, done, NBD_REPLY_TYPE_OFFSET_HOLE, &hole)
                    }
                    4 => structured(cookie, done, NBD_REPLY_TYPE_ERROR, &[0, 0, 0, length as u8, 0, 0]),
                    5 => structured(cookie.wrapping_add(offset), done, NBD_REPLY_TYPE_NONE, &[]),
                    _ => {
                        let data = [place.as_slice(), &vec![1; length as usize]].concat();
                        structured(cookie, done, NBD_REPLY_TYPE_OFFSET_DATA, &data)
                    }
                };
                let Ok(Decoded::Frame { frame, .. }) = decode(&bytes) else { continue };
                if inflight.accept(&frame).is_err() {
                    inflight.disconnect(|_| ());
                    break;
                }
                match inflight.step(cookie) {
                    Step::Take(Piece { at, length, .. }) => {
                        for byte in &mut written[which][at as usize..(at + length) as usize] {
                            prop_assert_eq!(*byte, 0);
                            *byte = 1;
                        }
                        inflight.taken(cookie);
                        if let Step::Ended(Ok(())) = inflight.step(cookie) {
                            prop_assert_eq!(written[which], [1; 16]);
                        }
                    }
                    Step::Ended(Ok(())) if which < 2 => prop_assert_eq!(written[which], [1; 16]),
                    _ => {}
                }
            }
        }
    }
}
