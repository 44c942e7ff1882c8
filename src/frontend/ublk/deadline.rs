//! How long the control side waits for what comes about by itself.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// Between two looks.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// How long a server that was killed may take to be gone: as long as the store takes for its last requests.
pub(super) const EXIT_LIMIT: Duration = Duration::from_secs(60);

/// Says yes until `limit` from now.
pub(super) fn until(limit: Duration) -> impl FnMut() -> bool {
    let limit = Instant::now() + limit;
    move || Instant::now() < limit
}
