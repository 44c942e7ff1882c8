//! The volumes of a service that begins: all are tried at once, and some may be late.

#![forbid(unsafe_code)]

use super::late::{self, Attempts, Waiting};
use crate::block::Causes;
use crate::engine::limits::Limits;
use crate::engine::{OpenError, Opener, Volume};
use crate::service::config::Config;
use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

/// How long the first attempt to reach a server may take where others wait for it.
const FIRST_LOOK: Duration = Duration::from_secs(3);

/// What became of the volumes when they were first tried.
pub(super) struct Opened {
    pub volumes: BTreeMap<String, Volume>,
    pub waiting: BTreeMap<String, Waiting>,
    pub attempts: Vec<Attempts>,
}

impl Opened {
    /// Opens every volume.
    pub fn of(config: &Config) -> Result<Opened, OpenError> {
        let mut opened = Opened { volumes: BTreeMap::new(), waiting: BTreeMap::new(), attempts: Vec::new() };
        let mut openers = Vec::new();
        let limits = Limits::of(&config.limits);
        for (name, _) in config.roots() {
            let (policy, topology) = (config.policies[name], config.topologies[name]);
            let opener = Opener::new(name, &config.volumes, policy, topology)?;
            openers.push(opener.with_limits(limits[name].clone()));
        }
        let mut failed = Vec::new();
        let results = open_all(&openers);
        for (((name, volume), opener), result) in config.roots().zip(openers).zip(results) {
            match result {
                Ok(volume) => {
                    opened.volumes.insert(name.clone(), volume);
                }
                Err(error) if opener.may_wait(&error, true) => failed.push((name, volume, opener, error)),
                Err(error) => return Err(error),
            }
        }
        for (name, volume, opener, mut error) in failed {
            if !opener.may_wait(&error, !opened.volumes.is_empty()) {
                // It is all that there is, so there is time.
                match opener.open(Duration::MAX) {
                    Ok(volume) => {
                        opened.volumes.insert(name.clone(), volume);
                        continue;
                    }
                    Err(again) => error = again,
                }
                return Err(error);
            }
            let (waiting, attempts) = late::waiting(name, volume, opener, Causes(&error).to_string());
            opened.waiting.insert(name.clone(), waiting);
            opened.attempts.push(attempts);
        }
        Ok(opened)
    }
}

/// Opens all at once, and none for long where that can be made up for: nobody is kept waiting by somebody else's server.
fn open_all(openers: &[Opener]) -> Vec<Result<Volume, OpenError>> {
    let several = openers.len() > 1;
    let open = |opener: &Opener| {
        let hasty = several && opener.may_be_late();
        opener.open(if hasty { FIRST_LOOK } else { Duration::MAX })
    };
    let open = &open;
    thread::scope(|scope| {
        let begin = |opener| {
            let begun = thread::Builder::new().spawn_scoped(scope, move || open(opener));
            // Without a thread, here and now.
            begun.map_err(|_| Box::new(open(opener)))
        };
        let begun: Vec<_> = openers.iter().map(begin).collect();
        let end = |begun: Result<ScopedJoinHandle<'_, _>, Box<_>>| match begun {
            Ok(thread) => thread.join().unwrap_or_else(|panic| resume_unwind(panic)),
            Err(opened) => *opened,
        };
        begun.into_iter().map(end).collect()
    })
}
