//! What the exports of a service did, and its workers: the answer to `GET /v1/stats`, shared by its two ends.

#![forbid(unsafe_code)]

use super::status::ExportStatus;
use crate::stats::{Counts, OPS, Times, WorkerStats};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The answer to `GET /v1/stats`. Numbers only grow, but for what is in flight; take two answers for a rate.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Nanoseconds since the service began.
    pub uptime_ns: u64,
    /// Every export that is served, in the order of the status.
    pub exports: Vec<ExportStats>,
    /// Every volume that is there.
    #[serde(default)]
    pub volumes: Vec<VolumeStats>,
    /// Every worker.
    pub workers: Vec<WorkerTime>,
}

/// What one export did since it was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportStats {
    /// As in the status: `ublk:root` or `vhost-user:/run/x.sock`.
    pub name: String,
    /// Name of the volume.
    pub volume: String,
    /// `ublk` or `vhost-user`.
    pub frontend: String,
    /// Requests under way.
    pub in_flight: u64,
    /// By operation: `read`, `write`, `flush`, `discard`, `write-zeroes`.
    pub operations: BTreeMap<String, OperationStats>,
    /// Requests that failed, by the error's name.
    pub errors: BTreeMap<String, u64>,
}

/// What one export did of one operation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationStats {
    /// Requests that ended.
    pub requests: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// Those that failed.
    pub errors: u64,
    /// How long half of them took at the most, and further shares, in nanoseconds; `None` where there were none.
    pub p50_ns: Option<u64>,
    /// See [`p50_ns`](Self::p50_ns).
    pub p99_ns: Option<u64>,
    /// See [`p50_ns`](Self::p50_ns).
    pub p999_ns: Option<u64>,
    /// How long they took.
    pub times: Times,
}

/// What became of one volume since the service began.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStats {
    /// Its name.
    pub name: String,
    /// How long its queues have waited for its limits, all together, in nanoseconds.
    pub throttled_ns: u64,
    /// How often its store told that acknowledged writes are lost.
    pub losses: u64,
    /// How often its size has changed.
    pub resizes: u64,
}

/// How a worker spent its time, in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerTime {
    /// At work.
    pub busy_ns: u64,
    /// Looking for work.
    pub polling_ns: u64,
    /// Asleep.
    pub asleep_ns: u64,
}

impl OperationStats {
    /// Of requests that took `times`.
    pub fn new(bytes: u64, errors: u64, times: Times) -> OperationStats {
        let [p50_ns, p99_ns, p999_ns] = [0.5, 0.99, 0.999].map(|share| times.quantile(share));
        OperationStats { requests: times.count(), bytes, errors, p50_ns, p99_ns, p999_ns, times }
    }

    /// What came after `before` was taken of the same.
    pub fn since(&self, before: &OperationStats) -> OperationStats {
        let [bytes, errors] = [(self.bytes, before.bytes), (self.errors, before.errors)]
            .map(|(now, old)| now.saturating_sub(old));
        OperationStats::new(bytes, errors, self.times.since(&before.times))
    }
}

impl ExportStats {
    /// Of an export whose counters were read.
    pub fn new(status: &ExportStatus, counts: Counts) -> ExportStats {
        let operations = OPS.iter().zip(counts.ops);
        let operations = operations.map(|(op, counts)| {
            (op.name().to_owned(), OperationStats::new(counts.bytes, counts.errors, counts.times))
        });
        let named = counts
            .errnos
            .iter()
            .map(|(errno, count)| (format!("{:?}", nix::errno::Errno::from_raw(errno.raw())), *count));
        let others = (counts.other_errnos > 0).then(|| ("other".to_owned(), counts.other_errnos));
        ExportStats {
            name: status.name(),
            volume: status.volume().into(),
            frontend: status.frontend().into(),
            in_flight: counts.in_flight,
            operations: operations.collect(),
            errors: named.chain(others).collect(),
        }
    }
}

impl From<&WorkerStats> for WorkerTime {
    fn from(stats: &WorkerStats) -> WorkerTime {
        WorkerTime {
            busy_ns: stats.busy.get(),
            polling_ns: stats.polling.get(),
            asleep_ns: stats.asleep.get(),
        }
    }
}
