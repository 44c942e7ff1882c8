//! A file or block device, through one worker's ring.

use super::FileStore;
use super::inline::Inline;
use super::probe::Kind;
use crate::block::{Data, Errno};
use crate::engine::losses::Losses;
use crate::engine::node::Leaf;
use crate::engine::transfer::{self, Direction, Via};
use crate::ring::{Core, Io, Pool, Ring, Sqe, Target};
use libc::{FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, RWF_DSYNC, RWF_NOWAIT};
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::time::Instant;

/// One worker's use of a store. Cheap to call: one submission or system call a request, no
/// allocation.
pub struct FileOps<R: Ring> {
    core: Rc<Core<R>>,
    volume: FileStore,
    /// The store in the ring's file table, for as long as this lives.
    target: Target,
    /// The same by its descriptor, for what is carried out here.
    plain: Target,
    inline: Inline,
    /// For transfers that direct I/O does not take as they are. Its own, and not the worker's: a store that hangs keeps
    /// none from another.
    bounce: Pool<R>,
}

impl<R: Ring> FileOps<R> {
    /// Enters the store in the ring's file table.
    pub fn new(core: &Rc<Core<R>>, volume: FileStore) -> FileOps<R> {
        let target = core.ring().register(volume.file.as_raw_fd());
        let plain = Target::Fd(volume.file.as_raw_fd());
        let inline = Inline::new(volume.reads_wait, volume.writes_wait());
        FileOps { core: core.clone(), volume, target, plain, inline, bounce: Pool::new(core) }
    }

    /// An operation that the kernel may answer with the failed write-back of other writes: then they are lost.
    async fn sync(&self, operation: impl Future<Output = Result<(), Errno>>) -> Result<(), Errno> {
        let _sync = self.volume.losses().begin();
        let result = operation.await;
        if let Err(errno) = result
            && tells_of_loss(errno)
        {
            self.volume.losses().report();
        }
        result
    }

    /// Whether direct I/O takes the ranges as they are. Guests of our time always align theirs; firmware and
    /// some installers do not.
    fn fits(&self, data: Data<'_>) -> bool {
        let align = self.volume.memory_alignment as usize;
        let block = self.volume.length_alignment as usize;
        match data {
            Data::Iovecs(window) if align > 1 => {
                window.iter().all(|iovec| iovec.base().addr() % align == 0 && iovec.len() % block == 0)
            }
            _ => true,
        }
    }

    async fn transfer(
        &self,
        io: &Io<R>,
        direction: Direction,
        data: Data<'_>,
        len: u64,
        offset: u64,
    ) -> Result<(), Errno> {
        if let Some(begin) = self.inline_start(io, direction, data, len, offset) {
            let done = transfer::exactly(io, Via::Inline, self.plain, direction, data, len, offset).await;
            self.inline.record(len, begin.elapsed());
            return done;
        }
        if self.fits(data) {
            return transfer::exactly(io, Via::Ring, self.target, direction, data, len, offset).await;
        }
        self.bounce(io, direction, data, len, offset).await
    }

    /// When a transfer begins that is to be carried out here. One that must reach the disk waits for it and never is; and
    /// none is where it could hold up other volumes: a frozen file system, or a server that is gone, blocks for ever.
    fn inline_start(
        &self,
        io: &Io<R>,
        direction: Direction,
        data: Data<'_>,
        len: u64,
        offset: u64,
    ) -> Option<Instant> {
        let Data::Iovecs(window) = data else { return None };
        if self.core.is_shared() {
            return None;
        }
        match direction {
            Direction::Read => self.inline.read(len),
            Direction::Write { rw_flags: 0 } => self.inline.write(len, || {
                // Should it succeed, the same bytes are written once more.
                let attempt = Direction::Write { rw_flags: RWF_NOWAIT };
                io.submit_sync(&transfer::vector(self.plain, attempt, window, offset))
            }),
            Direction::Write { .. } => None,
        }
    }

    /// Through aligned buffers of our own, the slow path: one for each part, since a guest decides how many such
    /// transfers there are and how long (it may name the same memory many times over).
    async fn bounce(
        &self,
        io: &Io<R>,
        direction: Direction,
        data: Data<'_>,
        len: u64,
        offset: u64,
    ) -> Result<(), Errno> {
        let Data::Iovecs(window) = data else { return Err(Errno::EINVAL) };
        let mut done = 0;
        while done < len {
            let buffer = self.bounce.take(io).await?;
            let step = (len - done).min(Pool::<R>::BYTES as u64) as usize;
            let part = window.part(done, step as u64);
            if direction != Direction::Read {
                io.turn(step as u32).await;
                buffer.gather(part.iter());
            }
            let whole = [buffer.iovec(step)];
            transfer::exactly(
                io,
                Via::Ring,
                self.target,
                direction,
                Data::of(&whole),
                step as u64,
                offset + done,
            )
            .await?;
            if direction == Direction::Read {
                io.turn(step as u32).await;
                buffer.scatter(part.iter());
            }
            done += step as u64;
        }
        Ok(())
    }

    async fn once(&self, io: &Io<R>, sqe: Sqe<'_>) -> Result<(), Errno> {
        loop {
            match Errno::split(io.submit(&sqe).await) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    async fn fallocate(&self, io: &Io<R>, mode: i32, offset: u64, len: u64) -> Result<(), Errno> {
        let mode = mode | FALLOC_FL_KEEP_SIZE;
        self.once(io, Sqe::Fallocate { file: self.target, mode, offset, len }).await
    }
}

/// Whether an error of a sync may be of writes that were acknowledged before. The others are answers to the request itself.
fn tells_of_loss(errno: Errno) -> bool {
    !matches!(errno, Errno::EINVAL | Errno::EOPNOTSUPP | Errno::EFAULT | Errno::EROFS)
}

impl<R: Ring> Leaf<R> for FileOps<R> {
    async fn read(&self, io: &Io<R>, data: Data<'_>, len: u64, offset: u64) -> Result<(), Errno> {
        self.transfer(io, Direction::Read, data, len, offset).await
    }

    async fn write(&self, io: &Io<R>, data: Data<'_>, len: u64, offset: u64, fua: bool) -> Result<(), Errno> {
        if fua {
            let direction = Direction::Write { rw_flags: RWF_DSYNC };
            return self.sync(self.transfer(io, direction, data, len, offset)).await;
        }
        self.transfer(io, Direction::Write { rw_flags: 0 }, data, len, offset).await
    }

    /// `fdatasync`, which also tells a block device to empty its cache. An error is reported once by the
    /// kernel and once by us: it is never tried again, because a second call would succeed over lost data.
    async fn flush(&self, io: &Io<R>) -> Result<(), Errno> {
        self.sync(async { Errno::split(io.submit(&Sqe::Fdatasync { file: self.target }).await).map(drop) })
            .await
    }

    async fn discard(&self, io: &Io<R>, offset: u64, len: u64) -> Result<(), Errno> {
        if self.volume.kind == Kind::Regular {
            return self.fallocate(io, FALLOC_FL_PUNCH_HOLE, offset, len).await;
        }
        let done = match self.once(io, Sqe::BlockDiscard { file: self.target, offset, len }).await {
            // Before Linux 6.12 there is no such command. A hole in a block device is zeroes without allocation: stronger
            // than a discard, and refused where the device cannot.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => {
                self.fallocate(io, FALLOC_FL_PUNCH_HOLE, offset, len).await
            }
            other => other,
        };
        match done {
            // A page at the edge is in use by a neighbour's request, though the device is ours. A discard may do nothing.
            Err(Errno::EBUSY) => Ok(()),
            other => other,
        }
    }

    async fn write_zeroes(&self, io: &Io<R>, offset: u64, len: u64, unmap: bool) -> Result<(), Errno> {
        let mut done = Err(Errno::EOPNOTSUPP);
        if unmap {
            done = self.fallocate(io, FALLOC_FL_PUNCH_HOLE, offset, len).await;
        }
        if done == Err(Errno::EOPNOTSUPP) {
            done = self.fallocate(io, FALLOC_FL_ZERO_RANGE, offset, len).await;
        }
        match done {
            // Without a claim (lock=off) on a device that somebody else has claimed, the kernel will not drop its cached
            // pages. They can be written.
            Err(Errno::EBUSY) if self.volume.kind == Kind::BlockDevice => Err(Errno::EOPNOTSUPP),
            other => other,
        }
    }

    fn losses(&self) -> Option<&Losses> {
        Some(self.volume.losses())
    }

    fn may_flush_again(&self, _: Errno) -> bool {
        false
    }

    fn waits_for(&self) -> &'static str {
        "the store"
    }

    fn hang_up(&self) {}

    fn abandon(&self) {}
}

impl<R: Ring> Drop for FileOps<R> {
    fn drop(&mut self) {
        self.core.ring().release(self.target);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::settle;
    use crate::ring::Tasks;
    use crate::ring::sim::{Faults, SimRing};
    use std::cell::Cell;
    use std::os::unix::fs::FileExt;
    use std::pin::Pin;
    use std::sync::Arc;

    /// A discard of the second page of three of a device, and what the device holds then.
    fn discard(faults: Faults) -> (Result<(), Errno>, Vec<u8>, usize) {
        on_device(faults, |ops, io| Box::pin(async move { ops.discard(&io, 4096, 4096).await }))
    }

    type Done = Pin<Box<dyn Future<Output = Result<(), Errno>>>>;

    fn on_device(
        faults: Faults,
        run: impl FnOnce(Rc<FileOps<SimRing>>, Io<SimRing>) -> Done,
    ) -> (Result<(), Errno>, Vec<u8>, usize) {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 3 * 4096], 0).unwrap();
        let volume = FileStore {
            file: Arc::new(file),
            losses: Arc::default(),
            kind: Kind::BlockDevice,
            memory_alignment: 1,
            length_alignment: 512,
            reads_wait: false,
            tail: 0,
        };
        let core = Core::new(SimRing::new(1, faults));
        let ops = Rc::new(FileOps::new(&core, volume));
        let (mut tasks, result) = (Tasks::new(core.clone()), Rc::new(Cell::new(None)));
        tasks.add(|io| {
            let result = result.clone();
            async move { result.set(Some(run(ops, io).await)) }
        });
        settle(&core, &mut tasks);
        let punched = core.ring().count(|sqe| matches!(sqe, Sqe::Fallocate { .. }));
        (result.get().unwrap(), core.ring().contents().unwrap(), punched)
    }

    #[test]
    fn a_devices_discard_is_its_own_command() {
        let (result, bytes, punched) = discard(Faults::default());
        assert_eq!((result, punched), (Ok(()), 0));
        assert!(
            bytes[4096..8192].iter().all(|byte| *byte != 7) && bytes[8192..].iter().all(|byte| *byte == 7)
        );
    }

    #[test]
    fn an_old_kernel_punches_a_hole() {
        let (result, bytes, punched) = discard(Faults { no_discard: true, ..Faults::default() });
        assert_eq!((result, punched), (Ok(()), 1));
        assert_eq!(bytes[4096..8192], [0; 4096]);
        let faults = Faults { no_discard: true, no_punch: true, ..Faults::default() };
        assert_eq!(discard(faults).0, Err(Errno::EOPNOTSUPP));
    }

    /// What cannot be dropped can be written: the engine does that.
    #[test]
    fn zeroes_that_are_in_the_way_are_written() {
        for unmap in [false, true] {
            let faults = Faults { busy_fallocate: true, ..Faults::default() };
            let zeroes = |ops: Rc<FileOps<SimRing>>, io: Io<SimRing>| -> Done {
                Box::pin(async move { ops.write_zeroes(&io, 4096, 4096, unmap).await })
            };
            assert_eq!(on_device(faults, zeroes).0, Err(Errno::EOPNOTSUPP));
        }
    }

    /// A neighbour's request has a page of it: it is not done, which a discard may be, and no error to a file system.
    #[test]
    fn a_discard_that_is_in_the_way_is_not_done_and_no_error() {
        let (result, bytes, punched) = discard(Faults { busy_discard: true, ..Faults::default() });
        assert_eq!((result, punched), (Ok(()), 0));
        assert_eq!(bytes, [7; 3 * 4096]);
        let old = discard(Faults { no_discard: true, busy_fallocate: true, ..Faults::default() });
        assert_eq!(old.0, Ok(()), "by an old kernel");
        assert_eq!(
            discard(Faults { io_error: 100, ..Faults::default() }).0,
            Err(Errno::EIO),
            "no other error is"
        );
    }
}
