//! The service as its user meets it: sockets, configuration, control, signals.

mod common;

use common::eventually;
use common::model::{Model, Op, Queue};
use common::queue::{Layout, RawQueue};
use common::service::Setup;
use common::vmm::{Vmm, everyday};
use nix::sys::signal::Signal;
use ringblk::service::client::{Client, ClientError};
use ringblk::service::status::ExportStatus;
use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const MIB: u64 = 1 << 20;
const OK: u8 = 0;
const IOERR: u8 = 1;

fn ringblk<const N: usize>(args: [&str; N]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ringblk")).args(args).stdin(Stdio::null()).output().unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn sockets_are_private_unless_asked_otherwise() {
    let setup = Setup::new().volume("root", "memory:1M").vhost_user("root", "a", "").vhost_user(
        "root",
        "b",
        "mode=0666",
    );
    let service = setup.vhost_user("root", "c", "owner=65534:65533,mode=0660").start();
    assert_eq!(mode(&service.path("a")), 0o600);
    assert_eq!(mode(&service.control()), 0o600);
    assert_eq!(mode(&service.path("b")), 0o666);
    let owned = fs::symlink_metadata(service.path("c")).unwrap();
    assert_eq!((owned.uid(), owned.gid(), mode(&service.path("c"))), (65534, 65533, 0o660));
}

#[test]
fn a_dead_socket_is_replaced_and_a_living_one_is_not() {
    let setup = Setup::new().volume("root", "memory:1M").vhost_user("root", "a", "");
    drop(UnixListener::bind(setup.path("a")).unwrap());
    drop(UnixListener::bind(setup.path("control.sock")).unwrap());
    let service = setup.start();
    assert_eq!(everyday(&service.path("a")).1.one(Op::Flush, &[]).0, OK);
    // A second service at the same place, by either socket.
    let a = format!("root={}", service.path("a").display());
    let control = service.control().display().to_string();
    for (export, control) in [(&a, &format!("{control}.2")), (&format!("{a}.2"), &control)] {
        let output =
            ringblk(["serve", "--volume", "root=memory:1M", "--vhost-user", export, "--control", control]);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains("another service is listening"), "{error}");
    }
    assert!(!service.path("a.2").exists() && !service.path("control.sock.2").exists());
    assert_eq!(everyday(&service.path("a")).1.one(Op::Flush, &[]).0, OK);
}

#[test]
fn what_is_not_a_socket_is_never_removed() {
    for place in ["a", "control.sock"] {
        let setup = Setup::new().volume("root", "memory:1M").vhost_user("root", "a", "");
        fs::write(setup.path(place), "precious").unwrap();
        let (code, error) = setup.refused();
        assert_eq!(code, 1, "{error}");
        assert!(error.contains("not a socket") && error.contains(place), "{error}");
        assert_eq!(fs::read(setup.path(place)).unwrap(), b"precious");
        // Nor is anything left of the half that could be made.
        assert_eq!(fs::read_dir(setup.path("")).unwrap().count(), 1);
    }
    // A socket that somebody put in the place of ours is theirs.
    let service = Setup::new().volume("root", "memory:1M").vhost_user("root", "a", "").start();
    let path = service.path("a");
    fs::remove_file(&path).unwrap();
    fs::write(&path, "theirs").unwrap();
    let dir = service.path("");
    let kept = dir.with_extension("kept");
    service.stop_keeping(&path, &kept);
    assert_eq!(fs::read(&kept).unwrap(), b"theirs");
    fs::remove_file(&kept).unwrap();
}

#[test]
fn a_bad_configuration_is_refused_whole() {
    let good = "[volume.root]\ndriver = \"memory\"\nsize = \"1M\"\n";
    let export = "[[vhost-user]]\nvolume = \"root\"\nsocket = \"SOCKET\"\n";
    let cases = [
        ("an unknown key", format!("{good}speed = 3\n{export}"), "speed"),
        ("an unknown driver", format!("{}{export}", good.replace("memory", "tape")), "tape"),
        ("no such volume", format!("{good}{}", export.replace("root", "roof")), "roof"),
        ("a bad size", format!("{}{export}", good.replace("1M", "1.5M")), "1.5M"),
        ("a bad queue size", format!("{good}{export}queue-size = 100\n"), "queue-size"),
        ("a bad mode", format!("{good}{export}mode = \"0999\"\n"), "0999"),
        (
            "an owner nobody knows",
            format!("{good}{export}owner = \"no-such-user-here\"\n"),
            "no-such-user-here",
        ),
        ("the same socket twice", format!("{good}{export}{export}"), "SOCKET"),
        ("no TOML", "workers = = 2\n".to_owned(), "ringblk.toml:1"),
        ("nothing to serve", good.to_owned(), ""),
    ];
    for (what, text, word) in cases {
        let setup = Setup::new();
        let (socket, file) = (setup.path("a"), setup.path("ringblk.toml"));
        let [text, word] = [&*text, word].map(|text| text.replace("SOCKET", socket.to_str().unwrap()));
        fs::write(&file, &text).unwrap();
        let setup = setup.args(["--config", file.to_str().unwrap()]);
        let (code, error) = setup.refused();
        assert_eq!(code, 2, "{what}: {error}");
        assert!(error.contains(&word), "{what}: {error}");
        let found: Vec<_> =
            fs::read_dir(setup.path("")).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(found, [file], "{what}: nothing is made");
    }
    // Found only when it is opened: nothing is made either.
    let setup = Setup::new().volume("root", "memory:1M").volume("b", "file:/no/such/image");
    let setup = setup.vhost_user("root", "a", "").vhost_user("b", "b", "");
    let (code, error) = setup.refused();
    assert!(code == 1 && error.contains("/no/such/image"), "{code}: {error}");
    assert_eq!(fs::read_dir(setup.path("")).unwrap().count(), 0);
}

#[test]
fn flags_and_file_say_the_same() {
    let setup = Setup::new();
    let file = setup.path("ringblk.toml");
    let text = format!(
        "workers = 1\n[volume.one]\ndriver = \"memory\"\nsize = \"1M\"\n\
         [[vhost-user]]\nvolume = \"one\"\nsocket = {:?}\nqueues = 3\nqueue-size = 64\n",
        setup.path("a")
    );
    fs::write(&file, text).unwrap();
    let setup = setup.args(["--config", file.to_str().unwrap()]);
    let service =
        setup.volume("two", "null:1G").vhost_user("two", "b", "queues=3,queue-size=64,read-only=on").start();
    let status = service.status();
    let names: Vec<_> = status.volumes.iter().map(|volume| (&*volume.name, volume.size_bytes)).collect();
    assert_eq!(names, [("one", MIB), ("two", 1 << 30)]);
    for export in &status.exports {
        let ExportStatus::VhostUser(export) = export else { panic!("{export:?}") };
        assert_eq!((export.queues, export.queue_size), (3, 64));
    }
    let mut vmm = Vmm::connect(&service.path("a"));
    assert_eq!(vmm.config(34, 2), [3, 0]);
    // Three queues on one worker.
    for index in 0..3 {
        assert_eq!(vmm.queue(index, 64, Layout::Plain, 4).one(Op::Flush, &[]).0, OK);
    }
}

#[test]
fn list_and_stop() {
    let service = Setup::new().volume("root", "memory:1M").vhost_user("root", "a", "").start();
    let control = service.control().display().to_string();
    let list = |args: [&str; 1]| {
        let output = ringblk(["list", args[0], "--control", &control]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let socket = service.path("a").display().to_string();
    let json = |connected: bool| {
        let status: serde_json::Value = serde_json::from_str(&list(["--json"])).unwrap();
        assert_eq!(status["pid"], service.pid());
        assert_eq!(status["volumes"][0]["size_bytes"], MIB);
        let export = &status["exports"][0];
        assert_eq!((&export["kind"], &export["socket"]), (&"vhost-user".into(), &socket.clone().into()));
        export["connected"] == connected
    };
    assert!(json(false));
    let (vmm, _queue) = everyday(&service.path("a"));
    eventually("the VMM is listed", || json(true));
    let text = list(["-v"]);
    assert!(text.contains(&format!("vhost-user:{socket}")) && text.contains("connected"), "{text}");
    drop(vmm);
    eventually("the VMM is not listed", || json(false));

    let (_vmm, mut queue) = everyday(&service.path("a"));
    let output = ringblk(["stop", "--control", &control]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut service = service;
    assert!(service.wait().success());
    // Its VMM hears no more of it.
    queue.submit(0, Op::Flush);
    queue.kick();
    assert!(queue.ring.wait(Duration::from_millis(50)).is_empty());
    assert!(matches!(Client::new(&control).status(), Err(ClientError::NotRunning(_))));
    assert_eq!(ringblk(["list", "--json", "--control", &control]).status.code(), Some(1));
    assert_eq!(ringblk(["stop", "--control", &control]).status.code(), Some(1));
}

#[test]
fn an_image_has_one_writer() {
    let setup = Setup::new();
    let image = setup.image(MIB);
    let volume = format!("file:{}", image.display());
    let service = setup.volume("root", &volume).vhost_user("root", "a", "").start();
    let other = service.path("other").display().to_string();
    let serve = |options: &str| {
        let volume = format!("root={volume}{options}");
        let export = format!("root={other}");
        ringblk([
            "serve",
            "--volume",
            &volume,
            "--vhost-user",
            &export,
            "--control",
            &format!("{other}.control"),
        ])
    };
    for options in ["", ",read-only=on"] {
        let refused = serve(options);
        let error = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(1), "{error}");
        assert!(error.contains(&format!("{}: is in use by another process", image.display())), "{error}");
    }
    let unlocked =
        Setup::new().volume("root", &format!("{volume},lock=off")).vhost_user("root", "a", "").start();
    drop(unlocked);
    // Which takes the image with it.
    drop(service);
    fs::write(&image, [0; 4096]).unwrap();
    Setup::new().volume("root", &volume).vhost_user("root", "a", "").start();
    fs::remove_file(&image).unwrap();
}

/// The capacity that a VMM reads, in bytes.
fn capacity(vmm: &mut Vmm) -> u64 {
    u64::from_le_bytes(vmm.config(0, 8).try_into().unwrap()) * 512
}

/// Runs a command of the service that is to succeed: what it printed.
fn done<const N: usize>(args: [&str; N]) -> String {
    let output = ringblk(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs one that is to fail with `code`: what it complained of.
fn fails<const N: usize>(code: i32, args: [&str; N]) -> String {
    let output = ringblk(args);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
    error
}

#[test]
fn a_volume_grows_and_shrinks_while_it_is_served() {
    let setup = Setup::new();
    let image = setup.image(8 * MIB);
    let length = || fs::metadata(&image).unwrap().len();
    let setup = setup.volume("root", &format!("file:{}", image.display()));
    let service = setup.vhost_user("root", "a", "").vhost_user("root", "b", "read-only=on").start();
    let control = service.control().display().to_string();
    let (mut vmm, mut queue) = everyday(&service.path("a"));
    let (mut other, _idle) = everyday(&service.path("b"));
    let at = |mib: u64, sectors: u32| Op::Write { sector: mib * MIB / 512, sectors };
    assert_eq!(queue.one(at(8, 8), &[1; 4096]).0, IOERR);

    let answer = done(["resize", "root", "+8M", "--json", "--control", &control]);
    let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(answer, serde_json::json!({"volume": "root", "from_bytes": 8 * MIB, "size_bytes": 16 * MIB}));
    assert_eq!([length(), capacity(&mut vmm), capacity(&mut other)], [16 * MIB; 3]);
    assert_eq!(service.status().volumes[0].size_bytes, 16 * MIB);
    assert!(done(["list", "--control", &control]).contains("16.0 MiB"));
    assert_eq!(queue.one(at(8, 8), &[2; 4096]).0, OK);
    assert_eq!(queue.read(16 * MIB / 512 - 8, 8), (OK, vec![0; 4096]), "what was added reads zero");
    assert_eq!(queue.one(at(16, 8), &[1; 4096]).0, IOERR);
    assert_eq!(done(["resize", "root", "16M", "--control", &control]), "root: 16M, as before\n");

    // Nothing that would lose bytes happens by itself.
    let error = fails(1, ["resize", "root", "4M", "--control", &control]);
    assert!(error.contains("shrink from 16777216 to 4194304 bytes"), "{error}");
    for (size, code, word) in [
        ("0", 1, "less than one logical block"),
        ("511", 1, "less than one logical block"),
        ("16777217", 1, "not whole blocks of 512"),
        ("8388608T", 1, "more than a block device"),
        ("+18446744073709551615", 2, "64 bits"),
        ("-1G", 2, "-1"),
        ("1.5G", 2, "not a size"),
    ] {
        let error = fails(code, ["resize", "root", size, "--force", "--control", &control]);
        assert!(error.contains(word), "{size}: {error}");
    }
    for size in ["1G", "+1G"] {
        let error = fails(1, ["resize", "roof", size, "--control", &control]);
        assert!(error.contains("there is no volume \"roof\""), "{error}");
    }
    assert!(fails(1, ["refresh", "../root", "--control", &control]).contains("there is no volume"));
    assert_eq!([length(), capacity(&mut vmm)], [16 * MIB; 2]);

    // From outside.
    let file = fs::OpenOptions::new().write(true).open(&image).unwrap();
    file.set_len(24 * MIB + 100).unwrap();
    assert_eq!(capacity(&mut vmm), 16 * MIB);
    assert_eq!(done(["refresh", "root", "--control", &control]), "root: 16M -> 24M\n");
    assert_eq!(capacity(&mut vmm), 24 * MIB);
    assert_eq!(queue.one(at(23, 8), &[3; 4096]).0, OK);
    file.set_len(12 * MIB).unwrap();
    assert!(fails(1, ["refresh", "root", "--control", &control]).contains("shrink"));
    assert_eq!(capacity(&mut vmm), 24 * MIB);
    assert_eq!(done(["refresh", "root", "--force", "--control", &control]), "root: 24M -> 12M\n");
    assert_eq!([length(), capacity(&mut vmm), capacity(&mut other)], [12 * MIB; 3]);

    assert_eq!(done(["resize", "root", "4M", "--force", "--control", &control]), "root: 12M -> 4M\n");
    assert_eq!([length(), capacity(&mut vmm), capacity(&mut other)], [4 * MIB; 3]);
    assert_eq!(queue.one(at(4, 8), &[4; 4096]).0, IOERR);
    done(["resize", "root", "12M", "--control", &control]);
    assert_eq!(queue.read(8 * MIB / 512, 8), (OK, vec![0; 4096]), "what was cut off is gone");

    // A volume that is not to be written to is not to be made longer either; what others made of it is shown.
    let read_only = format!("file:{},read-only=on,lock=off", image.display());
    let second = Setup::new().volume("root", &read_only).vhost_user("root", "a", "").start();
    let control = second.control().display().to_string();
    assert!(fails(1, ["resize", "root", "16M", "--control", &control]).contains("read-only"));
    file.set_len(13 * MIB).unwrap();
    assert_eq!(done(["refresh", "root", "--control", &control]), "root: 12M -> 13M\n");
}

#[test]
fn a_volume_changes_its_size_under_load() {
    for options in ["", ",direct=on"] {
        let setup = Setup::new();
        let image = setup.image(16 * MIB);
        let setup =
            setup.volume("root", &format!("file:{}{options}", image.display())).args(["--workers", "2"]);
        let service = setup.vhost_user("root", "a", "queues=2").start();
        let mut vmm = Vmm::connect(&service.path("a"));
        let queues = [vmm.queue(0, 64, Layout::Plain, 16), vmm.queue(1, 64, Layout::Plain, 16)];
        let stop = Arc::new(AtomicBool::new(false));
        let clients = queues.into_iter().enumerate().map(|(index, mut queue)| {
            let stop = stop.clone();
            std::thread::spawn(move || {
                // Below 4 MiB everything must be as always, whatever becomes of the end.
                let mut model = Model::new(index as u64, index as u64 * 4096, 4096).blocks(4096);
                let mut rounds = 0;
                while !stop.load(Ordering::Relaxed) {
                    for slot in 0..16 {
                        queue.put(slot, &[7; 65536]);
                        queue.submit(slot, Op::Write { sector: (240 + slot as u64) * 128, sectors: 128 });
                    }
                    queue.kick();
                    let mut left = 16;
                    while left > 0 {
                        // The last MiB is there or not.
                        let settled = queue.wait();
                        assert!(settled.iter().all(|(_, status)| [OK, IOERR].contains(status)));
                        left -= settled.len();
                    }
                    model.exercise(&mut queue, 16);
                    rounds += 1;
                }
                rounds
            })
        });
        let clients: Vec<_> = clients.collect();
        let client = Client::new(service.control());
        let length = || fs::metadata(&image).unwrap().len();
        for _ in 0..25 {
            assert_eq!(client.resize("root", 4 * MIB, true).unwrap().size_bytes, 4 * MIB);
            // A write that was under way would have made the file longer again.
            assert_eq!(length(), 4 * MIB);
            std::thread::sleep(Duration::from_millis(2));
            assert_eq!(length(), 4 * MIB);
            client.resize("root", 16 * MIB, false).unwrap();
            assert_eq!(length(), 16 * MIB);
            std::thread::sleep(Duration::from_millis(2));
        }
        stop.store(true, Ordering::Relaxed);
        for client in clients {
            assert!(client.join().unwrap() > 0);
        }
    }
}

#[test]
fn a_volume_that_waits_is_resumed() {
    let setup = Setup::new();
    let image = setup.image(8 * MIB);
    let file = fs::OpenOptions::new().write(true).open(&image).unwrap();
    let setup = setup.volume("root", &format!("file:{},on-error=stop", image.display()));
    // That requests wait is told as an error.
    let mut service = setup.vhost_user("root", "a", "").start().may_complain();
    let control = service.control().display().to_string();
    let (_vmm, mut queue) = everyday(&service.path("a"));
    let waits = |waiting: usize| {
        let volume = service.status().volumes.remove(0);
        (volume.paused, volume.waiting) == (waiting > 0, waiting)
    };
    let resume = |option: &str| match option {
        "" => done(["resume", "root", "--control", &control]),
        option => done(["resume", "root", option, "--control", &control]),
    };
    assert_eq!(resume(""), "root: no requests were waiting\n");
    assert!(fails(1, ["resume", "roof", "--control", &control]).contains("there is no volume"));

    // The end of the file is gone, and comes back. No client sees anything of it.
    file.set_len(4 * MIB).unwrap();
    let begin = |queue: &mut RawQueue, slot| {
        queue.submit(slot, Op::Read { sector: 6 * MIB / 512, sectors: 8 });
        queue.kick();
        eventually("a request waits", || waits(1));
    };
    begin(&mut queue, 0);
    assert_eq!(resume(""), "root: 1 requests are tried again\n");
    eventually("it waits again", || waits(1));
    file.set_len(8 * MIB).unwrap();
    resume("");
    assert_eq!(queue.wait(), [(0, OK)]);
    assert!(waits(0));

    // One that is not worth it.
    file.set_len(4 * MIB).unwrap();
    begin(&mut queue, 1);
    assert_eq!(resume("--give-up"), "root: 1 requests fail\n");
    assert_eq!(queue.wait(), [(1, IOERR)]);

    // A shrink does not wait for what waits: it is refused when its turn comes, and never reaches the store.
    begin(&mut queue, 2);
    assert_eq!(done(["refresh", "root", "--force", "--control", &control]), "root: 8M -> 4M\n");
    file.set_len(8 * MIB).unwrap();
    resume("");
    assert_eq!(queue.wait(), [(2, IOERR)]);

    // A stop does not wait for it.
    assert_eq!(done(["refresh", "root", "--control", &control]), "root: 4M -> 8M\n");
    file.set_len(4 * MIB).unwrap();
    begin(&mut queue, 3);
    done(["stop", "--control", &control]);
    assert!(service.wait().success());
}

#[test]
fn a_hand_over_of_sockets_is_a_stop() {
    let mut service = Setup::new().volume("root", "memory:1M").vhost_user("root", "a", "").start();
    let control = service.control().display().to_string();
    let (_vmm, mut queue) = everyday(&service.path("a"));
    assert_eq!(queue.one(Op::Flush, &[]).0, OK);
    done(["stop", "--hand-over", "--control", &control]);
    assert!(service.wait().success());
}

#[test]
fn a_signal_under_load_drains_and_flushes() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let setup = Setup::new();
        let image = setup.image(8 * MIB);
        let setup = setup.volume("root", &format!("file:{}", image.display())).args(["--workers", "2"]);
        let mut service = setup.vhost_user("root", "a", "queues=2").vhost_user("root", "b", "").start();
        let mut vmm = Vmm::connect(&service.path("a"));
        let mut queues = [vmm.queue(0, 64, Layout::Plain, 16), vmm.queue(1, 64, Layout::Plain, 16)];
        let (_other, _idle) = everyday(&service.path("b"));
        for (index, queue) in queues.iter_mut().enumerate() {
            for slot in 0..16 {
                queue.put(slot, &[7; 65536]);
                queue.submit(slot, Op::Write { sector: (index * 16 + slot) as u64 * 128, sectors: 128 });
            }
            queue.kick();
        }
        service.signal(signal);
        assert!(service.wait().success());
        // Everything that was taken is complete, told, and on disk; nothing was half done.
        let bytes = fs::read(&image).unwrap();
        for (index, queue) in queues.iter_mut().enumerate() {
            let used = queue.ring.reap();
            for (slot, status) in queue.settle(&used) {
                assert_eq!(status, OK);
                assert!(bytes[(index * 16 + slot) * 65536..][..65536].iter().all(|byte| *byte == 7));
            }
        }
        assert!(service.log().contains("stopped"), "{}", service.log());
    }
}

/// It listens whether we want it or not: whoever connects is sent away.
#[test]
fn a_socket_of_systemd_takes_nobody_before_its_volume_is_there() {
    let setup = Setup::new()
        .volume("root", "memory:1M")
        .vhost_user("root", "b", "")
        .volume("far", "nbd:nbd+unix:///?socket=/no/such/socket")
        .vhost_user("far", "a", "");
    let listener = UnixListener::bind(setup.path("a")).unwrap();
    let mut command = Command::new("/bin/sh");
    let exec = "exec 3<&0 </dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\"";
    command.args(["-c", exec, "sh", env!("CARGO_BIN_EXE_ringblk")]).args(setup.arguments());
    command.stdin(OwnedFd::from(listener));
    let service = setup.start_as(command);
    let mut vmm = UnixStream::connect(service.path("a")).unwrap();
    vmm.set_read_timeout(Some(common::PATIENCE)).unwrap();
    assert_eq!(vmm.read(&mut [0]).unwrap(), 0);
    let kept = service.path("").with_extension("kept");
    let a = service.path("a");
    service.stop_keeping(&a, &kept);
    fs::remove_file(&kept).unwrap();
}

#[test]
fn systemd_may_make_the_sockets() {
    let setup =
        Setup::new().volume("root", "memory:1M").vhost_user("root", "a", "").vhost_user("root", "b", "");
    let listener = UnixListener::bind(setup.path("a")).unwrap();
    fs::set_permissions(setup.path("a"), fs::Permissions::from_mode(0o640)).unwrap();
    // The process id that the variables must name is known only to the process itself. Descriptor 3 is where the
    // protocol has the first socket.
    let mut command = Command::new("/bin/sh");
    let exec = "exec 3<&0 </dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\"";
    command.args(["-c", exec, "sh", env!("CARGO_BIN_EXE_ringblk")]).args(setup.arguments());
    command.stdin(OwnedFd::from(listener));
    let service = setup.start_as(command);
    for socket in ["a", "b"] {
        assert_eq!(everyday(&service.path(socket)).1.one(Op::Flush, &[]).0, OK);
    }
    assert_eq!(mode(&service.path("a")), 0o640, "not ours to change");
    // It is systemd's, and stays when we go.
    let (a, b) = (service.path("a"), service.path("b"));
    let kept = service.path("").with_extension("kept");
    service.stop_keeping(&a, &kept);
    assert!(fs::symlink_metadata(&kept).unwrap().file_type().is_socket());
    assert!(!b.exists());
    fs::remove_file(&kept).unwrap();
}

/// What a guest writes to its own disk is no reason to keep the others from theirs.
#[test]
fn a_guest_that_makes_its_disk_look_like_another_format_is_alone_with_that() {
    let setup = Setup::new();
    let image = setup.image(MIB);
    let mut service = setup
        .volume("odd", &format!("file:{}", image.display()))
        .vhost_user("odd", "odd", "")
        .volume("other", "memory:1M")
        .vhost_user("other", "other", "")
        .start();
    let mut sector = [0; 512];
    sector[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    assert_eq!(everyday(&service.path("odd")).1.write(0, &sector), OK);
    service.signal(Signal::SIGKILL);
    service.wait();
    service.restart_dead();
    assert_eq!(everyday(&service.path("other")).1.one(Op::Flush, &[]).0, OK);
    let cause = service.status().volumes.into_iter().find_map(|volume| volume.unavailable).unwrap();
    assert!(cause.contains("qcow2") && cause.contains("format=raw"), "{cause}");
    // On its own, or where somebody says that it has to be there, it is refused at once.
    for (required, others) in [("", false), (",required=yes", true)] {
        let setup = Setup::new().volume("odd", &format!("file:{}{required}", image.display()));
        let setup = setup.vhost_user("odd", "odd", "");
        let setup =
            if others { setup.volume("other", "memory:1M").vhost_user("other", "other", "") } else { setup };
        let (status, said) = setup.refused();
        assert!(status == 1 && said.contains("format=raw"), "{said}");
    }
    fs::remove_file(&image).unwrap();
}
