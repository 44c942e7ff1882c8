//! What needs more than the service and a directory: block devices, a file system that tells what it has written, and a
//! VMM in a process of its own. Where one is missing, the test is listed as ignored, with the reason on standard error.

mod common;

use common::client::Client;
use common::eventually;
use common::memory::GuestMemory;
use common::model::{Model, Op, Queue};
use common::queue::{Layout, RawQueue};
use common::service::{Service, Setup};
use common::trial::{run_trials, trial};
use common::vmm::{BASE, Vmm, everyday};
use nix::unistd::Uid;
use ringblk::engine::Volume;
use ringblk::engine::config::{FileConfig, VolumeConfig};
use ringblk::service::client::Client as Control;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;

const MIB: u64 = 1 << 20;
const OK: u8 = 0;
/// Names the socket in the environment of a VMM in a process of its own.
const VMM: &str = "RINGBLK_TEST_VMM";

fn main() -> ExitCode {
    if let Some(socket) = std::env::var_os(VMM) {
        work_until_killed(Path::new(&socket));
    }
    let trials = vec![
        trial("a_volume_on_zram", zram(), |device| on_a_block_device(&device.path)),
        trial("a_volume_on_a_loop_device", loop_device(512), |device| on_a_block_device(&device.path)),
        trial("a_volume_on_blocks_of_4096", loop_device(4096), |device| on_a_block_device(&device.path)),
        trial("a_loop_device_that_grows", loop_device(1024), |device| growing_device(&device.path)),
        trial("without_a_cache_writes_are_on_disk", delayed_allocation(), |()| write_through()),
        trial("direct_io_brings_its_alignment", direct_io(), |image| direct_alignment(&image)),
        trial("a_killed_vmm_harms_nobody", Ok(()), |()| killed_vmm()),
        trial("qemu_and_we_keep_off_each_others_images", qemu_io(), |()| locked_images()),
    ];
    run_trials(trials)
}

/// A block device that is ours until this is dropped.
struct Device {
    path: PathBuf,
    release: Box<dyn FnMut() + Send>,
}

impl Drop for Device {
    fn drop(&mut self) {
        (self.release)();
    }
}

fn root() -> Result<(), String> {
    if Uid::effective().is_root() { Ok(()) } else { Err("only root may set up a device".into()) }
}

/// `/dev/zram0`, if it has no size: then nobody uses it.
fn zram() -> Result<Device, String> {
    root()?;
    let path = PathBuf::from("/dev/zram0");
    let size = Path::new("/sys/block/zram0/disksize");
    let found = fs::read_to_string(size).map_err(|error| format!("{}: {error}", size.display()))?;
    if found.trim() != "0" {
        return Err(format!("{} is in use", path.display()));
    }
    fs::write(size, (64 * MIB).to_string()).map_err(|error| format!("{}: {error}", size.display()))?;
    // It counts as busy until who else opened it, udev for one, has closed it.
    let reset = || eventually("zram is reset", || fs::write("/sys/block/zram0/reset", "1").is_ok());
    Ok(Device { path, release: Box::new(reset) })
}

fn losetup<const N: usize>(args: [&str; N]) -> Result<String, String> {
    let output = Command::new("losetup").args(args).output().map_err(|error| format!("losetup: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        Err(format!("losetup: {}", String::from_utf8_lossy(&output.stderr).trim()))
    }
}

/// A loop device that is free, on a file of ours.
fn loop_device(block: u32) -> Result<Device, String> {
    root()?;
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let image = dir.join(format!("loop-{}-{block}.img", std::process::id()));
    File::create(&image).and_then(|file| file.set_len(64 * MIB)).map_err(|error| error.to_string())?;
    let (block, image_text) = (block.to_string(), image.display().to_string());
    let path = losetup(["--find", "--show", "--sector-size", &block, &image_text]);
    let path = path.inspect_err(|_| drop(fs::remove_file(&image)))?;
    let detach = path.clone();
    let release = move || {
        losetup(["--detach", &detach]).unwrap();
        fs::remove_file(&image).unwrap();
    };
    Ok(Device { path: path.into(), release: Box::new(release) })
}

/// Its own tools make a block device larger or smaller, and the service is told.
fn growing_device(path: &Path) {
    let name = path.display().to_string();
    let image = losetup(["--list", "--noheadings", "--output", "BACK-FILE", &name]).unwrap();
    let image = OpenOptions::new().write(true).open(image).unwrap();
    let becomes = |mib: u64| {
        image.set_len(mib * MIB).unwrap();
        losetup(["--set-capacity", &name]).unwrap();
    };
    for options in ["", ",direct=on"] {
        becomes(64);
        let setup = Setup::new().volume("disk", &format!("file:{name}{options}")).vhost_user("disk", "a", "");
        let service = setup.start();
        let control = Control::new(service.control());
        let (mut vmm, mut queue) = everyday(&service.path("a"));
        let refused = control.resize("disk", 96 * MIB, true).unwrap_err().to_string();
        assert!(refused.contains("has the size it has"), "{refused}");
        let last = |mib: u64| mib * MIB / 512 - 8;
        becomes(96);
        assert_ne!(queue.write(last(96), &[7; 4096]), OK, "nobody has said anything yet");
        assert_eq!(control.refresh("disk", false).unwrap().size_bytes, 96 * MIB);
        assert_eq!(vmm.config(0, 8), (96 * MIB / 512).to_le_bytes());
        assert_eq!(queue.write(last(96), &[7; 4096]), OK);
        assert_eq!(queue.read(last(96), 8), (OK, vec![7; 4096]));
        becomes(32);
        assert!(control.refresh("disk", false).is_err());
        assert_eq!(control.refresh("disk", true).unwrap().size_bytes, 32 * MIB);
        assert_eq!(vmm.config(0, 8), (32 * MIB / 512).to_le_bytes());
        assert_ne!(queue.write(last(64), &[7; 4096]), OK);
        assert_eq!(queue.write(last(32), &[7; 4096]), OK);
    }
}

/// Everything that a file can do, in both ways to reach it.
fn on_a_block_device(path: &Path) {
    let sysfs = Path::new("/sys/block").join(path.file_name().unwrap());
    let queue = |name: &str| fs::read_to_string(sysfs.join("queue").join(name)).unwrap().trim().to_owned();
    let bytes = 512 * fs::read_to_string(sysfs.join("size")).unwrap().trim().parse::<u64>().unwrap();
    for options in ["", ",direct=on"] {
        let setup = Setup::new().volume("disk", &format!("file:{}{options}", path.display()));
        let service = setup.vhost_user("disk", "a", "queues=2").start();
        let client = Client::connect(&service.path("a"), true);
        let config = client.config();
        assert_eq!(u64::from(config.capacity) * 512, bytes);
        let block = u64::from(u32::from(config.blk_size));
        assert_eq!(block.to_string(), queue("logical_block_size"));
        let offered = u32::from(config.max_discard_sectors) > 0;
        assert_eq!(offered, queue("discard_max_bytes") != "0", "discard is offered where the device has it");
        let mut queues = client.queues(2, 64, 16);
        for (index, queue) in queues.iter_mut().enumerate() {
            let (first, sectors) = (index as u64 * 16384, 16384);
            for at in (first..first + sectors).step_by(4096) {
                queue.submit(0, Op::WriteZeroes { sector: at, sectors: 4096, unmap: at % 8192 == 0 });
                queue.kick();
                assert_eq!(queue.wait(), [(0, OK)]);
            }
            let mut model = Model::new(index as u64, first, sectors).blocks(block);
            model.exercise(queue, 500);
            model.verify(queue);
            queue.submit(0, Op::Flush);
            queue.kick();
            assert_eq!(queue.wait(), [(0, OK)]);
            // As the kernel sees it, past every cache.
            model.verify_image(&read_direct(path, 32768 * 512));
        }
    }
}

fn read_direct(path: &Path, len: usize) -> Vec<u8> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap();
    let memory = GuestMemory::new(0, len as u64);
    // SAFETY: `len` bytes of a mapping that lives on, aligned to a page.
    let got = unsafe { libc::pread(file.as_raw_fd(), memory.ptr(0, len).cast(), len, 0) };
    assert_eq!(got, len as isize);
    memory.get(0, len)
}

/// Whether some of the file is in memory only: an extent for which the file system has chosen no place yet.
fn has_unwritten_data(path: &Path) -> bool {
    // `struct fiemap` with room for 64 `struct fiemap_extent`, and FS_IOC_FIEMAP, of linux/fiemap.h.
    const FS_IOC_FIEMAP: libc::c_ulong = 0xc020_660b;
    const DELALLOC: u32 = 4;
    let mut map = vec![0u64; 4 + 64 * 7];
    map[1] = u64::MAX;
    map[3] = 64;
    let file = File::open(path).unwrap();
    // SAFETY: the buffer is as long as it says, and outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, map.as_mut_ptr()) };
    assert_eq!(result, 0, "FIEMAP: {}", std::io::Error::last_os_error());
    let extents = (map[2] >> 32) as usize;
    map[4..].chunks(7).take(extents).any(|extent| extent[5] as u32 & DELALLOC != 0)
}

/// Whether that can be seen here.
fn delayed_allocation() -> Result<(), String> {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("delalloc-{}", std::process::id()));
    fs::write(&path, [1; 8192]).map_err(|error| error.to_string())?;
    let seen = std::panic::catch_unwind(|| has_unwritten_data(&path)).unwrap_or(false);
    fs::remove_file(&path).map_err(|error| error.to_string())?;
    if seen { Ok(()) } else { Err("the file system does not tell what is only in memory".into()) }
}

/// An image that can be opened with O_DIRECT.
fn direct_io() -> Result<PathBuf, String> {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("direct-{}", std::process::id()));
    fs::write(&path, [7; MIB as usize]).map_err(|error| error.to_string())?;
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path);
    opened.map(|_| path.clone()).map_err(|error| {
        let _ = fs::remove_file(&path);
        format!("no O_DIRECT on the file system of {}: {error}", path.display())
    })
}

/// What the file system asks for is found, and kept: aligned requests go straight to it, and others through a buffer.
fn direct_alignment(image: &Path) {
    let config = FileConfig {
        path: image.into(),
        direct: true,
        read_only: false,
        lock: true,
        format: None,
        block_size: None,
    };
    let volume = Volume::open("direct", &VolumeConfig::File(config)).unwrap();
    let (block, memory) = (volume.geometry().logical_block, volume.geometry().dma_alignment);
    assert!(block >= 512, "{block}");
    assert!(memory > 1, "direct I/O into any address was never seen");
    drop(volume);
    let setup = Setup::new().volume("direct", &format!("file:{},direct=on", image.display()));
    let service = setup.vhost_user("direct", "a", "").start();
    // The data of these begins 1 byte into a page, and at a page.
    for layout in [Layout::Pieces, Layout::Plain] {
        let mut vmm = Vmm::connect(&service.path("a"));
        let mut queue = vmm.queue(0, 64, layout, 8);
        let mut model = Model::new(1, 0, MIB / 512).blocks(block.into());
        queue.submit(0, Op::WriteZeroes { sector: 0, sectors: (MIB / 512) as u32, unmap: false });
        queue.kick();
        assert_eq!(queue.wait(), [(0, OK)]);
        model.exercise(&mut queue, 300);
        model.verify(&mut queue);
        assert_eq!(queue.one(Op::Flush, &[]).0, OK);
        model.verify_image(&read_direct(image, MIB as usize));
    }
    drop(service);
    fs::remove_file(image).unwrap();
}

fn image_service() -> (Service, PathBuf) {
    let setup = Setup::new();
    let image = setup.image(8 * MIB);
    let setup = setup.volume("root", &format!("file:{}", image.display()));
    (setup.vhost_user("root", "a", "").vhost_user("root", "b", "").start(), image)
}

/// A driver that has no cache, or turned it off, has every write on disk when it completes.
fn write_through() {
    let (service, image) = image_service();
    let mut sector = 0;
    let mut write = |queue: &mut RawQueue| {
        sector += 1024;
        assert_eq!(queue.write(sector, &[5; 65536]), OK);
        let unwritten = has_unwritten_data(&image);
        assert_eq!(queue.one(Op::Flush, &[]).0, OK);
        assert!(!has_unwritten_data(&image), "a flush writes everything");
        unwritten
    };
    let connect = |mask| {
        let mut vmm = Vmm::connect_with(&service.path("a"), mask, GuestMemory::new(BASE, 2 * MIB));
        let queue = vmm.queue(0, 16, Layout::Plain, 1);
        (vmm, queue)
    };

    let (mut vmm, mut queue) = connect(u64::MAX);
    assert!(write(&mut queue), "with a cache, a write stays in memory: the test shows nothing otherwise");
    vmm.set_config(32, &[0]);
    assert!(!write(&mut queue), "the cache was turned off");
    vmm.set_config(32, &[1]);
    assert!(write(&mut queue), "and on");
    // Turning it off brings what it holds to the disk.
    assert_eq!(queue.write(0, &[6; 65536]), OK);
    assert!(has_unwritten_data(&image));
    vmm.set_config(32, &[0]);
    assert!(!has_unwritten_data(&image));
    vmm.set_config(32, &[1]);
    drop(vmm);

    let (vmm, mut queue) = connect(1 << 32);
    assert_eq!(vmm.features & 1 << VIRTIO_BLK_F_FLUSH, 0);
    assert!(!write(&mut queue), "a driver without FLUSH has no cache");
    drop(vmm);
    // One with FLUSH and without CONFIG_WCE has one.
    let (_vmm, mut queue) = connect(1 << 32 | 1 << VIRTIO_BLK_F_FLUSH);
    assert!(write(&mut queue));
}

/// The other process: works without end, and says so once it does.
fn work_until_killed(socket: &Path) -> ! {
    let mut vmm = Vmm::connect(socket);
    let mut queue = vmm.queue(0, 64, Layout::Plain, 16);
    println!("working");
    for round in 0u64.. {
        for slot in 0..16 {
            let (sector, sectors) = ((round * 16 + slot) % 128 * 128, 128);
            match slot % 3 {
                0 => queue.submit(slot as usize, Op::Read { sector, sectors }),
                1 => queue.submit(slot as usize, Op::Write { sector, sectors }),
                _ => queue.submit(slot as usize, Op::Flush),
            }
        }
        queue.kick();
        let mut left = 16;
        while left > 0 {
            left -= queue.wait().len();
        }
    }
    unreachable!("2^64 rounds")
}

fn killed_vmm() {
    let (service, _) = image_service();
    let (_vmm, mut witness) = everyday(&service.path("b"));
    for round in 0..10 {
        let program = std::env::current_exe().unwrap();
        let mut command = Command::new(program);
        command.env(VMM, service.path("a")).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "working\n");
        std::thread::sleep(std::time::Duration::from_millis(3 * round));
        // SIGKILL: with its requests in flight, and nobody to say goodbye.
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(witness.write(16383, &[1; 512]), OK);
        let (_vmm, mut queue) = everyday(&service.path("a"));
        assert_eq!(queue.read(16383, 1), (OK, vec![1; 512]));
    }
}

fn qemu_io() -> Result<(), String> {
    match Command::new("qemu-io").arg("--version").stdout(Stdio::null()).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("qemu-io ends with {status}")),
        Err(error) => Err(format!("qemu-io cannot be run: {error}")),
    }
}

/// QEMU's tools take the locks that QEMU takes on the images of its disks.
fn locked_images() {
    let (service, image) = image_service();
    let qemu = |options: &str| {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw", "-c", options]).arg(&image);
        command
    };
    for job in ["write 0 512", "read 0 512"] {
        let output = qemu(job).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains("lock"), "{job}: {error}");
    }
    // Which takes the image with it.
    drop(service);
    fs::write(&image, [0; 4096]).unwrap();
    let output = qemu("write 0 512").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // And the other way round: it holds the image until its standard input ends.
    let mut writer = Command::new("qemu-io");
    let writer = writer.args(["-f", "raw"]).arg(&image).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut writer = writer.spawn().unwrap();
    // It greets once it has the image.
    let mut greeting = [0; 1];
    std::io::Read::read_exact(writer.stdout.as_mut().unwrap(), &mut greeting).unwrap();
    let volume = format!("root=file:{}", image.display());
    let export = format!("root={}", image.with_extension("sock").display());
    let control = image.with_extension("control");
    let mut ours = Command::new(env!("CARGO_BIN_EXE_ringblk"));
    ours.args(["serve", "--volume", &volume, "--vhost-user", &export, "--control"]).arg(control);
    let refused = ours.stdin(Stdio::null()).output().unwrap();
    drop(writer.stdin.take());
    writer.wait().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("is in use by another process"));
    fs::remove_file(&image).unwrap();
}
