//! What a message says of a request.

#![forbid(unsafe_code)]

use crate::block::{Outline, Request};
use crate::ring::{Io, Ring};
use std::fmt;

/// A request, for messages.
#[derive(Clone, Copy)]
pub(in crate::engine) struct What {
    outline: Outline,
    tag: Option<u16>,
}

impl What {
    pub fn of<R: Ring>(request: &Request<'_>, io: &Io<R>) -> What {
        What { outline: request.outline(), tag: io.tag() }
    }
}

impl What {
    /// What it does, in a word.
    pub fn name(&self) -> &'static str {
        self.outline.name()
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.outline.fmt(f)?;
        self.tag.map_or(Ok(()), |tag| write!(f, ", tag {tag}"))
    }
}
