//! The ublk frontend: a volume as `/dev/ublkbN` of the kernel we run on.
//!
//! Two halves that meet in [`QueueSetup`]:
//! - [`Device`], the control side: adds, recovers, starts, stops and deletes the device, with a time limit on every
//!   command. It never touches a request.
//! - [`Queue`], the data path: fetches requests on a worker's ring and commits their results. It knows
//!   nothing of the device's life but its end, which it is told by an aborted fetch.
//!
//! The order of a life: [`Device::add`], a [`Queue`] for every [`Device::queues`], [`Device::start`] (which
//! waits until all of them fetch), serve; [`Device::stop`], wait until all queues have ended,
//! [`Device::delete`]. Until the last queue has ended the kernel may write to its memory.
//!
//! A device outlives a server that dies. The next one [`find`]s it, and [`Device::recover`] stands for the add.
//!
//! [`features`] tells what the running kernel offers, and [`StableName`] keeps `/dev/ringblk/NAME`.

mod buffers;
mod claim;
mod commands;
pub mod config;
mod control_thread;
mod deadline;
mod descriptor;
mod device;
mod error;
pub mod features;
mod info;
mod params;
mod queue;
mod quiesce_flag;
mod record;
mod recover;
mod spec;
mod symlink;
mod thread;
mod users;

pub use buffers::{BufferUse, default_max_io};
pub use claim::Claim;
pub use control_thread::Answer;
pub use descriptor::{Asked, Descriptor};
pub use device::Device;
pub use error::{ControlOp, Error, NoResize};
pub use info::{Info, OwnerTag, Ownership, State};
pub use queue::{Queue, QueueSetup, command};
pub use quiesce_flag::QuiesceFlag;
pub use record::{Record, prepare_directories};
pub use recover::{Found, check, find, ours, remove};
pub use spec::DeviceSpec;
pub use symlink::{DIRECTORY as LINKS, NameError, StableName, link, target_of};
pub use users::{openers, users};
