//! What a device says to its VMM unasked, over the socket that came with SET_BACKEND_REQ_FD.

use super::Message;
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, SendFlags, SocketType, send};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use vhost::vhost_user::message::BackendReq;

/// The socket of the VMM that is connected, if it gave one. Usable from any thread: a session may be busy for long.
#[derive(Default)]
pub struct BackendChannel(Mutex<Option<OwnedFd>>);

/// What became of a notice.
#[derive(Debug)]
pub enum NotifyResult {
    /// It is on its way.
    Sent,
    /// The VMM has given no socket.
    NoChannel,
    /// It does not read, or has closed it.
    Failed(io::Error),
}

impl BackendChannel {
    fn lock(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the VMM's socket, in place of an earlier one.
    ///
    /// # Errors
    /// Why it is not one.
    pub(super) fn open(&self, socket: OwnedFd) -> Result<(), String> {
        let is = (socket_domain(&socket), socket_type(&socket));
        if is != (Ok(AddressFamily::UNIX), Ok(SocketType::STREAM)) {
            return Err("its descriptor is not a connected Unix socket".into());
        }
        *self.lock() = Some(socket);
        Ok(())
    }

    /// Forgets it: the VMM is gone.
    pub fn close(&self) {
        *self.lock() = None;
    }

    /// Tells the VMM that its device's configuration space has changed. Never waits.
    pub fn config_changed(&self) -> NotifyResult {
        let channel = self.lock();
        let Some(socket) = channel.as_ref() else { return NotifyResult::NoChannel };
        // No answer is asked for, so that none has to be read.
        let message = Message::compose(BackendReq::CONFIG_CHANGE_MSG.into(), 0, &[]);
        // So short a message is sent whole or not at all.
        match send(socket, &message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(_) => NotifyResult::Sent,
            Err(error) => NotifyResult::Failed(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    #[test]
    fn a_notice_is_a_header_alone() {
        let channel = BackendChannel::default();
        assert!(matches!(channel.config_changed(), NotifyResult::NoChannel));
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        channel.open(ours.into()).unwrap();
        assert!(matches!(channel.config_changed(), NotifyResult::Sent));
        let mut bytes = [0; 12];
        theirs.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        channel.close();
        assert!(matches!(channel.config_changed(), NotifyResult::NoChannel));
    }

    #[test]
    fn one_that_does_not_read_keeps_nobody() {
        let channel = BackendChannel::default();
        let (ours, theirs) = UnixStream::pair().unwrap();
        channel.open(ours.into()).unwrap();
        let full = |told: &NotifyResult| matches!(told, NotifyResult::Failed(error) if error.kind() == io::ErrorKind::WouldBlock);
        assert!((0..100_000).any(|_| full(&channel.config_changed())));
        drop(theirs);
        assert!(matches!(channel.config_changed(), NotifyResult::Failed(_)));
    }

    #[test]
    fn anything_else_is_no_channel() {
        let channel = BackendChannel::default();
        let file = File::open("/dev/null").unwrap();
        let datagrams = UnixDatagram::unbound().unwrap();
        for descriptor in [OwnedFd::from(file), datagrams.into()] {
            channel.open(descriptor).unwrap_err();
        }
        assert!(matches!(channel.config_changed(), NotifyResult::NoChannel));
    }
}
