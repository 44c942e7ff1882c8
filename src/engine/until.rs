//! Waits for what others of this process are at.

#![forbid(unsafe_code)]

use crate::block::Errno;
use crate::ring::{Io, Ring};
use std::time::Duration;

/// The first wait for another request; each is twice as long as the one before it.
const FIRST_LOOK: Duration = Duration::from_micros(20);

/// The longest wait between two looks.
const LONGEST_LOOK: Duration = Duration::from_millis(1);

/// The wait between two looks of one that is interrupted, and how long it waits all the same: what another request takes
/// with a store that is busy and not gone.
const LAST_LOOKS: Duration = Duration::from_millis(10);
const PATIENCE: Duration = Duration::from_secs(10);

/// Waits until `ready` gives something: until another request, of any worker, is done with it.
///
/// # Errors
/// `ERESTART` when the slot is interrupted, and [`PATIENCE`] is over.
pub async fn until<T, R: Ring>(io: &Io<R>, mut ready: impl FnMut() -> Option<T>) -> Result<T, Errno> {
    let (mut look, mut interrupted) = (FIRST_LOOK, Duration::ZERO);
    loop {
        if let Some(ready) = ready() {
            return Ok(ready);
        }
        if !io.is_interrupted() {
            io.rest_for(look).await;
            look = (look * 2).min(LONGEST_LOOK);
        } else if interrupted < PATIENCE {
            io.sleep(LAST_LOOKS).await;
            interrupted += LAST_LOOKS;
        } else {
            return Err(Errno::ERESTART);
        }
    }
}
