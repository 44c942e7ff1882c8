//! What the parsers complain of, in the words of those who write configurations and not of those who write parsers.

#![forbid(unsafe_code)]

/// Types, as serde names them at the end of a complaint.
const TYPES: [(&str, &str); 6] = [
    ("usize", "a whole number"),
    ("u64", "a whole number"),
    ("u32", "a whole number up to 4294967295"),
    ("u16", "a whole number up to 65535"),
    ("path string", "a path in quotes"),
    ("a string", "text in quotes"),
];

/// The same in plain words; what is plain already stays.
pub(super) fn plain(reason: &str) -> String {
    if let Some((before, key, "")) = quoted(reason, "missing field ") {
        return format!("{before}the key \"{key}\" is missing");
    }
    if let Some((before, key, rest)) = quoted(reason, "unknown field ") {
        return format!("{before}unknown key \"{key}\"{}", choices(rest));
    }
    if let Some((before, word, rest)) = quoted(reason, "unknown variant ") {
        return format!("{before}\"{word}\" is not known{}", choices(rest));
    }
    if reason.contains("unexpected leading zero") {
        return "a number does not begin with 0 (permissions are text: mode = \"0600\")".into();
    }
    let reason = reason.replacen("invalid type: ", "", 1).replacen("invalid value: ", "", 1);
    let known = TYPES.iter().find_map(|(name, words)| {
        let front = reason.strip_suffix(name)?.strip_suffix("expected ")?;
        Some(format!("{front}expected {words}"))
    });
    known.unwrap_or(reason)
}

/// What comes before `what`, what is in backquotes after it, and the rest.
fn quoted<'a>(reason: &'a str, what: &str) -> Option<(&'a str, &'a str, &'a str)> {
    let (before, after) = reason.split_once(&format!("{what}`"))?;
    let (word, rest) = after.split_once('`')?;
    Some((before, word, rest))
}

/// The words that would do, which serde lists in backquotes.
fn choices(rest: &str) -> String {
    let words: Vec<&str> = rest.split('`').skip(1).step_by(2).collect();
    if words.is_empty() { String::new() } else { format!(", there are: {}", words.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parsers_words_are_not_ours() {
        for (theirs, ours) in [
            ("missing field `path`", "the key \"path\" is missing"),
            (
                "unknown field `sped`, expected one of `path`, `direct`",
                "unknown key \"sped\", there are: path, direct",
            ),
            ("unknown field `x`, expected `size`", "unknown key \"x\", there are: size"),
            (
                "on-error: unknown variant `retri`, expected one of `report`, `stop`",
                "on-error: \"retri\" is not known, there are: report, stop",
            ),
            ("invalid type: string \"a\", expected usize", "string \"a\", expected a whole number"),
            (
                "depth: invalid value: integer `100000`, expected u16",
                "depth: integer `100000`, expected a whole number up to 65535",
            ),
            ("invalid type: integer `1`, expected path string", "integer `1`, expected a path in quotes"),
            ("must be from 1 to 4, not 0", "must be from 1 to 4, not 0"),
            ("", ""),
        ] {
            assert_eq!(plain(theirs), ours);
        }
        assert!(plain("unexpected leading zero, expected nothing").contains("mode = \"0600\""));
    }
}
