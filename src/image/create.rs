//! `ringblk image create`.

#![forbid(unsafe_code)]

use std::path::Path;

use tokio_uring::fs::File;

use super::interrupt::unless_interrupted;
use super::target::NewFile;
use super::{ImageError, is_path, run};
use crate::block::{Geometry, SECTOR, Size};

/// Makes an image of `size` zero bytes, for its owner alone (mode 0600): one hole, or with `preallocate` all of it reserved
/// on disk.
///
/// # Errors
/// A size that no block device has, a `path` that exists, the system's refusal, a signal.
pub fn create(path: &Path, size: Size, preallocate: bool) -> Result<(), ImageError> {
    is_path(path)?;
    let bytes = size.bytes();
    if bytes == 0 || !bytes.is_multiple_of(SECTOR) || bytes > Geometry::MAX_BYTES {
        return Err(ImageError::Setting(format!(
            "{size} is not a size for an image: a positive multiple of 512 bytes, below 8 EiB"
        )));
    }
    let new = NewFile::create(path, bytes)?;
    fill(path, new, async move |file: &File| {
        if preallocate {
            file.fallocate(0, bytes, 0).await.map_err(ImageError::system("reserve space for", path))?;
        }
        Ok(())
    })
}

/// Makes an image with these bytes at its start, for its owner alone (mode 0600).
///
/// # Errors
/// A `path` that exists, the system's refusal, a signal.
pub(super) fn create_with(path: &Path, bytes: Vec<u8>) -> Result<(), ImageError> {
    is_path(path)?;
    let new = NewFile::create(path, bytes.len() as u64)?;
    fill(path, new, async move |file: &File| {
        let (written, _) = file.write_all_at(bytes, 0).await;
        written.map_err(ImageError::system("write", path))
    })
}

/// Has `with` fill a new file, makes it durable, and gives it its name.
fn fill(
    path: &Path,
    new: NewFile,
    with: impl AsyncFnOnce(&File) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    let file = File::from_std(new.handle()?);
    run(path, async move {
        let fill = async {
            with(&file).await?;
            file.sync_all().await.map_err(ImageError::system("flush", path))
        };
        unless_interrupted(fill)
            .await
            .map_err(ImageError::system("watch signals for", path))?
            .unwrap_or(Err(ImageError::Interrupted))
    })?;
    new.publish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn sparse_unless_asked() {
        let dir = tempfile::tempdir().unwrap();
        let (sparse, full) = (dir.path().join("sparse"), dir.path().join("full"));
        create(&sparse, Size(4 << 20), false).unwrap();
        create(&full, Size(4 << 20), true).unwrap();
        for path in [&sparse, &full] {
            let bytes = fs::read(path).unwrap();
            assert_eq!(bytes.len(), 4 << 20);
            assert!(bytes.iter().all(|byte| *byte == 0));
        }
        assert!(fs::metadata(&sparse).unwrap().blocks() * 512 < 1 << 20);
        assert!(fs::metadata(&full).unwrap().blocks() * 512 >= 4 << 20);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn nothing_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, "precious").unwrap();
        let error = create(&path, Size(512), false).unwrap_err();
        assert!(matches!(error, ImageError::Exists(_)), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let dangling = dir.path().join("link");
        std::os::unix::fs::symlink("nowhere", &dangling).unwrap();
        assert!(matches!(create(&dangling, Size(512), false), Err(ImageError::Exists(_))));
    }

    #[test]
    fn bad_sizes_and_places_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        for bytes in [0, 1, 511, 1000, u64::MAX, 1 << 63] {
            let error = create(&path, Size(bytes), false).unwrap_err();
            assert!(matches!(error, ImageError::Setting(_)), "{bytes}: {error}");
        }
        // More than the file system has room for.
        assert!(create(&path, Size(1 << 60), true).is_err());
        assert!(create(&dir.path().join("no/such"), Size(512), false).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
