//! Images against a byte array: over the simulated ring, whose faults and power cuts they must survive, and beside QEMU's tools.

mod decode;
mod hostile;
mod power;

use super::check::{Report, check};
use super::create::NewImage;
use super::refcounts::Refcounts;
use super::{Header, Qcow2Config};
use crate::block::Size;
use crate::engine::config::{FileConfig, ImageFormat, PolicyConfig, TopologyConfig, VolumeConfig};
use crate::engine::{OpenError, Opener, Volume};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;
use tempfile::NamedTempFile;

/// An image of some kind, of a disk with `size` bytes.
pub fn kind(size: u64) -> impl Strategy<Value = NewImage> {
    let plain = (9..=13u32, 0..=6u32).prop_map(|(bits, order)| (bits, order, false));
    let extended = (14..=15u32, 3..=6u32).prop_map(|(bits, order)| (bits, order, true));
    prop_oneof![3 => plain, 2 => extended].prop_map(move |(cluster_bits, refcount_order, extended_l2)| {
        NewImage { size, cluster_bits, refcount_order, extended_l2, ..NewImage::default() }
    })
}

/// What an image stands on, and how much of its disk that has.
pub fn base() -> impl Strategy<Value = Option<u8>> {
    prop_oneof![1 => Just(None), 2 => (1..=120u8).prop_map(Some)]
}

/// A new image in a file of its own, and over a base of `base` percent of its size, with some bytes in it.
pub struct Made {
    pub image: NamedTempFile,
    pub base: Option<NamedTempFile>,
    /// What the disk reads.
    pub bytes: Vec<u8>,
}

impl Made {
    /// `crowded`: all clusters that its refcount table can count are counted already, but for a few.
    pub fn new(kind: &NewImage, base: Option<u8>, crowded: bool) -> Made {
        let mut bytes = vec![0; kind.size as usize];
        let base = base.map(|percent| {
            let file = NamedTempFile::new_in("/tmp").unwrap();
            let len = (kind.size * u64::from(percent) / 100).next_multiple_of(512) as usize;
            let below = crate::ring::sim::Random(kind.size).bytes(len);
            let seen = len.min(bytes.len());
            bytes[..seen].copy_from_slice(&below[..seen]);
            std::fs::write(file.path(), &below).unwrap();
            file
        });
        let backing = base.as_ref().map(|_| ("base.raw".to_owned(), "raw".to_owned()));
        let mut new = NewImage { backing, ..kind.clone() }.bytes().unwrap();
        if crowded {
            crowd(&mut new);
        }
        let image = NamedTempFile::new_in("/tmp").unwrap();
        std::fs::write(image.path(), new).unwrap();
        Made { image, base, bytes }
    }

    /// Its volume.
    pub fn open(&self) -> Volume {
        volume(self.image.path(), self.base.as_ref().map(NamedTempFile::path))
    }

    /// What the disk reads of an image with these bytes.
    pub fn disk(&self, image: &[u8]) -> Vec<u8> {
        let base = self.base.as_ref().map(|base| std::fs::read(base.path()).unwrap());
        decode::disk(image, base.as_deref().unwrap_or_default())
    }
}

/// Counts everything up to the last few clusters of what the refcount table of a new image can count, as leaked.
fn crowd(image: &mut Vec<u8>) {
    let header = Header::parse(image).unwrap();
    let cluster = header.cluster();
    let mut counts = Refcounts::new(&header, Vec::new(), None);
    let (per_block, entries) = (counts.per_block(), header.reftable_bytes() / 8);
    if entries * per_block * cluster > 4 << 20 {
        return;
    }
    image.resize((entries * per_block * cluster) as usize, 0);
    let put = |image: &mut Vec<u8>, at: u64, bytes: &[u8]| {
        image[at as usize..][..bytes.len()].copy_from_slice(bytes)
    };
    for index in 0..entries {
        let at = header.reftable_offset + index * 8;
        let there = u64::from_be_bytes(image[at as usize..][..8].try_into().unwrap());
        let block = if there == 0 { index * per_block * cluster } else { there };
        put(image, at, &block.to_be_bytes());
        counts.insert(0, vec![0; cluster as usize]);
        let few = if index + 1 == entries { 9 } else { 0 };
        (0..per_block - few).for_each(|cluster| counts.set(cluster, 1));
        put(image, block, counts.block(0).unwrap());
    }
}

/// An image's volume, over a raw file that is only read.
pub fn volume(image: &Path, base: Option<&Path>) -> Volume {
    try_volume(image, base, false).unwrap()
}

/// The same, where it may be none.
pub fn try_volume(image: &Path, base: Option<&Path>, read_only: bool) -> Result<Volume, OpenError> {
    let raw = |path: &Path| {
        VolumeConfig::File(FileConfig {
            path: path.into(),
            direct: false,
            read_only: true,
            lock: true,
            format: Some(ImageFormat::Raw),
            block_size: None,
        })
    };
    let top = Qcow2Config {
        path: image.into(),
        base: base.map(|_| "base".to_owned()),
        direct: false,
        read_only,
        lock: true,
        // The least that there is: one set.
        cache: Some(Size(1)),
    };
    let mut volumes = BTreeMap::from([("top".to_owned(), VolumeConfig::Qcow2(top))]);
    volumes.extend(base.map(|base| ("base".to_owned(), raw(base))));
    let opener = Opener::new("top", &volumes, PolicyConfig::default(), TopologyConfig::default());
    opener.unwrap().open(Duration::MAX)
}

/// Looks through an image with these bytes.
pub fn look_through(image: &[u8]) -> Report {
    let file = tempfile::tempfile().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, image, 0).unwrap();
    check(&file, false).unwrap()
}
