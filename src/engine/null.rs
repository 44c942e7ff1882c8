//! A volume that stores nothing: what is left of a request's cost is ours and the frontend's.
//!
//! A write is forgotten, and a read leaves the data as it is: what comes back is whatever the buffer held.
//! For measuring only.

use super::driver::{AnyStore, Capabilities, Driver, Open, Opened, Store, Summary};
use super::error::OpenError;
use super::error::ResizeError;
use super::identity::Identity;
use super::losses::Losses;
use super::node::Leaf;
use super::settings::{DEFAULT_BLOCK, check_size};
use crate::block::{Data, Errno, Geometry, Size};
use crate::ring::{Core, Io, Ring};
use std::fmt;
use std::rc::Rc;
use std::sync::mpsc::Sender;

/// `driver = "null"`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NullConfig {
    /// Capacity.
    pub size: Size,
    /// Logical block in bytes, 512 or 4096; `None`: 512.
    pub block_size: Option<u32>,
}

impl Driver for NullConfig {
    const NAME: &'static str = "null";
    const TARGET: &'static str = "size";
    const HELP: &'static str = "
  null:SIZE    stores nothing, for measuring; block-size=512|4096
";
    type Store = Null;

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
            let geometry = Geometry::new(config.size.bytes(), block);
            let geometry = geometry.map_err(|source| OpenError::Geometry { name: name.clone(), source })?;
            let identity = Identity::of_nothing(Self::NAME);
            Ok(Opened { geometry, identity, tail: 0, store: AnyStore::Null(Null) })
        }))
    }
}

/// Nothing to keep.
#[derive(Clone, Copy)]
pub struct Null;

impl Store for Null {
    type Channel<R: Ring> = Null;

    fn capabilities(&self) -> Capabilities {
        // It promises nothing that the next service would not keep.
        Capabilities { persists: true, single_worker: false, registered: false, prefers_registered: false }
    }

    fn each_loss(&self, _: &mut dyn FnMut(&Losses)) {}

    fn size(&self, capacity: u64) -> Result<u64, ResizeError> {
        Ok(capacity)
    }

    fn offered(&self) -> Option<u64> {
        None
    }

    fn tell_growth(&self, _: Sender<String>, _: &str) {}

    fn takes(&self, _: u64) -> Result<(), ResizeError> {
        Ok(())
    }

    fn set_size(&self, _: u64, _: u64) -> Result<(), ResizeError> {
        Ok(())
    }

    fn shows(&self, _: u64) {}

    fn switch(&self, _: &str, _: bool) -> usize {
        0
    }

    fn close(&self) {}

    fn attach<R: Ring>(&self, _: &Rc<Core<R>>) -> Null {
        Null
    }
}

impl<R: Ring> Leaf<R> for Null {
    async fn read(&self, _: &Io<R>, _: Data<'_>, _: u64, _: u64) -> Result<(), Errno> {
        Ok(())
    }

    async fn write(&self, _: &Io<R>, _: Data<'_>, _: u64, _: u64, _: bool) -> Result<(), Errno> {
        Ok(())
    }

    async fn flush(&self, _: &Io<R>) -> Result<(), Errno> {
        Ok(())
    }

    async fn discard(&self, _: &Io<R>, _: u64, _: u64) -> Result<(), Errno> {
        Ok(())
    }

    async fn write_zeroes(&self, _: &Io<R>, _: u64, _: u64, _: bool) -> Result<(), Errno> {
        Ok(())
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
