//! What a sector holds: who wrote it, where, and which write it was, so that any mix-up shows.

/// Bytes that a disk writes all or none of.
pub const SECTOR: usize = 512;

const MAGIC: u64 = 0x6b61_6f73_6b6c_6272;
const WORDS: usize = SECTOR / 8;

/// A written sector. The rest of it follows from these, so that bytes of any other write among them are seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Of the run: an image of another one is foreign.
    pub seed: u64,
    /// Where it was written.
    pub sector: u64,
    /// Which write it was; no two are alike.
    pub version: u64,
}

/// What was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing but zeroes.
    Zeroes,
    /// A whole stamp.
    Stamp(Stamp),
    /// Part of one or of several, or none.
    Torn,
}

impl Stamp {
    fn words(self) -> [u64; WORDS] {
        let mut words = [MAGIC; WORDS];
        words[1..4].copy_from_slice(&[self.seed, self.sector, self.version]);
        let mut state = self.seed ^ self.sector.rotate_left(40) ^ self.version.rotate_left(20) ^ MAGIC;
        for word in &mut words[4..] {
            state = (state ^ (state >> 29)).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
            *word = state;
        }
        words
    }

    /// Writes a sector. `bytes` is [`SECTOR`] long.
    pub fn write(self, bytes: &mut [u8]) {
        for (place, word) in bytes.chunks_exact_mut(8).zip(self.words()) {
            place.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// Sectors of one write, from `sector` on.
    pub fn write_all(seed: u64, sector: u64, version: u64, bytes: &mut [u8]) {
        for (place, bytes) in bytes.chunks_exact_mut(SECTOR).enumerate() {
            Stamp { seed, sector: sector + place as u64, version }.write(bytes);
        }
    }
}

impl Content {
    /// Reads a sector. `bytes` is [`SECTOR`] long.
    pub fn of(bytes: &[u8]) -> Content {
        if bytes.iter().all(|byte| *byte == 0) {
            return Content::Zeroes;
        }
        let mut words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
        let head: [u64; 4] = std::array::from_fn(|_| words.next().unwrap());
        let stamp = Stamp { seed: head[1], sector: head[2], version: head[3] };
        if head[0] == MAGIC && words.eq(stamp.words()[4..].iter().copied()) {
            Content::Stamp(stamp)
        } else {
            Content::Torn
        }
    }

    /// Reads sectors.
    pub fn of_all(bytes: &[u8]) -> Vec<Content> {
        bytes.chunks_exact(SECTOR).map(Content::of).collect()
    }
}
