//! What a guest may count on: the cache mode that it chose, and that a flush vouches for what was acknowledged. The store is
//! an NBD server that tells what it was asked for, and that loses what was not flushed when it is killed.

mod common;

use common::model::Op;
use common::player::Played;
use common::profile::{CLOUD_HYPERVISOR, CROSVM, Profile, QEMU, QEMU_OLD};
use common::service::{Service, Setup};
use common::trial::{run_trials, trial};
use common::{eventually, nbd};
use nix::sys::signal::Signal;
use std::cell::Cell;
use std::path::PathBuf;
use std::process::ExitCode;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;

const OK: u8 = 0;
const IOERR: u8 = 1;
/// `wce` in the configuration space.
const WRITEBACK: u32 = 32;

fn main() -> ExitCode {
    let needed = nbd::server();
    let trials: [(&str, fn()); 8] = [
        ("write_through_belongs_to_the_vmm_that_chose_it", write_through_belongs_to_its_vmm),
        ("a_guest_that_goes_on_without_notes_is_served_write_through", no_notes),
        ("a_guest_that_resets_keeps_its_cache_mode", reset_keeps_the_mode),
        ("a_single_connection_outlives_all_queues", single_connection),
        ("a_stop_flushes_over_the_connection_that_has_the_writes", a_stop_flushes),
        ("a_crash_of_both_fails_one_flush_of_each_queue", both_crash),
        ("a_server_that_stays_vouches_for_what_it_has", the_server_stays),
        ("a_planned_restart_leaves_no_doubt", planned_restart),
    ];
    run_trials(trials.map(|(name, run)| trial(name, needed.clone(), move |()| run())).into())
}

/// A service whose volume is a server's, and that server.
struct World {
    service: Service,
    server: nbd::Server,
    /// Those that were tried for being durable.
    writes: Cell<u64>,
}

impl World {
    fn new(filters: &[&str]) -> World {
        let setup = Setup::new();
        let server = nbd::Server::start(filters);
        let volume = format!("nbd:{},reconnect=30", server.uri());
        let service =
            setup.volume("root", &volume).vhost_user("root", "a", "queues=2").start().may_complain();
        World { service, server, writes: Cell::new(0) }
    }

    fn vhost_user(&self) -> PathBuf {
        self.service.path("a")
    }

    fn guest(&self, profile: &'static Profile) -> Played {
        Played::new(profile, &self.vhost_user(), 2.min(profile.queues))
    }

    fn back(&self, guest: &mut Played) {
        guest.vmm.reconnect(&self.vhost_user(), common::PATIENCE).unwrap();
    }

    /// Whether a write of this guest is on stable storage when it is acknowledged.
    fn writes_durably(&self, guest: &mut Played) -> bool {
        self.writes_durably_on(guest, 0)
    }

    fn writes_durably_on(&self, guest: &mut Played, queue: usize) -> bool {
        // The server writes its log in its own time: each write has a place of its own there.
        self.writes.set(self.writes.get() + 1);
        let sector = 8 * self.writes.get();
        write(guest, queue, sector);
        let asked = format!(" Write id=* offset={:#x} ", sector * 512);
        let mut line = None;
        eventually("the server tells of the write", || {
            line = self.server.find(&asked);
            line.is_some()
        });
        line.is_some_and(|line| line.contains("fua=1"))
    }
}

fn write(guest: &mut Played, queue: usize, sector: u64) {
    assert_eq!(guest.queues[queue].write(sector, &[7; 4096]), OK);
}

fn flush(guest: &mut Played, queue: usize) -> u8 {
    guest.queues[queue].one(Op::Flush, &[]).0
}

fn choose_write_through(guest: &mut Played) {
    assert_ne!(guest.vmm.features & 1 << VIRTIO_BLK_F_CONFIG_WCE, 0, "the driver cannot choose");
    let frontend = &mut guest.vmm.connection().unwrap().frontend;
    // Every VMM waits for the answer where it can.
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    frontend.set_config(WRITEBACK, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
}

fn write_through_belongs_to_its_vmm() {
    for profile in [&QEMU, &CLOUD_HYPERVISOR] {
        let mut world = World::new(&[]);
        let mut guest = world.guest(profile);
        assert!(!world.writes_durably(&mut guest));
        if guest.vmm.features & 1 << VIRTIO_BLK_F_CONFIG_WCE == 0 {
            continue;
        }
        choose_write_through(&mut guest);
        assert!(world.writes_durably(&mut guest), "{}", profile.name);
        guest.vmm.disconnect();
        world.back(&mut guest);
        assert!(world.writes_durably(&mut guest), "{}: after a reconnect", profile.name);
        for signal in [Signal::SIGKILL, Signal::SIGTERM] {
            world.service.restart(signal);
            world.back(&mut guest);
            assert!(world.writes_durably(&mut guest), "{}: after {signal}", profile.name);
        }
        drop(guest);
        assert!(!world.writes_durably(&mut world.guest(profile)), "{}: the next VMM", profile.name);
    }
}

/// Be it that the first queue has never been used, and stands where that of a new driver does.
fn no_notes() {
    for queue in [0, 1] {
        let mut world = World::new(&[]);
        let mut guest = world.guest(&QEMU_OLD);
        assert!(guest.vmm.inflight.is_none());
        assert!(!world.writes_durably_on(&mut guest, queue));
        choose_write_through(&mut guest);
        world.service.restart(Signal::SIGKILL);
        world.back(&mut guest);
        assert!(world.writes_durably_on(&mut guest, queue), "queue {queue}");
        drop(guest);
        assert!(!world.writes_durably(&mut world.guest(&CROSVM)), "the next VMM");
    }
}

/// The VMM forgets its notes at a reset, and what it shows the next driver is the old mode.
fn reset_keeps_the_mode() {
    let mut world = World::new(&[]);
    let mut guest = world.guest(&QEMU);
    choose_write_through(&mut guest);
    guest.vmm.reset().unwrap();
    guest.vmm.start().unwrap();
    assert!(world.writes_durably(&mut guest));
    world.service.restart(Signal::SIGKILL);
    world.back(&mut guest);
    assert!(world.writes_durably(&mut guest), "the new notes say so, too");
}

const ONE_CONNECTION: [&str; 2] = ["--filter=multi-conn", "multi-conn-mode=disable"];

fn single_connection() {
    let world = World::new(&ONE_CONNECTION);
    let mut guest = world.guest(&QEMU);
    write(&mut guest, 0, 0);
    guest.vmm.reset().unwrap();
    guest.vmm.start().unwrap();
    write(&mut guest, 1, 64);
    assert_eq!(flush(&mut guest, 0), OK, "nothing is lost");
    write(&mut guest, 0, 8);
    guest.vmm.disconnect();
    world.back(&mut guest);
    assert_eq!(flush(&mut guest, 1), OK, "nothing is lost");
    // The next VMM's flush covers what this one left behind.
    write(&mut guest, 0, 8);
    drop(guest);
    assert_eq!(flush(&mut world.guest(&QEMU), 0), OK);
    assert_eq!(world.server.connections(), 1);
}

fn a_stop_flushes() {
    let world = World::new(&ONE_CONNECTION);
    let mut guest = world.guest(&QEMU);
    write(&mut guest, 0, 0);
    drop(guest);
    let World { server, service, .. } = world;
    service.stop();
    eventually("the last write is flushed", || server.find(" Flush ").is_some());
    assert_eq!(server.connections(), 1, "another connection vouches for nothing");
}

fn both_crash() {
    for profile in [&QEMU, &CLOUD_HYPERVISOR, &QEMU_OLD] {
        let World { mut server, mut service, .. } = World::new(&[]);
        let export = service.path("a");
        let mut guest = Played::new(profile, &export, 2);
        for queue in [0, 1] {
            write(&mut guest, queue, 64 * queue as u64);
            assert_eq!(flush(&mut guest, queue), OK);
        }
        write(&mut guest, 0, 0);
        server.crash();
        service.signal(Signal::SIGKILL);
        server.start_again();
        service.restart(Signal::SIGKILL);
        guest.vmm.reconnect(&export, common::PATIENCE).unwrap();
        for queue in [0, 1] {
            assert_eq!(flush(&mut guest, queue), IOERR, "{}: queue {queue} vouches", profile.name);
            assert_eq!(flush(&mut guest, queue), OK, "{}: queue {queue} was told", profile.name);
        }
    }
}

fn the_server_stays() {
    let mut world = World::new(&[]);
    let mut guest = world.guest(&QEMU);
    write(&mut guest, 0, 0);
    world.service.restart(Signal::SIGKILL);
    world.back(&mut guest);
    assert_eq!(flush(&mut guest, 0), OK);
    assert_eq!(guest.queues[0].read(0, 8).1, [7; 4096]);
}

fn planned_restart() {
    let World { mut server, mut service, .. } = World::new(&[]);
    let export = service.path("a");
    let mut guest = Played::new(&QEMU, &export, 2);
    write(&mut guest, 0, 0);
    service.restart(Signal::SIGTERM);
    // Another server, which has what was flushed: nobody can tell it from one that crashed.
    server.crash();
    server.start_again();
    guest.vmm.reconnect(&export, common::PATIENCE).unwrap();
    for queue in [0, 1] {
        assert_eq!(flush(&mut guest, queue), OK, "it was flushed when the service ended");
    }
}
