//! The load generator: a VMM's side of vhost-user-blk that keeps a number of requests in flight and measures.
//!
//! One thread drives all queues, pinned to one CPU, so that what is measured on the other CPUs is the server. It works
//! against any vhost-user-blk server: ours, qemu-storage-daemon, others. `cargo bench --bench load -- --help`.

use clap::{Parser, ValueEnum};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use nix::unistd::Pid;
use ringblk::block::Size;
use std::error::Error;
use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue,
    VirtioBlkReqBuf, VirtioBlkTransport, VirtioFeatureFlags,
};

/// Load a vhost-user-blk server and tell what it does.
#[derive(Debug, Parser)]
struct Args {
    /// The server's socket
    #[arg(long)]
    socket: PathBuf,
    /// What to do
    #[arg(long, value_enum, default_value_t = Mode::Randread)]
    rw: Mode,
    /// Bytes in a request; takes K and M
    #[arg(long, default_value = "4K")]
    bs: Size,
    /// Requests in flight in each queue
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=8192))]
    depth: u16,
    /// Queues
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
            eprintln!("load: {}: {error}", args.socket.display());
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

/// Latencies in nanoseconds, to about 3 %: 32 buckets for each power of two.
struct Histogram {
    buckets: Vec<u64>,
    max: u64,
}

impl Histogram {
    const STEPS: u32 = 5;

    fn new() -> Histogram {
        Histogram { buckets: vec![0; 64 << Self::STEPS], max: 0 }
    }

    fn add(&mut self, nanos: u64) {
        let shift = (64 - Self::STEPS - 1).saturating_sub(nanos.leading_zeros());
        let index = ((u64::from(shift)) << Self::STEPS) + (nanos >> shift);
        self.buckets[index as usize] += 1;
        self.max = self.max.max(nanos);
    }

    /// The value that this part of all is not above, in microseconds.
    fn quantile(&self, part: f64) -> f64 {
        let all: u64 = self.buckets.iter().sum();
        let mut left = (all as f64 * part).ceil() as u64;
        for (index, count) in self.buckets.iter().enumerate() {
            if *count >= left {
                let shift = (index >> Self::STEPS).saturating_sub(1);
                let base = (index - (shift << Self::STEPS)) as u64;
                // The bucket's middle.
                return ((base << shift) + (1 << shift) / 2) as f64 / 1e3;
            }
            left -= count;
        }
        self.max as f64 / 1e3
    }
}

/// A queue under load; a request's context is its slot.
struct Queue {
    queue: VirtioBlkQueue<'static, usize>,
    notifier: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    /// Its part of the buffers.
    buffers: *mut u8,
    /// When each slot's request was submitted.
    started: Vec<Instant>,
    /// Where the next sequential request is, in requests.
    next: u64,
}

/// CPU time of a process and all its threads.
fn cpu_time(pid: u32) -> Result<Duration, Box<dyn Error>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name is in parentheses and may hold anything; utime and stime are fields 14 and 15.
    let rest = stat.rsplit_once(')').ok_or("no process name")?.1;
    let field = |at: usize| rest.split_whitespace().nth(at).and_then(|text| text.parse::<u64>().ok());
    let ticks = field(11).zip(field(12)).map(|(user, system)| user + system).ok_or("no CPU times")?;
    // USER_HZ is 100 on every architecture that we run on.
    Ok(Duration::from_millis(10 * ticks))
}

fn pin(cpu: i64) -> Result<(), Box<dyn Error>> {
    if let Ok(cpu) = usize::try_from(cpu) {
        let mut set = CpuSet::new();
        set.set(cpu)?;
        sched_setaffinity(Pid::from_raw(0), &set)?;
    }
    Ok(())
}

fn connect(args: &Args) -> Result<Box<VirtioBlkTransport>, Box<dyn Error>> {
    let mut mask = VirtioFeatureFlags::VERSION_1.bits()
        | VirtioBlkFeatureFlags::MQ.bits()
        | VirtioBlkFeatureFlags::FLUSH.bits()
        | VirtioBlkFeatureFlags::BLK_SIZE.bits();
    if !args.no_event_idx {
        mask |= VirtioFeatureFlags::RING_EVENT_IDX.bits();
    }
    let socket = args.socket.to_str().ok_or("the path is not UTF-8")?;
    Ok(Box::new(VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(socket, mask)?))
}

/// Memory for all buffers, shared with the server, and kept to the end.
fn buffers(transport: &mut VirtioBlkTransport, bytes: usize) -> Result<*mut u8, Box<dyn Error>> {
    let file = File::from(memfd_create(c"buffers", MFdFlags::MFD_CLOEXEC)?);
    file.set_len(bytes as u64)?;
    let size = NonZeroUsize::new(bytes).ok_or("no buffers")?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let base = unsafe { mmap(None, size, protection, flags, &file, 0)? };
    let base = base.as_ptr().cast::<u8>();
    // SAFETY: all of the mapping, which nobody else has yet. Not zeroes: a server might look for them.
    unsafe { base.write_bytes(0xa5, bytes) };
    transport.map_mem_region(base as usize, bytes, file.as_raw_fd(), 0)?;
    Ok(base)
}

struct Load<'a> {
    args: &'a Args,
    queues: Vec<Queue>,
    /// Requests of this size on the disk.
    places: u64,
    random: u64,
    histogram: Histogram,
    done: u64,
}

impl Load<'_> {
    /// xorshift64*
    fn random(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn submit(&mut self, index: usize, slot: usize, now: Instant) -> Result<(), Box<dyn Error>> {
        let place = match self.args.rw {
            Mode::Randread | Mode::Randwrite => self.random() % self.places,
            Mode::Read | Mode::Write => self.queues[index].next % self.places,
        };
        let len = self.args.bs.bytes() as usize;
        let queue = &mut self.queues[index];
        queue.next += 1;
        queue.started[slot] = now;
        let offset = place * len as u64;
        // SAFETY: `slot * len` is inside the queue's part of the buffers, which stay to the end of the process.
        unsafe {
            let buffer = queue.buffers.add(slot * len);
            match self.args.rw {
                Mode::Randread | Mode::Read => queue.queue.read_raw(offset, buffer, len, slot)?,
                Mode::Randwrite | Mode::Write => queue.queue.write_raw(offset, buffer, len, slot)?,
            }
        }
        Ok(())
    }

    fn kick(&mut self, index: usize) -> Result<(), Box<dyn Error>> {
        let queue = &mut self.queues[index];
        if queue.queue.avail_notif_needed() {
            queue.notifier.notify()?;
        }
        Ok(())
    }

    /// Takes what is complete in a queue and submits as many anew. How many there were.
    fn turn(&mut self, index: usize, finished: &mut Vec<usize>) -> Result<usize, Box<dyn Error>> {
        for completion in self.queues[index].queue.completions() {
            if completion.ret != 0 {
                return Err(std::io::Error::from_raw_os_error(-completion.ret).into());
            }
            finished.push(completion.context);
        }
        let count = finished.len();
        if count == 0 {
            return Ok(0);
        }
        let now = Instant::now();
        for slot in finished.drain(..) {
            let nanos = now.duration_since(self.queues[index].started[slot]).as_nanos();
            self.histogram.add(nanos as u64);
            self.submit(index, slot, now)?;
        }
        self.kick(index)?;
        self.done += count as u64;
        Ok(count)
    }

    /// Sleeps until a queue is called.
    fn sleep(&mut self) -> Result<(), Box<dyn Error>> {
        let mut fds: Vec<PollFd> =
            self.queues.iter().map(|queue| PollFd::new(queue.call.as_fd(), PollFlags::POLLIN)).collect();
        if poll(&mut fds, PollTimeout::from(10_000u16))? == 0 {
            return Err("no request completes for 10 seconds".into());
        }
        for (queue, fd) in self.queues.iter().zip(&fds) {
            if fd.any().unwrap_or(false) {
                queue.call.read()?;
            }
        }
        Ok(())
    }

    /// Loads until `enough` says so.
    fn until(&mut self, enough: impl Fn(u64, Instant) -> bool) -> Result<(), Box<dyn Error>> {
        let mut finished = Vec::with_capacity(usize::from(self.args.depth));
        let mut passes = 0u32;
        loop {
            let mut worked = 0;
            for index in 0..self.queues.len() {
                worked += self.turn(index, &mut finished)?;
            }
            passes = passes.wrapping_add(1);
            // The clock is read in `turn` anyway; a polling client that finds nothing need not look each time.
            if (worked > 0 || passes.is_multiple_of(256)) && enough(self.done, Instant::now()) {
                return Ok(());
            }
            if worked == 0 {
                if self.args.poll { std::hint::spin_loop() } else { self.sleep()? }
            }
        }
    }
}

fn run(args: &Args) -> Result<Report, Box<dyn Error>> {
    pin(args.cpu)?;
    let mut transport = connect(args)?;
    let (len, depth) = (args.bs.bytes() as usize, usize::from(args.depth));
    let capacity = u64::from(transport.get_config()?.capacity) * 512;
    let span = args.span.map_or(capacity, |span| span.bytes().min(capacity));
    let places = span / args.bs.bytes();
    if places == 0 {
        return Err("the disk is smaller than one request".into());
    }
    // Three descriptors a request.
    let size = u16::try_from((3 * depth).next_power_of_two()).map_err(|_| "the depth is too large")?;
    let queues = VirtioBlkQueue::<usize>::setup_queues(&mut *transport, usize::from(args.queues), size)?;
    let base = buffers(&mut *transport, queues.len() * depth * len)?;
    let count = queues.len() as u64;
    let queues = queues.into_iter().enumerate().map(|(index, mut queue)| {
        queue.set_used_notif_enabled(!args.poll);
        Queue {
            queue,
            notifier: transport.get_submission_notifier(index),
            call: transport.get_completion_fd(index),
            buffers: base.wrapping_add(index * depth * len),
            started: vec![Instant::now(); depth],
            next: index as u64 * places / count,
        }
    });
    let queues = queues.collect();
    let mut load =
        Load { args, queues, places, random: 0x9e37_79b9_7f4a_7c15, histogram: Histogram::new(), done: 0 };

    for index in 0..load.queues.len() {
        let now = Instant::now();
        for slot in 0..depth {
            load.submit(index, slot, now)?;
        }
        load.kick(index)?;
    }
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
    Ok(Report {
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
    })
}
