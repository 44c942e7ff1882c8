//! Whole copies between real files.

#![forbid(unsafe_code)]

use super::*;
use crate::engine::file::{Access, try_take};
use proptest::prelude::*;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::PathBuf;

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        Place { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A sparse file with pieces of data in it.
    fn image(&self, name: &str, size: u64, data: &[(u64, &[u8])]) -> PathBuf {
        let path = self.path(name);
        let file = fs::File::create(&path).unwrap();
        file.set_len(size).unwrap();
        for (offset, bytes) in data {
            file.write_all_at(bytes, *offset).unwrap();
        }
        file.sync_all().unwrap();
        path
    }

    fn names(&self) -> usize {
        fs::read_dir(self.dir.path()).unwrap().count()
    }
}

fn with(source: &Path, destination: &Path, options: CopyOptions) -> Result<CopySummary, ImageError> {
    copy(source, destination, &options, Rc::new(()))
}

fn plain(source: &Path, destination: &Path) -> Result<CopySummary, ImageError> {
    with(source, destination, CopyOptions::default())
}

const FORCE: CopyOptions = CopyOptions { depth: 4, force: true, detect_zeroes: false, reading: READING };
const READING: Reading = Reading { force_share: false, raw: false };

#[test]
fn holes_and_content_are_kept() {
    let place = Place::new();
    let size = (64 << 20) + 4096;
    let source = place.image(
        "a",
        size,
        &[(1 << 20, &[1; 3 << 20]), ((32 << 20) - 5000, &[2; 10_000]), (size - 4096, &[3; 4096])],
    );
    let destination = place.path("b");
    let summary = plain(&source, &destination).unwrap();
    assert_eq!(summary.size, size);
    assert!(summary.written < 4 << 20, "{summary:?}");
    assert!(fs::read(&source).unwrap() == fs::read(&destination).unwrap());
    assert!(fs::metadata(&destination).unwrap().blocks() * 512 < 8 << 20);
    assert_eq!(place.names(), 2);
}

#[test]
fn odd_sizes() {
    let place = Place::new();
    for (index, size) in [0, 1, 511, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7].into_iter().enumerate()
    {
        let bytes: Vec<u8> = (0..size).map(|byte| (byte % 251) as u8 + 1).collect();
        let source = place.image(&format!("a{index}"), size as u64, &[(0, &bytes)]);
        let destination = place.path(&format!("b{index}"));
        let summary = plain(&source, &destination).unwrap();
        assert_eq!(summary.written, size as u64);
        assert!(fs::read(&destination).unwrap() == bytes, "{size}");
    }
}

#[test]
fn an_existing_destination_needs_force() {
    let place = Place::new();
    let source = place.image("a", 4096, &[(0, &[7; 4096])]);
    let destination = place.image("b", 10, &[(0, b"precious!!")]);
    let error = plain(&source, &destination).unwrap_err();
    assert!(matches!(error, ImageError::Exists(_)), "{error}");
    assert_eq!(fs::read(&destination).unwrap(), b"precious!!");
    with(&source, &destination, FORCE).unwrap();
    assert_eq!(fs::read(&destination).unwrap(), [7; 4096]);
    assert_eq!(place.names(), 2);
}

#[test]
fn the_source_is_never_the_destination() {
    let place = Place::new();
    let source = place.image("a", 4096, &[(0, &[7; 4096])]);
    let (hard, soft) = (place.path("hard"), place.path("soft"));
    fs::hard_link(&source, &hard).unwrap();
    symlink(&source, &soft).unwrap();
    for same in [&source, &hard, &soft] {
        let error = with(&source, same, FORCE).unwrap_err();
        assert!(matches!(error, ImageError::Same { .. }), "{error}");
    }
    assert_eq!(fs::read(&source).unwrap(), [7; 4096]);
}

#[test]
fn unsuitable_ends_are_refused_before_anything_is_made() {
    let place = Place::new();
    let source = place.image("a", 4096, &[]);
    let new = place.path("new");
    assert!(plain(&place.path("none"), &new).is_err());
    assert!(plain(place.dir.path(), &new).is_err());
    assert!(plain(Path::new("/dev/zero"), &new).is_err());
    assert!(with(&source, place.dir.path(), FORCE).is_err());
    assert!(with(&source, Path::new("/dev/null"), FORCE).is_err());
    assert!(plain(&source, &place.path("no/such")).is_err());
    let dangling = place.path("dangling");
    symlink("nowhere", &dangling).unwrap();
    assert!(with(&source, &dangling, FORCE).is_err());
    for depth in [0, CopyOptions::MAX_DEPTH + 1] {
        let options = CopyOptions { depth, ..FORCE };
        assert!(matches!(with(&source, &new, options), Err(ImageError::Setting(_))));
    }
    assert_eq!(place.names(), 2);
}

/// An image that somebody has: as a service or a virtual machine, or as a reader.
fn used(path: &Path, access: Access) -> fs::File {
    let file = fs::File::open(path).unwrap();
    assert_eq!(try_take(&file, access), Ok(true));
    file
}

#[test]
fn an_image_in_use_is_neither_replaced_nor_copied_torn() {
    let place = Place::new();
    let source = place.image("a", 4096, &[(0, &[7; 4096])]);
    let disk = place.image("b", 10, &[(0, b"precious!!")]);
    for access in [Access::Read, Access::Write] {
        let user = used(&disk, access);
        let error = with(&source, &disk, FORCE).unwrap_err();
        assert!(matches!(error, ImageError::InUse { .. }), "{access:?}: {error}");
        drop(user);
    }
    assert_eq!(fs::read(&disk).unwrap(), b"precious!!");
    let writer = used(&disk, Access::Write);
    let error = plain(&disk, &place.path("c")).unwrap_err();
    assert!(error.to_string().contains("--force-share"), "{error}");
    assert_eq!(place.names(), 2);
    let shared = CopyOptions { reading: Reading { force_share: true, raw: false }, ..FORCE };
    with(&disk, &place.path("c"), shared).unwrap();
    drop(writer);
    // Readers do not mind each other.
    let _reader = used(&disk, Access::Read);
    plain(&disk, &place.path("d")).unwrap();
}

/// Others learn while it goes on.
#[test]
fn both_ends_are_locked_meanwhile() {
    struct Look(PathBuf, PathBuf);
    impl Progress for Look {
        fn begin(&self, _: u64) {
            let access = |path, access| try_take(&fs::File::open(path).unwrap(), access).unwrap();
            assert!(access(&self.0, Access::Read) && !access(&self.0, Access::Write), "the source is read");
            assert!(!access(&self.1, Access::Read), "the destination is to go");
        }
        fn advance(&self, _: u64) {}
    }

    let place = Place::new();
    let (source, disk) = (place.image("a", 4096, &[]), place.image("b", 10, &[]));
    copy(&source, &disk, &FORCE, Rc::new(Look(source.clone(), disk.clone()))).unwrap();
}

#[test]
fn another_format_is_copied_only_if_it_is_said_to_be_raw() {
    let place = Place::new();
    let source = place.image("a", 4096, &[(0, b"QFI\xfb\0\0\0\x02")]);
    let error = plain(&source, &place.path("b")).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("qcow2") && text.contains("--format=raw") && place.names() == 1, "{text}");
    let raw = CopyOptions { reading: Reading { force_share: false, raw: true }, ..FORCE };
    with(&source, &place.path("b"), raw).unwrap();
    assert_eq!(fs::read(&source).unwrap(), fs::read(place.path("b")).unwrap());
}

#[test]
fn the_deepest_copy() {
    let place = Place::new();
    let bytes = vec![5; 20 << 20];
    let source = place.image("a", bytes.len() as u64, &[(0, &bytes)]);
    let options = CopyOptions { depth: CopyOptions::MAX_DEPTH, ..FORCE };
    with(&source, &place.path("b"), options).unwrap();
    assert!(fs::read(place.path("b")).unwrap() == bytes);
}

#[test]
fn a_source_that_shrinks_is_an_error_and_leaves_nothing() {
    struct Shrink(PathBuf);
    impl Progress for Shrink {
        fn begin(&self, _: u64) {
            fs::OpenOptions::new().write(true).open(&self.0).unwrap().set_len(512).unwrap();
        }
        fn advance(&self, _: u64) {}
    }

    let place = Place::new();
    let source = place.image("a", 8 << 20, &[(0, &[1; 8 << 20])]);
    let progress = Rc::new(Shrink(source.clone()));
    let error = copy(&source, &place.path("b"), &CopyOptions::default(), progress).unwrap_err();
    assert!(matches!(error, ImageError::Unsuitable { .. }), "{error}");
    assert_eq!(place.names(), 1);
}

#[test]
fn progress_adds_up_to_the_whole() {
    #[derive(Default)]
    struct Count(Cell<u64>, Cell<u64>);
    impl Progress for Count {
        fn begin(&self, total: u64) {
            self.0.set(total);
        }
        fn advance(&self, bytes: u64) {
            self.1.set(self.1.get() + bytes);
        }
    }

    let place = Place::new();
    let source = place.image("a", (3 << 30) + 100, &[(2 << 30, &[1; 3 << 20])]);
    let count = Rc::new(Count::default());
    copy(&source, &place.path("b"), &CopyOptions::default(), Rc::clone(&count) as _).unwrap();
    assert_eq!((count.0.get(), count.1.get()), ((3 << 30) + 100, (3 << 30) + 100));
}

#[test]
fn zeroes_become_holes_when_asked() {
    let place = Place::new();
    let mut bytes = vec![0; 8 << 20];
    bytes[3 << 20] = 1;
    let source = place.image("a", bytes.len() as u64, &[(0, &bytes)]);
    let options = CopyOptions { detect_zeroes: true, ..FORCE };
    let summary = with(&source, &place.path("b"), options).unwrap();
    assert_eq!(summary.written, 64 << 10);
    assert!(fs::read(place.path("b")).unwrap() == bytes);
    assert_eq!(plain(&source, &place.path("c")).unwrap().written, 8 << 20);
}

#[test]
fn a_summary_for_people() {
    let summary = CopySummary { size: 10 << 30, written: 1 << 30, elapsed: Duration::from_secs(4) };
    assert_eq!(summary.to_string(), "copied 10.0 GiB (1.00 GiB written) in 4.00 s, 256 MiB/s");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn any_layout_is_copied(
        size in 0u64..6_000_000,
        pieces in prop::collection::vec((0u64..6_000_000, 1usize..300_000, any::<u8>()), 0..6),
        depth in 1usize..8,
        detect_zeroes: bool,
    ) {
        let place = Place::new();
        let source = place.image("a", size, &[]);
        let file = fs::OpenOptions::new().write(true).open(&source).unwrap();
        for (offset, length, byte) in pieces {
            let length = length.min(size.saturating_sub(offset) as usize);
            file.write_all_at(&vec![byte; length], offset).unwrap();
        }
        let options = CopyOptions { depth, force: false, detect_zeroes, reading: READING };
        with(&source, &place.path("b"), options).unwrap();
        prop_assert!(fs::read(&source).unwrap() == fs::read(place.path("b")).unwrap());
    }
}
