//! What a volume is made of: whether a later service has the same store before it as an earlier one had.

#![forbid(unsafe_code)]

use super::nbd::uri::normal;
use crate::block::OVER;
use crate::escape::{escaped, unescaped};
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::UNIX_EPOCH;

/// Names a store, and no other: two are equal only if what they were taken of is the same file, device or export. One
/// line of printable characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity(String);

impl Identity {
    /// Of a file: its file system's device number, its inode, and when it was made, because the inode of a file that was
    /// removed is soon another's. Of a block device: its number, and which of those that had this number since the
    /// machine started it is (`diskseq`; a loop device that is attached to another file is another disk).
    ///
    /// Where the file system keeps no time of birth (NFS, most of FUSE, ext4 with inodes of 128 bytes) a file that was
    /// replaced and got the old one's inode passes for that one. Nothing else that `statx(2)` tells would do: what changes
    /// with each write cannot be compared, and to refuse would give up every disk there, after each crash, for a mistake of its
    /// administrator's.
    ///
    /// # Errors
    /// When the kernel says nothing of it.
    pub fn of_file(driver: &str, file: &File) -> io::Result<Identity> {
        let metadata = file.metadata()?;
        if metadata.file_type().is_block_device() {
            let number = numbers(metadata.rdev());
            let turn = diskseq(Path::new("/sys/dev/block"), &number).unwrap_or_else(|| "unknown".into());
            return Ok(Identity(format!("{driver} device={number} diskseq={turn}")));
        }
        let (device, inode) = (numbers(metadata.dev()), metadata.ino());
        let born = metadata.created().ok().and_then(|born| born.duration_since(UNIX_EPOCH).ok());
        let born =
            born.map_or("unknown".into(), |born| format!("{}.{:09}", born.as_secs(), born.subsec_nanos()));
        Ok(Identity(format!("{driver} device={device} inode={inode} born={born}")))
    }

    /// Of a server's export, by its URI, in whichever of the ways it can be written.
    pub fn of_uri(driver: &str, uri: &str) -> Identity {
        Identity(format!("{driver} {}", escaped(&normal(uri))))
    }

    /// One that an earlier service has noted, as this one would say it: those before it noted URIs as they were written.
    pub fn noted(text: &str) -> Identity {
        // What layers it is seen through stays as it is.
        let leaf = text.rfind(OVER).map_or(0, |at| at + OVER.len());
        let (layers, leaf) = text.split_at(leaf);
        let export = |(driver, uri): (&str, &str)| {
            let uri = unescaped(uri).filter(|uri| uri.contains("://"))?;
            Some(Identity::of_uri(driver, &uri))
        };
        let leaf = leaf.split_once(' ').and_then(export).unwrap_or_else(|| Identity(leaf.into()));
        Identity(format!("{layers}{leaf}"))
    }

    /// Of a volume that keeps nothing.
    pub fn of_nothing(driver: &str) -> Identity {
        Identity(driver.into())
    }

    /// Of what a layer makes of another store.
    pub fn over(driver: &str, base: &Identity) -> Identity {
        Identity(format!("{driver}{OVER}{base}"))
    }

    /// The line.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `MAJOR:MINOR`.
fn numbers(device: u64) -> String {
    format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device))
}

/// A partition has that of its disk.
fn diskseq(devices: &Path, number: &str) -> Option<String> {
    let device = devices.join(number);
    let read = |path: &str| fs::read_to_string(device.join(path)).ok().map(|text| text.trim().to_owned());
    read("diskseq").or_else(|| read("../diskseq"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_itself_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let of = |path: &Path| Identity::of_file("file", &File::open(path).unwrap()).unwrap();
        let (path, other, link) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("link"));
        fs::write(&path, "x").unwrap();
        fs::write(&other, "x").unwrap();
        fs::hard_link(&path, &link).unwrap();
        let first = of(&path);
        fs::write(&path, "other bytes").unwrap();
        assert_eq!((of(&path), of(&link)), (first.clone(), first.clone()));
        assert_ne!(of(&other), first);
        // Another driver would read other bytes from it.
        assert_ne!(Identity::of_file("qcow2", &File::open(&path).unwrap()).unwrap(), first);
        // Its place is taken, and so perhaps is its inode.
        for path in [&path, &link] {
            fs::remove_file(path).unwrap();
        }
        fs::write(&path, "x").unwrap();
        assert_ne!(of(&path), first);
    }

    #[test]
    fn devices_are_numbered_in_the_order_in_which_they_appear() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        fs::create_dir_all(disk.join("part")).unwrap();
        fs::write(disk.join("diskseq"), "17\n").unwrap();
        std::os::unix::fs::symlink(&disk, dir.path().join("7:0")).unwrap();
        std::os::unix::fs::symlink(disk.join("part"), dir.path().join("259:3")).unwrap();
        assert_eq!(diskseq(dir.path(), "7:0").as_deref(), Some("17"));
        assert_eq!(diskseq(dir.path(), "259:3").as_deref(), Some("17"));
        assert_eq!(diskseq(dir.path(), "7:1"), None);
    }

    #[test]
    fn an_export_is_its_uri() {
        let of = |uri| Identity::of_uri("nbd", uri);
        assert_eq!(of("nbd://a/x"), of("nbd://a/x"));
        assert_ne!(of("nbd://a/x"), of("nbd://a/y"));
        assert!(!of("nbd://a/x\ny").as_str().contains('\n'));
        // However it is written.
        assert_eq!(of("nbd://A:10809/%78"), of("nbd://a/x"));
        assert_ne!(of("nbd://a:10810/x"), of("nbd://a/x"));
    }

    #[test]
    fn what_was_noted_is_still_itself() {
        let of = |uri| Identity::of_uri("nbd", uri);
        for uri in ["nbd://a/x", "nbd://a/%2541 ä\n", "nbd+unix:///e?socket=/run/a%25b"] {
            assert_eq!(Identity::noted(of(uri).as_str()), of(uri));
            assert_eq!(Identity::noted(&format!("nbd {}", escaped(uri))), of(uri), "as it was noted before");
        }
        for other in
            ["null", "file device=8:1 inode=2 born=3", "nbd %zz", "nbd x://y%zz", "nbd http://h/x", ""]
        {
            assert_eq!(Identity::noted(other).as_str(), other);
            let over = Identity::over("fault", &Identity(other.into()));
            assert_eq!(Identity::noted(over.as_str()), over);
        }
        // Through layers, too.
        let over = |base: &Identity| Identity::over("fault", &Identity::over("fault", base));
        let uri = "nbd+unix:///e%20f?socket=/run/a%25b";
        assert_eq!(Identity::noted(over(&of(uri)).as_str()), over(&of(uri)));
        let before = Identity(format!("nbd {}", escaped("nbd://A:10809/x")));
        assert_eq!(Identity::noted(over(&before).as_str()), over(&of("nbd://a/x")));
    }
}
