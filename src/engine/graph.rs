//! Volumes that stand on others: which on which, and whether that can be.
//!
//! Each volume that is exported owns its tree: a base that several stand on is opened once for each of them, so they must
//! not write to it. Whether they do is checked where the exports are known, with the rest of a configuration.

#![forbid(unsafe_code)]

use super::config::VolumeConfig;
use super::driver::Open;
use super::error::{GraphError, MAX_DEPTH, OpenError};
use std::collections::BTreeMap;

/// The volume of this name and those that it stands on, from the top.
///
/// # Errors
/// See [`GraphError`].
pub fn tree<'a>(
    volumes: &'a BTreeMap<String, VolumeConfig>,
    name: &str,
) -> Result<Vec<(&'a str, &'a VolumeConfig)>, GraphError> {
    let mut found: Vec<(&str, &VolumeConfig)> = Vec::new();
    let mut next = Some(name);
    while let Some(name) = next {
        let (name, config) =
            volumes.get_key_value(name).ok_or_else(|| GraphError::Missing(name.to_owned()))?;
        if let Some(first) = found.iter().position(|(seen, _)| seen == name) {
            let names = found[first..].iter().map(|(name, _)| *name).chain([name.as_str()]);
            return Err(GraphError::Circle(names.map(str::to_owned).collect()));
        }
        if found.len() == MAX_DEPTH {
            return Err(GraphError::Deep);
        }
        found.push((name, config));
        next = config.summary().base;
    }
    Ok(found)
}

/// How the volume of this name is opened, with all that it stands on: from the bottom up.
pub(super) fn opener(volumes: &BTreeMap<String, VolumeConfig>, name: &str) -> Result<Open, OpenError> {
    let tree = tree(volumes, name).map_err(|source| OpenError::Graph { name: name.into(), source })?;
    let mut open = None;
    for (name, config) in tree.into_iter().rev() {
        open = Some(config.opener(name, open)?);
    }
    open.ok_or_else(|| OpenError::Graph { name: name.into(), source: GraphError::Missing(name.into()) })
}
