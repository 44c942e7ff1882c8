//! Volumes that stand on others, through the whole service: a guest's disk with faults, switched while it is served.

mod common;

use common::eventually;
use common::model::Model;
use common::service::Setup;
use common::vmm::everyday;
use ringblk::service::client::Client;

const MIB: u64 = 1 << 20;
const OK: u8 = 0;
const IOERR: u8 = 1;

#[test]
fn a_disk_misbehaves_on_demand() {
    let setup = Setup::new();
    let image = setup.image(8 * MIB);
    let service = setup
        .volume("good", &format!("file:{},format=raw", image.display()))
        .volume("bad", "fault:good,errors=100%,operations=read+flush,from=1M,enabled=off")
        .vhost_user("bad", "a", "")
        .start()
        .may_complain();
    let client = Client::new(service.control());
    let volumes = service.status().volumes;
    assert_eq!(
        volumes.iter().map(|volume| &*volume.name).collect::<Vec<_>>(),
        ["bad"],
        "a base is no volume apart"
    );
    assert_eq!((&*volumes[0].driver, &*volumes[0].target, volumes[0].size_bytes), ("fault", "good", 8 * MIB));

    let (_vmm, mut queue) = everyday(&service.path("a"));
    let sector = 3 * MIB / 512;
    let bytes = vec![7; 4096];
    assert_eq!(queue.write(sector, &bytes), OK);
    assert_eq!(queue.read(sector, 8), (OK, bytes.clone()));
    assert!(client.fault("bad", true).unwrap().enabled);
    assert_eq!(queue.read(sector, 8).0, IOERR);
    assert_eq!(queue.read(0, 8).0, OK, "before the place of the faults");
    assert_eq!(queue.write(sector, &bytes), OK, "writes are well");
    client.fault("bad", false).unwrap();
    assert_eq!(queue.read(sector, 8), (OK, bytes));
    for (name, words) in
        [("good", "volume good is not served by itself: ask for bad"), ("other", "no volume")]
    {
        let error = client.fault(name, true).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        let error = client.resize(name, 4 * MIB, true).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

/// Whose setting it takes to begin without it, and then it is tried again, sandbox and all.
#[test]
fn what_a_base_lacks_is_told_of_what_stands_on_it() {
    let setup = |options: &str| {
        let setup = Setup::new();
        let image = setup.path("image");
        let setup = setup
            .volume("good", &format!("file:{},format=raw", image.display()))
            .volume("middle", "fault:good")
            .volume("bad", &format!("fault:middle{options}"));
        (setup.vhost_user("bad", "a", ""), image)
    };
    let (status, said) = setup("").0.refused();
    let hint = "(required=no on volume bad has the service begin without it, and try it again)";
    assert!(status == 1 && said.contains("volume bad stands on another: volume good: "), "{said}");
    assert!(said.contains(hint), "{said}");

    // A server that does not answer is waited for, as it is for a volume that is its own.
    let server = Setup::new()
        .volume("far", "nbd:nbd+unix:///?socket=/no/such/socket")
        .volume("bad", "fault:far")
        .volume("near", "memory:1M")
        .vhost_user("bad", "a", "")
        .vhost_user("near", "b", "");
    let service = server.start();
    let unavailable = |name: &str| {
        let found = service.status().volumes.into_iter().find(|volume| volume.name == name);
        found.unwrap().unavailable
    };
    assert!(
        unavailable("bad").is_some_and(|cause| cause.contains("volume far")) && unavailable("near").is_none()
    );

    let (setup, image) = setup(",required=no");
    let service = setup.start().may_complain();
    let unavailable = || service.status().volumes[0].unavailable.clone();
    assert!(
        unavailable().is_some_and(|cause| cause.starts_with("volume bad stands on another: volume good"))
    );
    std::fs::write(image.with_extension("new"), vec![3; MIB as usize]).unwrap();
    std::fs::rename(image.with_extension("new"), &image).unwrap();
    eventually("it is there", || unavailable().is_none());
    let (_vmm, mut queue) = everyday(&service.path("a"));
    assert_eq!(queue.read(0, 1), (OK, vec![3; 512]));
}

#[test]
fn a_tower_of_layers_is_a_disk_as_any_other() {
    let setup = Setup::new().args(["--workers", "2"]);
    let image = setup.image(8 * MIB);
    let mut setup = setup.volume("v0", &format!("file:{},format=raw", image.display()));
    for number in 1..=31 {
        let below = number - 1;
        setup =
            setup.volume(&format!("v{number}"), &format!("fault:v{below},delays=1%,delay=1,seed={number}"));
    }
    let service = setup.vhost_user("v31", "a", "").start();
    let client = Client::new(service.control());
    let (_vmm, mut queue) = everyday(&service.path("a"));
    let mut model = Model::new(5, 0, 8 * MIB / 512);
    model.exercise(&mut queue, 500);
    // Grown from the top: every edge on the way down takes what lies beyond the old end.
    assert_eq!(client.resize("v31", 12 * MIB, false).unwrap().size_bytes, 12 * MIB);
    assert_eq!(std::fs::metadata(&image).unwrap().len(), 12 * MIB);
    assert_eq!(queue.write(12 * MIB / 512 - 8, &[9; 4096]), OK);
    assert_eq!(queue.read(12 * MIB / 512 - 8, 8), (OK, vec![9; 4096]));
    assert_eq!(client.resize("v31", 8 * MIB, true).unwrap().size_bytes, 8 * MIB);
    assert_eq!(queue.read(8 * MIB / 512, 8).0, IOERR);
    model.verify(&mut queue);
    model.verify_image(&std::fs::read(&image).unwrap());
}

/// What fails waits, while somebody sees to the store: here, by switching the faults off.
#[test]
fn a_disk_that_stopped_for_a_fault_goes_on_without_it() {
    let setup = Setup::new();
    let image = setup.image(8 * MIB);
    let service = setup
        .volume("golden", &format!("file:{},format=raw,read-only=on", image.display()))
        .volume("low", "fault:golden")
        .volume("bad", "fault:low,errors=100%,error=no-space,on-error=stop")
        .volume("other", "fault:low")
        .vhost_user("bad", "a", "")
        .vhost_user("other", "b", "")
        .vhost_user("golden", "c", "")
        .start()
        .may_complain();
    let client = Client::new(service.control());
    let (_vmm, mut queue) = everyday(&service.path("a"));
    let reader = std::thread::spawn(move || queue.read(0, 8));
    let paused = || service.status().volumes.iter().find(|volume| volume.name == "bad").unwrap().paused;
    eventually("it stops", paused);
    for socket in ["b", "c"] {
        let (_vmm, mut queue) = everyday(&service.path(socket));
        assert_eq!(queue.read(0, 8), (OK, vec![0; 4096]), "others do not notice");
        assert_eq!(queue.write(0, &[1; 512]), IOERR, "what it stands on is read-only");
    }
    client.fault("bad", false).unwrap();
    assert_eq!(client.resume("bad", false).unwrap().requests, 1);
    assert_eq!(reader.join().unwrap(), (OK, vec![0; 4096]));
}
