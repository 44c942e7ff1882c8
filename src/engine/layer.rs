//! Layers: volumes that stand on another and pass its requests on, changed or not.

#![forbid(unsafe_code)]

use super::driver::{AnyStore, Capabilities, Open, Opened, Opens, Store};
use super::error::GraphError;
use super::error::OpenError;
use super::error::ResizeError;
use super::identity::Identity;
use super::losses::Losses;
use super::node::Edge;
use crate::block::{Capacity, Errno, Geometry, GeometryError, Request, SECTOR};
use crate::ring::{Core, Io, Ring};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

/// What a layer does. All workers share it.
///
/// Everything else of a volume (its size, its losses, its end) comes from what stands below, through [`Over`].
pub trait Layer {
    /// Shape and abilities, of those below. The capacity is a copy already, for the layer to set.
    ///
    /// # Errors
    /// When nothing can be served of it.
    fn geometry(&self, below: Geometry) -> Result<Geometry, GeometryError>;

    /// See [`Capabilities`]. A layer that looks at bytes takes no registered buffers.
    fn capabilities(&self, below: Capabilities) -> Capabilities;

    /// Bytes that it takes below to show `bytes`.
    fn bytes_below(&self, bytes: u64) -> u64;

    /// Bytes that it shows of so many below.
    fn bytes_above(&self, bytes: u64) -> u64;

    /// Its own losses of acknowledged writes, where it may bring some about.
    fn losses(&self) -> Option<&Losses>;

    /// Does its work, or stands aside. False where there is no such choice.
    fn switch(&self, on: bool) -> bool;

    /// Has no request wait in it any more, for anything but what is below. For a service that ends and was told to wait no
    /// longer.
    fn abandon(&self);

    /// Carries `request` out, wholly or with the error that stopped it, by as many requests to `below` as that takes, one
    /// after the other or [side by side](Io::join). A flush that succeeds has flushed below.
    async fn submit<R: Ring>(&self, io: &Io<R>, request: &Request<'_>, below: &Edge<R>) -> Result<(), Errno>;
}

/// How a layer that `make` makes is opened over the volume below it. What comes of it goes by the name of `driver`.
///
/// # Errors
/// When nothing is below it.
pub fn opener<L: Layer + 'static>(
    driver: &'static str,
    name: &str,
    base: Option<Open>,
    make: impl Fn() -> L + Send + Sync + 'static,
    store: fn(Over<L>) -> AnyStore,
) -> Result<Open, OpenError> {
    let name = name.to_owned();
    let missing = GraphError::Missing(String::new());
    let base = base.ok_or_else(|| OpenError::Graph { name: name.clone(), source: missing })?;
    let cover = move |base: Opened| {
        let layer = Arc::new(make());
        let own = Geometry { capacity: Capacity::new(base.geometry.sectors()), ..base.geometry.clone() };
        let geometry = layer.geometry(own);
        let geometry = geometry.map_err(|source| OpenError::Geometry { name: name.clone(), source })?;
        let identity = Identity::over(driver, &base.identity);
        let tail = base.tail;
        Ok(Opened { geometry, identity, tail, store: store(Over { driver, layer, base: Box::new(base) }) })
    };
    Ok(Box::new(OverOpener { base, cover }))
}

/// Opens what is below, and covers it.
struct OverOpener<F> {
    base: Open,
    cover: F,
}

impl<F: Fn(Opened) -> Result<Opened, OpenError> + Send + Sync> Opens for OverOpener<F> {
    fn open(&self, limit: Duration) -> Result<Opened, OpenError> {
        (self.cover)(self.base.open(limit)?)
    }

    fn unread(&self) -> Vec<&Path> {
        self.base.unread()
    }
}

/// A layer over an opened volume.
pub struct Over<L> {
    driver: &'static str,
    layer: Arc<L>,
    base: Box<Opened>,
}

impl<L: Layer> Store for Over<L> {
    type Channel<R: Ring> = OverChannel<R, L>;

    fn capabilities(&self) -> Capabilities {
        self.layer.capabilities(self.base.store.capabilities())
    }

    fn each_loss(&self, look: &mut dyn FnMut(&Losses)) {
        if let Some(losses) = self.layer.losses() {
            look(losses);
        }
        self.base.store.each_loss(look);
    }

    fn size(&self, _: u64) -> Result<u64, ResizeError> {
        Ok(self.layer.bytes_above(self.base.store.size(self.base.geometry.bytes())?))
    }

    fn offered(&self) -> Option<u64> {
        self.base.store.offered().map(|bytes| self.layer.bytes_above(bytes))
    }

    fn tell_growth(&self, to: Sender<String>, volume: &str) {
        self.base.store.tell_growth(to, volume);
    }

    fn takes(&self, bytes: u64) -> Result<(), ResizeError> {
        self.base.store.takes(self.layer.bytes_below(bytes))
    }

    fn set_size(&self, from: u64, bytes: u64) -> Result<(), ResizeError> {
        self.base.store.set_size(self.layer.bytes_below(from), self.layer.bytes_below(bytes))
    }

    fn shows(&self, bytes: u64) {
        let below = self.layer.bytes_below(bytes);
        self.base.geometry.capacity.set(below / SECTOR);
        self.base.store.shows(below);
    }

    fn switch(&self, layer: &str, on: bool) -> usize {
        let own = layer == self.driver && self.layer.switch(on);
        usize::from(own) + self.base.store.switch(layer, on)
    }

    fn close(&self) {
        self.base.store.close();
    }

    fn attach<R: Ring>(&self, core: &Rc<Core<R>>) -> OverChannel<R, L> {
        let below = [Edge::new(self.base.geometry.clone(), AnyStore::attach(&self.base.store, core))];
        OverChannel { layer: self.layer.clone(), below }
    }
}

/// One worker's use of a layer.
pub struct OverChannel<R: Ring, L> {
    layer: Arc<L>,
    below: [Edge<R>; 1],
}

impl<R: Ring, L: Layer> OverChannel<R, L> {
    /// See [`Layer::submit`].
    pub async fn submit(&self, io: &Io<R>, request: &Request<'_>) -> Result<(), Errno> {
        self.layer.submit(io, request, &self.below[0]).await
    }

    /// See [`Layer::losses`].
    pub fn losses(&self) -> Option<&Losses> {
        self.layer.losses()
    }

    /// See [`Layer::abandon`]; the same for what it stands on.
    pub fn abandon(&self) {
        self.layer.abandon();
        self.below.iter().for_each(Edge::abandon);
    }

    /// What it stands on.
    pub fn below(&self) -> &[Edge<R>] {
        &self.below
    }
}
