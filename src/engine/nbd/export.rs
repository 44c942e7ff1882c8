//! What an export has to be when its server comes back, and what it is now.
//!
//! A server may be another one after each loss of a connection: restarted, replaced, configured anew. What it can do more
//! than before is harmless, and so is what nobody was promised. Each connection knows what its own server agreed to, and
//! requests keep to that; here is what they all must have in common, because the volume's clients were told of it once.
//!
//! The size is what all connections that are up offer. It becomes the volume's by a resize, which the service is told to
//! do: see [`Offer`].

#![forbid(unsafe_code)]

use super::handshake::Export;
use super::protocol::*;
use crate::block::Capacity;
use std::sync::mpsc::Sender;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// What was promised to the clients of a volume when it was opened.
#[derive(Clone, Debug)]
pub struct Promise {
    /// `NBD_FLAG_*` of the export as it was then.
    pub flags: u16,
    /// In bytes.
    pub logical_block: u32,
    /// The volume takes no writes, whoever wants it so.
    pub read_only: bool,
    /// As it is now.
    pub capacity: Capacity,
}

impl Promise {
    /// Whether it was promised.
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Why `export` cannot take the place of the one that was opened; nothing where it can. `several`: there is more than
    /// one connection.
    pub fn differs(&self, export: &Export, several: bool) -> Vec<String> {
        let lacks = |flag| self.has(flag) && export.flags & flag == 0;
        let (capacity, block) = (self.capacity.bytes(), self.logical_block);
        let mut differs = Vec::new();
        if export.size < capacity {
            differs.push(format!("it has {} bytes, and {capacity} are served", export.size));
        }
        if !self.read_only {
            if export.flags & NBD_FLAG_READ_ONLY != 0 {
                differs.push("it is read-only now".into());
            }
            if lacks(NBD_FLAG_SEND_FLUSH) {
                differs.push("it cannot flush any more".into());
            }
            if lacks(NBD_FLAG_SEND_TRIM) {
                differs.push("it cannot discard any more".into());
            }
            if several && lacks(NBD_FLAG_CAN_MULTI_CONN) {
                differs.push(
                    "its connections are not coherent any more (multi-conn), and there are several".into(),
                );
            }
        }
        if export.blocks.minimum > block {
            differs.push(format!(
                "its smallest block has {} bytes, and {block} are served",
                export.blocks.minimum
            ));
        }
        if export.blocks.maximum < block {
            differs
                .push(format!("it takes {} bytes at once, and a block has {block}", export.blocks.maximum));
        }
        differs
    }
}

/// The size that the server offers.
#[derive(Debug, Default)]
pub struct Offer {
    /// Of each connection that is up, in bytes.
    sizes: Mutex<Vec<u64>>,
    /// Who is told when there is more than is served, and the volume's name.
    tell: OnceLock<(Sender<String>, String)>,
}

impl Offer {
    /// A connection is up.
    pub fn add(&self, size: u64, promise: &Promise) {
        self.sizes().push(size);
        self.look(promise);
    }

    /// It is not any more.
    pub fn remove(&self, size: u64, promise: &Promise) {
        let mut sizes = self.sizes();
        if let Some(index) = sizes.iter().position(|other| *other == size) {
            sizes.swap_remove(index);
        }
        drop(sizes);
        self.look(promise);
    }

    /// Bytes that every connection offers; `None` while there is none.
    pub fn size(&self) -> Option<u64> {
        self.sizes().iter().min().copied()
    }

    /// Has `to` told the volume's name whenever there is more than is served.
    pub fn tell(&self, to: Sender<String>, volume: &str, promise: &Promise) {
        let _ = self.tell.set((to, volume.to_owned()));
        self.look(promise);
    }

    fn look(&self, promise: &Promise) {
        let block = u64::from(promise.logical_block);
        if let (Some(size), Some((to, name))) = (self.size(), self.tell.get())
            && size & !(block - 1) > promise.capacity.bytes()
        {
            // It fails when the service is about to end.
            let _ = to.send(name.clone());
        }
    }

    fn sizes(&self) -> MutexGuard<'_, Vec<u64>> {
        // Each change is one push or one removal.
        self.sizes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::super::handshake::Blocks;
    use super::*;
    use std::sync::mpsc::channel;

    const ALL: u16 = NBD_FLAG_HAS_FLAGS
        | NBD_FLAG_SEND_FLUSH
        | NBD_FLAG_SEND_FUA
        | NBD_FLAG_SEND_TRIM
        | NBD_FLAG_SEND_WRITE_ZEROES
        | NBD_FLAG_CAN_MULTI_CONN;

    fn promise(flags: u16, read_only: bool) -> Promise {
        Promise { flags, logical_block: 512, read_only, capacity: Capacity::new(2048) }
    }

    fn export(size: u64, flags: u16) -> Export {
        Export { size, flags, blocks: Blocks::default() }
    }

    #[test]
    fn more_than_before_is_taken() {
        for flags in [NBD_FLAG_HAS_FLAGS, NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH, ALL] {
            for size in [1 << 20, (1 << 20) + 1, 1 << 40] {
                let differs = promise(flags, false).differs(&export(size, ALL | 0x8000), true);
                assert!(differs.is_empty(), "{differs:?}");
            }
        }
        // Nobody was promised these.
        let poorer = ALL & !NBD_FLAG_SEND_FUA & !NBD_FLAG_SEND_WRITE_ZEROES;
        assert!(promise(ALL, false).differs(&export(1 << 20, poorer), true).is_empty());
        assert!(promise(ALL, true).differs(&export(1 << 20, NBD_FLAG_READ_ONLY), true).is_empty());
        for blocks in [(1, 4096, 512), (512, 1 << 20, u32::MAX)] {
            let (minimum, preferred, maximum) = blocks;
            let export = Export { blocks: Blocks { minimum, preferred, maximum }, ..export(1 << 20, ALL) };
            assert!(promise(ALL, false).differs(&export, true).is_empty());
        }
    }

    #[test]
    fn what_was_promised_and_is_gone_is_named() {
        let told = |export: Export, several: bool| promise(ALL, false).differs(&export, several).join("; ");
        assert!(told(export((1 << 20) - 1, ALL), true).contains("1048575 bytes, and 1048576 are served"));
        assert!(told(export(1 << 20, ALL | NBD_FLAG_READ_ONLY), true).contains("read-only"));
        for (flag, word) in [(NBD_FLAG_SEND_FLUSH, "flush"), (NBD_FLAG_SEND_TRIM, "discard")] {
            assert!(told(export(1 << 20, ALL & !flag), false).contains(word));
        }
        let single = export(1 << 20, ALL & !NBD_FLAG_CAN_MULTI_CONN);
        assert!(told(single.clone(), true).contains("multi-conn"));
        assert_eq!(told(single, false), "");
        let coarse = Blocks { minimum: 4096, preferred: 4096, maximum: 1 << 20 };
        assert!(
            told(Export { blocks: coarse, ..export(1 << 20, ALL) }, true).contains("4096 bytes, and 512")
        );
        let tiny = Blocks { minimum: 1, preferred: 1, maximum: 256 };
        assert!(told(Export { blocks: tiny, ..export(1 << 20, ALL) }, true).contains("256 bytes at once"));
        let all = told(export(0, NBD_FLAG_READ_ONLY), true);
        assert_eq!(all.matches("; ").count(), 4, "each of them: {all}");
    }

    #[test]
    fn growth_is_told_when_every_connection_has_it() {
        let (promise, offer) = (promise(ALL, false), Offer::default());
        let (to, told) = channel();
        offer.add(1 << 20, &promise);
        offer.tell(to, "far", &promise);
        offer.add(1 << 21, &promise);
        assert_eq!(offer.size(), Some(1 << 20));
        assert!(told.try_recv().is_err(), "a connection to the old export is left");
        offer.remove(1 << 20, &promise);
        assert_eq!((told.try_recv().as_deref(), offer.size()), (Ok("far"), Some(1 << 21)));
        promise.capacity.set(1 << 12);
        offer.add((1 << 21) + 511, &promise);
        assert!(told.try_recv().is_err(), "nothing new");
        offer.remove(1 << 21, &promise);
        assert!(told.try_recv().is_err(), "not a whole block");
        offer.remove((1 << 21) + 511, &promise);
        assert_eq!(offer.size(), None);
    }
}
