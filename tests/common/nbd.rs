//! nbdkit as a store: memory that is lost with it, and a log of what it was asked for.

use super::eventually;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

/// Whether there is one to be had.
pub fn server() -> Result<(), String> {
    let found = Command::new("nbdkit").arg("--version").stdout(Stdio::null()).status();
    if found.is_ok_and(|status| status.success()) { Ok(()) } else { Err("nbdkit is not installed".into()) }
}

/// A running server, on a Unix socket.
pub struct Server {
    dir: TempDir,
    arguments: Vec<String>,
    process: Child,
}

impl Server {
    /// 16 MiB of zeroes, through these filters (and their parameters, which do not begin with a dash).
    pub fn start(filters: &[&str]) -> Server {
        Server::of(&["memory", "16M"], filters)
    }

    /// What a plugin has, given with its parameters.
    pub fn of(plugin: &[&str], filters: &[&str]) -> Server {
        let dir = tempfile::Builder::new().prefix("ringblk-nbd-").tempdir().unwrap();
        let log = dir.path().join("log");
        let (filters, parameters): (Vec<&str>, Vec<&str>) =
            filters.iter().partition(|argument| argument.starts_with("--"));
        let mut arguments: Vec<String> = filters.into_iter().map(String::from).collect();
        arguments.push("--filter=log".into());
        arguments.extend(plugin.iter().map(|argument| String::from(*argument)));
        arguments.extend(parameters.into_iter().map(String::from));
        arguments.extend([format!("logfile={}", log.display()), "logappend=true".into()]);
        let process = spawn(&dir.path().join("socket"), &arguments);
        Server { dir, arguments, process }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// For `--volume`.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket().display())
    }

    /// It goes, with all that it had.
    pub fn crash(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        let _ = fs::remove_file(self.socket());
    }

    /// Another one takes its place.
    pub fn start_again(&mut self) {
        self.process = spawn(&self.socket(), &self.arguments);
    }

    fn lines(&self) -> Vec<String> {
        fs::read_to_string(self.dir.path().join("log"))
            .unwrap_or_default()
            .lines()
            .map(String::from)
            .collect()
    }

    /// The first line of the log that has these parts, in their order: they are separated by `*`. The server writes it in its
    /// own time.
    pub fn find(&self, parts: &str) -> Option<String> {
        let has = |line: &String| {
            let mut rest = line.as_str();
            parts.split('*').all(|part| rest.find(part).map(|at| rest = &rest[at + part.len()..]).is_some())
        };
        self.lines().into_iter().find(has)
    }

    /// Connections so far.
    pub fn connections(&self) -> usize {
        self.lines().iter().filter(|line| line.contains(" Connect ")).count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn spawn(socket: &Path, arguments: &[String]) -> Child {
    let mut command = Command::new("nbdkit");
    command.args(["-f", "-U"]).arg(socket).args(arguments).stdin(Stdio::null()).stderr(Stdio::null());
    let process = command.spawn().unwrap();
    eventually("the NBD server listens", || socket.exists());
    process
}
