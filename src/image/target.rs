//! Where a new image goes: it is written out of sight, and has its name at the end.

#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::ImageError;
use super::attributes;
use super::scratch::Scratch;
use super::store::Store;

/// A regular file that is not yet under its name. Dropped before [`NewFile::publish`], it is gone.
#[derive(Debug)]
pub(super) struct NewFile {
    scratch: Scratch,
    /// Where it belongs.
    path: PathBuf,
    /// What it is to replace, locked against every other use; `None`: nothing is to be replaced.
    replaces: Option<Store>,
}

impl NewFile {
    /// A file of `size` zero bytes, for its owner alone: what comes to be in a disk is not for everybody who may read the
    /// directory, whatever the umask says or the source of a copy was. `path` must not exist.
    ///
    /// # Errors
    /// [`ImageError::Exists`], or the system's refusal.
    pub fn create(path: &Path, size: u64) -> Result<NewFile, ImageError> {
        match fs::symlink_metadata(path) {
            Ok(_) => Err(ImageError::Exists(path.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                NewFile::open(path.to_owned(), size, None)
            }
            Err(error) => Err(ImageError::system("look at", path)(error)),
        }
    }

    /// A file of `size` zero bytes to take the place of the regular file at `path`, with its owner, mode, access control
    /// lists and labels. A symbolic link stays, what it points to is replaced.
    ///
    /// # Errors
    /// An image in use, what of it cannot be kept, or the system's refusal.
    pub fn replace(path: &Path, size: u64) -> Result<NewFile, ImageError> {
        let real = path.canonicalize().map_err(ImageError::system("find", path))?;
        let old = Store::to_replace(&real)?;
        if old.metadata.nlink() > 1 {
            log::warn!("{}: its other names (hard links) keep the old image", path.display());
        }
        NewFile::open(real, size, Some(old))
    }

    fn open(path: PathBuf, size: u64, replaces: Option<Store>) -> Result<NewFile, ImageError> {
        let scratch = Scratch::new(directory(&path))
            .map_err(ImageError::system("make a file in the directory of", &path))?;
        let new = NewFile { scratch, path, replaces };
        if let Some(old) = &new.replaces {
            attributes::keep_storage(&old.file, &new.scratch.file);
            // Once now, so that a refusal comes before the work.
            attributes::keep(&old.file, &new.scratch.file, &new.path)?;
        }
        let sized = new.scratch.file.set_len(size);
        sized.map_err(ImageError::system("set the size of", &new.path))?;
        Ok(new)
    }

    /// A second handle for the runtime's I/O.
    pub fn handle(&self) -> Result<File, ImageError> {
        self.scratch.file.try_clone().map_err(ImageError::system("open", &self.path))
    }

    /// Puts the file under its name. Its contents must be on disk already.
    ///
    /// # Errors
    /// [`ImageError::Exists`] if something has come to be there since, or the system's refusal.
    pub fn publish(mut self) -> Result<(), ImageError> {
        match &self.replaces {
            Some(old) => {
                // What is there now may be in use, and is not what is locked.
                let now = fs::metadata(&self.path).map_err(ImageError::system("look at", &self.path))?;
                if (now.dev(), now.ino()) != (old.metadata.dev(), old.metadata.ino()) {
                    return Err(ImageError::unsuitable(&self.path, "was replaced by another file meanwhile"));
                }
                attributes::keep(&old.file, &self.scratch.file, &self.path)?;
                self.scratch.publish_over(&self.path).map_err(ImageError::system("replace", &self.path))?;
            }
            None => match self.scratch.publish(&self.path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    return Err(ImageError::Exists(self.path.clone()));
                }
                published => published.map_err(ImageError::system("make", &self.path))?,
            },
        }
        // The name is as durable as the contents.
        let flushed = File::open(directory(&self.path)).and_then(|directory| directory.sync_all());
        match flushed {
            // A file system that does not flush directories.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            flushed => flushed.map_err(ImageError::system("flush the directory of", &self.path)),
        }
    }
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::super::scratch::tests::names;
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn it_appears_when_published_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img");
        let new = NewFile::create(&path, 512).unwrap();
        assert!(!path.exists());
        new.publish().unwrap();
        assert_eq!(names(dir.path()), ["a.img"]);
        assert_eq!(fs::metadata(&path).unwrap().len(), 512);

        drop(NewFile::create(&dir.path().join("b.img"), 512).unwrap());
        assert_eq!(names(dir.path()), ["a.img"]);
    }

    #[test]
    fn what_appears_meanwhile_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img");
        let new = NewFile::create(&path, 512).unwrap();
        fs::write(&path, "other").unwrap();
        assert!(matches!(new.publish(), Err(ImageError::Exists(_))));
        assert_eq!(fs::read(&path).unwrap(), b"other");
        assert_eq!(names(dir.path()), ["a.img"]);
        let error = NewFile::create(&path, 512).unwrap_err();
        assert!(matches!(error, ImageError::Exists(_)), "{error}");
    }

    /// Another image under that name is not the one that was locked.
    #[test]
    fn what_was_replaced_meanwhile_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("a.img"), dir.path().join("b.img"));
        fs::write(&path, "old").unwrap();
        fs::write(&other, "other").unwrap();
        let new = NewFile::replace(&path, 512).unwrap();
        fs::rename(&other, &path).unwrap();
        assert!(matches!(new.publish(), Err(ImageError::Unsuitable { .. })));
        assert_eq!(
            (fs::read(&path).unwrap(), names(dir.path())),
            (b"other".to_vec(), vec!["a.img".to_owned()])
        );
    }

    #[test]
    fn replacing_keeps_links_and_permissions() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("a.img"), dir.path().join("link"));
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("a.img", &link).unwrap();
        let new = NewFile::replace(&link, 512).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        new.publish().unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.len(), metadata.permissions().mode() & 0o777), (512, 0o640));
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(names(dir.path()), ["a.img", "link"]);
    }
}
