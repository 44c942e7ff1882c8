//! What a kind of volume has to say and to do, and the list of them.
//!
//! A driver is a folder (or a file) and one word in the list below: its configuration, which implements [`Driver`];
//! what all workers share once it is open, a [`Store`]; and one worker's use of that, which is a
//! [`Leaf`] where bytes are kept and a layer where requests are passed on. The list makes
//! the enums that stand for any of them, and every match over kinds is made here. None of these traits has defaults:
//! whoever adds a driver answers each question.

#![forbid(unsafe_code)]

use super::error::OpenError;
use super::error::ResizeError;
use super::fault::FaultConfig;
use super::file::FileConfig;
use super::identity::Identity;
use super::losses::Losses;
use super::memory::MemoryConfig;
use super::nbd::NbdConfig;
use super::node::{Edge, Leaf};
use super::null::NullConfig;
use super::qcow2::Qcow2Config;
use super::transfer;
use crate::block::{Data, Errno, Flags, Geometry, Op, Request, SECTOR};
use crate::ring::{Core, Io, Ring};
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error};
use std::fmt;
use std::path::Path;
use std::rc::Rc;
use std::sync::mpsc::Sender;
use std::time::Duration;

/// The configuration of one kind of volume, and the way to open it.
pub trait Driver: Clone + fmt::Debug + PartialEq + Eq + DeserializeOwned {
    /// As the user spells it.
    const NAME: &'static str;

    /// The key that `TARGET` of a flag's `DRIVER:TARGET` is stored under.
    const TARGET: &'static str;

    /// What it is and takes, for the help text: lines of at most 80 characters.
    const HELP: &'static str;

    /// What all workers share of an opened one.
    type Store: Store;

    /// What it was pointed at, as the user spells it.
    fn target(&self) -> String;

    /// Checks every value's range. Nothing is opened.
    ///
    /// # Errors
    /// The key that is wrong, and why.
    fn check(&self) -> Result<(), (&'static str, String)>;

    /// Looks for what would keep it from being opened, as far as that can be seen without being noticed: nothing is written,
    /// locked or connected to.
    ///
    /// # Errors
    /// What is wrong, for people.
    fn examine(&self) -> Result<(), String>;

    /// What every driver is asked of its configuration.
    fn summary(&self) -> Summary<'_>;

    /// Writes the settings that differ from their defaults, each after a comma, but for those of the summary.
    ///
    /// # Errors
    /// The formatter's.
    fn details(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result;

    /// How a volume of this name is opened. `base`: how the volume below is, for a driver that has one.
    ///
    /// # Errors
    /// When there is none.
    fn opener(&self, name: &str, base: Option<Open>) -> Result<Open, OpenError>;
}

/// Opens a volume, as often as it takes.
pub trait Opens: Send + Sync {
    /// Opens it, and waits no longer than `limit` for a server that does not answer. Nothing is changed in the store. What
    /// it takes, such as certificates, is read once, by the first attempt that can: later that may be forbidden.
    ///
    /// # Errors
    /// When it is missing, not ours to use, or cannot do what the configuration asks.
    fn open(&self, limit: Duration) -> Result<Opened, OpenError>;

    /// Files that are still to be read for that.
    fn unread(&self) -> Vec<&Path>;
}

/// See [`Opens`].
pub type Open = Box<dyn Opens>;

/// What is opened without reading anything else, and without waiting.
impl<F: Fn() -> Result<Opened, OpenError> + Send + Sync> Opens for F {
    fn open(&self, _: Duration) -> Result<Opened, OpenError> {
        self()
    }

    fn unread(&self) -> Vec<&Path> {
        Vec::new()
    }
}

/// What every driver is asked of its configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary<'a> {
    /// Name of the volume that it stands on.
    pub base: Option<&'a str>,
    /// The logical block asked for, in bytes.
    pub block_size: Option<u32>,
    /// Writes are to be refused. The store may refuse them all the same.
    pub read_only: bool,
    /// Its store is waited for when it is lost, for a time.
    pub reconnects: bool,
    /// What it has to reach, now and later.
    pub needs: Option<Need<'a>>,
}

/// What a volume has to reach outside the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need<'a> {
    /// A file or device, to read alone or to write as well.
    File {
        /// As configured.
        path: &'a Path,
        /// To be written.
        write: bool,
    },
    /// A server, by its NBD URI.
    Server(&'a str),
}

/// An opened volume, without what only its user needs of it.
pub struct Opened {
    /// Shape and abilities.
    pub geometry: Geometry,
    /// What it is made of.
    pub identity: Identity,
    /// Bytes that the store has behind the last whole block: no disk has them.
    pub tail: u64,
    /// What all workers share.
    pub store: AnyStore,
}

/// What an opened volume can do besides its [`Geometry`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Its data outlives this process, so that another may go on where this one ended.
    pub persists: bool,
    /// All its queues must be on one worker: what is flushed for one would not be flushed for another.
    pub single_worker: bool,
    /// The kernel alone moves its data, so that requests may carry a registered buffer (ublk's zero copy).
    pub registered: bool,
    /// Registered buffers are also the faster way.
    pub prefers_registered: bool,
}

/// What all workers share of an opened volume.
pub trait Store: Sized {
    /// One worker's use of it.
    type Channel<R: Ring>;

    /// See [`Capabilities`].
    fn capabilities(&self) -> Capabilities;

    /// Calls `look` for each place where losses of acknowledged writes are kept.
    fn each_loss(&self, look: &mut dyn FnMut(&Losses));

    /// Bytes there are now, for a volume of `capacity`.
    ///
    /// # Errors
    /// When that cannot be found out.
    fn size(&self, capacity: u64) -> Result<u64, ResizeError>;

    /// Bytes that it offers by itself, where it tells of changes.
    fn offered(&self) -> Option<u64>;

    /// Has `to` told the volume's name whenever it has become larger by itself.
    fn tell_growth(&self, to: Sender<String>, volume: &str);

    /// Whether it can be made `bytes` large at all.
    ///
    /// # Errors
    /// Why not.
    fn takes(&self, bytes: u64) -> Result<(), ResizeError>;

    /// Makes it `bytes` large, of `from` before.
    ///
    /// # Errors
    /// When it stays as it is.
    fn set_size(&self, from: u64, bytes: u64) -> Result<(), ResizeError>;

    /// It shows `bytes` from now on: whatever stands below shows as much as that takes.
    fn shows(&self, bytes: u64);

    /// Has the layers of this name, here and below, do their work or stand aside. How many there are.
    fn switch(&self, layer: &str, on: bool) -> usize;

    /// Nothing more is asked of it, and everything is flushed: what it took in advance goes back to where it is kept. Whoever
    /// asks for something all the same may be refused.
    fn close(&self);

    /// Lends it to the worker that `core` belongs to.
    fn attach<R: Ring>(&self, core: &Rc<Core<R>>) -> Self::Channel<R>;
}

/// One worker's use of a driver's store.
type ChannelOf<D, R> = <<D as Driver>::Store as Store>::Channel<R>;

/// THE list: what is written here once makes the enums and every match over them.
macro_rules! drivers {
    (
        leaves: $($(#[$leaf_doc:meta])* $leaf:ident($leaf_config:ty),)*;
        layers: $($(#[doc = $layer_doc:literal])* $([$when:meta])? $layer:ident($layer_config:ty),)*;
    ) => {
        /// One volume: where its bytes are and how they are reached.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum VolumeConfig {
            $($(#[$leaf_doc])* $leaf($leaf_config),)*
            $($(#[doc = $layer_doc])* $(#[$when])? $layer($layer_config),)*
        }

        /// A driver's name and the key its target goes by.
        pub(super) const DRIVERS: &[(&str, &str)] = &[
            $((<$leaf_config>::NAME, <$leaf_config>::TARGET),)*
            $($(#[$when])? (<$layer_config>::NAME, <$layer_config>::TARGET),)*
        ];

        impl VolumeConfig {
            /// What every driver is and takes, in its own words.
            pub fn helps() -> Vec<&'static str> {
                vec![
                    $(<$leaf_config>::HELP,)*
                    $($(#[$when])? <$layer_config>::HELP,)*
                ]
            }

            /// Reads the settings of a volume whose driver is already known. `settings` is a map without the driver's
            /// name.
            ///
            /// # Errors
            /// An unknown driver, an unknown or missing key, a value of the wrong type.
            pub fn from_driver<'de, D: Deserializer<'de>>(
                driver: &str,
                settings: D,
            ) -> Result<VolumeConfig, D::Error> {
                Ok(match driver {
                    $(<$leaf_config>::NAME => VolumeConfig::$leaf(Deserialize::deserialize(settings)?),)*
                    $($(#[$when])? <$layer_config>::NAME => VolumeConfig::$layer(Deserialize::deserialize(settings)?),)*
                    _ => {
                        let known: Vec<_> = DRIVERS.iter().map(|(name, _)| *name).collect();
                        let known = known.join(", ");
                        return Err(D::Error::custom(format_args!(
                            "unknown driver \"{driver}\", there are: {known}"
                        )));
                    }
                })
            }

            /// The driver's name, as the user spells it.
            pub fn driver(&self) -> &'static str {
                match self {
                    $(VolumeConfig::$leaf(_) => <$leaf_config>::NAME,)*
                    $($(#[$when])? VolumeConfig::$layer(_) => <$layer_config>::NAME,)*
                }
            }

            /// See [`Driver::target`].
            pub fn target(&self) -> String {
                match self {
                    $(VolumeConfig::$leaf(config) => config.target(),)*
                    $($(#[$when])? VolumeConfig::$layer(config) => config.target(),)*
                }
            }

            /// See [`Driver::check`].
            ///
            /// # Errors
            /// The key that is wrong, and why.
            pub fn check(&self) -> Result<(), (&'static str, String)> {
                match self {
                    $(VolumeConfig::$leaf(config) => config.check(),)*
                    $($(#[$when])? VolumeConfig::$layer(config) => config.check(),)*
                }
            }

            /// See [`Driver::examine`].
            ///
            /// # Errors
            /// What is wrong, for people.
            pub fn examine(&self) -> Result<(), String> {
                match self {
                    $(VolumeConfig::$leaf(config) => config.examine(),)*
                    $($(#[$when])? VolumeConfig::$layer(config) => config.examine(),)*
                }
            }

            /// See [`Driver::summary`].
            pub fn summary(&self) -> Summary<'_> {
                match self {
                    $(VolumeConfig::$leaf(config) => config.summary(),)*
                    $($(#[$when])? VolumeConfig::$layer(config) => config.summary(),)*
                }
            }

            pub(super) fn details(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(VolumeConfig::$leaf(config) => config.details(f),)*
                    $($(#[$when])? VolumeConfig::$layer(config) => config.details(f),)*
                }
            }

            pub(super) fn opener(&self, name: &str, base: Option<Open>) -> Result<Open, OpenError> {
                match self {
                    $(VolumeConfig::$leaf(config) => config.opener(name, base),)*
                    $($(#[$when])? VolumeConfig::$layer(config) => config.opener(name, base),)*
                }
            }
        }

        /// The store of any driver.
        pub enum AnyStore {
            $(#[doc = "Of the driver of that name."] $leaf(<$leaf_config as Driver>::Store),)*
            $(#[doc = "Of the layer of that name."] $(#[$when])? $layer(<$layer_config as Driver>::Store),)*
        }

        /// The same call on whichever it is.
        macro_rules! each_store {
            ($of:expr, $store:ident => $call:expr) => {
                match $of {
                    $(AnyStore::$leaf($store) => $call,)*
                    $($(#[$when])? AnyStore::$layer($store) => $call,)*
                }
            };
        }

        impl Store for AnyStore {
            type Channel<R: Ring> = AnyChannel<R>;

            fn capabilities(&self) -> Capabilities {
                each_store!(self, store => Store::capabilities(store))
            }

            fn each_loss(&self, look: &mut dyn FnMut(&Losses)) {
                each_store!(self, store => Store::each_loss(store, look))
            }

            fn size(&self, capacity: u64) -> Result<u64, ResizeError> {
                each_store!(self, store => Store::size(store, capacity))
            }

            fn offered(&self) -> Option<u64> {
                each_store!(self, store => Store::offered(store))
            }

            fn tell_growth(&self, to: Sender<String>, volume: &str) {
                each_store!(self, store => Store::tell_growth(store, to, volume))
            }

            fn takes(&self, bytes: u64) -> Result<(), ResizeError> {
                each_store!(self, store => Store::takes(store, bytes))
            }

            fn set_size(&self, from: u64, bytes: u64) -> Result<(), ResizeError> {
                each_store!(self, store => Store::set_size(store, from, bytes))
            }

            fn shows(&self, bytes: u64) {
                each_store!(self, store => Store::shows(store, bytes))
            }

            fn switch(&self, layer: &str, on: bool) -> usize {
                each_store!(self, store => Store::switch(store, layer, on))
            }

            fn close(&self) {
                each_store!(self, store => Store::close(store))
            }

            fn attach<R: Ring>(&self, core: &Rc<Core<R>>) -> AnyChannel<R> {
                match self {
                    $(AnyStore::$leaf(store) => AnyChannel::$leaf(store.attach(core)),)*
                    $($(#[$when])? AnyStore::$layer(store) => AnyChannel::$layer(Box::new(store.attach(core))),)*
                }
            }
        }

        /// One worker's use of a store of any driver. Which leaf is a match, not a pointer: the compiler sees through it.
        pub enum AnyChannel<R: Ring> {
            $(#[doc = "Of the driver of that name."] $leaf(ChannelOf<$leaf_config, R>),)*
            $(#[doc = "Of the layer of that name."] $(#[$when])? $layer(Box<ChannelOf<$layer_config, R>>),)*
        }

        impl<R: Ring> AnyChannel<R> {
            /// Carries out what was checked, a write durably with `fua` whatever its flags say, and writes the zeroes that
            /// the store has no call for. A leaf costs no allocation, a layer one for its future.
            pub async fn perform(&self, io: &Io<R>, request: &Request<'_>, fua: bool) -> Result<(), Errno> {
                let (offset, len) = (request.sector * SECTOR, request.len());
                // All in one function, since each further one would cost every request on its way in and at its end.
                let result = match self {
                    $(AnyChannel::$leaf(leaf) => match request.op {
                        Op::Flush => leaf.flush(io).await,
                        _ if len == 0 => Ok(()),
                        Op::Read => leaf.read(io, request.data, len, offset).await,
                        Op::Write => leaf.write(io, request.data, len, offset, fua).await,
                        Op::Discard => leaf.discard(io, offset, len).await,
                        Op::WriteZeroes => leaf.write_zeroes(io, offset, len, request.flags.unmap).await,
                    },)*
                    $($(#[$when])? AnyChannel::$layer(_) if len == 0 && request.op != Op::Flush => Ok(()),)*
                    $($(#[$when])? AnyChannel::$layer(layer) => {
                        let request = Request { flags: Flags { fua, ..request.flags }, ..*request };
                        Box::pin(layer.submit(io, &request)).await
                    })*
                };
                match result {
                    Err(Errno::EOPNOTSUPP) if request.op == Op::WriteZeroes => {
                        // Boxed, as what is rare: a slot's future has no room for it.
                        Box::pin(transfer::write_zeroes(self, io, request)).await
                    }
                    other => other,
                }
            }

            /// Reads what a leaf has behind the last whole block, which is no request's.
            pub async fn read_tail(&self, io: &Io<R>, data: Data<'_>, len: u64, offset: u64) -> Result<(), Errno> {
                match self {
                    $(AnyChannel::$leaf(leaf) => leaf.read(io, data, len, offset).await,)*
                    $($(#[$when])? AnyChannel::$layer(_) => Err(Errno::EOPNOTSUPP),)*
                }
            }

            /// What it stands on; nothing below a leaf.
            pub fn below(&self) -> &[Edge<R>] {
                match self {
                    $(AnyChannel::$leaf(_) => &[],)*
                    $($(#[$when])? AnyChannel::$layer(layer) => layer.below(),)*
                }
            }

            /// Where its own losses of acknowledged writes are kept, if it may have some.
            pub fn losses(&self) -> Option<&Losses> {
                match self {
                    $(AnyChannel::$leaf(leaf) => Leaf::<R>::losses(leaf),)*
                    $($(#[$when])? AnyChannel::$layer(layer) => layer.losses(),)*
                }
            }

            /// See [`Leaf::may_flush_again`]. A layer says so of what it stands on, if that is one thing.
            pub fn may_flush_again(&self, errno: Errno) -> bool {
                match self {
                    $(AnyChannel::$leaf(leaf) => Leaf::<R>::may_flush_again(leaf, errno),)*
                    $($(#[$when])? AnyChannel::$layer(layer) => matches!(layer.below(), [one] if one.may_flush_again(errno)),)*
                }
            }

            /// See [`Leaf::waits_for`]. A layer says so of the first thing that it stands on.
            pub fn waits_for(&self) -> &'static str {
                match self {
                    $(AnyChannel::$leaf(leaf) => Leaf::<R>::waits_for(leaf),)*
                    $($(#[$when])? AnyChannel::$layer(layer) => layer.below().first().map_or("the store", Edge::waits_for),)*
                }
            }

            /// See [`Leaf::hang_up`]; for all below.
            pub fn hang_up(&self) {
                match self {
                    $(AnyChannel::$leaf(leaf) => Leaf::<R>::hang_up(leaf),)*
                    $($(#[$when])? AnyChannel::$layer(layer) => layer.below().iter().for_each(Edge::hang_up),)*
                }
            }

            /// See [`Leaf::abandon`]; for all below.
            pub fn abandon(&self) {
                match self {
                    $(AnyChannel::$leaf(leaf) => Leaf::<R>::abandon(leaf),)*
                    $($(#[$when])? AnyChannel::$layer(layer) => layer.abandon(),)*
                }
            }
        }
    };
}

drivers! {
    leaves:
        /// A regular file or a block device.
        File(FileConfig),
        /// Bytes in this process, lost when it ends.
        Memory(MemoryConfig),
        /// Stores nothing, and reads nothing: for measuring.
        Null(NullConfig),
        /// An export of an NBD server.
        Nbd(NbdConfig),
    ;
    layers:
        /// Another volume, with faults: for testers.
        Fault(FaultConfig),
        /// A qcow2 image, alone or over another volume.
        Qcow2(Qcow2Config),
        /// Another volume, as it is.
        [cfg(test)] Pass(super::tests::layers::PassConfig),
        /// Another volume, each request in two halves at once.
        [cfg(test)] Halves(super::tests::layers::HalvesConfig),
        /// Another volume, from some sector on.
        [cfg(test)] Offset(super::tests::layers::OffsetConfig),
    ;
}
