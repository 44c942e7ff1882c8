//! NBD URIs: `nbd://HOST[:PORT]/EXPORT` and `nbd+unix:///EXPORT?socket=PATH`, with TLS `nbds` and `nbds+unix`
//! (<https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md>; `nbdinfo` is the reference).
//!
//! Contract: the export's name is what stands between the first slash after the host and the query, percent-decoded and
//! nothing else. A general URI library tidies paths (`/a/../b`, `//`) and cannot be used here. Nothing that is written is
//! passed over in silence: what cannot be meant is refused.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fmt;
use std::net::Ipv6Addr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// The port that IANA gave to NBD.
const PORT: u16 = 10809;

/// The longest path of a socket in bytes (`sun_path` of `unix(7)`, less its end).
const MAX_PATH: usize = 107;

/// The longest name of an export in bytes (the protocol's limit for a string).
const MAX_NAME: usize = 4096;

/// Address of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A socket in the file system.
    Unix(PathBuf),
    /// A name or a number, looked up at each attempt.
    Tcp {
        /// As written, without the brackets of a number of IPv6.
        host: String,
        /// Never 0.
        port: u16,
    },
}

/// For people.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "{}", path.display()),
            Address::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// What a URI names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    /// Where the server is.
    pub address: Address,
    /// The export as it goes over the wire: UTF-8 if the server keeps to the document, which nobody relies on.
    pub name: Vec<u8>,
    /// The connection is to be encrypted.
    pub tls: bool,
}

impl Uri {
    /// Takes a URI apart.
    ///
    /// # Errors
    /// What is wrong with it, without the URI itself.
    pub fn parse(text: &str) -> Result<Uri, String> {
        let form = "write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=/PATH";
        let (scheme, rest) = split(text).ok_or_else(|| format!("not a URI: {form}"))?;
        let (unix, tls) = match scheme.as_str() {
            "nbd" => (false, false),
            "nbds" => (false, true),
            "nbd+unix" => (true, false),
            "nbds+unix" => (true, true),
            other => return Err(format!("scheme {} is not supported: {form}", other.escape_debug())),
        };
        if rest.contains('#') {
            return Err("a # ends a URI: write %23 for one that belongs to a name".into());
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let name = decode(path);
        if name.contains(&0) {
            return Err("the export's name has a NUL byte in it".into());
        }
        if name.len() > MAX_NAME {
            return Err(format!("an export name of {} bytes is too long", name.len()));
        }
        let socket = socket(query)?;
        let address = match (unix, socket) {
            (true, _) if !authority.is_empty() => {
                return Err(format!("there is no host with a Unix socket: {form}, with three slashes"));
            }
            (true, Some(path)) => Address::Unix(path),
            (true, None) => return Err("no socket: nbd+unix:///EXPORT?socket=/PATH".into()),
            (false, Some(_)) => return Err("a socket= is for nbd+unix alone".into()),
            (false, None) => tcp(authority)?,
        };
        Ok(Uri { address, name, tls })
    }
}

/// One text for each export, however its URI was written: host, port, socket and name, and whether the way there is
/// encrypted does not matter. A URI itself.
impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = encode(&self.name, IN_PATHS);
        match &self.address {
            Address::Unix(path) => {
                // Without what means nothing; a link, or `..` behind one, may lead elsewhere tomorrow.
                let path: PathBuf = path.components().collect();
                write!(f, "nbd+unix:///{name}?socket={}", encode(path.as_os_str().as_bytes(), IN_PATHS))
            }
            Address::Tcp { host, port } => {
                let (number, zone) =
                    host.split_once('%').map_or((host.as_str(), None), |(n, z)| (n, Some(z)));
                match number.parse::<Ipv6Addr>() {
                    Ok(number) => {
                        let zone = zone.map_or(String::new(), |zone| {
                            format!("%25{}", encode(zone.as_bytes(), IN_HOSTS))
                        });
                        write!(f, "nbd://[{number}{zone}]:{port}/{name}")
                    }
                    Err(_) => {
                        write!(
                            f,
                            "nbd://{}:{port}/{name}",
                            encode(host.to_ascii_lowercase().as_bytes(), IN_HOSTS)
                        )
                    }
                }
            }
        }
    }
}

/// What stands for itself in a name or a path, besides letters and digits.
const IN_PATHS: &[u8] = b"/.-_~!$'()*+,=@: ";

/// The same in a host.
const IN_HOSTS: &[u8] = b".-_";

/// The opposite of [`decode`]. Bytes in `marks` stand for themselves.
fn encode(bytes: &[u8], marks: &[u8]) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || marks.contains(&byte);
    bytes.iter().fold(String::new(), |mut text, byte| {
        match plain(*byte) {
            true => text.push(char::from(*byte)),
            false => text.push_str(&format!("%{byte:02X}")),
        }
        text
    })
}

/// The scheme in lower case, which is alike in either (RFC 3986 section 3.1), and what follows the slashes.
fn split(text: &str) -> Option<(String, &str)> {
    text.split_once("://").map(|(scheme, rest)| (scheme.to_ascii_lowercase(), rest))
}

/// Whether `text` means an export, where it could also be the path of a file: by its scheme, of those that NBD has, whether
/// they are supported here or not. The one place that decides this.
pub fn is_uri(text: &str) -> bool {
    let Some((scheme, _)) = split(text) else { return false };
    let (base, _transport) = scheme.split_once('+').unwrap_or((&scheme, ""));
    base == "nbd" || base == "nbds"
}

/// The same export in the spelling that is compared with others: see [`Uri`]'s `Display`. What is no URI stays as it is.
pub fn normal(text: &str) -> String {
    Uri::parse(text).map_or_else(|_| text.to_owned(), |uri| uri.to_string())
}

/// The socket that a query names.
fn socket(query: &str) -> Result<Option<PathBuf>, String> {
    let mut found = None;
    for pair in query.split(['&', ';']) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        if key.starts_with("tls-") {
            return Err(format!("{key} is an option of the volume here, not of the URI"));
        }
        if key != "socket" {
            // As every other client does with what it does not know.
            continue;
        }
        let path = decode(value);
        if path.first() != Some(&b'/') || path.contains(&0) {
            return Err(format!("socket \"{}\" is not an absolute path", value.escape_debug()));
        }
        if path.len() > MAX_PATH {
            return Err(format!("the path of a socket has at most {MAX_PATH} bytes"));
        }
        if found.replace(PathBuf::from(OsString::from_vec(path))).is_some() {
            return Err("there are two socket= in it".into());
        }
    }
    Ok(found)
}

fn tcp(authority: &str) -> Result<Address, String> {
    if authority.contains('@') {
        return Err("a user's name is for pre-shared keys, which are not supported".into());
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or("there is no ] after the [")?;
            let number = host.split(['%']).next().unwrap_or(host);
            number.parse::<Ipv6Addr>().map_err(|_| format!("\"{host}\" is no address of IPv6"))?;
            match port {
                "" => (host, None),
                port => (host, Some(port.strip_prefix(':').ok_or("there is something after the ]")?)),
            }
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    let host = String::from_utf8(decode(host)).map_err(|_| "the host is not UTF-8")?;
    if host.is_empty() {
        return Err("no host: nbd://HOST[:PORT]/EXPORT".into());
    }
    if host.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(format!("{host:?} is no name of a host"));
    }
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let port = match port {
        None => PORT,
        Some(text) => {
            let number = text.parse().ok().filter(|port| digits(text) && *port > 0);
            number.ok_or_else(|| format!("\"{}\" is no port", text.escape_debug()))?
        }
    };
    Ok(Address::Tcp { host, port })
}

/// `%41` is `A` (RFC 3986 section 2.1); what is no such triple stands for itself. A plus is a plus.
fn decode(text: &str) -> Vec<u8> {
    let hex = |digit: u8| char::from(digit).to_digit(16);
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        match (first, after) {
            (b'%', [high, low, after @ ..]) => match (hex(*high), hex(*low)) {
                (Some(high), Some(low)) => {
                    bytes.push((high << 4 | low) as u8);
                    rest = after;
                }
                _ => bytes.push(first),
            },
            _ => bytes.push(first),
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.into(), port }
    }

    #[test]
    fn uris_name_a_server_and_an_export() {
        let unix = |path: &str| Address::Unix(path.into());
        let cases: [(&str, Address, &[u8]); 17] = [
            ("nbd://host", tcp("host", 10809), b""),
            ("nbd://host/", tcp("host", 10809), b""),
            ("NBD://host?x=y", tcp("host", 10809), b""),
            ("nbd://127.0.0.1:9/a%20disk", tcp("127.0.0.1", 9), b"a disk"),
            ("nbd://127.0.0.1:9/a disk", tcp("127.0.0.1", 9), b"a disk"),
            ("nbd://[::1]:9//x", tcp("::1", 9), b"/x"),
            ("nbd://[fe80::1%25eth0]/x", tcp("fe80::1%eth0", 10809), b"x"),
            // What a browser would tidy away.
            ("nbd://h/./a/../b/", tcp("h", 10809), b"./a/../b/"),
            ("nbd://h/%2e%2e/%2E", tcp("h", 10809), b"../."),
            ("nbd://h/a\\b\tc\n", tcp("h", 10809), b"a\\b\tc\n"),
            ("nbd://h/ä%23%3f%ff", tcp("h", 10809), b"\xc3\xa4#?\xff"),
            ("nbd+unix:////dir//a/../b?socket=/s", unix("/s"), b"/dir//a/../b"),
            ("nbd+unix:///e?socket=/run/a+b%3f%2", unix("/run/a+b?%2"), b"e"),
            ("nbd+unix:///a+b%2B%2?x&socket=%2fs&y=z", unix("/s"), b"a+b+%2"),
            ("nbd+unix:///?socket=/s", unix("/s"), b""),
            ("nbd+unix://?socket=/s", unix("/s"), b""),
            ("nbd+unix:///a:b@c?socket=/a/../b", unix("/a/../b"), b"a:b@c"),
        ];
        for (uri, address, name) in cases {
            let expected = Uri { address, name: name.into(), tls: false };
            assert_eq!(Uri::parse(uri).unwrap(), expected, "{uri}");
            let secure = uri.replacen("nbd", "nbds", 1).replacen("NBD", "NBDS", 1);
            assert_eq!(Uri::parse(&secure).unwrap(), Uri { tls: true, ..expected }, "{secure}");
        }
    }

    #[test]
    fn a_uri_is_told_from_a_path() {
        for uri in
            ["nbd://", "NBD://h", "Nbds://h/x", "nbd+unix:///?socket=/s", "NBDS+UNIX://x", "nbd+vsock://2"]
        {
            assert!(is_uri(uri), "{uri}");
        }
        for path in
            ["nbd", "nbd:/x", "./nbd://x", "/nbd://x", "nbdx://h", "http://h", "://", "+nbd://x", "file://x"]
        {
            assert!(!is_uri(path), "{path}");
        }
        assert_eq!(normal("NBD+Unix:///A?socket=/S"), "nbd+unix:///A?socket=/S");
        assert_eq!(normal("A"), "A");
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let long = format!("nbd+unix:///?socket=/{}", "x".repeat(MAX_PATH));
        let name = format!("nbd://h/{}", "x".repeat(MAX_NAME + 1));
        for (uri, word) in [
            ("", "not a URI"),
            ("server", "not a URI"),
            ("nbd:h/e", "not a URI"),
            ("http://h/e", "scheme http"),
            ("nbd+vsock://2/e", "scheme nbd+vsock"),
            ("nbd:///e", "no host"),
            ("nbd://:5/e", "no host"),
            ("nbd://a b/e", "no name of a host"),
            ("nbd://a%00b/e", "no name of a host"),
            ("nbd://me@h/e", "pre-shared"),
            ("nbd://h:99999/", "no port"),
            ("nbd://h:0/", "no port"),
            ("nbd://h:/", "no port"),
            ("nbd://h:+1/", "no port"),
            ("nbd://[::1/", "no ]"),
            ("nbd://[h]/", "IPv6"),
            ("nbd://[::1]9/", "after the ]"),
            ("nbd://h/a%00b", "NUL"),
            ("nbd://h/a#b", "%23"),
            ("nbd://h/e?socket=/s", "nbd+unix alone"),
            ("nbd+unix:///e", "no socket"),
            ("nbd+unix://e?socket=/s", "three slashes"),
            ("nbd+unix:///e?socket=", "absolute"),
            ("nbd+unix:///e?socket=rel", "absolute"),
            ("nbd+unix:///e?socket=/a%00", "absolute"),
            ("nbd+unix:///e?socket=/a&socket=/b", "two socket="),
            ("nbds://h/e?tls-psk-file=/x", "option of the volume"),
            (&long, "107"),
            (&name, "too long"),
        ] {
            let reason = Uri::parse(uri).unwrap_err();
            assert!(reason.contains(word), "{uri}: {reason}");
        }
    }

    #[test]
    fn an_export_has_one_text() {
        let text = |uri: &str| Uri::parse(uri).unwrap().to_string();
        let same = [
            (
                "nbd://host:10809/x",
                ["nbd://host/x", "NBD://HOST:10809/x", "nbd://h%6Fst/%78", "nbds://Host/x?a=b"].as_slice(),
            ),
            ("nbd://[fe80::1%25eth0]:9/x", &["nbd://[fe80:0:0::1%25eth0]:9/x", "nbd://[FE80::1%eth0]:9/x"]),
            (
                "nbd+unix:///e?socket=/run/s",
                &["nbds+unix:///%65?x&socket=//run/./s", "nbd+unix:///e?socket=%2frun/s"],
            ),
            ("nbd://h:10809/%C3%A4%25%3F", &["nbd://h/ä%%3f", "nbd://h/%c3%A4%25%3f"]),
        ];
        for (one, others) in same {
            assert!(others.iter().all(|other| text(other) == one), "{one}");
        }
        let different = [
            "nbd://h/x",
            "nbd://h/X",
            "nbd://h/x/",
            "nbd://h:1/x",
            "nbd://h./x",
            "nbd+unix:///x?socket=/h",
            "nbd+unix:///x?socket=/a/../h",
        ];
        let texts: std::collections::BTreeSet<_> = different.iter().map(|uri| text(uri)).collect();
        assert_eq!(texts.len(), different.len(), "{texts:?}");
    }

    proptest! {
        #[test]
        fn its_text_is_a_uri_of_the_same(
            name in proptest::collection::vec(1u8.., 0..40),
            host in "[a-z0-9.:;%&?=/@#\\[\\]é-]{1,9}",
            path in "/[a-z/.%&;=?#é ]{0,20}",
            port in 1u16..,
            unix: bool,
        ) {
            let address = match unix {
                true => Address::Unix(PathBuf::from(path).components().collect()),
                // What looks like a number of IPv6 is written as one.
                false => Address::Tcp { host: host.replace(':', "."), port },
            };
            let uri = Uri { address, name, tls: false };
            prop_assert_eq!(Uri::parse(&uri.to_string()), Ok(uri));
        }

        /// Whatever a name is: encoded, it comes back.
        #[test]
        fn a_name_comes_back(name in proptest::collection::vec(1u8.., 0..40), all: bool) {
            let plain = |byte: u8| !all && (byte.is_ascii_alphanumeric() || b"/.-_~!$&'()*+,;=:@\\".contains(&byte));
            let path: String = name.iter().map(|byte| match plain(*byte) {
                true => char::from(*byte).to_string(),
                false => format!("%{byte:02x}"),
            }).collect();
            for uri in [format!("nbd://h:1/{path}"), format!("nbds+unix:///{path}?socket=/s")] {
                prop_assert_eq!(&Uri::parse(&uri).unwrap().name, &name);
            }
        }

        #[test]
        fn nothing_panics(text in "(nbd|nbds\\+unix)://[\\[\\]%:@/?#&;=a-f0-9é\0]*") {
            let _ = Uri::parse(&text);
        }
    }
}
