//! Exports of NBD servers as ends of a copy.

use super::{MIB, copy, copy_command, image, names, place, said};
use crate::common::eventually;
use crate::common::nbd::Server;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// A server of what is in memory, of 16 MiB.
pub fn exports() {
    let dir = place();
    let (source, back) = (dir.path().join("source"), dir.path().join("back"));
    image(&source, &vec![1; 3 << 20], 16 * MIB);
    let file = File::options().write(true).open(&source).unwrap();
    file.write_all_at(&[2; 5000], 9 << 20).unwrap();
    file.write_all_at(&[3; 512], (16 << 20) - 512).unwrap();
    for filters in [
        &[][..],
        &[
            "--filter=blocksize-policy",
            "blocksize-minimum=4096",
            "blocksize-preferred=4096",
            "blocksize-maximum=64K",
            "blocksize-error-policy=error",
        ],
    ] {
        let (one, two) = (Server::start(filters), Server::start(filters));
        let [one_uri, two_uri] = [&one, &two].map(|server| PathBuf::from(server.uri()));
        let (code, error) = copy(&[], &source, &one_uri);
        assert!(code == 1 && error.contains("already exists"), "{error}");
        for (from, to) in [(&source, &one_uri), (&one_uri, &two_uri), (&two_uri, &back)] {
            let (code, error) = copy(&["--force", "--depth", "40"], from, to);
            assert!(code == 0 && error.is_empty(), "{} -> {}: {code}: {error}", from.display(), to.display());
        }
        assert!(fs::read(&source).unwrap() == fs::read(&back).unwrap());
        assert!(one.find("Zero*count=").is_some() || !filters.is_empty(), "holes are not written");
        assert!(one.find("Flush").is_some(), "it ends with a flush");
        assert!(two.find("Write").is_some());
        fs::remove_file(&back).unwrap();
        // What was there is overwritten, with the holes.
        image(&source, &[4; 4096], 16 * MIB);
        assert_eq!(copy(&["--force"], &source, &one_uri).0, 0);
        assert_eq!(copy(&["--detect-zeroes"], &one_uri, &back).0, 0);
        assert!(fs::read(&source).unwrap() == fs::read(&back).unwrap());
        let found = fs::metadata(&back).unwrap();
        assert!(found.blocks() * 512 < MIB && found.mode() & 0o777 == 0o600, "{found:?}");
    }
}

/// Sizes that are no whole blocks, in all directions.
pub fn odd() {
    let dir = place();
    let (file, copied, small) =
        (dir.path().join("file"), dir.path().join("copied"), dir.path().join("small"));
    let policy = [
        "--filter=blocksize-policy",
        "blocksize-minimum=4096",
        "blocksize-preferred=4096",
        "blocksize-maximum=64K",
    ];
    for (size, filters) in [
        (513, &[][..]),
        (MIB as usize, &[]),
        (MIB as usize + 1, &[]),
        (3 * MIB as usize - 1, &[]),
        // The server puts up with it.
        (MIB as usize + 5000, &policy),
    ] {
        let bytes: Vec<u8> = (0..size).map(|byte| (byte % 251) as u8 + 1).collect();
        fs::write(&file, &bytes).unwrap();
        let server = Server::of(&["file", file.to_str().unwrap()], filters);
        let uri = PathBuf::from(server.uri());
        for options in [&["--force"][..], &["--force", "--detect-zeroes", "--depth=1"]] {
            let (code, error) = copy(options, &uri, &copied);
            assert!(code == 0 && error.is_empty(), "{size}: {code}: {error}");
            assert!(fs::read(&copied).unwrap() == bytes, "{size} {options:?}");
        }
        // As a target: whole blocks alone, and what is behind them stays.
        let (code, error) = copy(&["--force"], &copied, &uri);
        match size % 512 {
            0 => assert_eq!(code, 0, "{error}"),
            _ => assert!(code == 1 && error.contains("takes whole blocks of"), "{code}: {error}"),
        }
        if size > MIB as usize && filters.is_empty() {
            image(&small, &[7; MIB as usize], MIB);
            assert_eq!(copy(&["--force"], &small, &uri).0, 0);
            let now = fs::read(&file).unwrap();
            assert!(
                now[..MIB as usize] == vec![7; MIB as usize] && now[MIB as usize..] == bytes[MIB as usize..]
            );
        }
    }
    // The end of an image says what it is, too.
    let mut bytes = vec![1; MIB as usize + 100];
    let footer = bytes.len() - 512;
    bytes[footer..footer + 8].copy_from_slice(b"conectix");
    fs::write(&file, &bytes).unwrap();
    let server = Server::of(&["file", file.to_str().unwrap()], &[]);
    let (code, error) = copy(&["--force"], Path::new(&server.uri()), &copied);
    assert!(code == 1 && error.contains("vhd image"), "{code}: {error}");
    // A server that does not give its last bytes.
    let strict = [&policy[..], &["blocksize-error-policy=error"]].concat();
    let server = Server::of(&["file", file.to_str().unwrap()], &strict);
    fs::remove_file(&copied).unwrap();
    let (code, error) = copy(&["--format=raw"], Path::new(&server.uri()), &copied);
    assert!(
        code == 1 && error.contains("its last 100 bytes, which fill no block of 4096"),
        "{code}: {error}"
    );
    assert!(!copied.exists());
}

pub fn unsuitable_exports() {
    let dir = place();
    let (source, new) = (dir.path().join("source"), dir.path().join("new"));
    image(&source, b"QFI\xfb\0\0\0\x03", 16 * MIB);
    let mut server = Server::start(&[]);
    let uri = PathBuf::from(server.uri());
    let refused = |options: &[&str], from: &Path, to: &Path, word: &str| {
        let (code, error) = copy(options, from, to);
        assert!(code == 1 && error.contains(word), "{code}: {error}");
        assert!(!new.exists());
    };
    refused(&["--force"], &uri, &uri, "are the same");
    // The scheme may be written so, and a path cannot.
    let loud = PathBuf::from(server.uri().replacen("nbd+unix", "NBD+Unix", 1));
    refused(&["--force"], &uri, &loud, "are the same");
    refused(&["--force"], &loud, Path::new("NBD+vsock://2/x"), "scheme nbd+vsock is not supported");
    refused(&[], &loud, Path::new("NBDS://h/x"), "already exists");
    assert_eq!(copy(&[], &loud, &dir.path().join("zeroes")).0, 0);
    fs::remove_file(dir.path().join("zeroes")).unwrap();
    assert_eq!(copy(&["--force", "--format=raw"], &source, &uri).0, 0);
    refused(&[], &uri, &new, "qcow2");
    image(&source, &[], 17 * MIB);
    refused(&["--force"], &source, &uri, "17825792");
    image(&source, &[], 1000);
    refused(&["--force"], &source, &uri, "whole blocks of 512");
    image(&source, &[], MIB);
    server.crash();
    refused(&["--force"], &source, &uri, "cannot connect");
    refused(&[], Path::new("nbd+unix:///?socket=relative"), &new, "not an absolute path");
    // It goes in the middle: after 20 MiB at most of what is read in pieces of 1 MiB.
    let slow = Server::start(&["--filter=delay", "rdelay=20ms"]);
    let uri = PathBuf::from(slow.uri());
    let job = copy_command(&["--depth", "1"], &uri, &new).stderr(Stdio::piped()).spawn().unwrap();
    eventually("it reads", || slow.find("Read*offset=0x100000").is_some());
    drop(slow);
    let (code, error) = said(job.wait_with_output().unwrap());
    assert!(code == 1 && error.contains("cannot read from nbd+unix:"), "{code}: {error}");
    assert_eq!(names(dir.path()), ["source"]);
    let writable = Server::start(&["--readonly"]);
    refused(&["--force"], &source, Path::new(&writable.uri()), "read-only");
}
