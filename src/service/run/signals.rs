//! Signals that ask a service to end, and the one that asks nothing of it.

use std::io;
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Signals within this time are one: `timeout` sends its own twice (to the process and to its group), as a terminal and
/// a supervisor do together.
const MOMENT: Duration = Duration::from_secs(1);

/// What ends a service from outside.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    echo: Echo,
}

impl Signals {
    /// From here on they ask, and end nothing by themselves.
    pub fn new() -> io::Result<Signals> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            echo: Echo::default(),
        })
    }

    /// The next request to stop: SIGTERM or SIGINT, unless there was one just before it. SIGHUP is no such request: the
    /// terminal is gone, or somebody thinks that there is something to reload.
    pub async fn next(&mut self) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => {}
                _ = self.interrupt.recv() => {}
                _ = self.hangup.recv() => {
                    log::info!("SIGHUP is ignored: another configuration takes a restart");
                    continue;
                }
            }
            if self.echo.is_new(Instant::now()) {
                return;
            }
        }
    }
}

/// Tells requests from their repetitions.
#[derive(Default)]
struct Echo {
    last: Option<Instant>,
}

impl Echo {
    fn is_new(&mut self, now: Instant) -> bool {
        let echo = self.last.is_some_and(|last| now.saturating_duration_since(last) < MOMENT);
        if !echo {
            self.last = Some(now);
        }
        !echo
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_within_a_moment_are_one() {
        let (mut echo, start) = (Echo::default(), Instant::now());
        assert!(echo.is_new(start));
        // Nor does a third that follows the second.
        for millis in [0, 1, 600, 999] {
            assert!(!echo.is_new(start + Duration::from_millis(millis)), "{millis}");
        }
        assert!(echo.is_new(start + MOMENT));
        assert!(!echo.is_new(start + MOMENT));
    }
}
