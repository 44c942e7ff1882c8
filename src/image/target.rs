//! Where a new image goes: beside its place first, under its name at the end.

#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::ImageError;

/// A regular file that is not yet under its name. Dropped before [`NewFile::publish`], it is gone.
#[derive(Debug)]
pub(super) struct NewFile {
    file: File,
    /// Where it is written.
    temporary: PathBuf,
    /// Where it belongs.
    path: PathBuf,
    /// Permissions of the file it is to replace; `None`: nothing is to be replaced.
    replaces: Option<Permissions>,
}

/// Names tried for the temporary file before giving up; others are leftovers of processes that were killed.
const NAME_TRIES: u32 = 16;

impl NewFile {
    /// A file of `size` zero bytes, with `mode` less the umask. `path` must not exist.
    ///
    /// # Errors
    /// [`ImageError::Exists`], or the system's refusal.
    pub fn create(path: &Path, size: u64, mode: u32) -> Result<NewFile, ImageError> {
        match fs::symlink_metadata(path) {
            Ok(_) => Err(ImageError::Exists(path.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                NewFile::open(path.to_owned(), size, mode, None)
            }
            Err(error) => Err(ImageError::system("look at", path)(error)),
        }
    }

    /// A file of `size` zero bytes to take the place and the permissions of the regular file at `path`. A symbolic link
    /// stays, what it points to is replaced.
    ///
    /// # Errors
    /// The system's refusal.
    pub fn replace(path: &Path, size: u64) -> Result<NewFile, ImageError> {
        let real = path.canonicalize().map_err(ImageError::system("find", path))?;
        let permissions = fs::metadata(&real).map_err(ImageError::system("look at", path))?.permissions();
        NewFile::open(real, size, 0o600, Some(permissions))
    }

    fn open(
        path: PathBuf,
        size: u64,
        mode: u32,
        replaces: Option<Permissions>,
    ) -> Result<NewFile, ImageError> {
        let (file, temporary) =
            open_beside(&path, mode).map_err(ImageError::system("make a file in the directory of", &path))?;
        // From here on the temporary file is removed on every way out.
        let new = NewFile { file, temporary, path, replaces };
        new.file.set_len(size).map_err(ImageError::system("set the size of", &new.path))?;
        Ok(new)
    }

    /// A second handle for the runtime's I/O.
    pub fn handle(&self) -> Result<File, ImageError> {
        self.file.try_clone().map_err(ImageError::system("open", &self.path))
    }

    /// Puts the file under its name. Its contents must be on disk already.
    ///
    /// # Errors
    /// [`ImageError::Exists`] if something has come to be there since, or the system's refusal.
    pub fn publish(self) -> Result<(), ImageError> {
        match &self.replaces {
            Some(permissions) => {
                self.file
                    .set_permissions(permissions.clone())
                    .map_err(ImageError::system("set the permissions of", &self.path))?;
                fs::rename(&self.temporary, &self.path).map_err(ImageError::system("replace", &self.path))?;
            }
            // A link, not a rename: it fails where a file has appeared meanwhile. Dropping removes the other name.
            None => match fs::hard_link(&self.temporary, &self.path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    return Err(ImageError::Exists(self.path.clone()));
                }
                linked => linked.map_err(ImageError::system("make", &self.path))?,
            },
        }
        // The name is as durable as the contents.
        File::open(directory(&self.path))
            .and_then(|directory| directory.sync_all())
            .map_err(ImageError::system("flush the directory of", &self.path))
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        match fs::remove_file(&self.temporary) {
            Ok(()) => {}
            // Renamed to its place.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => log::warn!("cannot remove {}: {error}", self.temporary.display()),
        }
    }
}

fn open_beside(path: &Path, mode: u32) -> io::Result<(File, PathBuf)> {
    let mut attempt = 0;
    loop {
        let name = format!(".ringblk-{}-{attempt}.tmp", std::process::id());
        let temporary = directory(path).join(name);
        let opened = OpenOptions::new().read(true).write(true).create_new(true).mode(mode).open(&temporary);
        match opened {
            Ok(file) => return Ok((file, temporary)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && attempt < NAME_TRIES => {
                attempt += 1;
            }
            Err(error) => return Err(error),
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
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn it_appears_when_published_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img");
        let new = NewFile::create(&path, 512, 0o600).unwrap();
        assert!(!path.exists());
        new.publish().unwrap();
        assert_eq!(names(dir.path()), ["a.img"]);
        assert_eq!(fs::metadata(&path).unwrap().len(), 512);

        drop(NewFile::create(&dir.path().join("b.img"), 512, 0o600).unwrap());
        assert_eq!(names(dir.path()), ["a.img"]);
    }

    #[test]
    fn what_appears_meanwhile_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img");
        let new = NewFile::create(&path, 512, 0o600).unwrap();
        fs::write(&path, "other").unwrap();
        assert!(matches!(new.publish(), Err(ImageError::Exists(_))));
        assert_eq!(fs::read(&path).unwrap(), b"other");
        assert_eq!(names(dir.path()), ["a.img"]);
        let error = NewFile::create(&path, 512, 0o600).unwrap_err();
        assert!(matches!(error, ImageError::Exists(_)), "{error}");
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

    #[test]
    fn leftovers_of_the_dead_are_stepped_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img");
        let (_first, one) = open_beside(&path, 0o600).unwrap();
        let (_second, two) = open_beside(&path, 0o600).unwrap();
        assert_ne!(one, two);
    }
}
