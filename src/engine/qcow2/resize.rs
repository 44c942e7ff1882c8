//! A larger disk, while it is served.

#![forbid(unsafe_code)]

use super::header::MAX_L1_BYTES;
use super::image::Image;
use super::owner::Owner;
use crate::engine::error::ResizeError;
use crate::engine::file::read_up_to;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// How long whoever counts clusters just now is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// What direct I/O may want of addresses, offsets and lengths.
const PIECE: usize = 4096;

impl Image {
    /// Whether the disk can have `bytes`, of `from` now, over a base of `below`.
    pub fn takes(&self, from: u64, bytes: u64, below: Option<u64>) -> Result<(), ResizeError> {
        if bytes < from {
            return Err(ResizeError::Fixed("a qcow2 image is not made smaller while it is served"));
        }
        if below.is_some_and(|below| below > from && bytes > from) {
            return Err(ResizeError::Fixed(
                "what it stands on is larger: what is there would come to light at its end",
            ));
        }
        if self.header.l1_entries_for(bytes) > self.l1_room().min(MAX_L1_BYTES / 8) {
            return Err(ResizeError::Fixed(
                "its L1 table has no room for more: stop it, and use qemu-img resize",
            ));
        }
        Ok(())
    }

    /// Makes the image's disk `bytes` large, durably, which it [`takes`](Self::takes). Waits for the store.
    pub fn set_size(&self, bytes: u64) -> io::Result<()> {
        let entries = self.header.l1_entries_for(bytes).max(self.header.l1_entries.into());
        // Whoever counts clusters may write the header, too.
        let _owner = Owner::wait(self, PATIENCE)?;
        let offset = self.header.l1_offset;
        let old = offset + u64::from(self.header.l1_entries) * 8;
        // What is behind the table's end was nobody's; and what came to be there since is durable before it is pointed at.
        let new = self.l1_bytes(self.header.l1_entries as usize..entries as usize);
        self.file.file().sync_data()?;
        self.write_piecewise(old..old + new.len() as u64, &new)?;
        self.file.file().sync_data()?;
        // Both are in the first sector, so there are both or none.
        let mut fields = bytes.to_be_bytes().to_vec();
        fields.extend(0u32.to_be_bytes());
        fields.extend((entries as u32).to_be_bytes());
        self.write_piecewise(24..40, &fields)?;
        self.file.file().sync_data()
    }

    /// Writes bytes in whole pieces, with what is around them.
    fn write_piecewise(&self, range: Range<u64>, bytes: &[u8]) -> io::Result<()> {
        let (piece, file) = (PIECE as u64, self.file.file());
        let mut memory = vec![0; 2 * PIECE];
        let skip = memory.as_ptr().align_offset(PIECE).min(PIECE);
        let whole = &mut memory[skip..skip + PIECE];
        let mut at = range.start;
        while at < range.end {
            let first = at / piece * piece;
            let end = range.end.min(first + piece);
            let there = read_up_to(file, whole, first)?;
            whole[there..].fill(0);
            let (from, to) = ((at - first) as usize, (end - first) as usize);
            let taken = (at - range.start) as usize;
            whole[from..to].copy_from_slice(&bytes[taken..taken + (to - from)]);
            // Not past the file's end, but for what has come.
            let len = if self.file.is_direct() { PIECE } else { there.max(to) };
            file.write_all_at(&whole[..len], first)?;
            at = end;
        }
        Ok(())
    }
}
