//! What is done to the volume rather than to the service: it grows, and its store runs full.

use super::common::profile::Resize;
use super::report::{Event, Wrong};
use super::round::{Over, REST, Round, VOLUME};
use super::stamp::SECTOR;
use super::store;
use ringblk::service::client::Client;
use std::sync::atomic::Ordering;
use std::time::Instant;

impl Round {
    /// The volume grows by `sectors` under load, and the guest uses it all at once.
    pub fn grow(&mut self, sectors: u64) -> Result<(), Over> {
        let new = {
            let mut log = self.shared.log.lock().unwrap();
            let new = log.len() + sectors;
            log.grow(new);
            new
        };
        let bytes = (new * SECTOR as u64).to_string();
        self.command(&["resize", VOLUME, &bytes])?;
        self.report.event(Event::Resize);
        let (resize, limit) = (self.shape.profile.resize, self.limit);
        let connection = self.guest().vmm.connection().expect("the VMM is connected");
        let told = match resize {
            Resize::Told => connection.await_change(limit),
            Resize::Asks => connection.look_again(),
            // The guest keeps the old size until it is started again.
            Resize::Never => return Ok(()),
        };
        let capacity = connection.capacity();
        if told.is_err() || capacity != new {
            return self.hang(format!("the disk has {capacity} sectors and not {new}: {told:?}"));
        }
        self.shared.capacity.store(new, Ordering::Release);
        Ok(())
    }

    fn command(&self, args: &[&str]) -> Result<(), Over> {
        let control = ["--control", self.paths.control.to_str().expect("a path of ours")];
        self.service.command(&[args, &control].concat()).map_err(|error| {
            self.report.wrong(Wrong::Error, format!("ringblk {args:?}: {error}"));
            Over
        })
    }

    /// The store is full: requests fail, or wait. Then it has room again, and all goes on. Perhaps with a
    /// kill between, where the VMM knows what was in flight.
    pub fn starve(&mut self, policy: &str) -> Result<(), Over> {
        self.shared.lenient.store(policy == "report", Ordering::Release);
        // Whoever waits for room does not hang.
        self.away();
        self.starved(policy)?;
        if self.shape.survives_kill() && self.random.below(2) == 0 {
            self.slay();
            self.service.start();
            self.connect()?;
            self.away();
            self.starved(policy)?;
        }
        self.report.event(Event::Store);
        let (began, used) = (Instant::now(), self.guest().vmm.used());
        let dir = self.paths.image.parent().expect("a directory");
        store::ample(dir).expect("our own mount");
        if policy == "stop" {
            self.command(&["resume", VOLUME])?;
        }
        *self.shared.back.lock().unwrap() = Some(Instant::now());
        self.progress(Event::Store, began, &used)?;
        // What failed is told by now.
        self.rest();
        self.is_over()?;
        self.shared.lenient.store(false, Ordering::Release);
        self.go_on();
        self.scan()
    }

    /// Waits until the store has refused something.
    fn starved(&mut self, policy: &str) -> Result<(), Over> {
        let (client, began) = (Client::new(&self.paths.control), Instant::now());
        let failed = self.report.failed();
        loop {
            let volume = client.status().ok().and_then(|mut status| status.volumes.pop());
            let is = volume.is_some_and(|volume| match policy {
                "stop" => volume.paused,
                "retry" => volume.waiting > 0,
                _ => self.report.failed() > failed,
            });
            if is {
                return Ok(());
            }
            self.is_over()?;
            if began.elapsed() > self.limit {
                return self.hang("the store does not fill".into());
            }
            std::thread::sleep(REST);
        }
    }
}
