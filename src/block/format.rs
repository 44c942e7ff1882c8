//! Images in other formats than raw, told by what their makers begin them with.

#![forbid(unsafe_code)]

use std::fmt;

/// A format for the disk of a virtual machine that wraps its contents. Its bytes are no disk.
///
/// What a guest may itself put at the start of a disk (a partition table, a file system, LUKS) is not among them. The
/// signs are those that QEMU's drivers look for (`bdrv_probe` of each in its `block/`), and the formats' descriptions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// QEMU's, version 1.
    Qcow,
    /// QEMU's, versions 2 and 3.
    Qcow2,
    /// QEMU's, of 2010.
    Qed,
    /// VMware's: an extent, or the text that describes extents.
    Vmdk,
    /// VirtualBox's.
    Vdi,
    /// Hyper-V's.
    Vhdx,
    /// Virtual PC's and Azure's, of fixed size too.
    Vhd,
    /// Parallels'.
    Parallels,
    /// Bochs'.
    Bochs,
}

impl Format {
    /// As much of an image as is looked at, from its start and from its end, in bytes.
    pub const LOOK: usize = 512;

    /// The format of an image that begins with `head` and ends with `tail`, each [`LOOK`](Self::LOOK) bytes or all that
    /// there is; `None` for one that is raw, as far as can be told.
    pub fn detect(head: &[u8], tail: &[u8]) -> Option<Format> {
        let word = |at: usize| head.get(at..at + 4);
        let starts = |magic: &[u8]| head.starts_with(magic);
        let format = match word(0) {
            Some(b"QFI\xfb") if word(4) == Some(&[0, 0, 0, 1]) => Format::Qcow,
            Some(b"QFI\xfb") => Format::Qcow2,
            Some(b"QED\0") => Format::Qed,
            // Sparse extents of version 4, and of version 3 and ESX.
            Some(b"KDMV" | b"VMDK" | b"COWD") => Format::Vmdk,
            // On disk little-endian, behind 64 bytes of text.
            _ if word(64) == Some(&[0x7f, 0x10, 0xda, 0xbe]) => Format::Vdi,
            _ if starts(b"vhdxfile") => Format::Vhdx,
            // One that grows has its footer's copy at the start, one of fixed size the footer alone.
            _ if starts(b"conectix") || tail.starts_with(b"conectix") => Format::Vhd,
            _ if starts(b"WithoutFreeSpace") || starts(b"WithouFreSpacExt") => Format::Parallels,
            _ if starts(b"Bochs Virtual HD Image") => Format::Bochs,
            _ if describes_extents(head) => Format::Vmdk,
            _ => return None,
        };
        Some(format)
    }
}

/// Whether it is the text file of a VMDK: comments and empty lines, one of them its title.
fn describes_extents(head: &[u8]) -> bool {
    let mut lines = head.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    lines.find(|line| !line.is_empty()).is_some_and(|first| {
        first.starts_with(b"#") && first[1..].trim_ascii().eq_ignore_ascii_case(b"disk descriptorfile")
    })
}

/// As QEMU spells them, but for `vhd`, which is `vpc` there.
impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Qcow => "qcow",
            Format::Qcow2 => "qcow2",
            Format::Qed => "qed",
            Format::Vmdk => "vmdk",
            Format::Vdi => "vdi",
            Format::Vhdx => "vhdx",
            Format::Vhd => "vhd",
            Format::Parallels => "parallels",
            Format::Bochs => "bochs",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(offset: usize, magic: &[u8]) -> Vec<u8> {
        let mut head = vec![0; Format::LOOK];
        head[offset..offset + magic.len()].copy_from_slice(magic);
        head
    }

    #[test]
    fn each_format_by_its_sign() {
        for (offset, magic, format) in [
            (0, &b"QFI\xfb\0\0\0\x01"[..], Format::Qcow),
            (0, b"QFI\xfb\0\0\0\x02", Format::Qcow2),
            (0, b"QFI\xfb\0\0\0\x03", Format::Qcow2),
            (0, b"QED\0", Format::Qed),
            (0, b"KDMV\x01\0\0\0", Format::Vmdk),
            (0, b"COWD", Format::Vmdk),
            (0, b"# Disk DescriptorFile\nversion=1\n", Format::Vmdk),
            (0, b"\r\n#  disk descriptorfile \r\n", Format::Vmdk),
            (64, b"\x7f\x10\xda\xbe", Format::Vdi),
            (0, b"vhdxfile", Format::Vhdx),
            (0, b"conectix", Format::Vhd),
            (0, b"WithoutFreeSpace", Format::Parallels),
            (0, b"WithouFreSpacExt", Format::Parallels),
            (0, b"Bochs Virtual HD Image", Format::Bochs),
        ] {
            assert_eq!(Format::detect(&at(offset, magic), &[0; 512]), Some(format), "{format}");
            let other = Format::detect(&at(offset + 1, magic), &[0; 512]);
            assert!(other.is_none(), "{format}: {other:?} somewhere else");
            let cut = &at(offset, magic)[..offset + 3];
            assert_eq!(Format::detect(cut, cut), None, "{format}: cut short");
        }
        assert_eq!(Format::detect(&[0; 512], &at(0, b"conectix")), Some(Format::Vhd));
    }

    /// What disks begin with.
    #[test]
    fn disks_are_raw() {
        for (offset, bytes) in [
            (0, &b"\xeb\x63\x90"[..]),
            (510, b"\x55\xaa"),
            (0, b"LUKS\xba\xbe\0\x02"),
            (0, b"XFSB"),
            (0, b"#!/bin/sh\n# Disk DescriptorFile\n"),
            (3, b"NTFS    "),
            (0, b"LABELONE"),
        ] {
            assert_eq!(Format::detect(&at(offset, bytes), &at(0, b"EFI PART")), None);
        }
        assert_eq!(Format::detect(&[], &[]), None);
    }
}
