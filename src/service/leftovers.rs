//! What a service that is gone may have left: links to ublk disks.

#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// Where the links to our ublk disks are.
const LINKS: &str = "/dev/ringblk";

/// One link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// `/dev/ringblk/NAME`.
    pub link: PathBuf,
    /// Where it points.
    pub device: PathBuf,
    /// Whether there is a block device.
    pub exists: bool,
}

/// All links under `/dev/ringblk`, by name.
///
/// # Errors
/// When the directory is there but cannot be read.
pub fn devices() -> io::Result<Vec<Leftover>> {
    devices_in(Path::new(LINKS))
}

fn devices_in(dir: &Path) -> io::Result<Vec<Leftover>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let link = entry?.path();
        // Anything that is no link is not ours to speak of.
        let Ok(target) = fs::read_link(&link) else {
            continue;
        };
        let metadata = fs::metadata(&link);
        found.push(Leftover {
            device: dir.join(target),
            exists: metadata.is_ok_and(|metadata| metadata.file_type().is_block_device()),
            link,
        });
    }
    found.sort_by(|a, b| a.link.cmp(&b.link));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_are_found_and_files_are_not() {
        let dir = tempfile::tempdir().unwrap();
        symlink("/dev/no-such-disk", dir.path().join("b")).unwrap();
        symlink("/dev/null", dir.path().join("a")).unwrap();
        fs::write(dir.path().join("c"), "").unwrap();
        let found = devices_in(dir.path()).unwrap();
        let devices: Vec<_> = found.iter().map(|left| left.device.as_path()).collect();
        assert_eq!(devices, [Path::new("/dev/null"), Path::new("/dev/no-such-disk")]);
        assert!(found.iter().all(|left| !left.exists));
        assert_eq!(devices_in(&dir.path().join("none")).unwrap(), []);
    }
}
