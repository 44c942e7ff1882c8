//! Opening volumes, and lending them to workers.

use super::attached::{Attached, Ops};
use super::config::{OnError, PolicyConfig, TopologyConfig, VolumeConfig};
use super::file::{self, FileOps, FileVolume};
use super::identity::Identity;
use super::losses::Losses;
use super::memory::{self, Memory};
use super::nbd::{self, NbdOps, NbdVolume};
use super::null::Null;
use super::policy::{Policy, PolicyState};
use crate::block::{Geometry, GeometryError};
use crate::ring::{Core, Ring};
use std::io;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// An opened volume: what all workers share of it.
pub struct Volume {
    name: String,
    pub(super) geometry: Geometry,
    identity: Identity,
    pub(super) store: Store,
    /// Held while the size changes.
    pub(super) resizing: Mutex<()>,
    policy: Arc<Policy>,
}

pub(super) enum Store {
    File(FileVolume),
    Memory(Memory),
    Null,
    Nbd(NbdVolume),
}

/// How a volume is opened, as often as it takes: all that its configuration says.
pub struct Opener {
    name: String,
    config: VolumeConfig,
    policy: PolicyConfig,
    topology: TopologyConfig,
    /// Of an NBD volume.
    target: Option<nbd::Target>,
}

impl Opener {
    /// For a volume of this name. Reads what it takes to open it, such as certificates, since that may be forbidden later.
    ///
    /// # Errors
    /// When one of those cannot be used.
    pub fn new(
        name: &str,
        config: &VolumeConfig,
        policy: PolicyConfig,
        topology: TopologyConfig,
    ) -> Result<Opener, OpenError> {
        let target =
            match config {
                VolumeConfig::Nbd(options) => Some(nbd::Target::of(options).map_err(|source| {
                    OpenError::Nbd { name: name.into(), uri: options.uri.clone(), source }
                })?),
                VolumeConfig::File(_) | VolumeConfig::Memory(_) | VolumeConfig::Null(_) => None,
            };
        Ok(Opener { name: name.into(), config: config.clone(), policy, topology, target })
    }

    /// What becomes of it when its store fails.
    pub fn policy(&self) -> &PolicyConfig {
        &self.policy
    }

    /// Opens the volume. Nothing is changed in the store. A server that does not answer is waited for as long as `limit`,
    /// and not for ever.
    ///
    /// # Errors
    /// See [`Volume::open`] and [`Volume::with_topology`].
    pub fn open(&self, limit: Duration) -> Result<Volume, OpenError> {
        let target = self.target.as_ref().map(|target| (target, limit));
        let volume = Volume::open_at(&self.name, &self.config, target)?.with_topology(self.topology)?;
        Ok(volume.with_policy(self.policy))
    }

    /// Whether a service may begin without the volume at all, if others can be served.
    pub fn may_be_late(&self) -> bool {
        self.policy.required != Some(true)
    }

    /// Whether a service may begin without the volume, which cannot be opened because of `error`. `others`: other volumes
    /// can be served.
    pub fn may_wait(&self, error: &OpenError, others: bool) -> bool {
        let waited_for = self.config.reconnects() || self.policy.on_error != OnError::Report;
        match self.policy.required {
            Some(required) => !required,
            None => error.is_unreachable() && (waited_for || others) || error.may_be_its_clients() && others,
        }
    }
}

/// Logical block where neither the user nor the store cares, in bytes.
const DEFAULT_BLOCK: u32 = 512;

/// Why a volume could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// See [`file::Error`].
    #[error("volume {name}: {path}")]
    File {
        /// Of the volume.
        name: String,
        /// Of the file.
        path: String,
        /// What was wrong with it.
        source: file::Error,
    },
    /// See [`nbd::Error`].
    #[error("volume {name}: {uri}")]
    Nbd {
        /// Of the volume.
        name: String,
        /// Of the server.
        uri: String,
        /// What was wrong with it.
        source: nbd::Error,
    },
    /// A size or block size that no disk can have.
    #[error("volume {name}")]
    Geometry {
        /// Of the volume.
        name: String,
        /// What was wrong with it.
        source: GeometryError,
    },
    /// The store's blocks are larger than its clients are to be told.
    #[error("volume {name}: physical-block={asked}: its logical block has {needed} bytes")]
    PhysicalBlock {
        /// Of the volume.
        name: String,
        /// As configured.
        asked: u32,
        /// The logical block.
        needed: u32,
    },
    /// No memory.
    #[error("volume {name}: {bytes} bytes of memory cannot be reserved")]
    Memory {
        /// Of the volume.
        name: String,
        /// Asked for.
        bytes: u64,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl OpenError {
    /// It may be there in a moment, and nothing is wrong with the configuration: a server that does not answer.
    fn is_unreachable(&self) -> bool {
        matches!(self, OpenError::Nbd { source, .. } if source.is_passing())
    }

    /// A client of the volume can bring it about by what it writes: no reason to keep others from theirs.
    fn may_be_its_clients(&self) -> bool {
        matches!(self, OpenError::File { source: file::Error::Format(_), .. })
    }
}

impl Volume {
    /// Opens what `config` describes. Nothing is changed in the store.
    ///
    /// # Errors
    /// When it is missing, not ours to use, or cannot do what the configuration asks.
    pub fn open(name: &str, config: &VolumeConfig) -> Result<Volume, OpenError> {
        Volume::open_at(name, config, None)
    }

    fn open_at(
        name: &str,
        config: &VolumeConfig,
        target: Option<(&nbd::Target, Duration)>,
    ) -> Result<Volume, OpenError> {
        let geometry_error = |source| OpenError::Geometry { name: name.into(), source };
        let driver = config.driver();
        let (store, geometry, identity) = match config {
            VolumeConfig::File(options) => {
                let (volume, geometry) = FileVolume::open(options).map_err(|source| OpenError::File {
                    name: name.into(),
                    path: options.path.display().to_string(),
                    source,
                })?;
                let identity = volume.identity(driver).map_err(|source| OpenError::File {
                    name: name.into(),
                    path: options.path.display().to_string(),
                    source,
                })?;
                (Store::File(volume), geometry, identity)
            }
            VolumeConfig::Memory(options) => {
                let block = options.block_size.unwrap_or(DEFAULT_BLOCK);
                let geometry = memory::geometry(options.size.bytes(), block).map_err(geometry_error)?;
                let memory = Memory::new(geometry.bytes()).map_err(|source| OpenError::Memory {
                    name: name.into(),
                    bytes: geometry.bytes(),
                    source,
                })?;
                (Store::Memory(memory), geometry, Identity::of_nothing(driver))
            }
            VolumeConfig::Null(options) => {
                let block = options.block_size.unwrap_or(DEFAULT_BLOCK);
                let geometry = Geometry::new(options.size.bytes(), block).map_err(geometry_error)?;
                (Store::Null, geometry, Identity::of_nothing(driver))
            }
            VolumeConfig::Nbd(options) => {
                let opened = match target {
                    Some((target, limit)) => NbdVolume::open_at(options, target, limit),
                    None => NbdVolume::open(options),
                };
                let (volume, geometry) = opened.map_err(|source| OpenError::Nbd {
                    name: name.into(),
                    uri: options.uri.clone(),
                    source,
                })?;
                (Store::Nbd(volume), geometry, Identity::of_uri(driver, &options.uri))
            }
        };
        let policy = Arc::new(Policy::new(name, PolicyConfig::default()));
        Ok(Volume { name: name.into(), geometry, identity, store, resizing: Mutex::default(), policy })
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

    /// Why a drain may take long, where requests wait because the store failed.
    pub fn held_up(&self) -> Option<String> {
        self.policy.held_up()
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

    /// Whether all its queues must be on one worker, because what is flushed on one connection would not be
    /// flushed for another.
    pub fn single_worker(&self) -> bool {
        matches!(&self.store, Store::Nbd(nbd) if !nbd.multi_conn())
    }

    /// Whether its data outlives this process, so that another may go on where this one ended.
    pub fn persists(&self) -> bool {
        !matches!(self.store, Store::Memory(_))
    }

    /// Whether the kernel alone moves its data, so that ublk's zero copy can be used.
    pub fn takes_registered(&self) -> bool {
        matches!(self.store, Store::File(_))
    }

    /// Whether zero copy is also the faster way. Through the page cache there is one copy in any case, and what the
    /// worker carries out itself it can only do with memory of its own: ext4's buffered writes take half as long so.
    pub fn prefers_registered(&self) -> bool {
        matches!(&self.store, Store::File(file) if file.is_direct())
    }

    /// Losses of acknowledged writes; `None` where there can be none.
    pub(super) fn losses(&self) -> Option<&Losses> {
        match &self.store {
            Store::File(file) => Some(file.losses()),
            Store::Nbd(nbd) => Some(nbd.losses()),
            Store::Memory(_) | Store::Null => None,
        }
    }

    /// Lends it to the worker `core` belongs to, for an export that is `read_only` or not.
    pub fn attach<R: Ring>(&self, core: &Rc<Core<R>>, read_only: bool) -> Attached<R> {
        let ops = match &self.store {
            Store::File(volume) => Ops::File(FileOps::new(core, volume.clone())),
            Store::Memory(memory) => Ops::Memory(memory.clone()),
            Store::Null => Ops::Null(Null),
            Store::Nbd(volume) => Ops::Nbd(NbdOps::new(core, volume)),
        };
        let mut geometry = self.geometry.clone();
        geometry.read_only |= read_only;
        Attached::new(geometry, ops, self.policy.clone())
    }
}
