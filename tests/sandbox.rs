//! What a running service has given up: as the kernel tells it of the real one, and as a program that has given up the
//! same finds out.

mod common;

use common::eventually;
use common::service::{Service, Setup};
use common::trial::{installed, run_trials, trial};
use common::vmm::everyday;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::unistd::Pid;
use ringblk::service::config::SandboxMode;
use ringblk::service::sandbox::{self, Plan};
use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};

fn main() -> ExitCode {
    if let Ok(role) = std::env::var(ROLE) {
        inside(&role);
        return ExitCode::SUCCESS;
    }
    run_trials(vec![
        trial("a_service_keeps_no_rights_it_does_not_need", Ok(()), |()| {
            a_service_keeps_no_rights_it_does_not_need()
        }),
        trial("a_service_told_to_goes_without", Ok(()), |()| a_service_told_to_goes_without()),
        trial("it_tidies_up_after_itself", Ok(()), |()| it_tidies_up_after_itself()),
        trial("an_nbd_server_is_found_again", installed("nbdkit"), |()| an_nbd_server_is_found_again()),
        trial("other_system_calls_are_refused", Ok(()), |()| other_system_calls_are_refused()),
        trial("running_a_program_ends_the_process", Ok(()), |()| running_a_program_ends_the_process()),
        trial("a_ublk_service_may_still_manage_its_devices", Ok(()), |()| {
            a_ublk_service_may_still_manage_its_devices()
        }),
        trial("other_files_and_ports_are_refused", landlock(), |()| other_files_and_ports_are_refused()),
        trial("a_plan_names_what_the_configuration_needs", Ok(()), |()| {
            a_plan_names_what_the_configuration_needs()
        }),
    ])
}

/// A line of `/proc/PID/status`.
fn kernel_says(service: &Service, key: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{}/status", service.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.unwrap().trim().to_owned()
}

/// Of `linux/capability.h`.
const CAP_IPC_LOCK: u32 = 14;

fn serve(mode: Option<&str>) -> Service {
    let setup = Setup::new().volume("a", "memory:1M").vhost_user("a", "a.sock", "");
    match mode {
        Some(mode) => setup.args(["--sandbox", mode]),
        None => setup,
    }
    .start()
}

fn a_service_keeps_no_rights_it_does_not_need() {
    for mode in [None, Some("log")] {
        let service = serve(mode);
        assert_eq!(kernel_says(&service, "Seccomp"), "2");
        assert_eq!(kernel_says(&service, "NoNewPrivs"), "1");
        let left = if nix::unistd::geteuid().is_root() { 1 << CAP_IPC_LOCK } else { 0 };
        for (set, expected) in [("CapEff", left), ("CapPrm", left), ("CapInh", 0), ("CapAmb", 0)] {
            assert_eq!(u64::from_str_radix(&kernel_says(&service, set), 16), Ok(expected), "{set}");
        }
        // Its threads too, the workers before all.
        for task in fs::read_dir(format!("/proc/{}/task", service.pid())).unwrap() {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            assert!(
                status.contains("Seccomp:\t2") && status.contains(&format!("CapEff:\t{left:016x}")),
                "{status}"
            );
        }
        let told = service.status().sandbox;
        assert_eq!(told.mode, mode.unwrap_or("on"));
        assert_eq!(told.seccomp, if mode.is_none() { "refuse" } else { "log" });
        assert_eq!(told.capabilities, if left > 0 { vec!["cap_ipc_lock"] } else { vec![] });
        assert!(service.log().contains("sandbox: "), "{}", service.log());
        service.stop();
    }
}

fn a_service_told_to_goes_without() {
    let service = serve(Some("off"));
    assert_eq!(kernel_says(&service, "Seccomp"), "0");
    assert_eq!(kernel_says(&service, "NoNewPrivs"), "0");
    let own = fs::read_to_string("/proc/self/status").unwrap();
    assert!(own.contains(&format!("CapEff:\t{}", kernel_says(&service, "CapEff"))), "unlike ours");
    assert_eq!(service.status().sandbox.mode, "off");
    service.stop();
}

/// The socket's directory is still ours to tidy, and a volume whose file is gone does not matter.
fn it_tidies_up_after_itself() {
    let service = serve(None);
    let socket = service.path("a.sock");
    assert!(socket.exists());
    service.stop();
    eventually("the socket is gone", || !socket.exists());
}

/// A server that comes back is found again, by name and over TCP: after the volume was opened that takes sockets,
/// threads and the files of the C library's resolver.
fn an_nbd_server_is_found_again() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port().to_string();
    drop(free);
    let serve =
        || Command::new("nbdkit").args(["-f", "-i", "127.0.0.1", "-p", &port, "memory", "1M"]).spawn();
    let mut server = serve().unwrap();
    eventually("the server listens", || TcpStream::connect(format!("127.0.0.1:{port}")).is_ok());
    let setup = Setup::new().args(["--workers", "1"]);
    let volume = format!("nbd:nbd://localhost:{port}/,reconnect=60");
    let service = setup.volume("a", &volume).vhost_user("a", "a", "").start();
    let (_vmm, mut queue) = everyday(&service.path("a"));
    assert_eq!(queue.read(8, 1), (0, vec![0; 512]));
    server.kill().unwrap();
    server.wait().unwrap();
    let mut server = serve().unwrap();
    assert_eq!(queue.write(8, &[8; 512]), 0);
    assert_eq!(queue.read(8, 1), (0, vec![8; 512]));
    assert!(service.log().contains("connected"), "{}", service.log());
    drop(queue);
    service.stop();
    server.kill().unwrap();
    server.wait().unwrap();
}

const ROLE: &str = "RINGBLK_TEST_SANDBOX";

/// Runs [`inside`] in a program of its own, since there is no way back.
fn run(mode: &str, what: &str) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(ROLE, format!("{mode} {what}"));
    command.output().unwrap()
}

fn found(mode: &str, what: &str) -> String {
    let output = run(mode, what);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let answer = text.split_once("found ").and_then(|(_, rest)| rest.lines().next());
    answer.unwrap_or_else(|| panic!("{mode} {what}: {output:?}")).to_owned()
}

/// What the tests start: enters the sandbox and tries something.
fn inside(role: &str) {
    let (mode, what) = role.split_once(' ').unwrap();
    let plan = Plan {
        mode: mode.parse().unwrap(),
        read: vec!["/etc/hostname".into()],
        ports: if what == "connect" { vec![9] } else { Vec::new() },
        ublk: what == "ublk",
        ..Plan::default()
    };
    let status = sandbox::enter(&plan).unwrap();
    let errno = |result: std::io::Result<()>| match result {
        Ok(()) => "ok".to_owned(),
        Err(error) => format!("{:?}", Errno::from_raw(error.raw_os_error().unwrap())),
    };
    println!(
        "found {}",
        match what {
            "socket" => {
                let made = socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None);
                errno(made.map(drop).map_err(Into::into))
            }
            "open" => errno(fs::File::open("/etc/passwd").map(drop)),
            "open-named" => errno(fs::File::open("/etc/hostname").map(drop)),
            "connect" => errno(TcpStream::connect("127.0.0.1:1").map(drop)),
            "group" => errno(nix::unistd::setpgid(Pid::this(), Pid::this()).map_err(Into::into)),
            "thread" => errno(std::thread::Builder::new().spawn(|| {}).map(|thread| thread.join().unwrap())),
            "chmod" =>
                errno(fs::set_permissions("/dev/null", fs::metadata("/dev/null").unwrap().permissions())),
            "exec" => {
                use std::os::unix::process::CommandExt;
                errno(Err(Command::new("/bin/true").exec()))
            }
            "ublk" => status.capabilities.join(","),
            "landlock" => status.landlock_abi.unwrap_or(0).to_string(),
            other => panic!("{other}"),
        }
    );
}

fn other_system_calls_are_refused() {
    for what in ["socket", "group", "chmod"] {
        assert_eq!(found("on", what), "EPERM", "{what}");
        assert_eq!(found("off", what), "ok", "{what}");
        assert_eq!(found("log", what), "ok", "{what}");
    }
    assert_eq!(found("on", "thread"), "ok");
}

fn running_a_program_ends_the_process() {
    use std::os::unix::process::ExitStatusExt;
    let status = run("on", "exec").status;
    assert_eq!(status.signal().or(status.code().map(|code| code - 128)), Some(libc::SIGSYS), "{status}");
    assert!(run("off", "exec").status.success());
}

fn a_ublk_service_may_still_manage_its_devices() {
    let root = nix::unistd::geteuid().is_root();
    assert_eq!(found("on", "ublk"), if root { "cap_ipc_lock,cap_sys_admin" } else { "" });
}

fn landlock() -> Result<(), String> {
    if found("on", "landlock") == "0" { Err("this kernel has no landlock".into()) } else { Ok(()) }
}

fn other_files_and_ports_are_refused() {
    assert_eq!(found("on", "open"), "EACCES");
    assert_eq!(found("on", "connect"), "EACCES");
    assert_eq!(found("log", "open"), "EACCES");
    assert_eq!(found("on", "open-named"), found("off", "open-named"));
    assert_eq!(found("off", "open"), "ok");
}

/// Nothing in it is a secret of this machine's: the plan of a configuration, spelled out.
fn a_plan_names_what_the_configuration_needs() {
    let mut loader = ringblk::service::config::Loader::new();
    for volume in
        ["a=file:/srv/a.img", "b=file:/srv/b.img,read-only=on", "c=nbd:nbd://h:7/x", "d=nbd:nbd://[::1]/x"]
    {
        loader.add_volume_flag(volume).unwrap();
    }
    loader.add_vhost_user_flag("a=/run/x/a.sock").unwrap();
    loader.set_control("/run/y/control.sock".into());
    loader.set_sandbox(SandboxMode::Log);
    let plan = Plan::of(&loader.finish().unwrap());
    let paths = |list: &[&str]| list.iter().map(PathBuf::from).collect::<Vec<_>>();
    assert_eq!((plan.mode, plan.ublk, plan.names), (SandboxMode::Log, false, true));
    assert_eq!((plan.write, plan.read), (paths(&["/srv/a.img"]), paths(&["/srv/b.img"])));
    assert_eq!(plan.remove_in, [Path::new("/run/x"), Path::new("/run/y")]);
    assert_eq!(plan.ports, [7, 53, 10809]);
}
