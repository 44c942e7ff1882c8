//! NBD volumes on servers of the world: qemu-nbd and nbdkit. Where one is missing, the test is listed as ignored, with the
//! reason on standard error.

mod common;

use common::client::Client;
use common::eventually;
use common::model::{Model, Op, Queue};
use common::process::{Running, free_port, on_tcp, on_unix};
use common::service::{Service, Setup};
use common::trial::{installed, run_trials, trial};
use common::vmm::everyday;
use nix::sys::signal::Signal;
use ringblk::service::client::Client as ControlClient;
use ringblk::service::status::ExportStatus;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

const BYTES: u64 = 4 << 20;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;

fn main() -> ExitCode {
    let trials = vec![
        trial("qemu_nbd_agrees_with_the_model", installed("qemu-nbd"), |()| qemu_nbd()),
        trial("an_export_is_asked_for_by_the_name_in_its_uri", installed("qemu-nbd"), |()| names()),
        trial("a_server_that_is_not_there_is_told_of_once", Ok(()), |()| nobody_there()),
        trial("nbdkit_agrees_with_the_model", installed("nbdkit"), |()| nbdkit()),
        trial("a_server_that_comes_back_larger_makes_the_volume_larger", installed("nbdkit"), |()| grown()),
        trial("a_server_that_is_down_keeps_no_other_volume_down", installed("nbdkit"), |()| down()),
        trial("silent_servers_are_not_waited_for_one_by_one", Ok(()), |()| silent()),
        trial("what_is_not_there_is_waited_for_or_refused_as_it_is_asked", Ok(()), |()| required()),
        trial("nbdkit_killed_and_restarted_fails_the_next_flush", installed("nbdkit"), |()| nbdkit_forgets()),
    ];
    run_trials(trials)
}

fn serve(uri: &str, options: &str) -> Service {
    Setup::new()
        .volume("far", &format!("nbd:{uri}{options}"))
        .vhost_user("far", "a", "")
        .start()
        .may_complain()
}

/// Works with a server, and compares with the file behind it, where there is one.
fn exercise(uri: &str, image: Option<&Path>) {
    for queues in [1, 2] {
        let service = serve(uri, ",connections=2");
        let client = Client::connect(&service.path("a"), true);
        assert_eq!(u64::from(client.config().capacity) * 512, BYTES);
        let share = BYTES / 512 / queues as u64;
        let works = client.queues(queues, 64, 16).into_iter().enumerate().map(|(index, mut queue)| {
            std::thread::spawn(move || {
                let first = index as u64 * share;
                for sector in (first..first + share).step_by(1024) {
                    queue.submit(0, Op::WriteZeroes { sector, sectors: 1024, unmap: false });
                    queue.kick();
                    assert_eq!(queue.wait(), [(0, OK)]);
                }
                let mut model = Model::new(index as u64 + 1, first, share);
                model.exercise(&mut queue, 300);
                model.verify(&mut queue);
                queue.submit(0, Op::Flush);
                queue.kick();
                assert_eq!(queue.wait(), [(0, OK)]);
                model
            })
        });
        let models: Vec<Model> =
            works.collect::<Vec<_>>().into_iter().map(|work| work.join().unwrap()).collect();
        if let Some(image) = image {
            let bytes = fs::read(image).unwrap();
            models.iter().for_each(|model| model.verify_image(&bytes));
        }
    }
}

fn qemu_nbd() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    File::create(&image).unwrap().set_len(BYTES).unwrap();
    let name = image.to_str().unwrap();
    let socket = dir.path().join("qemu.sock");
    let common = ["-f", "raw", "-t", "-e", "4", "-x", "a disk", "--discard=unmap"];
    let unix = ["-k", socket.to_str().unwrap(), name];
    let server = Running::start("qemu-nbd", &[&common[..], &unix[..]].concat(), on_unix(&socket));
    let uri = format!("nbd+unix:///a%20disk?socket={}", socket.display());
    exercise(&uri, Some(&image));
    let wrong = Setup::new()
        .volume("far", &format!("nbd:{}", uri.replace("disk", "dusk")))
        .vhost_user("far", "a", "");
    let (status, said) = wrong.refused();
    assert!(status == 1 && said.contains("refuses the export"), "{said}");
    drop(server);
    let port = free_port();
    let number = port.to_string();
    let tcp = ["-b", "127.0.0.1", "-p", &number, name];
    let _server = Running::start("qemu-nbd", &[&common[..], &tcp[..]].concat(), on_tcp(port));
    exercise(&format!("nbd://127.0.0.1:{port}/a%20disk"), Some(&image));
}

/// The server refuses any other name than its own.
fn names() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    File::create(&image).unwrap().set_len(BYTES).unwrap();
    let name = image.to_str().unwrap();
    for (number, (export, path)) in [
        ("/dir//a/../b", "/dir//a/../b"),
        ("/dir//a/../b", "%2fdir/%2Fa/%2e./b"),
        ("../.", "../."),
        ("a/", "a/"),
        ("", ""),
        ("a+b ?#%\\", "a+b%20%3f%23%25\\"),
        ("\u{e4}\u{1f980}", "%c3%a4\u{1f980}"),
    ]
    .iter()
    .enumerate()
    {
        let socket = dir.path().join(format!("{number}.sock"));
        let common = ["-f", "raw", "-t", "-e", "4", "-x", export];
        let unix = ["-k", socket.to_str().unwrap(), name];
        let unix = Running::start("qemu-nbd", &[&common[..], &unix[..]].concat(), on_unix(&socket));
        drop(serve(&format!("nbd+unix:///{path}?socket={}", socket.display()), ""));
        drop(unix);
        let port = free_port();
        let decimal = port.to_string();
        let tcp = ["-b", "127.0.0.1", "-p", &decimal, name];
        let _tcp = Running::start("qemu-nbd", &[&common[..], &tcp[..]].concat(), on_tcp(port));
        drop(serve(&format!("nbd://127.0.0.1:{port}/{path}"), ""));
    }
}

fn nobody_there() {
    let refused = |uri: &str| {
        let setup = Setup::new().volume("far", &format!("nbd:{uri}")).vhost_user("far", "a", "");
        let (status, said) = setup.refused();
        assert_eq!(status, 1, "{said}");
        let hint = " (required=no on this volume has the service begin without it, and try it again)";
        said.lines().last().unwrap().strip_suffix(hint).unwrap().to_owned()
    };
    let port = free_port();
    let uri = format!("nbd://127.0.0.1:{port}/");
    let expected = format!(
        "ringblk: error: volume far: {uri}: cannot connect: nobody listens there: Connection refused (os error 111)"
    );
    assert_eq!(refused(&uri), expected);
    let said = refused("nbd+unix:///?socket=/no/such/socket");
    assert!(
        said.ends_with("cannot connect: it is not there: No such file or directory (os error 2)"),
        "{said}"
    );
    // One that hangs up on everybody.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("nbd://{}/", listener.local_addr().unwrap());
    std::thread::spawn(move || while listener.accept().is_ok() {});
    let said = refused(&uri);
    assert!(said.contains("during the handshake: "), "{said}");
    assert_eq!(said.matches("handshake").count(), 1, "{said}");
}

fn nbdkit() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nbdkit.sock");
    let unix = ["-f", "-U", socket.to_str().unwrap(), "memory", "4M"];
    let _unix = Running::start("nbdkit", &unix, on_unix(&socket));
    exercise(&format!("nbd+unix:///?socket={}", socket.display()), None);
    let port = free_port();
    let number = port.to_string();
    let tcp = ["-f", "-i", "127.0.0.1", "-p", &number, "--no-sr", "memory", "4M"];
    let _tcp = Running::start("nbdkit", &tcp, on_tcp(port));
    exercise(&format!("nbd://localhost:{port}"), None);
}

fn grown() {
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (dir.path().join("image"), dir.path().join("nbdkit.sock"));
    File::create(&image).unwrap().set_len(BYTES).unwrap();
    let args = ["-f", "-U", socket.to_str().unwrap(), "file", image.to_str().unwrap()];
    let server = Running::start("nbdkit", &args, on_unix(&socket));
    let service = serve(&format!("nbd+unix:///?socket={}", socket.display()), ",reconnect=60");
    let (vmm, mut queue) = everyday(&service.path("a"));
    assert_eq!(queue.write(0, &[9; 4096]), OK);
    assert_eq!(queue.one(Op::Flush, &[]).0, OK);
    let mut server = Some(server);
    for bytes in [2 * BYTES, 3 * BYTES + 512] {
        let last = bytes / 512 - 8;
        assert_eq!(queue.write(last, &[7; 4096]), IO_ERROR, "past the end");
        server.take();
        let _ = fs::remove_file(&socket);
        File::options().write(true).open(&image).unwrap().set_len(bytes).unwrap();
        server = Some(Running::start("nbdkit", &args, on_unix(&socket)));
        assert_eq!(queue.read(0, 8), (OK, vec![9; 4096]));
        eventually("the volume grows", || service.status().volumes[0].size_bytes == bytes);
        assert_eq!(queue.write(last, &[7; 4096]), OK);
        assert_eq!(queue.one(Op::Flush, &[]).0, OK);
    }
    drop((queue, vmm, service, server));
}

fn why(service: &Service, name: &str) -> Option<String> {
    service.status().volumes.into_iter().find(|volume| volume.name == name).unwrap().unavailable
}

fn waits(service: &Service) -> Vec<bool> {
    let waits = |export: &ExportStatus| match export {
        ExportStatus::VhostUser(export) => export.waiting,
        ExportStatus::Ublk(export) => export.waiting,
    };
    service.status().exports.iter().map(waits).collect()
}

fn works(service: &Service, socket: &str) {
    let (_vmm, mut queue) = everyday(&service.path(socket));
    assert_eq!(queue.write(8, &[3; 4096]), OK);
    assert_eq!(queue.one(Op::Flush, &[]).0, OK);
    assert_eq!(queue.read(8, 8), (OK, vec![3; 4096]));
}

fn down() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nbdkit.sock");
    let args = ["-f", "-U", socket.to_str().unwrap(), "memory", "4M"];
    let uri = format!("nbd:nbd+unix:///?socket={}", socket.display());
    let setup = Setup::new()
        .volume("near", "memory:4M")
        .vhost_user("near", "near", "")
        .volume("far", &format!("{uri},reconnect=60,on-error=stop"))
        .vhost_user("far", "far", "queues=2")
        .vhost_user("far", "far2", "mode=0660")
        // Without a policy of its own, next to one that can be served.
        .volume("other", &uri)
        .vhost_user("other", "other", "");
    let mut service = setup.start();
    for signal in [None, Some(Signal::SIGKILL), Some(Signal::SIGTERM)] {
        if let Some(signal) = signal {
            service.restart(signal);
        }
        works(&service, "near");
        assert!(why(&service, "near").is_none());
        for name in ["far", "other"] {
            let cause = why(&service, name).unwrap();
            assert!(cause.contains(name) && cause.contains("it is not there: No such file"), "{cause}");
            let refused = UnixStream::connect(service.path(name)).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        }
        assert_eq!(waits(&service), [false, true, true, true]);
        let control = ControlClient::new(service.control());
        let refused = control.resize("far", 8 << 20, false).unwrap_err().to_string();
        assert!(refused.contains("not there yet"), "{refused}");
        let server = Running::start("nbdkit", &args, on_unix(&socket));
        for name in ["far", "other"] {
            eventually("the volume is there", || why(&service, name).is_none());
        }
        eventually("its exports are served", || !waits(&service).contains(&true));
        for name in ["far", "far2", "other"] {
            works(&service, name);
        }
        assert_eq!(service.status().volumes.iter().map(|of| of.size_bytes).collect::<Vec<_>>(), [BYTES; 3]);
        works(&service, "near");
        service.signal(Signal::SIGKILL);
        service.wait();
        drop(server);
        let _ = fs::remove_file(&socket);
        service.restart_dead();
    }
    // Its end is clean: the sockets go, although nobody ever listened on them.
    assert_eq!(waits(&service).iter().filter(|waits| **waits).count(), 3);
    service.stop();
}

/// Many servers that say nothing cost the others no more than one.
fn silent() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("nbd://{}", listener.local_addr().unwrap());
    let mut setup = Setup::new().volume("near", "memory:4M").vhost_user("near", "near", "");
    for number in 0..16 {
        let name = format!("far{number}");
        setup = setup.volume(&name, &format!("nbd:{uri}")).vhost_user(&name, &name, "");
    }
    let begun = Instant::now();
    let service = setup.start();
    // One after the other they would take ten seconds each, or three.
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    works(&service, "near");
    assert_eq!(waits(&service).iter().filter(|waits| **waits).count(), 16);
    assert!(why(&service, "far7").unwrap().contains("silent during the handshake"));
}

fn required() {
    let dir = tempfile::tempdir().unwrap();
    let (image, deep) = (dir.path().join("later.img"), dir.path().join("not/yet/there.img"));
    let file = |path: &Path, options: &str| format!("file:{}{options}", path.display());
    let near = || Setup::new().volume("near", "memory:4M").vhost_user("near", "near", "");
    // A file that is not there is a mistake, unless somebody says that it is not.
    for options in ["", ",required=yes"] {
        let (status, said) =
            near().volume("far", &file(&image, options)).vhost_user("far", "far", "").refused();
        assert!(status == 1 && said.contains("later.img"), "{said}");
    }
    let lost = "nbd:nbd+unix:///?socket=/no/such/socket,reconnect=60";
    let refused = near().volume("far", &format!("{lost},required=yes")).vhost_user("far", "far", "");
    assert_eq!(refused.refused().0, 1);
    // On its own, if it is to be waited for; and a file that anybody may write by then.
    let service = Setup::new()
        .volume("a", &file(&image, ",required=no"))
        .vhost_user("a", "a", "")
        .volume("b", &file(&deep, ",required=no,direct=on"))
        .vhost_user("b", "b", "")
        .volume("c", lost)
        .vhost_user("c", "c", "")
        .start();
    assert_eq!(waits(&service), [true; 3]);
    fs::create_dir_all(deep.parent().unwrap()).unwrap();
    for path in [&image, &deep] {
        File::create(path).unwrap().set_len(BYTES).unwrap();
    }
    eventually("the images are served", || waits(&service) == [false, false, true]);
    works(&service, "a");
    works(&service, "b");
    assert_eq!(fs::read(&image).unwrap()[4096..8192], [3; 4096]);
    let (status, said) =
        Setup::new().volume("far", &file(&image, ",read-only=off")).vhost_user("far", "far", "").refused();
    assert!(status == 1 && said.contains("in use"), "it is locked: {said}");
}

/// Its memory goes with it, and with that a write that was not flushed: whoever flushes hears of it, once.
fn nbdkit_forgets() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nbdkit.sock");
    let args = ["-f", "-U", socket.to_str().unwrap(), "memory", "4M"];
    let server = Running::start("nbdkit", &args, on_unix(&socket));
    // Its own last flush hears of the loss, too.
    let service = serve(&format!("nbd+unix:///?socket={}", socket.display()), ",reconnect=60").ends_with(1);
    let (_vmm, mut queue) = everyday(&service.path("a"));
    assert_eq!(queue.write(0, &[9; 4096]), OK);
    drop(server);
    let _ = fs::remove_file(&socket);
    let _server = Running::start("nbdkit", &args, on_unix(&socket));
    assert_eq!(queue.read(0, 8), (OK, vec![0; 4096]));
    assert_eq!(queue.one(Op::Flush, &[]).0, IO_ERROR);
    assert_eq!(queue.one(Op::Flush, &[]).0, OK);
    // Before its server: it would wait for that to come back.
    drop((queue, _vmm, service));
}
