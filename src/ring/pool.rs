//! Buffers of our own for requests whose memory the store cannot take as it is: a few, used in turn.
//!
//! A guest decides how many requests need one and how long they are, so neither may decide how much memory there is: a
//! request that finds none left waits until one comes back, and takes one for each part of it, so that no request
//! keeps one for long. Exports wait in rotation.

#![forbid(unsafe_code)]

use super::fair::{FairQueue, Waiter};
use super::{Core, Io, Mapping, Ring};
use crate::block::{Errno, Iovec};
use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;

/// The buffers of one volume on one worker. No memory before the first is taken; then it keeps what was touched.
pub struct Pool<R: Ring> {
    core: Rc<Core<R>>,
    memory: OnceCell<Mapping>,
    /// A bit for each buffer that nobody has.
    free: Cell<u32>,
    waiting: RefCell<FairQueue>,
}

/// A buffer of a [`Pool`], page-aligned, which goes back when it is dropped. One that the kernel works on is in a future
/// that is not dropped (see [`ring`](super)), so it goes to nobody else.
pub struct Buffer<'a, R: Ring> {
    pool: &'a Pool<R>,
    index: u32,
}

impl<R: Ring> Pool<R> {
    /// Buffers in a pool.
    pub const COUNT: u32 = 8;

    /// Bytes in a buffer: a multiple of every alignment there is.
    pub const BYTES: usize = 128 << 10;

    /// With every buffer free, and none of them made.
    pub fn new(core: &Rc<Core<R>>) -> Pool<R> {
        Pool {
            core: core.clone(),
            memory: OnceCell::new(),
            free: Cell::new(u32::MAX >> (u32::BITS - Self::COUNT)),
            waiting: RefCell::default(),
        }
    }

    /// Waits for a buffer. What it holds is whatever was there before.
    ///
    /// # Errors
    /// `ENOMEM` when the pool's memory is needed for the first time and cannot be had.
    pub async fn take(&self, io: &Io<R>) -> Result<Buffer<'_, R>, Errno> {
        if self.memory.get().is_none() {
            let all = Mapping::anonymous(Self::COUNT as usize * Self::BYTES).map_err(Errno::from)?;
            let _ = self.memory.set(all);
        }
        // The first one that is free, so that little memory is touched where little is needed at once. Nobody waits
        // while there is one: it would have been given to them.
        let index = self.free.get().trailing_zeros();
        if index < Self::COUNT {
            self.free.set(self.free.get() & !(1 << index));
            return Ok(Buffer { pool: self, index });
        }
        let (group, slot) = (io.group(), io.slot());
        self.waiting.borrow_mut().push(group, Waiter { slot, cost: 0 });
        let waits = Waits { pool: self, group, slot };
        loop {
            io.park().await;
            let granted = self.waiting.borrow_mut().accept(slot);
            if let Some(index) = granted {
                #[expect(clippy::mem_forget, reason = "it has no place to leave any more")]
                std::mem::forget(waits);
                return Ok(Buffer { pool: self, index });
            }
        }
    }

    /// Hands a buffer to whoever is next.
    fn put_back(&self, index: u32) {
        let next = self.waiting.borrow_mut().grant(index);
        match next {
            Some(waiter) => self.core.wake(waiter.slot),
            None => self.free.set(self.free.get() | 1 << index),
        }
    }
}

/// A slot in the queue. Dropped only where the slot ends while it waits.
struct Waits<'a, R: Ring> {
    pool: &'a Pool<R>,
    group: usize,
    slot: u32,
}

impl<R: Ring> Drop for Waits<'_, R> {
    fn drop(&mut self) {
        let granted = self.pool.waiting.borrow_mut().leave(self.group, self.slot);
        if let Some(index) = granted {
            self.pool.put_back(index);
        }
    }
}

impl<R: Ring> Buffer<'_, R> {
    fn at(&self) -> (Option<&Mapping>, usize) {
        (self.pool.memory.get(), self.index as usize * Pool::<R>::BYTES)
    }

    /// Copies from the ranges, which together have at most [`Pool::BYTES`].
    pub fn gather<'m>(&self, iovecs: impl Iterator<Item = Iovec<'m>>) {
        if let (Some(memory), at) = self.at() {
            memory.gather_each(at, iovecs);
        }
    }

    /// Copies into the ranges, which together have at most [`Pool::BYTES`].
    pub fn scatter<'m>(&self, iovecs: impl Iterator<Item = Iovec<'m>>) {
        if let (Some(memory), at) = self.at() {
            memory.scatter_each(at, iovecs);
        }
    }

    /// Its first `len` bytes, at most [`Pool::BYTES`].
    pub fn iovec(&self, len: usize) -> Iovec<'_> {
        let (memory, at) = self.at();
        memory.map_or(Iovec::EMPTY, |memory| memory.iovec(at, len.min(Pool::<R>::BYTES)))
    }
}

impl<R: Ring> Drop for Buffer<'_, R> {
    fn drop(&mut self) {
        self.pool.put_back(self.index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::Tasks;
    use crate::ring::sim::{Faults, SimRing, get, put};
    use std::cell::RefCell;

    type Holders = Rc<RefCell<Vec<u32>>>;

    fn pool() -> (Rc<Core<SimRing>>, Rc<Pool<SimRing>>) {
        let core = Core::new(SimRing::new(1, Faults::default()));
        let pool = Rc::new(Pool::new(&core));
        (core, pool)
    }

    /// A slot of `group` that takes a buffer, says so, and keeps it until it is woken.
    async fn hold(io: Io<SimRing>, pool: Rc<Pool<SimRing>>, group: usize, number: u32, holders: Holders) {
        io.set_group(group);
        let buffer = pool.take(&io).await.unwrap();
        holders.borrow_mut().push(number);
        io.park().await;
        drop(buffer);
    }

    #[test]
    fn there_are_so_many_buffers_and_no_more() {
        let (core, pool) = pool();
        assert!(pool.memory.get().is_none(), "none is made before it is needed");
        let (mut tasks, holders) = (Tasks::new(core.clone()), Holders::default());
        let count = Pool::<SimRing>::COUNT;
        let slots: Vec<u32> = (0..3 * count)
            .map(|number| tasks.add(|io| hold(io, pool.clone(), 0, number, holders.clone())))
            .collect();
        tasks.run_ready();
        assert_eq!(*holders.borrow(), (0..count).collect::<Vec<_>>());
        for done in 0..2 * count {
            core.wake(slots[done as usize]);
            tasks.run_ready();
            assert_eq!(
                *holders.borrow(),
                (0..count + done + 1).collect::<Vec<_>>(),
                "first come, first served"
            );
        }
        slots[2 * count as usize..].iter().for_each(|slot| core.wake(*slot));
        tasks.run_ready();
        assert_eq!(pool.free.get().count_ones(), count);
        assert!(pool.waiting.borrow().is_empty());
    }

    #[test]
    fn exports_wait_in_rotation() {
        let (core, pool) = pool();
        let (mut tasks, holders) = (Tasks::new(core.clone()), Holders::default());
        let count = Pool::<SimRing>::COUNT;
        let mut add = |group, number| tasks.add(|io| hold(io, pool.clone(), group, number, holders.clone()));
        let slots: Vec<u32> = (0..100).map(|number| add(1, number)).collect();
        add(2, 1000);
        core.wake(slots[0]);
        core.wake(slots[1]);
        tasks.run_ready();
        assert_eq!(
            holders.borrow()[count as usize..],
            [count, 1000],
            "not behind a hundred of another export"
        );
    }

    /// A slot may be woken for anything; only its turn gives it a buffer.
    #[test]
    fn a_wake_is_no_grant_and_who_ends_leaves_the_queue() {
        let (core, pool) = pool();
        let (mut tasks, holders) = (Tasks::new(core.clone()), Holders::default());
        let count = Pool::<SimRing>::COUNT;
        let slots: Vec<u32> = (0..count + 3)
            .map(|number| tasks.add(|io| hold(io, pool.clone(), 0, number, holders.clone())))
            .collect();
        core.wake(slots[count as usize]);
        tasks.run_ready();
        assert_eq!(holders.borrow().len(), count as usize);
        tasks.remove(slots[count as usize]);
        // Its turn has come, and it ends before it hears of it.
        drop(Buffer { pool: &pool, index: 0 });
        tasks.remove(slots[count as usize + 1]);
        tasks.run_ready();
        assert_eq!(holders.borrow()[count as usize..], [count + 2]);
    }

    #[test]
    fn buffers_are_apart_and_aligned() {
        let (core, pool) = pool();
        let mut tasks = Tasks::new(core.clone());
        let bytes = Mapping::anonymous(Pool::<SimRing>::BYTES).unwrap();
        tasks.add(|io| {
            let (pool, len) = (pool.clone(), Pool::<SimRing>::BYTES);
            async move {
                let (a, b) = (pool.take(&io).await.unwrap(), pool.take(&io).await.unwrap());
                assert!(a.iovec(len).base().addr() % 4096 == 0 && b.iovec(len).base().addr() % 4096 == 0);
                put(&bytes, 0, &vec![1; len]);
                a.gather([bytes.iovec(0, len)].into_iter());
                put(&bytes, 0, &vec![2; len]);
                b.gather([bytes.iovec(0, len)].into_iter());
                a.scatter([bytes.iovec(0, len)].into_iter());
                assert!(get(&bytes, 0, len).iter().all(|byte| *byte == 1));
                assert_eq!(a.iovec(len + 1).len(), len);
            }
        });
        tasks.run_ready();
        assert_eq!(pool.free.get().count_ones(), Pool::<SimRing>::COUNT);
    }
}
