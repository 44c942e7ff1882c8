//! What a user may say about a volume: plain data, with the checks that need no other part of the configuration.
//!
//! Both spellings end here. A file's table and a flag's `key=value` list are deserialized into the same structs by
//! [`VolumeConfig::from_driver`], so a key exists in both or in neither. Nothing is opened here. What a driver has of its own
//! is in its folder.

#![forbid(unsafe_code)]

use super::driver::DRIVERS;
pub use super::driver::{Need, Summary, VolumeConfig};
pub use super::fault::FaultConfig;
pub use super::file::{FileConfig, ImageFormat};
pub use super::limits::LimitsConfig;
pub use super::memory::MemoryConfig;
pub use super::nbd::NbdConfig;
pub use super::null::NullConfig;
pub use super::qcow2::Qcow2Config;
use crate::block::Geometry;
use std::fmt;
use std::time::Duration;

/// What becomes of a request that the store fails. Of any volume, whatever its driver; see `policy` in `engine`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct PolicyConfig {
    /// The policy.
    #[serde(default)]
    pub on_error: OnError,
    /// Seconds to go on trying, 1 to [`PolicyConfig::MAX_RETRY_FOR`], for [`OnError::Retry`] alone; `None`:
    /// [`PolicyConfig::DEFAULT_RETRY_FOR`].
    pub retry_for: Option<u64>,
    /// Whether a service may begin without this volume, which then is tried until it is there; `None`: only where its server
    /// cannot be reached, and it is to be waited for or others can be served meanwhile.
    pub required: Option<bool>,
}

/// `on-error`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// The client is told.
    #[default]
    Report,
    /// It is tried again for a time, and then the client is told.
    Retry,
    /// It waits, with all that come after it, until somebody has seen to the store and said so.
    Stop,
}

impl OnError {
    /// As the user spells it.
    pub fn name(self) -> &'static str {
        match self {
            OnError::Report => "report",
            OnError::Retry => "retry",
            OnError::Stop => "stop",
        }
    }
}

impl PolicyConfig {
    /// Its keys, which stand among the driver's.
    pub const KEYS: [&'static str; 3] = ["on-error", "retry-for", "required"];
    /// What a server needs to start again, in seconds.
    pub const DEFAULT_RETRY_FOR: u64 = 30;
    /// The longest time to go on trying in seconds: one day.
    pub const MAX_RETRY_FOR: u64 = 24 * 60 * 60;

    /// Checks every value's range.
    ///
    /// # Errors
    /// The key that is wrong, and why.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let most = PolicyConfig::MAX_RETRY_FOR;
        match self.retry_for {
            Some(_) if self.on_error != OnError::Retry => {
                Err(("retry-for", "is for on-error=retry alone".to_owned()))
            }
            Some(seconds) if !(1..=most).contains(&seconds) => {
                Err(("retry-for", format!("must be from 1 to {most} seconds, not {seconds}")))
            }
            _ => Ok(()),
        }
    }

    /// How long to go on trying.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(self.retry_for.unwrap_or(PolicyConfig::DEFAULT_RETRY_FOR))
    }
}

/// What differs from the default, for people: nothing, or `, on error ...`.
impl fmt::Display for PolicyConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.on_error {
            OnError::Report => {}
            OnError::Retry => write!(f, ", on error retry for {} s", self.patience().as_secs())?,
            OnError::Stop => f.write_str(", on error stop")?,
        }
        match self.required {
            None => Ok(()),
            Some(true) => f.write_str(", required"),
            Some(false) => f.write_str(", not required"),
        }
    }
}

/// What the clients of a volume are told of its blocks. Of any volume, whatever its driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct TopologyConfig {
    /// The smallest unit that is written without reading before, in bytes: a power of two, 512 to
    /// [`TopologyConfig::MAX_PHYSICAL_BLOCK`], at least the logical block; `None`: the store's. With that of the logical
    /// block no preferred sizes are told either: there are guests that misread them.
    pub physical_block: Option<u32>,
}

impl TopologyConfig {
    /// Its keys, which stand among the driver's.
    pub const KEYS: [&'static str; 1] = ["physical-block"];
    /// More than any disk has.
    pub const MAX_PHYSICAL_BLOCK: u32 = 65536;

    /// Checks every value's range; `logical_block` is that of the configuration.
    ///
    /// # Errors
    /// The key that is wrong, and why.
    pub fn check(&self, logical_block: Option<u32>) -> Result<(), (&'static str, String)> {
        let Some(bytes) = self.physical_block else { return Ok(()) };
        let (least, most) = (logical_block.unwrap_or(512), TopologyConfig::MAX_PHYSICAL_BLOCK);
        if bytes.is_power_of_two() && (least..=most).contains(&bytes) {
            return Ok(());
        }
        Err(("physical-block", format!("must be a power of two from {least} to {most}, not {bytes}")))
    }

    /// What a disk of that geometry shows. `None` where its logical block is larger than its physical one is to be.
    pub fn apply(&self, geometry: &Geometry) -> Option<Geometry> {
        let Some(bytes) = self.physical_block else { return Some(geometry.clone()) };
        let told = bytes > geometry.logical_block;
        // Preferred sizes are whole physical blocks.
        let whole = |preferred: u32| if told && preferred.is_multiple_of(bytes) { preferred } else { 0 };
        (bytes >= geometry.logical_block).then(|| Geometry {
            physical_block: bytes,
            io_min: whole(geometry.io_min.max(bytes)),
            io_opt: whole(geometry.io_opt),
            ..geometry.clone()
        })
    }
}

/// What differs from the default, for people: nothing, or `, physical block ...`.
impl fmt::Display for TopologyConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.physical_block.map_or(Ok(()), |bytes| write!(f, ", physical block {bytes}"))
    }
}

impl VolumeConfig {
    /// The key a driver's target goes by in a file; `None` for an unknown driver.
    pub fn target_key(driver: &str) -> Option<&'static str> {
        DRIVERS.iter().find(|(name, _)| *name == driver).map(|(_, key)| *key)
    }
}

/// `DRIVER:TARGET` with the settings that differ from the defaults, for people.
impl fmt::Display for VolumeConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.driver(), self.target())?;
        self.details(f)?;
        let summary = self.summary();
        if let Some(bytes) = summary.block_size {
            write!(f, ", block size {bytes}")?;
        }
        if summary.read_only {
            f.write_str(", read-only")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(driver: &str, json: &str) -> Result<VolumeConfig, String> {
        let mut json = serde_json::Deserializer::from_str(json);
        VolumeConfig::from_driver(driver, &mut json).map_err(|error| error.to_string())
    }

    fn refusal(driver: &str, json: &str) -> (&'static str, String) {
        read(driver, json).unwrap().check().unwrap_err()
    }

    #[test]
    fn defaults_are_the_documented_ones() {
        let file = read("file", r#"{"path": "/srv/a.img"}"#).unwrap();
        assert_eq!(
            file,
            VolumeConfig::File(FileConfig {
                path: "/srv/a.img".into(),
                direct: false,
                read_only: false,
                lock: true,
                format: None,
                block_size: None,
            })
        );
        let nbd = read("nbd", r#"{"uri": "nbd://h/e"}"#).unwrap();
        assert_eq!(
            nbd,
            VolumeConfig::Nbd(NbdConfig {
                uri: "nbd://h/e".into(),
                tls_ca: None,
                tls_cert: None,
                tls_key: None,
                tls_hostname: None,
                tls_verify: true,
                connections: None,
                timeout: 60,
                reconnect: 0,
                read_only: false,
            })
        );
    }

    #[test]
    fn unknown_drivers_and_keys_are_refused() {
        let error = read("vmdk", "{}").unwrap_err();
        assert!(error.contains("\"vmdk\"") && error.contains("memory"), "{error}");
        for &(driver, target) in DRIVERS {
            assert_eq!(VolumeConfig::target_key(driver), Some(target));
            let error = read(driver, "{}").unwrap_err();
            assert!(error.contains(target), "{driver}: {error}");
            let error = read(driver, r#"{"colour": "red"}"#).unwrap_err();
            assert!(error.contains("colour"), "{driver}: {error}");
        }
        assert_eq!(VolumeConfig::target_key("vmdk"), None);
    }

    #[test]
    fn raw_is_the_only_format() {
        for format in ["qcow2", "RAW", ""] {
            let error = read("file", &format!(r#"{{"path": "/a", "format": "{format}"}}"#)).unwrap_err();
            assert!(error.contains("raw"), "{format}: {error}");
        }
    }

    #[test]
    fn bad_sizes_are_refused() {
        assert_eq!(refusal("memory", r#"{"size": 0}"#).0, "size");
        assert_eq!(refusal("null", r#"{"size": 1000}"#).0, "size");
        assert_eq!(refusal("null", r#"{"size": 18446744073709551104}"#).0, "size");
        assert_eq!(refusal("memory", r#"{"size": 512, "block-size": 4096}"#).0, "size");
        assert_eq!(refusal("memory", r#"{"size": "1M", "block-size": 1024}"#).0, "block-size");
        assert_eq!(refusal("file", r#"{"path": "/a", "block-size": 0}"#).0, "block-size");
        assert!(read("memory", r#"{"size": "1M", "block-size": 4096}"#).unwrap().check().is_ok());
    }

    #[test]
    fn bad_paths_are_refused() {
        assert_eq!(refusal("file", r#"{"path": ""}"#).0, "path");
        assert_eq!(refusal("file", r#"{"path": "/a\u0000b"}"#).0, "path");
        let (key, reason) = refusal("file", r#"{"path": "NBD://h/x"}"#);
        assert!(key == "path" && reason.contains("driver nbd"), "{reason}");
        read("file", r#"{"path": "./NBD://h/x"}"#).unwrap().check().unwrap();
    }

    #[test]
    fn nbd_settings_are_checked() {
        for uri in [
            "",
            "server",
            "http://h/e",
            "nbd:///e",
            "nbds+unix:///e",
            "nbd+unix:///e",
            "nbd+unix:///e?socket=",
            "nbd+unix:///e?socket=rel",
            "nbd+vsock://2/e",
            "nbd://h:99999/",
        ] {
            assert_eq!(refusal("nbd", &format!(r#"{{"uri": "{uri}"}}"#)).0, "uri", "{uri}");
        }
        for uri in ["nbd://h", "NBD://h", "nbd://[::1]:10809/e", "nbd+unix:///?socket=/run/nbd.sock"] {
            read("nbd", &format!(r#"{{"uri": "{uri}"}}"#)).unwrap().check().unwrap();
        }
        for (options, key) in [
            (r#""uri": "nbd://h", "tls-ca": "/a""#, "tls-ca"),
            (r#""uri": "nbd+unix:///?socket=/s", "tls-verify": false"#, "tls-verify"),
            (r#""uri": "nbds://h", "tls-cert": "/a""#, "tls-cert"),
            (r#""uri": "nbds://h", "tls-key": "/a""#, "tls-key"),
            (r#""uri": "nbds://h", "tls-ca": "/a", "tls-verify": false"#, "tls-ca"),
        ] {
            assert_eq!(refusal("nbd", &format!("{{{options}}}")).0, key, "{options}");
        }
        for (key, value) in
            [("connections", 0), ("connections", 17), ("reconnect", 86_401), ("timeout", 86_401)]
        {
            let json = format!(r#"{{"uri": "nbd://h", "{key}": {value}}}"#);
            assert_eq!(refusal("nbd", &json).0, key);
        }
    }

    #[test]
    fn a_physical_block_replaces_the_stores() {
        let with = |bytes| TopologyConfig { physical_block: bytes };
        for (bytes, logical) in [(0, None), (256, None), (1000, None), (131_072, None), (512, Some(4096))] {
            assert_eq!(with(Some(bytes)).check(logical).unwrap_err().0, "physical-block", "{bytes}");
        }
        for (bytes, logical) in [(512, None), (65536, None), (4096, Some(4096))] {
            with(Some(bytes)).check(logical).unwrap();
        }
        let mut store = Geometry::new(1 << 30, 512).unwrap();
        (store.physical_block, store.io_min, store.io_opt) = (4096, 4096, 1 << 20);
        let shown = |bytes| {
            let shown = with(bytes).apply(&store).unwrap();
            (shown.physical_block, shown.io_min, shown.io_opt)
        };
        assert_eq!(shown(None), (4096, 4096, 1 << 20));
        assert_eq!(shown(Some(512)), (512, 0, 0), "nothing but the logical block");
        assert_eq!(shown(Some(16384)), (16384, 16384, 1 << 20));
        store.io_opt = 3 << 10;
        let shown = with(Some(2048)).apply(&store).unwrap();
        assert_eq!((shown.io_min, shown.io_opt), (4096, 0), "no part of a block");
        assert!(with(Some(512)).apply(&Geometry::new(1 << 30, 4096).unwrap()).is_none());
    }

    #[test]
    fn error_policies_are_checked() {
        let policy =
            |json: &str| serde_json::from_str::<PolicyConfig>(json).map_err(|error| error.to_string());
        assert_eq!(
            policy("{}").unwrap(),
            PolicyConfig { on_error: OnError::Report, retry_for: None, required: None }
        );
        for (json, seconds) in
            [(r#"{"on-error": "retry"}"#, 30), (r#"{"on-error": "retry", "retry-for": 1}"#, 1)]
        {
            let policy = policy(json).unwrap();
            policy.check().unwrap();
            assert_eq!(policy.patience(), Duration::from_secs(seconds));
        }
        for json in [
            r#"{"retry-for": 5}"#,
            r#"{"on-error": "stop", "retry-for": 5}"#,
            r#"{"on-error": "retry", "retry-for": 0}"#,
            r#"{"on-error": "retry", "retry-for": 86401}"#,
        ] {
            assert_eq!(policy(json).unwrap().check().unwrap_err().0, "retry-for", "{json}");
        }
        assert!(policy(r#"{"on-error": "ignore"}"#).unwrap_err().contains("report"));
        for on_error in [OnError::Report, OnError::Retry, OnError::Stop] {
            let json = format!(r#"{{"on-error": "{}"}}"#, on_error.name());
            assert_eq!(policy(&json).unwrap().on_error, on_error);
        }
    }

    #[test]
    fn shown_with_what_differs_from_the_defaults() {
        let json = r#"{"path": "/a", "direct": true, "read-only": true, "block-size": 512}"#;
        let file = read("file", json).unwrap();
        assert_eq!(file.to_string(), "file:/a, direct, block size 512, read-only");
        let raw = read("file", r#"{"path": "/a", "format": "raw"}"#).unwrap();
        assert_eq!(raw.to_string(), "file:/a, format raw");
        assert_eq!(read("null", r#"{"size": "1G"}"#).unwrap().to_string(), "null:1G");
    }
}
