//! The load generator: a client's side of vhost-user-blk or NBD that keeps a number of requests in flight and measures.
//!
//! One thread drives all queues, pinned to one CPU, so that what is measured on the other CPUs is the server. It works
//! against any server of either protocol: ours, qemu-storage-daemon, nbdkit, others.
//! `cargo bench --bench load -- --help`.

use clap::{Parser, ValueEnum};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use ringblk::block::Size;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

mod driver;
mod histogram;
mod inflight;
mod nbd;
mod vhost_user;

use driver::{Load, Queue};
use histogram::Histogram;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Load a vhost-user-blk or an NBD server and tell what it does.
#[derive(Debug, Parser)]
struct Args {
    /// The vhost-user-blk server's socket
    #[arg(long)]
    socket: Option<PathBuf>,
    /// The NBD server's address, unix:PATH or tcp:HOST:PORT; its export is the one without a name
    #[arg(long, required_unless_present = "socket", conflicts_with = "socket")]
    nbd: Option<nbd::Address>,
    /// What to do
    #[arg(long, value_enum, default_value_t = Mode::Randread)]
    rw: Mode,
    /// Bytes in a request; takes K and M
    #[arg(long, default_value = "4K")]
    bs: Size,
    /// Requests in flight in each queue
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=8192))]
    depth: u16,
    /// Queues; for NBD, connections
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    queues: u16,
    /// Seconds to measure
    #[arg(long, default_value_t = 2.0)]
    runtime: f64,
    /// Requests to measure, instead of a time
    #[arg(long)]
    count: Option<u64>,
    /// Seconds of load before the measurement
    #[arg(long, default_value_t = 0.3)]
    ramp: f64,
    /// Use only so much of the disk; takes K, M and G
    #[arg(long)]
    span: Option<Size>,
    /// Look for completions all the time instead of sleeping until called
    #[arg(long)]
    poll: bool,
    /// The server's process: tell the CPU time it takes
    #[arg(long)]
    server_pid: Option<u32>,
    /// Run on this CPU; -1: on any
    #[arg(long, default_value_t = 0, allow_hyphen_values = true)]
    cpu: i64,
    /// Do not ask for EVENT_IDX
    #[arg(long)]
    no_event_idx: bool,
    /// Have the vhost-user server note what is in flight, for a client that survives it
    #[arg(long, requires = "socket")]
    inflight: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    Randread,
    Randwrite,
    Read,
    Write,
}

impl Mode {
    fn writes(self) -> bool {
        matches!(self, Mode::Randwrite | Mode::Write)
    }
}

/// What came of it.
#[derive(Debug, serde::Serialize)]
struct Report {
    rw: Mode,
    bs: u64,
    depth: u16,
    queues: u16,
    poll: bool,
    ios: u64,
    seconds: f64,
    iops: f64,
    p50_us: f64,
    p99_us: f64,
    p999_us: f64,
    max_us: f64,
    /// CPU of the server for each request, all its threads.
    server_us: Option<f64>,
    client_us: f64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(report) if args.json => {
            println!("{}", serde_json::to_string(&report).expect("plain numbers"));
            ExitCode::SUCCESS
        }
        Ok(report) => {
            print(&report);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("load: {error}");
            ExitCode::FAILURE
        }
    }
}

fn print(report: &Report) {
    let Report { iops, p50_us, p99_us, p999_us, client_us, .. } = report;
    let server = report.server_us.map_or(String::new(), |us| format!(", server {us:.2} us per I/O"));
    println!(
        "{iops:.0} IOPS, p50 {p50_us:.1} us, p99 {p99_us:.1} us, p99.9 {p999_us:.1} us{server}, client {client_us:.2}"
    );
}

/// CPU time of a process and all its threads.
fn cpu_time(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name is in parentheses and may hold anything; utime and stime are fields 14 and 15.
    let rest = stat.rsplit_once(')').ok_or("no process name")?.1;
    let field = |at: usize| rest.split_whitespace().nth(at).and_then(|text| text.parse::<u64>().ok());
    let ticks = field(11).zip(field(12)).map(|(user, system)| user + system).ok_or("no CPU times")?;
    // USER_HZ is 100 on every architecture that we run on.
    Ok(Duration::from_millis(10 * ticks))
}

fn pin(cpu: i64) -> Result<()> {
    if let Ok(cpu) = usize::try_from(cpu) {
        let mut set = CpuSet::new();
        set.set(cpu)?;
        sched_setaffinity(Pid::from_raw(0), &set)?;
    }
    Ok(())
}

fn run(args: &Args) -> Result<Report> {
    pin(args.cpu)?;
    match (&args.socket, &args.nbd) {
        (Some(socket), _) => {
            let (_transport, queues, capacity) = vhost_user::connect(socket, args)
                .map_err(|error| format!("{}: {error}", socket.display()))?;
            measure(args, queues, capacity)
        }
        (None, Some(address)) => {
            let (queues, capacity) =
                nbd::connect(address, args).map_err(|error| format!("{address}: {error}"))?;
            measure(args, queues, capacity)
        }
        (None, None) => Err("neither --socket nor --nbd".into()),
    }
}

/// Ramps up, then loads the queues as long as asked.
fn measure<Q: Queue>(args: &Args, queues: Vec<Q>, capacity: u64) -> Result<Report> {
    let mut load = Load::start(args, queues, capacity)?;
    let ramp = Instant::now() + Duration::from_secs_f64(args.ramp);
    load.until(|_, now| now >= ramp)?;

    (load.histogram, load.done) = (Histogram::new(), 0);
    let server = |pid: &u32| cpu_time(*pid);
    let (cpu, own) = (args.server_pid.as_ref().map(server).transpose()?, cpu_time(std::process::id())?);
    let start = Instant::now();
    let end = start + Duration::from_secs_f64(args.runtime);
    match args.count {
        Some(count) => load.until(|done, _| done >= count)?,
        None => load.until(|_, now| now >= end)?,
    }
    let elapsed = start.elapsed();
    let (cpu_after, own_after) =
        (args.server_pid.as_ref().map(server).transpose()?, cpu_time(std::process::id())?);

    let per_io = |time: Duration| time.as_secs_f64() * 1e6 / load.done as f64;
    let report = Report {
        rw: args.rw,
        bs: args.bs.bytes(),
        depth: args.depth,
        queues: args.queues,
        poll: args.poll,
        ios: load.done,
        seconds: elapsed.as_secs_f64(),
        iops: load.done as f64 / elapsed.as_secs_f64(),
        p50_us: load.histogram.quantile(0.5),
        p99_us: load.histogram.quantile(0.99),
        p999_us: load.histogram.quantile(0.999),
        max_us: load.histogram.max as f64 / 1e3,
        server_us: cpu.zip(cpu_after).map(|(before, after)| per_io(after.saturating_sub(before))),
        client_us: per_io(own_after.saturating_sub(own)),
    };
    load.close()?;
    Ok(report)
}
