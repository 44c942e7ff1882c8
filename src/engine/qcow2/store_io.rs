//! One worker's way to an image file: bytes of tables, in and out.

#![forbid(unsafe_code)]

use super::cache::State;
use super::image::Image;
use crate::block::{Data, Errno, Iovec};
use crate::engine::file::FileOps;
use crate::engine::node::Leaf;
use crate::engine::until::until;
use crate::ring::{Core, Io, Pool, Ring, zeroes};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// The wait for room in the cache where all of it is being read or written.
const BUSY: Duration = Duration::from_micros(100);

/// One worker's use of an image file.
pub struct ImageOps<R: Ring> {
    pub image: Arc<Image>,
    pub file: FileOps<R>,
    /// For tables and for what is unpacked: whoever has a buffer of it waits for the store alone.
    pub pool: Pool<R>,
    /// For what is copied on a first write: whoever has one may wait for one of the others.
    pub copies: Pool<R>,
}

impl<R: Ring> ImageOps<R> {
    pub fn new(core: &Rc<Core<R>>, image: &Arc<Image>) -> ImageOps<R> {
        ImageOps {
            image: image.clone(),
            file: FileOps::new(core, image.file.clone()),
            pool: Pool::new(core),
            copies: Pool::new(core),
        }
    }

    /// Fills `data` from the file; what lies past its end is zero.
    pub async fn read(&self, io: &Io<R>, data: Data<'_>, len: u64, offset: u64) -> Result<(), Errno> {
        let there = self.image.file_end().saturating_sub(offset).min(len);
        if there > 0 {
            self.file.read(io, data.part(0, there), there, offset).await?;
        }
        if there < len {
            clear(io, data.part(there, len - there)).await?;
        }
        Ok(())
    }

    /// Reads some bytes of tables: whole pieces, for direct I/O.
    pub async fn read_table(&self, io: &Io<R>, offset: u64, len: usize) -> Result<Vec<u8>, Errno> {
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            let step = (len - done).min(Pool::<R>::BYTES);
            let buffer = self.pool.take(io).await?;
            let whole = [buffer.iovec(step)];
            self.read(io, Data::of(&whole), step as u64, offset + done as u64).await?;
            buffer.scatter([Iovec::of(&mut bytes[done..done + step])].into_iter());
            done += step;
        }
        Ok(bytes)
    }

    /// Writes some, likewise.
    pub async fn write_table(&self, io: &Io<R>, offset: u64, bytes: &mut [u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < bytes.len() {
            let step = (bytes.len() - done).min(Pool::<R>::BYTES);
            let buffer = self.pool.take(io).await?;
            buffer.gather([Iovec::of(&mut bytes[done..done + step])].into_iter());
            let whole = [buffer.iovec(step)];
            let at = offset + done as u64;
            self.file.write(io, Data::of(&whole), step as u64, at, false).await?;
            self.image.grown(at + step as u64);
            done += step;
        }
        Ok(())
    }

    /// Makes a part of the file read zero, which may lie past its end: then the file grows.
    pub async fn write_zeroes(&self, io: &Io<R>, offset: u64, len: u64) -> Result<(), Errno> {
        let end = self.image.file_end();
        let below = end.saturating_sub(offset).min(len);
        if below > 0 {
            match self.file.write_zeroes(io, offset, below, true).await {
                Err(Errno::EOPNOTSUPP) => self.write_out_zeroes(io, offset, below).await?,
                other => other?,
            }
        }
        if below < len {
            // Its last bytes: what lies before them is a hole.
            let last = len.min(4096).min(len - below);
            self.write_out_zeroes(io, offset + len - last, last).await?;
            self.image.grown(offset + len);
        }
        Ok(())
    }

    /// Brings what was written before to stable storage. Where the store has lost something by then, whoever was told, no change
    /// of the tables is to point at it: nothing more is written.
    pub async fn sync(&self, io: &Io<R>) -> Result<(), Errno> {
        let done = self.file.flush(io).await;
        let losses = self.image.file.losses();
        if done.is_ok() {
            losses.settle(io).await?;
        }
        if losses.reports() > 0 {
            self.image.give_up(format_args!("the store has lost what was written"));
            return Err(done.err().unwrap_or(Errno::EIO));
        }
        done
    }

    async fn write_out_zeroes(&self, io: &Io<R>, offset: u64, len: u64) -> Result<(), Errno> {
        let mut done = 0;
        while done < len {
            let part = [zeroes(len - done)];
            let step = part[0].len() as u64;
            self.file.write(io, Data::of(&part), step, offset + done, false).await?;
            done += step;
        }
        Ok(())
    }

    /// Has the slice at `tag` in the cache. Somebody else may need its room at once: then it has to be loaded again.
    pub async fn load(&self, io: &Io<R>, tag: u64) -> Result<(), Errno> {
        let image = &*self.image;
        loop {
            let spot = {
                let _state = image.state();
                match image.cache.find(tag) {
                    Some((_, State::Loading)) => None,
                    Some(_) => return Ok(()),
                    None => image.cache.reserve(tag).map(Ok).or(Some(Err(()))),
                }
            };
            match spot {
                // Another request loads it.
                None => {
                    let loading = |found: Option<(_, State)>| matches!(found, Some((_, State::Loading)));
                    until(io, || {
                        let _state = image.state();
                        (!loading(image.cache.find(tag))).then_some(())
                    })
                    .await?;
                }
                // All that could go has changes, or is at work.
                Some(Err(())) if !image.state().dirty.is_empty() => self.write_back(io).await?,
                Some(Err(())) => io.rest_for(BUSY).await,
                Some(Ok(spot)) => {
                    let loading = Loading { image, spot };
                    let bytes = self.read_table(io, tag, image.cache.slice() as usize).await?;
                    if !image.read_only && !image.is_sound(&bytes) {
                        image.give_up(format_args!("its table at {tag:#x} points where it may not"));
                    }
                    let _state = image.state();
                    image.cache.loaded(loading.done(), Some(&bytes));
                    return Ok(());
                }
            }
        }
    }
}

/// A slice that is being read: whoever fails at it leaves the room to others.
struct Loading<'a> {
    image: &'a Image,
    spot: super::cache::Spot,
}

impl Loading<'_> {
    fn done(self) -> super::cache::Spot {
        let spot = self.spot;
        #[expect(clippy::mem_forget, reason = "it has come")]
        std::mem::forget(self);
        spot
    }
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        let _state = self.image.state();
        self.image.cache.loaded(self.spot, None);
    }
}

/// Makes memory zero, on the worker's own time.
pub async fn clear<R: Ring>(io: &Io<R>, data: Data<'_>) -> Result<(), Errno> {
    let Data::Iovecs(window) = data else { return Err(Errno::EINVAL) };
    for iovec in window.iter() {
        let mut rest = iovec;
        while !rest.is_empty() {
            let mut part = rest;
            rest = part.split_off(crate::ring::PASS_WORK as usize / 2);
            io.turn(part.len() as u32).await;
            crate::ring::clear(part);
        }
    }
    Ok(())
}
