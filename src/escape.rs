//! Text of others in a line of ours.

#![forbid(unsafe_code)]

/// `text` with `%XX` for each byte that could end or confuse a line `KEY=value`: spaces, quotes, backslashes, dollars,
/// percent signs, and whatever is not printable ASCII. Different texts stay different.
pub fn escaped(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_graphic() && !b"\"'\\$%`".contains(&byte);
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        match plain(byte) {
            true => escaped.push(byte.into()),
            false => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

/// What was escaped; `None` where it is not as [`escaped`] leaves it.
pub fn unescaped(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let hex = |byte: Option<u8>| char::from(byte?).to_digit(16);
        bytes.push(match byte {
            b'%' => (hex(rest.next())? << 4 | hex(rest.next())?) as u8,
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_stays_a_line() {
        assert_eq!(escaped("/srv/root.img"), "/srv/root.img");
        assert_eq!(escaped("a b\n\"%é"), "a%20b%0A%22%25%C3%A9");
    }

    #[test]
    fn it_comes_back() {
        for text in ["", "/srv/root.img", "a b\n\"%é", "%41"] {
            assert_eq!(unescaped(&escaped(text)).as_deref(), Some(text));
        }
        for text in ["%", "%4", "%4g", "%é", "%ff"] {
            assert_eq!(unescaped(text), None, "{text}");
        }
    }
}
