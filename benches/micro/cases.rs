//! What is measured, a batch of requests at a time.

use super::echo::Echo;
use super::prepared::{Prepared, READ_4K, Shape};
use ringblk::block::{Data, Errno, Flags, Op, Request, Size};
use ringblk::engine::config::{FileConfig, MemoryConfig, NullConfig, VolumeConfig};
use ringblk::engine::{Flushers, Volume, submit};
use ringblk::frontend::ublk::{Asked, Descriptor, command};
use ringblk::frontend::vhost_user::Vring;
use ringblk::frontend::{Queue, Source};
use ringblk::ring::{Core, Cqe, DriverCommand, Mapping, Ring, Sqe, Target, Tasks};
use ringblk::service::served_vring::ServedVring;
use ringblk::worker::{ExportVolume, Worker, WorkerConfig};
use std::future::Future;
use std::hint::black_box;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// One line of the table.
pub struct Case {
    pub name: &'static str,
    /// Requests in a batch.
    pub requests: u32,
    /// Sets it up.
    pub make: fn() -> Box<dyn Run>,
    /// A worker's thread does it, and not ours.
    pub worker: bool,
    /// Nanoseconds that a request may take.
    pub bar: Option<f64>,
}

/// A case that is set up.
pub trait Run {
    fn batch(&mut self);
}

const REQUESTS: u32 = READ_4K.depth as u32;
/// Not reads: memory that was never written is one page of zeroes.
const WRITE_4K: Shape = Shape { write: true, ..READ_4K };
const PLAIN: Case = Case { name: "", requests: REQUESTS, make: || read(1, false), worker: false, bar: None };

pub const CASES: [Case; 15] = [
    Case { name: "chain of 1 segment", bar: Some(100.0), ..PLAIN },
    Case { name: "chain of 4 segments", make: || read(4, false), ..PLAIN },
    Case { name: "chain of 16 segments", make: || read(16, false), ..PLAIN },
    Case { name: "indirect chain of 1 segment", make: || read(1, true), ..PLAIN },
    Case { name: "indirect chain of 4 segments", make: || read(4, true), ..PLAIN },
    Case { name: "indirect chain of 16 segments", make: || read(16, true), ..PLAIN },
    Case { name: "slot: add and end", make: || Box::new(Births::new()), ..PLAIN },
    Case { name: "slot: submit, complete, poll", make: || Box::new(Slots::new()), ..PLAIN },
    Case { name: "engine: read of null, and a submit", make: || engine(null(), Op::Read), ..PLAIN },
    Case { name: "engine: write of memory, and a submit", make: || engine(memory(), Op::Write), ..PLAIN },
    Case { name: "engine: read of a file", make: || engine(file(), Op::Read), ..PLAIN },
    Case { name: "ublk: descriptor and commit", make: || Box::new(Ublk::new()), ..PLAIN },
    Case { name: "worker: null", make: || worker(null(), READ_4K, 0), worker: true, ..PLAIN },
    Case { name: "worker: memory", make: || worker(memory(), WRITE_4K, 0), worker: true, ..PLAIN },
    Case {
        name: "worker: null, 63 idle vrings",
        make: || worker(null(), READ_4K, 63),
        worker: true,
        ..PLAIN
    },
];

/// Chains parsed and completed, by the slots that do it in a worker, without a volume.
struct Chains<F> {
    guest: Prepared,
    vring: Rc<Vring>,
    tasks: Tasks<Echo, F>,
    slots: Vec<u32>,
}

fn read(segments: u32, indirect: bool) -> Box<dyn Run> {
    let guest = Prepared::new(Shape { segments, indirect, ..READ_4K });
    let vring = Rc::new(Vring::new(guest.setup(false)).unwrap());
    let mut tasks = Tasks::new(Core::new(Echo::new(0)));
    let slots = (0..REQUESTS as u16).map(|tag| {
        let vring = vring.clone();
        tasks.add(|io| async move {
            let mut state = <Vring as Source<Echo>>::State::default();
            while let Some(request) = vring.next(&io, tag, &mut state).await {
                black_box(&request);
                Source::<Echo>::complete(&*vring, tag, &mut state, Ok::<(), Errno>(()));
            }
        })
    });
    let slots = slots.collect();
    Box::new(Chains { guest, vring, tasks, slots })
}

impl<F: Future<Output = ()>> Run for Chains<F> {
    fn batch(&mut self) {
        self.guest.offer();
        // A worker's passes.
        while !self.guest.is_done() {
            while let Some(tag) = self.vring.poll() {
                self.tasks.poll(self.slots[usize::from(tag)]);
            }
            self.vring.publish();
        }
    }
}

/// Slots that are made, and end at once.
struct Births<F> {
    tasks: Tasks<Echo, F>,
    make: fn() -> F,
}

impl Births<std::future::Ready<()>> {
    fn new() -> Self {
        Births { tasks: Tasks::new(Core::new(Echo::new(0))), make: || std::future::ready(()) }
    }
}

impl<F: Future<Output = ()>> Run for Births<F> {
    fn batch(&mut self) {
        for _ in 0..REQUESTS {
            black_box(self.tasks.add(|_| (self.make)()));
        }
    }
}

/// Slots that carry out one request of a volume after the other. What a store does not submit, they submit after it: a
/// request at each poll.
fn engine(config: VolumeConfig, op: Op) -> Box<dyn Run> {
    let core = Core::new(Echo::new(REQUESTS as usize));
    // Whatever a store could do at once on its own thread, the ring is asked for.
    core.set_shared(true);
    let volume = Volume::open("bench", &config).unwrap();
    let image = if let VolumeConfig::File(file) = &config { Some(&file.path) } else { None };
    let submits = image.is_some();
    image.map(std::fs::remove_file).transpose().unwrap();
    let channel = Rc::new(volume.attach(&core, false));
    let memory = Rc::new(Mapping::anonymous(4096).unwrap());
    let flushers = Rc::new(Flushers::new(&volume, 1));
    let mut tasks = Tasks::new(core.clone());
    for slot in 0..u64::from(REQUESTS) {
        let (channel, memory, flushers) = (channel.clone(), memory.clone(), flushers.clone());
        tasks.add(|io| async move {
            let iovecs = [memory.iovec(0, 4096)];
            loop {
                let data = Data::of(&iovecs);
                let request = Request { op, flags: Flags::default(), sector: slot * 8, sectors: 8, data };
                submit(&channel, &io, flushers.queue(0), black_box(&request)).await.unwrap();
                if !submits {
                    io.submit(&Sqe::Fdatasync { file: Target::Fixed(0) }).await;
                }
            }
        });
    }
    Box::new(Slots { core, tasks, cqes: Vec::with_capacity(REQUESTS as usize) })
}

/// Slots that submit one operation after the other.
struct Slots<F> {
    core: Rc<Core<Echo>>,
    tasks: Tasks<Echo, F>,
    cqes: Vec<Cqe>,
}

impl Slots<()> {
    fn new() -> Slots<impl Future<Output = ()>> {
        let core = Core::new(Echo::new(REQUESTS as usize));
        let mut tasks = Tasks::new(core.clone());
        for _ in 0..REQUESTS {
            tasks.add(|io| async move {
                let bytes = Mapping::anonymous(4096).unwrap();
                let mut offset = 0;
                loop {
                    let sqe = Sqe::Read { file: Target::Fixed(0), range: bytes.iovec(0, 4096), offset };
                    offset += io.submit(&sqe).await as u64 + 1;
                }
            });
        }
        Slots { core, tasks, cqes: Vec::with_capacity(REQUESTS as usize) }
    }
}

impl<F: Future<Output = ()>> Run for Slots<F> {
    fn batch(&mut self) {
        self.core.ring().reap(&mut self.cqes);
        for cqe in self.cqes.drain(..) {
            self.tasks.complete(&cqe);
        }
        // Those who wait for their turn on the worker's own time: a pass begins.
        self.tasks.run_ready();
    }
}

/// The kernel's descriptor read, and the commit of its request made: what the ublk door does with no kernel.
struct Ublk {
    descriptors: Vec<Descriptor>,
}

impl Ublk {
    fn new() -> Ublk {
        let descriptor =
            |tag: u32| Descriptor { op_flags: 0, nr_sectors: 8, start_sector: u64::from(tag) * 8, addr: 0 };
        Ublk { descriptors: (0..REQUESTS).map(descriptor).collect() }
    }
}

impl Run for Ublk {
    fn batch(&mut self) {
        for (tag, descriptor) in black_box(&self.descriptors).iter().enumerate() {
            let asked = Asked::read(descriptor, 512 << 10).unwrap();
            let cmd = command(0, tag as u16, black_box(&asked).bytes as i32, 0);
            // SAFETY: no driver is asked.
            let command = unsafe { DriverCommand::new(0, cmd, 0) };
            black_box(Sqe::Command { file: Target::Fixed(0), command });
        }
    }
}

/// Requests through a worker as it is, from the vring to the volume and back.
struct Served {
    guest: Prepared,
    _worker: Worker,
    _idle: Vec<Prepared>,
}

fn null() -> VolumeConfig {
    VolumeConfig::Null(NullConfig { size: Size(1 << 30), block_size: None })
}

/// An image that is removed once it is open: nothing of it is read.
fn file() -> VolumeConfig {
    let path = std::env::temp_dir().join(format!("ringblk-micro-{}", std::process::id()));
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    VolumeConfig::File(FileConfig {
        path,
        direct: false,
        read_only: false,
        lock: false,
        format: None,
        block_size: None,
    })
}

fn memory() -> VolumeConfig {
    VolumeConfig::Memory(MemoryConfig { size: Size(64 << 20), block_size: None })
}

fn worker(config: VolumeConfig, shape: Shape, idle: usize) -> Box<dyn Run> {
    // It looks for requests all the time, once it has seen that they come.
    let worker = Worker::start(
        0,
        WorkerConfig {
            busy_poll: Duration::from_secs(1),
            slow_after: Duration::from_secs(10),
            shared: false,
        },
    )
    .unwrap();
    // Each idle vring is of a volume of its own, and has had some requests.
    let start = || {
        let volume = Arc::new(Volume::open("bench", &config).unwrap());
        let mut guest = Prepared::new(shape);
        ServedVring::start(worker.handle(), guest.setup(false), ExportVolume::new(volume, 1)).unwrap();
        guest.batch_polled();
        guest
    };
    let idle: Vec<Prepared> = (0..idle).map(|_| start()).collect();
    let guest = start();
    Box::new(Served { guest, _worker: worker, _idle: idle })
}

impl Run for Served {
    fn batch(&mut self) {
        self.guest.batch_polled();
    }
}
