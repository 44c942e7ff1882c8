//! The soak: a disk under load that is checked, block by block, against a log of what was written, while ringblk is
//! killed again and again. `scripts/soak` runs it; `cargo test` runs a short one, and shows that it can fail.

#[path = "../common/mod.rs"]
mod common;
mod disk;
mod guest;
mod keeper;
mod load;
mod log;
mod losses;
mod native;
mod queue;
mod report;
mod round;
mod selftest;
mod service;
mod stamp;
mod store;
mod volume;

use clap::Parser;
use common::profile::{PROFILES, Profile};
use report::Report;
use service::Program;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};

/// Kill ringblk under load and prove that nothing is lost.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
    /// How often to kill ringblk
    #[arg(long, global = true, default_value_t = 0)]
    kills: u64,
    /// How often to restart it as planned (with `native`, that is left to chance)
    #[arg(long, global = true, default_value_t = 0)]
    stops: u64,
    /// The same seed asks for the same things
    #[arg(long, global = true, default_value_t = 1)]
    seed: u64,
    /// The longest that anything may take
    #[arg(long, global = true, default_value_t = 30, value_name = "SECONDS")]
    limit: u64,
    /// Write the counts here, too
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(clap::Subcommand)]
enum What {
    /// Over vhost-user, with a VMM of our own
    Native {
        #[arg(long, default_value = env!("CARGO_BIN_EXE_ringblk"))]
        ringblk: PathBuf,
        /// Where the images are
        #[arg(long, default_value = env!("CARGO_TARGET_TMPDIR"))]
        dir: PathBuf,
        /// Let no VMM know what was in flight; each is killed together with ringblk
        #[arg(long)]
        no_inflight: bool,
        /// Play these VMMs only (may be repeated; default: all that are known)
        #[arg(long, value_name = "NAME", value_parser = profile)]
        profile: Vec<&'static Profile>,
    },
    /// On a disk of this kernel, until SIGTERM, or with a service of our own that is killed
    Disk {
        path: PathBuf,
        #[arg(long, default_value_t = 16)]
        threads: usize,
        /// Of the service
        #[arg(long, requires = "program")]
        control: Option<PathBuf>,
        /// The service: ringblk serve ...
        #[arg(last = true)]
        program: Vec<OsString>,
    },
    /// Kill a service whose VMMs have the load; ends at SIGTERM
    Keep {
        /// It is not killed before this file is there
        #[arg(long)]
        begin: PathBuf,
        /// Made when it was killed often enough
        #[arg(long)]
        done: PathBuf,
        /// Of the service
        #[arg(long)]
        control: PathBuf,
        /// The service: ringblk serve ...
        #[arg(last = true, required = true)]
        program: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    // What `cargo test` passes is the harness's.
    let first = std::env::args().nth(1).unwrap_or_default();
    if !["native", "disk", "keep", "help"].contains(&first.as_str()) {
        return selftest::main(own_mounts());
    }
    let args = Args::parse();
    let report = Arc::new(Report::default());
    let (seed, kills, stops, limit) = (args.seed, args.kills, args.stops, Duration::from_secs(args.limit));
    match args.what {
        What::Native { ringblk, dir, no_inflight, profile } => {
            let mounts = own_mounts();
            let profiles = if profile.is_empty() { PROFILES.to_vec() } else { profile };
            let plan =
                native::Plan { ringblk, dir, profiles, seed, kills, inflight: !no_inflight, mounts, limit };
            native::run(&plan, &report);
        }
        What::Disk { path, threads, control, program } => {
            let plan = disk::Plan { path, threads, seed, kills, stops, limit };
            let program = control.map(|control| (of(program, &control), control));
            disk::run(&plan, program, told_to_end(), &report).expect("the disk can be used");
        }
        What::Keep { begin, done, control, program } => {
            let plan = keeper::Plan { seed, kills, stops, limit, begin, done };
            keeper::run(&plan, of(program, &control), &control, told_to_end(), &report);
        }
    }
    report.print(&first);
    if let Some(path) = args.json {
        std::fs::write(path, format!("{}\n", report.json())).expect("the counts can be written");
    }
    if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A VMM by its name.
fn profile(name: &str) -> Result<&'static Profile, String> {
    let names = PROFILES.map(|profile| profile.name).join(", ");
    let found = PROFILES.into_iter().find(|profile| profile.name == name);
    found.ok_or_else(|| format!("there are: {names}"))
}

/// Whether stores may be mounted.
fn own_mounts() -> bool {
    store::own_mounts()
        .inspect_err(|error| eprintln!("soak: without full stores, no mounts: {error}"))
        .is_ok()
}

/// A service by its command line, logging beside its control socket.
fn of(program: Vec<OsString>, control: &Path) -> Program {
    let mut program = program.into_iter();
    let path = program.next().expect("a program").into();
    Program { path, args: program.collect(), log: control.with_extension("log") }
}

/// Set by SIGTERM from now on. By a handler, not by blocking it, which the services that we start would inherit.
fn told_to_end() -> &'static AtomicBool {
    static ENDED: AtomicBool = AtomicBool::new(false);
    let runtime = Builder::new_current_thread().enable_io().build().expect("a runtime");
    let guard = runtime.enter();
    let mut told = signal(SignalKind::terminate()).expect("a signal can be handled");
    drop(guard);
    std::thread::spawn(move || {
        runtime.block_on(told.recv());
        ENDED.store(true, Ordering::Release);
    });
    &ENDED
}
