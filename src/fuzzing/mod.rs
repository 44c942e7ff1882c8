//! What the fuzzers of `fuzz/` drive: each function takes any bytes and panics when a promise is broken.
//!
//! They are here and not in `fuzz/` so that they reach what is not public, and so that the seeds run as unit tests
//! with every `cargo test`.

#![forbid(unsafe_code)]

mod chain;
mod config;
mod protocol;
mod input;
mod session;

pub use crate::engine::nbd::fuzzing::nbd;
pub use chain::chain;
pub use config::config;
pub use input::Input;
pub use protocol::protocol;
pub use session::session;

#[cfg(test)]
mod tests {
    /// Runs every seed of a target, and so many beginnings of each.
    fn seeds(target: &str, run: fn(&[u8]), beginnings: usize) {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
        let mut count = 0;
        for entry in std::fs::read_dir(&dir).unwrap() {
            let bytes = std::fs::read(entry.unwrap().path()).unwrap();
            let step = bytes.len().div_ceil(beginnings).max(1);
            (0..=bytes.len()).step_by(step).for_each(|len| run(&bytes[..len]));
            run(&bytes);
            count += 1;
        }
        assert!(count > 0, "{} is empty", dir.display());
    }

    #[test]
    fn the_seeds_of_chain() {
        seeds("chain", super::chain, 50);
    }

    #[test]
    fn the_seeds_of_config() {
        seeds("config", super::config, 50);
    }

    #[test]
    fn the_seeds_of_protocol() {
        seeds("protocol", super::protocol, 50);
    }

    #[test]
    fn the_seeds_of_nbd() {
        seeds("nbd", super::nbd, 50);
    }

    #[test]
    fn the_seeds_of_session() {
        seeds("session", super::session, 8);
    }
}
