//! What a message says of a request.

#![forbid(unsafe_code)]

use crate::block::{Op, Request};
use crate::ring::{Io, Ring};
use std::fmt;

/// A request, for messages.
#[derive(Clone, Copy)]
pub(in crate::engine) struct What {
    op: Op,
    sector: u64,
    sectors: u32,
    tag: Option<u16>,
}

impl What {
    pub fn of<R: Ring>(request: &Request<'_>, io: &Io<R>) -> What {
        What { op: request.op, sector: request.sector, sectors: request.sectors, tag: io.tag() }
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.op.fmt(f)?;
        if self.op != Op::Flush {
            write!(f, " of {} sectors at sector {}", self.sectors, self.sector)?;
        }
        self.tag.map_or(Ok(()), |tag| write!(f, ", tag {tag}"))
    }
}
