//! A file volume as what all workers share of it.

#![forbid(unsafe_code)]

use super::{FileOps, FileStore};
use crate::engine::driver::{Capabilities, Store};
use crate::engine::error::ResizeError;
use crate::engine::losses::Losses;
use crate::ring::{Core, Ring};
use std::rc::Rc;
use std::sync::mpsc::Sender;

impl Store for FileStore {
    type Channel<R: Ring> = FileOps<R>;

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            persists: true,
            single_worker: false,
            registered: true,
            // Through the page cache there is one copy in any case, and what the worker carries out itself it can only do
            // with memory of its own: ext4's buffered writes take half as long so.
            prefers_registered: self.is_direct(),
        }
    }

    fn each_loss(&self, look: &mut dyn FnMut(&Losses)) {
        look(self.losses());
    }

    fn size(&self, _: u64) -> Result<u64, ResizeError> {
        FileStore::size(self)
            .map_err(|source| ResizeError::Store { what: "its size cannot be found", source })
    }

    fn offered(&self) -> Option<u64> {
        None
    }

    fn tell_growth(&self, _: Sender<String>, _: &str) {}

    fn takes(&self, _: u64) -> Result<(), ResizeError> {
        if self.is_regular() {
            return Ok(());
        }
        Err(ResizeError::Fixed(
            "a block device has the size it has: change the device, then have it looked at with refresh",
        ))
    }

    fn set_size(&self, _: u64, bytes: u64) -> Result<(), ResizeError> {
        let what = "its length cannot be changed";
        FileStore::set_size(self, bytes).map_err(|source| ResizeError::Store { what, source })
    }

    fn shows(&self, _: u64) {}

    fn switch(&self, _: &str, _: bool) -> usize {
        0
    }

    fn close(&self) {}

    fn attach<R: Ring>(&self, core: &Rc<Core<R>>) -> FileOps<R> {
        FileOps::new(core, self.clone())
    }
}
