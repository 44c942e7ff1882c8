//! Where a piece of configuration was written, so that an error found much later can still point at it.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::ConfigError;

/// A value and where it was written.
#[derive(Debug)]
pub(super) struct Item<T> {
    pub value: T,
    pub origin: Origin,
}

impl<T> Item<T> {
    pub fn new(value: T, origin: Origin) -> Item<T> {
        Item { value, origin }
    }
}

/// A flag, or a line of a file.
#[derive(Clone, Debug)]
pub(super) enum Origin {
    Flag(String),
    File {
        path: Arc<Path>,
        line: usize,
        /// Lines of the keys inside, where the item is a table.
        keys: BTreeMap<String, usize>,
    },
}

impl Origin {
    pub fn flag(name: &str, text: &str) -> Origin {
        Origin::Flag(format!("{name} {}", printable(text)))
    }

    /// The place in words. For a file it is the line of `key`, or where that is not written, of the whole item.
    pub fn place(&self, key: &str) -> String {
        match self {
            Origin::Flag(text) => text.clone(),
            Origin::File { path, line, keys } => {
                let line = keys.get(key).unwrap_or(line);
                format!("{}:{line}", path.display())
            }
        }
    }

    /// An error about the item as a whole.
    pub fn error(&self, reason: impl Into<String>) -> ConfigError {
        ConfigError::new(self.place(""), reason)
    }

    /// An error about the value of `key`.
    pub fn key_error(&self, key: &str, reason: impl std::fmt::Display) -> ConfigError {
        ConfigError::new(self.place(key), format!("{key}: {reason}"))
    }
}

/// A flag or a key can hold anything, a line feed or an escape sequence too; none of that belongs in a log.
pub(super) fn printable(text: &str) -> String {
    let shown = |c: char| if c.is_control() { c.escape_default().collect() } else { vec![c] };
    text.chars().flat_map(shown).collect()
}
