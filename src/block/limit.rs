//! The limit of the process that an error comes from, which its number does not say.

#![forbid(unsafe_code)]

use super::Errno;
use rustix::process::{Resource, getrlimit};

/// In words, with the way out; `None` where no limit of ours is behind it.
pub fn limit_behind(errno: Errno) -> Option<String> {
    let told = |limit: Resource, what: &str, option: &str, setting: &str| {
        let current = getrlimit(limit).current?;
        Some(format!("the limit on {what} is {current}: ulimit {option}, {setting}= of a unit"))
    };
    match errno.raw() {
        libc::EMFILE => told(Resource::Nofile, "open files", "-n", "LimitNOFILE"),
        libc::EFBIG => told(Resource::Fsize, "the size of a file", "-f", "LimitFSIZE"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_limit_that_there_is() {
        let text = limit_behind(Errno::new(libc::EMFILE));
        assert_eq!(text.is_some(), getrlimit(Resource::Nofile).current.is_some());
        assert!(text.is_none_or(|text| text.contains("ulimit -n")));
        assert_eq!(limit_behind(Errno::EIO), None);
    }
}
