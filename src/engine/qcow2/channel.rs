//! A qcow2 volume as one worker uses it: what a request asks for, cluster by cluster.

#![forbid(unsafe_code)]

use super::compressed::Unpacked;
use super::entry::Place;
use super::image::{Image, Lookup};
use super::store_io::{ImageOps, clear};
use crate::block::{Data, Errno, Flags, Op, Request, SECTOR};
use crate::engine::losses::Losses;
use crate::engine::node::Edge;
use crate::ring::{Core, Io, Ring};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Units that one look goes over at most: some microseconds.
const MOST_LOOKED: u64 = 1024;

/// One worker's use of the volume.
pub struct Qcow2Channel<R: Ring> {
    pub(super) ops: ImageOps<R>,
    /// What it stands on, if it does.
    base: Vec<Edge<R>>,
    pub(super) unpacked: Arc<Unpacked>,
    /// Which worker: see [`Pins`](super::claims::Pins).
    pub(super) worker: usize,
}

/// Workers so far, of all images.
static WORKERS: AtomicUsize = AtomicUsize::new(0);

impl<R: Ring> Qcow2Channel<R> {
    pub fn new(core: &Rc<Core<R>>, image: &Arc<Image>, unpacked: &Arc<Unpacked>) -> Qcow2Channel<R> {
        let worker = WORKERS.fetch_add(1, Ordering::Relaxed);
        let ops = ImageOps::new(core, image);
        Qcow2Channel { ops, base: Vec::new(), unpacked: unpacked.clone(), worker }
    }

    /// Reads what the image has not from there.
    pub fn stand_on(&mut self, base: Edge<R>) {
        self.base = vec![base];
    }

    pub(super) fn image(&self) -> &Image {
        &self.ops.image
    }

    /// What it stands on.
    pub fn below(&self) -> &[Edge<R>] {
        &self.base
    }

    /// Of its image.
    pub fn losses(&self) -> Option<&Losses> {
        Some(self.ops.image.file.losses())
    }

    /// Has what it stands on fail what waits for others than the kernel.
    pub fn abandon(&self) {
        self.base.iter().for_each(Edge::abandon);
    }

    /// Carries `request` out.
    ///
    /// # Errors
    /// The store's; `EIO` for what is damaged.
    pub async fn submit(&self, io: &Io<R>, request: &Request<'_>) -> Result<(), Errno> {
        let (offset, len) = (request.sector * SECTOR, request.len());
        if request.op == Op::Flush {
            return self.ops.flush(io).await;
        }
        if self.image().read_only {
            // Nothing of it is ever given up.
            return match request.op {
                Op::Read => self.read(io, request.data, len, offset).await,
                _ => Err(Errno::EROFS),
            };
        }
        let _pin = self.ops.image.pins.enter(self.worker);
        if request.op != Op::Read && self.image().is_broken() {
            return Err(Errno::EIO);
        }
        match request.op {
            Op::Read => self.read(io, request.data, len, offset).await,
            Op::Write => self.write(io, request.data, len, offset, request.flags.fua).await,
            Op::Discard => {
                self.discard(io, offset, len).await?;
                self.ops.save(io).await
            }
            Op::WriteZeroes => {
                self.zero(io, offset, len, request.flags.unmap).await?;
                self.ops.save(io).await
            }
            Op::Flush => Ok(()),
        }
    }

    /// Fills `data` with what the disk has at `offset`.
    pub(super) async fn read(&self, io: &Io<R>, data: Data<'_>, len: u64, offset: u64) -> Result<(), Errno> {
        let mut done = 0;
        while done < len {
            let (place, step) = self.look(io, offset + done, len - done).await?;
            let part = data.part(done, step);
            match place {
                Place::At(host) => self.ops.read(io, part, step, host).await?,
                Place::Zero => clear(io, part).await?,
                Place::Below => self.read_below(io, part, step, offset + done).await?,
                Place::Packed { packed, skip } => {
                    Box::pin(self.read_packed(io, part, packed, skip)).await?;
                }
            }
            done += step;
        }
        Ok(())
    }

    /// Where the byte at `offset` is, and how many of the `len` from there on follow it. A look, without a lock and without
    /// a wait, unless the slice of the table has to be read first.
    pub(super) async fn look(&self, io: &Io<R>, offset: u64, len: u64) -> Result<(Place, u64), Errno> {
        let len = len.min(MOST_LOOKED << self.image().layout.unit_bits());
        loop {
            match self.image().lookup(offset, len) {
                Lookup::Found(place, len) => return Ok((place, len)),
                Lookup::Load(tag) => Box::pin(self.ops.load(io, tag)).await?,
                Lookup::Damaged => {
                    let image = self.image();
                    image.give_up(format_args!("its tables say nothing that can be of byte {offset}"));
                    return Err(Errno::EIO);
                }
            }
        }
    }

    async fn read_below(&self, io: &Io<R>, data: Data<'_>, len: u64, offset: u64) -> Result<(), Errno> {
        let Some(base) = self.base.first() else { return clear(io, data).await };
        // It may be smaller.
        let there = base.geometry().bytes().saturating_sub(offset).min(len);
        if there > 0 {
            let request = Request {
                op: Op::Read,
                flags: Flags::default(),
                sector: offset / SECTOR,
                sectors: (there / SECTOR) as u32,
                data: data.part(0, there),
            };
            base.submit(io, &request).await?;
        }
        if there < len { clear(io, data.part(there, len - there)).await } else { Ok(()) }
    }

    /// Whether anything lies below at `offset`.
    pub(super) fn has_below(&self, offset: u64) -> bool {
        self.base.first().is_some_and(|base| offset < base.geometry().bytes())
    }
}
