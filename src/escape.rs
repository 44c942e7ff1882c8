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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_stays_a_line() {
        assert_eq!(escaped("/srv/root.img"), "/srv/root.img");
        assert_eq!(escaped("a b\n\"%é"), "a%20b%0A%22%25%C3%A9");
    }
}
