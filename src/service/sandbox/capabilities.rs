//! Rights that root has and a running service does not need.

use super::Plan;
use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};
use std::io;
use std::path::PathBuf;

/// Drops all but what `plan` needs, and names what is left.
pub(super) fn keep(plan: &Plan) -> io::Result<Vec<String>> {
    let had = capabilities(None)?.permitted;
    // The rings of threads to come would else count against RLIMIT_MEMLOCK, which all processes of a user share.
    let mut needed = CapabilitySet::IPC_LOCK;
    if plan.ublk {
        // The driver asks for it at each control command.
        needed |= CapabilitySet::SYS_ADMIN;
    }
    let kept = had & needed;
    // First without, to see whether root's right to any file is what lets us remove a socket of ours or connect to a
    // server's: their owner may be somebody else.
    set(had, kept)?;
    let blocked: Vec<&PathBuf> =
        plan.remove_in.iter().chain(&plan.connect_to).filter(|path| !may_write(path)).collect();
    let mut kept = kept;
    if let Some(path) = blocked.first()
        && had.contains(CapabilitySet::DAC_OVERRIDE)
    {
        log::info!("sandbox: cap_dac_override stays: {} belongs to another user", path.display());
        kept |= CapabilitySet::DAC_OVERRIDE;
    }
    if plan.foreign && had.contains(CapabilitySet::DAC_OVERRIDE) {
        log::info!(
            "sandbox: cap_dac_override stays: a volume is still to be opened, which may be another user's"
        );
        kept |= CapabilitySet::DAC_OVERRIDE;
    }
    set(kept, kept)?;
    Ok(kept.iter_names().map(|(name, _)| format!("cap_{}", name.to_lowercase())).collect())
}

fn set(permitted: CapabilitySet, effective: CapabilitySet) -> io::Result<()> {
    let inheritable = CapabilitySet::empty();
    Ok(set_capabilities(None, CapabilitySets { effective, permitted, inheritable })?)
}

/// A path that is not there now is not counted: whoever makes it will see to its owner.
fn may_write(path: &PathBuf) -> bool {
    let denied = accessat(CWD, path, Access::WRITE_OK, AtFlags::EACCESS).err();
    !matches!(denied, Some(rustix::io::Errno::ACCESS | rustix::io::Errno::PERM))
}
