//! The flag spelling: `key=value` lists, read into the same structs as a file's tables.
//!
//! Options are separated by commas and a comma inside a value is doubled, as in QEMU. Values have no types of their
//! own: the struct that is filled says whether `1` is a number or a name.

#![forbid(unsafe_code)]

use serde::Deserialize;
use serde::de::value::{Error, MapDeserializer, StrDeserializer};
use serde::de::{Deserializer, Error as _, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;

use super::MetricsAddress;
use crate::engine::config::{LimitsConfig, PolicyConfig, TopologyConfig, VolumeConfig};
use crate::engine::nbd::is_uri;
use crate::frontend::ublk::config::UblkConfig;
use crate::frontend::vhost_user::config::VhostUserConfig;

/// All that is said of a volume.
type Said = (VolumeConfig, PolicyConfig, TopologyConfig, LimitsConfig);

/// `NAME=DRIVER:TARGET[,key=value...]`
pub(super) fn volume(text: &str) -> Result<(String, Said), String> {
    let form = "write NAME=DRIVER:TARGET[,key=value...]";
    let parts = split(text)?;
    let (head, options) = parts.split_first().ok_or(form)?;
    let (name, rest) = head.split_once('=').ok_or(form)?;
    // The driver of a URI needs no saying.
    let (driver, target) = if is_uri(rest) { ("nbd", rest) } else { rest.split_once(':').ok_or(form)? };
    // An unknown driver has no target key; from_driver is the one that says so.
    let key = VolumeConfig::target_key(driver).unwrap_or("target");
    let (policy, settings) = settings(&[(key, target)], options)?.split(&PolicyConfig::KEYS);
    let (topology, settings) = settings.split(&TopologyConfig::KEYS);
    let (limits, settings) = settings.split(&LimitsConfig::KEYS);
    let volume = VolumeConfig::from_driver(driver, settings.map()).map_err(|error| error.to_string())?;
    Ok((name.to_owned(), (volume, read(&policy)?, read(&topology)?, read(&limits)?)))
}

/// `VOLUME[,key=value...]`
pub(super) fn ublk(text: &str) -> Result<UblkConfig, String> {
    let parts = split(text)?;
    let (volume, options) = parts.split_first().ok_or("write VOLUME[,key=value...]")?;
    read(&settings(&[("volume", volume)], options)?)
}

/// `VOLUME=SOCKET[,key=value...]`
pub(super) fn vhost_user(text: &str) -> Result<VhostUserConfig, String> {
    let form = "write VOLUME=SOCKET[,key=value...]";
    let parts = split(text)?;
    let (head, options) = parts.split_first().ok_or(form)?;
    let (volume, socket) = head.split_once('=').ok_or(form)?;
    read(&settings(&[("volume", volume), ("socket", socket)], options)?)
}

/// `ADDRESS:PORT`, or `PATH[,mode=OCTAL][,owner=USER:GROUP]`
pub(super) fn metrics(text: &str) -> Result<MetricsAddress, String> {
    if let Ok(address) = text.parse() {
        return Ok(MetricsAddress::Tcp(address));
    }
    let form = "write ADDRESS:PORT with a numeric address (127.0.0.1:9123), or PATH[,mode=0660][,owner=USER:GROUP] with a / in it";
    let parts = split(text)?;
    let (path, options) = parts.split_first().filter(|(path, _)| path.contains('/')).ok_or(form)?;
    Ok(MetricsAddress::Unix(read(&settings(&[("path", path)], options)?)?))
}

/// Splits at single commas and makes double ones single.
fn split(text: &str) -> Result<Vec<String>, String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    match parts.iter().any(String::is_empty) {
        true => Err("an option is empty (a comma inside a value is written \",,\")".into()),
        false => Ok(parts),
    }
}

/// Keys and values of one flag, in the order written.
struct Settings<'a>(Vec<(&'a str, Setting<'a>)>);

impl<'a> Settings<'a> {
    fn map(&self) -> MapDeserializer<'a, std::vec::IntoIter<(&'a str, Setting<'a>)>, Error> {
        MapDeserializer::new(self.0.clone().into_iter())
    }

    /// Those with one of the keys, and the others.
    fn split(self, keys: &[&str]) -> (Settings<'a>, Settings<'a>) {
        let (with, without) = self.0.into_iter().partition(|(key, _)| keys.contains(key));
        (Settings(with), Settings(without))
    }
}

fn settings<'a>(head: &[(&'a str, &'a str)], options: &'a [String]) -> Result<Settings<'a>, String> {
    let mut pairs = head.to_vec();
    for option in options {
        let pair = option.split_once('=').ok_or_else(|| {
            format!("\"{option}\" is not key=value (a comma inside a value is written \",,\")")
        })?;
        pairs.push(pair);
    }
    let setting = |(key, text)| (key, Setting { key, text });
    Ok(Settings(pairs.into_iter().map(setting).collect()))
}

fn read<'a, T: Deserialize<'a>>(settings: &Settings<'a>) -> Result<T, String> {
    T::deserialize(settings.map()).map_err(|error| error.to_string())
}

/// The text of one value, which becomes whatever type is asked for. Errors name the key.
#[derive(Clone, Copy)]
struct Setting<'a> {
    key: &'a str,
    text: &'a str,
}

impl Setting<'_> {
    fn error(self, reason: impl std::fmt::Display) -> Error {
        Error::custom(format_args!("{}: {reason}", self.key))
    }

    fn number<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let digits = self.text.bytes().all(|byte| byte.is_ascii_digit());
        match self.text.parse() {
            Ok(number) if digits => visitor.visit_u64(number).map_err(|error: Error| self.error(error)),
            _ => Err(self.error(format_args!("\"{}\" is not a whole number", self.text))),
        }
    }
}

impl<'de> IntoDeserializer<'de, Error> for Setting<'de> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for Setting<'de> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_borrowed_str(self.text).map_err(|error: Error| self.error(error))
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.text {
            "on" | "true" | "yes" => visitor.visit_bool(true),
            "off" | "false" | "no" => visitor.visit_bool(false),
            other => Err(self.error(format_args!("\"{other}\" is neither on nor off"))),
        }
    }

    fn deserialize_u8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.number(visitor)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.number(visitor)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.number(visitor)
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.number(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        StrDeserializer::<Error>::new(self.text)
            .deserialize_enum(name, variants, visitor)
            .map_err(|error: Error| self.error(error))
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple tuple_struct map
        struct identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn commas_are_doubled_inside_values() {
        let (_, (found, ..)) = volume("a=file:/x,,y,,,direct=on").unwrap();
        assert_eq!(found.target(), "/x,y,");
        assert_eq!(split("a,,,,b,c").unwrap(), ["a,,b", "c"]);
    }

    #[test]
    fn targets_keep_their_colons_and_equal_signs() {
        let (name, (found, ..)) = volume("n=nbd:nbd+unix:///e?socket=/run/a=b.sock,reconnect=5").unwrap();
        assert_eq!(name, "n");
        assert_eq!(found.target(), "nbd+unix:///e?socket=/run/a=b.sock");
        // A URI says by itself which driver it takes.
        for text in ["n=NBD://h:1/e,reconnect=5", "n=nbd:NBD://h:1/e,reconnect=5"] {
            let (_, (found, ..)) = volume(text).unwrap();
            assert_eq!((found.driver(), &*found.target()), ("nbd", "NBD://h:1/e"), "{text}");
        }
        let found = vhost_user("v=/run/a=b.sock").unwrap();
        assert_eq!(found.socket, std::path::Path::new("/run/a=b.sock"));
    }

    #[test]
    fn bad_volumes_are_refused() {
        for (text, word) in [
            ("", "empty"),
            ("root", "NAME=DRIVER"),
            ("root=/srv/a.img", "NAME=DRIVER"),
            ("a=zfs:tank", "unknown driver \"zfs\""),
            ("a=zfs:tank,colour=red", "unknown driver \"zfs\""),
            ("a=null:1G,colour=red", "colour"),
            ("a=null:1G,size=2G", "duplicate"),
            ("a=null:1G,driver=file", "driver"),
            ("a=null:lots", "size: \"lots\""),
            ("a=null:-1", "size: \"-1\""),
            ("a=null:1G,", "empty"),
            ("a=null:1G,block-size", "key=value"),
            ("a=null:1G,block-size=x", "block-size: \"x\" is not a whole number"),
            ("a=null:1G,block-size=+512", "block-size"),
            ("a=null:1G,block-size=4294967296", "block-size"),
            ("a=file:/x,y,direct=on", "\"y\" is not key=value"),
            ("a=file:/x,direct=maybe", "direct: \"maybe\" is neither on nor off"),
            ("a=file:/x,direct=", "direct: \"\""),
            ("a=nbd:nbd://h,connections=65536", "connections"),
            ("a=null:1G,on-error=hope", "on-error"),
            ("a=null:1G,on-error=stop,on-error=stop", "duplicate"),
            ("a=null:1G,retry-for=soon", "retry-for"),
            ("a=null:1G,physical-block=4K", "physical-block"),
            ("a=null:1G,physical-block=512,physical-block=512", "duplicate"),
            ("a=null:1G,iops-total=1K", "iops-total: \"1K\" is not a whole number"),
            ("a=null:1G,bps-total=fast", "bps-total: \"fast\""),
            ("a=null:1G,bps-total=1,bps-total=1", "duplicate"),
            ("a=null:1G,limits=1", "limits"),
        ] {
            let error = volume(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn bad_exports_are_refused() {
        for (text, word) in [
            ("", "empty"),
            (",queues=1", "empty"),
            ("a,queues", "key=value"),
            ("a,queue=1", "queue"),
            ("a,queues=1,queues=2", "duplicate"),
            ("a,volume=b", "duplicate"),
            ("a,zero-copy=maybe", "zero-copy"),
            ("a,max-io=5G", "max-io"),
        ] {
            let error = ublk(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
        for (text, word) in [
            ("a", "VOLUME=SOCKET"),
            ("a=/s,mode=rw", "mode"),
            ("a=/s,owner", "key=value"),
            ("a=/s,socket=/t", "duplicate"),
        ] {
            let error = vhost_user(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text: String) {
            let _ = (volume(&text), ublk(&text), vhost_user(&text));
        }

        #[test]
        fn nothing_that_looks_right_panics(
            text in "[a-z]{0,3}=?(file|null|memory|nbd|)?:?[a-z0-9/,=:-]{0,12}(,[a-z-]{0,8}=?[a-z0-9,]{0,6}){0,3}"
        ) {
            let _ = (volume(&text), ublk(&text), vhost_user(&text));
        }

        #[test]
        fn any_path_survives_the_doubling(path in "/[^\0]+") {
            let (_, (found, ..)) = volume(&format!("a=file:{},direct=on", path.replace(',', ",,"))).unwrap();
            prop_assert_eq!(found.target(), path);
        }
    }
}
