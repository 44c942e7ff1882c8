//! An export as what all workers share of it.

#![forbid(unsafe_code)]

use super::{NbdOps, NbdStore};
use crate::block::Causes;
use crate::engine::driver::{Capabilities, Store};
use crate::engine::error::ResizeError;
use crate::engine::losses::Losses;
use crate::ring::{Core, Ring};
use std::io;
use std::rc::Rc;
use std::sync::mpsc::Sender;

impl Store for NbdStore {
    type Channel<R: Ring> = NbdOps<R>;

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            persists: true,
            single_worker: !self.multi_conn(),
            registered: false,
            prefers_registered: false,
        }
    }

    fn each_loss(&self, look: &mut dyn FnMut(&Losses)) {
        look(self.losses());
    }

    fn size(&self, _: u64) -> Result<u64, ResizeError> {
        match (self.ask_size(), NbdStore::offered(self)) {
            (Ok(asked), Some(offered)) if asked > offered => Err(ResizeError::Connections { asked, offered }),
            (Ok(size), _) => Ok(size),
            // One that takes no further connection has told those that it has.
            (Err(_), Some(offered)) => Ok(offered),
            (Err(error), None) => {
                let source = io::Error::other(Causes(&error).to_string());
                Err(ResizeError::Store { what: "its server cannot be asked", source })
            }
        }
    }

    fn offered(&self) -> Option<u64> {
        NbdStore::offered(self)
    }

    fn tell_growth(&self, to: Sender<String>, volume: &str) {
        NbdStore::tell_growth(self, to, volume);
    }

    fn takes(&self, _: u64) -> Result<(), ResizeError> {
        Err(ResizeError::Fixed(
            "an NBD export has the size that its server gives it: change it there, then have it looked at with refresh",
        ))
    }

    fn set_size(&self, _: u64, _: u64) -> Result<(), ResizeError> {
        Ok(())
    }

    fn shows(&self, _: u64) {}

    fn switch(&self, _: &str, _: bool) -> usize {
        0
    }

    fn close(&self) {}

    fn attach<R: Ring>(&self, core: &Rc<Core<R>>) -> NbdOps<R> {
        NbdOps::new(core, self)
    }
}
