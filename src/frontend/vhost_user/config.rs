//! What a user may say about a vhost-user export: plain data, with the checks that need no other part of the
//! configuration.

#![forbid(unsafe_code)]

use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nix::unistd::{Gid, Group, Uid, User};
use serde::de::{self, Deserializer, Visitor};

/// One volume behind a vhost-user socket.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VhostUserConfig {
    /// Name of the volume.
    pub volume: String,
    /// The Unix socket to listen on; a relative path starts at the service's working directory.
    pub socket: PathBuf,
    /// The most queues a VMM may use, 1 to [`VhostUserConfig::MAX_QUEUES`]; `None`: see
    /// [`most_queues`](VhostUserConfig::most_queues).
    pub queues: Option<u16>,
    /// The largest vring a VMM may set up: a power of two, 2 to [`VhostUserConfig::MAX_QUEUE_SIZE`].
    #[serde(default = "default_queue_size")]
    pub queue_size: u16,
    /// Permission bits of the socket; written as an octal string, `"0600"`.
    #[serde(default = "default_mode", deserialize_with = "octal_mode")]
    pub mode: u32,
    /// `USER[:GROUP]` or `:GROUP`, by name or number; `None`: whoever runs the service.
    pub owner: Option<String>,
    /// Offer the volume read-only.
    #[serde(default)]
    pub read_only: bool,
    /// Workers of its own, which serve no other export, 1 to [`VhostUserConfig::MAX_QUEUES`]; `None`: it shares those of
    /// the service.
    pub workers: Option<u16>,
    /// What the guest is told as the disk's serial number: 1 to [`VhostUserConfig::MAX_SERIAL`] printable ASCII characters
    /// without spaces; `None`: made from the volume's name. See [`serial`](VhostUserConfig::serial).
    pub serial: Option<String>,
}

fn default_queue_size() -> u16 {
    VhostUserConfig::DEFAULT_QUEUE_SIZE
}

fn default_mode() -> u32 {
    VhostUserConfig::DEFAULT_MODE
}

impl VhostUserConfig {
    /// As many as any VMM known to us asks for, with room.
    pub const MAX_QUEUES: u16 = 256;
    /// The largest queue of virtio 1.3 (section 2.7: at most 2^15).
    pub const MAX_QUEUE_SIZE: u16 = 32768;
    /// Largest vring where none is given: the largest that QEMU sets up.
    pub const DEFAULT_QUEUE_SIZE: u16 = 1024;
    /// The longest serial number (`VIRTIO_BLK_ID_BYTES`).
    pub const MAX_SERIAL: usize = 20;
    /// Socket permissions where none are given.
    pub const DEFAULT_MODE: u32 = 0o600;
    /// The longest path that fits in a `sockaddr_un` with its final NUL.
    pub const MAX_SOCKET_PATH: usize = 107;

    /// An export of `volume` on `socket` with the default settings.
    pub fn new(volume: impl Into<String>, socket: impl Into<PathBuf>) -> VhostUserConfig {
        VhostUserConfig {
            volume: volume.into(),
            socket: socket.into(),
            queues: None,
            queue_size: VhostUserConfig::DEFAULT_QUEUE_SIZE,
            mode: VhostUserConfig::DEFAULT_MODE,
            owner: None,
            read_only: false,
            workers: None,
            serial: None,
        }
    }

    /// The most queues a VMM may use. Where there is no number, as many as QEMU starts by itself: one for each CPU of
    /// its guest, which has no more of them than the host; and 64 in any case. Those that are not used cost us nothing,
    /// but a VMM that sets up all it is offered (crosvm) an eventfd and an interrupt each.
    pub fn most_queues(&self) -> u16 {
        let cpus = || std::thread::available_parallelism().map_or(1, usize::from);
        let default = || u16::try_from(cpus()).unwrap_or(u16::MAX).clamp(64, Self::MAX_QUEUES);
        self.queues.unwrap_or_else(default)
    }

    /// The disk's serial number. Where none was given, the volume's name, as long as it fits; else its beginning and a
    /// hash of all of it, so that long names which begin alike do not make one disk of two.
    pub fn serial(&self) -> String {
        let name = &self.volume;
        match &self.serial {
            Some(serial) => serial.clone(),
            None if name.len() <= Self::MAX_SERIAL => name.clone(),
            None => {
                // FNV-1a: it must be the same in every version of ours.
                let hash = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
                let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325, hash);
                let front: String = name.chars().take(9).collect();
                format!("{front}-{:010x}", (hash ^ hash >> 40) & 0xff_ffff_ffff)
            }
        }
    }

    /// Checks every value's range, and that the owner exists.
    ///
    /// # Errors
    /// The key that is wrong, and why.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let path = self.socket.as_os_str().as_bytes();
        if path.is_empty() || path.contains(&0) || path.len() > Self::MAX_SOCKET_PATH {
            let most = Self::MAX_SOCKET_PATH;
            return Err(("socket", format!("must be a path of 1 to {most} bytes without NUL")));
        }
        if let Some(name) = path.strip_prefix(b"@") {
            let name = String::from_utf8_lossy(name);
            return Err((
                "socket",
                format!(
                    "an abstract socket has no owner and no mode, so anybody could connect: give it a path (./@{name} for a \
                 file of this name)"
                ),
            ));
        }
        if let Some(queues) = self.queues
            && !(1..=Self::MAX_QUEUES).contains(&queues)
        {
            let most = Self::MAX_QUEUES;
            return Err(("queues", format!("must be from 1 to {most}, not {queues}")));
        }
        let size = self.queue_size;
        if !size.is_power_of_two() || !(2..=Self::MAX_QUEUE_SIZE).contains(&size) {
            let most = Self::MAX_QUEUE_SIZE;
            return Err(("queue-size", format!("must be a power of two from 2 to {most}, not {size}")));
        }
        if let Some(workers) = self.workers
            && !(1..=Self::MAX_QUEUES).contains(&workers)
        {
            let most = Self::MAX_QUEUES;
            return Err(("workers", format!("must be from 1 to {most}, not {workers}")));
        }
        if let Some(serial) = &self.serial
            && !((1..=Self::MAX_SERIAL).contains(&serial.len())
                && serial.bytes().all(|byte| byte.is_ascii_graphic()))
        {
            let most = Self::MAX_SERIAL;
            return Err(("serial", format!("must be 1 to {most} printable ASCII characters without spaces")));
        }
        if self.mode > 0o777 {
            return Err(("mode", format!("must be at most 0777, not {:04o}", self.mode)));
        }
        self.owner_ids().map_err(|reason| ("owner", reason))?;
        Ok(())
    }

    /// The user and group the socket is to be given to; `None` for what stays as it is.
    ///
    /// # Errors
    /// Text that is not `USER[:GROUP]`, or a name this machine does not know.
    pub fn owner_ids(&self) -> Result<(Option<Uid>, Option<Gid>), String> {
        let Some(owner) = &self.owner else {
            return Ok((None, None));
        };
        let (user, group) = match owner.split_once(':') {
            Some((user, group)) if !group.is_empty() => (user, Some(group)),
            None if !owner.is_empty() => (owner.as_str(), None),
            _ => return Err(format!("\"{owner}\" is not USER, USER:GROUP or :GROUP")),
        };
        let uid = if user.is_empty() { None } else { Some(find_user(user)?) };
        Ok((uid, group.map(find_group).transpose()?))
    }
}

fn find_user(name: &str) -> Result<Uid, String> {
    if let Some(id) = numeric_id(name) {
        return Ok(Uid::from_raw(id));
    }
    match User::from_name(name) {
        Ok(Some(user)) => Ok(user.uid),
        Ok(None) => Err(format!("there is no user \"{name}\"")),
        Err(error) => Err(format!("cannot look up the user \"{name}\": {error}")),
    }
}

fn find_group(name: &str) -> Result<Gid, String> {
    if let Some(id) = numeric_id(name) {
        return Ok(Gid::from_raw(id));
    }
    match Group::from_name(name) {
        Ok(Some(group)) => Ok(group.gid),
        Ok(None) => Err(format!("there is no group \"{name}\"")),
        Err(error) => Err(format!("cannot look up the group \"{name}\": {error}")),
    }
}

/// A plain decimal id. The all-ones id means "leave as it is" to chown, so it is no id.
fn numeric_id(text: &str) -> Option<u32> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let id = text.parse().ok()?;
    (digits && id != u32::MAX).then_some(id)
}

/// Only a string: a bare 600 in a file would be read as decimal, and 400 would quietly become 0620.
pub(crate) fn octal_mode<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    struct ModeVisitor;

    impl Visitor<'_> for ModeVisitor {
        type Value = u32;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("permissions as an octal string such as \"0660\"")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<u32, E> {
            let wrong = || E::invalid_value(de::Unexpected::Str(text), &self);
            if !text.bytes().all(|byte| (b'0'..=b'7').contains(&byte)) {
                return Err(wrong());
            }
            u32::from_str_radix(text, 8).map_err(|_| wrong())
        }
    }

    deserializer.deserialize_any(ModeVisitor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<VhostUserConfig, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    fn with(key: &str, value: &str) -> Result<VhostUserConfig, String> {
        read(&format!(r#"{{"volume": "v", "socket": "/run/v.sock", "{key}": {value}}}"#))
    }

    #[test]
    fn defaults_are_the_documented_ones() {
        let config = read(r#"{"volume": "v", "socket": "/run/v.sock"}"#).unwrap();
        assert_eq!(config, VhostUserConfig::new("v", "/run/v.sock"));
        assert_eq!((config.mode, config.queue_size), (0o600, 1024));
        config.check().unwrap();
    }

    #[test]
    fn the_mode_is_octal_and_a_string() {
        assert_eq!(with("mode", "\"0660\"").unwrap().mode, 0o660);
        assert_eq!(with("mode", "\"660\"").unwrap().mode, 0o660);
        for text in ["600", "\"rw\"", "\"\"", "\"0o600\"", "\"+600\"", "\"0680\"", "\"777777777777\""] {
            assert!(with("mode", text).unwrap_err().contains("octal"), "{text}");
        }
        assert_eq!(with("mode", "\"4755\"").unwrap().check().unwrap_err().0, "mode");
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for (key, value) in [
            ("queues", "0"),
            ("queues", "257"),
            ("workers", "0"),
            ("workers", "257"),
            ("serial", "\"\""),
            ("serial", "\"123456789012345678901\""),
            ("serial", "\"a b\""),
            ("serial", "\"grün\""),
            ("serial", "\"a\\u0007\""),
            ("queue-size", "0"),
            ("queue-size", "1"),
            ("queue-size", "100"),
            ("queue-size", "65535"),
            ("owner", "\"\""),
            ("owner", "\":\""),
            ("owner", "\"root:\""),
            ("owner", "\"no-such-user-here\""),
            ("owner", "\"root:no-such-group-here\""),
            ("owner", "\"4294967295\""),
        ] {
            assert_eq!(with(key, value).unwrap().check().unwrap_err().0, key, "{key}={value}");
        }
        for size in ["2", "32768"] {
            with("queue-size", size).unwrap().check().unwrap();
        }
        for socket in [String::new(), "a\0b".into(), "x".repeat(108)] {
            assert_eq!(VhostUserConfig::new("v", socket).check().unwrap_err().0, "socket");
        }
        VhostUserConfig::new("v", "x".repeat(107)).check().unwrap();
    }

    #[test]
    fn serial_numbers_are_the_names_and_never_alike() {
        let serial = |name: &str| VhostUserConfig::new(name, "/s").serial();
        assert_eq!(serial("root"), "root");
        assert_eq!(serial("exactly-twenty-bytes"), "exactly-twenty-bytes");
        let long = ["a-volume-with-a-long-name-1", "a-volume-with-a-long-name-2"].map(serial);
        assert_ne!(long[0], long[1]);
        for serial in long {
            assert!(serial.len() == 20 && serial.starts_with("a-volume--"), "{serial}");
        }
        // For ever: a guest finds its disks by it.
        assert_eq!(serial("a-volume-with-a-long-name-1"), "a-volume--eaea20665b");
        let given = with("serial", "\"12345678901234567890\"").unwrap();
        given.check().unwrap();
        assert_eq!(given.serial(), "12345678901234567890");
    }

    #[test]
    fn owners_by_name_and_by_number() {
        let ids = |owner: &str| {
            let mut config = VhostUserConfig::new("v", "/s");
            config.owner = Some(owner.into());
            config.owner_ids().unwrap()
        };
        let (root, wheel) = (Some(Uid::from_raw(0)), Some(Gid::from_raw(0)));
        assert_eq!(ids("root"), (root, None));
        assert_eq!(ids("root:root"), (root, wheel));
        assert_eq!(ids(":0"), (None, wheel));
        assert_eq!(ids("64055:64056"), (Some(Uid::from_raw(64055)), Some(Gid::from_raw(64056))));
    }

    #[test]
    fn unknown_and_missing_keys_are_refused() {
        assert!(with("colour", "1").unwrap_err().contains("colour"));
        assert!(read(r#"{"volume": "v"}"#).unwrap_err().contains("socket"));
    }
}
