//! What cannot work names its cause and the way out, and asks for no more than it needs: limits of the process, what
//! the system forbids, who may do what, and what signals ask for. What needs root, a kernel or a tool that is not there is
//! listed as ignored, with the reason on standard error.

mod common;

use common::model::{Op, Queue};
use common::nbd::Server;
use common::service::{Service, Setup};
use common::trial::{run_trials, trial};
use common::vmm::everyday;
use common::{PATIENCE, eventually};
use nix::sys::signal::Signal;
use nix::unistd::Uid;
use ringblk::service::client::{Client, ClientError};
use ringblk::service::status::Stop;
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::CapabilitySet;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

const OK: u8 = 0;

fn main() -> ExitCode {
    let none = || Ok(());
    let trials = vec![
        trial("io_uring_that_is_filtered_is_named", none(), |()| filtered()),
        trial("lockable_memory_that_is_missing_is_named", counts_rings(), |()| lockable()),
        trial("the_soft_limit_on_open_files_is_raised", none(), |()| open_files()),
        trial("others_are_turned_away_by_the_control_socket", root(), |()| turned_away()),
        trial("another_user_serves_with_a_control_socket_of_his_own", root(), |()| another_user()),
        trial("signals_within_a_moment_are_one", none(), |()| twice()),
        trial("a_closing_terminal_ends_nothing", none(), |()| hangup()),
        trial("a_second_signal_gives_up_and_a_request_does_not", common::nbd::server(), |()| second_signal()),
        trial("a_stop_flushes", common::nbd::server(), |()| last_flush()),
        trial("each_error_of_a_store_leaves_a_line", common::nbd::server(), |()| store_errors()),
        trial("a_second_vmm_is_listed", none(), |()| second_vmm()),
        trial("one_socket_is_as_good_as_another_to_those_who_wait", none(), |()| impatient()),
        trial("every_refusal_of_serve_has_a_way_out", none(), |()| refusals()),
        trial("a_volume_that_cannot_be_opened_may_be_left_out", none(), |()| left_out()),
    ];
    run_trials(trials)
}

fn root() -> Result<(), String> {
    if Uid::effective().is_root() { Ok(()) } else { Err("not root".into()) }
}

/// Linux counts rings as locked memory from 6.14 on.
fn counts_rings() -> Result<(), String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").map_err(|error| error.to_string())?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse::<u32>().ok());
    let release = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if release >= (6, 14) { Ok(()) } else { Err("this kernel does not count rings".into()) }
}

/// A plain service, and what is in its directory otherwise.
fn plain() -> Setup {
    Setup::new().volume("v", "memory:1M").vhost_user("v", "v", "")
}

fn nothing_is_left(setup: &Setup) {
    assert_eq!(fs::read_dir(setup.path("")).unwrap().count(), 0);
}

/// What a command says that fails.
fn refused(mut command: Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    error
}

/// Has `call` fail with `errno` in the command, as the filter of a container does.
fn forbid(command: &mut Command, call: libc::c_long, errno: i32) {
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let refuse = SeccompAction::Errno(errno as u32);
    let filter = SeccompFilter::new([(call, vec![])].into(), SeccompAction::Allow, refuse, arch).unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    // SAFETY: two system calls, and no memory is allocated.
    unsafe {
        command.pre_exec(move || seccompiler::apply_filter(&program).map_err(|_| io::ErrorKind::Other.into()))
    };
}

fn filtered() {
    let calls = [libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register];
    for call in calls {
        for errno in [libc::EPERM, libc::ENOSYS, libc::EACCES] {
            let setup = plain();
            let mut command = setup.command();
            forbid(&mut command, call, errno);
            let error = refused(command);
            assert!(
                error.contains("io_uring: ") && error.contains("seccomp filter"),
                "{call} {errno}: {error}"
            );
            nothing_is_left(&setup);
        }
    }
    // Jobs on images, and the report.
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    // Which register nothing.
    for call in [libc::SYS_io_uring_setup, libc::SYS_io_uring_enter] {
        let mut create = Command::new(env!("CARGO_BIN_EXE_ringblk"));
        create.args(["image", "create"]).arg(&image).arg("1M");
        forbid(&mut create, call, libc::EPERM);
        assert!(refused(create).contains("seccomp filter"));
        assert!(!image.exists());
    }
    let mut features = Command::new(env!("CARGO_BIN_EXE_ringblk"));
    features.arg("features");
    forbid(&mut features, libc::SYS_io_uring_setup, libc::EPERM);
    let text = String::from_utf8(features.output().unwrap().stdout).unwrap();
    assert!(text.contains("seccomp filter"), "{text}");
}

/// Without the right that goes beyond a limit.
fn limit(command: &mut Command, resource: Resource, soft: u64, hard: u64) {
    // SAFETY: system calls.
    unsafe {
        command.pre_exec(move || {
            setrlimit(resource, Rlimit { current: Some(soft), maximum: Some(hard) })?;
            let dropped = rustix::thread::remove_capability_from_bounding_set(CapabilitySet::IPC_LOCK);
            // Who is not root does not have it.
            dropped.or_else(|error| if error == rustix::io::Errno::PERM { Ok(()) } else { Err(error) })?;
            Ok(())
        })
    };
}

fn lockable() {
    // For the control API's ring, and for a worker's.
    for kib in [4, 64] {
        let setup = plain();
        let mut command = setup.command();
        limit(&mut command, Resource::Memlock, kib << 10, kib << 10);
        let error = refused(command);
        let words =
            ["io_uring: ", "RLIMIT_MEMLOCK (ulimit -l", &format!("may have {kib} KiB"), " KiB of lockable"];
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
        nothing_is_left(&setup);
    }
}

fn open_files() {
    let mut setup = Setup::new().volume("v", "null:1M").args(["--workers", "1"]);
    for number in 0..64 {
        setup = setup.vhost_user("v", &number.to_string(), "");
    }
    let mut command = setup.command();
    limit(&mut command, Resource::Nofile, 64, 4096);
    let service = setup.start_as(command);
    let limits = fs::read_to_string(format!("/proc/{}/limits", service.pid())).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert!(files.split_whitespace().eq(["Max", "open", "files", "4096", "4096", "files"]), "{files}");
    // And where that is not enough, it is named.
    let setup = plain();
    let mut command = setup.command();
    limit(&mut command, Resource::Nofile, 12, 12);
    let error = refused(command);
    assert!(error.contains("ulimit -n"), "{error}");
    nothing_is_left(&setup);
}

/// Asks as another user: on a thread, to which Linux gives a user of its own.
fn as_nobody<T: Send>(ask: impl FnOnce() -> T + Send) -> T {
    let nobody = rustix::process::Uid::from_raw(65534);
    std::thread::scope(|scope| {
        let asked = scope.spawn(move || {
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            ask()
        });
        asked.join().unwrap()
    })
}

fn open_to(path: &std::path::Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn turned_away() {
    let service = plain().start();
    open_to(&service.path(""), 0o755);
    let client = Client::new(service.control());
    let error = as_nobody(|| client.status()).unwrap_err();
    assert!(matches!(error, ClientError::Denied(_)), "{error}");
    assert!(error.to_string().contains("only root and the user who runs it may"), "{error}");
    // Somebody has opened it: it answers them no more than before.
    open_to(&service.control(), 0o666);
    for _ in 0..40 {
        let error = as_nobody(|| client.stop(&Stop::default())).unwrap_err();
        assert!(error.to_string().contains("only root may ask this service (403 Forbidden)"), "{error}");
    }
    assert!(!service.status().stopping);
    let turned_away = service.log().matches("turned away a client of user 65534").count();
    assert!((1..40).contains(&turned_away), "{turned_away}");
}

fn another_user() {
    // A directory that anybody may look into, for the program.
    let dir = tempfile::tempdir().unwrap();
    open_to(dir.path(), 0o777);
    let program = dir.path().join("ringblk");
    // By another process: while this one has the copy open for writing, a child of another test has it too, and what is
    // written to cannot be started.
    let copied =
        Command::new("cp").args([env!("CARGO_BIN_EXE_ringblk").as_ref(), program.as_os_str()]).status();
    assert!(copied.unwrap().success());
    let command = |args: &[&str]| {
        let mut command = Command::new(&program);
        command.args(args).uid(65534).gid(65534).current_dir(dir.path());
        command
    };
    let said = refused(command(&["serve", "--volume", "v=memory:1M", "--vhost-user", "v=v"]));
    assert!(said.contains("give --control SOCKET") && said.contains("/run/ringblk"), "{said}");
    // In a directory that anybody may write, and in one of its own.
    for mode in [0o777, 0o755] {
        open_to(dir.path(), mode);
        std::os::unix::fs::chown(dir.path(), Some(65534), None).unwrap();
        let export = ["--volume", "v=memory:1M", "--vhost-user", "v=v,owner=root"];
        let said = refused(command(&[&["serve", "--control", "c"], &export[..]].concat()));
        assert!(said.contains("cannot make user root (0) its owner"), "{said}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the program alone");
    }
    let said =
        refused(command(&["serve", "--check", "--volume", "v=memory:1M", "--vhost-user", "v=v,owner=root"]));
    assert!(said.contains("owner=root: only root") && said.contains("gives --control SOCKET"), "{said}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the program alone");
}

fn twice() {
    for step in 0..8 {
        let mut service = plain().start();
        service.signal(Signal::SIGTERM);
        std::thread::sleep(Duration::from_micros(250 * step));
        service.signal(Signal::SIGTERM);
        assert!(service.wait().success(), "{}", service.log());
    }
}

fn hangup() {
    let service = plain().start();
    service.signal(Signal::SIGHUP);
    eventually("it is told", || service.log().contains("SIGHUP is ignored"));
    assert_eq!(everyday(&service.path("v")).1.one(Op::Flush, &[]).0, OK);
    assert!(!service.status().stopping);
}

/// A service whose store holds a write for as long as anybody waits, and a server that has to be kept.
fn slow() -> (Service, Server) {
    let server = Server::start(&["--filter=delay", "wdelay=600"]);
    let service = Setup::new().volume("v", &format!("nbd:{}", server.uri())).vhost_user("v", "v", "").start();
    (service.ends_with(1).may_complain(), server)
}

fn second_signal() {
    for hand_over in [true, false] {
        let (mut service, _server) = slow();
        let (_vmm, mut queue) = everyday(&service.path("v"));
        queue.put(0, &[7; 512]);
        queue.submit(0, Op::Write { sector: 0, sectors: 1 });
        queue.kick();
        std::thread::sleep(Duration::from_millis(200));
        let client = Client::new(service.control());
        // Requests over the API are none of the signals that count; nor do they change what was asked for first.
        let stop = Stop { hand_over, ..Stop::default() };
        client.stop(&stop).unwrap();
        client.stop(&stop).unwrap();
        eventually("it stops", || service.status().stopping);
        let told = |result: Result<(), ClientError>| result.unwrap_err().to_string();
        let resize = client.resize("v", 4096, true).map(drop);
        assert!(told(resize).contains("the service refused: the service is stopping (409"), "resize");
        assert!(told(client.refresh("v", false).map(drop)).contains("the service is stopping"), "refresh");
        if !hand_over {
            let text = told(client.stop(&Stop { hand_over: true, ..stop }));
            assert!(text.contains("the service is stopping already, and its disks go with it"), "{text}");
        }
        // Several at once are one, and the first.
        for _ in 0..3 {
            service.signal(Signal::SIGTERM);
        }
        eventually("it is told", || service.log().contains("one more signal gives up"));
        std::thread::sleep(Duration::from_millis(1200));
        assert!(service.status().stopping && !service.log().contains("giving up"), "{}", service.log());
        let asked = Instant::now();
        service.signal(Signal::SIGTERM);
        service.wait();
        assert!(
            asked.elapsed() < PATIENCE
                && service.log().contains("giving up on what is in flight: vhost-user:")
        );
    }
}

fn last_flush() {
    let server = Server::start(&[]);
    let service = Setup::new().volume("v", &format!("nbd:{}", server.uri())).vhost_user("v", "v", "").start();
    let (_vmm, mut queue) = everyday(&service.path("v"));
    assert_eq!(queue.write(0, &[7; 512]), OK);
    assert!(server.find(" Flush ").is_none(), "nobody has flushed yet");
    service.stop();
    eventually("the last write is flushed", || server.find(" Flush ").is_some());
}

/// Every operation of a store that fails leaves a line, and a thousand leave few.
fn store_errors() {
    let mut server = Server::start(&["--filter=error", "error=ENOSPC", "error-rate=100%"]);
    let service = Setup::new().volume("v", &format!("nbd:{}", server.uri())).vhost_user("v", "v", "").start();
    let (_vmm, mut queue) = everyday(&service.path("v"));
    let at = |words: &str| format!("volume v: {words}: No space left on device (os error 28)");
    for (op, words) in [
        (Op::Read { sector: 8, sectors: 8 }, "read of 8 sectors at sector 8, tag 0"),
        (Op::Write { sector: 16, sectors: 8 }, "write of 8 sectors at sector 16, tag 0"),
        (Op::Discard { sector: 24, sectors: 8 }, "discard of 8 sectors at sector 24, tag 0"),
        (
            Op::WriteZeroes { sector: 32, sectors: 8, unmap: false },
            "write-zeroes of 8 sectors at sector 32, tag 0",
        ),
    ] {
        for _ in 0..100 {
            assert_ne!(queue.one(op, &[7; 4096]).0, OK, "{words}");
        }
        eventually(words, || service.log().contains(&at(words)));
        let lines = service.log().matches(words).count();
        assert!(lines < 50, "{words}: {lines} lines");
    }
    server.crash();
    assert_ne!(queue.one(Op::Flush, &[]).0, OK);
    eventually("the flush is told", || service.log().contains("volume v: flush, tag 0: "));
    // The last one of the service fails, too.
    drop(service.ends_with(1).may_complain());
}

/// What `ringblk list` shows.
fn list(service: &Service) -> String {
    let control = service.control();
    let output =
        Command::new(env!("CARGO_BIN_EXE_ringblk")).arg("list").arg("--control").arg(control).output();
    String::from_utf8(output.unwrap().stdout).unwrap()
}

fn second_vmm() {
    let service = plain().start();
    let first = everyday(&service.path("v"));
    let other = std::os::unix::net::UnixStream::connect(service.path("v")).unwrap();
    eventually("it is listed", || list(&service).contains("connected, and another VMM waits"));
    drop(other);
    eventually("it is gone", || !list(&service).contains("another VMM waits"));
    let _third = std::os::unix::net::UnixStream::connect(service.path("v")).unwrap();
    eventually("the next one is listed", || list(&service).contains("another VMM waits"));
    drop(first);
    eventually("it waits no more", || !list(&service).contains("another VMM waits"));
}

/// VMMs that wait and leave: those behind them are served all the same.
fn impatient() {
    let service = plain().start();
    let first = everyday(&service.path("v"));
    for _ in 0..20 {
        drop(std::os::unix::net::UnixStream::connect(service.path("v")).unwrap());
    }
    let socket = service.path("v");
    let second = std::thread::spawn(move || everyday(&socket).1.one(Op::Flush, &[]).0);
    eventually("it waits", || list(&service).contains("another VMM waits"));
    drop(first);
    assert_eq!(second.join().unwrap(), OK);
}

/// Whatever is the matter with it; and a check says the same beforehand, where it can know.
fn left_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    fs::write(path("qcow2"), [&b"QFI\xfb\0\0\0\x03"[..], &[0; 4096]].concat()).unwrap();
    fs::write(path("empty"), "").unwrap();
    for (volume, words) in [
        (format!("file:{}", path("none")), "none: cannot be opened"),
        (format!("file:{},required=yes", path("none")), "none: cannot be opened"),
        (format!("file:{}", path("empty")), "0 bytes are less than"),
        (format!("file:{},required=yes", path("qcow2")), "is a qcow2 image"),
        ("file:/dev/null".into(), "neither a regular file"),
        (format!("nbd:nbd+unix:///?socket={},required=yes", path("none")), "cannot connect"),
        (format!("nbd:nbds://127.0.0.1:1/,tls-ca={}", path("none")), "TLS: tls-ca "),
    ] {
        let setup = || plain().volume("w", &volume).vhost_user("w", "w", "");
        let (status, said) = setup().refused();
        let hint = "(required=no on this volume has the service begin without it, and try it again)";
        assert!(status == 1 && said.contains(words) && said.contains(hint), "{volume}: {said}");
        let check = setup().args(["--check"]).command().output().unwrap();
        let said = String::from_utf8(check.stderr).unwrap();
        assert_eq!(check.status.code(), Some(1), "{volume}: {said}");
        let spared = volume.replace(",required=yes", "") + ",required=no";
        let service = plain().volume("w", &spared).vhost_user("w", "w", "").start();
        let waits =
            |name: &str| service.status().volumes.iter().any(|v| v.name == name && v.unavailable.is_some());
        assert!(waits("w") && !waits("v"), "{volume}");
    }
}

fn refusals() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let control = path("c");
    let good = ["--volume", "v=memory:1M", "--vhost-user", &format!("v={}", path("v"))].map(String::from);
    let serve = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringblk"));
        command.arg("serve").args(more).stdin(Stdio::null());
        if !more.contains(&"--control") {
            command.args(["--control", &control]);
        }
        let output = command.output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let [a, b, c, d] = &good;
    for (args, code, words) in [
        (&["--volume", "v=memory:1M", "--vhost-user", "v=@v"][..], 2, "an abstract socket has no owner"),
        (&[a, b, c, d, "--control", "@c"], 2, "an abstract socket"),
        (&["--volume", "v=memory:1Q", c, d], 2, "K, M, G, T, P or E"),
        (&["--volume", "v=null:9E", c, d], 2, "more than a block device can have"),
        (&["--volume", "v=file:/no/such/image", c, d], 1, "/no/such/image"),
        (&[a, b, "--vhost-user", "v=/no/such/dir/v"], 1, "/no/such/dir"),
        (&[a, b, "--vhost-user", "w=/x"], 2, "there is no volume \"w\""),
        (&[a, b], 2, "nothing to serve"),
    ] {
        let (status, error) = serve(args);
        assert!(status == code && error.contains(words), "{args:?}: {status}: {error}");
    }
    // Commands that ask take no other sockets than those that are made.
    for args in
        [&["list", "--control", "@c"][..], &["stop", "--control", "@c"], &["resume", "v", "--control", "@c"]]
    {
        let output = Command::new(env!("CARGO_BIN_EXE_ringblk")).args(args).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && error.contains("abstract"), "{args:?}: {error}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
