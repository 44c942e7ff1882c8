//! What a soak found, counted, and the bar it must pass.

use super::log::Fault;
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Told in full; the rest is only counted.
const TOLD: usize = 12;

/// What must not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wrong {
    /// An acknowledged write is not there, or something else is.
    Loss,
    /// A request completed that was not in flight, or was not carried out.
    Duplicate,
    /// A request or the service did not come back.
    Hang,
    /// A request failed that had no reason to.
    Error,
}

/// What befell the service, or the one who uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// SIGKILL of ringblk.
    Kill,
    /// SIGTERM of ringblk, or a stop by command.
    Stop,
    /// The VMM went away, and another came.
    Vmm,
    /// The volume grew.
    Resize,
    /// The store refused.
    Store,
    /// The store lost what it had acknowledged, and every queue was told.
    Loss,
}

/// What was done so far, or with one VMM.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub kills: u64,
    pub stops: u64,
    pub vmm_kills: u64,
    pub recoveries: u64,
    pub requests: u64,
}

/// Counters and times, from any thread.
#[derive(Default)]
pub struct Report {
    requests: AtomicU64,
    rescans: AtomicU64,
    refused: AtomicU64,
    caught: AtomicU64,
    failed: AtomicU64,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    events: BTreeMap<Event, u64>,
    wrong: BTreeMap<Wrong, u64>,
    told: Vec<String>,
    kills: Vec<Duration>,
    stops: Vec<Duration>,
    gap: Duration,
    profiles: BTreeMap<&'static str, Tally>,
}

impl Report {
    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// Requests completed.
    pub fn completed(&self, count: u64) {
        self.requests.fetch_add(count, Ordering::Relaxed);
    }

    /// So far.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// The whole volume was read and was right.
    pub fn rescanned(&self) {
        self.rescans.fetch_add(1, Ordering::Relaxed);
    }

    /// A service was started in vain: its predecessor still held what it needs.
    pub fn refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// A request failed that may.
    pub fn fails(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    /// How many did.
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// A kill left so many requests unanswered.
    pub fn caught(&self, count: u64) {
        self.caught.fetch_add(count, Ordering::Relaxed);
    }

    /// Something was done to it.
    pub fn event(&self, event: Event) {
        *self.inner().events.entry(event).or_default() += 1;
    }

    /// How often.
    pub fn events(&self, event: Event) -> u64 {
        self.inner().events.get(&event).copied().unwrap_or(0)
    }

    /// It serves again, that long after the event.
    pub fn pause(&self, event: Event, pause: Duration) {
        let mut inner = self.inner();
        match event {
            Event::Stop => inner.stops.push(pause),
            Event::Kill => inner.kills.push(pause),
            // Ends when others see to it.
            _ => {}
        }
    }

    /// Nothing completed for so long.
    pub fn gap(&self, gap: Duration) {
        let mut inner = self.inner();
        inner.gap = inner.gap.max(gap);
    }

    /// How often it served again the same guest.
    pub fn recoveries(&self) -> usize {
        let inner = self.inner();
        inner.kills.len() + inner.stops.len()
    }

    /// All so far.
    pub fn tally(&self) -> Tally {
        Tally {
            kills: self.events(Event::Kill),
            stops: self.events(Event::Stop),
            vmm_kills: self.events(Event::Vmm),
            recoveries: self.recoveries() as u64,
            requests: self.requests(),
        }
    }

    /// What was done since `before` was with this VMM.
    pub fn belongs_to(&self, profile: &'static str, before: Tally) {
        let now = self.tally();
        let mut inner = self.inner();
        let tally = inner.profiles.entry(profile).or_default();
        tally.kills += now.kills - before.kills;
        tally.stops += now.stops - before.stops;
        tally.vmm_kills += now.vmm_kills - before.vmm_kills;
        tally.recoveries += now.recoveries - before.recoveries;
        tally.requests += now.requests - before.requests;
    }

    /// What was done with this VMM.
    pub fn tally_of(&self, profile: &str) -> Tally {
        self.inner().profiles.get(profile).copied().unwrap_or_default()
    }

    /// Something is wrong.
    pub fn wrong(&self, wrong: Wrong, text: impl Into<String>) {
        let mut inner = self.inner();
        *inner.wrong.entry(wrong).or_default() += 1;
        if inner.told.len() < TOLD {
            let text = format!("{wrong:?}: {}", text.into());
            eprintln!("soak: {text}");
            inner.told.push(text);
        }
    }

    /// Reads that found what they must not.
    pub fn faults(&self, faults: Vec<Fault>) {
        for fault in faults {
            self.wrong(Wrong::Loss, fault.text);
        }
    }

    /// How often.
    pub fn count(&self, wrong: Wrong) -> u64 {
        self.inner().wrong.get(&wrong).copied().unwrap_or(0)
    }

    /// Nothing is wrong.
    pub fn passed(&self) -> bool {
        self.inner().wrong.is_empty()
    }

    /// For scripts.
    pub fn json(&self) -> serde_json::Value {
        let inner = self.inner();
        let event = |event| inner.events.get(&event).copied().unwrap_or(0);
        let wrong = |wrong| inner.wrong.get(&wrong).copied().unwrap_or(0);
        let tally = |tally: &Tally| {
            json!({
                "kills": tally.kills, "stops": tally.stops, "vmm_kills": tally.vmm_kills,
                "recoveries": tally.recoveries, "requests": tally.requests,
            })
        };
        let profiles: BTreeMap<_, _> = inner.profiles.iter().map(|(name, of)| (*name, tally(of))).collect();
        json!({
            "kills": event(Event::Kill), "stops": event(Event::Stop), "vmm_kills": event(Event::Vmm),
            "resizes": event(Event::Resize), "store_errors": event(Event::Store),
            "store_losses": event(Event::Loss),
            "requests": self.requests(), "caught": self.caught.load(Ordering::Relaxed),
            "recoveries": inner.kills.len() + inner.stops.len(),
            "rescans": self.rescans.load(Ordering::Relaxed), "refused_starts": self.refused.load(Ordering::Relaxed),
            "pause_ms": pauses(&inner.kills), "stop_pause_ms": pauses(&inner.stops),
            "losses": wrong(Wrong::Loss), "duplicates": wrong(Wrong::Duplicate),
            "hangs": wrong(Wrong::Hang), "errors": wrong(Wrong::Error), "longest_gap_ms": tenths(inner.gap), "told": inner.told,
            "profiles": profiles,
        })
    }

    /// For people: a line of counts, and one for each kind of pause.
    pub fn print(&self, name: &str) {
        let json = self.json();
        let counts = [
            "kills",
            "stops",
            "vmm_kills",
            "resizes",
            "store_errors",
            "store_losses",
            "requests",
            "caught",
            "recoveries",
            "rescans",
            "refused_starts",
            "losses",
            "duplicates",
            "hangs",
            "errors",
        ];
        let counts: Vec<String> = counts.iter().map(|key| format!("{key} {}", json[key])).collect();
        println!("{name}: {}", counts.join(", "));
        for (profile, tally) in json["profiles"].as_object().into_iter().flatten() {
            let counts = ["kills", "stops", "vmm_kills", "recoveries", "requests"];
            let counts: Vec<String> = counts.iter().map(|key| format!("{key} {}", tally[key])).collect();
            println!("{name}: {profile}: {}", counts.join(", "));
        }
        if json["longest_gap_ms"] != 0.0 {
            println!("{name}: longest time without a completion, ms: {}", json["longest_gap_ms"]);
        }
        for (key, what) in
            [("pause_ms", "pause after a kill"), ("stop_pause_ms", "pause of a planned restart")]
        {
            if let Some(pauses) = json[key].as_object() {
                let list: Vec<String> = pauses.iter().map(|(key, value)| format!("{key} {value}")).collect();
                println!("{name}: {what}, ms: {}", list.join(", "));
            }
        }
    }
}

/// Median, 99th percentile and maximum in milliseconds, to a tenth. Null where there is none.
fn pauses(all: &[Duration]) -> serde_json::Value {
    let mut sorted = all.to_vec();
    sorted.sort();
    let Some(last) = sorted.len().checked_sub(1) else { return serde_json::Value::Null };
    let at = |share: f64| tenths(sorted[(last as f64 * share).ceil() as usize]);
    json!({ "count": sorted.len(), "median": at(0.5), "p99": at(0.99), "max": at(1.0) })
}

/// Milliseconds, to a tenth.
fn tenths(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e4).round() / 10.0
}
