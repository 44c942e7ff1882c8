//! Looks at a service, shared by those who ask at the same time.

#![forbid(unsafe_code)]

use super::FRESH;
use crate::service::control::ControlHandler;
use crate::service::metrics::{Format, render};
use hyper::body::Bytes;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::Mutex;

/// What is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Metrics(Format),
    Stats,
}

impl What {
    /// The metrics, for a client that accepts such media types.
    pub fn metrics(accept: &str) -> What {
        What::Metrics(Format::accepted(accept))
    }

    pub fn content_type(self) -> &'static str {
        match self {
            What::Metrics(format) => format.content_type(),
            What::Stats => "application/json",
        }
    }

    /// Which of the answers it is.
    fn index(self) -> usize {
        match self {
            What::Metrics(Format::Prometheus) => 0,
            What::Metrics(Format::OpenMetrics) => 1,
            What::Stats => 2,
        }
    }

    /// May block: some of what it asks is locked while an export starts or a volume is resized.
    fn of(self, service: &dyn ControlHandler) -> Option<String> {
        match self {
            What::Metrics(format) => Some(render(&service.status(), &service.stats(), format)),
            What::Stats => serde_json::to_string(&service.stats()).ok(),
        }
    }
}

/// The last answers, and when they were made.
type Answers = [Option<(Instant, Bytes)>; 3];

/// See the module.
pub(super) struct Looks {
    service: Arc<dyn ControlHandler>,
    answers: Arc<Mutex<Answers>>,
}

impl Looks {
    pub fn new(service: Arc<dyn ControlHandler>) -> Looks {
        Looks { service, answers: Arc::default() }
    }

    /// The answer, at most [`FRESH`] old; `None` where it has no form.
    pub async fn at(&self, what: What) -> Option<Bytes> {
        // It goes with the look and not with who asked for it: clients that leave do not leave a crowd of looks behind.
        let mut answers = Arc::clone(&self.answers).lock_owned().await;
        let fresh = |(made, _): &&(Instant, Bytes)| made.elapsed() < FRESH;
        if let Some((_, text)) = answers[what.index()].as_ref().filter(fresh) {
            return Some(text.clone());
        }
        let service = Arc::clone(&self.service);
        let look = tokio::task::spawn_blocking(move || {
            let text = Bytes::from(what.of(&*service)?);
            answers[what.index()] = Some((Instant::now(), text.clone()));
            Some(text)
        });
        look.await.ok().flatten()
    }
}
