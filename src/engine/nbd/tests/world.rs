//! The client against servers of the world: qemu-nbd and nbdkit, where they are installed.

#![forbid(unsafe_code)]

use super::bench::*;
use crate::block::{Errno, Geometry};
use crate::engine::config::NbdConfig;
use crate::engine::nbd::protocol::*;
use crate::engine::nbd::{Error, NbdVolume};
use std::path::Path;
use std::process::{Child, Command as Process, Stdio};
use std::time::Duration;
use std::time::Instant;

/// A server's process, which does not outlive the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn spawn(program: &str, args: &[&str]) -> Option<Running> {
    match Process::new(program).args(args).stdin(Stdio::null()).spawn() {
        Ok(child) => Some(Running(child)),
        Err(error) => {
            eprintln!("skipped: {program}: {error}");
            None
        }
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn open_soon(config: &NbdConfig) -> (NbdVolume, Geometry) {
    let deadline = Instant::now() + LONG;
    loop {
        match NbdVolume::open(config) {
            Ok(opened) => return opened,
            Err(Error::Connect(_)) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20))
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// Works with a server, and compares with the file behind it, where there is one.
fn exercise(uri: &str, image: Option<&Path>, multi_conn: bool) {
    let config = NbdConfig { connections: Some(2), ..config(uri, 0) };
    let (volume, geometry) = open_soon(&config);
    assert_eq!(geometry.bytes(), 4 << 20);
    assert!(geometry.volatile_cache && !geometry.read_only);
    assert_eq!(volume.multi_conn(), multi_conn, "{uri}");
    let mut bench = Bench::new();
    let ops = bench.attach(&volume);
    let abilities = Abilities {
        refusals: false,
        zeroes: volume.remote.has(NBD_FLAG_SEND_WRITE_ZEROES),
        discard: geometry.discard.is_some(),
    };
    let models = crowd(&mut bench, &ops, 80, abilities).concat();
    bench.flush(&ops).unwrap();
    assert!(bench.read(&ops, 0, 4 << 20).unwrap() == models);
    if let Some(image) = image {
        assert!(std::fs::read(image).unwrap() == models, "{}", image.display());
    }
    bench.finish(ops);
}

#[test]
fn qemu_nbd_agrees_with_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    std::fs::File::create(&image).unwrap().set_len(4 << 20).unwrap();
    let name = image.to_str().unwrap();
    let socket = dir.path().join("qemu.sock");
    let common = ["-f", "raw", "-t", "-e", "4", "-x", "a disk", "--discard=unmap"];
    let unix = ["-k", socket.to_str().unwrap(), name];
    let Some(_unix) = spawn("qemu-nbd", &[&common[..], &unix[..]].concat()) else { return };
    let uri = format!("nbd+unix:///a%20disk?socket={}", socket.display());
    let (volume, _) = open_soon(&config(&uri, 0));
    let multi_conn = volume.multi_conn();
    drop(volume);
    exercise(&uri, Some(&image), multi_conn);
    let wrong = NbdVolume::open(&config(&uri.replace("disk", "dusk"), 0)).unwrap_err();
    assert!(matches!(wrong, Error::Refused { .. }), "{wrong}");
    let port = free_port().to_string();
    let tcp = ["-b", "127.0.0.1", "-p", &port, name];
    let Some(_tcp) = spawn("qemu-nbd", &[&common[..], &tcp[..]].concat()) else { return };
    exercise(&format!("nbd://127.0.0.1:{port}/a%20disk"), Some(&image), multi_conn);
}

#[test]
fn nbdkit_agrees_with_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nbdkit.sock");
    let port = free_port().to_string();
    let unix = ["-f", "-U", socket.to_str().unwrap(), "memory", "4M"];
    let Some(_unix) = spawn("nbdkit", &unix) else { return };
    exercise(&format!("nbd+unix:///?socket={}", socket.display()), None, true);
    let Some(_tcp) = spawn("nbdkit", &["-f", "-i", "127.0.0.1", "-p", &port, "--no-sr", "memory", "4M"])
    else {
        return;
    };
    exercise(&format!("nbd://localhost:{port}"), None, true);
}

/// The rule of the ledger with a server of the world: nbdkit's memory goes with it.
#[test]
fn nbdkit_killed_and_restarted_fails_the_next_flush() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nbdkit.sock");
    let args = ["-f", "-U", socket.to_str().unwrap(), "memory", "4M"];
    let Some(server) = spawn("nbdkit", &args) else { return };
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let (volume, _) = open_soon(&config(&uri, 60));
    let mut bench = Bench::new();
    let ops = bench.attach(&volume);
    bench.write(&ops, 0, &[9; 4096], false).unwrap();
    drop(server);
    let _ = std::fs::remove_file(&socket);
    let Some(_server) = spawn("nbdkit", &args) else { return };
    assert_eq!(bench.read(&ops, 0, 4096).unwrap(), [0; 4096]);
    assert_eq!(bench.flush(&ops), Err(Errno::EIO));
    assert_eq!(bench.flush(&ops), Ok(()));
    bench.finish(ops);
}
