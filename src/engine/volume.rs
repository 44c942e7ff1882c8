//! Opening volumes, and lending them to workers.

use super::channel::VolumeChannel;
use super::config::{OnError, PolicyConfig, TopologyConfig, VolumeConfig};
use super::driver::{AnyStore, Capabilities, Open, Opened, Store};
use super::error::OpenError;
use super::file;
use super::graph;
use super::identity::Identity;
use super::limits::Limits;
use super::losses::Losses;
use super::node::Edge;
use super::policy::{Policy, PolicyState};
use crate::block::Geometry;
use crate::ring::{Core, Ring};
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// An opened volume: what all workers share of it.
pub struct Volume {
    name: String,
    pub(super) geometry: Geometry,
    identity: Identity,
    capabilities: Capabilities,
    tail: u64,
    pub(super) store: AnyStore,
    /// Held while the size changes.
    pub(super) resizing: Mutex<()>,
    policy: Arc<Policy>,
    limits: Arc<Limits>,
}

/// How a volume is opened, as often as it takes: all that its configuration says.
pub struct Opener {
    name: String,
    open: Open,
    policy: PolicyConfig,
    topology: TopologyConfig,
    limits: Arc<Limits>,
    /// A store of its is waited for when it is lost.
    reconnects: bool,
}

impl Opener {
    /// For one of these volumes, with those that it stands on.
    ///
    /// # Errors
    /// When a volume that it stands on is not there.
    pub fn new(
        name: &str,
        volumes: &BTreeMap<String, VolumeConfig>,
        policy: PolicyConfig,
        topology: TopologyConfig,
    ) -> Result<Opener, OpenError> {
        let open = graph::opener(volumes, name)?;
        let tree = graph::tree(volumes, name).unwrap_or_default();
        let reconnects = tree.iter().any(|(_, config)| config.summary().reconnects);
        Ok(Opener { name: name.into(), open, policy, topology, limits: Arc::default(), reconnects })
    }

    /// The same with limits of operations and bytes in a second.
    pub fn with_limits(self, limits: Arc<Limits>) -> Opener {
        Opener { limits, ..self }
    }

    /// The files that are still to be read before the volume can be opened, such as certificates, because the attempts so
    /// far could not use them: once one could, nothing is read again.
    pub fn unread(&self) -> Vec<&Path> {
        self.open.unread()
    }

    /// What becomes of it when its store fails.
    pub fn policy(&self) -> &PolicyConfig {
        &self.policy
    }

    /// Opens the volume. Nothing is changed in the store. What it takes to open it is read at the first attempt, as long as
    /// that works, since it may be forbidden later. A server that does not answer is waited for as long as `limit`,
    /// and not for ever. What no disk can show of it is said in the log.
    ///
    /// # Errors
    /// See [`Volume::open`] and [`Volume::with_topology`].
    pub fn open(&self, limit: Duration) -> Result<Volume, OpenError> {
        let opened = self.open.open(limit).map_err(|error| match error.volume() == self.name {
            true => error,
            false => OpenError::Base { name: self.name.clone(), source: Box::new(error) },
        })?;
        let volume = Volume::of(&self.name, opened).with_topology(self.topology)?;
        if volume.tail() > 0 {
            let (name, lost, block) = (&self.name, volume.tail(), volume.geometry.logical_block);
            log::warn!(
                "volume {name}: its last {lost} bytes do not fill a block of {block} and are not served"
            );
        }
        Ok(volume.with_policy(self.policy).with_limits(self.limits.clone()))
    }

    /// Whether a service may begin without the volume at all, if others can be served.
    pub fn may_be_late(&self) -> bool {
        self.policy.required != Some(true)
    }

    /// Whether a service may begin without the volume, which cannot be opened because of `error`. `others`: other volumes
    /// can be served.
    pub fn may_wait(&self, error: &OpenError, others: bool) -> bool {
        let waited_for = self.reconnects || self.policy.on_error != OnError::Report;
        match self.policy.required {
            Some(required) => !required,
            None => error.is_unreachable() && (waited_for || others) || error.may_be_its_clients() && others,
        }
    }
}

impl OpenError {
    /// Name of the volume that could not be opened.
    fn volume(&self) -> &str {
        match self {
            OpenError::File { name, .. }
            | OpenError::Nbd { name, .. }
            | OpenError::Qcow2 { name, .. }
            | OpenError::Geometry { name, .. }
            | OpenError::PhysicalBlock { name, .. }
            | OpenError::Graph { name, .. }
            | OpenError::Base { name, .. }
            | OpenError::Memory { name, .. } => name,
        }
    }

    /// Whose `required` has a say in it, for people.
    pub fn whose(&self) -> String {
        match self {
            OpenError::Base { name, .. } => format!("volume {name}"),
            _ => "this volume".into(),
        }
    }

    /// The error of the volume that is to blame, not of one that stands on it.
    fn innermost(&self) -> &OpenError {
        match self {
            OpenError::Base { source, .. } => source.innermost(),
            own => own,
        }
    }

    /// It may be there in a moment, and nothing is wrong with the configuration: a server that does not answer.
    fn is_unreachable(&self) -> bool {
        matches!(self.innermost(), OpenError::Nbd { source, .. } if source.is_passing())
    }

    /// A client of the volume can bring it about by what it writes: no reason to keep others from theirs.
    fn may_be_its_clients(&self) -> bool {
        matches!(self.innermost(), OpenError::File { source: file::Error::Format(_), .. })
    }
}

impl Volume {
    /// Opens what `config` describes, which stands on no other. Nothing is changed in the store.
    ///
    /// # Errors
    /// When it is missing, not ours to use, or cannot do what the configuration asks.
    pub fn open(name: &str, config: &VolumeConfig) -> Result<Volume, OpenError> {
        Ok(Volume::of(name, config.opener(name, None)?.open(Duration::MAX)?))
    }

    fn of(name: &str, opened: Opened) -> Volume {
        let Opened { geometry, identity, tail, store } = opened;
        let policy = Arc::new(Policy::new(name, PolicyConfig::default()));
        let capabilities = store.capabilities();
        Volume {
            name: name.into(),
            geometry,
            identity,
            capabilities,
            tail,
            store,
            resizing: Mutex::default(),
            policy,
            limits: Arc::default(),
        }
    }

    /// The same with limits of operations and bytes in a second. Before anybody attaches to it.
    pub fn with_limits(self, limits: Arc<Limits>) -> Volume {
        Volume { limits, ..self }
    }

    /// The same with another policy about errors than to report them. Before anybody attaches to it.
    pub fn with_policy(self, config: PolicyConfig) -> Volume {
        let policy = Arc::new(Policy::new(&self.name, config));
        Volume { policy, ..self }
    }

    /// The same with other block sizes shown than the store has. Before anybody attaches to it.
    ///
    /// # Errors
    /// When a physical block would be smaller than the logical one.
    pub fn with_topology(self, config: TopologyConfig) -> Result<Volume, OpenError> {
        match config.apply(&self.geometry) {
            Some(geometry) => Ok(Volume { geometry, ..self }),
            None => Err(OpenError::PhysicalBlock {
                asked: config.physical_block.unwrap_or(0),
                needed: self.geometry.logical_block,
                name: self.name,
            }),
        }
    }

    /// Lets the requests go on that wait because the store failed, on every worker: they are tried again, or (`give_up`)
    /// fail with their errors. How many there were.
    pub fn resume(&self, give_up: bool) -> usize {
        self.policy.resume(give_up)
    }

    /// What becomes of the requests that the store fails, and how many of them wait.
    pub fn policy_state(&self) -> PolicyState {
        self.policy.state()
    }

    /// Its limits of operations and bytes in a second. Whoever brings requests has to ask there: nothing below does.
    pub fn limits(&self) -> &Arc<Limits> {
        &self.limits
    }

    /// Why a drain may take long, where requests wait because the store failed.
    pub fn pending_reason(&self) -> Option<String> {
        self.policy.pending_reason()
    }

    /// As configured.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is made of.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Shape and abilities.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Bytes that its store had behind the last whole block when it was opened: no disk has them.
    pub fn tail(&self) -> u64 {
        self.tail
    }

    /// What else it can do.
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// How often acknowledged writes were lost so far, as the store told, or may have been.
    pub fn losses(&self) -> u64 {
        self.epoch()
    }

    /// Losses of acknowledged writes so far.
    pub(super) fn epoch(&self) -> u64 {
        let mut epoch = 0;
        self.store.each_loss(&mut |losses: &Losses| epoch += losses.epoch());
        epoch
    }

    /// To be called once nobody asks for anything any more, and everything is flushed: what it took in advance of where it is kept
    /// goes back. Waits for the store.
    pub fn close(&self) {
        self.store.close();
    }

    /// Has the layers of this name, wherever they are below, do their work or stand aside. How many there are.
    pub(super) fn switch(&self, layer: &str, on: bool) -> usize {
        self.store.switch(layer, on)
    }

    /// Lends it to the worker `core` belongs to, for an export that is `read_only` or not.
    pub fn attach<R: Ring>(&self, core: &Rc<Core<R>>, read_only: bool) -> VolumeChannel<R> {
        let mut geometry = self.geometry.clone();
        geometry.read_only |= read_only;
        VolumeChannel::new(Edge::new(geometry, self.store.attach(core)), self.policy.clone())
    }
}
