//! The service as its user meets it: sockets, configuration, control, signals.

mod common;

use common::eventually;
use common::model::{Op, Queue};
use common::queue::Layout;
use common::service::Setup;
use common::vmm::{Vmm, everyday};
use nix::sys::signal::Signal;
use ringblk::service::client::{Client, ClientError};
use ringblk::service::status::ExportStatus;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

const MIB: u64 = 1 << 20;
const OK: u8 = 0;

fn ringblk<const N: usize>(args: [&str; N]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ringblk")).args(args).stdin(Stdio::null()).output().unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn sockets_are_private_unless_asked_otherwise() {
    let setup = Setup::new().volume("root", "memory:1M").door("root", "a", "").door("root", "b", "mode=0666");
    let service = setup.door("root", "c", "owner=65534:65533,mode=0660").start();
    assert_eq!(mode(&service.path("a")), 0o600);
    assert_eq!(mode(&service.control()), 0o600);
    assert_eq!(mode(&service.path("b")), 0o666);
    let owned = fs::symlink_metadata(service.path("c")).unwrap();
    assert_eq!((owned.uid(), owned.gid(), mode(&service.path("c"))), (65534, 65533, 0o660));
}

#[test]
fn a_dead_socket_is_replaced_and_a_living_one_is_not() {
    let setup = Setup::new().volume("root", "memory:1M").door("root", "a", "");
    drop(UnixListener::bind(setup.path("a")).unwrap());
    drop(UnixListener::bind(setup.path("control.sock")).unwrap());
    let service = setup.start();
    assert_eq!(everyday(&service.path("a")).1.one(Op::Flush, &[]).0, OK);
    // A second service at the same place, by either socket.
    let a = format!("root={}", service.path("a").display());
    let control = service.control().display().to_string();
    for (door, control) in [(&a, &format!("{control}.2")), (&format!("{a}.2"), &control)] {
        let output =
            ringblk(["serve", "--volume", "root=memory:1M", "--vhost-user", door, "--control", control]);
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
        let setup = Setup::new().volume("root", "memory:1M").door("root", "a", "");
        fs::write(setup.path(place), "precious").unwrap();
        let (code, error) = setup.refused();
        assert_eq!(code, 1, "{error}");
        assert!(error.contains("not a socket") && error.contains(place), "{error}");
        assert_eq!(fs::read(setup.path(place)).unwrap(), b"precious");
        // Nor is anything left of the half that could be made.
        assert_eq!(fs::read_dir(setup.path("")).unwrap().count(), 1);
    }
    // A socket that somebody put in the place of ours is theirs.
    let service = Setup::new().volume("root", "memory:1M").door("root", "a", "").start();
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
    let door = "[[vhost-user]]\nvolume = \"root\"\nsocket = \"SOCKET\"\n";
    let cases = [
        ("an unknown key", format!("{good}speed = 3\n{door}"), "speed"),
        ("an unknown driver", format!("{}{door}", good.replace("memory", "tape")), "tape"),
        ("no such volume", format!("{good}{}", door.replace("root", "roof")), "roof"),
        ("a bad size", format!("{}{door}", good.replace("1M", "1.5M")), "1.5M"),
        ("a bad queue size", format!("{good}{door}queue-size = 100\n"), "queue-size"),
        ("a bad mode", format!("{good}{door}mode = \"0999\"\n"), "0999"),
        (
            "an owner nobody knows",
            format!("{good}{door}owner = \"no-such-user-here\"\n"),
            "no-such-user-here",
        ),
        ("the same socket twice", format!("{good}{door}{door}"), "SOCKET"),
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
    let setup = setup.door("root", "a", "").door("b", "b", "");
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
        setup.volume("two", "null:1G").door("two", "b", "queues=3,queue-size=64,read-only=on").start();
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
    let service = Setup::new().volume("root", "memory:1M").door("root", "a", "").start();
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
    let service = setup.volume("root", &volume).door("root", "a", "").start();
    let other = service.path("other").display().to_string();
    let serve = |options: &str| {
        let volume = format!("root={volume}{options}");
        let door = format!("root={other}");
        ringblk([
            "serve",
            "--volume",
            &volume,
            "--vhost-user",
            &door,
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
    let unlocked = Setup::new().volume("root", &format!("{volume},lock=off")).door("root", "a", "").start();
    drop(unlocked);
    // Which takes the image with it.
    drop(service);
    fs::write(&image, [0; 4096]).unwrap();
    Setup::new().volume("root", &volume).door("root", "a", "").start();
    fs::remove_file(&image).unwrap();
}

#[test]
fn a_signal_under_load_drains_and_flushes() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let setup = Setup::new();
        let image = setup.image(8 * MIB);
        let setup = setup.volume("root", &format!("file:{}", image.display())).args(["--workers", "2"]);
        let mut service = setup.door("root", "a", "queues=2").door("root", "b", "").start();
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

#[test]
fn systemd_may_make_the_sockets() {
    let setup = Setup::new().volume("root", "memory:1M").door("root", "a", "").door("root", "b", "");
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
