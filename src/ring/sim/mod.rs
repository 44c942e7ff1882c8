//! A ring in memory whose faults come from a seed.
//!
//! [`SimRing`] carries [`Sqe`]s out on byte vectors, one for each registered file, loaded with what the file
//! held. The file itself is never touched again. What the kernel may do to us, it does as often as
//! [`Faults`] says: moves a part, fails, answers late, out of order, or twice.
//!
//! Contracts:
//! - The same seed and the same calls give the same answers.
//! - Memory is followed when an operation is carried out, some time between its push and its completion.
//! - Each file has a volatile cache over a second, *stable* copy. `fdatasync` makes stable what was complete (its
//!   completion reaped) when it was pushed, and what came later as chance has it; an `RWF_DSYNC` write makes its own
//!   sectors stable. A power cut leaves of each sector what is stable or anything written to it since; sectors are
//!   whole, and a write is not. An `fdatasync` that fails forgets what it should have written, as Linux does: the
//!   next one succeeds without it.
//! - Time stands still, until a wait finds nothing else to happen: then it goes on to the first timeout that is due. Or a
//!   test [moves it](SimRing::advance).
//! - A write, hole or zero range past the end of a file is a bug of ours, and panics, but for writes to files that
//!   [may grow](SimRing::let_grow). So does a wait for something that will never come.

mod cache;

use super::{Cqe, Kind, Mapping, Ring, Sqe, Target, UserData};
use crate::block::Iovec;
use cache::{Cache, Moment};
use libc::{EAGAIN, FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, RWF_DSYNC, RWF_NOWAIT};
use libc::{EBADF, ECANCELED, EFAULT, EINTR, EINVAL, EIO, ENOENT, ENOSPC, EOPNOTSUPP, ETIME};
use std::cell::RefCell;
use std::io;
use std::ops::Range;
use std::os::fd::RawFd;

/// What goes wrong. Numbers are percentages of the operations concerned; nothing does by default.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Reads and writes that move a part.
    pub short: u8,
    /// `EAGAIN` from reads and writes: what else there is the kernel tries again itself.
    pub again: u8,
    /// `EINTR` from everything but fdatasync.
    pub interrupted: u8,
    /// `EIO` from everything but fdatasync, after a part was done.
    pub io_error: u8,
    /// `ENOSPC` from everything that allocates.
    pub no_space: u8,
    /// `EIO` from fdatasync.
    pub sync_error: u8,
    /// Enters before which a write-back of the kernel's own fails: what is not stable is lost. The next fdatasync or
    /// `RWF_DSYNC` write fails with `EIO` for it, whoever's that is, and what comes after it succeeds.
    pub lost: u8,
    /// Operations that are left for a later enter, and completions that are; less than 100.
    pub delay: u8,
    /// Completions that come once more, or again after a long time.
    pub stale: u8,
    /// Operations are carried out in any order.
    pub reorder: bool,
    /// `EOPNOTSUPP` for holes.
    pub no_punch: bool,
    /// `EOPNOTSUPP` for zero ranges.
    pub no_zero_range: bool,
    /// `EOPNOTSUPP` for a block device's discard.
    pub no_discard: bool,
    /// `EBUSY` for a block device's discard: a page of it is in use.
    pub busy_discard: bool,
    /// The same for holes and zero ranges.
    pub busy_fallocate: bool,
    /// `EOPNOTSUPP` for a write that must not wait.
    pub no_nowait: bool,
    /// As a file opened with O_DIRECT: what addresses, and what lengths and offsets must be multiples of,
    /// or `EINVAL`.
    pub direct: Option<(usize, usize)>,
}

/// The ring. See the [module](self).
pub struct SimRing {
    state: RefCell<State>,
}

struct State {
    random: Random,
    faults: Faults,
    files: Vec<File>,
    /// The registered buffers; the index is the place in the table.
    buffers: Vec<Iovec<'static>>,
    /// Pushed, and not carried out.
    pending: Vec<Pending>,
    /// Writes that are carried out, and whose completions were not reaped.
    unseen: Vec<(UserData, Moment)>,
    /// Counts completions reaped: an order of what happened.
    reaped: u64,
    /// Carried out, and not to be seen before a later enter.
    late: Vec<Cqe>,
    /// To be reaped.
    ready: Vec<Cqe>,
    /// What [`Faults::stale`] draws from.
    past: Vec<Cqe>,
    /// Everything that was ever pushed.
    log: Vec<Sqe<'static>>,
    /// How often writes were lost.
    losses: u64,
    /// The time, in nanoseconds.
    clock: u64,
    /// What files may grow to.
    most: usize,
}

#[derive(Clone, Copy)]
struct Pending {
    sqe: Sqe<'static>,
    user_data: UserData,
    /// When it was pushed.
    since: u64,
    /// When a timeout is over, on the clock; otherwise 0.
    due: u64,
}

impl Pending {
    fn is_timeout(&self) -> bool {
        matches!(self.sqe, Sqe::Timeout { .. })
    }
}

struct File {
    fd: RawFd,
    bytes: Vec<u8>,
    stable: Vec<u8>,
    /// Written, and not stable.
    cache: Cache,
    /// A write-back failed, and nobody was told.
    failed: bool,
}

impl SimRing {
    /// A ring without files.
    pub fn new(seed: u64, faults: Faults) -> SimRing {
        assert!(faults.delay < 100, "nothing would ever complete");
        let state = State {
            random: Random(seed),
            faults,
            files: Vec::new(),
            buffers: Vec::new(),
            pending: Vec::new(),
            unseen: Vec::new(),
            reaped: 0,
            late: Vec::new(),
            ready: Vec::new(),
            past: Vec::new(),
            log: Vec::new(),
            losses: 0,
            clock: 0,
            most: 0,
        };
        SimRing { state: RefCell::new(state) }
    }

    /// Changes what goes wrong from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.state.borrow_mut().faults = faults;
    }

    /// Lets writes past the end make a file longer, up to so many bytes; then there is no space. What a cut leaves of it is as
    /// long as what is stable.
    pub fn let_grow(&self, most: usize) {
        self.state.borrow_mut().most = most;
    }

    /// How many of the operations pushed so far were such.
    pub fn count(&self, such: impl Fn(&Sqe<'_>) -> bool) -> usize {
        self.state.borrow().log.iter().filter(|sqe| such(sqe)).count()
    }

    /// How often writes that were not stable have been lost, told or not.
    pub fn losses(&self) -> u64 {
        self.state.borrow().losses
    }

    /// What the only file holds; `None` when there is none.
    pub fn contents(&self) -> Option<Vec<u8>> {
        self.state.borrow().files.first().map(|file| file.bytes.clone())
    }

    /// What a power cut would leave of the only file at the worst.
    pub fn stable(&self) -> Option<Vec<u8>> {
        self.state.borrow().files.first().map(|file| file.stable.clone())
    }

    /// Cuts the power: nothing that was pushed happens any more, and every file is what was stable of it, with so many
    /// percent of what was written to each sector since, oldest first.
    pub fn power_cut(&self, written_back: u8) {
        let State { files, pending, late, ready, random, .. } = &mut *self.state.borrow_mut();
        for file in files {
            file.cache.write_back(&mut file.stable, |_| random.percent(written_back));
            file.cache.clear();
            file.bytes.clone_from(&file.stable);
        }
        pending.clear();
        late.clear();
        ready.clear();
    }

    /// Registers a buffer in the next place of the table, and says which one that is.
    pub fn add_buffer(&self, buffer: Iovec<'static>) -> u16 {
        let buffers = &mut self.state.borrow_mut().buffers;
        buffers.push(buffer);
        (buffers.len() - 1) as u16
    }

    /// Makes `fd` readable: the polls on it complete.
    pub fn signal(&self, fd: RawFd) {
        self.complete_polls(fd, true);
    }

    /// As [`signal`](Self::signal), and multishot polls end with it, as the kernel's do when there is no room for their
    /// completions.
    pub fn signal_last(&self, fd: RawFd) {
        self.complete_polls(fd, false);
    }

    /// Moves the time on to `now`: the timeouts complete that are over by then.
    pub fn advance(&self, now: u64) {
        let state = &mut *self.state.borrow_mut();
        while state.first_due().is_some_and(|due| due <= now) {
            state.pass_time();
        }
        state.clock = state.clock.max(now);
    }

    /// When the first timeout is over.
    pub fn next_timeout(&self) -> Option<u64> {
        self.state.borrow().first_due()
    }

    fn complete_polls(&self, fd: RawFd, goes_on: bool) {
        let State { pending, ready, .. } = &mut *self.state.borrow_mut();
        pending.retain(|Pending { sqe, user_data, .. }| {
            let (file, more) = match *sqe {
                Sqe::PollOnce { file } => (file, false),
                Sqe::PollMultishot { file } => (file, goes_on),
                _ => return true,
            };
            let polled = file == Target::Fd(fd);
            if polled {
                ready.push(Cqe { user_data: *user_data, result: i32::from(libc::POLLIN), more });
            }
            !polled || more
        });
    }
}

impl Ring for SimRing {
    unsafe fn push(&self, sqe: &Sqe<'_>, user_data: UserData) {
        // SAFETY: whoever pushes keeps the borrow until the completion, and nothing here is followed later.
        let sqe = unsafe { std::mem::transmute::<Sqe<'_>, Sqe<'static>>(*sqe) };
        let state = &mut *self.state.borrow_mut();
        let since = state.reaped;
        let due = match sqe {
            Sqe::Timeout { after } => {
                state.clock.saturating_add(u64::try_from(after.as_nanos()).unwrap_or(u64::MAX))
            }
            _ => 0,
        };
        state.pending.push(Pending { sqe, user_data, since, due });
        state.log.push(sqe);
    }

    fn enter(&self, wait: bool) -> io::Result<()> {
        let state = &mut *self.state.borrow_mut();
        loop {
            state.pass();
            if !wait || !state.ready.is_empty() {
                return Ok(());
            }
            assert!(state.can_progress() || state.pass_time(), "the ring is asked to sleep for ever");
        }
    }

    fn reap(&self, into: &mut Vec<Cqe>) {
        let state = &mut *self.state.borrow_mut();
        for cqe in std::mem::take(&mut state.ready) {
            into.push(cqe);
            state.reaped += 1;
            let now = state.reaped;
            state.unseen.retain(|(user_data, moment)| {
                let ours = *user_data == cqe.user_data;
                if ours {
                    moment.set(Some(now));
                }
                !ours
            });
            if cqe.user_data.kind() == Some(Kind::Slot) {
                state.past.push(cqe);
            }
            if state.random.percent(state.faults.stale) && !state.past.is_empty() {
                let mut stale = state.past[state.random.below(state.past.len())];
                if state.random.percent(50) {
                    stale.result = -EIO;
                }
                into.push(stale);
            }
        }
    }

    fn submit_sync(&self, sqe: &Sqe<'_>) -> i32 {
        let state = &mut *self.state.borrow_mut();
        state.reaped += 1;
        let moment = Moment::new(Some(state.reaped).into());
        state.perform(sqe, state.reaped, &moment).unwrap_or_else(|errno| -errno)
    }

    fn now(&self) -> u64 {
        self.state.borrow().clock
    }

    fn register(&self, fd: RawFd) -> Target {
        let files = &mut self.state.borrow_mut().files;
        let known = files.iter().position(|file| file.fd == fd);
        let index = known.unwrap_or_else(|| {
            let bytes = std::fs::read(format!("/proc/self/fd/{fd}")).unwrap();
            files.push(File { fd, stable: bytes.clone(), bytes, cache: Cache::default(), failed: false });
            files.len() - 1
        });
        Target::Fixed(index as u32)
    }
}

impl State {
    /// The kernel writes back what it likes, and fails.
    fn lose(&mut self) {
        for file in &mut self.files {
            if !file.cache.is_empty() && self.random.percent(self.faults.lost) {
                file.cache.clear();
                file.failed = true;
                self.losses += 1;
            }
        }
    }

    /// One enter's work.
    fn pass(&mut self) {
        self.lose();
        for cqe in std::mem::take(&mut self.late) {
            self.answer(cqe);
        }
        let (waiting, mut batch): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.pending).into_iter().partition(|pending| waits(&pending.sqe));
        self.pending = waiting;
        if self.faults.reorder {
            for last in (1..batch.len()).rev() {
                batch.swap(last, self.random.below(last + 1));
            }
        }
        for pending in batch {
            if self.random.percent(self.faults.delay) {
                self.pending.push(pending);
                continue;
            }
            let Pending { sqe, user_data, since, .. } = pending;
            let moment = Moment::default();
            let result = self.perform(&sqe, since, &moment).unwrap_or_else(|errno| -errno);
            self.unseen.push((user_data, moment));
            self.answer(Cqe { user_data, result, more: false });
        }
    }

    fn answer(&mut self, cqe: Cqe) {
        let to = if self.random.percent(self.faults.delay) { &mut self.late } else { &mut self.ready };
        to.push(cqe);
    }

    /// Whether another pass could complete something.
    fn can_progress(&self) -> bool {
        !self.late.is_empty() || !self.pending.iter().all(|pending| waits(&pending.sqe))
    }

    fn first_due(&self) -> Option<u64> {
        self.pending.iter().filter(|pending| pending.is_timeout()).map(|pending| pending.due).min()
    }

    /// Nothing else can happen, so the first timeout expires. False when there is none.
    fn pass_time(&mut self) -> bool {
        let Some(first) = self.first_due() else { return false };
        let at = self.pending.iter().position(|pending| pending.is_timeout() && pending.due == first);
        let Some(Pending { user_data, due, .. }) = at.map(|at| self.pending.remove(at)) else { return false };
        self.clock = self.clock.max(due);
        self.ready.push(Cqe { user_data, result: -ETIME, more: false });
        true
    }

    /// Carries out what was pushed at `since` and whose completion will have been seen at `moment`.
    fn perform(&mut self, sqe: &Sqe<'_>, since: u64, moment: &Moment) -> Result<i32, i32> {
        match *sqe {
            Sqe::Read { file, range, offset } => self.read(file, &[range], offset),
            Sqe::Write { file, range, offset, rw_flags } => {
                self.write(file, &[range], offset, rw_flags, moment)
            }
            Sqe::Readv { file, ranges, offset } => self.read(file, ranges, offset),
            Sqe::Writev { file, ranges, offset, rw_flags } => {
                self.write(file, ranges, offset, rw_flags, moment)
            }
            Sqe::ReadFixed { file, index, skip, len, offset } => {
                let buffer = self.buffer(index, skip, len)?;
                self.read(file, &[buffer], offset)
            }
            Sqe::WriteFixed { file, index, skip, len, offset, rw_flags } => {
                let buffer = self.buffer(index, skip, len)?;
                self.write(file, &[buffer], offset, rw_flags, moment)
            }
            Sqe::Fdatasync { file } => {
                let failed = self.random.percent(self.faults.sync_error);
                let State { files, random, losses, .. } = self;
                let file = find(files, file).ok_or(EBADF)?;
                let complete = |at: &Moment| at.get().is_some_and(|at| at <= since);
                let told = std::mem::take(&mut file.failed);
                if failed {
                    file.cache.clear();
                    *losses += 1;
                    return Err(EIO);
                }
                file.cache.write_back(&mut file.stable, |at| complete(at) || random.percent(50));
                if told { Err(EIO) } else { Ok(0) }
            }
            Sqe::Fallocate { .. } if self.faults.busy_fallocate => Err(libc::EBUSY),
            Sqe::Fallocate { file, mode, offset, len } => {
                let unsupported = match mode & !FALLOC_FL_KEEP_SIZE {
                    FALLOC_FL_PUNCH_HOLE => self.faults.no_punch || mode & FALLOC_FL_KEEP_SIZE == 0,
                    FALLOC_FL_ZERO_RANGE => self.faults.no_zero_range,
                    _ => true,
                };
                if unsupported { Err(EOPNOTSUPP) } else { self.set(file, offset, len, 0, moment) }
            }
            Sqe::BlockDiscard { .. } if self.faults.no_discard => Err(EOPNOTSUPP),
            Sqe::BlockDiscard { .. } if self.faults.busy_discard => Err(libc::EBUSY),
            // Undefined contents are not zeroes.
            Sqe::BlockDiscard { file, offset, len } => self.set(file, offset, len, 0xd1, moment),
            Sqe::Cancel { user_data } => {
                let at =
                    self.pending.iter().position(|pending| pending.user_data == user_data).ok_or(ENOENT)?;
                self.pending.remove(at);
                self.answer(Cqe { user_data, result: -ECANCELED, more: false });
                Ok(0)
            }
            // No sockets, no ublk.
            _ => Err(EINVAL),
        }
    }

    fn read(&mut self, file: Target, iovecs: &[Iovec<'_>], offset: u64) -> Result<i32, i32> {
        let (count, error) = self.how_much(iovecs, offset, false)?;
        let file = self.file(file)?;
        let from = file.bytes.get(offset as usize..).unwrap_or_default();
        let count = count.min(from.len());
        let mut done = 0;
        for iovec in iovecs {
            let step = iovec.len().min(count - done);
            // SAFETY: the promise of `Iovec::new`; `step` bytes of `from` are there.
            unsafe { std::ptr::copy(from[done..].as_ptr(), iovec.base(), step) };
            done += step;
        }
        error.map_or(Ok(count as i32), Err)
    }

    fn write(
        &mut self,
        file: Target,
        iovecs: &[Iovec<'_>],
        offset: u64,
        rw_flags: i32,
        moment: &Moment,
    ) -> Result<i32, i32> {
        if rw_flags & RWF_NOWAIT != 0 && self.faults.no_nowait {
            return Err(EOPNOTSUPP);
        }
        let (count, error) = self.how_much(iovecs, offset, true)?;
        let most = self.most;
        let file = self.file(file)?;
        let end = offset as usize + count;
        if end > file.bytes.len() && most > 0 {
            if end > most {
                return Err(ENOSPC);
            }
            file.bytes.resize(end, 0);
        }
        let whole = file.range(offset, count as u64);
        let mut at = whole.start;
        for iovec in iovecs {
            let to = &mut file.bytes[at..whole.end];
            let step = iovec.len().min(to.len());
            // SAFETY: the promise of `Iovec::new`; `to` has room for `step` bytes.
            unsafe { std::ptr::copy(iovec.base(), to.as_mut_ptr(), step) };
            at += step;
        }
        file.cache.add(whole.clone(), &file.bytes, moment);
        if rw_flags & RWF_DSYNC != 0 && error.is_none() {
            file.cache.write_back_range(&mut file.stable, whole);
            if std::mem::take(&mut file.failed) {
                return Err(EIO);
            }
        }
        error.map_or(Ok(count as i32), Err)
    }

    /// How many bytes a transfer moves, and the error it tells afterwards; or the one it tells at once.
    fn how_much(
        &mut self,
        iovecs: &[Iovec<'_>],
        offset: u64,
        write: bool,
    ) -> Result<(usize, Option<i32>), i32> {
        let Faults { direct, again, interrupted, io_error, no_space, short, .. } = self.faults;
        let (memory, unit) = direct.unwrap_or((1, 1));
        let fits = |iovec: &Iovec<'_>| {
            iovec.base().addr().is_multiple_of(memory) && iovec.len().is_multiple_of(unit)
        };
        if !offset.is_multiple_of(unit as u64) || !iovecs.iter().all(fits) {
            return Err(EINVAL);
        }
        let random = &mut self.random;
        if random.percent(again) {
            return Err(EAGAIN);
        }
        if random.percent(interrupted) {
            return Err(EINTR);
        }
        if write && random.percent(no_space) {
            return Err(ENOSPC);
        }
        let all: usize = iovecs.iter().map(Iovec::len).sum();
        let units = all / unit;
        if random.percent(io_error) {
            return Ok((random.below(units + 1) * unit, Some(EIO)));
        }
        let part = units > 1 && random.percent(short);
        Ok((if part { (1 + random.below(units - 1)) * unit } else { all }, None))
    }

    /// Fills a range with one byte.
    fn set(&mut self, file: Target, offset: u64, len: u64, byte: u8, moment: &Moment) -> Result<i32, i32> {
        let Faults { interrupted, io_error, no_space, .. } = self.faults;
        if self.random.percent(interrupted) {
            return Err(EINTR);
        }
        if self.random.percent(no_space) {
            return Err(ENOSPC);
        }
        let failed = self.random.percent(io_error);
        let unit = self.faults.direct.map_or(1, |(_, unit)| unit);
        let done = if failed { (self.random.below(len as usize) / unit * unit) as u64 } else { len };
        let file = self.file(file)?;
        let range = file.range(offset, done);
        file.bytes[range.clone()].fill(byte);
        file.cache.add(range, &file.bytes, moment);
        if failed { Err(EIO) } else { Ok(0) }
    }

    fn buffer(&self, index: u16, skip: u64, len: u32) -> Result<Iovec<'static>, i32> {
        let mut buffer = *self.buffers.get(index as usize).ok_or(EFAULT)?;
        buffer.advance(skip as usize);
        buffer.split_off(len as usize);
        if buffer.len() == len as usize { Ok(buffer) } else { Err(EFAULT) }
    }

    fn file(&mut self, target: Target) -> Result<&mut File, i32> {
        find(&mut self.files, target).ok_or(EBADF)
    }
}

fn find(files: &mut [File], target: Target) -> Option<&mut File> {
    match target {
        Target::Fixed(index) => files.get_mut(index as usize),
        Target::Fd(fd) => files.iter_mut().find(|file| file.fd == fd),
    }
}

impl File {
    fn range(&self, offset: u64, len: u64) -> Range<usize> {
        let (start, end) = (offset as usize, (offset + len) as usize);
        assert!(end <= self.bytes.len(), "{start}..{end} is past the end of the file");
        start..end
    }
}

/// Whether an operation waits for something that a pass does not bring about.
fn waits(sqe: &Sqe<'_>) -> bool {
    matches!(sqe, Sqe::PollOnce { .. } | Sqe::PollMultishot { .. } | Sqe::Timeout { .. })
}

/// Copies bytes into a mapping.
pub fn put(mapping: &Mapping, offset: usize, bytes: &[u8]) {
    // SAFETY: `gather` only reads the range, before `bytes` can go.
    mapping.gather(offset, &[unsafe { Iovec::new(bytes.as_ptr().cast_mut(), bytes.len()) }]);
}

/// Copies bytes out of a mapping.
pub fn get(mapping: &Mapping, offset: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    // SAFETY: `scatter` fills the range before anybody looks at `bytes` again.
    mapping.scatter(offset, &[unsafe { Iovec::new(bytes.as_mut_ptr(), len) }]);
    bytes
}

/// SplitMix64: a counter, well stirred.
pub struct Random(pub u64);

impl Random {
    /// 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ bits >> 31
    }

    /// So many bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| self.bits().to_ne_bytes()).collect();
        bytes.truncate(len);
        bytes
    }

    /// Less than `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.bits() % bound as u64) as usize
    }

    /// True that often.
    pub fn percent(&mut self, percent: u8) -> bool {
        percent > 0 && self.below(100) < percent as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsRawFd;

    fn slot(number: u32) -> UserData {
        UserData::new(Kind::Slot, 1, number)
    }

    /// Pushes `sqes` and waits for as many completions.
    fn results(ring: &SimRing, sqes: &[Sqe<'_>]) -> Vec<i32> {
        for (number, sqe) in sqes.iter().enumerate() {
            // SAFETY: borrowed until all completions are here.
            unsafe { ring.push(sqe, slot(number as u32)) };
        }
        let mut seen = Vec::new();
        while seen.len() < sqes.len() {
            ring.enter(true).unwrap();
            ring.reap(&mut seen);
        }
        seen.sort_by_key(|cqe| cqe.user_data.number());
        seen.iter().map(|cqe| cqe.result).collect()
    }

    fn file(ring: &SimRing) -> (std::fs::File, Target) {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 4096]).unwrap();
        let target = ring.register(file.as_raw_fd());
        (file, target)
    }

    #[test]
    fn only_what_was_synced_survives_a_power_cut() {
        let ring = SimRing::new(1, Faults::default());
        let (_file, file) = file(&ring);
        let mut bytes = [9u8; 10];
        let range = Iovec::of(&mut bytes);
        let write = |offset, rw_flags| Sqe::Write { file, range, offset, rw_flags };
        assert_eq!(results(&ring, &[write(0, 0)]), [10]);
        assert_eq!(results(&ring, &[Sqe::Fdatasync { file }]), [0]);
        assert_eq!(results(&ring, &[write(512, 0), write(1024, RWF_DSYNC)]), [10, 10]);
        ring.set_faults(Faults { sync_error: 100, ..Faults::default() });
        assert_eq!(results(&ring, &[Sqe::Fdatasync { file }]), [-EIO]);
        ring.set_faults(Faults::default());
        assert_eq!(results(&ring, &[Sqe::Fdatasync { file }]), [0]);
        ring.power_cut(0);
        let left = ring.contents().unwrap();
        assert_eq!((left[0], left[512], left[1024], left[1536]), (9, 7, 9, 7));
    }

    /// What was not complete when the sync was pushed may be stable afterwards or not, and a cut may keep anything.
    #[test]
    fn a_loss_is_told_once_to_whoever_syncs_first() {
        let mut bytes = [1u8; 512];
        let range = Iovec::of(&mut bytes);
        let write = |file, rw_flags| Sqe::Write { file, range, offset: 0, rw_flags };
        for told in [false, true] {
            let ring = SimRing::new(3, Faults::default());
            let (_file, target) = file(&ring);
            assert_eq!(results(&ring, &[write(target, 0)]), [512]);
            ring.set_faults(Faults { lost: 100, ..Faults::default() });
            ring.enter(false).unwrap();
            ring.set_faults(Faults::default());
            assert_eq!((ring.losses(), ring.stable().unwrap()[0]), (1, 7));
            let sync = if told { write(target, RWF_DSYNC) } else { Sqe::Fdatasync { file: target } };
            assert_eq!(results(&ring, &[sync]), [-EIO]);
            assert_eq!(results(&ring, &[Sqe::Fdatasync { file: target }]), [0]);
            // Its own bytes a durable write has brought home; what was lost stays so.
            assert_eq!(ring.stable().unwrap()[0], if told { 1 } else { 7 });
        }
    }

    #[test]
    fn what_is_not_promised_is_up_to_chance() {
        let after = |seed, written_back| {
            let ring = SimRing::new(seed, Faults::default());
            let (_file, file) = file(&ring);
            let mut bytes = [9u8; 1024];
            let range = Iovec::of(&mut bytes);
            let write = |offset| Sqe::Write { file, range, offset, rw_flags: 0 };
            assert_eq!(results(&ring, &[write(0), Sqe::Fdatasync { file }, write(2048)]), [1024, 0, 1024]);
            ring.power_cut(written_back);
            let left = ring.contents().unwrap();
            [0, 512, 2048, 2560].map(|at| left[at] == 9)
        };
        let sometimes = |such: &dyn Fn([bool; 4]) -> bool, written_back| {
            let count = (0..100).filter(|seed| such(after(*seed, written_back))).count();
            (1..100).contains(&count)
        };
        assert!(sometimes(&|left| left[0], 0), "a write beside the sync");
        assert!(sometimes(&|left| left[0] != left[1], 0), "torn by the sync");
        assert!((0..100).all(|seed| !after(seed, 0)[2]), "a write after the sync");
        assert!(sometimes(&|left| left[2] != left[3], 50), "torn by the cut");
        assert!((0..100).all(|seed| after(seed, 100) == [true; 4]));
    }

    #[test]
    fn the_seed_alone_decides() {
        let run = |seed| {
            let faults = Faults { short: 50, again: 20, delay: 50, reorder: true, ..Faults::default() };
            let ring = SimRing::new(seed, faults);
            let (_file, file) = file(&ring);
            let mut bytes = [0u8; 100];
            let range = Iovec::of(&mut bytes);
            let reads: Vec<_> = (0..30).map(|offset| Sqe::Read { file, range, offset }).collect();
            results(&ring, &reads)
        };
        assert_eq!(run(5), run(5));
        assert_ne!(run(5), run(6));
    }

    #[test]
    fn polls_wait_and_cancels_end_them() {
        let ring = SimRing::new(1, Faults::default());
        let push = |sqe, number| {
            // SAFETY: it borrows nothing.
            unsafe { ring.push(&sqe, slot(number)) }
        };
        push(Sqe::PollMultishot { file: Target::Fd(77) }, 0);
        let mut seen = Vec::new();
        ring.enter(false).unwrap();
        ring.reap(&mut seen);
        assert!(seen.is_empty());
        ring.signal(77);
        ring.signal(78);
        push(Sqe::Cancel { user_data: slot(0) }, 1);
        push(Sqe::Cancel { user_data: slot(9) }, 2);
        ring.enter(true).unwrap();
        ring.reap(&mut seen);
        let seen: Vec<_> = seen.iter().map(|cqe| (cqe.user_data.number(), cqe.result, cqe.more)).collect();
        assert_eq!(seen, [(0, 1, true), (0, -ECANCELED, false), (1, 0, false), (2, -ENOENT, false)]);
    }

    #[test]
    fn time_goes_on_to_the_timeout_that_is_due_first() {
        let ring = SimRing::new(1, Faults::default());
        let times = [3000, 1000, 2000].map(std::time::Duration::from_millis);
        for (number, after) in (0..).zip(times) {
            // SAFETY: it borrows nothing.
            unsafe { ring.push(&Sqe::Timeout { after }, slot(number)) };
        }
        let seen = || {
            let mut seen = Vec::new();
            ring.reap(&mut seen);
            seen.iter().map(|cqe| cqe.user_data.number()).collect::<Vec<_>>()
        };
        ring.enter(true).unwrap();
        assert_eq!((seen(), ring.now()), (vec![1], 1_000_000_000));
        ring.advance(1_500_000_000);
        assert_eq!((seen(), ring.next_timeout()), (vec![], Some(2_000_000_000)));
        ring.advance(5_000_000_000);
        assert_eq!((seen(), ring.now(), ring.next_timeout()), (vec![2, 0], 5_000_000_000, None));
    }

    #[test]
    #[should_panic(expected = "sleep for ever")]
    fn a_wait_for_nothing_is_caught() {
        let _ = SimRing::new(1, Faults::default()).enter(true);
    }
}
