//! Changing the size of a volume while it is served.
//!
//! Three things tell of a volume's size, and they change in the order in which nobody is ever promised what is not
//! there:
//!
//! - growing: first the store, then the capacity that requests are checked against, then the exports, whose clients
//!   learn that there is more.
//! - shrinking, only where it is forced: first the capacity, so that no request past the new end is admitted any
//!   more; then the exports; then those requests are waited for that were admitted before; at last the store is
//!   cut. A write carried out after the cut would make the store grow again, hence the wait. When an export refuses
//!   or a request does not end in time, the capacity and the exports go back, and the store was never touched.

use super::driver::Store;
use super::error::ResizeError;
use super::volume::Volume;
use crate::block::{Geometry, SECTOR};
use std::sync::mpsc::Sender;
use std::sync::{MutexGuard, TryLockError};

/// Those who show a volume to others, as far as its size concerns them.
pub trait Exports {
    /// Whether all of them can show another size.
    ///
    /// # Errors
    /// Why not, for people.
    fn can_resize(&self) -> Result<(), String>;

    /// Shows the volume's capacity, which is `sectors` now, to the clients of all.
    ///
    /// # Errors
    /// What went wrong, for people. The others have been told all the same.
    fn resize(&self, sectors: u64) -> Result<(), String>;

    /// Waits until every request is over that was admitted before the call; false when it takes too long.
    fn drain(&self) -> bool;
}

/// A change of size, in bytes. Nothing has changed where both are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resized {
    /// Capacity before.
    pub from: u64,
    /// Capacity now.
    pub to: u64,
}

impl Volume {
    /// Makes the volume `bytes` large: a regular file is extended (sparsely) or cut, a null volume takes any size, a
    /// memory volume up to what it was opened with. To be called from a thread that may block.
    ///
    /// The file's new length is on stable storage after the next flush, as its new contents are.
    ///
    /// # Errors
    /// See [`ResizeError`]: but for `Untold`, everything is as it was before.
    pub fn resize(&self, bytes: u64, force: bool, exports: &dyn Exports) -> Result<Resized, ResizeError> {
        let _one_at_a_time = self.one_at_a_time()?;
        let geometry = self.geometry();
        if geometry.read_only {
            return Err(ResizeError::ReadOnly);
        }
        let whole = Geometry::new(bytes, geometry.logical_block)?;
        if whole.bytes() != bytes {
            return Err(ResizeError::Unaligned { bytes, block: geometry.logical_block });
        }
        let present = self.store.size(geometry.bytes())?;
        self.store.takes(bytes)?;
        // What the store has beyond the capacity (it was made larger from outside) is somebody's too.
        let most = geometry.bytes().max(present);
        if bytes < most && !force {
            return Err(ResizeError::Shrinks { from: most, to: bytes });
        }
        self.change(bytes, (bytes != present).then_some(bytes), exports)
    }

    /// Takes the size that the store has now, in whole logical blocks: that of a file or a device that was changed
    /// from outside. To be called from a thread that may block.
    ///
    /// # Errors
    /// As for [`resize`](Self::resize).
    pub fn refresh(&self, force: bool, exports: &dyn Exports) -> Result<Resized, ResizeError> {
        let _one_at_a_time = self.one_at_a_time()?;
        let from = self.geometry().bytes();
        let to = Geometry::new(self.store.size(from)?, self.geometry().logical_block)?.bytes();
        if to < from && !force {
            return Err(ResizeError::Shrinks { from, to });
        }
        self.change(to, None, exports)
    }

    /// Has `to` told the volume's name whenever its store has become larger by itself, which [`catch_up`](Self::catch_up)
    /// is then to be called for.
    pub fn tell_growth(&self, to: Sender<String>) {
        self.store.tell_growth(to, self.name());
    }

    /// Takes what its store has become larger by. To be called from a thread that may block.
    ///
    /// # Errors
    /// As for [`resize`](Self::resize).
    pub fn catch_up(&self, exports: &dyn Exports) -> Result<Resized, ResizeError> {
        let _one_at_a_time = self.one_at_a_time()?;
        let from = self.geometry().bytes();
        let offered = self.store.offered().unwrap_or(from);
        let to = Geometry::new(offered, self.geometry().logical_block)?.bytes();
        // Gone again meanwhile.
        if to <= from { Ok(Resized { from, to: from }) } else { self.change(to, None, exports) }
    }

    /// Whoever comes second is sent away: what the first waits for may never come, and each that waits takes a thread.
    fn one_at_a_time(&self) -> Result<MutexGuard<'_, ()>, ResizeError> {
        match self.resizing.try_lock() {
            Ok(guard) => Ok(guard),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(ResizeError::UnderWay),
        }
    }

    /// Makes the capacity `to` bytes, and the store as long as `length` says.
    fn change(&self, to: u64, length: Option<u64>, exports: &dyn Exports) -> Result<Resized, ResizeError> {
        let capacity = &self.geometry().capacity;
        let change = Resized { from: capacity.bytes(), to };
        exports.can_resize().map_err(ResizeError::Export)?;
        let set_length = || length.map_or(Ok(()), |length| self.store.set_size(change.from, length));
        if to >= change.from {
            set_length()?;
            self.store.shows(to);
            capacity.set(to / SECTOR);
            // Exports are told also when nothing has changed: one that was not reached the last time may be now.
            exports.resize(to / SECTOR).map_err(|reason| ResizeError::Untold { to, reason })?;
        } else {
            capacity.set(to / SECTOR);
            let told = exports.resize(to / SECTOR).map_err(ResizeError::Export);
            let drained = told.and_then(|()| if exports.drain() { Ok(()) } else { Err(ResizeError::Busy) });
            if let Err(error) = drained.and_then(|()| set_length()) {
                capacity.set(change.from / SECTOR);
                if let Err(reason) = exports.resize(change.from / SECTOR) {
                    log::warn!("volume {}: its size goes back to {}: {reason}", self.name(), change.from);
                }
                return Err(error);
            }
            self.store.shows(to);
        }
        if to != change.from {
            log::info!("volume {}: {to} bytes now, {} before", self.name(), change.from);
        }
        Ok(change)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Size;
    use crate::engine::config::{FileConfig, MemoryConfig, NullConfig, VolumeConfig};
    use std::cell::{Cell, RefCell};
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;
    use tempfile::NamedTempFile;

    /// Exports that note what they are asked, with the file's length and the capacity at that moment.
    #[derive(Default)]
    struct Notes {
        seen: RefCell<Vec<(&'static str, u64, u64)>>,
        look: Option<(Volume, NamedTempFile)>,
        incapable: bool,
        deaf: Cell<bool>,
        busy: bool,
    }

    impl Notes {
        fn note(&self, what: &'static str) {
            if let Some((volume, file)) = &self.look {
                let length = file.as_file().metadata().unwrap().len();
                self.seen.borrow_mut().push((what, length, volume.geometry().bytes()));
            }
        }
    }

    impl Exports for Notes {
        fn can_resize(&self) -> Result<(), String> {
            self.note("can");
            if self.incapable { Err("too old".into()) } else { Ok(()) }
        }

        fn resize(&self, _: u64) -> Result<(), String> {
            self.note("resize");
            if self.deaf.take() { Err("deaf".into()) } else { Ok(()) }
        }

        fn drain(&self) -> bool {
            self.note("drain");
            !self.busy
        }
    }

    fn config(path: &Path, block_size: Option<u32>) -> FileConfig {
        FileConfig {
            path: path.into(),
            direct: false,
            read_only: false,
            lock: true,
            format: None,
            block_size,
        }
    }

    /// A file volume of 1 MiB, and exports that watch it.
    fn watched(notes: Notes) -> Notes {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let volume = Volume::open("test", &VolumeConfig::File(config(file.path(), None))).unwrap();
        Notes { look: Some((volume, file)), ..notes }
    }

    fn resize(notes: &Notes, bytes: u64, force: bool) -> Result<Resized, ResizeError> {
        notes.look.as_ref().unwrap().0.resize(bytes, force, notes)
    }

    fn refresh(notes: &Notes, force: bool) -> Result<Resized, ResizeError> {
        notes.look.as_ref().unwrap().0.refresh(force, notes)
    }

    fn lengths(notes: &Notes) -> (u64, u64) {
        let (volume, file) = notes.look.as_ref().unwrap();
        (file.as_file().metadata().unwrap().len(), volume.geometry().bytes())
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn nobody_is_promised_what_is_not_there() {
        let notes = watched(Notes::default());
        assert_eq!(resize(&notes, 3 * MIB, false).unwrap(), Resized { from: MIB, to: 3 * MIB });
        assert_eq!(*notes.seen.borrow(), [("can", MIB, MIB), ("resize", 3 * MIB, 3 * MIB)]);
        assert!(notes.look.as_ref().unwrap().1.as_file().metadata().unwrap().blocks() < 8, "sparse");
        notes.seen.borrow_mut().clear();
        resize(&notes, MIB, true).unwrap();
        let (three, one) = (3 * MIB, MIB);
        let expected = [("can", three, three), ("resize", three, one), ("drain", three, one)];
        assert_eq!(*notes.seen.borrow(), expected);
        assert_eq!(lengths(&notes), (MIB, MIB));
    }

    #[test]
    fn a_file_shrinks_only_by_force() {
        let notes = watched(Notes::default());
        assert!(matches!(resize(&notes, MIB / 2, false), Err(ResizeError::Shrinks { .. })));
        // Somebody has made it larger than what is served: that is not to be cut off in passing either.
        notes.look.as_ref().unwrap().1.as_file().set_len(4 * MIB).unwrap();
        let error = resize(&notes, 2 * MIB, false).unwrap_err();
        assert!(matches!(error, ResizeError::Shrinks { from, to } if (from, to) == (4 * MIB, 2 * MIB)));
        assert_eq!((lengths(&notes), notes.seen.borrow().len()), ((4 * MIB, MIB), 0));
        assert_eq!(refresh(&notes, false).unwrap().to, 4 * MIB);
        assert_eq!(resize(&notes, 4 * MIB, false).unwrap(), Resized { from: 4 * MIB, to: 4 * MIB });
    }

    #[test]
    fn what_was_cut_from_outside_is_told() {
        let notes = watched(Notes::default());
        notes.look.as_ref().unwrap().1.as_file().set_len(MIB / 2 + 700).unwrap();
        assert!(matches!(refresh(&notes, false), Err(ResizeError::Shrinks { .. })));
        assert_eq!(lengths(&notes).1, MIB);
        assert_eq!(refresh(&notes, true).unwrap().to, MIB / 2 + 512, "whole blocks");
        assert_eq!(lengths(&notes), (MIB / 2 + 700, MIB / 2 + 512));
        notes.look.as_ref().unwrap().1.as_file().set_len(0).unwrap();
        assert!(matches!(refresh(&notes, true), Err(ResizeError::Geometry(_))));
    }

    #[test]
    fn a_change_that_fails_changes_nothing() {
        let incapable = watched(Notes { incapable: true, ..Notes::default() });
        for (bytes, force) in [(2 * MIB, false), (MIB / 2, true)] {
            assert!(matches!(resize(&incapable, bytes, force), Err(ResizeError::Export(_))));
        }
        assert_eq!(lengths(&incapable), (MIB, MIB));

        let busy = watched(Notes { busy: true, ..Notes::default() });
        assert!(matches!(resize(&busy, MIB / 2, true), Err(ResizeError::Busy)));
        assert_eq!(lengths(&busy), (MIB, MIB));
        assert_eq!(*busy.seen.borrow().last().unwrap(), ("resize", MIB, MIB), "told of the way back");

        let deaf = watched(Notes { deaf: Cell::new(true), ..Notes::default() });
        assert!(matches!(resize(&deaf, MIB / 2, true), Err(ResizeError::Export(_))));
        assert_eq!(lengths(&deaf), (MIB, MIB));
        // Growing has no way back: who saw the new size may use it already. Asking again tells again.
        deaf.deaf.set(true);
        assert!(matches!(resize(&deaf, 2 * MIB, false), Err(ResizeError::Untold { .. })));
        assert_eq!(resize(&deaf, 2 * MIB, false).unwrap(), Resized { from: 2 * MIB, to: 2 * MIB });
        assert_eq!(lengths(&deaf), (2 * MIB, 2 * MIB));
    }

    #[test]
    fn sizes_that_no_disk_has_are_refused() {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let config = config(file.path(), Some(4096));
        let volume = Volume::open("test", &VolumeConfig::File(config.clone())).unwrap();
        let notes = Notes::default();
        for bytes in [MIB + 1, MIB + 512, MIB + 4095, u64::from(u32::MAX)] {
            let refused = volume.resize(bytes, true, &notes);
            assert!(
                matches!(refused, Err(ResizeError::Unaligned { block: 4096, .. })),
                "{bytes}: {refused:?}"
            );
        }
        for bytes in [0, 512, 4095, u64::MAX, !4095, 1 << 63] {
            let refused = volume.resize(bytes, true, &notes);
            assert!(matches!(refused, Err(ResizeError::Geometry(_))), "{bytes}: {refused:?}");
        }
        // More than any file system holds in a file: the kernel's own words.
        let refused = volume.resize(Geometry::MAX_BYTES & !4095, true, &notes);
        if let Err(error) = &refused {
            assert!(matches!(error, ResizeError::Store { .. }), "{error}");
        }
        drop(volume);
        file.as_file().set_len(1 << 20).unwrap();
        let volume =
            Volume::open("test", &VolumeConfig::File(FileConfig { read_only: true, ..config })).unwrap();
        assert!(matches!(volume.resize(2 * MIB, true, &notes), Err(ResizeError::ReadOnly)));
        file.as_file().set_len(2 * MIB).unwrap();
        assert_eq!(volume.refresh(false, &notes).unwrap().to, 2 * MIB);
    }

    #[test]
    fn volumes_without_a_file() {
        let notes = Notes::default();
        let null = NullConfig { size: Size(MIB), block_size: None };
        let null = Volume::open("test", &VolumeConfig::Null(null)).unwrap();
        assert_eq!(null.resize(Geometry::MAX_BYTES, false, &notes).unwrap().to, Geometry::MAX_BYTES);
        assert_eq!(null.refresh(false, &notes).unwrap().to, Geometry::MAX_BYTES);

        let memory = MemoryConfig { size: Size(MIB), block_size: None };
        let memory = Volume::open("test", &VolumeConfig::Memory(memory)).unwrap();
        assert!(matches!(memory.resize(MIB + 512, true, &notes), Err(ResizeError::Fixed(_))));
        assert!(matches!(memory.resize(MIB / 2, false, &notes), Err(ResizeError::Shrinks { .. })));
        assert_eq!(memory.resize(MIB / 2, true, &notes).unwrap().to, MIB / 2);
        assert_eq!(memory.resize(MIB, false, &notes).unwrap(), Resized { from: MIB / 2, to: MIB });
    }
}
