//! The real service: the binary, started as a user would, in a directory of its own.

use super::{PATIENCE, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ringblk::service::client::Client;
use ringblk::service::status::Status;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, Once};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The vhost crate waits for answers without end, so a service that gives none would hang a test for good.
fn limit_this_program() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        std::thread::spawn(|| {
            std::thread::sleep(8 * PATIENCE);
            eprintln!("a test hangs: giving up on this program");
            std::process::abort();
        });
    });
}

/// What a service is to be started with.
pub struct Setup {
    dir: TempDir,
    args: Vec<OsString>,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup::new()
    }
}

impl Setup {
    /// Nothing yet but a control socket.
    pub fn new() -> Setup {
        let dir = tempfile::Builder::new().prefix("ringblk-").tempdir().unwrap();
        let args = vec!["serve".into(), "--control".into(), dir.path().join("control.sock").into()];
        Setup { dir, args }
    }

    /// Where its sockets are.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// An empty image on a disk: where the build is, since the system's temporary directory may be in memory.
    pub fn image(&self, bytes: u64) -> PathBuf {
        let name = self.dir.path().file_name().unwrap().to_str().unwrap();
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.img"));
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    /// Any arguments.
    pub fn args<const N: usize>(mut self, args: [&str; N]) -> Setup {
        self.args.extend(args.map(OsString::from));
        self
    }

    /// `--volume name=what`
    pub fn volume(self, name: &str, what: &str) -> Setup {
        self.args(["--volume", &format!("{name}={what}")])
    }

    /// `--vhost-user volume=DIR/socket,options`
    pub fn vhost_user(self, volume: &str, socket: &str, options: &str) -> Setup {
        let comma = if options.is_empty() { "" } else { "," };
        let path = self.path(socket);
        self.args(["--vhost-user", &format!("{volume}={}{comma}{options}", path.display())])
    }

    /// The command, for who wants to change something about it.
    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringblk"));
        command.args(&self.args).stdin(Stdio::null());
        self.dress(&mut command);
        command
    }

    fn dress(&self, command: &mut Command) {
        command.env_remove("RUST_LOG").env_remove("LISTEN_FDS").env_remove("LISTEN_PID");
        command.stdout(Stdio::null()).stderr(Stdio::piped());
    }

    /// The arguments, for a command that is not ours.
    pub fn arguments(&self) -> &[OsString] {
        &self.args
    }

    /// Starts it and waits until it serves.
    pub fn start(self) -> Service {
        let command = self.command();
        self.start_as(command)
    }

    /// The same by another command.
    pub fn start_as(self, mut command: Command) -> Service {
        limit_this_program();
        self.dress(&mut command);
        let log = Arc::new(Mutex::new(String::new()));
        let (child, reader) = spawn(command, &log);
        let mut service = Service {
            child,
            setup: self,
            log,
            reader: Some(reader),
            ended: None,
            may_complain: false,
            code: 0,
        };
        service.await_start();
        service
    }

    /// Runs it to its end, which must come by itself: its exit status and what it said.
    pub fn refused(&self) -> (i32, String) {
        let output = self.command().output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    }
}

/// Starts a command whose standard error becomes the log.
fn spawn(mut command: Command, log: &Arc<Mutex<String>>) -> (Child, JoinHandle<()>) {
    let mut child = command.spawn().unwrap();
    let mut stderr = child.stderr.take().unwrap();
    let inside = log.clone();
    let reader = std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = stderr.read(&mut bytes) {
            inside.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    });
    (child, reader)
}

/// A running service. Dropping it stops it and asserts that it had nothing to complain of.
pub struct Service {
    child: Child,
    setup: Setup,
    log: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
    ended: Option<ExitStatus>,
    may_complain: bool,
    code: i32,
}

impl Service {
    /// Errors in its log are what this test wants.
    pub fn may_complain(mut self) -> Service {
        self.may_complain = true;
        self
    }

    /// It is to end with another exit status than 0.
    pub fn ends_with(mut self, code: i32) -> Service {
        self.code = code;
        self
    }

    /// A file of its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.setup.path(name)
    }

    /// It answers on the control socket when everything is there.
    fn await_start(&mut self) {
        let start = Instant::now();
        while Client::new(self.control()).status().is_err() {
            if let Some(status) = self.child.try_wait().unwrap() {
                self.ended = Some(status);
                panic!("the service ended with {status}:\n{}", self.log());
            }
            assert!(start.elapsed() < PATIENCE, "the service does not answer:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends it by a signal, and starts it again as it was.
    pub fn restart(&mut self, signal: Signal) {
        self.signal(signal);
        self.wait();
        self.restart_dead();
    }

    /// Starts it again after its end.
    pub fn restart_dead(&mut self) {
        let (child, reader) = spawn(self.setup.command(), &self.log);
        (self.child, self.reader, self.ended) = (child, Some(reader), None);
        self.await_start();
    }

    /// Its control socket.
    pub fn control(&self) -> PathBuf {
        self.path("control.sock")
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it tells about itself.
    pub fn status(&self) -> Status {
        Client::new(self.control()).status().unwrap()
    }

    /// What it logged.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        if let Some(status) = self.ended {
            return status;
        }
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if start.elapsed() > PATIENCE {
                let _ = self.child.kill();
                panic!("the service does not end:\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        self.ended = Some(status);
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        status
    }

    /// Ends it by SIGTERM: status 0, and none of its sockets left. What it logged.
    pub fn stop(mut self) -> String {
        self.terminate();
        self.log()
    }

    /// The same, where `path` is expected to stay: it is moved to `to`, out of the directory that goes now.
    pub fn stop_keeping(mut self, path: &Path, to: &Path) {
        self.signal(Signal::SIGTERM);
        self.wait();
        fs::rename(path, to).unwrap();
    }

    fn terminate(&mut self) {
        if self.ended.is_none() {
            self.signal(Signal::SIGTERM);
        }
        let status = self.wait();
        let log = self.log();
        assert_eq!(status.code(), Some(self.code), "the service ended with {status}:\n{log}");
        let left: Vec<_> = fs::read_dir(self.setup.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap())
            .filter(|entry| {
                use std::os::unix::fs::FileTypeExt;
                entry.file_type().unwrap().is_socket()
            })
            .map(|entry| entry.file_name())
            .collect();
        assert!(left.is_empty(), "sockets left behind: {left:?}");
        assert!(!log.contains("panicked"), "{log}");
        assert!(self.may_complain || !log.contains(" ERROR "), "{log}");
    }

    /// Clock ticks of CPU time so far, of all threads.
    pub fn cpu_ticks(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        // The name is in parentheses and may hold anything; utime and stime are fields 14 and 15.
        let rest = stat.rsplit_once(')').unwrap().1;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    /// Open descriptors.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// Descriptors that its rings poll, which keep files open that are closed otherwise.
    pub fn polls(&self) -> usize {
        let fds = fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        let rings = fds.map(|entry| entry.unwrap()).filter(|entry| {
            fs::read_link(entry.path()).is_ok_and(|target| target.as_os_str() == "anon_inode:[io_uring]")
        });
        let polls = |entry: fs::DirEntry| {
            let number = entry.file_name();
            let path = Path::new("/proc").join(self.pid().to_string()).join("fdinfo").join(number);
            // One line for each after this heading, "  op=..., task_works=...".
            let info = fs::read_to_string(path).unwrap();
            let list = info.split_once("PollList:").expect("the kernel lists what a ring polls").1;
            list.lines().skip(1).take_while(|line| line.trim_start().starts_with("op=")).count()
        };
        rings.map(polls).sum()
    }

    /// Mappings.
    pub fn mappings(&self) -> usize {
        fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap().lines().count()
    }

    /// Resident memory in KiB, without what it shares with us (guest memory).
    pub fn anonymous_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Waits until the export on `socket` has no VMM.
    pub fn await_free(&self, socket: &str) {
        let path = self.path(socket);
        let free = |status: &Status| {
            status.exports.iter().all(|export| match export {
                ringblk::service::status::ExportStatus::VhostUser(export) => {
                    export.socket != path || !export.connected
                }
                ringblk::service::status::ExportStatus::Ublk(_) => true,
            })
        };
        eventually("the VMM's leaving is noticed", || free(&self.status()));
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.child.kill();
            let _ = self.child.wait();
            eprintln!("the service's log:\n{}", self.log());
        } else {
            self.terminate();
        }
        let name = self.setup.dir.path().file_name().unwrap().to_str().unwrap();
        let _ = fs::remove_file(Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.img")));
    }
}
