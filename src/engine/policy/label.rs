//! What a message says of a request.

#![forbid(unsafe_code)]

use crate::block::{Request, RequestSummary};
use crate::ring::{Io, Ring};
use std::fmt;

/// A request, for messages.
#[derive(Clone, Copy)]
pub(in crate::engine) struct RequestLabel {
    outline: RequestSummary,
    tag: Option<u16>,
}

impl RequestLabel {
    pub fn of<R: Ring>(request: &Request<'_>, io: &Io<R>) -> RequestLabel {
        RequestLabel { outline: request.summary(), tag: io.tag() }
    }
}

impl RequestLabel {
    /// What it does, in a word.
    pub fn name(&self) -> &'static str {
        self.outline.name()
    }
}

impl fmt::Display for RequestLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.outline.fmt(f)?;
        self.tag.map_or(Ok(()), |tag| write!(f, ", tag {tag}"))
    }
}
