//! ringblk as a process that may die at any moment and is started again.

use super::report::{Report, Wrong};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How to start it.
pub struct Program {
    pub path: PathBuf,
    pub args: Vec<OsString>,
    /// All of its lives write here.
    pub log: PathBuf,
}

/// It, or what is left of it.
pub struct Service {
    program: Program,
    child: Child,
}

impl Program {
    fn spawn(&self) -> Child {
        let log = OpenOptions::new().create(true).append(true).open(&self.log);
        let log = log.map_or_else(|_| Stdio::null(), Stdio::from);
        let mut command = Command::new(&self.path);
        command
            .args(&self.args)
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        command.spawn().expect("ringblk can be started")
    }

    /// Starts it, and does not wait for it to serve.
    pub fn start(self) -> Service {
        let child = self.spawn();
        Service { program: self, child }
    }
}

impl Service {
    /// Kills it and waits until it is dead.
    pub fn kill(&mut self) {
        // It may be dead already.
        let _ = self.child.kill();
        self.child.wait().expect("our own child");
    }

    /// Starts it again. Whatever ran before must be dead.
    pub fn start(&mut self) {
        self.child = self.program.spawn();
    }

    /// Starts it again where it ended by itself, since the kernel may hold what its predecessor had for a while.
    pub fn revive(&mut self, report: &Report) {
        if self.ended().is_some() {
            report.refused();
            eprintln!("soak: a start was refused: {}", self.log_tail().lines().last().unwrap_or_default());
            std::thread::sleep(Duration::from_millis(10));
            self.start();
        }
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("our own child")
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        // It may be dead already.
        let _ = kill(Pid::from_raw(self.child.id() as i32), signal);
    }

    /// Asks it to end, and waits until it has. One that will not, or complains, is noted; one that will not is killed.
    pub fn stop(&mut self, limit: Duration, report: &Report) {
        let began = Instant::now();
        self.signal(Signal::SIGTERM);
        loop {
            match self.ended() {
                Some(status) if status.success() => return,
                Some(status) => return report.wrong(Wrong::Error, format!("it stopped with {status}")),
                None if began.elapsed() > limit => {
                    report.wrong(Wrong::Hang, format!("it does not stop within {limit:?}"));
                    return self.kill();
                }
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// A command of the same program: whether it succeeded, and what it said.
    pub fn command(&self, args: &[&str]) -> Result<(), String> {
        let output =
            Command::new(&self.program.path).args(args).output().map_err(|error| error.to_string())?;
        match output.status.success() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        }
    }

    /// The last lines it logged.
    pub fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(&self.program.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.kill();
    }
}

/// An empty image.
pub fn image(path: &std::path::Path, bytes: u64) -> File {
    let file = File::create(path).expect("an image can be made");
    file.set_len(bytes).expect("an image can be made");
    file
}
