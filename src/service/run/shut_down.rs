//! How the exports of a service end: all at once, and none that somebody uses without being asked to.

use super::{STOP_LEAST, STOP_LIMIT, Shared, lock};
use crate::service::exports::{Export, ShutdownMode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

/// What the exports' ends came to.
pub(super) struct Left {
    /// Those that did not end as they should, and why.
    pub abandoned: Vec<String>,
    /// A disk stays for the next service, although all were to go.
    pub kept: bool,
}

impl Left {
    /// And what others came to.
    pub fn add(&mut self, others: Left) {
        self.abandoned.extend(others.abandoned);
        self.kept |= others.kept;
    }
}

/// The most that end at the same time: each has a thread for as long as it takes, and most of that is waiting.
const AT_ONCE: usize = 64;

impl Shared {
    /// Ends every export. They do not wait for each other: what one waits for is its store, or the kernel.
    pub(super) fn leave_all(&self, how: ShutdownMode) -> Left {
        let deadline = Instant::now() + STOP_LIMIT;
        let (abandoned, kept) = (Mutex::new(Vec::new()), AtomicBool::new(false));
        let keep = lock(&self.keep).clone();
        let work = || {
            // Taken out in a statement of its own, so that the list is not locked while we wait.
            let next = || lock(&self.exports).pop();
            while let Some(mut export) = next() {
                let (name, least) = (export.status().name(), Instant::now() + STOP_LEAST);
                lock(&self.leaving).push(name.clone());
                let how = match how {
                    ShutdownMode::Stop if keep.contains(export.status().volume()) => ShutdownMode::Keep,
                    how => how,
                };
                if let Err(error) = export.leave(how, deadline.max(least)) {
                    lock(&abandoned).push(format!("{name}: {error}"));
                }
                kept.fetch_or(export.stays(), Ordering::Relaxed);
                lock(&self.leaving).retain(|leaving| *leaving != name);
            }
        };
        let threads = lock(&self.exports).len().min(AT_ONCE);
        thread::scope(|scope| {
            for _ in 1..threads {
                let named = thread::Builder::new().name("ringblk-leave".into());
                if let Err(error) = named.spawn_scoped(scope, work) {
                    // The others do its part.
                    log::debug!("a thread less for the exports' ends: {error}");
                }
            }
            work();
        });
        let abandoned = std::mem::take(&mut *lock(&abandoned));
        Left { abandoned, kept: kept.into_inner() }
    }

    /// Why the service cannot stop without harm: disks that are in use and cannot stay, each with who uses it.
    pub(super) fn in_use(&self) -> Option<String> {
        let reasons = lock(&self.exports).iter().filter_map(Export::cannot_be_left).collect::<Vec<_>>();
        (!reasons.is_empty()).then(|| reasons.join("; "))
    }
}
