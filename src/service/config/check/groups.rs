//! Volumes that share limits: the numbers of a group are said once, or by several alike. Those that only name the group have
//! the same, as with QEMU and libvirt; but there the last word wins, and here none contradicts another.

#![forbid(unsafe_code)]

use crate::engine::config::LimitsConfig;
use crate::service::config::origin::Origin;
use crate::service::config::{ConfigError, Loader};
use std::collections::BTreeMap;

/// Checks that no two volumes of a group say different things.
pub(super) fn check(loader: &Loader) -> Result<(), ConfigError> {
    let mut groups: BTreeMap<&str, (&LimitsConfig, &Origin)> = BTreeMap::new();
    for (name, limits) in loader.limits.iter().filter(|(_, limits)| limits.has_numbers()) {
        let (Some(group), Some(item)) = (&limits.group, loader.volumes.get(name)) else { continue };
        let (first, at) = groups.entry(group).or_insert((limits, &item.origin));
        if !first.same_numbers(limits) {
            let first = at.place(LimitsConfig::TABLE);
            let reason = format!(
                "group {group:?} has other limits ({first}): the volumes of a group share one set, so say it once, or alike"
            );
            return Err(item.origin.key_error(LimitsConfig::GROUP, reason));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::service::config::{Config, Loader};
    use std::path::Path;

    fn load(limits: [&str; 3]) -> Result<Config, String> {
        let mut loader = Loader::new();
        let mut text = String::new();
        for (number, limits) in limits.iter().enumerate() {
            text +=
                &format!("[volume.v{number}]\ndriver = \"null\"\nsize = \"1G\"\nlimits = {{ {limits} }}\n");
            text += &format!("[[ublk]]\nvolume = \"v{number}\"\n");
        }
        loader.add_text(Path::new("r.toml"), &text).unwrap();
        loader.finish().map_err(|error| error.to_string())
    }

    #[test]
    fn a_group_is_said_once_or_alike() {
        let (alone, alike) = ("group = \"g\"", "group = \"g\", iops-total = 5");
        load([alone, alike, alone]).unwrap();
        load([alike, alike, alone]).unwrap();
        load([alone, alone, alone]).unwrap();
        load([alike, "group = \"h\", iops-total = 6", "iops-total = 7"]).unwrap();
        for other in ["iops-total = 6", "iops-total = 5, iops-size = 512", "bps-total = 5"] {
            let error = load([alike, alone, &format!("{other}, group = \"g\"")]).unwrap_err();
            assert!(error.starts_with("r.toml:16: group: ") && error.contains("(r.toml:4)"), "{error}");
        }
    }
}
