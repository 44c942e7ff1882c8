//! Who uses a block device or a file: what would be hurt if it went, or why we cannot have it.
//!
//! The kernel does not say who has a device open. So we look where users leave traces: mounts, swaps, and the devices that
//! are built on it, for anybody to see; and the open files of processes, for those who may look.
//!
//! Contract: nobody without privileges can make a device look used. Anybody may mount something (in a user namespace, or
//! with FUSE), name a file or himself as he likes, and have udisks attach a file to a loop device; so what counts are device
//! numbers, and names in sysfs and in `/dev` itself. Other text is shown at most, in printable form. Nor can anybody make
//! us wait: nothing that may be another's file is asked for more than the kernel has in memory.

#![forbid(unsafe_code)]

mod device;
mod open;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

pub use device::Device;
pub use open::{having_open, openers};

/// What somebody has a device for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Use {
    /// A file system, and where it is mounted.
    Mounted {
        /// The mount point, as the process sees it that has it.
        at: String,
    },
    /// A file system that is mounted where we cannot look, or where it cannot be told which mount it is.
    Somewhere {
        /// Its kind.
        kind: String,
    },
    /// The kernel's memory is written to it.
    Swap {
        /// The device's path.
        on: String,
    },
    /// Device mapper, md, bcache.
    Part {
        /// Name of the device that is built on it.
        of: String,
        /// What the device mapper calls that.
        name: Option<String>,
    },
    /// A loop device.
    Loop {
        /// Its name.
        name: String,
    },
    /// A process.
    Open {
        /// Its number.
        pid: String,
        /// What it calls itself.
        command: String,
    },
}

/// Who has a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Which device of those that belong together, in words to stand before the user: empty for the one that was asked for.
    pub whose: String,
    /// For what.
    pub what: Use,
}

impl User {
    /// Names who it is, for a sentence like "is in use by ...".
    pub fn name(&self) -> String {
        let what = match &self.what {
            Use::Mounted { at } => format!("a file system mounted at {at}"),
            Use::Somewhere { kind } => format!("a file system ({kind}) that is mounted somewhere"),
            Use::Swap { .. } => "swap".into(),
            Use::Part { name: Some(name), .. } => format!("/dev/mapper/{name}"),
            Use::Part { of: name, name: None } | Use::Loop { name } => format!("/dev/{name}"),
            Use::Open { pid, command } => format!("{command} (process {pid})"),
        };
        format!("{}{what}", self.whose)
    }
}

/// What the device is because of it, for a sentence like "it is ...".
impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.whose)?;
        match &self.what {
            Use::Mounted { at } => write!(f, "mounted on {at}"),
            Use::Somewhere { kind } => write!(f, "mounted somewhere, with {kind}"),
            Use::Swap { on } => write!(f, "swap on {on}"),
            Use::Part { of, name: Some(name) } => write!(f, "part of {of} ({name})"),
            Use::Part { of, name: None } => write!(f, "part of {of}"),
            Use::Loop { name } => write!(f, "behind {name}"),
            Use::Open { pid, command } => write!(f, "open in process {pid} ({command})"),
        }
    }
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read(path).map_or_else(|_| String::new(), |bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// Names in a directory, sorted; none where it cannot be read.
fn names(directory: impl AsRef<Path>) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// The directories of `/proc` that are processes', with their numbers.
fn processes(root: &Path) -> impl Iterator<Item = (String, PathBuf)> {
    let proc = root.join("proc");
    let numbers = names(&proc).into_iter().filter(|name| name.parse::<u32>().is_ok());
    numbers.map(move |number| (number.clone(), proc.join(number)))
}

/// Text of others for a line of ours: whatever ends lines, moves cursors or the like is written out.
fn shown(text: &str) -> String {
    text.chars().fold(String::new(), |mut shown, c| {
        match c {
            '"' | '\'' => shown.push(c),
            c => shown.extend(c.escape_debug()),
        }
        shown
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_told_in_two_ways() {
        let user = |what| User { whose: "its partition sda1: ".into(), what };
        let mounted = user(Use::Mounted { at: "/x".into() });
        assert_eq!(mounted.to_string(), "its partition sda1: mounted on /x");
        assert_eq!(mounted.name(), "its partition sda1: a file system mounted at /x");
        let part = user(Use::Part { of: "dm-0".into(), name: Some("vg-a".into()) });
        assert_eq!(part.to_string(), "its partition sda1: part of dm-0 (vg-a)");
        assert_eq!(part.name(), "its partition sda1: /dev/mapper/vg-a");
    }

    #[test]
    fn text_of_others_stays_in_its_line() {
        assert_eq!(shown("/my disk's é"), "/my disk's é");
        assert_eq!(shown("a\nb\x1b[2J\u{202e}"), "a\\nb\\u{1b}[2J\\u{202e}");
    }
}
