//! `ringblk image`.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::rc::Rc;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{Failure, output};
use crate::block::Size;
use crate::engine::qcow2::NewImage;
use crate::image::{self, Backing, BackingFormat, CopyOptions, ImageError, Progress, Reading};

/// Of `image check`, as of `qemu-img check`.
const STATUS_LEAKS: u8 = 3;

/// Make, examine, check and copy images, without a service.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    Create(CreateArgs),
    Info(InfoArgs),
    Check(CheckArgs),
    Copy(CopyArgs),
}

/// Make an image that reads as zeroes, or as the one that it stands on, and takes no space until it is written.
///
/// Only its owner may read and write it (mode 0600), whatever the umask is. A qcow2 image may stand on another (--backing): it
/// has only what is written to it, and is made in no time whatever that one's size is. Nobody may write to that one from then on.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ringblk image create /srv/root.img 20G
  ringblk image create --format qcow2 /srv/root.qcow2 20G
  ringblk image create --format qcow2 --backing golden.qcow2 /srv/vm1.qcow2")]
pub(super) struct CreateArgs {
    /// The new image; must not exist
    file: PathBuf,
    /// Its size, a multiple of 512 bytes; takes K, M, G, T, P and E. That of --backing, if there is one
    #[arg(required_unless_present = "backing")]
    size: Option<Size>,
    /// Reserve all the space on disk now
    #[arg(long, conflicts_with = "format")]
    preallocate: bool,
    /// Of the image
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "raw")]
    format: Format,
    #[command(flatten)]
    qcow2: Qcow2Args,
}

/// What only qcow2 images have.
#[derive(Debug, clap::Args)]
struct Qcow2Args {
    /// What the image stands on; a relative path starts at the image's directory
    #[arg(long, value_name = "IMAGE")]
    backing: Option<PathBuf>,
    /// Format of that [default: raw, or qcow2 if it looks like that and its name ends so]
    #[arg(long, value_enum, value_name = "FORMAT", requires = "backing")]
    backing_format: Option<Format>,
    /// Space is taken in pieces of so many bytes: a power of two, 512 to 2M
    #[arg(long, value_name = "SIZE", default_value = "64K")]
    cluster_size: Size,
    /// Map each 32nd of a cluster by itself: first writes over another image copy less. Clusters are 16K at least then
    #[arg(long)]
    extended_l2: bool,
}

/// Look a qcow2 image's tables through: what points where, and whether that is counted right.
///
/// Ends with 0 where all is well, 3 where clusters are counted that nothing uses (they do no harm but take room, and are what a
/// service leaves that was killed), and 1 where anything else is wrong.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ringblk image check --repair /srv/vm1.qcow2")]
pub(super) struct CheckArgs {
    /// The image
    file: PathBuf,
    /// Have what is counted and not used free again
    #[arg(long, conflicts_with = "force_share")]
    repair: bool,
    /// Look at it also while somebody writes it: what is found may be of the moment
    #[arg(long, short = 'U')]
    force_share: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
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

/// The one format that is copied.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Raw {
    Raw,
}

/// Formats of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Raw,
    Qcow2,
}

pub(super) fn run(command: &Command) -> Result<(), Failure> {
    match command {
        Command::Create(args) => create(args),
        Command::Check(args) => check(args),
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

fn create(args: &CreateArgs) -> Result<(), Failure> {
    let Qcow2Args { backing, backing_format, cluster_size, extended_l2 } = &args.qcow2;
    if args.format == Format::Raw {
        let default = *cluster_size == Size(64 << 10);
        return match args.size {
            Some(size) if backing.is_none() && default && !extended_l2 => {
                image::create(&args.file, size, args.preallocate).map_err(failure)
            }
            _ => {
                Err(Failure::usage("a raw image stands on no other and has no clusters: --format qcow2 does"))
            }
        };
    }
    if !cluster_size.bytes().is_power_of_two() {
        return Err(Failure::usage(format!("--cluster-size {cluster_size} is no power of two")));
    }
    let new = NewImage {
        cluster_bits: cluster_size.bytes().trailing_zeros(),
        extended_l2: *extended_l2,
        ..NewImage::default()
    };
    let backing = backing.as_ref().map(|path| Backing {
        path: path.clone(),
        format: backing_format.map(|format| match format {
            Format::Raw => BackingFormat::Raw,
            Format::Qcow2 => BackingFormat::Qcow2,
        }),
    });
    image::create_qcow2(&args.file, args.size, new, backing.as_ref()).map_err(failure)
}

fn check(args: &CheckArgs) -> Result<(), Failure> {
    let report = image::check(&args.file, args.repair, args.force_share).map_err(failure)?;
    match args.json {
        true => output::print_json(&report)?,
        false => output::print(&report.to_string())?,
    }
    let path = args.file.display();
    match (report.corruptions, report.leaks - report.leaks_fixed) {
        (0, 0) => Ok(()),
        (0, leaks) => {
            let told =
                format!("{path}: {leaks} clusters are counted and not used (--repair has them free again)");
            Err(Failure::of(STATUS_LEAKS, told))
        }
        (errors, _) => Err(Failure::failed(format!(
            "{path}: is damaged in {errors} places (qemu-img check -r all may mend it: make a copy first)"
        ))),
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

    #[test]
    fn create_and_check_qcow2() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let (golden, clone) = (path("golden.qcow2"), path("clone"));
        run_line(&format!("image create --format qcow2 {golden} 1G --cluster-size 4K")).unwrap();
        run_line(&format!("image create --format qcow2 --backing golden.qcow2 --extended-l2 {clone}"))
            .unwrap();
        run_line(&format!("image info --json {clone}")).unwrap();
        run_line(&format!("image check {clone} --json")).unwrap();
        run_line(&format!("image check --repair {golden}")).unwrap();
        let status = |line: String| run_line(&line).unwrap_err().status;
        let new = path("new");
        for (line, expected) in [
            (format!("image create --format qcow2 {new}"), 2),
            (format!("image create {new} --backing golden.qcow2"), 2),
            (format!("image create {new} 1M --extended-l2"), 2),
            (format!("image create --format qcow2 {new} 1M --cluster-size 100"), 2),
            (format!("image create --format qcow2 {new} 1M --cluster-size 4M"), 2),
            (format!("image create --format qcow2 {new} 1T --cluster-size 512"), 2),
            (format!("image create --format qcow2 {new} --backing none"), 1),
            // It looks like something, and nobody says that it is.
            (format!("image create --format qcow2 {new} --backing clone"), 1),
            (format!("image create --format qcow2 {golden} 1M"), 1),
            (format!("image check {new}"), 1),
        ] {
            assert_eq!(status(line.clone()), expected, "{line}");
        }
        assert!(!std::path::Path::new(&new).exists());
        std::fs::write(&new, [0; 4096]).unwrap();
        assert_eq!(status(format!("image check {new}")), 1);
    }
}
