//! A volume in this process's memory: fast, and gone with it.

use super::driver::{AnyStore, Capabilities, Driver, Open, Opened, Store, Summary};
use super::error::OpenError;
use super::error::ResizeError;
use super::identity::Identity;
use super::losses::Losses;
use super::node::Leaf;
use super::settings::{DEFAULT_BLOCK, check_size};
use crate::block::{Data, DiscardLimits, Errno, Geometry, GeometryError, Iovec, Size};
use crate::ring::{Core, Io, Mapping, PASS_WORK, Ring};
use std::fmt;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::Sender;

/// `driver = "memory"`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct MemoryConfig {
    /// Capacity.
    pub size: Size,
    /// Logical block in bytes, 512 or 4096; `None`: 512.
    pub block_size: Option<u32>,
}

impl Driver for MemoryConfig {
    const NAME: &'static str = "memory";
    const TARGET: &'static str = "size";
    const HELP: &'static str = "
  memory:SIZE  lost when the service ends; block-size=512|4096
";
    type Store = Memory;

    fn target(&self) -> String {
        self.size.to_string()
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        check_size(self.size, self.block_size)
    }

    fn examine(&self) -> Result<(), String> {
        Ok(())
    }

    fn summary(&self) -> Summary<'_> {
        let block_size = self.block_size;
        Summary { base: None, block_size, read_only: false, reconnects: false, needs: None }
    }

    fn details(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        Ok(())
    }

    fn opener(&self, name: &str, _: Option<Open>) -> Result<Open, OpenError> {
        let (name, config) = (name.to_owned(), self.clone());
        Ok(Box::new(move || {
            let block = config.block_size.unwrap_or(DEFAULT_BLOCK);
            let geometry = geometry(config.size.bytes(), block);
            let geometry = geometry.map_err(|source| OpenError::Geometry { name: name.clone(), source })?;
            let bytes = geometry.bytes();
            let memory = Memory::new(bytes);
            let memory = memory.map_err(|source| OpenError::Memory { name: name.clone(), bytes, source })?;
            let identity = Identity::of_nothing(Self::NAME);
            Ok(Opened { geometry, identity, tail: 0, store: AnyStore::Memory(memory) })
        }))
    }
}

/// Memory shared by all workers. Two requests that race for the same bytes leave a mixture, as on a disk.
#[derive(Clone)]
pub struct Memory {
    mapping: Arc<Mapping>,
}

/// Bytes copied at one go. A request may have any number of them, and they are copied on the worker's own time, which
/// others wait for.
const SLICE: usize = PASS_WORK as usize;

/// Bytes given back at one go, up to a multiple of this: 0.2 ms where their pages are small. A huge page goes whole.
const ZERO_SLICE: u64 = 2 << 20;

/// What giving back a page costs, in bytes that could have been copied: 1 us.
const MADVISE: u64 = 16 << 10;

/// The most that a discard or write-zeroes covers.
const MAX_ZERO_SECTORS: u32 = (64 << 20) / 512;

/// The shape of a memory volume.
///
/// # Errors
/// See [`Geometry::new`].
pub(super) fn geometry(bytes: u64, logical_block: u32) -> Result<Geometry, GeometryError> {
    let mut geometry = Geometry::new(bytes, logical_block)?;
    // Whole pages go back to the system.
    geometry.discard = Some(DiscardLimits { granularity: 4096, max_sectors: MAX_ZERO_SECTORS });
    geometry.max_write_zeroes = MAX_ZERO_SECTORS;
    Ok(geometry)
}

impl Memory {
    /// Reserves `bytes`; memory is used as blocks are written.
    ///
    /// # Errors
    /// `ENOMEM` where the address space does not suffice.
    pub fn new(bytes: u64) -> io::Result<Memory> {
        let len = usize::try_from(bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        Ok(Memory { mapping: Arc::new(Mapping::anonymous(len)?) })
    }

    /// Bytes that were reserved, whatever the volume shows of them.
    pub fn len(&self) -> u64 {
        self.mapping.len() as u64
    }

    /// Gives the bytes from `start` to `end` back: they read zero from now on. Nothing if there are none.
    ///
    /// # Panics
    /// When `end` is past what was reserved.
    pub fn forget(&self, start: u64, end: u64) {
        if start < end {
            self.mapping.zero(start as usize, (end - start) as usize);
        }
    }
}

/// Has `copy` do its work on `iovecs`, of `len` bytes together, from `offset` on: in turns, so that others get theirs.
async fn in_slices<R: Ring>(
    io: &Io<R>,
    data: Data<'_>,
    len: u64,
    offset: u64,
    copy: impl Fn(usize, Iovec<'_>),
) -> Result<(), Errno> {
    let Data::Iovecs(window) = data else { return Err(Errno::EINVAL) };
    let mut at = offset as usize;
    if len <= SLICE as u64 {
        io.turn(len as u32).await;
        window.iter().for_each(|part| {
            copy(at, part);
            at += part.len();
        });
        return Ok(());
    }
    let mut left = 0;
    for mut rest in window.iter() {
        while !rest.is_empty() {
            if left == 0 {
                io.turn(PASS_WORK).await;
                left = SLICE;
            }
            let mut part = rest;
            rest = part.split_off(left);
            copy(at, part);
            at += part.len();
            left -= part.len();
        }
    }
    Ok(())
}

impl Memory {
    /// Makes a range read zero, in turns.
    async fn zero<R: Ring>(&self, io: &Io<R>, offset: u64, len: u64) -> Result<(), Errno> {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let next = (at + 1).next_multiple_of(ZERO_SLICE).min(end);
            io.turn((next - at).clamp(MADVISE, PASS_WORK.into()) as u32).await;
            self.mapping.zero(at as usize, (next - at) as usize);
            at = next;
        }
        Ok(())
    }
}

impl Store for Memory {
    type Channel<R: Ring> = Memory;

    fn capabilities(&self) -> Capabilities {
        Capabilities { persists: false, single_worker: false, registered: false, prefers_registered: false }
    }

    fn each_loss(&self, _: &mut dyn FnMut(&Losses)) {}

    fn size(&self, capacity: u64) -> Result<u64, ResizeError> {
        Ok(capacity)
    }

    fn offered(&self) -> Option<u64> {
        None
    }

    fn tell_growth(&self, _: Sender<String>, _: &str) {}

    fn takes(&self, bytes: u64) -> Result<(), ResizeError> {
        if bytes <= self.len() {
            return Ok(());
        }
        Err(ResizeError::Fixed(
            "a memory volume cannot be larger than it was opened: its addresses are set aside then",
        ))
    }

    fn set_size(&self, from: u64, bytes: u64) -> Result<(), ResizeError> {
        self.forget(bytes, from);
        Ok(())
    }

    fn shows(&self, _: u64) {}

    fn switch(&self, _: &str, _: bool) -> usize {
        0
    }

    fn close(&self) {}

    fn attach<R: Ring>(&self, _: &Rc<Core<R>>) -> Memory {
        self.clone()
    }
}

impl<R: Ring> Leaf<R> for Memory {
    async fn read(&self, io: &Io<R>, data: Data<'_>, len: u64, offset: u64) -> Result<(), Errno> {
        in_slices(io, data, len, offset, |at, part| self.mapping.scatter(at, &[part])).await
    }

    async fn write(&self, io: &Io<R>, data: Data<'_>, len: u64, offset: u64, _: bool) -> Result<(), Errno> {
        in_slices(io, data, len, offset, |at, part| self.mapping.gather(at, &[part])).await
    }

    async fn flush(&self, _: &Io<R>) -> Result<(), Errno> {
        Ok(())
    }

    async fn discard(&self, io: &Io<R>, offset: u64, len: u64) -> Result<(), Errno> {
        self.zero(io, offset, len).await
    }

    async fn write_zeroes(&self, io: &Io<R>, offset: u64, len: u64, _: bool) -> Result<(), Errno> {
        self.zero(io, offset, len).await
    }

    fn losses(&self) -> Option<&Losses> {
        None
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
