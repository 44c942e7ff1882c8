//! One block request, as a frontend hands it to a volume.

#![forbid(unsafe_code)]

use super::Data;
use std::fmt;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Fill the data from the volume.
    Read,
    /// Store the data.
    Write,
    /// Bring every write that was acknowledged before to stable storage.
    Flush,
    /// Contents undefined afterwards.
    Discard,
    /// Contents read zero afterwards.
    WriteZeroes,
}

impl Op {
    /// For messages.
    pub const fn name(self) -> &'static str {
        match self {
            Op::Read => "read",
            Op::Write => "write",
            Op::Flush => "flush",
            Op::Discard => "discard",
            Op::WriteZeroes => "write-zeroes",
        }
    }
}

/// For messages.
impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a request does and where, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestSummary {
    op: Op,
    sector: u64,
    sectors: u32,
}

impl RequestSummary {
    /// What it does, in a word.
    pub const fn name(&self) -> &'static str {
        self.op.name()
    }
}

impl fmt::Display for RequestSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.op.fmt(f)?;
        if self.op == Op::Flush {
            return Ok(());
        }
        write!(f, " of {} sectors at sector {}", self.sectors, self.sector)
    }
}

/// How a request is to be carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// Force unit access: this write is on stable storage before it completes.
    pub fua: bool,
    /// A write-zeroes may give its blocks back to the store.
    pub unmap: bool,
}

/// One request: a value, so that it can be tried again. `sector` and `sectors` are in units of 512 bytes ([`SECTOR`](super::SECTOR)).
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// What to do.
    pub op: Op,
    /// How.
    pub flags: Flags,
    /// First sector.
    pub sector: u64,
    /// Sectors; 0 for flush.
    pub sectors: u32,
    /// For read and write, exactly `sectors * 512` bytes.
    pub data: Data<'a>,
}

impl<'a> Request<'a> {
    /// Length in bytes; cannot overflow.
    pub fn len(&self) -> u64 {
        u64::from(self.sectors) << super::SECTOR_SHIFT
    }

    /// The `sectors` from `skip` on, as a request of their own. For ranges of memory, costs a walk over them.
    pub fn part(&self, skip: u32, sectors: u32) -> Request<'a> {
        let bytes = |sectors: u32| u64::from(sectors) << super::SECTOR_SHIFT;
        let data = self.data.part(bytes(skip), bytes(sectors));
        Request { sector: self.sector + u64::from(skip), sectors, data, ..*self }
    }

    /// For messages.
    pub fn summary(&self) -> RequestSummary {
        RequestSummary { op: self.op, sector: self.sector, sectors: self.sectors }
    }

    /// True for a request over no sectors (a flush).
    pub fn is_empty(&self) -> bool {
        self.sectors == 0
    }
}
