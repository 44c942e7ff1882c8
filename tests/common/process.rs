//! A server's process beside the service.

use super::eventually;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// It does not outlive the test.
pub struct Running(Child);

impl Running {
    /// Starts it, and waits until it listens.
    pub fn start(program: &str, args: &[&str], listens: impl Fn() -> bool) -> Running {
        let child = Command::new(program).args(args).stdin(Stdio::null()).spawn().unwrap();
        let running = Running(child);
        eventually("the server listens", listens);
        running
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether one can connect there.
pub fn on_unix(path: &Path) -> impl Fn() -> bool {
    let path = path.to_owned();
    move || UnixStream::connect(&path).is_ok()
}

/// Whether one can connect there.
pub fn on_tcp(port: u16) -> impl Fn() -> bool {
    move || TcpStream::connect(("127.0.0.1", port)).is_ok()
}

/// Nobody has it just now.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
