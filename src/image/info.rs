//! `ringblk image info`.

#![forbid(unsafe_code)]

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::extents::Extents;
use super::store::{Reading, Store};
use super::{ImageError, is_path};
use crate::block::{Format, SECTOR, Size};
use crate::engine::file::format;

pub use super::store::Kind;

/// What can be told about an image without serving it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Info {
    /// As it was given.
    pub path: PathBuf,
    /// Where it is kept.
    pub kind: Kind,
    /// `raw`, or the format that it looks like.
    pub format: String,
    /// Capacity, if it is raw; bytes of the file or device in any case.
    pub size_bytes: u64,
    /// Whether the size is whole sectors of 512 bytes; what is over is not served.
    pub sector_aligned: bool,
    /// Whether the size is whole blocks of 4096 bytes.
    pub aligned_4k: bool,
    /// Logical block of a block device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logical_block: Option<u32>,
    /// Only for files.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub layout: Option<Layout>,
}

/// [`Info::format`] of what looks like no other.
const RAW: &str = "raw";

/// How a file is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Layout {
    /// Space taken on disk.
    pub allocated_bytes: u64,
    /// Bytes in holes, which read as zeroes and take no space.
    pub hole_bytes: u64,
    /// Runs of data.
    pub data_extents: u64,
    /// Holes between, before or after them.
    pub holes: u64,
}

/// Looks at a file or a block device.
///
/// # Errors
/// Anything else at that path, an image that somebody writes (without `force_share`), or the system's refusal.
pub fn info(path: &Path, force_share: bool) -> Result<Info, ImageError> {
    is_path(path)?;
    let store = Store::open_to_look(path, Reading { force_share, raw: true })?;
    let logical_block = store.logical_block().map_err(ImageError::system("find the block size of", path))?;
    Ok(Info {
        path: path.to_owned(),
        kind: store.kind,
        format: format(&store.file).as_ref().map_or_else(|| RAW.to_owned(), Format::to_string),
        size_bytes: store.size,
        sector_aligned: store.size.is_multiple_of(SECTOR),
        aligned_4k: store.size.is_multiple_of(4096),
        logical_block,
        layout: match store.kind {
            Kind::File => Some(layout(store)?),
            Kind::BlockDevice => None,
        },
    })
}

fn layout(store: Store) -> Result<Layout, ImageError> {
    let path = store.path;
    let mut layout = Layout {
        // stat(2) counts in 512 bytes whatever the file system's block is.
        allocated_bytes: store.metadata.blocks() * 512,
        ..Layout::default()
    };
    for extent in Extents::new(Some(store.file), store.size) {
        let extent = extent.map_err(ImageError::system("find the holes of", &path))?;
        if extent.data {
            layout.data_extents += 1;
        } else {
            layout.holes += 1;
            layout.hole_bytes += extent.end - extent.start;
        }
    }
    Ok(layout)
}

impl fmt::Display for Info {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = |count: u64| format!("{} ({count} bytes)", Size(count).approx());
        writeln!(f, "image:      {}", self.path.display())?;
        match self.kind {
            Kind::File => writeln!(f, "kind:       regular file")?,
            Kind::BlockDevice => writeln!(f, "kind:       block device")?,
        }
        match &*self.format {
            RAW => writeln!(f, "format:     raw")?,
            other => writeln!(f, "format:     {other}, which is not served or copied without format=raw")?,
        }
        writeln!(f, "size:       {}", bytes(self.size_bytes))?;
        if let Some(layout) = &self.layout {
            writeln!(f, "allocated:  {}", bytes(layout.allocated_bytes))?;
            writeln!(f, "data:       {} extents", layout.data_extents)?;
            let (holes, size) = (layout.holes, Size(layout.hole_bytes).approx());
            writeln!(f, "holes:      {holes}, {size}")?;
        }
        if let Some(block) = self.logical_block {
            writeln!(f, "block size: {block}")?;
        }
        let alignment = match (self.aligned_4k, self.sector_aligned) {
            (true, _) => "whole blocks of 4096",
            (_, true) => "whole sectors of 512, not whole blocks of 4096",
            _ => "not whole sectors of 512: the tail is not served",
        };
        writeln!(f, "alignment:  {alignment}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_sparse_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img");
        let file = File::create(&path).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(&[1; 1 << 20], 2 << 20).unwrap();
        file.sync_all().unwrap();
        let found = info(&path, false).unwrap();
        let layout = found.layout.unwrap();
        assert_eq!((layout.data_extents, layout.holes), (1, 2));
        assert_eq!(layout.hole_bytes, 7 << 20);
        assert!(layout.allocated_bytes >= 1 << 20 && layout.allocated_bytes < 8 << 20);
        let json = serde_json::to_value(&found).unwrap();
        assert_eq!(json["kind"], "file");
        assert_eq!(json["format"], "raw");
        assert_eq!(json["size_bytes"], 8 << 20);
        assert_eq!(json["holes"], 2);
        assert!(found.to_string().contains("8.00 MiB (8388608 bytes)"), "{found}");
    }

    #[test]
    fn the_format_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img");
        std::fs::write(&path, b"vhdxfile\0").unwrap();
        let found = info(&path, false).unwrap();
        assert_eq!((&*found.format, found.size_bytes), ("vhdx", 9));
        assert!(found.to_string().contains("format:     vhdx, "), "{found}");
    }

    #[test]
    fn an_export_is_no_file() {
        for uri in ["nbd://h/x", "NBD+Unix:///?socket=/s"] {
            let error = info(Path::new(uri), false).unwrap_err().to_string();
            assert!(error.contains("only `image copy` takes"), "{error}");
        }
    }

    #[test]
    fn alignment_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img");
        for (size, sector, block) in
            [(0, true, true), (512, true, false), (8192, true, true), (700, false, false)]
        {
            File::create(&path).unwrap().set_len(size).unwrap();
            let found = info(&path, false).unwrap();
            assert_eq!((found.sector_aligned, found.aligned_4k), (sector, block), "{size}");
        }
    }
}
