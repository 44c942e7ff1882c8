//! What a service gives up once everything it needs is open, so that a guest, a VMM or an NBD server that gets the
//! better of it has gained little.
//!
//! Four things, each for the case that another is missing: [`capabilities`], [`landlock`] (files and TCP ports),
//! [`seccomp`] (system calls), and `no_new_privs`. Where the kernel lacks one, the others still hold, and the log says
//! so. They hold for the thread that [enters](enter()) and for those it starts later, so it must be the only one.
//!
//! What they do not cover: operations on an io_uring are no system calls, and only landlock and the capabilities stand
//! in their way; and what is open already stays so.

#![forbid(unsafe_code)]

mod capabilities;
mod landlock;
mod plan;
mod seccomp;

use crate::ring::set_io_flusher;
use crate::service::config::SandboxMode;
use std::io;

pub use crate::service::status::SandboxStatus;
pub use plan::Plan;

/// Why there is no sandbox. A kernel that lacks a part of it is no reason.
#[derive(Debug, thiserror::Error)]
#[error("the sandbox cannot be entered (--sandbox=off goes without): {what}")]
pub struct Error {
    what: &'static str,
    /// The kernel's answer.
    #[source]
    source: io::Error,
}

impl Error {
    fn new(what: &'static str) -> impl Fn(io::Error) -> Error {
        move |source| Error { what, source }
    }
}

/// Gives up everything that `plan` does not name, for good.
///
/// # Errors
/// When the kernel has what it takes and refuses it all the same.
pub fn enter(plan: &Plan) -> Result<SandboxStatus, Error> {
    if plan.mode == SandboxMode::Off {
        log::info!("sandbox: off");
        return Ok(SandboxStatus { mode: plan.mode.to_string(), ..SandboxStatus::default() });
    }
    rustix::thread::set_no_new_privs(true).map_err(|errno| Error::new("no_new_privs")(errno.into()))?;
    // While we may: the capability that it needs is given up below.
    set_io_flusher();
    let landlock_abi = landlock::restrict(plan)?;
    let capabilities = capabilities::keep(plan).map_err(Error::new("capabilities"))?;
    let seccomp = seccomp::install(plan)?;
    let status = SandboxStatus { mode: plan.mode.to_string(), landlock_abi, seccomp, capabilities };
    log::info!("sandbox: {status}");
    Ok(status)
}
