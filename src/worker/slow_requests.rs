//! Which requests take too long, and what they wait for.
//!
//! A request costs some stores when it begins and when it ends: no clock is read. While there are any, a timer looks
//! at all of them twice in the limit, and compares what it finds with what it found before; so a request is told of
//! when it is as old as the limit at least, and half as old again at most. Then at twice the age, and so on. A worker
//! without requests has no timer.

use crate::block::{Request, RequestSummary};
use crate::ring::{Core, Kind, Ring, Sqe, UserData};
use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// The timer of one worker.
pub(super) struct SlowRequestLog {
    /// What is too long; zero for never.
    limit: Duration,
    armed: Cell<bool>,
    /// Requests under way.
    busy: Rc<Cell<usize>>,
}

/// What a slot is at.
#[derive(Default)]
pub(super) struct CurrentRequest {
    busy: Rc<Cell<usize>>,
    /// Requests begun.
    count: Cell<u64>,
    doing: Cell<Option<RequestSummary>>,
    seen: Cell<Option<Seen>>,
}

/// What a look found.
#[derive(Clone, Copy)]
struct Seen {
    /// Which request.
    count: u64,
    /// Its first look.
    since: Instant,
    /// The age at which it is told of next.
    tell_at: Duration,
}

pub(super) const TIMER: UserData = UserData::new(Kind::SlowRequests, 0, 0);

impl SlowRequestLog {
    /// Looks for requests that take longer than `limit`; zero looks for none.
    pub fn new(limit: Duration) -> SlowRequestLog {
        SlowRequestLog { limit, armed: Cell::new(false), busy: Rc::default() }
    }

    /// For a slot of this worker.
    pub fn slot(&self) -> Rc<CurrentRequest> {
        Rc::new(CurrentRequest { busy: self.busy.clone(), ..CurrentRequest::default() })
    }

    /// Requests under way.
    pub fn in_flight(&self) -> usize {
        self.busy.get()
    }

    /// Sets the timer if there is something to look at. Before each `enter`; costs a comparison when there is not.
    pub fn arm<R: Ring>(&self, core: &Core<R>) {
        if self.busy.get() == 0 || self.armed.get() || self.limit.is_zero() {
            return;
        }
        self.armed.set(true);
        core.push(&Sqe::Timeout { after: self.limit / 2 }, TIMER);
    }

    /// The timer has expired: the requests among `slots` that are to be told of, and how old each is at least.
    pub fn look<'a, T>(
        &'a self,
        slots: impl Iterator<Item = (T, &'a CurrentRequest)>,
    ) -> impl Iterator<Item = (T, RequestSummary, Duration)> {
        self.armed.set(false);
        let now = Instant::now();
        slots.filter_map(move |(whose, current)| {
            current.look(now, self.limit).map(|(doing, age)| (whose, doing, age))
        })
    }
}

impl CurrentRequest {
    /// A request begins.
    pub fn begin(&self, request: &Request<'_>) {
        self.busy.set(self.busy.get() + 1);
        self.count.set(self.count.get() + 1);
        self.doing.set(Some(request.summary()));
    }

    /// It ends.
    pub fn end(&self) {
        self.busy.set(self.busy.get() - 1);
        self.doing.set(None);
    }

    /// The request under way, and its age at least, if that is due to be told.
    fn look(&self, now: Instant, limit: Duration) -> Option<(RequestSummary, Duration)> {
        let (doing, count) = (self.doing.get()?, self.count.get());
        let new = Seen { count, since: now, tell_at: limit };
        let seen = self.seen.get().filter(|seen| seen.count == count).unwrap_or(new);
        let age = now.duration_since(seen.since);
        let due = age >= seen.tell_at;
        self.seen.set(Some(Seen { tell_at: if due { age * 2 } else { seen.tell_at }, ..seen }));
        due.then_some((doing, age))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{Data, Flags, Op};

    const LIMIT: Duration = Duration::from_secs(10);

    fn begin(current: &CurrentRequest, sector: u64) {
        let (op, flags, data) = (Op::Write, Flags::default(), Data::None);
        current.begin(&Request { op, flags, sector, sectors: 8, data });
    }

    #[test]
    fn a_slow_request_is_told_of_less_and_less_often() {
        let current = SlowRequestLog::new(LIMIT).slot();
        let start = Instant::now();
        begin(&current, 7);
        let told = (0..40).filter(|tick| current.look(start + LIMIT / 2 * *tick, LIMIT).is_some());
        assert_eq!(told.collect::<Vec<_>>(), [2, 4, 8, 16, 32]);
    }

    #[test]
    fn requests_that_follow_each_other_are_not_one() {
        let current = SlowRequestLog::new(LIMIT).slot();
        let start = Instant::now();
        for tick in 0..10 {
            begin(&current, 7);
            assert_eq!(current.look(start + LIMIT / 2 * tick, LIMIT), None);
            current.end();
            assert_eq!(current.look(start + LIMIT / 2 * tick, LIMIT), None, "nothing is under way");
        }
        begin(&current, 9);
        assert_eq!(current.look(start + LIMIT * 10, LIMIT), None);
        let (doing, age) = current.look(start + LIMIT * 11, LIMIT).unwrap();
        assert_eq!((doing.to_string().as_str(), age), ("write of 8 sectors at sector 9", LIMIT));
    }

    #[test]
    fn the_timer_runs_only_while_there_are_requests() {
        use crate::ring::sim::{Faults, SimRing};
        let core = Core::new(SimRing::new(1, Faults::default()));
        let ring = core.ring();
        let timers = || ring.count(|sqe| matches!(sqe, Sqe::Timeout { .. }));
        let log = SlowRequestLog::new(LIMIT);
        let current = log.slot();
        log.arm(&core);
        assert_eq!(timers(), 0);
        begin(&current, 7);
        log.arm(&core);
        log.arm(&core);
        assert_eq!(timers(), 1);
        current.end();
        assert_eq!(log.look([((), &*current)].into_iter()).count(), 0);
        log.arm(&core);
        assert_eq!(timers(), 1);
        begin(&current, 8);
        log.arm(&core);
        assert_eq!(timers(), 2);
        let never = SlowRequestLog::new(Duration::ZERO);
        begin(&never.slot(), 7);
        never.arm(&core);
        assert_eq!(timers(), 2);
    }
}
