//! The head that was looked at and not taken: what it asks for has to be known before it is let in.
//!
//! There is one at the most. It stays in the avail ring, and whoever stops the vring finds it there; nothing of it is in flight.
//! Head and chain are read once: what is let in is what is carried out, whatever the guest writes there meanwhile.

#![forbid(unsafe_code)]

use super::{TagState, Vring};
use crate::block::{Op, SECTOR};
use crate::frontend::vhost_user::request::{Chain, Parsed, Scratch, Status, parse};

/// What has been read of it.
#[derive(Default)]
pub(super) struct Held {
    head: u16,
    scratch: Scratch,
    chain: Option<Result<Chain, Status>>,
}

/// How far it has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Hold {
    /// There is none.
    #[default]
    Nothing,
    /// It waits to be let in.
    Waits,
    /// It has been, and has this tag.
    LetIn(u16),
}

impl Held {
    /// What it asks of the store, and for how many bytes; `None` for what needs no store.
    fn asks(&self) -> Option<(Op, u64)> {
        match &self.chain.as_ref()?.as_ref().ok()?.request {
            Parsed::Transfer { op, sectors, .. } => Some((*op, u64::from(*sectors) * SECTOR)),
            Parsed::Ranges(op) => {
                // At most 16 of 32 bits each: no overflow.
                let sectors = self.scratch.ranges.iter().map(|range| u64::from(range.sectors)).sum::<u64>();
                Some((*op, sectors * SECTOR))
            }
            Parsed::Flush => Some((Op::Flush, 0)),
            Parsed::GetId(_) => None,
        }
    }
}

impl Vring {
    /// As [`take`](Self::take), of requests that have to be let in: `admit` is told what the next one asks for, and for how many
    /// bytes. One that it refuses is not taken, nor are those behind it, and it is asked for again at the next call.
    ///
    /// What was taken before and is carried out again has been let in. The slot of the tag is to be polled before the next call.
    pub fn take_admitted(&self, admit: impl FnOnce(Op, u64) -> bool) -> Option<u16> {
        if self.has_again() {
            return self.take();
        }
        if !self.takes_new() || !self.has_pass_left() {
            return None;
        }
        if self.hold.get() != Hold::Waits {
            let head = self.peek_head()?;
            let mut held = self.held.borrow_mut();
            held.head = head;
            // One that is not there, or in flight already, needs no reading: `begin` gives the vring up.
            held.chain = (head < self.size())
                .then(|| parse(&self.setup.memory, self.table, head, self.indirect, &mut held.scratch));
            self.hold.set(Hold::Waits);
        }
        let (head, asks) = {
            let held = self.held.borrow();
            (held.head, held.asks())
        };
        if asks.is_some_and(|(op, bytes)| !admit(op, bytes)) {
            return None;
        }
        self.hold.set(Hold::Nothing);
        self.next_avail.set(self.next_avail.get().wrapping_add(1));
        let tag = self.begin(head, false)?;
        self.hold.set(Hold::LetIn(tag));
        Some(tag)
    }

    /// Whether a request waits to be let in.
    pub fn is_held(&self) -> bool {
        self.hold.get() == Hold::Waits
    }

    /// Nothing has to be let in any more: the next request is read anew when it is taken.
    pub fn forget_held(&self) {
        self.hold.set(Hold::Nothing);
    }

    /// The chain that was let in. It moves into the memory of its tag.
    #[cold]
    pub(super) fn let_in(&self, state: &mut TagState) -> Result<Chain, Status> {
        self.hold.set(Hold::Nothing);
        let mut held = self.held.borrow_mut();
        std::mem::swap(&mut held.scratch, &mut state.scratch);
        held.chain.take().unwrap_or(Err(Status::IoErr))
    }
}
