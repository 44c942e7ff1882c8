//! Reads of compressed clusters.

#![forbid(unsafe_code)]

use super::channel::Qcow2Channel;
use super::entry::Packed;
use crate::block::{Data, Errno, Iovec};
use crate::ring::{Io, Pool, Ring};
use std::sync::Arc;

/// What a compressed cluster takes of a worker's time, in copies of its bytes (deflate some 300 MB/s, a copy some 10 GB/s).
const WORK: u32 = 32;

impl<R: Ring> Qcow2Channel<R> {
    /// Fills `data` with what a compressed cluster has from its byte `skip` on.
    pub(super) async fn read_packed(
        &self,
        io: &Io<R>,
        data: Data<'_>,
        packed: Packed,
        skip: u64,
    ) -> Result<(), Errno> {
        let Data::Iovecs(window) = data else { return Err(Errno::EINVAL) };
        let bytes = match self.unpacked.get(packed) {
            Some(bytes) => bytes,
            None => self.unpack(io, packed).await?,
        };
        let (mut at, mut buffer) = (skip as usize, None);
        let step_bytes = Pool::<R>::BYTES;
        let mut done = 0;
        while done < window.len() {
            let step = (window.len() - done).min(step_bytes as u64);
            let part = window.part(done, step);
            if buffer.is_none() {
                buffer = Some(self.ops.pool.take(io).await?);
            }
            io.turn(step as u32).await;
            if let Some(buffer) = &buffer {
                let mut copy = bytes.get(at..at + step as usize).ok_or(Errno::EIO)?.to_vec();
                buffer.gather([Iovec::of(&mut copy)].into_iter());
                buffer.scatter(part.iter());
            }
            at += step as usize;
            done += step;
        }
        Ok(())
    }

    async fn unpack(&self, io: &Io<R>, packed: Packed) -> Result<Arc<[u8]>, Errno> {
        let image = self.image();
        // The end of the last sector may be missing.
        let there = image.file_end().saturating_sub(packed.offset).min(packed.len);
        // Whole pieces, for direct I/O.
        let piece = if image.file.is_direct() { 4096 } else { 1 };
        let from = packed.offset / piece * piece;
        let to = (packed.offset + there).next_multiple_of(piece);
        let bytes = self.ops.read_table(io, from, (to - from) as usize).await?;
        io.turn((image.layout.cluster() as u32).saturating_mul(WORK).min(crate::ring::PASS_WORK)).await;
        let within = (packed.offset - from) as usize;
        let Some(unpacked) = self.unpacked.unpack(&bytes[within..within + there as usize]) else {
            log::warn!("{}: its compressed cluster at {:#x} cannot be unpacked", image.name, packed.offset);
            return Err(Errno::EIO);
        };
        self.unpacked.put(packed, &unpacked);
        Ok(unpacked)
    }
}
