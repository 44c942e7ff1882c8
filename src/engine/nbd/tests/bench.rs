//! What the tests drive a volume with: a worker in small, and a workload that knows what it should read.

#![forbid(unsafe_code)]

use super::server::Random;
use crate::block::{Data, Errno, Iovec};
use crate::engine::config::NbdConfig;
use crate::engine::nbd::{NbdOps, NbdStore};
use crate::engine::node::Leaf;
use crate::ring::{Core, Io, Mapping, Ring, Setup, Tasks, Uring};
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::rc::Rc;
use std::time::{Duration, Instant};

pub type Ops = NbdOps<Uring>;
pub type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Long for anything that is to happen, on a busy machine.
pub const LONG: Duration = Duration::from_secs(60);

pub fn config(uri: &str, reconnect: u64) -> NbdConfig {
    NbdConfig {
        uri: uri.into(),
        tls_ca: None,
        tls_cert: None,
        tls_key: None,
        tls_hostname: None,
        tls_verify: true,
        connections: None,
        reconnect,
        timeout: 0,
        read_only: false,
    }
}

/// A worker, as far as a volume knows one.
pub struct Bench {
    pub core: Rc<Core<Uring>>,
    pub tasks: Tasks<Uring, Task>,
}

impl Bench {
    pub fn new() -> Bench {
        let core =
            Core::new(Uring::new(Setup { entries: 16, completions: 256, ..Setup::default() }).unwrap());
        Bench { tasks: Tasks::new(core.clone()), core }
    }

    pub fn attach(&self, volume: &NbdStore) -> Rc<Ops> {
        Rc::new(NbdOps::new(&self.core, volume))
    }

    pub fn start<F: Future<Output = ()> + 'static>(&mut self, make: impl FnOnce(Io<Uring>) -> F) -> u32 {
        self.tasks.add(|io| Box::pin(make(io)) as Task)
    }

    pub fn turn(&mut self) {
        self.tasks.run_ready();
        self.core.ring().enter(false).unwrap();
        let mut cqes = Vec::new();
        self.core.ring().reap(&mut cqes);
        if cqes.is_empty() {
            std::thread::sleep(Duration::from_micros(50));
        }
        for cqe in &cqes {
            self.tasks.complete(cqe);
        }
    }

    pub fn until(&mut self, what: &str, done: impl Fn() -> bool) {
        let deadline = Instant::now() + LONG;
        while !done() {
            assert!(Instant::now() < deadline, "waiting for {what}");
            self.turn();
        }
    }

    pub fn rest(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.turn();
        }
    }

    /// Runs one future to its end.
    pub fn run<T: 'static, F: Future<Output = T> + 'static>(
        &mut self,
        make: impl FnOnce(Io<Uring>) -> F,
    ) -> T {
        let result = Rc::new(Cell::new(None));
        let ended = Rc::new(Cell::new(false));
        let (give, end) = (result.clone(), ended.clone());
        self.start(|io| {
            let future = make(io);
            async move {
                give.set(Some(future.await));
                end.set(true);
            }
        });
        self.until("a request", || ended.get());
        result.take().unwrap()
    }

    pub fn write(&mut self, ops: &Rc<Ops>, offset: u64, bytes: &[u8], fua: bool) -> Result<(), Errno> {
        let (ops, bytes) = (ops.clone(), bytes.to_vec());
        self.run(|io| async move { write(&ops, &io, offset, &bytes, 1, fua).await })
    }

    pub fn read(&mut self, ops: &Rc<Ops>, offset: u64, len: usize) -> Result<Vec<u8>, Errno> {
        let ops = ops.clone();
        self.run(|io| async move { read(&ops, &io, offset, len, 1).await })
    }

    pub fn flush(&mut self, ops: &Rc<Ops>) -> Result<(), Errno> {
        let ops = ops.clone();
        self.run(|io| async move { ops.flush(&io).await })
    }

    /// Reads until that works, as it does some time after a server has come back.
    pub fn until_back(&mut self, ops: &Rc<Ops>) {
        let deadline = Instant::now() + LONG;
        while self.read(ops, 0, 512).is_err() {
            assert!(Instant::now() < deadline, "the volume does not come back");
            self.rest(Duration::from_millis(5));
        }
    }

    /// Everything that was begun ends when the last user is gone.
    pub fn finish(mut self, ops: Rc<Ops>) {
        assert_eq!(Rc::strong_count(&ops), 1);
        let pool = Rc::downgrade(&ops.pool);
        drop(ops);
        let core = self.core.clone();
        self.until("the connections to close", || core.in_flight() == 0 && pool.strong_count() == 0);
    }
}

/// In up to `pieces` ranges of different lengths.
pub fn ranges(memory: &Mapping, len: usize, pieces: u64) -> Vec<Iovec<'_>> {
    let mut random = Random::new(len as u64 + pieces);
    let mut rest = memory.iovec(0, len);
    let mut list = Vec::new();
    for _ in 1..pieces {
        let mut part = rest;
        rest = part.split_off(random.below(2 * len as u64 / pieces) as usize);
        list.push(part);
    }
    list.push(rest);
    list
}

pub async fn write(
    ops: &Ops,
    io: &Io<Uring>,
    offset: u64,
    bytes: &[u8],
    pieces: u64,
    fua: bool,
) -> Result<(), Errno> {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    let memory = Mapping::shared_read(file.as_fd(), 0, bytes.len()).unwrap();
    let iovecs = ranges(&memory, bytes.len(), pieces);
    ops.write(io, Data::of(&iovecs), bytes.len() as u64, offset, fua).await
}

pub async fn read(ops: &Ops, io: &Io<Uring>, offset: u64, len: usize, pieces: u64) -> Result<Vec<u8>, Errno> {
    let memory = Mapping::anonymous(len).unwrap();
    let iovecs = ranges(&memory, len, pieces);
    ops.read(io, Data::of(&iovecs), len as u64, offset).await?;
    let mut bytes = vec![0; len];
    memory.copy_out(0, &mut bytes);
    Ok(bytes)
}

/// What a workload may do, besides reading and writing.
#[derive(Clone, Copy)]
pub struct Abilities {
    pub refusals: bool,
    pub zeroes: bool,
    pub discard: bool,
}

/// Works on `REGION` bytes of the disk, and knows what they hold.
pub async fn work(ops: Rc<Ops>, io: Io<Uring>, number: u64, rounds: usize, abilities: Abilities) -> Vec<u8> {
    let base = number * REGION;
    let mut random = Random::new(number + 77);
    let mut model = read(&ops, &io, base, REGION as usize, 3).await.unwrap_or_else(|errno| {
        assert!(abilities.refusals, "{errno}");
        vec![0; REGION as usize]
    });
    let refused = |errno| {
        assert!(abilities.refusals && errno == Errno::ENOSPC, "{errno}");
    };
    for round in 0..rounds {
        let start = random.below(REGION / 512) * 512;
        let most = (REGION - start) / 512;
        let len =
            512 * (1 + if random.below(4) == 0 { random.below(most) } else { random.below(most.min(16)) });
        let (offset, range) = (base + start, start as usize..(start + len) as usize);
        let pieces = 1 + random.below(9);
        match random.below(10) {
            0..4 => {
                let bytes: Vec<u8> = (0..len)
                    .map(|n| (n / 64 + round as u64 + number * 31) as u8 * u8::from(round % 3 > 0))
                    .collect();
                match write(&ops, &io, offset, &bytes, pieces, random.below(4) == 0).await {
                    Ok(()) => model[range].copy_from_slice(&bytes),
                    Err(errno) => refused(errno),
                }
            }
            4 => ops.flush(&io).await.unwrap_or_else(refused),
            5 if abilities.zeroes => match ops.write_zeroes(&io, offset, len, random.below(2) == 0).await {
                Ok(()) => model[range].fill(0),
                Err(errno) => refused(errno),
            },
            6 if abilities.discard => match ops.discard(&io, offset, len).await {
                Ok(()) => {
                    // Undefined now; known again from what is read next.
                    let after = loop {
                        match read(&ops, &io, offset, len as usize, 1).await {
                            Ok(after) => break after,
                            Err(errno) => refused(errno),
                        }
                    };
                    model[range].copy_from_slice(&after);
                }
                Err(errno) => refused(errno),
            },
            _ => match read(&ops, &io, offset, len as usize, pieces).await {
                Ok(bytes) => assert!(bytes == model[range], "slot {number}, round {round}, {offset}+{len}"),
                Err(errno) => refused(errno),
            },
        }
    }
    model
}

pub const REGION: u64 = 512 << 10;
pub const SLOTS: u64 = 8;

/// Eight slots at once; gives what each knows of its region.
pub fn crowd(bench: &mut Bench, ops: &Rc<Ops>, rounds: usize, abilities: Abilities) -> Vec<Vec<u8>> {
    let models = Rc::new(RefCell::new(vec![Vec::new(); SLOTS as usize]));
    for number in 0..SLOTS {
        let (ops, models) = (ops.clone(), models.clone());
        bench.start(|io| async move {
            let model = work(ops, io, number, rounds, abilities).await;
            models.borrow_mut()[number as usize] = model;
        });
    }
    bench.until("the crowd", || models.borrow().iter().all(|model| !model.is_empty()));
    models.take()
}
