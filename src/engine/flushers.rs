//! Who of an export hears of lost writes: its queues, over all that a VMM and its drivers do to them.

#![forbid(unsafe_code)]

use super::Volume;
use super::losses::Flusher;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The flushers of an export, one for each of its queues. They live as long as the export, however often its client
/// disconnects, stops its queues or starts them again.
#[derive(Debug)]
pub struct Flushers {
    queues: Box<[Flusher]>,
    served: Mutex<Served>,
}

/// What is known of an export's virtual machines.
#[derive(Debug, Default)]
struct Served {
    /// Which one was served last.
    vmm: Option<u64>,
    /// It is not known yet whether its driver began with us.
    unclear: bool,
    /// Of each queue where its ring stood when it stopped; `None` before that, and since a driver began.
    ends: Vec<Option<u16>>,
    /// Which queues have served since this process began.
    used: Vec<bool>,
}

/// How a queue of a virtual machine starts.
#[derive(Clone, Copy, Debug)]
pub struct QueueStart {
    /// Of a connection of a VMM; no two have the same.
    pub vmm: u64,
    /// Where in its ring it goes on.
    pub at: u16,
    /// There are notes of its requests from before, be it that there were none.
    pub noted: bool,
    /// Nobody can vouch for what an earlier process acknowledged, if it did.
    pub doubtful: bool,
}

impl Flushers {
    /// Of a new export of `volume` with so many queues: losses before its time do not concern it.
    pub fn new(volume: &Volume, queues: u16) -> Flushers {
        let (ends, used) = (vec![None; queues.into()], vec![false; queues.into()]);
        let served = Mutex::new(Served { ends, used, ..Served::default() });
        let flushers = Flushers { queues: (0..queues).map(|_| Flusher::default()).collect(), served };
        flushers.renew(volume);
        flushers
    }

    /// Of queue `index`.
    ///
    /// # Panics
    /// When the export has no such queue.
    pub fn queue(&self, index: usize) -> &Flusher {
        &self.queues[index]
    }

    /// One that has heard of what all of these have heard of, and doubts what one of them doubts: for a flush on behalf of
    /// the client, which does not hear of how that ends.
    pub fn on_behalf(&self) -> Flushers {
        let heard = self.queues.iter().map(Flusher::heard).min().unwrap_or(0);
        let doubtful = self.queues.iter().any(Flusher::is_doubtful);
        let queues = [Flusher::new(heard, doubtful)];
        Flushers { queues: queues.into(), served: Mutex::default() }
    }

    /// Queue `index` of a virtual machine starts. Whether the next flush of each queue fails, because nobody can vouch for
    /// what an earlier process acknowledged (`doubtful`).
    ///
    /// A driver that begins has written nothing yet. With a VMM that is new, losses before its time do not concern it; one
    /// that follows another in the same VMM (a reboot, a guest that slept) answers for what that wrote, but need not hear
    /// again of what any queue was told of.
    ///
    /// # Panics
    /// When the export has no such queue.
    pub fn start(&self, volume: &Volume, index: usize, start: QueueStart) -> bool {
        let mut served = self.served();
        if served.vmm.replace(start.vmm) != Some(start.vmm) {
            served.unclear = true;
        }
        // A queue that nobody has used stands at the beginning, too: of a driver that goes on.
        let moved = |end: &Option<u16>| end.is_some_and(|at| at != 0);
        let back = moved(&served.ends[index]);
        let at_beginning = start.at == 0 && (back || !start.noted);
        let proven = back || served.unclear && !served.ends.iter().any(moved);
        if at_beginning && proven {
            served.ends.fill(None);
            if std::mem::take(&mut served.unclear) { self.renew(volume) } else { self.level() }
        } else if !at_beginning {
            served.unclear = false;
        }
        let doubt = !std::mem::replace(&mut served.used[index], true) && !at_beginning && start.doubtful;
        if doubt {
            self.queues.iter().for_each(|flusher| flusher.set_doubtful(true));
        }
        doubt
    }

    /// Queue `index` has stopped, `at` this place of its ring.
    ///
    /// # Panics
    /// When the export has no such queue.
    pub fn stop(&self, index: usize, at: u16) {
        self.served().ends[index] = Some(at);
    }

    fn renew(&self, volume: &Volume) {
        let epoch = volume.epoch();
        self.queues.iter().for_each(|flusher| flusher.hear(epoch));
    }

    /// What one queue was told of, all have heard of.
    fn level(&self) {
        let most = self.queues.iter().map(Flusher::heard).max().unwrap_or(0);
        let doubted = self.queues.iter().all(Flusher::is_doubtful);
        for flusher in &self.queues {
            flusher.hear(most);
            flusher.set_doubtful(doubted);
        }
    }

    fn served(&self) -> MutexGuard<'_, Served> {
        // Whoever panics with it has at worst not noted how a queue started.
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
