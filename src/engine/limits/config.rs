//! What a user may say of a volume's limits: QEMU's words (`docs/throttle.txt` there), and its checks.

#![forbid(unsafe_code)]

use crate::block::Size;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};
use std::collections::BTreeMap;
use std::fmt;

/// What is limited, in the order of [`KEYS`]: operations or bytes, of all, of reads, of writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Knob {
    /// `iops-total`
    IopsTotal,
    /// `iops-read`
    IopsRead,
    /// `iops-write`
    IopsWrite,
    /// `bps-total`
    BpsTotal,
    /// `bps-read`
    BpsRead,
    /// `bps-write`
    BpsWrite,
}

impl Knob {
    /// Every knob, in the order of its number.
    pub const ALL: [Knob; 6] =
        [Knob::IopsTotal, Knob::IopsRead, Knob::IopsWrite, Knob::BpsTotal, Knob::BpsRead, Knob::BpsWrite];

    /// Whether it counts operations, and not bytes.
    pub const fn counts_operations(self) -> bool {
        (self as usize) < 3
    }
}

/// Numbers of a configuration: three for each knob (rate, `-max`, `-max-length`), and `iops-size`.
const COUNT: usize = 3 * Knob::ALL.len() + 1;

/// Where `iops-size` is among them.
const IOPS_SIZE: usize = COUNT - 1;

/// Their names, and at the end the group's.
const KEYS: [&str; COUNT + 1] = [
    "iops-total",
    "iops-total-max",
    "iops-total-max-length",
    "iops-read",
    "iops-read-max",
    "iops-read-max-length",
    "iops-write",
    "iops-write-max",
    "iops-write-max-length",
    "bps-total",
    "bps-total-max",
    "bps-total-max-length",
    "bps-read",
    "bps-read-max",
    "bps-read-max-length",
    "bps-write",
    "bps-write-max",
    "bps-write-max-length",
    "iops-size",
    GROUP,
];

const GROUP: &str = "group";

/// Some of the numbers, by their names: what a file, a flag or a call says. What it does not name stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LimitsChange {
    values: [Option<u64>; COUNT],
    group: Option<String>,
}

impl LimitsChange {
    /// The names of all numbers, as they are spelt in a file and in a flag.
    pub const NUMBERS: &'static [&'static str] = KEYS.split_at(COUNT).0;

    /// Sets the number of this name. False where there is none.
    pub fn set(&mut self, key: &str, value: u64) -> bool {
        let place = LimitsChange::NUMBERS.iter().position(|known| *known == key);
        place.is_some_and(|at| {
            self.values[at] = Some(value);
            true
        })
    }

    /// The numbers that are named.
    pub fn numbers(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let named = self.values.iter().zip(LimitsChange::NUMBERS);
        named.filter_map(|(value, key)| value.map(|value| (*key, value)))
    }

    /// Whether it names nothing at all.
    pub fn is_empty(&self) -> bool {
        *self == LimitsChange::default()
    }

    /// Whether the number of this name is one of bytes, and may have a suffix.
    pub fn is_bytes(key: &str) -> bool {
        key == KEYS[IOPS_SIZE] || (key.starts_with("bps-") && !key.ends_with("-length"))
    }
}

/// One limit: a rate, and what is allowed above it for a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rate {
    /// Units a second in the long run; 0: no limit.
    pub avg: u64,
    /// Units a second in a burst; 0: no bursts, but for a tenth of a second's units.
    pub max: u64,
    /// Seconds that a burst may last; 0 where nothing is said, which means 1.
    pub length: u64,
}

/// The limits of a volume; none by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LimitsConfig {
    values: [u64; COUNT],
    /// Volumes that name the same group share one set of limits.
    pub group: Option<String>,
}

impl LimitsConfig {
    /// Its keys, which stand among the driver's in a flag and in a table of their own in a file.
    pub const KEYS: [&'static str; COUNT + 1] = KEYS;
    /// The key of that table.
    pub const TABLE: &'static str = "limits";
    /// The key of the group's name.
    pub const GROUP: &'static str = GROUP;
    /// The largest number: QEMU's `THROTTLE_VALUE_MAX`.
    pub const MAX: u64 = 1_000_000_000_000_000;
    /// The longest name of a group.
    pub const MAX_GROUP: usize = 32;

    /// The limit of one knob.
    pub fn rate(&self, knob: Knob) -> Rate {
        let at = 3 * knob as usize;
        Rate { avg: self.values[at], max: self.values[at + 1], length: self.values[at + 2] }
    }

    /// Bytes that count as one operation: a larger request counts as several; 0: each request is one.
    pub fn iops_size(&self) -> u64 {
        self.values[IOPS_SIZE]
    }

    /// Whether anything is limited.
    pub fn is_limited(&self) -> bool {
        Knob::ALL.iter().any(|knob| self.rate(*knob).avg > 0)
    }

    /// Whether a number is set.
    pub fn has_numbers(&self) -> bool {
        self.values != [0; COUNT]
    }

    /// Whether its numbers are those of `other`.
    pub fn same_numbers(&self, other: &LimitsConfig) -> bool {
        self.values == other.values
    }

    /// The numbers that are set.
    pub fn numbers(&self) -> BTreeMap<String, u64> {
        let set = LimitsChange::NUMBERS.iter().zip(self.values).filter(|(_, value)| *value > 0);
        set.map(|(key, value)| ((*key).to_owned(), value)).collect()
    }

    /// What it becomes by a change. A rate that is taken off takes its burst with it, and a burst its length, unless the
    /// change names them too.
    ///
    /// # Errors
    /// The key that is wrong then, and why; and for another group, which volumes do not change while they are served.
    pub fn changed(&self, change: &LimitsChange) -> Result<LimitsConfig, (&'static str, String)> {
        if change.group.is_some() && change.group != self.group {
            return Err((GROUP, "a volume stays in its group as long as it is served".into()));
        }
        let mut changed = self.clone();
        for (at, value) in change.values.iter().enumerate() {
            if let Some(value) = *value {
                changed.values[at] = value;
            }
        }
        for at in 0..IOPS_SIZE {
            let (part, taken_off) = (at % 3, change.values[at] == Some(0));
            for below in (at + 1..at + 3 - part).filter(|_| taken_off) {
                changed.values[below] = change.values[below].unwrap_or(0);
            }
        }
        let rated = Knob::ALL.iter().any(|knob| knob.counts_operations() && changed.rate(*knob).avg > 0);
        if !rated && change.values[IOPS_SIZE].is_none() {
            changed.values[IOPS_SIZE] = 0;
        }
        changed.check()?;
        Ok(changed)
    }

    /// QEMU's `throttle_is_valid()`, and a length only where there is something to be long.
    ///
    /// # Errors
    /// The key that is wrong, and why.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let most = LimitsConfig::MAX;
        if let Some(at) = self.values.iter().position(|value| *value > most) {
            return Err((KEYS[at], format!("must be at most {most}, not {}", self.values[at])));
        }
        for total in [Knob::IopsTotal, Knob::BpsTotal] {
            let apart = (1..3).map(|next| 3 * (total as usize + next)).find(|at| self.values[*at] > 0);
            if let (true, Some(apart)) = (self.rate(total).avg > 0, apart) {
                let total = KEYS[3 * total as usize];
                return Err((
                    KEYS[apart],
                    format!("cannot be limited apart where {total} is: take one of them"),
                ));
            }
        }
        for knob in Knob::ALL {
            let at = 3 * knob as usize;
            let (Rate { avg, max, length }, [avg_key, max_key, length_key]) =
                (self.rate(knob), [KEYS[at], KEYS[at + 1], KEYS[at + 2]]);
            if max > 0 && avg == 0 {
                return Err((max_key, format!("needs {avg_key}, what is allowed in the long run")));
            }
            if max > 0 && max < avg {
                return Err((max_key, format!("must not be lower than {avg_key}, which is {avg}")));
            }
            if length > 0 && max <= avg {
                let reason = format!("needs a {max_key} above {avg_key}: it says how long that may last");
                return Err((length_key, reason));
            }
            if length > 0 && length > most / max {
                let longest = most / max;
                return Err((length_key, format!("must be at most {longest} seconds at this {max_key}")));
            }
        }
        let counts = |knob: &Knob| knob.counts_operations() && self.rate(*knob).avg > 0;
        if self.iops_size() > 0 && !Knob::ALL.iter().any(counts) {
            return Err((
                KEYS[IOPS_SIZE],
                "needs a limit of operations: iops-total, iops-read or iops-write".into(),
            ));
        }
        match &self.group {
            Some(name) if !is_group(name) => {
                let longest = LimitsConfig::MAX_GROUP;
                Err((GROUP, format!("{name:?} is no name of 1 to {longest} of A-Z a-z 0-9 _ . -")))
            }
            _ => Ok(()),
        }
    }
}

fn is_group(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    (1..=LimitsConfig::MAX_GROUP).contains(&name.len()) && name.bytes().all(allowed)
}

/// What is set, for people: nothing, or `, iops-total=2000`.
impl fmt::Display for LimitsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (key, value) in self.numbers() {
            match LimitsChange::is_bytes(&key) {
                true => write!(f, ", {key}={}", Size(value))?,
                false => write!(f, ", {key}={value}")?,
            }
        }
        self.group.as_ref().map_or(Ok(()), |group| write!(f, ", group={group}"))
    }
}

/// Which of [`KEYS`].
struct Key(usize);

/// Refused where it is read, so that the error has its line.
impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Key, D::Error> {
        struct KeyVisitor;

        impl Visitor<'_> for KeyVisitor {
            type Value = Key;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a limit")
            }

            fn visit_str<E: Error>(self, key: &str) -> Result<Key, E> {
                let at = KEYS.iter().position(|known| *known == key);
                at.map(Key).ok_or_else(|| E::unknown_field(key, &KEYS))
            }
        }

        deserializer.deserialize_identifier(KeyVisitor)
    }
}

struct LimitsVisitor;

impl<'de> Visitor<'de> for LimitsVisitor {
    type Value = LimitsChange;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of limits")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<LimitsChange, A::Error> {
        let mut change = LimitsChange::default();
        while let Some(Key(at)) = map.next_key()? {
            let twice = || A::Error::duplicate_field(KEYS[at]);
            if KEYS[at] == GROUP {
                let first = change.group.replace(map.next_value()?).is_none();
                first.then_some(()).ok_or_else(twice)?;
                continue;
            }
            let value = match LimitsChange::is_bytes(KEYS[at]) {
                true => map.next_value::<Size>()?.bytes(),
                false => map.next_value()?,
            };
            let first = change.values[at].replace(value).is_none();
            first.then_some(()).ok_or_else(twice)?;
        }
        Ok(change)
    }
}

impl<'de> Deserialize<'de> for LimitsChange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<LimitsChange, D::Error> {
        deserializer.deserialize_map(LimitsVisitor)
    }
}

impl Serialize for LimitsChange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (key, value) in self.numbers() {
            map.serialize_entry(key, &value)?;
        }
        if let Some(group) = &self.group {
            map.serialize_entry(GROUP, group)?;
        }
        map.end()
    }
}

/// What is not said is not limited. Nothing is checked yet: see [`LimitsConfig::check`].
impl<'de> Deserialize<'de> for LimitsConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<LimitsConfig, D::Error> {
        let LimitsChange { values, group } = LimitsChange::deserialize(deserializer)?;
        Ok(LimitsConfig { values: values.map(|value| value.unwrap_or(0)), group })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<LimitsConfig, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    fn refusal(json: &str) -> (&'static str, String) {
        read(json).unwrap().check().unwrap_err()
    }

    #[test]
    fn each_key_has_its_place() {
        for (at, key) in LimitsChange::NUMBERS.iter().enumerate() {
            let mut change = LimitsChange::default();
            assert!(change.set(key, 7));
            assert_eq!(change.values[at], Some(7));
            let config = read(&format!("{{\"{key}\": 7}}")).unwrap();
            assert_eq!(config.numbers(), BTreeMap::from([((*key).to_owned(), 7)]));
        }
        let config =
            read(r#"{"bps-write": "1M", "bps-write-max": "2M", "bps-write-max-length": 3}"#).unwrap();
        assert_eq!(config.rate(Knob::BpsWrite), Rate { avg: 1 << 20, max: 2 << 20, length: 3 });
        assert_eq!(config.to_string(), ", bps-write=1M, bps-write-max=2M, bps-write-max-length=3");
        assert!(!LimitsChange::default().set("group", 1));
        for knob in Knob::ALL {
            assert_eq!(KEYS[3 * knob as usize].starts_with("iops"), knob.counts_operations());
        }
    }

    #[test]
    fn what_is_no_limit_is_refused() {
        assert!(read(r#"{"iops": 1}"#).unwrap_err().contains("iops-total"));
        assert!(read(r#"{"iops-total": "many"}"#).is_err());
        assert!(read(r#"{"iops-total": -1}"#).is_err());
        assert!(read(r#"{"iops-total": 1, "iops-total": 1}"#).unwrap_err().contains("duplicate"));
        assert!(read(r#"{"group": "a", "group": "a"}"#).unwrap_err().contains("duplicate"));
        for (json, key) in [
            (r#"{"iops-total": 1, "iops-read": 1}"#, "iops-read"),
            (r#"{"bps-total": 1, "bps-write": 1}"#, "bps-write"),
            (r#"{"iops-read-max": 1}"#, "iops-read-max"),
            (r#"{"iops-read": 5, "iops-read-max": 4}"#, "iops-read-max"),
            (r#"{"iops-read": 5, "iops-read-max-length": 4}"#, "iops-read-max-length"),
            (r#"{"iops-read": 5, "iops-read-max": 5, "iops-read-max-length": 4}"#, "iops-read-max-length"),
            (
                r#"{"bps-read": 1, "bps-read-max": 1000, "bps-read-max-length": 1000000000001}"#,
                "bps-read-max-length",
            ),
            (r#"{"iops-total": 1000000000000001}"#, "iops-total"),
            (r#"{"iops-size": 4096}"#, "iops-size"),
            (r#"{"iops-size": 4096, "bps-total": 1}"#, "iops-size"),
            (r#"{"group": ""}"#, "group"),
            (r#"{"group": "a b"}"#, "group"),
        ] {
            assert_eq!(refusal(json).0, key, "{json}");
        }
        for json in [
            "{}",
            r#"{"iops-total": 0, "iops-read": 1}"#,
            r#"{"iops-total": 1, "bps-read": 1, "bps-write": 2, "group": "a.b_c-1"}"#,
            r#"{"bps-read": 1, "bps-read-max": 1000, "bps-read-max-length": 1000000000000}"#,
            r#"{"iops-write": 5, "iops-write-max": 5, "iops-size": "4K"}"#,
        ] {
            read(json).unwrap().check().unwrap();
        }
    }

    #[test]
    fn a_change_leaves_what_it_does_not_name() {
        let before = read(r#"{"iops-total": 10, "iops-total-max": 20, "iops-total-max-length": 3, "iops-size": 512, "bps-read": 7}"#).unwrap();
        let change = |json: &str| before.changed(&serde_json::from_str(json).unwrap());
        assert_eq!(change("{}").unwrap(), before);
        let faster = change(r#"{"iops-total-max": 30}"#).unwrap();
        assert_eq!(faster.rate(Knob::IopsTotal), Rate { avg: 10, max: 30, length: 3 });
        // What hung on it goes with it.
        let off = change(r#"{"iops-total": 0}"#).unwrap();
        assert_eq!(off.numbers(), BTreeMap::from([("bps-read".to_owned(), 7)]));
        let other = change(r#"{"iops-total": 0, "iops-read": 5}"#).unwrap();
        assert_eq!((other.rate(Knob::IopsRead).avg, other.iops_size()), (5, 512));
        assert_eq!(change(r#"{"iops-total-max": 0}"#).unwrap().rate(Knob::IopsTotal).length, 0);
        assert_eq!(change(r#"{"iops-read": 5}"#).unwrap_err().0, "iops-read");
        assert_eq!(change(r#"{"iops-total": 30}"#).unwrap_err().0, "iops-total-max");
        assert_eq!(change(r#"{"group": "a"}"#).unwrap_err().0, "group");
    }

    #[test]
    fn a_change_survives_the_way_to_the_service() {
        let mut change = LimitsChange::default();
        assert!(change.is_empty());
        change.set("iops-total", 0);
        change.set("bps-read-max", 5);
        let json = serde_json::to_string(&change).unwrap();
        assert_eq!(json, r#"{"iops-total":0,"bps-read-max":5}"#);
        assert_eq!(serde_json::from_str::<LimitsChange>(&json).unwrap(), change);
    }
}
