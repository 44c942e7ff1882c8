//! The ublk door: a volume as `/dev/ublkbN` of the kernel we run on.
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
//! [`support`] tells what the running kernel offers, and [`StableName`] keeps `/dev/ringblk/NAME`.

mod brake;
mod buffers;
mod claim;
mod control;
mod descriptor;
mod driver;
mod error;
mod info;
mod name;
pub mod options;
mod orders;
mod params;
mod queue;
mod record;
mod recover;
pub mod support;
mod users;
mod wish;

pub use brake::Brake;
pub use buffers::{BufferUse, default_max_io};
pub use claim::Claim;
pub use control::Device;
pub use descriptor::{Asked, Descriptor};
pub use error::{Error, NoResize, Verb};
pub use info::{Info, Mark, Standing, State};
pub use name::{DIRECTORY as LINKS, NameError, StableName, link, target_of};
pub use orders::Answer;
pub use queue::{Queue, QueueSetup, command};
pub use record::Record;
pub use recover::{Found, check, find, ours, remove};
pub use users::{openers, users};
pub use wish::Wish;
