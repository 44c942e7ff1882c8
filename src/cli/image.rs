//! `ringblk image`.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::rc::Rc;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{Failure, output};
use crate::block::Size;
use crate::image::{self, CopyOptions, ImageError, Progress, Reading};

/// Make, examine and copy raw images, without a service.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    Create(CreateArgs),
    Info(InfoArgs),
    Copy(CopyArgs),
}

/// Make an image of zeroes: one hole that takes no space until it is written.
///
/// Only its owner may read and write it (mode 0600), whatever the umask is.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ringblk image create /srv/root.img 20G")]
pub(super) struct CreateArgs {
    /// The new image; must not exist
    file: PathBuf,
    /// Its size, a multiple of 512 bytes; takes K, M, G, T, P and E
    size: Size,
    /// Reserve all the space on disk now
    #[arg(long)]
    preallocate: bool,
}

/// Tell format, size, space taken, holes and alignment of an image or block device.
#[derive(Debug, clap::Args)]
pub(super) struct InfoArgs {
    /// The image
    file: PathBuf,
    /// Look at it also while somebody writes it
    #[arg(long, short = 'U')]
    force_share: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Copy an image, holes stay holes.
///
/// Source and destination are files, block devices, or exports of NBD servers by their URIs. A new file appears when it
/// is complete and on disk, never in part, and only its owner may use it (mode 0600), whatever the source's mode is. A block device or an export must be large enough; what lies behind the copy
/// stays as it was. An image or device in use is neither read nor written: by the locks of QEMU and of `ringblk serve`, and the kernel's claims (mounts, LVM, swap).
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringblk image copy /srv/root.img /srv/backup.img
  ringblk image copy --force /srv/root.img /dev/vg0/root
  ringblk image copy --detect-zeroes /dev/vg0/root /srv/root.img
  ringblk image copy --force /srv/root.img nbd://host/root")]
pub(super) struct CopyArgs {
    /// What to copy
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// Where to
    #[arg(value_name = "DST")]
    destination: PathBuf,
    /// Transfers of 1 MiB in flight at once
    #[arg(long, value_name = "N", default_value_t = CopyOptions::DEFAULT_DEPTH)]
    depth: usize,
    /// Replace an existing file, which keeps its owner, mode and attributes, or overwrite a block device or an export
    #[arg(long)]
    force: bool,
    /// Read the source also while somebody writes it: the copy may be torn
    #[arg(long, short = 'U')]
    force_share: bool,
    /// Take the source's bytes as they are, even if they look like another format (qcow2, vmdk, ...)
    #[arg(long, value_enum, value_name = "FORMAT")]
    format: Option<Raw>,
    /// Look for zeroes in the data, and make holes of them
    #[arg(long)]
    detect_zeroes: bool,
    /// No progress and no summary
    #[arg(long, short)]
    quiet: bool,
}

/// The one format there is.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Raw {
    Raw,
}

pub(super) fn run(command: &Command) -> Result<(), Failure> {
    match command {
        Command::Create(args) => image::create(&args.file, args.size, args.preallocate).map_err(failure),
        Command::Info(args) => {
            let info = image::info(&args.file, args.force_share).map_err(failure)?;
            match args.json {
                true => output::print_json(&info),
                false => output::print(&info.to_string()),
            }
        }
        Command::Copy(args) => copy(args),
    }
}

fn copy(args: &CopyArgs) -> Result<(), Failure> {
    let options = CopyOptions {
        depth: args.depth,
        force: args.force,
        detect_zeroes: args.detect_zeroes,
        reading: Reading { force_share: args.force_share, raw: args.format.is_some() },
    };
    let progress: Rc<dyn Progress> = match args.quiet {
        true => Rc::new(()),
        false => Rc::new(Bar::new()),
    };
    let summary = image::copy(&args.source, &args.destination, &options, progress).map_err(failure)?;
    match args.quiet {
        true => Ok(()),
        false => output::print(&format!("{summary}\n")),
    }
}

fn failure(error: ImageError) -> Failure {
    match error {
        ImageError::Setting(_) => Failure::usage(error),
        _ => Failure::failed(error),
    }
}

/// A bar on standard error, if that is a terminal; gone at the end.
struct Bar(ProgressBar);

impl Bar {
    fn new() -> Bar {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        let template = "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        // The plain bar is good enough where the template is not understood.
        bar.set_style(
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        Bar(bar)
    }
}

impl Progress for Bar {
    fn begin(&self, total_bytes: u64) {
        self.0.set_length(total_bytes);
    }

    fn advance(&self, bytes: u64) {
        self.0.inc(bytes);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Only {
        #[command(subcommand)]
        command: Command,
    }

    fn run_line(line: &str) -> Result<(), Failure> {
        let only =
            Only::try_parse_from(line.split(' ')).map_err(|error| Failure::usage(error.to_string()))?;
        run(&only.command)
    }

    #[test]
    fn the_template_is_understood() {
        ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}").unwrap();
    }

    #[test]
    fn create_copy_info() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let (a, b) = (a.display(), b.display());
        run_line(&format!("image create {a} 1M")).unwrap();
        run_line(&format!("image info {a} --json")).unwrap();
        run_line(&format!("image copy {a} {b} --depth 2 --quiet")).unwrap();
        assert_eq!(run_line(&format!("image copy {a} {b}")).unwrap_err().status, 1);
        assert_eq!(run_line(&format!("image copy {a} {b} --depth 0")).unwrap_err().status, 2);
        assert_eq!(run_line(&format!("image create {b}2 1000")).unwrap_err().status, 2);
        assert_eq!(run_line(&format!("image create {b}2 1.5G")).unwrap_err().status, 2);
        assert_eq!(run_line(&format!("image info {b}2")).unwrap_err().status, 1);
        run_line(&format!("image copy {a} {b} --force -U --format raw --quiet")).unwrap();
        assert_eq!(run_line(&format!("image copy {a} {b} --force --format qcow2")).unwrap_err().status, 2);
    }
}
