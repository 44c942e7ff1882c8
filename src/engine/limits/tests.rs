//! Queues that always have a request, in virtual time.

#![forbid(unsafe_code)]

use super::*;
use crate::block::Op;
use proptest::prelude::*;

const SECOND: u64 = 1_000_000_000;

fn config(json: &str) -> LimitsConfig {
    let config: LimitsConfig = serde_json::from_str(json).unwrap();
    config.check().unwrap();
    config
}

fn limits(json: &str) -> Arc<Limits> {
    Limits::of(&BTreeMap::from([("a".to_owned(), config(json))])).remove("a").unwrap()
}

fn group(numbers: &str, members: usize) -> Vec<Arc<Limits>> {
    let configs = (0..members).map(|at| {
        let numbers = if at == 0 { format!("{numbers}, ") } else { String::new() };
        (format!("v{at}"), config(&format!("{{{numbers}\"group\": \"g\"}}")))
    });
    Limits::of(&configs.collect()).into_values().collect()
}

/// A queue that has another request as soon as one has gone, and what has gone.
struct Client {
    throttle: Throttle,
    op: Op,
    bytes: u64,
    /// How late its worker looks again, in nanoseconds.
    late: u64,
    gone: u64,
}

impl Client {
    fn new(limits: &Arc<Limits>, op: Op, bytes: u64) -> Client {
        Client { throttle: limits.throttle(), op, bytes, late: 0, gone: 0 }
    }

    fn next(&self) -> u64 {
        self.throttle.waits_until().unwrap_or(0) + self.late
    }
}

/// Has all of them ask whenever they are to, from `from` on. What went of each.
fn run(clients: &mut [Client], from: u64, seconds: u64) -> Vec<u64> {
    let (mut now, end) = (from, from + seconds * SECOND);
    clients.iter_mut().for_each(|client| client.gone = 0);
    while now < end {
        for client in clients.iter_mut().filter(|client| client.next() <= now) {
            while client.throttle.admit(now, client.op, client.bytes) {
                client.gone += 1;
            }
        }
        now = now.max(clients.iter().map(Client::next).min().unwrap());
    }
    clients.iter().map(|client| client.gone).collect()
}

#[track_caller]
fn within(value: u64, percent: f64, of: f64) {
    let off = (value as f64 - of).abs();
    assert!(off <= of * percent / 100.0, "{value} is not within {percent} % of {of}");
}

/// What goes in ten seconds once the first moment is over, in which what has piled up goes at once.
fn steady(json: &str, op: Op, bytes: u64) -> u64 {
    let mut clients = [Client::new(&limits(json), op, bytes)];
    run(&mut clients, SECOND, 1);
    run(&mut clients, 2 * SECOND, 10)[0]
}

#[test]
fn every_knob_holds_what_it_is_for() {
    for (knob, read, write) in [
        ("iops-total", true, true),
        ("iops-read", true, false),
        ("iops-write", false, true),
        ("bps-total", true, true),
        ("bps-read", true, false),
        ("bps-write", false, true),
    ] {
        let (rate, json) = match knob.starts_with("iops") {
            true => (3000.0, format!("{{\"{knob}\": 3000}}")),
            false => (700.0, format!("{{\"{knob}\": 2867200}}")),
        };
        for (op, limited) in [(Op::Read, read), (Op::Write, write), (Op::WriteZeroes, write)] {
            if limited {
                within(steady(&json, op, 4096), 1.0, 10.0 * rate);
            } else {
                let throttle = limits(&json).throttle();
                assert!((0..1_000_000).all(|_| throttle.admit(SECOND, op, 4096)), "{knob} and {op}");
            }
        }
    }
}

#[test]
fn bursts_hold_their_rate_and_their_length() {
    for (knob, unit) in [
        ("iops-total", 1),
        ("iops-read", 1),
        ("iops-write", 1),
        ("bps-total", 4096),
        ("bps-read", 4096),
        ("bps-write", 4096),
    ] {
        let op = if knob.ends_with("write") { Op::Write } else { Op::Read };
        let (avg, max) = (100 * unit, 1000 * unit);
        let limits =
            limits(&format!("{{\"{knob}\": {avg}, \"{knob}-max\": {max}, \"{knob}-max-length\": 20}}"));
        let mut clients = [Client::new(&limits, op, 4096)];
        run(&mut clients, SECOND, 1);
        within(run(&mut clients, 2 * SECOND, 10)[0], 1.0, 10_000.0);
        // 20000 fit, and 100 a second leak: it is over after 22 seconds.
        run(&mut clients, 12 * SECOND, 13);
        within(run(&mut clients, 25 * SECOND, 10)[0], 1.0, 1000.0);
        // At rest for as long as it takes to leak, it may do the same again.
        run(&mut clients, 300 * SECOND, 1);
        within(run(&mut clients, 301 * SECOND, 10)[0], 1.0, 10_000.0);
    }
}

#[test]
fn a_burst_of_a_second_may_come_at_once() {
    let limits = limits(r#"{"iops-total": 100, "iops-total-max": 1000}"#);
    let throttle = limits.throttle();
    let at_once = (0..).take_while(|_| throttle.admit(SECOND, Op::Read, 512)).count();
    assert_eq!(at_once, 1001);
}

#[test]
fn large_requests_count_as_several_with_iops_size() {
    let json = r#"{"iops-total": 1000, "iops-size": "4K"}"#;
    within(steady(json, Op::Read, 512), 1.0, 10_000.0);
    within(steady(json, Op::Read, 4096), 1.0, 10_000.0);
    within(steady(json, Op::Write, 16384), 1.0, 2500.0);
    within(steady(json, Op::Write, 6144), 1.0, 6667.0);
}

#[test]
fn both_kinds_of_limits_hold_together() {
    let json = r#"{"iops-total": 1000, "bps-read": 1048576, "bps-write": 8388608}"#;
    within(steady(json, Op::Read, 4096), 1.0, 2560.0);
    within(steady(json, Op::Write, 4096), 1.0, 10_000.0);
}

#[test]
fn a_request_larger_than_everything_goes_and_is_waited_for() {
    let limits = limits(r#"{"bps-total": 1024}"#);
    let throttle = limits.throttle();
    assert!(throttle.admit(SECOND, Op::Write, 1 << 20));
    let mut now = SECOND;
    while !throttle.admit(now, Op::Read, 512) {
        now = throttle.waits_until().unwrap();
    }
    let waited = (now - SECOND) as f64 / SECOND as f64;
    assert!((1023.5..=1024.5).contains(&waited), "{waited}");
    assert!((1023..=1025).contains(&limits.throttled().as_secs()));
}

#[test]
fn flushes_pass_and_a_discard_is_an_operation_without_bytes() {
    let limits = limits(r#"{"iops-total": 10, "bps-total": 1024}"#);
    let throttle = limits.throttle();
    while throttle.admit(SECOND, Op::Read, 512) {}
    assert!((0..1000).all(|_| throttle.admit(SECOND, Op::Flush, 0)));
    assert!(!throttle.admit(SECOND, Op::Read, 512));
    within(steady(r#"{"iops-write": 1000, "bps-write": 1}"#, Op::Discard, 1 << 40), 1.0, 10_000.0);
}

#[test]
fn queues_of_a_volume_share_its_limits() {
    let limits = limits(r#"{"iops-total": 2000}"#);
    let mut clients: Vec<_> = (0..4).map(|_| Client::new(&limits, Op::Read, 4096)).collect();
    run(&mut clients, SECOND, 1);
    let gone = run(&mut clients, 2 * SECOND, 10);
    within(gone.iter().sum(), 1.0, 20_000.0);
    gone.iter().for_each(|each| within(*each, 5.0, 5000.0));
}

#[test]
fn volumes_of_a_group_have_the_same_whatever_their_queues() {
    for (numbers, total) in [
        (r#""iops-total": 100"#, 1000.0),
        (r#""iops-total": 50000"#, 500_000.0),
        (r#""bps-read": 4096000"#, 10_000.0),
    ] {
        let members = group(numbers, 3);
        let queues =
            [&members[0], &members[1], &members[1], &members[1], &members[1], &members[2], &members[2]];
        let mut clients: Vec<_> = queues.iter().map(|of| Client::new(of, Op::Read, 4096)).collect();
        // Workers are not equally quick.
        clients.iter_mut().enumerate().for_each(|(at, client)| client.late = 37_000 * at as u64);
        run(&mut clients, SECOND, 1);
        let gone = run(&mut clients, 2 * SECOND, 10);
        within(gone.iter().sum(), 1.0, total);
        for of in [0..1, 1..5, 5..7] {
            within(gone[of].iter().sum(), 5.0, total / 3.0);
        }
    }
}

#[test]
fn what_a_member_leaves_the_others_have_and_it_does_not_save_it_up() {
    let members = group(r#""iops-total": 1000"#, 2);
    let mut busy = [Client::new(&members[0], Op::Read, 4096)];
    run(&mut busy, SECOND, 1);
    let _idle = members[1].throttle();
    within(run(&mut busy, 2 * SECOND, 10)[0], 1.0, 10_000.0);
    let mut both = [busy.into_iter().next().unwrap(), Client::new(&members[1], Op::Write, 4096)];
    let gone = run(&mut both, 12 * SECOND, 10);
    gone.iter().for_each(|each| within(*each, 5.0, 5000.0));
}

#[test]
fn a_turn_that_is_not_taken_is_anybodys() {
    let members = group(r#""iops-total": 1000"#, 2);
    let stuck = members[1].throttle();
    let mut busy = [Client::new(&members[0], Op::Read, 4096)];
    run(&mut busy, SECOND, 1);
    while stuck.admit(2 * SECOND, Op::Read, 4096) {}
    // It waits, and its worker never looks again.
    run(&mut busy, 2 * SECOND, 1);
    within(run(&mut busy, 3 * SECOND, 10)[0], 1.0, 10_000.0);
}

#[test]
fn readers_do_not_wait_for_writers_that_have_limits_of_their_own() {
    let members = group(r#""iops-read": 1000, "iops-write": 10"#, 2);
    let mut clients = [Client::new(&members[0], Op::Read, 512), Client::new(&members[1], Op::Write, 512)];
    run(&mut clients, SECOND, 1);
    let gone = run(&mut clients, 2 * SECOND, 10);
    within(gone[0], 1.0, 10_000.0);
    within(gone[1], 1.0, 100.0);
}

#[test]
fn limits_change_for_those_who_wait_too() {
    let members = group(r#""iops-total": 1"#, 2);
    let mut clients = [Client::new(&members[0], Op::Read, 512)];
    run(&mut clients, SECOND, 5);
    let change: LimitsChange = serde_json::from_str(r#"{"iops-total": 500}"#).unwrap();
    members[1].change(&change).unwrap();
    clients[0].throttle.look_again();
    assert_eq!(clients[0].throttle.waits_until(), Some(0));
    run(&mut clients, 6 * SECOND, 1);
    within(run(&mut clients, 7 * SECOND, 10)[0], 1.0, 5000.0);
    // Taken off: it goes on, and looks at a flag from then on.
    members[0].change(&serde_json::from_str(r#"{"iops-total": 0}"#).unwrap()).unwrap();
    assert!(clients[0].throttle.concerns(), "it waits still");
    assert!(clients[0].throttle.admit(18 * SECOND, Op::Read, 512));
    assert!(!clients[0].throttle.concerns());
    let refused: LimitsChange = serde_json::from_str(r#"{"iops-total-max": 5}"#).unwrap();
    assert_eq!(members[0].change(&refused).unwrap_err().0, "iops-total-max");
    assert!(!members[0].config().is_limited());
}

#[test]
fn a_queue_that_goes_is_not_waited_for() {
    let members = group(r#""iops-total": 10"#, 2);
    let (first, second) = (members[0].throttle(), members[1].throttle());
    while first.admit(SECOND, Op::Read, 512) {}
    assert!(!second.admit(SECOND, Op::Read, 512));
    drop(second);
    let until = first.waits_until().unwrap();
    assert!(first.admit(until, Op::Read, 512));
}

proptest! {
    /// Whatever the limits, the requests and the moments at which workers look: never more than was asked for, and no wait for
    /// nothing.
    #[test]
    fn never_more_than_allowed(
        rate in 1u64..1_000_000, burst in 1u64..20, length in 1u64..5,
        moments in proptest::collection::vec((0usize..3, 0u64..2_000_000_000, 1u64..2_000_000), 1..200),
    ) {
        let (max, long) = (rate * burst, if burst > 1 { length } else { 0 });
        let numbers = match long {
            0 => format!("\"bps-total\": {rate}, \"bps-total-max\": {max}"),
            _ => format!("\"bps-total\": {rate}, \"bps-total-max\": {max}, \"bps-total-max-length\": {long}"),
        };
        let members = group(&numbers, 3);
        let throttles: Vec<_> = members.iter().map(Limits::throttle).collect();
        let (mut now, start) = (SECOND, SECOND);
        let (mut gone, mut largest) = (0u64, 0u64);
        for (who, pause, bytes) in moments {
            now += pause;
            if throttles[who].admit(now, Op::Write, bytes) {
                gone += bytes;
                largest = largest.max(bytes);
            } else {
                let until = throttles[who].waits_until().unwrap();
                prop_assert!(until > now && until <= now + SECOND);
            }
            let seconds = (now - start) as f64 / SECOND as f64;
            let room = (max * long.max(1)) as f64;
            prop_assert!(gone as f64 <= seconds * rate as f64 + room + largest as f64 + 1.0);
        }
    }
}
