//! Limits of a volume's operations and bytes in a second (QoS), by QEMU's model and in its words.
//!
//! [`Limits`] is what a volume has: a set of [buckets](bucket), its own or shared with the other volumes of a group. Each queue
//! asks by its [`Throttle`] before a request of its is taken up; who is refused waits where it is, and is told when to ask again.
//! Nothing is locked on the way, and where no limits are set a queue looks at one flag.

#![forbid(unsafe_code)]

mod bucket;
mod config;
mod group;
#[cfg(test)]
mod tests;
mod throttle;
mod turns;

pub use config::{Knob, LimitsChange, LimitsConfig, Rate};
pub use throttle::Throttle;

use group::Group;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use turns::Member;

/// The limits of one volume, which it may share with others. None by default.
#[derive(Debug, Default)]
pub struct Limits {
    group: Arc<Group>,
    member: Arc<Member>,
}

impl Limits {
    /// What each of these volumes has: those of one group the same set. The numbers of a group are those of its first volume that
    /// says some; that no other says otherwise was checked.
    pub fn of(configs: &BTreeMap<String, LimitsConfig>) -> BTreeMap<String, Arc<Limits>> {
        let mut groups: BTreeMap<&str, Arc<Group>> = BTreeMap::new();
        let limits = configs.iter().map(|(name, config)| {
            let group = match &config.group {
                None => Arc::new(Group::new(config.clone())),
                Some(group) => {
                    let same = |of: &&LimitsConfig| of.group.as_ref() == Some(group) && of.has_numbers();
                    let numbers = configs.values().find(same).unwrap_or(config);
                    groups.entry(group).or_insert_with(|| Arc::new(Group::new(numbers.clone()))).clone()
                }
            };
            (name.clone(), Arc::new(Limits { group, member: Arc::default() }))
        });
        limits.collect()
    }

    /// The same set, for one more volume.
    pub fn beside(&self) -> Arc<Limits> {
        Arc::new(Limits { group: self.group.clone(), member: Arc::default() })
    }

    /// As they are now.
    pub fn config(&self) -> LimitsConfig {
        self.group.config()
    }

    /// The name of the group that shares them.
    pub fn group(&self) -> Option<&str> {
        self.group.name()
    }

    /// Changes what is named, for all that share them. Every worker that serves one of these has to be told, so that what waits
    /// there asks again.
    ///
    /// # Errors
    /// The key that is wrong then, and why; nothing is changed.
    pub fn change(&self, change: &LimitsChange) -> Result<LimitsConfig, (&'static str, String)> {
        self.group.change(change)
    }

    /// How long the volume's queues have waited so far, all together.
    pub fn throttled(&self) -> Duration {
        Duration::from_nanos(self.member.throttled.load(Ordering::Relaxed))
    }

    /// For one queue of the volume, on the worker that serves it.
    pub fn throttle(self: &Arc<Self>) -> Throttle {
        Throttle::new(self)
    }
}
