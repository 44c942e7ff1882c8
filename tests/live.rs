//! Volumes and exports that come and go in a running service, sandbox and all, while others are served.

mod common;

use common::eventually;
use common::model::{Model, Op};
use common::queue::RawQueue;
use common::service::{Service, Setup};
use common::vmm::{Vmm, everyday};
use ringblk::service::client::Client;
use ringblk::service::status::{AddExport, RemoveExport};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const MIB: u64 = 1 << 20;
const OK: u8 = 0;

/// A service that may grow where its sockets and images are, and has what `with` gives it.
fn start(with: impl FnOnce(Setup) -> Setup) -> Service {
    let setup = Setup::new();
    let sockets = setup.path("").display().to_string();
    let setup = setup.args(["--allow-path", &sockets, "--allow-path", env!("CARGO_TARGET_TMPDIR")]);
    with(setup.args(["--workers", "2"])).start()
}

fn image(name: &str) -> String {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("live-{}-{name}", std::process::id()));
    std::fs::File::create(&path).unwrap().set_len(4 * MIB).unwrap();
    path.display().to_string()
}

fn socket(service: &Service, name: &str) -> RemoveExport {
    RemoveExport { vhost_user: Some(service.path(name)), ..RemoveExport::default() }
}

/// Shows a volume on a socket.
fn show(service: &Service, volume: &str, name: &str) -> Result<bool, String> {
    let text = format!("{volume}={}", service.path(name).display());
    let wanted = AddExport { vhost_user: Some(text), ..AddExport::default() };
    let added = Client::new(service.control()).add_export(&wanted);
    added.map(|added| added.changed).map_err(|error| error.to_string())
}

fn connect(service: &Service, name: &str) -> (Vmm, RawQueue) {
    everyday(&service.path(name))
}

/// Waits until the service has seen that the VMM has gone.
fn gone(service: &Service, name: &str) {
    let socket = format!("vhost-user:{}", service.path(name).display());
    eventually("it is gone", || {
        let exports = service.status().exports;
        exports
            .iter()
            .any(|export| export.name() == socket && !format!("{export:?}").contains("connected: true"))
    });
}

#[test]
fn a_service_that_begins_with_nothing_serves_what_is_added() {
    let service = start(|setup| setup);
    let client = Client::new(service.control());
    let file = image("a");
    let volume = format!("a=file:{file},format=raw");
    assert!(client.add_volume(&volume).unwrap().changed);
    assert!(!client.add_volume(&volume).unwrap().changed, "the same again");
    let other = client.add_volume(&format!("a=file:{file},format=raw,read-only=on")).unwrap_err().to_string();
    assert!(other.contains("volume a is there, and is another"), "{other}");
    let known = &service.status().volumes[0];
    assert!(known.idle && known.size_bytes == 0);
    for _ in 0..3 {
        assert_eq!(show(&service, "a", "a.sock"), Ok(true));
        assert_eq!(show(&service, "a", "a.sock"), Ok(false));
        let (vmm, mut queue) = connect(&service, "a.sock");
        assert!(!service.status().volumes[0].idle);
        assert_eq!(queue.write(8, &[7; 4096]), OK);
        let used = client.remove_export(&socket(&service, "a.sock")).unwrap_err().to_string();
        assert!(used.contains("connected to a VMM") && used.contains("--force"), "{used}");
        assert!(client.remove_volume("a").unwrap_err().to_string().contains("has exports"));
        assert_eq!(queue.read(8, 8), (OK, vec![7; 4096]), "and nothing has happened to it");
        drop((queue, vmm));
        gone(&service, "a.sock");
        assert!(client.remove_export(&socket(&service, "a.sock")).unwrap().changed);
        assert!(!client.remove_export(&socket(&service, "a.sock")).unwrap().changed);
        assert!(!service.path("a.sock").exists());
        // It is closed: its lock is free.
        assert_eq!(std::fs::read(&file).unwrap()[8 * 512..][..4096], [7; 4096]);
    }
    assert!(client.remove_volume("a").unwrap().changed);
    assert!(!client.remove_volume("a").unwrap().changed);
    assert!(service.status().volumes.is_empty());
    assert!(show(&service, "a", "a.sock").unwrap_err().contains("there is no volume"));
}

#[test]
fn a_forced_removal_hangs_up() {
    let service = start(|setup| setup.volume("m", "memory:4M"));
    assert_eq!(show(&service, "m", "m.sock"), Ok(true));
    let (_vmm, mut queue) = connect(&service, "m.sock");
    assert_eq!(queue.write(0, &[1; 512]), OK);
    let forced = RemoveExport { force: true, ..socket(&service, "m.sock") };
    assert!(Client::new(service.control()).remove_export(&forced).unwrap().changed);
    assert!(service.status().exports.is_empty());
    assert_eq!(show(&service, "m", "m.sock"), Ok(true), "its place is free again");
}

/// An image that cannot be opened, a socket that cannot be made, a volume that somebody has: all is as before.
#[test]
fn what_cannot_be_added_leaves_nothing() {
    let service = start(|setup| setup.volume("m", "memory:4M").vhost_user("m", "m.sock", ""));
    let client = Client::new(service.control());
    let file = image("b");
    let refused = |result: Result<_, _>, words: &str| {
        let error = format!(
            "{:?}",
            Result::<ringblk::service::status::Changed, _>::map_err(
                result,
                |e: ringblk::service::client::ClientError| e.to_string()
            )
            .unwrap_err()
        );
        assert!(error.contains(words), "{error}");
    };
    refused(client.add_volume(&format!("b=file:{file}-none,format=raw")), "No such file");
    refused(client.add_volume("b=file:/etc/hostname,format=raw"), "outside of what may be added");
    refused(client.add_volume("b=floppy:/x"), "floppy");
    refused(client.add_volume("b=fault:none"), "there is no volume");
    let disk = AddExport { ublk: Some("m".into()), ..AddExport::default() };
    refused(client.add_export(&disk), "--allow-ublk");
    assert!(show(&service, "m", "m.sock,workers=1").unwrap_err().contains("workers="));
    assert!(show(&service, "m", "m.sock,mode=0666").unwrap_err().contains("already taken"));
    client.add_volume(&format!("b=file:{file},format=raw")).unwrap();
    // Somebody has its lock by now.
    let setup = Setup::new().volume("b", &format!("file:{file},format=raw")).vhost_user("b", "b", "");
    let other = setup.start();
    let error = show(&service, "b", "b.sock").unwrap_err();
    assert!(error.contains("is in use by"), "{error}");
    assert!(!service.path("b.sock").exists() && service.status().exports.len() == 1);
    other.stop();
    assert_eq!(show(&service, "b", "b.sock"), Ok(true));
    // A socket's name that somebody else has.
    std::fs::write(service.path("c.sock"), "mine").unwrap();
    assert!(show(&service, "b", "c.sock").is_err());
    assert_eq!(std::fs::read(service.path("c.sock")).unwrap(), b"mine");
}

#[test]
fn a_service_that_was_not_started_for_it_takes_nothing() {
    let service = Setup::new().volume("m", "memory:4M").vhost_user("m", "m.sock", "").start();
    let error = Client::new(service.control()).add_volume("x=memory:1M").unwrap_err().to_string();
    assert!(error.contains("--allow-path"), "{error}");
}

/// One guest works on while a hundred others come and go, on the same workers.
#[test]
fn nobody_else_notices() {
    let service = start(|setup| setup.volume("m", "memory:4M").vhost_user("m", "m.sock", ""));
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (service, over) = (&service, &over);
        scope.spawn(move || {
            let (_vmm, mut queue) = connect(service, "m.sock");
            let mut model = Model::new(7, 0, 4 * MIB / 512);
            while !over.load(Ordering::Relaxed) {
                model.exercise(&mut queue, 50);
            }
            model.verify(&mut queue);
        });
        // It ends whatever becomes of us.
        struct Ends<'a>(&'a AtomicBool);
        impl Drop for Ends<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _ends = Ends(over);
        let client = Client::new(service.control());
        for number in 0..50 {
            let name = format!("v{number}");
            client.add_volume(&format!("{name}=memory:1M,iops-total=100000,group=all")).unwrap();
            assert_eq!(show(service, &name, &name), Ok(true));
            let (vmm, mut queue) = connect(service, &name);
            assert_eq!(queue.write(1, &[number; 512]), OK);
            assert_eq!(queue.one(Op::Flush, &[]).0, OK);
            assert_eq!(queue.read(1, 1), (OK, vec![number; 512]));
            drop((queue, vmm));
            gone(service, &name);
            assert!(client.remove_export(&socket(service, &name)).unwrap().changed);
            assert!(client.remove_volume(&name).unwrap().changed);
        }
    });
    assert_eq!(service.status().exports.len(), 1);
    let before = service.descriptors();
    assert_eq!(show(&service, "m", "n.sock"), Ok(true));
    assert!(Client::new(service.control()).remove_export(&socket(&service, "n.sock")).unwrap().changed);
    eventually("what it took is given back", || service.descriptors() <= before);
    std::thread::sleep(Duration::from_millis(1));
}
