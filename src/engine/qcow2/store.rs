//! A qcow2 volume as what all workers share of it.

#![forbid(unsafe_code)]

use super::channel::Qcow2Channel;
use super::compressed::Unpacked;
use super::image::Image;
use crate::block::{Geometry, SECTOR};
use crate::engine::driver::{AnyStore, Capabilities, Opened, Store};
use crate::engine::error::ResizeError;
use crate::engine::losses::Losses;
use crate::engine::node::Edge;
use crate::ring::{Core, Ring};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::Sender;

/// An opened image, and what it stands on.
pub struct Qcow2Store {
    pub(super) image: Arc<Image>,
    unpacked: Arc<Unpacked>,
    geometry: Geometry,
    base: Option<Box<Opened>>,
}

impl Qcow2Store {
    pub fn new(image: Image, geometry: Geometry, base: Option<Opened>) -> Qcow2Store {
        let unpacked = Unpacked::new(image.header.compression, image.layout.cluster());
        Qcow2Store {
            image: Arc::new(image),
            unpacked: Arc::new(unpacked),
            geometry,
            base: base.map(Box::new),
        }
    }
}

impl Store for Qcow2Store {
    type Channel<R: Ring> = Qcow2Channel<R>;

    fn capabilities(&self) -> Capabilities {
        let base = self.base.as_ref().map(|base| base.store.capabilities());
        Capabilities {
            persists: base.is_none_or(|base| base.persists),
            single_worker: base.is_some_and(|base| base.single_worker),
            // Zeroes, and what was compressed, are copied by us.
            registered: false,
            prefers_registered: false,
        }
    }

    fn each_loss(&self, look: &mut dyn FnMut(&Losses)) {
        look(self.image.file.losses());
    }

    fn size(&self, capacity: u64) -> Result<u64, ResizeError> {
        Ok(capacity)
    }

    fn offered(&self) -> Option<u64> {
        None
    }

    fn tell_growth(&self, _: Sender<String>, _: &str) {}

    fn takes(&self, bytes: u64) -> Result<(), ResizeError> {
        let below = self.base.as_ref().map(|base| base.geometry.bytes());
        self.image.takes(self.geometry.bytes(), bytes, below)
    }

    fn set_size(&self, _: u64, bytes: u64) -> Result<(), ResizeError> {
        let what = "its header cannot be written";
        self.image.set_size(bytes).map_err(|source| ResizeError::Store { what, source })
    }

    fn shows(&self, bytes: u64) {
        self.geometry.capacity.set(bytes / SECTOR);
    }

    fn switch(&self, layer: &str, on: bool) -> usize {
        self.base.as_ref().map_or(0, |base| base.store.switch(layer, on))
    }

    fn close(&self) {
        self.image.close();
        if let Some(base) = &self.base {
            base.store.close();
        }
    }

    fn attach<R: Ring>(&self, core: &Rc<Core<R>>) -> Qcow2Channel<R> {
        // Its own file first: it is the first that the worker's ring knows.
        let base = |base: &Opened| Edge::new(base.geometry.clone(), AnyStore::attach(&base.store, core));
        let mut channel = Qcow2Channel::new(core, &self.image, &self.unpacked);
        if let Some(below) = &self.base {
            channel.stand_on(base(below));
        }
        channel
    }
}
