//! One service, one volume, one guest at a time, and what befalls them.

use super::common::model::Random;
use super::common::player::Broken;
use super::guest::{Guest, Shape};
use super::log::Log;
use super::queue::Shared;
use super::report::{Event, Report, Wrong};
use super::service::Service;
use super::stamp::{Content, SECTOR};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// The volume's name.
pub const VOLUME: &str = "soak";
/// Between two looks at something that is about to happen.
pub const REST: Duration = Duration::from_micros(200);

/// Something is so wrong that the round cannot go on; it is in the report.
pub struct Over;

/// Where things are.
pub struct Paths {
    pub image: PathBuf,
    pub socket: PathBuf,
    pub control: PathBuf,
}

/// What a round consists of.
pub struct Round {
    pub shape: Shape,
    pub service: Service,
    pub paths: Paths,
    pub shared: Arc<Shared>,
    pub report: Arc<Report>,
    pub random: Random,
    pub limit: Duration,
    guest: Option<Guest>,
}

impl Round {
    /// A service that was just started, on a volume with this log, and nobody who uses it.
    pub fn new(
        shape: Shape,
        service: Service,
        paths: Paths,
        log: Log,
        limit: Duration,
        report: &Arc<Report>,
    ) -> Round {
        let random = Random::new(log.seed());
        let shared = Arc::new(Shared::new(log, limit, report));
        Round { shape, service, paths, shared, report: report.clone(), random, limit, guest: None }
    }

    /// Whoever uses the volume now.
    pub fn guest(&mut self) -> &mut Guest {
        self.guest.as_mut().expect("there is a guest from the start on")
    }

    /// Notes a hang, with what the service said last.
    pub fn hang<T>(&self, text: String) -> Result<T, Over> {
        self.report
            .wrong(Wrong::Hang, format!("{text}; the service's log ends:\n{}", self.service.log_tail()));
        Err(Over)
    }

    /// Tries until it succeeds; the service may have to be started again meanwhile.
    fn insist<T>(
        &mut self,
        what: &str,
        mut attempt: impl FnMut(&mut Round) -> Result<T, Broken>,
    ) -> Result<T, Over> {
        let began = Instant::now();
        loop {
            match attempt(self) {
                Ok(value) => return Ok(value),
                Err(error) if began.elapsed() > self.limit => {
                    return self.hang(format!("no {what} within {:?}: {error}", self.limit));
                }
                Err(_) => std::thread::sleep(REST),
            }
            self.service.revive(&self.report);
        }
    }

    /// A new guest on a service that may just be starting.
    pub fn boot(&mut self) -> Result<(), Over> {
        let limit = self.limit;
        let seed = self.random.number();
        // One that meets a service that dies is started again, whole.
        self.insist("guest", |round| {
            let connection = round.shape.connect(&round.paths.socket, limit)?;
            round.shared.capacity.store(connection.capacity(), Ordering::Release);
            let mut guest = Guest::new(&round.shape, &round.shared, connection, seed);
            guest.vmm.start()?;
            round.guest = Some(guest);
            Ok(())
        })?;
        *self.shared.back.lock().unwrap() = Some(Instant::now());
        // With the new session begun, the old one's requests are done, one way or the other.
        self.shared.log.lock().unwrap().abandon();
        self.shared.scanned.store(self.shared.scan.load(Ordering::Acquire), Ordering::Release);
        self.guest().run();
        Ok(())
    }

    /// The VMM connects, as often as it takes.
    pub fn connect(&mut self) -> Result<(), Over> {
        let (socket, limit) = (self.paths.socket.clone(), self.limit);
        self.insist("connection", |round| round.guest().vmm.reconnect(&socket, limit))?;
        *self.shared.back.lock().unwrap() = Some(Instant::now());
        Ok(())
    }

    /// Whether a queue has given up.
    pub fn is_over(&self) -> Result<(), Over> {
        if self.shared.halt.load(Ordering::Acquire) { Err(Over) } else { Ok(()) }
    }

    /// Waits for the first completion after `used`, which was `began` ago.
    pub fn progress(&mut self, event: Event, began: Instant, used: &[u16]) -> Result<(), Over> {
        while self.guest().vmm.used() == used {
            self.is_over()?;
            if began.elapsed() > 2 * self.limit {
                return self.hang("no completion after a restart".into());
            }
            std::thread::sleep(REST);
        }
        self.report.pause(event, began.elapsed());
        Ok(())
    }

    /// From now on nobody can expect an answer.
    pub fn away(&self) {
        *self.shared.back.lock().unwrap() = None;
    }

    /// SIGKILL, and a new service at once.
    pub fn kill(&mut self) -> Result<(), Over> {
        let began = Instant::now();
        self.slay();
        let used = self.guest().vmm.used();
        if self.random.below(4) == 0 {
            self.check_image();
        }
        self.service.start();
        self.connect()?;
        self.progress(Event::Kill, began, &used)
    }

    /// SIGKILL, half of the time when a batch was just given back.
    pub fn slay(&mut self) {
        self.away();
        if self.random.below(2) == 0 {
            self.await_batch();
        }
        self.service.kill();
        self.report.event(Event::Kill);
        let caught = self.guest().vmm.in_flight();
        self.report.caught(caught);
    }

    /// Until the service has just given something back, when it has the most to note.
    fn await_batch(&mut self) {
        let (began, used) = (Instant::now(), self.guest().vmm.used());
        while self.guest().vmm.used() == used && began.elapsed() < Duration::from_millis(5) {
            std::hint::spin_loop();
        }
    }

    /// SIGKILL, and again at a random moment of the start and handshake that follow.
    pub fn kill_twice(&mut self) -> Result<(), Over> {
        let began = Instant::now();
        self.slay();
        for _ in 0..1 + self.random.below(3) {
            self.service.start();
            let delay = Duration::from_micros(self.random.below(40_000));
            let (socket, limit) = (self.paths.socket.clone(), self.limit);
            let Round { guest, service, .. } = self;
            let vmm = &mut guest.as_mut().expect("there is a guest from the start on").vmm;
            std::thread::scope(|scope| {
                let deadline = Instant::now() + delay;
                // In vain or not, it is cut off.
                scope.spawn(move || {
                    while Instant::now() < deadline && vmm.reconnect(&socket, limit).is_err() {
                        std::thread::sleep(REST);
                    }
                });
                std::thread::sleep(delay);
                service.kill();
            });
            self.report.event(Event::Kill);
        }
        let used = self.guest().vmm.used();
        self.service.start();
        self.connect()?;
        self.progress(Event::Kill, began, &used)
    }

    /// A planned restart under load. A VMM that does not survive it is started again, too.
    pub fn restart(&mut self) -> Result<(), Over> {
        let began = Instant::now();
        self.away();
        self.service.stop(self.limit, &self.report);
        self.report.event(Event::Stop);
        if !self.shape.survives_stop() {
            self.guest = None;
            self.report.event(Event::Vmm);
            self.service.start();
            return self.boot();
        }
        let used = self.guest().vmm.used();
        self.service.start();
        self.connect()?;
        self.progress(Event::Stop, began, &used)
    }

    /// The VMM dies; another one begins with fresh rings.
    pub fn kill_vmm(&mut self) -> Result<(), Over> {
        self.away();
        if self.random.below(2) == 0 {
            // The rings live on for a moment with nobody connected.
            self.guest().vmm.disconnect();
        }
        self.guest = None;
        self.report.event(Event::Vmm);
        self.boot()
    }

    /// Both die.
    pub fn kill_both(&mut self) -> Result<(), Over> {
        self.slay();
        self.guest = None;
        self.report.event(Event::Vmm);
        self.service.start();
        self.boot()
    }

    /// Nothing is in flight any more.
    pub fn rest(&mut self) {
        self.guest().drain();
    }

    /// The load begins again.
    pub fn go_on(&mut self) {
        self.guest().run();
    }

    /// From now on nothing is written. Only between [`Round::rest`] and [`Round::go_on`].
    pub fn only_read(&mut self) {
        self.guest().only_read();
    }

    /// The whole volume is read under load.
    pub fn scan(&mut self) -> Result<(), Over> {
        let number = self.shared.scan.fetch_add(1, Ordering::AcqRel) + 1;
        let began = Instant::now();
        while self.shared.scanned.load(Ordering::Acquire) < number {
            self.is_over()?;
            if began.elapsed() > 2 * self.limit {
                return self.hang("a scan of the volume does not end".into());
            }
            std::thread::sleep(REST);
        }
        Ok(())
    }

    /// The image itself, behind the service's back.
    pub fn check_image(&self) {
        const CHUNK: usize = 1 << 20;
        let file = File::open(&self.paths.image).expect("the image is there");
        let mut bytes = vec![0; CHUNK];
        let len = self.shared.log.lock().unwrap().len();
        for sector in (0..len).step_by(CHUNK / SECTOR) {
            let count = ((len - sector) as usize).min(CHUNK / SECTOR);
            let began = self.shared.log.lock().unwrap().begin_read();
            file.read_exact_at(&mut bytes[..count * SECTOR], sector * SECTOR as u64)
                .expect("the image can be read");
            let contents = Content::of_all(&bytes[..count * SECTOR]);
            let faults = self.shared.log.lock().unwrap().read(began, sector, &contents);
            self.report.faults(faults);
        }
    }

    /// Ends it: nothing in flight, all of the volume checked through the export and in the image.
    pub fn finish(mut self) -> Result<(), Over> {
        self.scan()?;
        self.rest();
        self.is_over()?;
        self.service.stop(self.limit, &self.report);
        self.check_image();
        Ok(())
    }
}
