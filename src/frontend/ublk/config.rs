//! What a user may say about a ublk export: plain data, with the checks that need no other part of the configuration.

#![forbid(unsafe_code)]

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, Visitor};

use crate::block::Size;

/// One volume behind `/dev/ublkbN`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct UblkConfig {
    /// Name of the volume; also the name of the link under `/dev/ringblk`.
    pub volume: String,
    /// Hardware queues, 1 to [`UblkConfig::MAX_QUEUES`]; `None`: one a worker.
    pub queues: Option<u16>,
    /// Requests in flight a queue, 1 to [`UblkConfig::MAX_DEPTH`].
    #[serde(default = "default_depth")]
    pub depth: u16,
    /// Whether the request's own pages are used.
    #[serde(default)]
    pub zero_copy: ZeroCopy,
    /// N of `/dev/ublkbN`; `None`: the kernel picks.
    pub id: Option<u32>,
    /// The largest request in bytes: whole pages of 4 KiB, up to [`UblkConfig::MAX_IO`]; `None`: see
    /// [`default_max_io`](super::default_max_io).
    #[serde(default, deserialize_with = "bytes")]
    pub max_io: Option<u32>,
    /// What becomes of the disk when the service dies; `None`: [`Recovery::Reissue`] where the volume's data outlives
    /// the service, else [`Recovery::Off`].
    pub recovery: Option<Recovery>,
    /// Workers of its own, which serve no other export, 1 to [`UblkConfig::MAX_WORKERS`]; `None`: it shares those of the
    /// service.
    pub workers: Option<u16>,
}

/// What becomes of a disk whose server died.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recovery {
    /// It stays, and every request waits for the next server, also those that the dead one had.
    Reissue,
    /// It stays and new requests wait, but those that the dead server had fail.
    Queue,
    /// It stays, and requests fail until there is a server again.
    FailIo,
    /// It goes.
    Off,
}

/// Whether the data of a request is used where the kernel has it, without a copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroCopy {
    /// Where both kernel and volume can.
    #[default]
    Auto,
    /// Fail to start where it is not possible.
    On,
    /// Copy always.
    Off,
}

fn default_depth() -> u16 {
    UblkConfig::DEFAULT_DEPTH
}

impl UblkConfig {
    /// UBLK_MAX_NR_QUEUES of `linux/ublk_cmd.h`.
    pub const MAX_QUEUES: u16 = 4096;
    /// UBLK_MAX_QUEUE_DEPTH of `linux/ublk_cmd.h`.
    pub const MAX_DEPTH: u16 = 4096;
    /// The largest device number: UBLK_MINORS of the driver is the 20 bits of a minor number.
    pub const MAX_ID: u32 = (1 << 20) - 1;
    /// The largest request: every tag of a copy-mode queue has a buffer of this size.
    pub const MAX_IO: u32 = 32 << 20;
    /// More workers for one disk than this is a slip of the finger.
    pub const MAX_WORKERS: u16 = 256;
    /// Depth where none is given.
    pub const DEFAULT_DEPTH: u16 = 128;

    /// An export of `volume` with the default settings.
    pub fn new(volume: impl Into<String>) -> UblkConfig {
        UblkConfig {
            volume: volume.into(),
            queues: None,
            depth: UblkConfig::DEFAULT_DEPTH,
            zero_copy: ZeroCopy::Auto,
            id: None,
            max_io: None,
            recovery: None,
            workers: None,
        }
    }

    /// Checks every value's range.
    ///
    /// # Errors
    /// The key that is wrong, and why.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        if let Some(queues) = self.queues {
            in_range("queues", queues.into(), 1, UblkConfig::MAX_QUEUES.into())?;
        }
        in_range("depth", self.depth.into(), 1, UblkConfig::MAX_DEPTH.into())?;
        if let Some(workers) = self.workers {
            in_range("workers", workers.into(), 1, UblkConfig::MAX_WORKERS.into())?;
        }
        if let Some(id) = self.id {
            in_range("id", id, 0, UblkConfig::MAX_ID)?;
        }
        // The kernel refuses what is no multiple of its page; no page we run on is smaller than 4 KiB.
        if let Some(max_io) = self.max_io
            && (max_io == 0 || !max_io.is_multiple_of(4096) || max_io > Self::MAX_IO)
        {
            let (given, most) = (Size(max_io.into()), Size(Self::MAX_IO.into()));
            return Err(("max-io", format!("must be a multiple of 4K, at most {most}, not {given}")));
        }
        Ok(())
    }
}

fn in_range(key: &'static str, value: u32, least: u32, most: u32) -> Result<(), (&'static str, String)> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err((key, format!("must be from {least} to {most}, not {value}")))
}

/// Reads `max-io`: a [`Size`] that must fit in 32 bits.
fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    let size = Size::deserialize(deserializer)?;
    u32::try_from(size.bytes())
        .map(Some)
        .map_err(|_| de::Error::custom(format_args!("max-io: {size} is too large, at most 32M")))
}

impl fmt::Display for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Recovery::Reissue => "reissue",
            Recovery::Queue => "queue",
            Recovery::FailIo => "fail-io",
            Recovery::Off => "off",
        })
    }
}

impl fmt::Display for ZeroCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ZeroCopy::Auto => "auto",
            ZeroCopy::On => "on",
            ZeroCopy::Off => "off",
        })
    }
}

/// `"auto"`, `"on"`, `"off"`, and the plain `true` and `false` that the other switches of a file take.
impl<'de> Deserialize<'de> for ZeroCopy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ZeroCopy, D::Error> {
        struct ZeroCopyVisitor;

        impl Visitor<'_> for ZeroCopyVisitor {
            type Value = ZeroCopy;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("auto, on or off")
            }

            fn visit_bool<E: de::Error>(self, on: bool) -> Result<ZeroCopy, E> {
                Ok(if on { ZeroCopy::On } else { ZeroCopy::Off })
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ZeroCopy, E> {
                match text {
                    "auto" => Ok(ZeroCopy::Auto),
                    "on" => Ok(ZeroCopy::On),
                    "off" => Ok(ZeroCopy::Off),
                    _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }
        }

        deserializer.deserialize_any(ZeroCopyVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<UblkConfig, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn defaults_are_the_documented_ones() {
        let config = read(r#"{"volume": "root"}"#).unwrap();
        assert_eq!(config, UblkConfig::new("root"));
        assert_eq!((config.depth, config.max_io), (128, None));
        config.check().unwrap();
    }

    #[test]
    fn zero_copy_in_both_spellings() {
        for (text, expected) in [
            ("\"auto\"", ZeroCopy::Auto),
            ("\"on\"", ZeroCopy::On),
            ("true", ZeroCopy::On),
            ("\"off\"", ZeroCopy::Off),
            ("false", ZeroCopy::Off),
        ] {
            let config = read(&format!(r#"{{"volume": "v", "zero-copy": {text}}}"#)).unwrap();
            assert_eq!(config.zero_copy, expected);
        }
        assert!(read(r#"{"volume": "v", "zero-copy": "maybe"}"#).unwrap_err().contains("maybe"));
    }

    #[test]
    fn recovery_is_one_of_four() {
        use Recovery::{FailIo, Off, Queue, Reissue};
        for recovery in [Reissue, Queue, FailIo, Off] {
            let config = read(&format!(r#"{{"volume": "v", "recovery": "{recovery}"}}"#)).unwrap();
            assert_eq!(config.recovery, Some(recovery));
        }
        assert_eq!(read(r#"{"volume": "v"}"#).unwrap().recovery, None);
        assert!(read(r#"{"volume": "v", "recovery": "on"}"#).unwrap_err().contains("reissue"));
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for (key, value) in [
            ("queues", "0"),
            ("queues", "4097"),
            ("workers", "0"),
            ("workers", "257"),
            ("depth", "0"),
            ("depth", "4097"),
            ("id", "1048576"),
            ("max-io", "0"),
            ("max-io", "\"6K\""),
            ("max-io", "\"33M\""),
        ] {
            let config = read(&format!(r#"{{"volume": "v", "{key}": {value}}}"#)).unwrap();
            assert_eq!(config.check().unwrap_err().0, key, "{key}={value}");
        }
        for (key, value) in [("queues", "-1"), ("depth", "65536"), ("max-io", "\"4G\"")] {
            let json = format!(r#"{{"volume": "v", "{key}": {value}}}"#);
            assert!(read(&json).is_err(), "{key}={value}");
        }
    }

    #[test]
    fn unknown_and_missing_keys_are_refused() {
        assert!(read(r#"{"volume": "v", "queue": 1}"#).unwrap_err().contains("queue"));
        assert!(read("{}").unwrap_err().contains("volume"));
    }
}
