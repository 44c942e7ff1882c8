//! The configuration's parsers, file and flags.

use super::Input;
use crate::service::config::Loader;
use std::path::Path;

/// Any bytes: a choice, then text. What is accepted can be printed, and is one thing each time.
pub fn config(bytes: &[u8]) {
    let mut input = Input(bytes);
    let choice = input.u8();
    let Ok(text) = std::str::from_utf8(input.0) else { return };
    let load = || {
        let mut loader = Loader::new();
        // A flag a line, or a file, or a file whose rest is flags.
        let (file, flags) = match choice & 3 {
            0 => (text, ""),
            1 => ("", text),
            _ => text.split_once("\n--\n").unwrap_or((text, "")),
        };
        loader.add_text(Path::new("/etc/fuzz.toml"), file)?;
        for flag in flags.lines() {
            match flag.split_once(' ') {
                Some(("volume", flag)) => loader.add_volume_flag(flag)?,
                Some(("ublk", flag)) => loader.add_ublk_flag(flag)?,
                Some(("vhost-user", flag)) => loader.add_vhost_user_flag(flag)?,
                Some(("control", path)) => loader.set_control(path.into()),
                Some(("workers", count)) => loader.set_workers(count.len()),
                _ => {}
            }
        }
        loader.finish()
    };
    let loaded = load();
    assert_eq!(load(), loaded);
    match loaded {
        Ok(config) => assert!(config.to_string().lines().count() >= 3),
        Err(error) => {
            let told = error.to_string();
            assert!(
                !told.chars().any(|c| c == '\u{1b}'),
                "an escape sequence reaches the terminal: {told:?}"
            );
        }
    }
}
