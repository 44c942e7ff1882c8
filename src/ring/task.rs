//! The futures of a worker, each polled when its own slot has news and at no other time.

use super::core::Background;
use super::{Core, Cqe, Io, Ring};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Waker};

/// One future a slot. `F` is the one type all requests' futures have, so polling one is a direct call.
pub struct Tasks<R: Ring, F> {
    core: Rc<Core<R>>,
    tasks: Vec<Option<Task<F>>>,
}

enum Task<F> {
    Slot(Pin<Box<F>>),
    Background(Background),
}

impl<R: Ring, F: Future<Output = ()>> Tasks<R, F> {
    /// None yet.
    pub fn new(core: Rc<Core<R>>) -> Self {
        Tasks { core, tasks: Vec::new() }
    }

    /// Adds a future, and polls it for the first time. One allocation, for the future's whole life.
    pub fn add(&mut self, make: impl FnOnce(Io<R>) -> F) -> u32 {
        let slot = self.core.allocate();
        let future = make(Io::new(&self.core, slot));
        self.put(slot, Task::Slot(Box::pin(future)));
        self.poll(slot);
        slot
    }

    fn put(&mut self, slot: u32, task: Task<F>) {
        let index = slot as usize;
        if self.tasks.len() <= index {
            self.tasks.resize_with(index + 1, || None);
        }
        self.tasks[index] = Some(task);
    }

    /// Whether `slot`'s future has not ended.
    pub fn is_alive(&self, slot: u32) -> bool {
        self.tasks.get(slot as usize).is_some_and(Option::is_some)
    }

    /// Ends `slot`'s future where it waits. One that waits for the kernel is left to it instead: its memory
    /// is leaked, because the kernel may still write there.
    pub fn remove(&mut self, slot: u32) {
        let Some(task) = self.tasks.get_mut(slot as usize).and_then(Option::take) else { return };
        if self.core.is_in_flight(slot) {
            log::error!("slot {slot} is abandoned with an operation in flight");
            #[expect(clippy::mem_forget, reason = "leaked, with all that the operation names")]
            std::mem::forget(task);
        } else {
            drop(task);
            self.core.release(slot);
        }
    }

    /// Polls `slot`'s future, or that of the slot whose part it is.
    pub fn poll(&mut self, slot: u32) {
        let Some(place @ Some(_)) = self.tasks.get_mut(slot as usize) else {
            return self.core.parent(slot).map_or((), |parent| self.poll(parent));
        };
        let context = &mut Context::from_waker(Waker::noop());
        let ended = match place {
            Some(Task::Slot(future)) => future.as_mut().poll(context).is_ready(),
            Some(Task::Background(future)) => future.as_mut().poll(context).is_ready(),
            None => return,
        };
        if ended {
            *place = None;
            self.core.release(slot);
        }
    }

    /// Hands a completion to the future it belongs to.
    pub fn complete(&mut self, cqe: &Cqe) {
        if let Some(slot) = self.core.deliver(cqe) {
            self.poll(slot);
        }
    }

    /// Takes in what was spawned and polls what was woken, until neither is left, and those whose
    /// [turn](Io::turn) has come: once for each pass of the worker. Whether it did anything.
    pub fn run_ready(&mut self) -> bool {
        let mut worked = false;
        self.core.begin_pass();
        loop {
            while let Some((slot, future)) = self.core.take_spawned() {
                self.put(slot, Task::Background(future));
            }
            let Some(slot) = self.core.next_ready() else { return worked };
            worked = true;
            self.poll(slot);
        }
    }
}

impl<R: Ring, F> Drop for Tasks<R, F> {
    fn drop(&mut self) {
        for (slot, task) in self.tasks.iter_mut().enumerate() {
            if task.is_some() && self.core.is_in_flight(slot as u32) {
                #[expect(clippy::mem_forget, reason = "leaked, with all that the operation names")]
                std::mem::forget(task.take());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Iovec;
    use crate::ring::sim::{Faults, SimRing};
    use crate::ring::{Kind, Setup, Sqe, Target, Uring, UserData};
    use std::cell::Cell;

    /// Runs everything until nothing is in flight.
    fn settle<R: Ring, F: Future<Output = ()>>(core: &Core<R>, tasks: &mut Tasks<R, F>) {
        let mut cqes = Vec::new();
        while tasks.run_ready() || core.in_flight() > 0 {
            core.ring().enter(core.in_flight() > 0).unwrap();
            core.ring().reap(&mut cqes);
            for cqe in cqes.drain(..).filter(|cqe| cqe.user_data.kind() == Some(Kind::Slot)) {
                tasks.complete(&cqe);
            }
        }
    }

    fn uring() -> Rc<Core<Uring>> {
        Core::new(Uring::new(Setup { entries: 8, completions: 64, ..Setup::default() }).unwrap())
    }

    #[test]
    fn each_slot_gets_its_own_result() {
        use std::os::fd::AsRawFd;
        let core = uring();
        let file = tempfile::tempfile().unwrap();
        file.set_len(100).unwrap();
        let fd = Target::Fd(file.as_raw_fd());
        let results: Rc<[Cell<i32>; 20]> = Rc::new(std::array::from_fn(|_| Cell::new(-1)));
        let mut tasks = Tasks::new(core.clone());
        for n in 0..20 {
            let results = results.clone();
            tasks.add(|io| async move {
                let mut bytes = [0u8; 20];
                let read = Sqe::Read { file: fd, range: Iovec::of(&mut bytes[..n]), offset: 0 };
                let first = io.submit(&read).await;
                let second = io.submit(&read).await;
                results[n].set(first + second);
            });
        }
        settle(&core, &mut tasks);
        assert_eq!(results.each_ref().map(Cell::get), std::array::from_fn(|n| 2 * n as i32));
    }

    #[test]
    fn parts_of_a_slot_work_side_by_side() {
        use std::os::fd::AsRawFd;
        let core = uring();
        let file = tempfile::tempfile().unwrap();
        file.set_len(100).unwrap();
        let fd = Target::Fd(file.as_raw_fd());
        let read = async |io: &Io<Uring>, len: usize| {
            let mut bytes = [0u8; 100];
            io.submit(&Sqe::Read { file: fd, range: Iovec::of(&mut bytes[..len]), offset: 0 }).await
        };
        let (done, most) = (Rc::<Cell<i32>>::default(), Rc::<Cell<usize>>::default());
        let (sum, seen) = (done.clone(), most.clone());
        let mut tasks = Tasks::new(core.clone());
        tasks.add(|io| async move {
            for _ in 0..10 {
                let (one, (other, third)) = io
                    .join(
                        async |io| read(io, 10).await + read(io, 20).await,
                        async |io| {
                            io.join(
                                async |io| read(io, 30).await,
                                async |io| {
                                    seen.set(seen.get().max(io.core().in_flight()));
                                    read(io, 40).await
                                },
                            )
                            .await
                        },
                    )
                    .await;
                sum.set(sum.get() + one + other + third);
            }
            // And by itself again.
            sum.set(sum.get() + read(&io, 5).await);
        });
        settle(&core, &mut tasks);
        assert_eq!((done.get(), most.get()), (1005, 2), "the third comes when two are with the kernel");
        // One slot and the four parts that it had at once: no more were made, and all are free again.
        let mut slots: Vec<_> = (0..6).map(|_| core.allocate()).collect();
        slots.sort_unstable();
        assert_eq!(slots, [0, 1, 2, 3, 4, 5]);
        assert!(slots.iter().all(|slot| core.parent(*slot).is_none()));
    }

    #[test]
    fn parts_hear_of_wakes_and_interruptions() {
        const HOUR: std::time::Duration = std::time::Duration::from_secs(3600);
        let core = uring();
        let parked = Rc::<Cell<u32>>::default();
        let (part, ended) = (parked.clone(), Rc::<Cell<bool>>::default());
        let end = ended.clone();
        let mut tasks = Tasks::new(core.clone());
        let slot = tasks.add(|io| async move {
            let rest = async |io: &Io<Uring>| {
                io.rest_for(HOUR).await;
                io.is_interrupted()
            };
            let woken = async |io: &Io<Uring>| {
                part.set(io.slot());
                io.park().await;
                rest(io).await
            };
            let (one, other) = io.join(rest, woken).await;
            // One that begins now is interrupted from the start.
            let (late, _) = io.join(rest, async |_| ()).await;
            end.set(one && other && late);
        });
        core.ring().enter(false).unwrap();
        assert_ne!(parked.get(), slot);
        core.wake(parked.get());
        tasks.run_ready();
        assert_eq!(core.in_flight(), 2, "both rest");
        core.interrupt(slot);
        settle(&core, &mut tasks);
        assert!(ended.get());
    }

    #[test]
    fn what_the_kernel_does_for_a_part_is_leaked_with_the_whole() {
        let core = Core::new(SimRing::new(1, Faults::default()));
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let target = core.ring().register(std::os::fd::AsRawFd::as_raw_fd(&file));
        let gone = Rc::<Cell<bool>>::default();
        let witness = Witness(gone.clone());
        let mut tasks = Tasks::new(core.clone());
        let slot = tasks.add(|io| async move {
            let mut bytes = Box::new([0u8; 4096]);
            let read = Sqe::Read { file: target, range: Iovec::of(&mut *bytes), offset: 0 };
            io.join(async |io| io.submit(&read).await, async |io| io.park().await).await;
            drop(witness);
        });
        tasks.remove(slot);
        assert!(!gone.get());
        core.ring().enter(true).unwrap();
        assert!(!gone.get());
    }

    #[test]
    fn a_stale_completion_changes_nothing() {
        let core = uring();
        let mut tasks = Tasks::new(core.clone());
        let slot = tasks.add(|io| async move {
            io.park().await;
        });
        let stale = Cqe { user_data: UserData::new(Kind::Slot, 5, slot), result: 1, more: false };
        tasks.complete(&stale);
        tasks.complete(&Cqe { user_data: UserData::new(Kind::Slot, 0, 999), ..stale });
        assert!(tasks.is_alive(slot));
    }

    #[test]
    fn a_wake_before_the_park_is_not_lost() {
        let core = uring();
        let mut tasks = Tasks::new(core.clone());
        let slot = tasks.add(|io| async move {
            io.park().await;
            io.park().await;
        });
        core.wake(slot);
        core.wake(slot);
        tasks.run_ready();
        assert!(tasks.is_alive(slot), "two wakes before one park are one");
        core.wake(slot);
        tasks.run_ready();
        assert!(!tasks.is_alive(slot));
    }

    /// Says when it goes.
    struct Witness(Rc<Cell<bool>>);

    impl Drop for Witness {
        fn drop(&mut self) {
            self.0.set(true);
        }
    }

    /// A slot that reads into memory of its own, and what says that its future was dropped.
    fn reading(
        core: &Rc<Core<SimRing>>,
    ) -> (Tasks<SimRing, impl Future<Output = ()> + use<>>, u32, Rc<Cell<bool>>, std::fs::File) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let target = core.ring().register(std::os::fd::AsRawFd::as_raw_fd(&file));
        let (mut tasks, gone) = (Tasks::new(core.clone()), Rc::new(Cell::new(false)));
        let witness = Witness(gone.clone());
        let slot = tasks.add(|io| async move {
            let mut bytes = Box::new([0u8; 4096]);
            io.submit(&Sqe::Read { file: target, range: Iovec::of(&mut *bytes), offset: 0 }).await;
            io.park().await;
            drop((witness, bytes));
        });
        (tasks, slot, gone, file)
    }

    /// The kernel writes there until it says that it is done: what waits for it is never freed before.
    #[test]
    fn what_the_kernel_works_on_is_leaked_rather_than_freed() {
        for by_drop in [false, true] {
            let core = Core::new(SimRing::new(1, Faults::default()));
            let (mut tasks, slot, gone, _file) = reading(&core);
            if by_drop {
                drop(tasks);
            } else {
                tasks.remove(slot);
                assert!(!tasks.is_alive(slot));
                let other = core.allocate();
                assert_ne!(other, slot, "its completion would be taken for another's");
            }
            assert!(!gone.get(), "by drop: {by_drop}");
            // The simulated ring carries the read out now: into memory that is still there.
            core.ring().enter(true).unwrap();
            assert!(!gone.get());
        }
    }

    /// Nobody may go on with memory that the kernel still writes to, not even by a mistake of ours.
    #[test]
    fn dropping_what_the_kernel_works_on_ends_the_process() {
        const CHILD: &str = "RINGBLK_TEST_DROPS_AN_OPERATION";
        if std::env::var_os(CHILD).is_some() {
            let core = uring();
            let io = Io::new(&core, core.allocate());
            drop(io.submit(&Sqe::Timeout { after: std::time::Duration::from_secs(3600) }));
            return;
        }
        let name = "ring::task::tests::dropping_what_the_kernel_works_on_ends_the_process";
        let mut test = std::process::Command::new(std::env::current_exe().unwrap());
        let output = test.args(["--exact", name]).env(CHILD, "").output().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&output.status), Some(libc::SIGABRT));
    }

    #[test]
    fn what_waits_for_us_is_freed() {
        let core = Core::new(SimRing::new(1, Faults::default()));
        let (mut tasks, slot, gone, _file) = reading(&core);
        settle(&core, &mut tasks);
        assert!(tasks.is_alive(slot) && !gone.get(), "it parks");
        tasks.remove(slot);
        assert!(gone.get());
        assert_eq!(core.allocate(), slot);
    }

    #[test]
    fn an_interrupted_slot_waits_for_the_kernels_work_alone() {
        use std::os::fd::AsRawFd;
        use std::time::{Duration, Instant};
        const HOUR: Duration = Duration::from_secs(3600);
        let core = uring();
        let event = nix::sys::eventfd::EventFd::new().unwrap();
        let file = Target::Fd(std::os::fd::AsFd::as_fd(&event).as_raw_fd());
        let mut tasks: Tasks<Uring, super::Background> = Tasks::new(core.clone());
        let results: Rc<Cell<[i32; 3]>> = Rc::default();
        let ended = results.clone();
        let slot = tasks.add(|io| {
            Box::pin(async move {
                let polled = io.rest(&Sqe::PollOnce { file }).await;
                let again = io.rest(&Sqe::PollOnce { file }).await;
                io.rest_for(HOUR).await;
                // Work of the kernel's own is done as ever.
                let work = io.submit(&Sqe::Timeout { after: Duration::from_millis(1) }).await;
                ended.set([polled, again, work]);
            })
        });
        let sleeper = tasks.add(|io| Box::pin(async move { io.rest_for(HOUR).await }));
        core.ring().enter(false).unwrap();
        let begun = Instant::now();
        core.interrupt(slot);
        core.interrupt(sleeper);
        core.interrupt(slot);
        settle(&core, &mut tasks);
        assert_eq!(results.get(), [-libc::ECANCELED, -libc::ECANCELED, -libc::ETIME]);
        assert!(begun.elapsed() < HOUR / 2);
        // Whoever has the slot next is not.
        let interrupted = Rc::new(Cell::new(true));
        let seen = interrupted.clone();
        let next = tasks.add(|io| Box::pin(async move { seen.set(io.is_interrupted()) }));
        assert!(!interrupted.get() && [slot, sleeper].contains(&next));
    }

    /// What names memory is not cancelled: the kernel may be writing there.
    #[test]
    fn an_operation_in_flight_is_not_interrupted() {
        let core = uring();
        let after = std::time::Duration::from_millis(50);
        let result = Rc::new(Cell::new(0));
        let ended = result.clone();
        let mut tasks = Tasks::new(core.clone());
        let slot = tasks.add(|io| async move {
            ended.set(io.submit(&Sqe::Timeout { after }).await);
        });
        core.interrupt(slot);
        settle(&core, &mut tasks);
        assert_eq!(result.get(), -libc::ETIME);
    }

    #[test]
    fn slots_are_used_again() {
        let core = uring();
        let mut tasks = Tasks::new(core.clone());
        let first = tasks.add(|_| std::future::ready(()));
        let second = tasks.add(|_| std::future::ready(()));
        assert_eq!(first, second);
    }
}
