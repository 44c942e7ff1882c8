//! Images that somebody has made up: an error, or some bytes, and nothing else.

use super::*;
use crate::block::Op;
use crate::engine::tests::model::once;
use crate::engine::tests::{mapping, request, transfer};
use crate::ring::Core;
use crate::ring::sim::{Faults, SimRing};
use std::rc::Rc;

/// What an image may grow to: more is no space.
const MOST: usize = 8 << 20;

/// Numbers that somebody might try.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        Just(0),
        Just(u64::MAX),
        (0..64u32).prop_map(|bit| 1 << bit),
        (0..64u64, any::<bool>()).prop_map(|(cluster, own)| cluster << 9 | u64::from(own) << 63),
        (0..16u64).prop_map(|cluster| cluster << 14 | 1 << 63),
        // A compressed cluster.
        any::<u64>().prop_map(|word| word & 0x0fff_ffff | 1 << 62),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn a_made_up_image_is_an_error_or_a_disk(
        kind in kind(96 * 512),
        base in base(),
        crowded: bool,
        seed: u64,
        words in prop::collection::vec((0..1u16 << 12, word()), 1..6),
        fields in prop::collection::vec((0..120usize, any::<u8>()), 0..3),
        ops in prop::collection::vec((0..4u8, 0..88u64), 1..12),
        zstd: bool,
    ) {
        let made = Made::new(&kind, base, crowded);
        let memory = mapping(8 * 512);
        let run = |ops: &[(u8, u64)], volume: &Volume| {
            let core = Core::new(SimRing::new(seed, Faults::default()));
            core.ring().let_grow(MOST);
            let channel = Rc::new(volume.attach(&core, false));
            for (op, sector) in ops {
                let _ = match op {
                    0 => once(&core, &channel, transfer(Op::Read, *sector, memory)),
                    1 => once(&core, &channel, transfer(Op::Write, *sector, memory)),
                    2 => once(&core, &channel, request(Op::WriteZeroes, *sector, 8)),
                    _ => once(&core, &channel, request(Op::Discard, *sector, 8)),
                };
                let _ = once(&core, &channel, request(Op::Flush, 0, 0));
            }
            core.ring().contents().unwrap()
        };
        // One with something in it.
        let mut image = run(&[(1, 0), (1, 20), (1, 60), (3, 16)], &made.open());
        let tables = image.len().min(16 << 14) / 8;
        for (at, word) in words {
            let at = usize::from(at) % tables * 8;
            image[at..at + 8].copy_from_slice(&word.to_be_bytes());
        }
        for (at, byte) in fields {
            image[at] = byte;
        }
        if zstd && image.len() > 105 {
            (image[79], image[104]) = (image[79] | 8, 1);
        }
        std::fs::write(made.image.path(), &image).unwrap();
        let file = std::fs::File::open(made.image.path()).unwrap();
        if let Ok(report) = check(&file, false) {
            prop_assert!(report.errors.len() <= 100);
        }
        drop(file);
        for read_only in [true, false] {
            if let Ok(volume) = try_volume(made.image.path(), made.base.as_ref().map(NamedTempFile::path), read_only) {
                run(&ops, &volume);
                volume.close();
            }
        }
    }
}
