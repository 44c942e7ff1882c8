//! What was acknowledged and not yet flushed: so that no flush succeeds over lost data.
//!
//! A server may keep acknowledged writes in memory until a flush. When it crashes they are gone, and the server
//! that we find after reconnecting knows nothing of them: its flush succeeds. So who may vouch for what is
//! counted here, once for a volume, whichever workers and exports use it:
//!
//! - Each loss of a connection starts a new *era*. A write belongs to the era in which it was **sent**, a
//!   connection to the era in which it was **made**.
//! - A flush may go over a connection only if that is no younger than the oldest unflushed write. Such a
//!   connection was there before the server that took the write was seen to fail, and is still there; so its
//!   server is the same one, or shares its cache, which is what `NBD_FLAG_CAN_MULTI_CONN` promises.
//! - Where the worker that flushes has no such connection left, the writes may be lost. The flush fails with
//!   `EIO`, the books are closed over them, and every other user of the volume hears of it
//!   ([`losses`](crate::engine::losses)).
//!
//! A write belongs to the era it was sent in and not to that of its acknowledgement, because acknowledgements
//! from a dead server may still lie in one socket when another one has already told its death.
//!
//! Not recorded: FUA writes, which are stable when acknowledged, and trims, whose loss harms nobody.
//!
//! Not seen: a server that is replaced between the first connection and the others, before any loss was
//! noticed. That takes a crash in the moments after the start.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One volume's books.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Losses of connections so far.
    era: AtomicU64,
    books: Mutex<Books>,
}

#[derive(Debug, Default)]
struct Books {
    /// Writes acknowledged so far, those of a later moment having higher numbers.
    acknowledged: u64,
    /// Of each era with unflushed writes, the last of them; eras in order.
    unflushed: Vec<(u64, u64)>,
}

/// What a flush has to cover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Debt {
    /// Writes up to this one.
    upto: u64,
    /// Era of the oldest; `None` when there is none.
    pub oldest: Option<u64>,
}

impl Debt {
    /// Whether a connection made in `era` can vouch for it.
    pub fn covered_by(&self, era: u64) -> bool {
        self.oldest.is_none_or(|oldest| era <= oldest)
    }
}

impl Ledger {
    /// The most eras told apart; the oldest two become one beyond that, which errs on the safe side.
    const MOST_ERAS: usize = 64;

    /// Now.
    pub fn era(&self) -> u64 {
        self.era.load(Ordering::SeqCst)
    }

    /// A connection was lost.
    pub fn lost_connection(&self) {
        self.era.fetch_add(1, Ordering::SeqCst);
    }

    /// A write sent in `era` was acknowledged. To be called before its request completes.
    pub fn acknowledge(&self, era: u64) {
        let mut books = self.books();
        books.acknowledged += 1;
        let number = books.acknowledged;
        let at = books.unflushed.partition_point(|&(theirs, _)| theirs < era);
        match books.unflushed.get_mut(at) {
            Some((theirs, last)) if *theirs == era => *last = number,
            _ => books.unflushed.insert(at, (era, number)),
        }
        if books.unflushed.len() > Ledger::MOST_ERAS {
            let (_, last) = books.unflushed.remove(1);
            books.unflushed[0].1 = books.unflushed[0].1.max(last);
        }
    }

    /// What a flush that is sent now has to cover.
    pub fn debt(&self) -> Debt {
        let books = self.books();
        Debt { upto: books.acknowledged, oldest: books.unflushed.first().map(|&(era, _)| era) }
    }

    /// This debt is settled: a flush for it succeeded, or nobody can vouch for it and everybody was told.
    pub fn flushed(&self, debt: Debt) {
        self.books().unflushed.retain(|&(_, last)| last > debt.upto);
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        // Nothing in here panics half-way; and books that were dropped would be worse than these.
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_settles_what_came_before_it() {
        let ledger = Ledger::default();
        assert_eq!(ledger.debt().oldest, None);
        ledger.acknowledge(0);
        let debt = ledger.debt();
        assert_eq!(debt.oldest, Some(0));
        ledger.acknowledge(0);
        ledger.flushed(debt);
        assert_eq!(ledger.debt().oldest, Some(0), "the second write came after the flush was sent");
        ledger.flushed(ledger.debt());
        assert_eq!(ledger.debt().oldest, None);
    }

    #[test]
    fn only_an_old_connection_vouches_for_an_old_write() {
        let ledger = Ledger::default();
        ledger.acknowledge(ledger.era());
        ledger.lost_connection();
        assert!(ledger.debt().covered_by(0));
        assert!(!ledger.debt().covered_by(ledger.era()));
        ledger.acknowledge(ledger.era());
        assert!(!ledger.debt().covered_by(1), "the new write does not hide the old one");
        ledger.flushed(ledger.debt());
        ledger.acknowledge(1);
        assert!(ledger.debt().covered_by(1));
    }

    #[test]
    fn a_late_acknowledgement_belongs_to_its_own_era() {
        let ledger = Ledger::default();
        ledger.lost_connection();
        ledger.acknowledge(1);
        ledger.acknowledge(0);
        assert_eq!(ledger.debt().oldest, Some(0));
    }

    #[test]
    fn the_books_stay_small_and_strict() {
        let ledger = Ledger::default();
        for era in 0..10_000 {
            ledger.acknowledge(era);
        }
        assert!(ledger.books().unflushed.len() <= Ledger::MOST_ERAS);
        assert_eq!(ledger.debt().oldest, Some(0));
        ledger.flushed(ledger.debt());
        assert_eq!(ledger.debt().oldest, None);
    }
}
