//! An error and what caused it, in one line.

#![forbid(unsafe_code)]

use std::error::Error;
use std::fmt;

/// Shows an error and its causes, separated by colons, each said once: one that the message before it repeats already is
/// left out.
#[derive(Clone, Copy, Debug)]
pub struct Causes<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Causes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = self.0.to_string();
        f.write_str(&said)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            let text = error.to_string();
            if !said.ends_with(&text) {
                write!(f, ": {text}")?;
                said = text;
            }
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Told {
        #[error("whole: {0}")]
        Twice(#[source] Box<Told>),
        #[error("outer")]
        Once(#[source] Box<Told>),
        #[error(transparent)]
        Through(#[from] std::io::Error),
    }

    #[test]
    fn a_cause_is_said_once() {
        let cause = || Box::new(Told::Through(std::io::Error::from_raw_os_error(2)));
        let text = "No such file or directory (os error 2)";
        assert_eq!(Causes(&*cause()).to_string(), text);
        assert_eq!(Causes(&Told::Once(cause())).to_string(), format!("outer: {text}"));
        assert_eq!(Causes(&Told::Twice(cause())).to_string(), format!("whole: {text}"));
        let nested = Told::Once(Box::new(Told::Twice(cause())));
        assert_eq!(Causes(&nested).to_string(), format!("outer: whole: {text}"));
    }
}
