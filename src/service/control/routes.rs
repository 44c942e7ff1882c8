//! What can be asked of the control API.

#![forbid(unsafe_code)]

use std::sync::Arc;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Bytes};
use hyper::header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use nix::unistd::Uid;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::{BODY_TIME, ControlError, ControlHandler};
use crate::service::metrics::{Format, render};
use crate::service::status::{ApiError, Stopping};

type Answer = Response<Full<Bytes>>;

/// The most bytes in a request's body.
pub(super) const MAX_BODY: usize = 4 << 10;

/// One endpoint.
struct Route {
    /// `NAME` stands for any one segment: the volume's name.
    path: &'static str,
    method: Method,
    /// May block.
    answer: fn(&dyn ControlHandler, &Call) -> Result<Answer, ControlError>,
}

/// What came with the request.
struct Call {
    /// What stood for `NAME`; empty where the path has none.
    name: String,
    /// What the client wants to read.
    accept: String,
    body: Bytes,
}

/// Every endpoint. A path may be there with several methods.
const ROUTES: &[Route] = &[
    Route { path: "/v1/status", method: Method::GET, answer: status },
    Route { path: "/v1/stats", method: Method::GET, answer: stats },
    Route { path: "/metrics", method: Method::GET, answer: metrics },
    Route { path: "/v1/stop", method: Method::POST, answer: stop },
    Route { path: "/v1/volumes", method: Method::POST, answer: add_volume },
    Route { path: "/v1/volumes/NAME/remove", method: Method::POST, answer: remove_volume },
    Route { path: "/v1/exports", method: Method::POST, answer: add_export },
    Route { path: "/v1/exports/remove", method: Method::POST, answer: remove_export },
    Route { path: "/v1/volumes/NAME/resize", method: Method::POST, answer: resize },
    Route { path: "/v1/volumes/NAME/refresh", method: Method::POST, answer: refresh },
    Route { path: "/v1/volumes/NAME/resume", method: Method::POST, answer: resume },
    Route { path: "/v1/volumes/NAME/fault", method: Method::POST, answer: fault },
    Route { path: "/v1/volumes/NAME/limit", method: Method::GET, answer: limits },
    Route { path: "/v1/volumes/NAME/limit", method: Method::POST, answer: limit },
];

fn status(managed: &dyn ControlHandler, call: &Call) -> Result<Answer, ControlError> {
    call.without_body()?;
    Ok(json(StatusCode::OK, &managed.status()))
}

fn stats(managed: &dyn ControlHandler, call: &Call) -> Result<Answer, ControlError> {
    call.without_body()?;
    Ok(json(StatusCode::OK, &managed.stats()))
}

fn metrics(managed: &dyn ControlHandler, call: &Call) -> Result<Answer, ControlError> {
    call.without_body()?;
    let format = Format::accepted(&call.accept);
    let text = render(&managed.status(), &managed.stats(), format);
    let mut answer = Response::new(Full::new(Bytes::from(text)));
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(format.content_type()));
    Ok(answer)
}

fn stop(managed: &dyn ControlHandler, call: &Call) -> Result<Answer, ControlError> {
    managed.request_stop(&call.optional_body()?)?;
    Ok(json(StatusCode::ACCEPTED, &Stopping { stopping: true }))
}

fn add_volume(managed: &dyn ControlHandler, call: &Call) -> Result<Answer, ControlError> {
    Ok(json(StatusCode::OK, &managed.add_volume(&call.body()?)?))
}

fn remove_volume(managed: &dyn ControlHandler, call: &Call) -> Result<Answer, ControlError> {
    call.without_body()?;
    Ok(json(StatusCode::OK, &managed.remove_volume(&call.name)?))
}

fn add_export(managed: &dyn ControlHandler, call: &Call) -> Result<Answer, ControlError> {
    Ok(json(StatusCode::OK, &managed.add_export(&call.body()?)?))
}

fn remove_export(managed: &dyn ControlHandler, call: &Call) -> Result<Answer, ControlError> {
    Ok(json(StatusCode::OK, &managed.remove_export(&call.body()?)?))
}

fn resize(managed: &dyn ControlHandler, call: &Call) -> Result<Answer, ControlError> {
    let resized = managed.resize(&call.name, &call.body()?)?;
    Ok(json(StatusCode::OK, &resized))
}

fn refresh(managed: &dyn ControlHandler, call: &Call) -> Result<Answer, ControlError> {
    let resized = managed.refresh(&call.name, &call.optional_body()?)?;
    Ok(json(StatusCode::OK, &resized))
}

fn resume(managed: &dyn ControlHandler, call: &Call) -> Result<Answer, ControlError> {
    let resumed = managed.resume(&call.name, &call.optional_body()?)?;
    Ok(json(StatusCode::OK, &resumed))
}

fn fault(managed: &dyn ControlHandler, call: &Call) -> Result<Answer, ControlError> {
    let faulted = managed.fault(&call.name, &call.body()?)?;
    Ok(json(StatusCode::OK, &faulted))
}

fn limits(managed: &dyn ControlHandler, call: &Call) -> Result<Answer, ControlError> {
    call.without_body()?;
    Ok(json(StatusCode::OK, &managed.limits(&call.name)?))
}

fn limit(managed: &dyn ControlHandler, call: &Call) -> Result<Answer, ControlError> {
    let limited = managed.limit(&call.name, &call.body()?)?;
    Ok(json(StatusCode::OK, &limited))
}

impl Call {
    /// What a POST asks for.
    fn body<T: DeserializeOwned>(&self) -> Result<T, ControlError> {
        // serde takes a list of values for them with their names, too.
        if self.body.trim_ascii_start().first() == Some(&b'[') {
            return Err(ControlError::Body("the body: a list, expected an object with names".into()));
        }
        serde_json::from_slice(&self.body).map_err(|error| ControlError::Body(format!("the body: {error}")))
    }

    /// The same, where no body asks for nothing special.
    fn optional_body<T: DeserializeOwned + Default>(&self) -> Result<T, ControlError> {
        if self.body.is_empty() { Ok(T::default()) } else { self.body() }
    }

    fn without_body(&self) -> Result<(), ControlError> {
        if self.body.is_empty() {
            Ok(())
        } else {
            Err(ControlError::Body("this request takes no body".into()))
        }
    }
}

/// Finds the endpoint and asks it, on a thread that may block.
pub(super) async fn answer<B>(managed: Arc<dyn ControlHandler>, request: Request<B>) -> Answer
where
    B: Body<Error: Into<Box<dyn std::error::Error + Send + Sync>>>,
{
    let (route, name) = match find(request.method(), request.uri().path()) {
        Ok(found) => found,
        Err(answer) => return *answer,
    };
    let accept =
        request.headers().get(ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default().to_owned();
    let body = match timeout(BODY_TIME, Limited::new(request.into_body(), MAX_BODY).collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        Err(_) => return refused(StatusCode::REQUEST_TIMEOUT, "the body does not come".into()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            let reason = format!("the body is longer than {MAX_BODY} bytes");
            return refused(StatusCode::PAYLOAD_TOO_LARGE, reason);
        }
        Ok(Err(error)) => return refused(StatusCode::BAD_REQUEST, format!("the body: {error}")),
    };
    let call = Call { name, accept, body };
    match tokio::task::spawn_blocking(move || (route.answer)(&*managed, &call)).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(refusal)) => match refusal {
            ControlError::Unknown(name) => {
                refused(StatusCode::NOT_FOUND, format!("there is no volume {name:?}"))
            }
            ControlError::Body(reason) => refused(StatusCode::BAD_REQUEST, reason),
            ControlError::Impossible(reason) => refused(StatusCode::CONFLICT, reason),
        },
        // Panics abort the release build; in a test's build one must not be taken for silence.
        Err(error) => refused(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

/// The answer to somebody who may ask nothing.
pub(super) fn turned_away() -> Answer {
    let own = Uid::effective();
    let reason = match own.is_root() {
        true => "only root may ask this service".to_owned(),
        false => format!("only root and user {own}, who runs it, may ask this service"),
    };
    refused(StatusCode::FORBIDDEN, reason)
}

/// The endpoint for a path, and what stands there for `NAME`.
fn find(method: &Method, path: &str) -> Result<(&'static Route, String), Box<Answer>> {
    let mut here = ROUTES.iter().filter_map(|route| Some((route, matches(route.path, path)?))).peekable();
    if here.peek().is_none() {
        return Err(Box::new(refused(StatusCode::NOT_FOUND, "there is nothing at this path".into())));
    }
    let mut allowed = Vec::new();
    for (route, name) in here {
        if route.method == method {
            return Ok((route, name.to_owned()));
        }
        allowed.push(route.method.as_str());
    }
    let mut answer = refused(StatusCode::METHOD_NOT_ALLOWED, "this path does not take this method".into());
    if let Ok(allowed) = HeaderValue::from_str(&allowed.join(", ")) {
        answer.headers_mut().insert(ALLOW, allowed);
    }
    Err(Box::new(answer))
}

/// What stands for `NAME` in a path of this form, nothing being "". Names need no escapes: see the configuration.
fn matches<'a>(form: &str, path: &'a str) -> Option<&'a str> {
    let mut name = "";
    let mut segments = path.split('/');
    for wanted in form.split('/') {
        let segment = segments.next()?;
        if wanted == "NAME" {
            name = segment;
        } else if wanted != segment {
            return None;
        }
    }
    segments.next().is_none().then_some(name)
}

fn refused(status: StatusCode, error: String) -> Answer {
    json(status, &ApiError { error })
}

fn json(status: StatusCode, body: &impl Serialize) -> Answer {
    let (status, mut text) = match serde_json::to_vec(body) {
        Ok(text) => (status, text),
        // A path that is not UTF-8 has no JSON form; the configuration keeps such paths out.
        Err(error) => {
            log::error!("control: an answer has no JSON form: {error}");
            let text = br#"{"error":"the answer has no JSON form"}"#.to_vec();
            (StatusCode::INTERNAL_SERVER_ERROR, text)
        }
    };
    text.push(b'\n');
    let mut answer = Response::new(Full::new(Bytes::from(text)));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_has_its_form_or_not() {
        let form = "/v1/volumes/NAME/resize";
        assert_eq!(matches(form, "/v1/volumes/root/resize"), Some("root"));
        assert_eq!(matches(form, "/v1/volumes//resize"), Some(""));
        for path in [
            "",
            "/",
            "/v1/volumes/a/b/resize",
            "/v1/volumes/a/resize/",
            "/v1/volumes/a",
            "v1/volumes/a/resize",
        ] {
            assert_eq!(matches(form, path), None, "{path}");
        }
        assert_eq!(matches("/v1/status", "/v1/status"), Some(""));
    }
}
