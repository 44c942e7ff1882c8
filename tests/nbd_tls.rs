//! NBD volumes over TLS, on servers of the world. Where one is missing, or was built without TLS, the test is listed as
//! ignored, with the reason on standard error.

mod common;

use common::eventually;
use common::model::{Model, Op, Queue};
use common::process::{Running, free_port, on_tcp, on_unix};
use common::service::{Service, Setup};
use common::trial::{run_trials, trial};
use common::vmm::everyday;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, ExitCode};
use tempfile::TempDir;

const BYTES: u64 = 4 << 20;
const OK: u8 = 0;

fn main() -> ExitCode {
    let trials = vec![
        trial("qemu_nbd_agrees_with_the_model_over_tls", qemu_nbd(), |()| qemu_agrees()),
        trial("nbdkit_agrees_with_the_model_over_tls", nbdkit(), |()| nbdkit_agrees()),
        trial("nobody_is_trusted_who_cannot_be", qemu_nbd(), |()| trust()),
        trial("files_that_are_missing_keep_nobody_else_down", qemu_nbd(), |()| late()),
        trial("there_is_no_way_from_tls_to_none", nbdkit(), |()| no_way_back()),
        trial("a_session_is_made_anew_after_a_loss", nbdkit(), |()| made_anew()),
        trial("a_server_that_stops_takes_no_threads_with_it", nbdkit(), |()| stopped()),
    ];
    run_trials(trials)
}

fn says(program: &str, argument: &str) -> Result<String, String> {
    let output = Command::new(program).arg(argument).output();
    let output = output.map_err(|error| format!("{program} cannot be run: {error}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn qemu_nbd() -> Result<(), String> {
    says("qemu-nbd", "--version").map(drop)
}

fn nbdkit() -> Result<(), String> {
    let config = says("nbdkit", "--dump-config")?;
    if config.contains("tls=yes") { Ok(()) } else { Err("this nbdkit was built without TLS".into()) }
}

/// Certificates of a server and a client, and of the authority that vouches for both, as QEMU and nbdkit name them.
fn certificates(names: &[&str]) -> TempDir {
    let dir = tempfile::Builder::new().prefix("ringblk-tls-").tempdir().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    fs::write(dir.path().join("ca-cert.pem"), authority.pem()).unwrap();
    for (who, names, purpose) in [
        ("server", names, ExtendedKeyUsagePurpose::ServerAuth),
        ("client", &["client"][..], ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let names = names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        let mut params = CertificateParams::new(names).unwrap();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &authority).unwrap();
        fs::write(dir.path().join(format!("{who}-cert.pem")), certificate.pem()).unwrap();
        fs::write(dir.path().join(format!("{who}-key.pem")), key.serialize_pem()).unwrap();
    }
    dir
}

/// The options of a volume that knows them all.
fn options(dir: &Path) -> String {
    let file = |name: &str| dir.join(name).display().to_string();
    let (ca, cert, key) = (file("ca-cert.pem"), file("client-cert.pem"), file("client-key.pem"));
    format!(",tls-ca={ca},tls-cert={cert},tls-key={key}")
}

fn setup(uri: &str, options: &str) -> Setup {
    Setup::new().volume("far", &format!("nbd:{uri}{options}")).vhost_user("far", "a", "")
}

fn agrees(uri: &str, options: &str) {
    let service = setup(uri, options).start();
    let (_vmm, mut queue) = everyday(&service.path("a"));
    let mut model = Model::new(1, 0, BYTES / 512);
    for sector in (0..BYTES / 512).step_by(1024) {
        let zeroes = Op::WriteZeroes { sector, sectors: 1024, unmap: false };
        assert_eq!(queue.one(zeroes, &[]).0, OK);
    }
    model.exercise(&mut queue, 500);
    model.verify(&mut queue);
    // All at once: more than any buffer on the way holds.
    let sectors = (queue.max_len() / 512) as u32;
    let slots = queue.slots();
    for op in
        [|sector, sectors| Op::Write { sector, sectors }, |sector, sectors| Op::Read { sector, sectors }]
    {
        (0..slots).for_each(|slot| queue.submit(slot, op(slot as u64 * u64::from(sectors), sectors)));
        queue.kick();
        let mut done = 0;
        while done < slots {
            let ended = queue.wait();
            assert!(ended.iter().all(|(_, status)| *status == OK));
            done += ended.len();
        }
    }
    assert_eq!(queue.one(Op::Flush, &[]).0, OK);
}

fn qemu(dir: &Path, image: &Path, port: u16) -> Running {
    let object = format!("tls-creds-x509,id=tls0,endpoint=server,dir={},verify-peer=yes", dir.display());
    let port_number = port.to_string();
    let args = ["-f", "raw", "-t", "-e", "8", "-x", "disk", "--object", &object, "--tls-creds", "tls0"];
    let where_to = ["-b", "127.0.0.1", "-p", &port_number, image.to_str().unwrap()];
    Running::start("qemu-nbd", &[&args[..], &where_to[..]].concat(), on_tcp(port))
}

fn image(dir: &Path) -> std::path::PathBuf {
    let image = dir.join("image");
    File::create(&image).unwrap().set_len(BYTES).unwrap();
    image
}

fn qemu_agrees() {
    let dir = certificates(&["localhost", "127.0.0.1"]);
    let port = free_port();
    let _server = qemu(dir.path(), &image(dir.path()), port);
    for host in ["127.0.0.1", "localhost"] {
        agrees(&format!("nbds://{host}:{port}/disk"), &options(dir.path()));
    }
}

fn kit(dir: &Path, socket: &Path, more: &[&str]) -> Running {
    let certificates = format!("--tls-certificates={}", dir.display());
    let args = ["-f", "-U", socket.to_str().unwrap(), &certificates];
    Running::start("nbdkit", &[&args[..], more, &["memory", "4M"]].concat(), on_unix(socket))
}

fn nbdkit_agrees() {
    let dir = certificates(&["disks.example"]);
    let socket = dir.path().join("nbdkit.sock");
    let _server = kit(dir.path(), &socket, &["--tls=require", "--tls-verify-peer"]);
    let name = ",tls-hostname=disks.example,connections=3";
    let options = format!("{}{name}", options(dir.path()));
    agrees(&format!("nbds+unix:///?socket={}", socket.display()), &options);
}

fn refused(uri: &str, options: &str) -> String {
    let (status, said) = setup(uri, options).refused();
    assert_eq!(status, 1, "{said}");
    said.lines().last().unwrap().to_owned()
}

fn trust() {
    let (dir, other) = (certificates(&["localhost"]), certificates(&["localhost"]));
    let port = free_port();
    let _server = qemu(dir.path(), &image(dir.path()), port);
    let uri = format!("nbds://localhost:{port}/disk");
    let all = options(dir.path());
    drop(setup(&uri, &all).start());
    let said = refused(&uri, &options(other.path()));
    assert!(said.contains("TLS: ") && said.contains("invalid peer certificate"), "{said}");
    // The system's authorities do not know it, or there are none.
    let ours = all.split_once(",tls-cert").unwrap().1;
    let said = refused(&uri, &format!(",tls-cert{ours}"));
    assert!(said.contains("TLS: "), "{said}");
    // It is somebody else's.
    let said = refused(&format!("nbds://127.0.0.1:{port}/disk"), &all);
    assert!(said.contains("not valid for name"), "{said}");
    let said = refused(&uri, &format!("{all},tls-hostname=other.example"));
    assert!(said.contains("not valid for name"), "{said}");
    drop(setup(&format!("nbds://127.0.0.1:{port}/disk"), &format!("{all},tls-hostname=localhost")).start());
    // The server does not know us.
    let ca = all.split_once(",tls-cert").unwrap().0;
    let said = refused(&uri, ca);
    assert!(!said.contains("UnknownIssuer"), "{said}");
    // Unless nobody asks.
    drop(setup(&uri, &format!(",tls-cert{ours},tls-verify=off")).start());
    // What the files are.
    for (key, file, word) in [
        ("tls-ca", "client-key.pem", "no certificate"),
        ("tls-ca", "missing.pem", "missing.pem"),
        ("tls-ca", "image", "no certificate"),
    ] {
        let said = refused(&uri, &format!(",{key}={}", dir.path().join(file).display()));
        assert!(said.contains(key) && said.contains(word), "{said}");
    }
    let swapped = all.replace("client-key.pem", "server-key.pem");
    assert!(refused(&uri, &swapped).contains("tls-key"), "a key of another certificate");
    let said = refused(&format!("nbd://localhost:{port}/disk"), "");
    assert!(said.contains("requires TLS: write nbds://"), "{said}");
}

/// They are read when they are there, by a service that has given up its rights to other files.
fn late() {
    let (dir, place) = (certificates(&["localhost"]), tempfile::tempdir().unwrap());
    let port = free_port();
    let _server = qemu(dir.path(), &image(dir.path()), port);
    let there = place.path().join("not/yet");
    let uri = format!("nbd:nbds://localhost:{port}/disk{}", options(&there));
    let with = |options: &str| {
        let near = Setup::new().volume("near", "memory:4M").vhost_user("near", "near", "");
        near.volume("far", &format!("{uri}{options}")).vhost_user("far", "a", "")
    };
    for options in ["", ",required=yes"] {
        let (status, said) = with(options).refused();
        assert!(
            status == 1 && said.contains("not/yet/ca-cert.pem") && said.contains("required=no"),
            "{said}"
        );
    }
    let service = with(",required=no").start();
    let why = |name: &str| {
        service.status().volumes.into_iter().find(|volume| volume.name == name).unwrap().unavailable
    };
    assert_eq!(why("near"), None);
    assert!(why("far").unwrap().contains("not/yet/ca-cert.pem: "), "{:?}", why("far"));
    drop(everyday(&service.path("near")));
    // One after the other, and each whole.
    fs::create_dir_all(&there).unwrap();
    for file in ["ca-cert.pem", "client-cert.pem", "client-key.pem"] {
        eventually("the next file is missing", || why("far").unwrap().contains(file));
        let moving = place.path().join(file);
        fs::copy(dir.path().join(file), &moving).unwrap();
        fs::rename(&moving, there.join(file)).unwrap();
    }
    eventually("it is there", || why("far").is_none());
    let (_vmm, mut queue) = everyday(&service.path("a"));
    assert_eq!(queue.write(8, &[3; 4096]), OK);
}

fn no_way_back() {
    let dir = certificates(&["localhost"]);
    let socket = dir.path().join("nbdkit.sock");
    let _server = kit(dir.path(), &socket, &["--tls=off"]);
    let uri = format!("nbds+unix:///?socket={}", socket.display());
    let said = refused(&uri, &options(dir.path()));
    assert!(said.contains("TLS: the server does not offer it"), "{said}");
}

fn threads(service: &Service, name: &str) -> usize {
    let tasks = fs::read_dir(format!("/proc/{}/task", service.pid())).unwrap();
    let names = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok());
    names.filter(|comm| comm.trim() == name).count()
}

/// Also without the files, which the service may not read any more.
fn made_anew() {
    let dir = certificates(&["localhost"]);
    let run = tempfile::tempdir().unwrap();
    let socket = run.path().join("nbdkit.sock");
    let server = kit(dir.path(), &socket, &["--tls=require"]);
    let uri = format!("nbds+unix:///?socket={}", socket.display());
    let service = setup(&uri, &format!("{},reconnect=60,connections=2", options(dir.path()))).start();
    assert_eq!(threads(&service, "ringblk-tls"), 1, "that of the first look");
    let (vmm, mut queue) = everyday(&service.path("a"));
    assert_eq!(queue.write(0, &[9; 4096]), OK);
    assert_eq!(queue.one(Op::Flush, &[]).0, OK);
    for name in ["client-cert.pem", "client-key.pem"] {
        fs::remove_file(dir.path().join(name)).unwrap();
    }
    drop(server);
    let _ = fs::remove_file(&socket);
    let _server = kit(dir.path(), &socket, &["--tls=require"]);
    assert_eq!(queue.read(0, 8), (OK, vec![0; 4096]));
    assert_eq!(queue.write(0, &[8; 4096]), OK);
    assert_eq!(queue.one(Op::Flush, &[]).0, OK);
    drop((queue, vmm));
    let log = service.stop();
    assert!(log.contains("connected"), "{log}");
}

fn is_stopped(pid: u32) -> bool {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let mut states = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("stat")).unwrap());
    states.all(|stat| stat.rsplit_once(") ").unwrap().1.starts_with('T'))
}

fn stopped() {
    let dir = certificates(&["localhost"]);
    let socket = dir.path().join("nbdkit.sock");
    let server = kit(dir.path(), &socket, &["--tls=require"]);
    let uri = format!("nbds+unix:///?socket={}", socket.display());
    let asked = format!("{},reconnect=60,timeout=1,connections=1", options(dir.path()));
    let service = setup(&uri, &asked).start();
    let (_vmm, mut queue) = everyday(&service.path("a"));
    assert_eq!(queue.write(0, &[9; 4096]), OK);
    assert_eq!(queue.one(Op::Flush, &[]).0, OK);
    for signal in [Signal::SIGSTOP, Signal::SIGCONT, Signal::SIGSTOP, Signal::SIGCONT] {
        if signal == Signal::SIGCONT {
            // Requests are on their way by now, and do not end.
            let lost = |service: &Service| service.log().matches("connection lost").count();
            let before = lost(&service);
            queue.submit(0, Op::Write { sector: 0, sectors: 64 });
            queue.kick();
            eventually("the silence is noticed", || lost(&service) > before);
        }
        kill(Pid::from_raw(server.pid() as i32), signal).unwrap();
        match signal {
            Signal::SIGCONT => {
                assert_eq!(queue.wait(), [(0, OK)]);
                assert_eq!(queue.one(Op::Flush, &[]).0, OK);
            }
            // A thread may go on for a moment.
            _ => eventually("the server stops", || is_stopped(server.pid())),
        }
    }
    eventually("relays end", || threads(&service, "ringblk-tls") == 1);
}
