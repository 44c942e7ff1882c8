//! A number of bytes as people write it: `512`, `64K`, `10G`.
//!
//! Suffixes are binary (K = 1024). [`Size`] prints the shortest form that reads back as the same number.

#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize};

/// A number of bytes. In files it is a string with a suffix or a plain integer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Size(pub u64);

/// Why a text is not a size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseSizeError {
    /// Nothing, a sign, a fraction or an unknown suffix.
    #[error(
        "\"{0}\" is not a size: write a whole number of bytes, with K, M, G, T, P or E for binary multiples"
    )]
    Syntax(String),
    /// The number does not fit in 64 bits.
    #[error("\"{0}\" is more bytes than 64 bits can count")]
    Overflow(String),
}

/// Suffix and power of two, largest first.
const UNITS: [(char, u32); 6] = [('E', 60), ('P', 50), ('T', 40), ('G', 30), ('M', 20), ('K', 10)];

impl Size {
    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// About this size for people, three digits or so: `1.46 GiB`. Does not read back.
    pub fn approx(self) -> String {
        let Some((unit, shift)) = UNITS.iter().find(|(_, shift)| self.0 >> shift > 0) else {
            return format!("{} bytes", self.0);
        };
        // Precision lost above 2^53 is far below the digits shown.
        let value = self.0 as f64 / (1u64 << shift) as f64;
        let digits = match value {
            v if v >= 100.0 => 0,
            v if v >= 10.0 => 1,
            _ => 2,
        };
        format!("{value:.digits$} {unit}iB")
    }
}

impl FromStr for Size {
    type Err = ParseSizeError;

    /// Reads `NUMBER[K|M|G|T|P|E][iB]`, letters in either case.
    fn from_str(text: &str) -> Result<Size, ParseSizeError> {
        let syntax = || ParseSizeError::Syntax(text.to_owned());
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, suffix) = text.split_at(digits);
        if number.is_empty() {
            return Err(syntax());
        }
        let shift = match suffix.to_ascii_uppercase().as_str() {
            "" => 0,
            long => {
                let short = long.strip_suffix("IB").unwrap_or(long);
                UNITS
                    .iter()
                    .find(|(unit, _)| short.chars().eq([*unit]))
                    .map(|(_, shift)| *shift)
                    .ok_or_else(syntax)?
            }
        };
        // Only digits are left, so the one way to fail is to be too large.
        let overflow = || ParseSizeError::Overflow(text.to_owned());
        number.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift)).map(Size).ok_or_else(overflow)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in UNITS {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Size, D::Error> {
        struct SizeVisitor;

        impl Visitor<'_> for SizeVisitor {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size: a number of bytes or a string such as \"10G\"")
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Size, E> {
                Ok(Size(bytes))
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Size, E> {
                u64::try_from(bytes)
                    .map(Size)
                    .map_err(|_| E::custom(format_args!("a size cannot be negative ({bytes})")))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(SizeVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn suffixes_are_binary_and_case_does_not_matter() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("4k", 4096),
            ("4KiB", 4096),
            ("3M", 3 << 20),
            ("10G", 10 << 30),
            ("2t", 2 << 40),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused() {
        for text in ["", "K", "-1", "+1", "1.5G", "1X", "1KB", "1 K", "1iB", "1KK", "٣", "0x10"] {
            assert_eq!(text.parse::<Size>(), Err(ParseSizeError::Syntax(text.to_owned())), "{text}");
        }
        for text in ["18446744073709551616", "16777216T"] {
            assert_eq!(text.parse::<Size>(), Err(ParseSizeError::Overflow(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn shown_for_people() {
        assert_eq!(Size(1000).approx(), "1000 bytes");
        assert_eq!(Size(1536).approx(), "1.50 KiB");
        assert_eq!(Size(20 << 30).approx(), "20.0 GiB");
        assert_eq!(Size(u64::MAX).approx(), "16.0 EiB");
    }

    #[test]
    fn json_takes_numbers_and_strings() {
        assert_eq!(serde_json::from_str::<Size>("512").unwrap(), Size(512));
        assert_eq!(serde_json::from_str::<Size>("\"1M\"").unwrap(), Size(1 << 20));
        let error = serde_json::from_str::<Size>("-3").unwrap_err();
        assert!(error.to_string().contains("negative"), "{error}");
        assert!(serde_json::from_str::<Size>("1.5").is_err());
    }

    proptest! {
        #[test]
        fn every_size_reads_back(bytes: u64, shift in 0u32..64) {
            let size = Size(bytes << shift);
            prop_assert_eq!(size.to_string().parse(), Ok(size));
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = text.parse::<Size>();
        }
    }
}
