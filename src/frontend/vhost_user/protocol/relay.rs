//! From the VMM to the daemon and back, one message at a time.

use super::super::budget::MemoryShare;
use super::super::inflight::Inflight;
use super::Backend;
use super::message::HEADER;
use super::{BackendChannel, Message, Refusal, Regions, Shape, Vmm, check};
use rustix::io::{Errno, IoSlice};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use vhost::vhost_user::message::{
    FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};

/// Why a session ends, other than by the VMM's leaving.
#[derive(Debug)]
pub enum Ended {
    /// The relay let a message not pass, or the VMM kept it waiting.
    Refused(Refusal),
    /// The daemon failed at a request, and says itself why.
    Daemon(FrontendReq),
    /// The private connection failed.
    Private(io::Error),
}

impl From<Refusal> for Ended {
    fn from(refusal: Refusal) -> Ended {
        Ended::Refused(refusal)
    }
}

/// One VMM's relay.
pub struct Relay<'a, 'w, B> {
    vmm: &'a mut Vmm<'w>,
    daemon: UnixStream,
    session: &'a B,
    channel: &'a BackendChannel,
    /// Protocol features that the VMM accepted.
    acked: VhostUserProtocolFeatures,
    regions: Regions,
}

impl<'a, 'w, B: Backend> Relay<'a, 'w, B> {
    /// Between `vmm`, which may show memory out of `share`, and the daemon at the other end of `daemon`, which serves
    /// `session`.
    pub fn new(
        vmm: &'a mut Vmm<'w>,
        daemon: UnixStream,
        session: &'a B,
        channel: &'a BackendChannel,
        share: &Arc<MemoryShare>,
    ) -> Relay<'a, 'w, B> {
        let acked = VhostUserProtocolFeatures::empty();
        Relay { vmm, daemon, session, channel, acked, regions: Regions::none(share.clone()) }
    }

    /// Relays until either side ends it.
    ///
    /// # Errors
    /// When it is not the VMM who ended it, nor a stop.
    pub fn run(mut self) -> Result<(), Ended> {
        // Whatever the VMM negotiates, the daemon answers each message: that is how we know that it is done with it.
        self.ask(FrontendReq::GET_FEATURES, &[], &[])?;
        let features = VhostUserProtocolFeatures::REPLY_ACK.bits();
        self.ask(FrontendReq::SET_PROTOCOL_FEATURES, &features.to_ne_bytes(), &[])?;
        while let Some(mut message) = self.vmm.message()? {
            let result = match message.request {
                FrontendReq::GET_INFLIGHT_FD => self.get_inflight(&message),
                FrontendReq::SET_INFLIGHT_FD => self.set_inflight(&mut message),
                FrontendReq::SET_BACKEND_REQ_FD => self.open_channel(&mut message),
                FrontendReq::GET_MAX_MEM_SLOTS => self.get_slots(&message),
                _ => self.pass_on(&mut message),
            };
            // Why it failed is worth more than whether the VMM took the news.
            let told = self.acknowledge(&message, result.is_ok());
            result.and(told.map_err(Ended::from))?;
        }
        Ok(())
    }

    /// Has the daemon carry out what may pass, and gives its answer to the VMM if the message is a question.
    fn pass_on(&mut self, message: &mut Message) -> Result<(), Ended> {
        let change = self.regions.after(message).map_err(|cause| content(message, cause))?;
        check(message, self.session.shape(), &self.regions).map_err(|cause| content(message, cause))?;
        let accepted = match message.request {
            FrontendReq::SET_FEATURES => {
                let unoffered = message.number() & !self.session.offered_features();
                if unoffered != 0 {
                    return Err(Refusal::UnofferedFeatures(unoffered).into());
                }
                None
            }
            FrontendReq::SET_PROTOCOL_FEATURES => {
                let accepted = message.number();
                let unoffered = accepted & !self.session.offered().bits();
                if unoffered != 0 {
                    return Err(Refusal::Unoffered(unoffered).into());
                }
                let ours = accepted | VhostUserProtocolFeatures::REPLY_ACK.bits();
                message.body = ours.to_ne_bytes().to_vec();
                Some(VhostUserProtocolFeatures::from_bits_truncate(accepted))
            }
            FrontendReq::REM_MEM_REG => {
                message.descriptors.clear();
                None
            }
            _ => None,
        };
        let regions = change.map(|change| {
            self.session.set_charges(change.charges);
            change.regions
        });
        let answer = self.ask(message.request, &message.body, &message.descriptors)?;
        if message.is_question() {
            self.vmm.answer(&answer, None)?;
        } else if !answer.ends_with(&[0; size_of::<u64>()]) {
            return Err(Ended::Daemon(message.request));
        }
        if let Some(regions) = regions {
            self.regions = regions;
        }
        if let Some(accepted) = accepted {
            self.acked = accepted;
        }
        if message.request == FrontendReq::RESET_OWNER {
            // The specification lets us ignore it or do this; the daemon does neither.
            self.session.disable();
        }
        Ok(())
    }

    /// Sends the daemon a message and waits for its answer, header and body. However long: a vring may have to be
    /// drained first.
    fn ask(&mut self, request: FrontendReq, body: &[u8], descriptors: &[OwnedFd]) -> Result<Vec<u8>, Ended> {
        let ended = |error: io::Error| match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                Ended::Daemon(request)
            }
            _ => Ended::Private(error),
        };
        let bytes = Message::compose(request.into(), VhostUserHeaderFlag::NEED_REPLY.bits(), body);
        self.send(&bytes, descriptors).map_err(ended)?;
        let mut answer = vec![0; HEADER];
        self.daemon.read_exact(&mut answer).map_err(ended)?;
        let size = answer.last_chunk().map_or(0, |size| u32::from_ne_bytes(*size) as usize);
        if size > MAX_MSG_SIZE {
            return Err(Ended::Private(io::ErrorKind::InvalidData.into()));
        }
        answer.resize(HEADER + size, 0);
        self.daemon.read_exact(&mut answer[HEADER..]).map_err(ended)?;
        Ok(answer)
    }

    /// Sends bytes to the daemon, and the descriptors with the first of them.
    fn send(&self, mut bytes: &[u8], descriptors: &[OwnedFd]) -> io::Result<()> {
        let rights: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let mut rights = rights.as_slice();
        while !bytes.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !rights.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(rights));
            }
            match sendmsg(&self.daemon, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
                Ok(count) => {
                    bytes = &bytes[count..];
                    rights = &[];
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Tells the VMM whether its message was carried out, if it wants to know and has no answer yet.
    fn acknowledge(&self, message: &Message, success: bool) -> Result<(), Refusal> {
        if message.is_question()
            || !message.need_reply
            || !self.acked.contains(VhostUserProtocolFeatures::REPLY_ACK)
        {
            return Ok(());
        }
        self.answer(message.request, &u64::from(!success).to_ne_bytes(), None)
    }

    fn answer(&self, request: FrontendReq, body: &[u8], file: Option<&File>) -> Result<(), Refusal> {
        let bytes = Message::compose(request.into(), VhostUserHeaderFlag::REPLY.bits(), body);
        self.vmm.answer(&bytes, file.map(AsFd::as_fd))
    }

    fn accepted(&self, message: &Message, feature: VhostUserProtocolFeatures) -> Result<(), Refusal> {
        if self.acked.contains(feature) { Ok(()) } else { Err(Refusal::Feature(message.request)) }
    }

    /// A new in-flight region for the VMM to keep.
    fn get_inflight(&mut self, message: &Message) -> Result<(), Ended> {
        self.accepted(message, VhostUserProtocolFeatures::INFLIGHT_SHMFD)?;
        let mut region = InflightRegion::from(message);
        let Shape { queues: most_queues, queue_size: most_size } = self.session.shape();
        if !(1..=most_queues).contains(&region.queues) || !(1..=most_size).contains(&region.queue_size) {
            let InflightRegion { queues, queue_size, .. } = region;
            let cause = format!(
                "it wants {queues} queues of {queue_size}, and the export has {most_queues} of {most_size}: see its queues= and queue-size="
            );
            return Err(content(message, cause).into());
        }
        let (file, bytes) = Inflight::create(region.queues, region.queue_size)
            .map_err(|error| content(message, error.to_string()))?;
        (region.bytes, region.offset) = (bytes, 0);
        self.answer(message.request, &region.body(message.body.len()), Some(&file))?;
        Ok(())
    }

    /// The region that the VMM kept: this session's vrings note their requests there.
    fn set_inflight(&mut self, message: &mut Message) -> Result<(), Ended> {
        self.accepted(message, VhostUserProtocolFeatures::INFLIGHT_SHMFD)?;
        let InflightRegion { bytes, offset, queues, queue_size } = InflightRegion::from(&*message);
        let file = message.descriptors.pop().map(File::from);
        let file = file.ok_or(Refusal::Descriptors { request: message.request, count: 0 })?;
        let inflight = Inflight::guarded(file, bytes, offset, queues, queue_size, self.session.socket())
            .map_err(|error| content(message, error.to_string()))?;
        self.session.set_inflight(inflight);
        Ok(())
    }

    /// Memory slots: as many as this VMM can count on, whatever others have.
    fn get_slots(&mut self, message: &Message) -> Result<(), Ended> {
        self.accepted(message, VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)?;
        self.answer(message.request, &(self.regions.slots() as u64).to_ne_bytes(), None)?;
        Ok(())
    }

    fn open_channel(&mut self, message: &mut Message) -> Result<(), Ended> {
        self.accepted(message, VhostUserProtocolFeatures::BACKEND_REQ)?;
        let socket = message.descriptors.pop();
        let socket = socket.ok_or(Refusal::Descriptors { request: message.request, count: 0 })?;
        self.channel.open(socket).map_err(|cause| content(message, cause))?;
        Ok(())
    }
}

fn content(message: &Message, cause: String) -> Refusal {
    Refusal::Content { request: message.request, cause }
}

/// The body of GET_INFLIGHT_FD, its answer and SET_INFLIGHT_FD.
struct InflightRegion {
    bytes: u64,
    offset: u64,
    queues: u16,
    queue_size: u16,
}

impl From<&Message> for InflightRegion {
    fn from(message: &Message) -> InflightRegion {
        let at = |place: usize| message.body.get(place..).unwrap_or_default();
        let long = |place| at(place).first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
        let short = |place| at(place).first_chunk().map_or(0, |bytes| u16::from_ne_bytes(*bytes));
        InflightRegion { bytes: long(0), offset: long(8), queues: short(16), queue_size: short(18) }
    }
}

impl InflightRegion {
    /// As long as the VMM's own: some pad it, some do not.
    fn body(&self, len: usize) -> Vec<u8> {
        let mut body = [self.bytes.to_ne_bytes(), self.offset.to_ne_bytes()].concat();
        body.extend([self.queues.to_ne_bytes(), self.queue_size.to_ne_bytes()].concat());
        body.resize(len, 0);
        body
    }
}
