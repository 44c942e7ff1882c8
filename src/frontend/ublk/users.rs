//! Who uses a disk: what would be hurt if it went.
//!
//! The kernel tells whether anybody has a ublk disk open only when it is asked to stop it (`UBLK_F_SAFE_STOP_DEV`, Linux
//! 7.0), and never who: see [`crate::users`].

#![forbid(unsafe_code)]

use crate::users::{self, Device, User};

fn device(id: u32) -> Device {
    Device::named(&format!("ublkb{id}"))
}

fn words(users: Vec<User>) -> Vec<String> {
    users.iter().map(User::to_string).collect()
}

/// Mounts, swaps and devices on the disk `/dev/ublkbN` and its partitions, each in a few words.
pub fn users(id: u32) -> Vec<String> {
    words(device(id).users())
}

/// Processes that have the disks `ids` open, those of each, as far as `/proc` lets us look: root all of them.
pub fn openers(ids: &[u32]) -> Vec<Vec<String>> {
    let devices: Vec<_> = ids.iter().copied().map(device).collect();
    users::openers(&devices).into_iter().map(words).collect()
}
