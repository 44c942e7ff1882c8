//! The files that can still be opened, and the TCP ports that can still be connected to.

use super::{Error, Plan};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, NetPort, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError, Scope, path_beneath_rules,
};
use std::io;
use std::path::Path;

/// What is ruled over: everything that this version knows. An older kernel rules over less.
const KNOWN: ABI = ABI::V6;

/// What looking a host's name up may read.
const RESOLVER: [&str; 5] = ["/etc", "/run/systemd/resolve", "/usr/lib", "/lib", "/lib64"];

/// Forbids everything else. The version of landlock in force; `None` where the kernel has none.
pub(super) fn restrict(plan: &Plan) -> Result<Option<i32>, Error> {
    let failed = |error: RulesetError| Error::new("landlock")(io::Error::other(error));
    let status = rules(plan).and_then(RulesetCreated::restrict_self).map_err(failed)?;
    match status.landlock {
        LandlockStatus::Available { effective_abi, .. } => Ok(Some((effective_abi as i32).min(KNOWN as i32))),
        LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => {
            log::info!("sandbox: this kernel has no landlock, so files and ports are open as to any process");
            Ok(None)
        }
    }
}

/// A path that is not there is left out.
fn rules(plan: &Plan) -> Result<RulesetCreated, RulesetError> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let write = AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev;
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()?;
    let mut allow = |paths: &[&Path], access: BitFlags<AccessFs>| -> Result<(), RulesetError> {
        for path in paths {
            log::debug!("sandbox: {}: {access:?}", path.display());
        }
        (&mut rules).add_rules(path_beneath_rules(paths, access)).map(drop)
    };
    allow(&paths(&plan.read), AccessFs::ReadFile.into())?;
    allow(&paths(&plan.write), write | AccessFs::ReadFile)?;
    allow(&paths(&plan.expect_in), write | read)?;
    allow(&paths(&plan.remove_in), AccessFs::RemoveFile.into())?;
    // A socket is made under a lock and in a directory of its own, where others could exchange it.
    let make = AccessFs::MakeSock | AccessFs::MakeReg | AccessFs::MakeDir | AccessFs::Refer;
    let remove = AccessFs::RemoveFile | AccessFs::RemoveDir;
    allow(&paths(&plan.grow_in), write | read | make | remove)?;
    allow(&[Path::new("/proc/self")], read)?;
    if plan.names {
        allow(&RESOLVER.map(Path::new), read)?;
    }
    if plan.files || plan.ublk {
        allow(&[Path::new("/sys")], read)?;
    }
    if plan.ublk {
        // A rule is about a directory that is there. Making it may fail: so will making the first name, and say why.
        let _ = std::fs::create_dir(plan.links());
        // Whether the server that a disk had is still alive.
        allow(&[Path::new("/proc")], read)?;
        // Their limits.
        allow(&[Path::new("/sys/devices/virtual/block")], AccessFs::WriteFile | AccessFs::Truncate)?;
        // The devices to come have no path yet that could be named.
        allow(&[Path::new("/dev")], write | AccessFs::ReadFile)?;
        allow(
            &[Path::new(plan.links())],
            read | AccessFs::MakeSym | AccessFs::MakeReg | AccessFs::RemoveFile,
        )?;
    }
    for port in &plan.ports {
        log::debug!("sandbox: TCP port {port}");
        rules = rules.add_rule(NetPort::new(*port, AccessNet::ConnectTcp))?;
    }
    Ok(rules)
}

fn paths(paths: &[std::path::PathBuf]) -> Vec<&Path> {
    paths.iter().map(AsRef::as_ref).collect()
}
