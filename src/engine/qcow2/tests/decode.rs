//! The disk in an image, by the format's own words and as slowly as that is.

use crate::engine::qcow2::Header;
use crate::engine::qcow2::entry::{Entry, Layout, Place};

/// All bytes of the disk in `image`, over `base`. No compressed clusters.
pub fn disk(image: &[u8], base: &[u8]) -> Vec<u8> {
    let header = Header::parse(image).unwrap();
    let layout = Layout::of(&header);
    let word = |at: u64| {
        let bytes = image.get(at as usize..at as usize + 8);
        bytes.map_or(0, |bytes| u64::from_be_bytes(bytes.try_into().unwrap()))
    };
    let mut disk = vec![0; header.size as usize];
    for (number, sector) in disk.chunks_mut(512).enumerate() {
        let at = number as u64 * 512;
        let cluster = at / layout.cluster();
        let table = word(header.l1_offset + cluster / layout.entries() * 8) & 0x00ff_ffff_ffff_fe00;
        let entry = match table {
            0 => Entry::default(),
            table => {
                let at = table + cluster % layout.entries() * layout.words() as u64 * 8;
                Entry { word: word(at), bitmap: if layout.extended { word(at + 8) } else { 0 } }
            }
        };
        let within = at % layout.cluster();
        let from = match layout.place(entry, within).expect("an entry that can be") {
            Place::Zero => continue,
            Place::Below => base.get(at as usize..),
            Place::At(host) => image.get((host + within % layout.unit()) as usize..),
            Place::Packed { .. } => unreachable!("we pack nothing"),
        };
        let from = from.unwrap_or_default();
        let len = from.len().min(sector.len());
        sector[..len].copy_from_slice(&from[..len]);
    }
    disk
}
