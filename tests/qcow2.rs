//! qcow2 images through the whole service, beside QEMU's tools: what they make we serve, what we wrote they find whole. Where
//! they are missing, a test is listed as ignored, with the reason on standard error.

mod common;

use common::client::{Client, ClientQueue};
use common::model::{Model, Op, Queue, Random};
use common::service::{Service, Setup};
use common::trial::{installed, run_trials, trial};
use nix::sys::signal::Signal;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const OK: u8 = 0;

/// Bytes of the disks, and of what they stand on where that is shorter.
const SIZE: u64 = 6 * MIB;
const BASE: u64 = 3 * MIB + 512 * 77;

/// What qemu-img makes images with: all that changes how their tables look.
const KINDS: [&str; 14] = [
    "compat=1.1",
    "compat=0.10",
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=2M",
    "extended_l2=on,cluster_size=16k",
    "extended_l2=on,cluster_size=128k",
    "refcount_bits=1",
    "refcount_bits=2,cluster_size=1k",
    "refcount_bits=64,cluster_size=512",
    "lazy_refcounts=on",
    "preallocation=metadata",
    "preallocation=metadata,extended_l2=on",
    "compression_type=zstd",
];

fn main() -> ExitCode {
    let trials: [(&str, fn()); 9] = [
        ("qemu_finds_whole_what_we_wrote", every_kind),
        ("and_so_over_a_base_of_either_format", over_a_base),
        ("we_read_what_qemu_compressed", compressed),
        ("images_are_written_by_qemu_and_by_us_in_turn", in_turn),
        ("a_kill_loses_nothing_that_was_acknowledged", killed),
        ("guests_share_a_base", shared),
        ("what_we_do_not_write_is_refused_by_its_name", refused),
        ("an_image_of_ours_is_one_of_qemus", made_by_us),
        ("a_disk_grows_while_it_is_served", grown),
    ];
    let needed = installed("qemu-img").and(installed("qemu-io"));
    run_trials(trials.map(|(name, run)| trial(name, needed.clone(), move |()| run())).into())
}

/// A directory on a disk, where the build is: the system's temporary one may be in memory.
fn place() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn path(of: &Path) -> &str {
    of.to_str().unwrap()
}

/// Runs a program to its end: its exit status and all it said.
fn run(program: &str, args: &[&str]) -> (i32, String) {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8_lossy(&said).into_owned())
}

fn qemu_img(args: &[&str]) -> String {
    let (status, said) = run("qemu-img", args);
    assert_eq!(status, 0, "qemu-img {args:?}: {said}");
    said
}

fn ringblk(args: &[&str]) -> (i32, String) {
    run(env!("CARGO_BIN_EXE_ringblk"), args)
}

/// Both checks find nothing.
fn is_whole(image: &Path, what: &str) {
    let (status, said) = run("qemu-img", &["check", "-f", "qcow2", path(image)]);
    assert_eq!(status, 0, "{what}: {said}");
    let (status, said) = ringblk(&["image", "check", path(image)]);
    assert_eq!(status, 0, "{what}: {said}");
}

/// The disk, as QEMU reads it.
fn read_by_qemu(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("seen");
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", path(image), path(&raw)]);
    let bytes = fs::read(&raw).unwrap();
    fs::remove_file(raw).unwrap();
    bytes
}

fn random_file(path: &Path, len: u64) -> Vec<u8> {
    let bytes = Random::new(len).bytes(len as usize);
    fs::write(path, &bytes).unwrap();
    bytes
}

/// A service of `image`, over `base` (a driver and a path) where it stands on one.
fn service(image: &Path, base: Option<(&str, &Path)>) -> Service {
    let setup = Setup::new().args(["--workers", "2"]);
    let (setup, on) = match base {
        None => (setup, ""),
        Some((driver, base)) => {
            let base = format!("{driver}:{},read-only=on", base.display());
            (setup.volume("base", &base), ",base=base")
        }
    };
    let setup = setup.volume("v", &format!("qcow2:{},cache=256K{on}", image.display()));
    setup.vhost_user("v", "a", "queues=2").start()
}

/// Two queues that work at once, each on its half, over what the disk holds.
fn exercise(service: &Service, bytes: &[u8], seed: u64, count: usize) -> Vec<Model> {
    let half = bytes.len() / 1024 * 512;
    let client = Client::connect(&service.path("a"), true);
    let work = |(index, mut queue): (usize, ClientQueue)| {
        let (first, end) = if index == 0 { (0, half) } else { (half, bytes.len()) };
        let mut model = Model::of(seed + index as u64, first as u64 / 512, bytes[first..end].to_vec());
        std::thread::spawn(move || {
            model.exercise(&mut queue, count);
            model.verify(&mut queue);
            model
        })
    };
    let workers: Vec<_> = client.queues(2, 64, 16).into_iter().enumerate().map(work).collect();
    workers.into_iter().map(|worker| worker.join().unwrap()).collect()
}

/// Exercises an image, stops, and has it looked through: what it reads then.
fn serve(image: &Path, base: Option<(&str, &Path)>, bytes: &[u8], what: &str) -> Vec<u8> {
    let service = service(image, base);
    let models = exercise(&service, bytes, 1, 400);
    service.stop();
    is_whole(image, what);
    let seen = read_by_qemu(image);
    models.iter().for_each(|model| model.verify_image(&seen));
    seen
}

fn every_kind() {
    let dir = place();
    let image = dir.path().join("image");
    for kind in KINDS {
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", kind, path(&image), &SIZE.to_string()]);
        let seen = serve(&image, None, &vec![0; SIZE as usize], kind);
        // Once more: what is there already.
        serve(&image, None, &seen, kind);
    }
}

fn over_a_base() {
    let dir = place();
    let [image, raw, below] = ["image", "raw", "below"].map(|name| dir.path().join(name));
    let mut bytes = random_file(&raw, BASE);
    bytes.resize(SIZE as usize, 0);
    qemu_img(&["convert", "-O", "qcow2", "-o", "cluster_size=4k", path(&raw), path(&below)]);
    for kind in KINDS.iter().filter(|kind| !kind.contains("preallocation=metadata")) {
        for (driver, format, base) in [("file", "raw", &raw), ("qcow2", "qcow2", &below)] {
            let size = SIZE.to_string();
            let stands = ["-F", format, "-b", path(base)];
            qemu_img(
                &[&["create", "-q", "-f", "qcow2", "-o", kind][..], &stands, &[path(&image), &size]].concat(),
            );
            serve(&image, Some((driver, base)), &bytes, kind);
        }
    }
    assert_eq!(fs::read(&raw).unwrap(), bytes[..BASE as usize], "nobody writes to a base");
}

fn compressed() {
    let dir = place();
    let [image, raw] = ["image", "raw"].map(|name| dir.path().join(name));
    // Half of it can be made smaller.
    let mut bytes = random_file(&raw, SIZE);
    bytes.chunks_mut(3000).step_by(2).for_each(|chunk| chunk.fill(7));
    fs::write(&raw, &bytes).unwrap();
    for kind in [
        "compression_type=zlib",
        "compression_type=zstd",
        "cluster_size=512",
        "cluster_size=2M",
        "extended_l2=on",
    ] {
        qemu_img(&["convert", "-c", "-O", "qcow2", "-o", kind, path(&raw), path(&image)]);
        let service = service(&image, None);
        let mut queue = Client::connect(&service.path("a"), true).queues(1, 64, 16).remove(0);
        Model::of(0, 0, bytes.clone()).verify(&mut queue);
        drop(queue);
        service.stop();
        serve(&image, None, &bytes, kind);
    }
}

fn in_turn() {
    let dir = place();
    let image = dir.path().join("image");
    qemu_img(&["create", "-q", "-f", "qcow2", path(&image), &SIZE.to_string()]);
    for turn in 0..4u8 {
        let at = usize::from(turn) * 300_032;
        let write = format!("write -P {} {at} 500k", turn + 1);
        let discard = format!("discard {} 256k", 4 * MIB + u64::from(turn) * 65536);
        let (status, said) = run("qemu-io", &["-f", "qcow2", "-c", &write, "-c", &discard, path(&image)]);
        assert_eq!(status, 0, "{said}");
        let bytes = read_by_qemu(&image);
        assert!(bytes[at..at + 500 * 1024].iter().all(|byte| *byte == turn + 1));
        serve(&image, None, &bytes, "in turn");
    }
}

fn killed() {
    let dir = place();
    let [image, raw] = ["image", "raw"].map(|name| dir.path().join(name));
    let mut bytes = random_file(&raw, BASE);
    bytes.resize(SIZE as usize, 0);
    for kind in ["cluster_size=64k", "cluster_size=512", "extended_l2=on"] {
        let size = SIZE.to_string();
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            kind,
            "-F",
            "raw",
            "-b",
            path(&raw),
            path(&image),
            &size,
        ]);
        let mut service = service(&image, Some(("file", &raw))).may_complain();
        for seed in 0..3 {
            // Nobody flushes.
            let models = exercise(&service, &bytes, seed, 150);
            service.restart(Signal::SIGKILL);
            let mut queue = Client::connect(&service.path("a"), true).queues(1, 64, 16).remove(0);
            for mut model in models {
                model.verify(&mut queue);
            }
            bytes = read_all(&mut queue);
        }
        service.stop();
        let (status, said) = run("qemu-img", &["check", "-f", "qcow2", path(&image)]);
        assert!(status == 0 || status == 3, "{said}");
        let (status, said) = ringblk(&["image", "check", path(&image)]);
        assert!(status == 3 && said.contains("--repair"), "{status}: {said}");
        assert_eq!(ringblk(&["image", "check", "--repair", path(&image)]).0, 0);
        is_whole(&image, kind);
        assert!(read_by_qemu(&image) == bytes);
        bytes.fill(0);
        bytes[..BASE as usize].copy_from_slice(&fs::read(&raw).unwrap());
    }
}

fn read_all(queue: &mut ClientQueue) -> Vec<u8> {
    let step = queue.max_len();
    let read = |sector: u64| {
        queue.submit(0, Op::Read { sector, sectors: step as u32 / 512 });
        queue.kick();
        assert_eq!(queue.wait(), [(0, OK)]);
        let mut bytes = vec![0; step];
        queue.get(0, &mut bytes);
        bytes
    };
    (0..SIZE / 512).step_by(step / 512).flat_map(read).collect()
}

/// Two overlays on one base, in one service and in another.
fn shared() {
    let dir = place();
    let [golden, one, two, three] = ["golden.qcow2", "one", "two", "three"].map(|name| dir.path().join(name));
    let raw = dir.path().join("raw");
    let bytes = random_file(&raw, SIZE);
    qemu_img(&["convert", "-c", "-O", "qcow2", path(&raw), path(&golden)]);
    let before = fs::read(&golden).unwrap();
    for image in [&one, &two, &three] {
        let made =
            ringblk(&["image", "create", "--format", "qcow2", "--backing", "golden.qcow2", path(image)]);
        assert_eq!(made, (0, String::new()));
    }
    let service = Setup::new()
        .volume("golden", &format!("qcow2:{},read-only=on", golden.display()))
        .volume("one", &format!("qcow2:{},base=golden", one.display()))
        .volume("two", &format!("qcow2:{},base=golden", two.display()))
        .vhost_user("one", "a", "queues=2")
        .vhost_user("two", "b", "queues=2")
        .start();
    let other = self::service(&three, Some(("qcow2", &golden)));
    let models = exercise(&service, &bytes, 3, 300);
    exercise(&other, &bytes, 5, 300);
    // Nobody may write to what they stand on.
    let (status, said) = run("qemu-io", &["-f", "qcow2", "-c", "write 0 4k", path(&golden)]);
    assert!(status != 0 && said.contains("lock"), "{said}");
    let mut queue = Client::connect(&service.path("b"), true).queues(1, 64, 16).remove(0);
    Model::of(0, 0, bytes).verify(&mut queue);
    drop(queue);
    service.stop();
    other.stop();
    is_whole(&one, "one");
    let seen = read_by_qemu(&one);
    models.iter().for_each(|model| model.verify_image(&seen));
    assert!(fs::read(&golden).unwrap() == before);
}

/// What a service says that does not start with this volume.
fn refusal(volume: &str) -> String {
    let setup = Setup::new().volume("v", volume).vhost_user("v", "a", "");
    let (status, said) = setup.refused();
    assert_eq!(status, 1, "{said}");
    said
}

fn refused() {
    let dir = place();
    let image = dir.path().join("image");
    let create = |options: &[&str]| {
        qemu_img(&[&["create", "-q", "-f", "qcow2"][..], options, &[path(&image), "1M"]].concat());
    };
    let qcow2 = format!("qcow2:{}", image.display());
    let poke = |at: u64, bytes: &[u8]| {
        File::options().write(true).open(&image).unwrap().write_all_at(bytes, at).unwrap();
    };
    let data = dir.path().join("data").display().to_string();
    create(&["-o", &format!("data_file={data}")]);
    assert!(refusal(&qcow2).contains("an external data file"));
    create(&[]);
    qemu_img(&["snapshot", "-c", "before", path(&image)]);
    assert!(refusal(&qcow2).contains("1 internal snapshots"));
    drop(Setup::new().volume("v", &format!("{qcow2},read-only=on")).vhost_user("v", "a", "").start());
    create(&[]);
    qemu_img(&["bitmap", "--add", path(&image), "changes"]);
    assert!(refusal(&qcow2).contains("bitmaps"));
    for (bit, words) in [(1u64, "was not closed"), (2, "is marked as damaged")] {
        create(&[]);
        poke(72, &bit.to_be_bytes());
        assert!(refusal(&qcow2).contains(words));
    }
    // What it says of a backing file is not followed.
    create(&["-u", "-F", "raw", "-b", "/etc/shadow"]);
    let said = refusal(&qcow2);
    assert!(said.contains("stands on \"/etc/shadow\"") && said.contains("base=NAME"), "{said}");
    create(&[]);
    let setup = Setup::new().volume("b", "memory:1M").volume("v", &format!("{qcow2},base=b"));
    assert!(setup.vhost_user("v", "a", "").refused().1.contains("stands on no other"));
    create(&["-u", "-F", "raw", "-b", "x"]);
    let setup = Setup::new().volume("b", "memory:1M").volume("v", &format!("{qcow2},base=b"));
    let said = setup.vhost_user("v", "a", "").refused().1;
    assert!(said.contains("base must be read-only"), "{said}");
    fs::write(&image, [0; 4096]).unwrap();
    assert!(refusal(&qcow2).contains("is no qcow2 image"));
    // A table where another is.
    create(&[]);
    poke(0x30000, &(1u64 << 63 | 0x10000).to_be_bytes());
    assert!(refusal(&qcow2).contains("two of its tables are in one place"));
    let (status, said) = ringblk(&["image", "check", path(&image)]);
    assert!(status == 1 && said.contains("damaged"), "{said}");
}

fn made_by_us() {
    let dir = place();
    let image: PathBuf = dir.path().join("image");
    for options in [&[][..], &["--cluster-size", "512"], &["--cluster-size", "2M"], &["--extended-l2"]] {
        let create = ["image", "create", "--format", "qcow2"];
        assert_eq!(ringblk(&[&create[..], options, &[path(&image), "6M"]].concat()), (0, String::new()));
        is_whole(&image, "new");
        assert!(qemu_img(&["info", "-f", "qcow2", path(&image)]).contains("virtual size: 6 MiB"));
        serve(&image, None, &vec![0; SIZE as usize], "ours");
        fs::remove_file(&image).unwrap();
    }
}

fn grown() {
    let dir = place();
    let [image, raw] = ["image", "raw"].map(|name| dir.path().join(name));
    let bytes = random_file(&raw, BASE);
    for (kind, based, direct) in [
        ("cluster_size=64k", true, ""),
        ("cluster_size=4k", false, ""),
        ("extended_l2=on", true, ",direct=on"),
    ] {
        let base: &[&str] = if based { &["-F", "raw", "-b", path(&raw)] } else { &[] };
        qemu_img(&[&["create", "-q", "-f", "qcow2", "-o", kind][..], base, &[path(&image), "4M"]].concat());
        let setup = match based {
            true => Setup::new().volume("base", &format!("file:{},read-only=on,format=raw", raw.display())),
            false => Setup::new(),
        };
        let on = if based { ",base=base" } else { "" };
        let setup = setup.volume("v", &format!("qcow2:{}{on}{direct}", image.display()));
        let service = setup.vhost_user("v", "a", "queues=2").start();
        let control = ringblk::service::client::Client::new(service.control());
        let mut old = if based { bytes.clone() } else { Vec::new() };
        old.resize(4 * MIB as usize, 0);
        exercise(&service, &old, 3, 60);
        assert_eq!(control.resize("v", 7 * MIB, false).unwrap().size_bytes, 7 * MIB);
        let mut queue = Client::connect(&service.path("a"), true).queues(1, 64, 16).remove(0);
        // What is new reads zero, whatever was there, and is as good as the rest.
        let mut model = Model::new(5, 4 * MIB / 512, 3 * MIB / 512);
        model.verify(&mut queue);
        model.exercise(&mut queue, 200);
        let error = control.resize("v", 3 * MIB, true).unwrap_err().to_string();
        assert!(error.contains("smaller"), "{error}");
        let error = control.resize("v", 1 << 50, true).unwrap_err().to_string();
        assert!(error.contains("qemu-img resize"), "{error}");
        drop(queue);
        service.stop();
        is_whole(&image, kind);
        assert!(qemu_img(&["info", "-f", "qcow2", path(&image)]).contains("virtual size: 7 MiB"));
        model.verify_image(&read_by_qemu(&image));
    }
    // A base that is larger than what stands on it would show its end.
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", path(&raw), path(&image), "1M"]);
    let service = service(&image, Some(("file", &raw)));
    let control = ringblk::service::client::Client::new(service.control());
    assert!(control.resize("v", 2 * MIB, false).unwrap_err().to_string().contains("come to light"));
}
