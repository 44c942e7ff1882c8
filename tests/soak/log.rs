//! The write log: which writes each sector was given, when, and which of them a read may find there.
//!
//! A read may find a write that was submitted before the read ended, unless another one was acknowledged before the
//! read began that was itself submitted after the first had ended. So what was acknowledged stays until it is
//! overwritten; what is in flight, or failed, may be there or not; and of writes in flight together any may be last.
//! A read during which a write of the same sector is under way may find a part of it, since the page cache copies for
//! both at once; after it, only all of it.

use super::stamp::Content;
use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

/// Order of events; no two are at the same time.
type Tick = u64;

/// One write of one sector.
struct Write {
    version: u64,
    zeroes: bool,
    submitted: Tick,
    ended: Option<Tick>,
    /// From then on no read that begins may find it.
    superseded: Option<Tick>,
}

/// What is wrong with what was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Older than what was acknowledged.
    Lost,
    /// Not a whole write.
    Torn,
    /// Of another place, another run, or never written.
    Foreign,
}

/// One sector that holds what it must not.
#[derive(Clone, Debug)]
pub struct Fault {
    pub kind: Kind,
    /// For people: what was found and what is allowed.
    pub text: String,
}

/// All sectors of a volume, for all of its life.
pub struct Log {
    seed: u64,
    now: Tick,
    versions: u64,
    sectors: Vec<Vec<Write>>,
    writing: HashMap<u64, Range<u64>>,
    reading: BTreeSet<Tick>,
}

impl Log {
    /// A volume of zeroes.
    pub fn new(seed: u64, sectors: u64) -> Log {
        let mut log = Log {
            seed,
            now: 1,
            versions: 0,
            sectors: Vec::new(),
            writing: HashMap::new(),
            reading: BTreeSet::new(),
        };
        log.grow(sectors);
        log
    }

    /// Of the run.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Capacity in sectors.
    pub fn len(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// More sectors of zeroes, up to `sectors` in all.
    pub fn grow(&mut self, sectors: u64) {
        let blank =
            || vec![Write { version: 0, zeroes: true, submitted: 0, ended: Some(0), superseded: None }];
        self.sectors.resize_with(sectors as usize, blank);
    }

    fn tick(&mut self) -> Tick {
        self.now += 1;
        self.now
    }

    fn places(range: &Range<u64>) -> Range<usize> {
        range.start as usize..range.end as usize
    }

    /// A write is about to be submitted: its version. `zeroes`: of zeroes, not of stamps.
    pub fn write(&mut self, range: Range<u64>, zeroes: bool) -> u64 {
        let submitted = self.tick();
        self.versions += 1;
        let version = self.versions;
        let oldest = self.reading.first().copied().unwrap_or(Tick::MAX);
        for writes in &mut self.sectors[Log::places(&range)] {
            // No read is left that may find these.
            writes.retain(|write| write.superseded.is_none_or(|tick| tick > oldest));
            writes.push(Write { version, zeroes, submitted, ended: None, superseded: None });
        }
        self.writing.insert(version, range);
        version
    }

    /// A write has completed, or can never any more. Acknowledged: with success.
    pub fn written(&mut self, version: u64, acknowledged: bool) {
        let range = self.writing.remove(&version).expect("a write in flight");
        let now = self.tick();
        for writes in &mut self.sectors[Log::places(&range)] {
            // In flight, so it was not superseded and not forgotten.
            let own = writes.iter_mut().find(|write| write.version == version).expect("a write in flight");
            own.ended = Some(now);
            let submitted = own.submitted;
            if acknowledged {
                let older = |write: &&mut Write| write.ended.is_some_and(|ended| ended < submitted);
                for write in writes.iter_mut().filter(older) {
                    write.superseded.get_or_insert(now);
                }
            }
        }
    }

    /// A read is about to be submitted; for [`Log::read`].
    pub fn begin_read(&mut self) -> Tick {
        let now = self.tick();
        self.reading.insert(now);
        now
    }

    /// A read has completed, with what was read from `sector` on; nothing where it failed.
    pub fn read(&mut self, began: Tick, sector: u64, contents: &[Content]) -> Vec<Fault> {
        let places = (sector..).zip(contents);
        let faults = places.filter_map(|(sector, content)| self.check(began, sector, *content)).collect();
        self.reading.remove(&began);
        faults
    }

    /// Whoever submitted what is in flight is gone, and the service is done with it.
    pub fn abandon(&mut self) {
        let versions: Vec<u64> = self.writing.keys().copied().collect();
        for version in versions {
            self.written(version, false);
        }
        self.reading.clear();
    }

    fn check(&self, began: Tick, sector: u64, content: Content) -> Option<Fault> {
        let writes = &self.sectors[sector as usize];
        let allowed = |write: &&Write| write.superseded.is_none_or(|tick| tick > began);
        let kind = match content {
            Content::Zeroes if writes.iter().filter(allowed).any(|write| write.zeroes) => return None,
            Content::Zeroes => Kind::Lost,
            Content::Torn if writes.iter().any(|write| write.ended.is_none_or(|ended| ended > began)) => {
                return None;
            }
            Content::Torn => Kind::Torn,
            Content::Stamp(stamp) => {
                if stamp.seed != self.seed || stamp.sector != sector || stamp.version > self.versions {
                    Kind::Foreign
                } else if writes
                    .iter()
                    .filter(allowed)
                    .any(|write| write.version == stamp.version && !write.zeroes)
                {
                    return None;
                } else {
                    Kind::Lost
                }
            }
        };
        let list: Vec<String> = writes
            .iter()
            .filter(allowed)
            .map(|write| {
                let what = if write.zeroes { "zeroes" } else { "write" };
                let state = if write.ended.is_some() { "ended" } else { "in flight" };
                format!("{what} {} ({state})", write.version)
            })
            .collect();
        let text = format!("sector {sector}: {kind:?}: found {content:x?}, allowed {}", list.join(", "));
        Some(Fault { kind, text })
    }
}
