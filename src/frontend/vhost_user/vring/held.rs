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
    scratch: Scratch<'static>,
    chain: Option<Result<Chain<'static>, Status>>,
}

/// How far it has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Hold {
    /// There is none.
    #[default]
    Nothing,
    /// It waits to be let in.
    Waits,
    /// It has been: the slot whose turn it is takes it.
    LetIn,
}

impl Held {
    pub(super) fn head(&self) -> u16 {
        self.head
    }

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
    /// The tag whose slot is to be polled for the next request, if `admit` lets it in: it is told what that asks for, and for how
    /// many bytes. What is refused is asked for again at the next call.
    pub(super) fn poll_held(&self, admit: impl FnOnce(Op, u64) -> bool) -> Option<u16> {
        if !self.takes_new() || !self.has_pass_left() {
            return None;
        }
        if self.hold.get() != Hold::Waits {
            if !self.has_new() {
                return None;
            }
            let head = self.avail.head(self.next_avail.get());
            let mut held = self.held.borrow_mut();
            held.head = head;
            // One that is not there needs no reading: `take` gives the vring up.
            held.chain =
                (head < self.size()).then(|| parse(self.table, head, self.indirect, &mut held.scratch));
            self.hold.set(Hold::Waits);
        }
        if self.held.borrow().asks().is_some_and(|(op, bytes)| !admit(op, bytes)) {
            return None;
        }
        self.hold.set(Hold::LetIn);
        self.give_turn()
    }

    /// The chain that was let in. It moves into the memory of its tag.
    #[cold]
    pub(super) fn let_in(&self, state: &mut TagState) -> Result<Chain<'static>, Status> {
        self.hold.set(Hold::Nothing);
        let mut held = self.held.borrow_mut();
        std::mem::swap(&mut held.scratch, &mut state.scratch);
        held.chain.take().unwrap_or(Err(Status::IoErr))
    }
}
