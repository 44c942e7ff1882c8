//! `ringblk image info`.

#![forbid(unsafe_code)]

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::extents::Extents;
use super::qcow2::header;
use super::store::{Reading, Store};
use super::{ImageError, is_path};
use crate::block::{Format, SECTOR, Size};
use crate::engine::file::format;
use crate::engine::qcow2::Header;

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
    /// What its header says, if it looks like qcow2 and is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qcow2: Option<Qcow2>,
    /// Only for files.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub layout: Option<Layout>,
}

/// [`Info::format`] of what looks like no other.
const RAW: &str = "raw";

/// Of what is served by the driver of that name.
const QCOW2: &str = "qcow2";

/// What the header of a qcow2 image says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Qcow2 {
    /// 2 or 3.
    pub version: u32,
    /// Of the disk.
    pub virtual_size_bytes: u64,
    /// Space is taken in such pieces.
    pub cluster_bytes: u64,
    /// Each 32nd of a cluster is mapped by itself.
    pub extended_l2: bool,
    /// Bits of a refcount.
    pub refcount_bits: u32,
    /// Of clusters that are compressed.
    pub compression: String,
    /// What it stands on, in its own words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_file: Option<String>,
    /// The format of that, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_format: Option<String>,
    /// Snapshots within it.
    pub internal_snapshots: u32,
    /// It was not closed as it should be.
    pub dirty: bool,
    /// Somebody found it damaged.
    pub corrupt: bool,
}

impl From<Header> for Qcow2 {
    fn from(header: Header) -> Qcow2 {
        Qcow2 {
            version: header.version,
            virtual_size_bytes: header.size,
            cluster_bytes: header.cluster(),
            extended_l2: header.extended_l2,
            refcount_bits: 1 << header.refcount_order,
            compression: header.compression.to_string(),
            backing_file: header.backing,
            backing_format: header.backing_format,
            internal_snapshots: header.snapshots,
            dirty: header.dirty,
            corrupt: header.corrupt,
        }
    }
}

impl fmt::Display for Qcow2 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = self.virtual_size_bytes;
        writeln!(f, "disk:       {} ({size} bytes)", Size(size).approx())?;
        let parts = if self.extended_l2 { ", in 32 parts each" } else { "" };
        writeln!(f, "clusters:   {}{parts}", Size(self.cluster_bytes))?;
        if let Some(name) = &self.backing_file {
            let format = self.backing_format.as_deref().unwrap_or("a format that is not said");
            // Anybody may have written these.
            writeln!(f, "stands on:  {} ({})", name.escape_debug(), format.escape_debug())?;
        }
        if self.internal_snapshots > 0 {
            writeln!(f, "snapshots:  {} within the image", self.internal_snapshots)?;
        }
        match (self.dirty, self.corrupt) {
            (false, false) => Ok(()),
            (true, false) => writeln!(f, "state:      not closed as it should be"),
            (_, true) => writeln!(f, "state:      marked as damaged"),
        }
    }
}

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
    let looks = format(&store.file);
    // One that only looks like it has none.
    let qcow2 = header(&store.file, path).ok().filter(|_| looks == Some(Format::Qcow2));
    let logical_block = store.logical_block().map_err(ImageError::system("find the block size of", path))?;
    Ok(Info {
        path: path.to_owned(),
        kind: store.kind,
        format: looks.as_ref().map_or_else(|| RAW.to_owned(), Format::to_string),
        qcow2: qcow2.map(Qcow2::from),
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
            QCOW2 => writeln!(f, "format:     qcow2")?,
            other => writeln!(f, "format:     {other}, which is not served or copied without format=raw")?,
        }
        if let Some(qcow2) = &self.qcow2 {
            write!(f, "{qcow2}")?;
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
