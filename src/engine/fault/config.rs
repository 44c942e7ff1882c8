//! What a user may say about a volume with faults.

#![forbid(unsafe_code)]

use super::{Fault, FaultStore};
use crate::block::{Errno, Op, Size};
use crate::engine::driver::{AnyStore, Driver, Open, Summary};
use crate::engine::error::OpenError;
use crate::engine::layer;
use crate::engine::settings::yes;
use serde::de::{self, Deserialize, Deserializer, Visitor};
use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

/// `driver = "fault"`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct FaultConfig {
    /// The volume below, by its name.
    pub base: String,
    /// Faults are made from the beginning; else from when they are switched on.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// What the faults are drawn from: the same again for the same.
    #[serde(default)]
    pub seed: u64,
    /// Requests that fail without being carried out.
    #[serde(default)]
    pub errors: Chance,
    /// What they fail with.
    #[serde(default)]
    pub error: FaultError,
    /// Requests that are late.
    #[serde(default)]
    pub delays: Chance,
    /// Via how many milliseconds, 1 to [`FaultConfig::MAX_DELAY`].
    #[serde(default = "FaultConfig::default_delay")]
    pub delay: u64,
    /// Reads that fail with a part of their data read.
    #[serde(default)]
    pub short_reads: Chance,
    /// Writes that fail with a part of their data written.
    #[serde(default)]
    pub torn_writes: Chance,
    /// Writes that are acknowledged and never stored, of those without FUA: the next flush of every client fails.
    #[serde(default)]
    pub lost_writes: Chance,
    /// What faults are made in: `read`, `write`, `flush`, `discard`, `write-zeroes`, with a `+` between them.
    #[serde(default)]
    pub operations: Operations,
    /// Only requests that reach past this byte meet faults. Flushes have no place, and do in any case.
    #[serde(default)]
    pub from: Size,
    /// Only requests that begin before this byte do; `None`: all.
    pub to: Option<Size>,
}

impl FaultConfig {
    /// The longest delay: ten minutes, in milliseconds.
    pub const MAX_DELAY: u64 = 600_000;

    fn default_delay() -> u64 {
        100
    }
}

/// How likely something is, in millionths. Written as `0.5%`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chance(u32);

/// Reads what is written as text; says what that looks like where it is something else.
struct Written<T>(&'static str, PhantomData<T>);

impl<T: FromStr<Err = String>> Visitor<'_> for Written<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }
}

impl Chance {
    /// It does not happen.
    pub const NEVER: Chance = Chance(0);
    /// Millionths of what always happens.
    pub const CERTAIN: u32 = 1_000_000;

    /// In millionths.
    pub fn per_million(self) -> u32 {
        self.0
    }
}

impl FromStr for Chance {
    type Err = String;

    /// Reads `NUMBER%`, from 0 to 100 with at most four digits after the point.
    fn from_str(text: &str) -> Result<Chance, String> {
        let wrong = || {
            format!("\"{text}\" is not a chance: write 0% to 100%, with at most four digits after the point")
        };
        let number = text.strip_suffix('%').ok_or_else(wrong)?;
        let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(whole) || !digits(part) || whole.len() > 3 || part.len() > 4 {
            return Err(wrong());
        }
        // Seven digits at most.
        let chance = format!("{whole}{part:0<4}").parse().map_err(|_| wrong())?;
        if chance <= Chance::CERTAIN { Ok(Chance(chance)) } else { Err(wrong()) }
    }
}

impl<'de> Deserialize<'de> for Chance {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Chance, D::Error> {
        deserializer.deserialize_str(Written("a chance in quotes such as \"0.5%\"", PhantomData))
    }
}

/// As it is written.
impl fmt::Display for Chance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{}.{:04}", self.0 / 10_000, self.0 % 10_000);
        write!(f, "{}%", text.trim_end_matches('0').trim_end_matches('.'))
    }
}

/// What a request fails with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultError {
    /// The device is broken there.
    #[default]
    Io,
    /// The store is full.
    NoSpace,
}

impl FaultError {
    /// The kernel's number.
    pub fn errno(self) -> Errno {
        match self {
            FaultError::Io => Errno::EIO,
            FaultError::NoSpace => Errno::ENOSPC,
        }
    }
}

/// A set of operations. Written with a `+` between them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operations(Vec<Op>);

/// All there are.
const ALL: [Op; 5] = [Op::Read, Op::Write, Op::Flush, Op::Discard, Op::WriteZeroes];

impl Operations {
    /// Whether it is one of them.
    pub fn contains(&self, op: Op) -> bool {
        self.0.contains(&op)
    }
}

impl Default for Operations {
    fn default() -> Operations {
        Operations(ALL.to_vec())
    }
}

impl<'de> Deserialize<'de> for Operations {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Operations, D::Error> {
        deserializer.deserialize_str(Written("operations in quotes such as \"read+write\"", PhantomData))
    }
}

/// As it is written.
impl fmt::Display for Operations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = ALL.iter().filter(|op| self.contains(**op)).map(|op| op.name());
        f.write_str(&names.collect::<Vec<_>>().join("+"))
    }
}

impl FromStr for Operations {
    type Err = String;

    fn from_str(text: &str) -> Result<Operations, String> {
        let known = ALL.map(Op::name).join(", ");
        let one = |word: &str| {
            let found = ALL.into_iter().find(|op| op.name() == word);
            found.ok_or_else(|| {
                format!("\"{word}\" is not an operation, there are: {known} (with a + between them)")
            })
        };
        text.split('+').map(one).collect::<Result<_, _>>().map(Operations)
    }
}

impl Driver for FaultConfig {
    const NAME: &'static str = "fault";
    const TARGET: &'static str = "base";
    const HELP: &'static str = "
  fault:NAME   the volume NAME with faults, for testing what uses it
               errors=P%, error=io|no-space, delays=P%, delay=MILLISECONDS (100),
               short-reads=P%, torn-writes=P%   fail with a part done,
               lost-writes=P%   acknowledged, not stored, told by the next flush,
               operations=read+write+flush+discard+write-zeroes (all),
               from=SIZE, to=SIZE   where; seed=N (0): the same again for the same;
               enabled=on|off   until `ringblk fault` switches them
";
    type Store = FaultStore;

    fn target(&self) -> String {
        self.base.clone()
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        let most = FaultConfig::MAX_DELAY;
        if !(1..=most).contains(&self.delay) {
            let reason = format!("must be from 1 to {most} milliseconds, not {}", self.delay);
            return Err(("delay", reason));
        }
        match self.to {
            Some(to) if to <= self.from => Err(("to", "must be past from".into())),
            _ => Ok(()),
        }
    }

    fn examine(&self) -> Result<(), String> {
        Ok(())
    }

    fn summary(&self) -> Summary<'_> {
        let base = Some(self.base.as_str());
        Summary { base, block_size: None, read_only: false, reconnects: false, needs: None }
    }

    fn details(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let chances = [
            ("errors", self.errors),
            ("delays", self.delays),
            ("short-reads", self.short_reads),
            ("torn-writes", self.torn_writes),
            ("lost-writes", self.lost_writes),
        ];
        for (name, chance) in chances.iter().filter(|(_, chance)| *chance != Chance::NEVER) {
            write!(f, ", {name} {chance}")?;
        }
        let delay = (self.delay != FaultConfig::default_delay()).then(|| format!("delay {} ms", self.delay));
        let error = (self.error != FaultError::Io).then(|| "error no-space".to_owned());
        let all = ALL.iter().all(|op| self.operations.contains(*op));
        let operations = (!all).then(|| format!("operations {}", self.operations));
        let from = (self.from.bytes() > 0).then(|| format!("from {}", self.from));
        let to = self.to.map(|to| format!("to {to}"));
        let seed = (self.seed != 0).then(|| format!("seed {}", self.seed));
        let off = (!self.enabled).then(|| "switched off".to_owned());
        let others = [delay, error, operations, from, to, seed, off];
        others.into_iter().flatten().try_for_each(|other| write!(f, ", {other}"))
    }

    fn opener(&self, name: &str, base: Option<Open>) -> Result<Open, OpenError> {
        let config = self.clone();
        layer::opener(Self::NAME, name, base, move || Fault::new(&config), AnyStore::Fault)
    }
}
