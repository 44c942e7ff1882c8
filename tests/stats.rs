//! What a service counts, against what was done to it: through the control socket, as its users see it.

mod common;

use common::eventually;
use common::model::{Op, Queue};
use common::service::{Service, Setup};
use common::vmm::everyday;
use ringblk::service::client::Client;
use ringblk::service::stats::ExportStats;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

const OK: u8 = 0;
const IOERR: u8 = 1;

/// What was counted of the export on this socket.
fn counted(service: &Service, socket: &str) -> ExportStats {
    let name = format!("vhost-user:{}", service.path(socket).display());
    let exports = Client::new(service.control()).stats().unwrap().exports;
    exports.into_iter().find(|export| export.name == name).unwrap()
}

fn operation(stats: &ExportStats, op: &str) -> (u64, u64, u64) {
    let stats = &stats.operations[op];
    (stats.requests, stats.bytes, stats.errors)
}

/// The metrics, as a scraper asks for them.
fn metrics(service: &Service, accept: &str) -> String {
    let mut stream = UnixStream::connect(service.control()).unwrap();
    let request =
        format!("GET /metrics HTTP/1.1\r\nhost: x\r\naccept: {accept}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    answer
}

#[test]
fn what_was_done_is_counted_and_nothing_else() {
    let setup = Setup::new()
        .volume("good", "memory:8M")
        .volume("bad", "fault:good,errors=100%,operations=write,from=1M")
        .volume("other", "memory:1M")
        .vhost_user("bad", "a", "queues=2")
        .vhost_user("other", "b", "");
    let service = setup.start().may_complain();
    for round in 1..=2 {
        // A VMM that comes again goes on counting.
        let (_vmm, mut queue) = everyday(&service.path("a"));
        for at in 0..10 {
            assert_eq!(queue.read(at * 8, 8).0, OK);
        }
        for at in 0..5 {
            assert_eq!(queue.write(at * 8, &[1; 8192]), OK);
        }
        assert_eq!(queue.write(4096, &[1; 512]), IOERR);
        assert_eq!(queue.one(Op::Flush, &[]).0, OK);
        // What the service refuses is a request as well; what is no request is none.
        assert_eq!(queue.read(8 << 11, 1).0, IOERR);
        assert_eq!(queue.send(99, 0, &[0; 512], true).0, 2);
        let stats = counted(&service, "a");
        assert_eq!(operation(&stats, "read"), (11 * round, 10 * 4096 * round, round));
        assert_eq!(operation(&stats, "write"), (6 * round, 5 * 8192 * round, round));
        assert_eq!(operation(&stats, "flush"), (round, 0, 0));
        assert_eq!((operation(&stats, "discard").0, stats.in_flight), (0, 0));
        assert_eq!(stats.errors, [("EIO".to_owned(), 2 * round)].into());
    }
    assert!(counted(&service, "b").operations.values().all(|stats| stats.requests == 0));

    let text = metrics(&service, "*/*");
    assert!(text.contains("content-type: text/plain; version=0.0.4"), "{text}");
    let socket = service.path("a").display().to_string();
    for (name, more, value) in [
        ("ringblk_export_bytes_total", ",operation=\"read\"", "81920"),
        ("ringblk_export_failed_requests_total", ",operation=\"write\"", "2"),
        ("ringblk_export_errors_total", ",errno=\"EIO\"", "4"),
        ("ringblk_export_request_duration_seconds_count", ",operation=\"read\"", "22"),
        ("ringblk_export_request_duration_seconds_bucket", ",operation=\"read\",le=\"+Inf\"", "22"),
    ] {
        let line =
            format!("{name}{{volume=\"bad\",frontend=\"vhost-user\",export=\"{socket}\"{more}}} {value}\n");
        assert!(text.contains(&line), "{line}{text}");
    }
    let open = metrics(&service, "application/openmetrics-text; version=1.0.0");
    assert!(
        open.contains("content-type: application/openmetrics-text") && open.contains("# EOF\n"),
        "{open}"
    );
}

/// A time is what the client saw, or less: a machine may be as slow as it likes.
#[test]
fn times_are_those_that_a_client_sees() {
    const DELAY: Duration = Duration::from_millis(40);
    let setup = Setup::new()
        .volume("fast", "memory:8M")
        .volume("slow", "fault:fast,delays=100%,delay=40,operations=read")
        .vhost_user("slow", "a", "");
    let service = setup.start().may_complain();
    let (_vmm, mut queue) = everyday(&service.path("a"));
    let mut longest = Duration::ZERO;
    for _ in 0..5 {
        let begun = Instant::now();
        assert_eq!(queue.read(0, 8).0, OK);
        longest = longest.max(begun.elapsed());
    }
    let stats = counted(&service, "a");
    let [half, most] =
        [stats.operations["read"].p50_ns, stats.operations["read"].p999_ns].map(|time| time.unwrap());
    let delay = DELAY.as_nanos() as u64;
    assert!(half > delay && most >= half, "{half} {most}");
    assert!(most as f64 <= longest.as_nanos() as f64 * 1.26, "{most} {longest:?}");
    // All of them together, exactly.
    let total = stats.operations["read"].times.nanoseconds();
    assert!(total >= 5 * delay && total <= 5 * longest.as_nanos() as u64, "{total}");

    // What is under way is seen before it is done.
    for slot in 0..3 {
        queue.submit(slot, Op::Read { sector: 0, sectors: 8 });
    }
    queue.kick();
    let seen = Instant::now();
    eventually("three requests are under way, or done", || {
        let stats = counted(&service, "a");
        stats.in_flight == 3 || operation(&stats, "read").0 == 8 && seen.elapsed() > DELAY
    });
    eventually("all are done", || counted(&service, "a").in_flight == 0);
    assert_eq!(operation(&counted(&service, "a"), "read").0, 8);
}

#[test]
fn a_worker_that_sleeps_says_so() {
    let service =
        Setup::new().volume("a", "memory:1M").vhost_user("a", "a", "").args(["--workers", "2"]).start();
    let workers = || Client::new(service.control()).stats().unwrap();
    let before = workers();
    assert_eq!(before.workers.len(), 2);
    // A sleep is counted at its end.
    let (_vmm, mut queue) = everyday(&service.path("a"));
    for _ in 0..100 {
        assert_eq!(queue.read(0, 8).0, OK);
    }
    let after = workers();
    let sum = |of: fn(&ringblk::service::stats::WorkerTime) -> u64| {
        after.workers.iter().map(of).sum::<u64>() - before.workers.iter().map(of).sum::<u64>()
    };
    assert!(sum(|worker| worker.busy_ns) > 0 && sum(|worker| worker.asleep_ns) > 0, "{before:?} {after:?}");
    for worker in &after.workers {
        assert!(worker.busy_ns + worker.polling_ns + worker.asleep_ns <= after.uptime_ns, "{after:?}");
    }
}

#[test]
fn people_and_scripts_are_shown_it() {
    let service = Setup::new().volume("vm1", "memory:8M").vhost_user("vm1", "a", "").start();
    let (_vmm, mut queue) = everyday(&service.path("a"));
    assert_eq!(queue.read(0, 8).0, OK);
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringblk"));
        let output = command.args(arguments).arg("--control").arg(service.control()).output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (code, text, _) = run(&["stats", "vm1"]);
    assert!(code == Some(0) && text.contains("read") && text.contains("4K"), "{text}");
    let (code, text, _) = run(&["stats", "--json"]);
    let told: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, &told["exports"][0]["operations"]["read"]["requests"]), (Some(0), &1.into()));
    let (code, _, error) = run(&["stats", "vm2"]);
    assert!(code == Some(1) && error.contains("volume \"vm2\" has no export"), "{error}");

    let (code, text, _) = run(&["top", "--batch", "--count", "2", "--interval", "0.1"]);
    assert_eq!((code, text.matches("workers busy").count()), (Some(0), 2), "{text}");
    let (code, text, _) =
        run(&["top", "--json", "--count", "1", "--interval", "0.1", "nothing-of-that-name"]);
    let look: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, look["exports"].as_array().unwrap().len()), (Some(0), 0));
}
