//! A service between its first moment and its last: what is being made, and what is asked of it meanwhile.

#![forbid(unsafe_code)]

use super::late::Attempts;
use super::open::Opened;
use super::signals::Signals;
use super::{Error, Service, Shared, lock};
use crate::engine::nbd;
use crate::service::config::Config;
use crate::service::control;
use crate::service::exports::ShutdownMode;
use crate::service::exports::vhost_user::Endpoint;
use crate::worker::WorkerHandle;
use std::io;
use std::panic::resume_unwind;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;
use tokio::sync::oneshot;

/// Between two lines about requests that a stop waits for because the store failed.
const HELD_UP_EVERY: Duration = Duration::from_secs(5);

/// How long requests that were given up may take to fail.
const ABANDON_LIMIT: Duration = Duration::from_secs(5);

/// Opens the volumes, however long that takes. `None` where a signal asks for the end first: nothing has been made by then
/// that does not go with the process, and no server is waited for.
///
/// # Errors
/// Why the service cannot begin.
pub(super) fn open(
    config: &Arc<Config>,
    runtime: &tokio_uring::Runtime,
    signals: &mut Signals,
) -> Result<Option<Opened>, Error> {
    let (done, opened) = oneshot::channel();
    let of = config.clone();
    let open = move || {
        let result = Opened::of(&of);
        let _ = done.send(());
        result
    };
    let opening = match thread::Builder::new().name("ringblk-open".into()).spawn(open) {
        Ok(opening) => opening,
        // Without a thread, here and now.
        Err(_) => return Opened::of(config).map(Some).map_err(Error::Volume),
    };
    let interrupted = runtime.block_on(async {
        tokio::select! {
            biased;
            () = signals.next() => true,
            // An error is its panic.
            _ = opened => false,
        }
    });
    if interrupted {
        return Ok(None);
    }
    // It is over, and we are alone again, as the sandbox wants us.
    let opened = opening.join().unwrap_or_else(|panic| resume_unwind(panic));
    opened.map(Some).map_err(Error::Volume)
}

/// Has a thread start the exports, so that we hear signals meanwhile: the kernel reads each new disk's partition table, which
/// takes as long as its store does. What it returns hears when they are there. A stop sees it to its end.
///
/// # Errors
/// When there is no thread.
pub(super) fn begin(
    shared: &Arc<Shared>,
    config: Arc<Config>,
    endpoints: Vec<Endpoint>,
    attempts: Vec<Attempts>,
) -> Result<oneshot::Receiver<Result<(), Error>>, Error> {
    let (tell, begun) = oneshot::channel();
    let (shared, arrival) = (shared.clone(), shared.arrivals.begin());
    let begin = move || {
        let result = shared
            .add_exports(&config, endpoints)
            .and_then(|()| attempts.into_iter().try_for_each(|each| each.start(&shared)))
            .map(|()| shared.follow_growth());
        // Ahead of the answer: who takes everything down after it does not wait for us.
        drop(arrival);
        let _ = tell.send(result);
    };
    thread::Builder::new().name("ringblk-begin".into()).spawn(begin).map_err(Error::Thread)?;
    Ok(begun)
}

impl Service {
    /// Answers on the control socket, once everything is there, until told to stop, and stops.
    pub(super) async fn until_stopped(self, mut signals: Signals) -> Result<(), Error> {
        let Service { control, mut monitor, shared, begun } = self;
        let (gone, all_gone) = oneshot::channel::<()>();
        let (mut control, mut answering) = (Some(control), None);
        let mut showing = None;
        let mut signalled = {
            let mut asked = pin!(shared.asked_to_stop(&mut signals));
            let early = tokio::select! {
                biased;
                signalled = &mut asked => Some(signalled),
                result = begun => {
                    let ended = |_| Err(Error::Thread(io::Error::other("it has ended")));
                    if let Err(error) = result.unwrap_or_else(ended) {
                        if let Err(left) = shared.take_down(ShutdownMode::Withdraw) {
                            log::error!("{left}");
                        }
                        return Err(error);
                    }
                    None
                }
            };
            match early {
                Some(signalled) => signalled,
                None => {
                    answering = control.take().map(|control| {
                        tokio::task::spawn_local(control::serve(control, shared.clone(), async {
                            // An error is the sender's being dropped, which says the same.
                            let _ = all_gone.await;
                        }))
                    });
                    showing =
                        monitor.take().map(|monitor| tokio::task::spawn_local(monitor.serve(shared.clone())));
                    asked.await
                }
            }
        };
        shared.stopping.store(true, Ordering::Relaxed);
        let farewell = *lock(&shared.farewell).get_or_insert(ShutdownMode::Stop);
        log::info!("stopping: waiting for requests in flight");
        let (done, mut finished) = oneshot::channel();
        let stopper = shared.clone();
        thread::Builder::new()
            .name("ringblk-stop".into())
            .spawn(move || done.send(stopper.take_down(farewell)))
            .map_err(Error::Control)?;
        let pending_reason = async {
            loop {
                shared.all_served().iter().filter_map(|served| served.volume.pending_reason()).for_each(
                    |why| {
                        log::warn!("stopping: {why}");
                    },
                );
                tokio::time::sleep(HELD_UP_EVERY).await;
            }
        };
        tokio::pin!(pending_reason);
        let result = loop {
            tokio::select! {
                () = &mut pending_reason => unreachable!("it goes on for ever"),
                result = &mut finished => break result.unwrap_or(Ok(())),
                () = signals.next() => {}
            }
            // systemd sends its own when the command that asked for a hand-over has taken too long.
            if !std::mem::replace(&mut signalled, true) {
                log::info!("stopping already: one more signal gives up on what is in flight");
                continue;
            }
            let asked = shared.clone();
            let left = tokio::task::spawn_blocking(move || asked.in_flight()).await.unwrap_or_default();
            let Some(left) = left else {
                log::info!("stopping already, and nothing is in flight that could be given up");
                continue;
            };
            log::warn!("giving up on what is in flight: {left}");
            shared.handles.iter().for_each(WorkerHandle::abandon);
            // A ublk device keeps the process until its requests are answered, if only with an error.
            let _ = tokio::time::timeout(ABANDON_LIMIT, finished).await;
            break Err(Error::Abandoned(left));
        };
        nbd::farewell();
        drop(gone);
        if let Some(answering) = answering {
            match answering.await {
                Ok(answered) => answered.map_err(Error::Control)?,
                Err(error) => log::warn!("control: {error}"),
            }
        }
        if let Some(showing) = showing {
            showing.abort();
            // Until its socket is gone. An error is that it was aborted, as it was told to be.
            let _ = showing.await;
        }
        if result.is_ok() {
            log::info!("stopped");
        }
        result
    }
}

impl Shared {
    /// Waits until somebody asks for the service's end. Whether by a signal.
    async fn asked_to_stop(&self, signals: &mut Signals) -> bool {
        let mut warned = false;
        loop {
            tokio::select! {
                () = signals.next() => {}
                () = self.stop.notified() => return false,
            }
            match self.in_use() {
                Some(reason) if !warned => {
                    warned = true;
                    log::error!("not stopped: {reason}. Once more stops it all the same");
                }
                _ => return true,
            }
        }
    }
}
