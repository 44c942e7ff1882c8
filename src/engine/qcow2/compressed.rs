//! Compressed clusters: unpacked, and a few of them kept.

#![forbid(unsafe_code)]

use super::entry::Packed;
use super::header::Compression;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of unpacked clusters that are kept for an image, but for two of them in any case.
const KEPT: usize = 4 << 20;

/// Unpacked clusters of one image, the last used last.
pub struct Unpacked {
    compression: Compression,
    cluster: usize,
    kept: Mutex<Vec<(Packed, Arc<[u8]>)>>,
}

impl Unpacked {
    pub fn new(compression: Compression, cluster: u64) -> Unpacked {
        Unpacked { compression, cluster: cluster as usize, kept: Mutex::default() }
    }

    pub fn get(&self, packed: Packed) -> Option<Arc<[u8]>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|(key, _)| *key == packed)?;
        let found = kept.remove(at);
        let bytes = found.1.clone();
        kept.push(found);
        Some(bytes)
    }

    pub fn put(&self, packed: Packed, bytes: &Arc<[u8]>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let most = (KEPT / self.cluster).clamp(2, 64);
        if kept.len() >= most {
            kept.remove(0);
        }
        kept.push((packed, bytes.clone()));
    }

    /// Unpacks a cluster, wholly. What follows in `from` does not matter: its length is known to the sector alone.
    pub fn unpack(&self, from: &[u8]) -> Option<Arc<[u8]>> {
        let mut out = vec![0; self.cluster];
        match self.compression {
            Compression::Zlib => {
                let flags = inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
                let (_, _, written) =
                    decompress(&mut Box::<DecompressorOxide>::default(), from, &mut out, 0, flags);
                (written == self.cluster).then_some(())?;
            }
            Compression::Zstd => {
                let mut decoder = FrameDecoder::new();
                // A frame says how much memory it takes: no more than a few clusters, whatever it says.
                decoder.set_max_window_size(16 << 20);
                let mut stream = StreamingDecoder::new_with_decoder(from, decoder).ok()?;
                stream.read_exact(&mut out).ok()?;
            }
        }
        Some(out.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::sim::Random;
    use miniz_oxide::deflate::compress_to_vec;

    #[test]
    fn what_is_unpacked_is_a_whole_cluster_or_nothing() {
        let unpacked = Unpacked::new(Compression::Zlib, 4096);
        let bytes: Vec<u8> = Random(3).bytes(64).into_iter().cycle().take(4096).collect();
        let mut packed = compress_to_vec(&bytes, 6);
        packed.extend([0xff; 300]);
        assert_eq!(unpacked.unpack(&packed).as_deref(), Some(&*bytes), "with whatever follows");
        assert_eq!(unpacked.unpack(&packed[..40]), None);
        assert_eq!(unpacked.unpack(&compress_to_vec(&bytes[..4095], 6)), None, "too little");
        let bomb = compress_to_vec(&vec![0; 64 << 20], 6);
        assert_eq!(unpacked.unpack(&bomb).as_deref(), Some(&[0; 4096][..]), "no more than it has");
        assert_eq!(unpacked.unpack(&[]), None);
    }

    #[test]
    fn a_few_are_kept() {
        let unpacked = Unpacked::new(Compression::Zlib, 2 << 20);
        let key = |offset| Packed { offset, len: 512 };
        for offset in 0..3 {
            unpacked.put(key(offset), &Arc::from([offset as u8]));
        }
        assert!(unpacked.get(key(0)).is_none() && unpacked.get(key(1)).is_some());
        unpacked.put(key(3), &Arc::from([3]));
        assert!(unpacked.get(key(2)).is_none(), "the one that was used last before goes first");
        assert!(unpacked.get(key(1)).is_some());
    }
}
