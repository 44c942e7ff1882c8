//! The ublk door: a volume as `/dev/ublkbN` of the kernel we run on.
//!
//! Two halves that meet in [`QueueSetup`]:
//! - [`Device`], the control side: adds, starts, stops and deletes the device through libublk, on a thread of
//!   its own, with a time limit on every command. It never touches a request.
//! - [`Queue`], the data path: fetches requests on a worker's ring and commits their results. It knows
//!   nothing of the device's life but its end, which it is told by an aborted fetch.
//!
//! The order of a life: [`Device::add`], a [`Queue`] for every [`Device::queues`], [`Device::start`] (which
//! waits until all of them fetch), serve; [`Device::stop`], wait until all queues have ended,
//! [`Device::delete`]. Until the last queue has ended the kernel may write to its memory.
//!
//! [`support`] tells what the running kernel offers, and [`StableName`] keeps `/dev/ringblk/NAME`.

mod control;
mod descriptor;
mod error;
mod name;
pub mod options;
mod params;
mod queue;
pub mod support;

pub use control::{Answer, Device, Wish};
pub use descriptor::{Asked, Descriptor};
pub use error::{Error, Verb};
pub use name::{NameError, StableName};
pub use queue::{Queue, QueueSetup, command};
