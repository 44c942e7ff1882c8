//! Limits of volumes, through the whole service: guests that are held to them, and everybody who is not to wait with them. Times
//! are only ever too long: a machine may be as slow as it likes.

mod common;

use common::eventually;
use common::model::{Op, Queue};
use common::queue::RawQueue;
use common::service::{Service, Setup};
use common::vmm::everyday;
use nix::sys::signal::Signal;
use ringblk::engine::limits::LimitsChange;
use ringblk::service::client::Client;
use std::process::Command;
use std::time::{Duration, Instant};
use vhost::VhostBackend;

const OK: u8 = 0;

fn change(numbers: &[(&str, u64)]) -> LimitsChange {
    let mut change = LimitsChange::default();
    numbers.iter().for_each(|(key, value)| assert!(change.set(key, *value)));
    change
}

/// Has a read on its way.
fn ask(queue: &mut RawQueue, slot: usize) {
    queue.submit(slot, Op::Read { sector: 0, sectors: 8 });
    queue.kick();
}

fn throttled_ms(service: &Service, volume: &str) -> u64 {
    let volumes = service.status().volumes;
    volumes.iter().find(|of| of.name == volume).unwrap().throttled_ms
}

#[test]
fn a_disk_is_held_to_its_limits() {
    let service = Setup::new().volume("a", "memory:8M,iops-total=100").vhost_user("a", "a", "").start();
    let client = Client::new(service.control());
    let (_vmm, mut queue) = everyday(&service.path("a"));
    let begun = Instant::now();
    // Eleven at once, then one in ten milliseconds.
    for _ in 0..111 {
        assert_eq!(queue.read(0, 8).0, OK);
    }
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(990), "{took:?}");
    assert!(throttled_ms(&service, "a") > 0);
    // A flush is none of it, and neither is anything once the limit is off.
    let limits = client.limit("a", &change(&[("iops-total", 0)])).unwrap().limits;
    assert!(limits.is_empty());
    let before = throttled_ms(&service, "a");
    for _ in 0..1000 {
        assert_eq!(queue.read(0, 8).0, OK);
    }
    assert_eq!(throttled_ms(&service, "a"), before);
}

#[test]
fn nobody_waits_with_it() {
    // A read of 4 KiB takes more than an hour.
    let mut service = Setup::new()
        .args(["--workers", "1"])
        .volume("a", "memory:8M,bps-total=1")
        .volume("b", "memory:8M")
        .vhost_user("a", "a", "")
        .vhost_user("b", "b", "")
        .start();
    let client = Client::new(service.control());
    let ((mut vmm, mut slow), (_other, mut fast)) =
        (everyday(&service.path("a")), everyday(&service.path("b")));
    assert_eq!(slow.read(0, 8).0, OK, "what is larger than all that is allowed passes, and is waited for");
    ask(&mut slow, 0);
    ask(&mut slow, 1);
    for _ in 0..200 {
        assert_eq!(fast.read(0, 8).0, OK);
    }
    eventually("the time that it waits is told", || throttled_ms(&service, "a") > 0);
    assert_eq!(throttled_ms(&service, "b"), 0);
    assert!(slow.ring.reap().is_empty());
    // A VMM stops the queue and goes on: what waits was never taken.
    assert_eq!(vmm.frontend.get_vring_base(0).unwrap(), 1);
    vmm.start(0, &slow.ring);
    slow.kick();
    assert_eq!(fast.read(0, 8).0, OK);
    assert!(slow.ring.reap().is_empty());
    client.limit("a", &change(&[("bps-total", 0)])).unwrap();
    let used = slow.ring.expect(2);
    assert!(slow.settle(&used).iter().all(|(_, status)| *status == OK));
    // It is put on while the disk runs, and the service ends while requests wait.
    client.limit("a", &change(&[("bps-read", 1)])).unwrap();
    assert_eq!(slow.read(0, 8).0, OK);
    ask(&mut slow, 0);
    assert_eq!(fast.read(0, 8).0, OK);
    assert!(slow.ring.reap().is_empty());
    service.signal(Signal::SIGTERM);
    assert_eq!(service.wait().code(), Some(0));
}

#[test]
fn volumes_of_a_group_have_one_set() {
    let service = Setup::new()
        .args(["--workers", "2"])
        .volume("a", "memory:8M,group=g")
        .volume("b", "memory:8M,group=g,iops-read=100")
        .vhost_user("a", "a", "")
        .vhost_user("b", "b", "")
        .start();
    let client = Client::new(service.control());
    for volume in ["a", "b"] {
        let limits = client.limits(volume).unwrap();
        assert_eq!((limits.limits["iops-read"], limits.group.as_deref()), (100, Some("g")));
    }
    let begun = Instant::now();
    let work = |socket: &str| {
        let (_vmm, mut queue) = everyday(&service.path(socket));
        for _ in 0..61 {
            assert_eq!(queue.read(0, 8).0, OK);
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| work("a"));
        scope.spawn(|| work("b"));
    });
    // 122 in all, of which eleven may come at once, and one more for each worker that looks at the same time.
    assert!(begun.elapsed() >= Duration::from_millis(1090), "{:?}", begun.elapsed());
    client.limit("a", &change(&[("iops-read", 0), ("iops-total", 7)])).unwrap();
    let limits = client.limits("b").unwrap().limits;
    assert_eq!(limits.into_iter().collect::<Vec<_>>(), [("iops-total".to_owned(), 7)]);
    let error = client.limit("b", &change(&[("iops-write", 1)])).unwrap_err().to_string();
    assert!(error.contains("iops-write: cannot be limited apart where iops-total is"), "{error}");
}

#[test]
fn the_command_shows_and_changes() {
    let service = Setup::new().volume("a", "memory:8M").vhost_user("a", "a", "").start();
    let limit = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringblk"));
        command.arg("limit").args(arguments).arg("--control").arg(service.control());
        let output = command.output().unwrap();
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        (output.status.code().unwrap(), text)
    };
    assert_eq!(limit(&["a"]), (0, "a: no limits\n".into()));
    let (status, text) = limit(&["a", "--iops-total", "2000", "--bps-write", "100M", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((status, &json["limits"]["bps-write"]), (0, &(100 << 20).into()));
    assert_eq!(limit(&["a", "--bps-write", "0"]), (0, "a:\n  iops-total 2000\n".into()));
    let (status, text) = limit(&["a", "--iops-read", "5"]);
    assert!(status == 1 && text.contains("iops-read: "), "{text}");
    let (status, text) = limit(&["b"]);
    assert!(status == 1 && text.contains("there is no volume \"b\""), "{text}");
    assert_eq!(limit(&["a", "--iops", "5"]).0, 2);
}

#[test]
fn what_cannot_be_is_refused() {
    for (volumes, words) in [
        (vec![("a", "memory:8M,iops-total=1,iops-read=1")], "iops-read: cannot be limited apart"),
        (vec![("a", "memory:8M,iops-total-max=1")], "iops-total-max: needs iops-total"),
        (vec![("a", "fault:b"), ("b", "memory:8M,iops-total=1")], "limits are for a volume that is exported"),
        (
            vec![("a", "memory:8M,iops-total=1,group=g"), ("b", "memory:8M,iops-total=2,group=g")],
            "group \"g\" has other limits (--volume a=",
        ),
    ] {
        let setup = Setup::new();
        let setup = volumes.into_iter().fold(setup, |setup, (name, what)| setup.volume(name, what));
        let (status, log) = setup.vhost_user("a", "a", "").refused();
        assert!(status == 2 && log.contains(words), "{log}");
    }
}
