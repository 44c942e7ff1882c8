//! Where images are: a directory of the disk, or a tmpfs that is too small for its image until it is told to grow.

use nix::sched::{CloneFlags, unshare};
use std::path::Path;
use std::process::Command;

/// Bytes of a scarce store, as `mount` has them; less than any image.
const SCARCE: &str = "1m";
/// Enough for any.
const AMPLE: &str = "64m";

fn mount(args: &[&str]) -> Result<(), String> {
    let output = Command::new("mount").args(args).output().map_err(|error| error.to_string())?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}

/// Gives this process mounts of its own, which go with it however it ends. Before any thread is made.
///
/// # Errors
/// Not root, or forbidden here.
pub fn own_mounts() -> Result<(), String> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|error| error.to_string())?;
    mount(&["--make-rprivate", "/"])
}

/// Puts a scarce store on a directory.
pub fn scarce(dir: &Path) -> Result<(), String> {
    mount(&["-t", "tmpfs", "-o", &format!("size={SCARCE}"), "soak", dir.to_str().expect("a path of ours")])
}

/// Lets it have all that it needs.
pub fn ample(dir: &Path) -> Result<(), String> {
    mount(&["-o", &format!("remount,size={AMPLE}"), dir.to_str().expect("a path of ours")])
}

/// Takes it away. Lazily: a service that was killed may hold the image for a moment.
pub fn remove(dir: &Path) {
    let _ = Command::new("umount").arg("--lazy").arg(dir).status();
}
