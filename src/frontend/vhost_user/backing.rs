//! The file behind memory that a VMM shows us: only kinds that the kernel alone provides the pages of.
//!
//! A worker touches such memory, and waits for a page that is not there yet: on a disk, on a network, or for as long as
//! another process likes (FUSE). Memory on tmpfs, which a memfd is too, and on hugetlbfs is made on the spot.

#![forbid(unsafe_code)]

use rustix::fs::{FileType, fstat, fstatfs};
use std::io;
use std::os::fd::AsFd;

/// Of `linux/magic.h`.
const TMPFS: u32 = 0x0102_1994;
const HUGETLBFS: u32 = 0x9584_58f6;

/// Others by name, for messages.
const KNOWN: [(u32, &str); 9] = [
    (0x6573_5546, "FUSE"),
    (0xef53, "ext4"),
    (0x5846_5342, "XFS"),
    (0x9123_683e, "Btrfs"),
    (0x2fc1_2fc1, "ZFS"),
    (0x6969, "NFS"),
    (0x794c_7630, "overlayfs"),
    (0x8584_58f6, "ramfs"),
    (0xff53_4d42, "SMB"),
];

/// A file that guest memory may be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Bytes in one of its pages. What is mapped of it begins at a multiple of that, and where they are huge ones
    /// ends at one: the kernel unmaps and replaces nothing else.
    pub page: u64,
    /// Its pages are huge ones, of which there may be none left.
    pub huge: bool,
    /// Its length in bytes, for now.
    pub bytes: u64,
}

impl Backing {
    /// What a file is, if it may be used.
    ///
    /// # Errors
    /// `InvalidInput` with what it is instead, or the kernel's.
    pub fn of(file: impl AsFd) -> io::Result<Backing> {
        let refuse = |what: String| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        let stat = fstat(&file)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return refuse("it is not in a regular file".into());
        }
        let system = fstatfs(&file)?;
        // The number has 32 bits, and is sign-extended on some machines.
        let kind = system.f_type as u32;
        if kind != TMPFS && kind != HUGETLBFS {
            let known = KNOWN.iter().find(|(number, _)| *number == kind);
            let name =
                known.map_or_else(|| format!("a file system of type {kind:#x}"), |(_, name)| (*name).into());
            return refuse(format!("its file is on {name}: it has to be a memfd, or on tmpfs or hugetlbfs"));
        }
        let page = u64::try_from(system.f_bsize).unwrap_or(0);
        if !page.is_power_of_two() {
            return refuse(format!("its file has pages of {page} bytes"));
        }
        let bytes = u64::try_from(stat.st_size).unwrap_or(0);
        Ok(Backing { page, huge: kind == HUGETLBFS, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    #[test]
    fn memory_of_the_kernels_own() {
        let memfd = |flags| File::from(memfd_create(c"memory", MFdFlags::MFD_CLOEXEC | flags).unwrap());
        let file = memfd(MFdFlags::empty());
        file.set_len(12345).unwrap();
        let backing = Backing::of(&file).unwrap();
        assert_eq!((backing.huge, backing.bytes), (false, 12345));
        assert!((4096..=65536).contains(&backing.page));
        // Needs no huge page to be free.
        let file = memfd(MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB);
        file.set_len(4 << 20).unwrap();
        assert_eq!(Backing::of(&file).unwrap(), Backing { page: 2 << 20, huge: true, bytes: 4 << 20 });
    }

    #[test]
    fn anything_else_says_what_it_is() {
        let error = |file: &dyn AsFd| Backing::of(file.as_fd()).unwrap_err().to_string();
        let proc = File::open("/proc/self/status").unwrap();
        assert_eq!(
            error(&proc),
            "its file is on a file system of type 0x9fa0: it has to be a memfd, or on tmpfs or hugetlbfs"
        );
        for odd in [File::open("/proc").unwrap(), File::open("/dev/null").unwrap()] {
            assert_eq!(error(&odd), "it is not in a regular file");
        }
        assert_eq!(error(&UnixStream::pair().unwrap().0), "it is not in a regular file");
        // Where the build is, which is on a disk or on what looks like one.
        let disk = File::open(env!("CARGO_MANIFEST_PATH")).unwrap();
        if Backing::of(&disk).is_err() {
            assert!(error(&disk).starts_with("its file is on "), "{}", error(&disk));
        }
    }
}
