//! The TOML spelling: text to items, each with its lines.
//!
//! The document is taken apart by hand down to the single volume or export, and serde reads those: a volume's driver
//! decides what its other keys mean, and serde's own tagged enums would lose the lines on the way.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue, ValueDeserializer};

use super::SandboxMode;
use crate::engine::config::{LimitsConfig, PolicyConfig, TopologyConfig, VolumeConfig};
use crate::frontend::ublk::config::UblkConfig;
use crate::frontend::vhost_user::config::VhostUserConfig;

use super::ConfigError;
use super::origin::{Item, Origin};

/// A larger file is not a configuration of ours.
const MAX_BYTES: u64 = 1 << 20;

/// A volume, what becomes of the requests that its store fails, what is told of its blocks, and its limits.
pub(super) type Volume = Item<(VolumeConfig, PolicyConfig, TopologyConfig, LimitsConfig)>;

/// What one file says.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub workers: Option<Item<usize>>,
    pub poll_us: Option<Item<u32>>,
    pub slow_after: Option<Item<u64>>,
    pub control: Option<Item<PathBuf>>,
    pub metrics: Option<Item<String>>,
    pub sandbox: Option<Item<SandboxMode>>,
    pub allow_paths: Option<Item<Vec<PathBuf>>>,
    pub allow_ublk: Option<Item<bool>>,
    pub volumes: Vec<(String, Volume)>,
    pub ublk: Vec<Item<UblkConfig>>,
    pub vhost_user: Vec<Item<VhostUserConfig>>,
}

/// The text of a configuration file, at most [`MAX_BYTES`] of it.
pub(super) fn read(path: &Path) -> Result<String, ConfigError> {
    let place = path.display().to_string();
    let failed = |error| ConfigError::new(&place, format!("cannot read: {error}"));
    let file = File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    // A pipe or a device has no length to look at first: read one byte more than is allowed, and see.
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(ConfigError::new(place, "longer than 1M: not a configuration"));
    }
    String::from_utf8(bytes).map_err(|error| {
        let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + good.iter().filter(|byte| **byte == b'\n').count();
        ConfigError::new(format!("{place}:{line}"), "not UTF-8 text")
    })
}

/// Takes a document apart.
pub(super) fn parse(path: &Path, text: &str) -> Result<Found, ConfigError> {
    let document = Document { path: path.into(), text };
    let root = DeTable::parse(text).map_err(|error| document.error(&error, 0))?;
    let mut found = Found::default();
    for (key, value) in root.into_inner() {
        let at = key.span().start;
        match key.get_ref().as_ref() {
            "workers" => found.workers = Some(document.scalar(at, value)?),
            "poll-us" => found.poll_us = Some(document.scalar(at, value)?),
            "slow-after" => found.slow_after = Some(document.scalar(at, value)?),
            "control" => found.control = Some(document.scalar(at, value)?),
            "metrics" => found.metrics = Some(document.scalar(at, value)?),
            "sandbox" => found.sandbox = Some(document.scalar(at, value)?),
            "allow-paths" => found.allow_paths = Some(document.scalar(at, value)?),
            "allow-ublk" => found.allow_ublk = Some(document.scalar(at, value)?),
            "volume" => found.volumes = document.volumes(at, value)?,
            "ublk" => found.ublk = document.exports("ublk", at, value)?,
            "vhost-user" => found.vhost_user = document.exports("vhost-user", at, value)?,
            other => {
                let reason = format!(
                    "unknown key \"{other}\", there are: workers, poll-us, slow-after, control, metrics, sandbox, allow-paths, allow-ublk, [volume.NAME], [[ublk]], [[vhost-user]]"
                );
                return Err(document.error_at(at, reason));
            }
        }
    }
    Ok(found)
}

/// A text with its name, to turn offsets into lines.
struct Document<'a> {
    path: Arc<Path>,
    text: &'a str,
}

impl<'a> Document<'a> {
    fn scalar<T: DeserializeOwned>(
        &self,
        at: usize,
        value: Spanned<DeValue<'a>>,
    ) -> Result<Item<T>, ConfigError> {
        let value = T::deserialize(ValueDeserializer::from(value)).map_err(|error| self.error(&error, at))?;
        Ok(Item::new(value, self.origin(at, BTreeMap::new())))
    }

    /// `[volume.NAME]` tables.
    fn volumes(&self, at: usize, value: Spanned<DeValue<'a>>) -> Result<Vec<(String, Volume)>, ConfigError> {
        let DeValue::Table(volumes) = value.into_inner() else {
            return Err(self.error_at(at, "volumes are written as [volume.NAME] tables"));
        };
        let mut found = Vec::new();
        for (name, value) in volumes {
            let at = name.span().start;
            self.volume(name.into_inner().into_owned(), at, value, &mut found)?;
        }
        Ok(found)
    }

    /// Adds a volume to those found, after the one that it stands on where that is written in its own table.
    fn volume(
        &self,
        name: String,
        at: usize,
        value: Spanned<DeValue<'a>>,
        found: &mut Vec<(String, Volume)>,
    ) -> Result<(), ConfigError> {
        let span = value.span();
        let DeValue::Table(mut table) = value.into_inner() else {
            return Err(self.error_at(at, "a volume is written as a [volume.NAME] table"));
        };
        let mut lines = self.key_lines(&table);
        self.nested(&name, &mut table, found)?;
        let limits = table.remove(LimitsConfig::TABLE);
        if let Some(DeValue::Table(limits)) = limits.as_ref().map(Spanned::get_ref) {
            // No key of a volume has the name of a limit.
            lines.extend(self.key_lines(limits));
        }
        let origin = self.origin(at, lines);
        let Some(driver) = table.remove("driver") else {
            return Err(origin.error("the key \"driver\" is missing"));
        };
        let driver_at = driver.span();
        let DeValue::String(driver) = driver.into_inner() else {
            return Err(origin.key_error("driver", "must be a string"));
        };
        if VolumeConfig::target_key(&driver).is_none() {
            // Let the one place that knows all drivers word it, and point at the word itself.
            let empty = table_value(DeTable::new(), driver_at.clone());
            return VolumeConfig::from_driver(&driver, empty)
                .map(drop)
                .map_err(|error| self.error(&error, driver_at.start));
        }
        let policy = self.common(&mut table, &PolicyConfig::KEYS, &span, at)?;
        let topology = self.common(&mut table, &TopologyConfig::KEYS, &span, at)?;
        let volume = VolumeConfig::from_driver(&driver, table_value(table, span))
            .map_err(|error| self.error(&error, at))?;
        let limits = match limits {
            None => LimitsConfig::default(),
            Some(limits) => {
                let at = limits.span().start;
                let read = LimitsConfig::deserialize(ValueDeserializer::from(limits));
                read.map_err(|error| self.error(&error, at))?
            }
        };
        found.push((name, Item::new((volume, policy, topology, limits), origin)));
        Ok(())
    }

    /// A base that is a table is a volume of its own, named after what stands on it: `[volume.vm1.base]` is `vm1.base`.
    fn nested(
        &self,
        name: &str,
        table: &mut DeTable<'a>,
        found: &mut Vec<(String, Volume)>,
    ) -> Result<(), ConfigError> {
        const KEY: &str = "base";
        if !matches!(table.get(KEY).map(Spanned::get_ref), Some(DeValue::Table(_))) {
            return Ok(());
        }
        let Some((key, value)) = table.remove_entry(KEY) else { return Ok(()) };
        let (base, span) = (format!("{name}.{KEY}"), value.span());
        self.volume(base.clone(), key.span().start, value, found)?;
        table.insert(key, Spanned::new(span, DeValue::String(base.into())));
        Ok(())
    }

    /// Takes the settings out of a volume's table that any driver has.
    fn common<T: DeserializeOwned>(
        &self,
        table: &mut DeTable<'a>,
        keys: &[&str],
        span: &Range<usize>,
        at: usize,
    ) -> Result<T, ConfigError> {
        let mut own = DeTable::new();
        own.extend(keys.iter().filter_map(|key| table.remove_entry(*key)));
        T::deserialize(table_value(own, span.clone())).map_err(|error| self.error(&error, at))
    }

    /// `[[ublk]]` or `[[vhost-user]]` tables.
    fn exports<T: DeserializeOwned>(
        &self,
        kind: &str,
        at: usize,
        value: Spanned<DeValue<'a>>,
    ) -> Result<Vec<Item<T>>, ConfigError> {
        let shape = format!("exports are written as [[{kind}]] tables");
        let DeValue::Array(exports) = value.into_inner() else {
            return Err(self.error_at(at, shape));
        };
        exports
            .into_iter()
            .map(|value| {
                let at = value.span().start;
                let DeValue::Table(table) = value.get_ref() else {
                    return Err(self.error_at(at, &shape));
                };
                let origin = self.origin(at, self.key_lines(table));
                let export =
                    T::deserialize(ValueDeserializer::from(value)).map_err(|error| self.error(&error, at))?;
                Ok(Item::new(export, origin))
            })
            .collect()
    }

    fn key_lines(&self, table: &DeTable<'_>) -> BTreeMap<String, usize> {
        table.keys().map(|key| (key.get_ref().to_string(), self.line(key.span().start))).collect()
    }

    fn origin(&self, at: usize, keys: BTreeMap<String, usize>) -> Origin {
        Origin::File { path: Arc::clone(&self.path), line: self.line(at), keys }
    }

    /// An error from the parser or from serde; `at` is used where it does not know its own place.
    fn error(&self, error: &toml::de::Error, at: usize) -> ConfigError {
        let at = error.span().map_or(at, |span| span.start);
        self.error_at(at, error.message())
    }

    fn error_at(&self, at: usize, reason: impl Into<String>) -> ConfigError {
        self.origin(at, BTreeMap::new()).error(reason)
    }

    /// The line, from 1, of a byte offset.
    fn line(&self, at: usize) -> usize {
        let before = &self.text.as_bytes()[..at.min(self.text.len())];
        1 + before.iter().filter(|byte| **byte == b'\n').count()
    }
}

fn table_value(table: DeTable<'_>, span: Range<usize>) -> ValueDeserializer<'_> {
    ValueDeserializer::from(Spanned::new(span, DeValue::Table(table)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn error(text: &str) -> String {
        parse(Path::new("r.toml"), text).unwrap_err().to_string()
    }

    #[test]
    fn errors_name_file_line_and_reason() {
        for (text, line, word) in [
            ("workers = 2\nworker = 3\n", 2, "\"worker\""),
            ("\n\nworkers = \"two\"\n", 3, "a whole number"),
            ("workers = -1\n", 1, "-1"),
            ("control = [\n\n", 1, "array"),
            ("volume = 3\n", 1, "[volume.NAME]"),
            ("[volume]\nroot = 3\n", 2, "[volume.NAME]"),
            ("[volume.a]\nsize = 1\n", 1, "driver"),
            ("[volume.a]\nsize = 1\ndriver = 3\n", 3, "string"),
            ("[volume.a]\nsize = 1\ndriver = \"zfs\"\n", 3, "\"zfs\""),
            ("\n[volume.a]\ndriver = \"file\"\n", 2, "path"),
            ("[volume.a]\ndriver = \"file\"\npath = \"/a\"\ndirect = \"on\"\n", 4, "boolean"),
            ("[volume.a]\ndriver = \"null\"\nsize = \"1G\"\ncolour = 1\n", 4, "colour"),
            ("[volume.a]\ndriver = \"null\"\nsize = \"1Q\"\n", 3, "\"1Q\""),
            ("[volume.a]\n[volume.a]\n", 2, "duplicate"),
            ("[volume.a]\ndriver = \"null\"\nsize = 512\nlimits = 3\n", 4, "a table of limits"),
            ("[volume.a]\ndriver = \"null\"\nsize = 512\n[volume.a.limits]\niops = 3\n", 5, "\"iops\""),
            ("[volume.a]\ndriver = \"null\"\nsize = 512\niops-total = 3\n", 4, "iops-total"),
            (
                "[volume.a]\ndriver = \"null\"\nsize = 512\n[volume.a.limits]\niops-size = 3\nbps-read = \"1Q\"\n",
                6,
                "\"1Q\"",
            ),
            ("[volume.a]\ndriver = \"null\"\nsize = 512\n[volume.a.limits]\ngroup = 3\n", 5, "3"),
            ("[volume.a]\ndriver = \"null\"\nsize = 512\n[volume.a.limits]\niops-total = -3\n", 5, "-3"),
            ("ublk = 3\n", 1, "[[ublk]]"),
            ("ublk = [3]\n", 1, "[[ublk]]"),
            ("[ublk]\nvolume = \"a\"\n", 1, "[[ublk]]"),
            ("\n[[ublk]]\nqueues = 1\n", 2, "volume"),
            ("[[ublk]]\nvolume = \"a\"\n\n[[ublk]]\nvolume = \"b\"\nqueues = 70000\n", 6, "70000"),
            ("[[vhost-user]]\nvolume = \"a\"\nsocket = \"/s\"\nmode = 600\n", 4, "octal"),
        ] {
            let error = error(text);
            assert!(error.starts_with(&format!("r.toml:{line}: ")), "{text}\n{error}");
            assert!(error.contains(word), "{text}\n{error}");
            assert!(!error.trim_end().contains('\n'), "{error}");
        }
    }

    #[test]
    fn every_item_knows_its_lines() {
        let text = "[volume.a]\ndriver = \"null\"\nsize = 512\n\n[[ublk]]\nvolume = \"a\"\ndepth = 4\n";
        let found = parse(Path::new("r.toml"), text).unwrap();
        assert_eq!(found.volumes[0].1.origin.place("size"), "r.toml:3");
        assert_eq!(found.volumes[0].1.origin.place("block-size"), "r.toml:1");
        assert_eq!(found.ublk[0].origin.place(""), "r.toml:5");
        assert_eq!(found.ublk[0].origin.place("depth"), "r.toml:7");
    }

    #[test]
    fn a_base_may_be_written_where_it_is_used() {
        let text = "\
[volume.vm1]
driver = \"fault\"
errors = \"1%\"
[volume.vm1.base]
driver = \"fault\"
base = { driver = \"null\", size = \"1G\" }
";
        let found = parse(Path::new("r.toml"), text).unwrap();
        let told = found.volumes.iter().map(|(name, item)| {
            let (volume, ..) = &item.value;
            (&**name, volume.summary().base.map(str::to_owned), item.origin.place("driver"))
        });
        let expected = [
            ("vm1.base.base", None, "r.toml:6"),
            ("vm1.base", Some("vm1.base.base"), "r.toml:5"),
            ("vm1", Some("vm1.base"), "r.toml:2"),
        ];
        let expected = expected.map(|(name, base, place)| (name, base.map(str::to_owned), place.to_owned()));
        assert_eq!(told.collect::<Vec<_>>(), expected);
        // What is wrong in it is told of its own lines.
        for (text, line, word) in [
            ("[volume.a]\ndriver = \"fault\"\n[volume.a.base]\nsize = 3\n", 3, "driver"),
            ("[volume.a]\ndriver = \"fault\"\n[volume.a.base]\ndriver = \"null\"\nsize = \"1Q\"\n", 5, "1Q"),
            ("[volume.a]\ndriver = \"fault\"\nbase = 3\n", 3, "text in quotes"),
            (
                "[volume.a]\ndriver = \"null\"\nsize = 512\n[volume.a.base]\ndriver = \"null\"\nsize = 512\n",
                4,
                "base",
            ),
        ] {
            let error = error(text);
            assert!(
                error.starts_with(&format!("r.toml:{line}: ")) && error.contains(word),
                "{text}\n{error}"
            );
        }
    }

    #[test]
    fn unreadable_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.toml");
        let name = path.display().to_string();

        assert!(read(&path).unwrap_err().to_string().starts_with(&format!("{name}: cannot read: ")));
        assert!(read(dir.path()).is_err());

        std::fs::write(&path, b"workers = 1\n# \xff\n").unwrap();
        assert_eq!(read(&path).unwrap_err().to_string(), format!("{name}:2: not UTF-8 text"));

        std::fs::write(&path, vec![b'#'; MAX_BYTES as usize + 1]).unwrap();
        assert!(read(&path).unwrap_err().reason.contains("1M"));
        std::fs::write(&path, vec![b'#'; MAX_BYTES as usize]).unwrap();
        assert_eq!(read(&path).unwrap().len() as u64, MAX_BYTES);
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[a-z\\[\\]=.\"\n{}0-9, -]*") {
            let _ = parse(Path::new("r.toml"), &text);
        }
    }
}
