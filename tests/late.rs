//! What takes its time: volumes and exports that come after the service, and a service that is stopped before it serves.

mod common;

use common::eventually;
use common::model::Op;
use common::service::{Service, Setup};
use common::vmm::everyday;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ringblk::service::status::ExportStatus;
use std::fs;
use std::os::unix::net::UnixListener;
use std::process::Stdio;

const MIB: u64 = 1 << 20;
const OK: u8 = 0;

/// Which of the exports wait, by socket.
fn waits(service: &Service) -> Vec<(String, bool)> {
    let of = |export: &ExportStatus| match export {
        ExportStatus::VhostUser(export) => {
            (export.socket.file_name().unwrap().to_string_lossy().into_owned(), export.waiting)
        }
        ExportStatus::Ublk(export) => (export.volume.clone(), export.waiting),
    };
    let mut all: Vec<_> = service.status().exports.iter().map(of).collect();
    all.sort();
    all
}

/// Why the second volume is not served whole.
fn cause(service: &Service) -> String {
    service.status().volumes[1].unavailable.clone().unwrap_or_default()
}

/// The second of three cannot be started, and its neighbours can; it is told of until it is there.
#[test]
fn an_export_that_does_not_start_is_told_of_and_tried_again() {
    let setup = Setup::new().volume("here", "memory:1M").vhost_user("here", "h", "");
    let image = setup.path("late.img");
    let setup = setup.volume("late", &format!("file:{},required=no", image.display()));
    let service =
        setup.vhost_user("late", "a", "").vhost_user("late", "b", "").vhost_user("late", "c", "").start();
    let named = |names: &[(&str, bool)]| names.iter().map(|(n, w)| (n.to_string(), *w)).collect::<Vec<_>>();
    assert_eq!(waits(&service), named(&[("a", true), ("b", true), ("c", true), ("h", false)]));
    let (b, away) = (service.path("b"), service.path("away"));
    fs::rename(&b, &away).unwrap();
    let new = image.with_extension("new");
    fs::File::create(&new).unwrap().set_len(MIB).unwrap();
    fs::rename(&new, &image).unwrap();
    eventually("its volume is there", || service.log().contains("volume late: it is there"));
    eventually("it is told of", || cause(&service).contains("its path does not lead to the socket"));
    assert!(cause(&service).contains(&b.display().to_string()), "{}", cause(&service));
    assert!(service.log().contains(&cause(&service)), "{}", service.log());
    assert_eq!(waits(&service), named(&[("a", false), ("b", true), ("c", false), ("h", false)]));
    assert_eq!(everyday(&service.path("c")).1.one(Op::Flush, &[]).0, OK);
    fs::rename(&away, &b).unwrap();
    eventually("it is served", || waits(&service)[1] == ("b".into(), false));
    assert_eq!(everyday(&b).1.one(Op::Flush, &[]).0, OK);
    assert_eq!(cause(&service), "");
}

/// A server that takes a connection and says nothing is not waited for by a service that is to end, whether it is all that
/// there is, others wait for a first look at it, or it may come later.
#[test]
fn a_stop_does_not_wait_for_what_is_being_opened() {
    for (signal, others, options) in [
        (Signal::SIGTERM, false, ""),
        (Signal::SIGINT, true, ""),
        (Signal::SIGTERM, true, ",reconnect=600"),
        (Signal::SIGINT, false, ",required=no"),
    ] {
        let mut setup = Setup::new();
        let server = setup.path("server");
        let listener = UnixListener::bind(&server).unwrap();
        setup = setup.volume("far", &format!("nbd:nbd+unix:///?socket={}{options}", server.display()));
        setup = setup.vhost_user("far", "f", "");
        if others {
            setup = setup.volume("here", "memory:1M").vhost_user("here", "h", "");
        }
        let mut command = setup.command();
        let service = command.stderr(Stdio::piped()).spawn().unwrap();
        // It opens its volumes, and will not get an answer.
        let connection = listener.accept().unwrap();
        kill(Pid::from_raw(service.id() as i32), signal).unwrap();
        let output = service.wait_with_output().unwrap();
        let log = String::from_utf8(output.stderr).unwrap();
        // Had it waited, it would say what it waited for, or that it serves something.
        assert_eq!(output.status.code(), Some(0), "{signal} {options}: {log}");
        assert!(log.contains("stopped before anything was served"), "{signal} {options}: {log}");
        for said in ["far: ", "is served", "panicked", " ERROR "] {
            assert!(!log.contains(said), "{signal} {options}: {log}");
        }
        drop((connection, listener));
        fs::remove_file(server).unwrap();
        assert_eq!(fs::read_dir(setup.path("")).unwrap().count(), 0, "nothing is left behind");
    }
}
