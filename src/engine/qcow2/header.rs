//! The header of a qcow2 image: what its first cluster says of the rest (QEMU's `docs/interop/qcow2.rst`, "Header").
//!
//! Bytes in, a checked value out: an image comes from anybody, so every number is looked at before
//! anything is made of it. What we do not know is refused by its name, never guessed.

#![forbid(unsafe_code)]

use crate::engine::file::read_up_to;
use std::fmt;
use std::fs::File;
use std::io;

/// `QFI\xfb`.
pub const MAGIC: [u8; 4] = [b'Q', b'F', b'I', 0xfb];

/// Bytes that are read to find a header: more than all its fields, extensions and the backing file's name take together as
/// far as we look at them, and no more than the smallest image has. Rounded up to a cluster by whoever reads.
const LOOK: usize = 64 << 10;

/// The largest L1 table in bytes, as QEMU has it (`QCOW_MAX_L1_SIZE`).
pub const MAX_L1_BYTES: u64 = 32 << 20;

/// The largest table of refcount blocks in bytes, likewise (`QCOW_MAX_REFTABLE_SIZE`).
pub const MAX_REFTABLE_BYTES: u64 = 8 << 20;

/// Longest name of a backing file (the format's own limit).
const MAX_BACKING_NAME: u32 = 1023;

/// Bytes of a version 2 header, and the least that a version 3 one has.
const V2_LEN: usize = 72;
const V3_LEN: usize = 104;

/// Where a version 3 header names a compression other than zlib.
const COMPRESSION_AT: usize = 104;

/// Incompatible features: who does not know one must not open the image.
mod incompatible {
    pub const DIRTY: u64 = 1;
    pub const CORRUPT: u64 = 1 << 1;
    pub const EXTERNAL_DATA: u64 = 1 << 2;
    pub const COMPRESSION: u64 = 1 << 3;
    pub const EXTENDED_L2: u64 = 1 << 4;
}

/// Header extensions.
mod extension {
    pub const END: u32 = 0;
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub const FEATURE_NAMES: u32 = 0x6803_f857;
}

/// What the clusters that are compressed are compressed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate, RFC 1951.
    Zlib,
    /// Zstandard, RFC 8878.
    Zstd,
}

/// What a header says, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// A cluster has `1 << cluster_bits` bytes: 9 to 21.
    pub cluster_bits: u32,
    /// Bytes of the disk.
    pub size: u64,
    /// Where the L1 table is; 0 where there is none.
    pub l1_offset: u64,
    /// Its entries.
    pub l1_entries: u32,
    /// Where the refcount table is.
    pub reftable_offset: u64,
    /// Clusters of it.
    pub reftable_clusters: u32,
    /// A refcount has `1 << refcount_order` bits: 0 to 6.
    pub refcount_order: u32,
    /// L2 entries have a bitmap of 32 parts (subclusters) of their cluster.
    pub extended_l2: bool,
    /// Of clusters that are compressed.
    pub compression: Compression,
    /// The image was not closed as it should be, and its refcounts may be wrong.
    pub dirty: bool,
    /// Somebody found it damaged.
    pub corrupt: bool,
    /// Features whose data is void once the image is changed by somebody who does not know them.
    pub autoclear: u64,
    /// Internal snapshots.
    pub snapshots: u32,
    /// The backing file's name, as it stands there.
    pub backing: Option<String>,
    /// Its format, where that is said.
    pub backing_format: Option<String>,
}

/// Why an image cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Another magic.
    #[error("is no qcow2 image")]
    Magic,
    /// It ends within its header.
    #[error("its header is cut off")]
    Short,
    /// A later one, or 1.
    #[error("is qcow version {0}, and we know 2 and 3")]
    Version(u32),
    /// Features that we do not have, by their names where the image tells them.
    #[error("needs what we do not have: {0}")]
    Features(String),
    /// A method of encryption.
    #[error("is encrypted, which we do not read")]
    Encrypted,
    /// A number that cannot be.
    #[error("{what} is {found}, {right}")]
    Value {
        /// Of what.
        what: &'static str,
        /// What stands there.
        found: u64,
        /// What could.
        right: &'static str,
    },
    /// No text.
    #[error("the name of its backing file is no text")]
    Name,
}

/// Reads big-endian numbers from bytes, of which there may be too few.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes(&self, at: usize, len: usize) -> Result<&[u8], HeaderError> {
        let end = at.checked_add(len).ok_or(HeaderError::Short)?;
        self.0.get(at..end).ok_or(HeaderError::Short)
    }

    fn u32(&self, at: usize) -> Result<u32, HeaderError> {
        let bytes = self.bytes(at, 4)?.try_into().map_err(|_| HeaderError::Short)?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn u64(&self, at: usize) -> Result<u64, HeaderError> {
        let bytes = self.bytes(at, 8)?.try_into().map_err(|_| HeaderError::Short)?;
        Ok(u64::from_be_bytes(bytes))
    }
}

impl Header {
    /// The header of an image in a file.
    ///
    /// # Errors
    /// The kernel's (outer), and what is wrong with the image (inner).
    pub fn read(file: &File) -> io::Result<Result<Header, HeaderError>> {
        let mut head = vec![0; LOOK];
        let there = read_up_to(file, &mut head, 0)?;
        Ok(Header::parse(&head[..there]))
    }

    /// Reads the header that an image begins with: its first [`LOOK`] bytes, or all there are.
    ///
    /// # Errors
    /// When it is none, or one of an image that we cannot use.
    pub fn parse(bytes: &[u8]) -> Result<Header, HeaderError> {
        let fields = Fields(bytes);
        if fields.bytes(0, 4)? != MAGIC {
            return Err(HeaderError::Magic);
        }
        let version = fields.u32(4)?;
        let len = match version {
            2 => V2_LEN,
            3 => fields.u32(100)? as usize,
            other => return Err(HeaderError::Version(other)),
        };
        let cluster_bits = fields.u32(20)?;
        in_range("cluster_bits", cluster_bits.into(), 9, 21, "not 9 to 21")?;
        if version == 3 && (len < V3_LEN || !len.is_multiple_of(8) || len > 1 << cluster_bits) {
            let right = "not a multiple of 8 from 104 to a cluster";
            return Err(HeaderError::Value { what: "its header's length", found: len as u64, right });
        }
        let (features, autoclear, refcount_order) = match version {
            2 => (0, 0, 4),
            _ => (fields.u64(72)?, fields.u64(88)?, fields.u32(96)?),
        };
        let (backing_format, names) = extensions(&fields, len, 1 << cluster_bits)?;
        let known = incompatible::DIRTY
            | incompatible::CORRUPT
            | incompatible::COMPRESSION
            | incompatible::EXTENDED_L2;
        if features & !known != 0 {
            return Err(HeaderError::Features(feature_names(features & !known, &names)));
        }
        if fields.u32(32)? != 0 {
            return Err(HeaderError::Encrypted);
        }
        let compression = match features & incompatible::COMPRESSION {
            0 => Compression::Zlib,
            _ => match fields.bytes(COMPRESSION_AT, 1)? {
                [1] if len > COMPRESSION_AT => Compression::Zstd,
                other => {
                    let right = "and we know zlib and 1, zstd";
                    return Err(HeaderError::Value {
                        what: "its compression",
                        found: other[0].into(),
                        right,
                    });
                }
            },
        };
        let header = Header {
            version,
            cluster_bits,
            size: fields.u64(24)?,
            l1_offset: fields.u64(40)?,
            l1_entries: fields.u32(36)?,
            reftable_offset: fields.u64(48)?,
            reftable_clusters: fields.u32(56)?,
            refcount_order,
            extended_l2: features & incompatible::EXTENDED_L2 != 0,
            compression,
            dirty: features & incompatible::DIRTY != 0,
            corrupt: features & incompatible::CORRUPT != 0,
            autoclear,
            snapshots: fields.u32(60)?,
            backing: backing(&fields)?,
            backing_format,
        };
        header.check()?;
        Ok(header)
    }

    /// Whether its numbers can be true.
    pub fn check(&self) -> Result<(), HeaderError> {
        in_range("its refcounts' order", self.refcount_order.into(), 0, 6, "not 0 to 6")?;
        if self.extended_l2 {
            // A part of 1/32 is to have a sector at least.
            in_range(
                "its cluster_bits with extended entries",
                self.cluster_bits.into(),
                14,
                21,
                "not 14 to 21",
            )?;
        }
        // What an i64 of bytes takes, as every disk.
        in_range("its size", self.size, 0, i64::MAX as u64, "more than a disk can have")?;
        let l1_bytes = u64::from(self.l1_entries) * 8;
        in_range("its L1 table in bytes", l1_bytes, 0, MAX_L1_BYTES, "more than 32 MiB")?;
        let entries = self.l1_entries_for(self.size);
        let right = "fewer entries than its size takes";
        in_range("its L1 table", self.l1_entries.into(), entries, u64::MAX, right)?;
        self.place("its L1 table", self.l1_offset, l1_bytes)?;
        let reftable = self.reftable_bytes();
        in_range("its refcount table in bytes", reftable, 0, MAX_REFTABLE_BYTES, "more than 8 MiB")?;
        self.place("its refcount table", self.reftable_offset, reftable)
    }

    /// A table is to begin with a cluster, behind the first one, and to end.
    fn place(&self, what: &'static str, offset: u64, len: u64) -> Result<(), HeaderError> {
        let aligned = offset.is_multiple_of(self.cluster());
        if len == 0 || aligned && offset != 0 && offset < (1 << 56) {
            return Ok(());
        }
        Err(HeaderError::Value { what, found: offset, right: "where it cannot be" })
    }

    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of the refcount table.
    pub fn reftable_bytes(&self) -> u64 {
        u64::from(self.reftable_clusters) << self.cluster_bits
    }

    /// Bytes of an L2 entry.
    pub fn l2_entry(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Entries in a L2 table, each of one cluster.
    pub fn l2_entries(&self) -> u64 {
        self.cluster() / self.l2_entry()
    }

    /// L1 entries that a disk of `size` bytes takes.
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.cluster() * self.l2_entries())
    }

    /// Bits of the unit that is mapped by itself: a cluster, or a 32nd of one.
    pub fn unit_bits(&self) -> u32 {
        if self.extended_l2 { self.cluster_bits - 5 } else { self.cluster_bits }
    }

    /// The bytes of an image's first cluster. For a header that we [checked](Self::parse) or made.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(512);
        let mut features = 0;
        for (is, bit) in [
            (self.dirty, incompatible::DIRTY),
            (self.corrupt, incompatible::CORRUPT),
            (self.compression == Compression::Zstd, incompatible::COMPRESSION),
            (self.extended_l2, incompatible::EXTENDED_L2),
        ] {
            features |= if is { bit } else { 0 };
        }
        out.extend(MAGIC);
        out.extend(3u32.to_be_bytes());
        // The backing file's name: its place is known at the end.
        out.extend([0; 12]);
        out.extend(self.cluster_bits.to_be_bytes());
        out.extend(self.size.to_be_bytes());
        out.extend(0u32.to_be_bytes());
        out.extend(self.l1_entries.to_be_bytes());
        out.extend(self.l1_offset.to_be_bytes());
        out.extend(self.reftable_offset.to_be_bytes());
        out.extend(self.reftable_clusters.to_be_bytes());
        // No snapshots: their count and place.
        out.extend([0; 12]);
        out.extend(features.to_be_bytes());
        out.extend(0u64.to_be_bytes());
        out.extend(self.autoclear.to_be_bytes());
        out.extend(self.refcount_order.to_be_bytes());
        out.extend(112u32.to_be_bytes());
        out.push(u8::from(self.compression == Compression::Zstd));
        out.resize(112, 0);
        if let Some(format) = &self.backing_format {
            extend_with(&mut out, extension::BACKING_FORMAT, format.as_bytes());
        }
        extend_with(&mut out, extension::END, b"");
        if let Some(name) = &self.backing {
            let (at, len) = (out.len() as u64, name.len() as u32);
            out[8..16].copy_from_slice(&at.to_be_bytes());
            out[16..20].copy_from_slice(&len.to_be_bytes());
            out.extend(name.as_bytes());
        }
        out
    }
}

/// Writes one extension, filled up to 8 bytes.
fn extend_with(out: &mut Vec<u8>, kind: u32, data: &[u8]) {
    out.extend(kind.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out.resize(out.len().next_multiple_of(8), 0);
}

/// Refuses a number that is not from `from` up to and with `to`.
pub fn in_range(
    what: &'static str,
    found: u64,
    from: u64,
    to: u64,
    right: &'static str,
) -> Result<(), HeaderError> {
    if (from..=to).contains(&found) { Ok(()) } else { Err(HeaderError::Value { what, found, right }) }
}

/// The backing file's name.
fn backing(fields: &Fields<'_>) -> Result<Option<String>, HeaderError> {
    let (at, len) = (fields.u64(8)?, fields.u32(16)?);
    if at == 0 || len == 0 {
        return Ok(None);
    }
    in_range(
        "the length of its backing file's name",
        len.into(),
        1,
        MAX_BACKING_NAME.into(),
        "more than 1023",
    )?;
    let at = usize::try_from(at).map_err(|_| HeaderError::Short)?;
    let name = std::str::from_utf8(fields.bytes(at, len as usize)?).map_err(|_| HeaderError::Name)?;
    if name.contains('\0') { Err(HeaderError::Name) } else { Ok(Some(name.to_owned())) }
}

/// The backing file's format, and the table of names of features.
fn extensions(
    fields: &Fields<'_>,
    from: usize,
    cluster: usize,
) -> Result<(Option<String>, Vec<u8>), HeaderError> {
    let (mut at, mut format, mut names) = (from, None, Vec::new());
    // A version 2 header without any has zeroes there, or the name of its backing file: that is told apart by its place.
    let end = match fields.u64(8)? {
        0 => cluster,
        backing => cluster.min(usize::try_from(backing).unwrap_or(cluster)),
    };
    while at + 8 <= end {
        let (kind, len) = (fields.u32(at)?, fields.u32(at + 4)? as usize);
        let next = (at + 8).checked_add(len).and_then(|to| to.checked_next_multiple_of(8));
        let Some(next) = next.filter(|_| kind != extension::END) else { break };
        if at + 8 + len > end {
            let right = "more than there is room for";
            return Err(HeaderError::Value {
                what: "the length of a header extension",
                found: len as u64,
                right,
            });
        }
        let data = fields.bytes(at + 8, len)?;
        match kind {
            extension::BACKING_FORMAT => {
                format = Some(String::from_utf8_lossy(data).trim_end_matches('\0').to_owned());
            }
            extension::FEATURE_NAMES => names = data.to_vec(),
            _ => {}
        }
        at = next;
    }
    Ok((format, names))
}

/// What features are called, by the image's own table or by us.
fn feature_names(features: u64, table: &[u8]) -> String {
    const ENTRY: usize = 48;
    let named = |bit: u32| {
        let own = table.chunks_exact(ENTRY).find(|entry| entry[..2] == [0, bit as u8]);
        let text = own.map(|entry| String::from_utf8_lossy(&entry[2..]).trim_end_matches('\0').to_owned());
        match (1u64 << bit, text) {
            (incompatible::EXTERNAL_DATA, _) => "an external data file".to_owned(),
            // What a stranger wrote is shown without its control characters.
            (_, Some(text)) => text.escape_default().to_string(),
            _ => format!("feature {bit}"),
        }
    };
    (0..64).filter(|bit| features >> bit & 1 == 1).map(named).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn small() -> Header {
        Header {
            version: 3,
            cluster_bits: 16,
            size: 1 << 30,
            l1_offset: 3 << 16,
            l1_entries: 2,
            reftable_offset: 1 << 16,
            reftable_clusters: 1,
            refcount_order: 4,
            extended_l2: false,
            compression: Compression::Zlib,
            dirty: false,
            corrupt: false,
            autoclear: 0,
            snapshots: 0,
            backing: None,
            backing_format: None,
        }
    }

    /// A header followed by zeroes to the end of its cluster.
    fn image(header: &Header) -> Vec<u8> {
        let mut bytes = header.bytes();
        bytes.resize(header.cluster() as usize, 0);
        bytes
    }

    #[test]
    fn what_is_written_is_read() {
        let plain = small();
        let full = Header {
            backing: Some("golden.qcow2".into()),
            backing_format: Some("qcow2".into()),
            extended_l2: true,
            compression: Compression::Zstd,
            cluster_bits: 17,
            l1_offset: 3 << 17,
            reftable_offset: 1 << 17,
            ..small()
        };
        for header in [plain, full] {
            assert_eq!(Header::parse(&image(&header)), Ok(header));
        }
    }

    /// Each byte of a good header set to each of some values: an answer or an error, never a panic, and never more than the
    /// limits allow.
    #[test]
    fn no_byte_of_it_is_trusted() {
        let good = image(&Header { backing: Some("x".into()), ..small() });
        for at in 0..200 {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bytes = good.clone();
                bytes[at] = value;
                if let Ok(header) = Header::parse(&bytes) {
                    assert!(u64::from(header.l1_entries) * 8 <= MAX_L1_BYTES);
                    assert!(header.reftable_bytes() <= MAX_REFTABLE_BYTES);
                }
            }
        }
        for len in 0..200 {
            let _ = Header::parse(&good[..len]);
        }
    }

    #[test]
    fn what_we_do_not_have_is_refused_by_its_name() {
        let with = |bit: u8, names: &[u8]| {
            let mut bytes = image(&small());
            bytes[72 + 7 - usize::from(bit / 8)] |= 1 << (bit % 8);
            if !names.is_empty() {
                let mut table = Vec::new();
                extend_with(&mut table, extension::FEATURE_NAMES, names);
                bytes[112..112 + table.len()].copy_from_slice(&table);
            }
            Header::parse(&bytes).unwrap_err().to_string()
        };
        assert_eq!(with(2, b""), "needs what we do not have: an external data file");
        assert_eq!(with(9, b""), "needs what we do not have: feature 9");
        let mut entry = vec![0, 9];
        entry.extend(b"time\x1btravel");
        entry.resize(48, 0);
        assert_eq!(with(9, &entry), "needs what we do not have: time\\u{1b}travel");
        let mut bytes = image(&small());
        bytes[35] = 2;
        assert_eq!(Header::parse(&bytes), Err(HeaderError::Encrypted));
        bytes[7] = 4;
        assert_eq!(Header::parse(&bytes), Err(HeaderError::Version(4)));
        assert_eq!(Header::parse(b"QFI"), Err(HeaderError::Short));
        assert_eq!(Header::parse(&[0; 512]), Err(HeaderError::Magic));
    }

    #[test]
    fn a_first_table_that_does_not_cover_the_disk_is_refused() {
        let short = Header { l1_entries: 1, ..small() };
        assert!(Header::parse(&image(&short)).unwrap_err().to_string().contains("L1 table is 1"));
        let odd = Header { l1_offset: 5, ..small() };
        assert!(Header::parse(&image(&odd)).unwrap_err().to_string().contains("where it cannot be"));
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), version in 0..5u8, bits in 0..24u8) {
            let mut bytes = bytes;
            for (at, byte) in MAGIC.into_iter().chain([0, 0, 0, version]).enumerate() {
                if let Some(place) = bytes.get_mut(at) { *place = byte; }
            }
            if let Some(place) = bytes.get_mut(23) { *place = bits; }
            let _ = Header::parse(&bytes);
        }
    }
}
