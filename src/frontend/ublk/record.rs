//! What a disk is of, in full: its volume's name and its store's identity.
//!
//! The driver keeps 64 bits for us, the [`OwnerTag`], which cannot be forged or lost but has no room for more than a hash.
//! So each device has a file besides, `/dev/ringblk/.disks/N`, on the devtmpfs that lives as long as the kernel and its
//! devices do (/run/ringblk goes with the service). It is written before the disk is started, so that there is one for
//! every disk that ever had a request, and counts only where its hash is the device's owner tag: a file that an earlier device
//! of that number has left is nobody's.
//!
//! Lines of `KEY=value`, which udev reads too (`IMPORT{file}` in `systemd/60-ringblk.rules`).

#![forbid(unsafe_code)]

use super::info::{Info, OwnerTag};
use super::symlink::DIRECTORY;
use crate::block::OVER;
use crate::escape::escaped;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// What a disk is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Name of the volume.
    pub volume: String,
    /// Identity of its store, in one line. What is compared.
    pub store: String,
    /// Where the store was found, for people.
    pub target: String,
}

/// Where the records are: below the links, where no volume's name can be.
pub(super) fn directory() -> PathBuf {
    Path::new(DIRECTORY).join(".disks")
}

/// Makes the links' directory and that of the records, for a process that will soon not be able to. What goes wrong is told
/// when a link or a record is made.
pub fn prepare_directories() {
    let _ = fs::create_dir_all(directory());
}

impl Record {
    /// For the disk of `volume`, whose store is `store` and was found at `target`.
    pub fn new(volume: &str, store: &str, target: &str) -> Record {
        Record { volume: volume.into(), store: store.into(), target: escaped(target) }
    }

    /// Names what has its bytes, whatever layers they are seen through. `None` where nothing is kept: that has a name and no
    /// particulars.
    pub(super) fn bytes(&self) -> Option<&str> {
        let leaf = self.store.rsplit(OVER).next()?;
        leaf.contains(' ').then_some(leaf)
    }

    /// What the device is tagged with.
    pub fn owner_tag(&self) -> OwnerTag {
        OwnerTag::of(&self.volume, &self.store)
    }

    /// Writes the record of device `id`.
    ///
    /// # Errors
    /// When `/dev` cannot be written to.
    pub(super) fn write(&self, id: u32) -> io::Result<()> {
        self.write_in(&directory(), id)
    }

    fn write_in(&self, directory: &Path, id: u32) -> io::Result<()> {
        fs::create_dir_all(directory)?;
        let Record { volume, store, target } = self;
        let text = format!("RINGBLK_VOLUME={volume}\nRINGBLK_STORE={store}\nRINGBLK_TARGET={target}\n");
        fs::write(directory.join(id.to_string()), text)
    }

    /// The record of `info`'s device; `None` where there is none, or one of another device.
    pub fn of(info: &Info) -> Option<Record> {
        Record::of_in(&directory(), info)
    }

    fn of_in(directory: &Path, info: &Info) -> Option<Record> {
        let text = fs::read_to_string(directory.join(info.id.to_string())).ok()?;
        let value = |key: &str| {
            let value = |line: &str| line.strip_prefix(key)?.strip_prefix('=').map(str::to_owned);
            text.lines().find_map(value)
        };
        let record = Record {
            volume: value("RINGBLK_VOLUME")?,
            store: value("RINGBLK_STORE")?,
            target: value("RINGBLK_TARGET").unwrap_or_default(),
        };
        (record.owner_tag() == info.owner_tag).then_some(record)
    }

    /// Removes the record of device `id`. To be called before the device is deleted: afterwards the number may be
    /// somebody else's.
    pub(super) fn remove(id: u32) {
        let path = directory().join(id.to_string());
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            log::debug!("{}: it stays: {error}", path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::info::sample;
    use super::*;

    #[test]
    fn it_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let record = Record::new("root", "file device=8:1 inode=12 born=3.000000004", "/srv/my image\n.img");
        let info = Info { owner_tag: record.owner_tag(), ..sample() };
        assert_eq!(Record::of_in(dir.path(), &info), None);
        record.write_in(dir.path(), info.id).unwrap();
        assert_eq!(Record::of_in(dir.path(), &info), Some(record.clone()));
        let text = fs::read_to_string(dir.path().join("3")).unwrap();
        assert_eq!(text.lines().count(), 3, "{text}");
    }

    #[test]
    fn one_of_an_earlier_device_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let record = Record::new("root", "null", "1G");
        record.write_in(dir.path(), sample().id).unwrap();
        let other = Record { store: "nbd x".into(), ..record };
        assert_eq!(Record::of_in(dir.path(), &Info { owner_tag: other.owner_tag(), ..sample() }), None);
        for text in ["", "RINGBLK_VOLUME=root\n", "RINGBLK_STORE=null", "\u{0}\n="] {
            fs::write(dir.path().join("3"), text).unwrap();
            assert_eq!(Record::of_in(dir.path(), &sample()), None, "{text:?}");
        }
    }
}
