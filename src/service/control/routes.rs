//! What can be asked of the control API.

#![forbid(unsafe_code)]

use http_body_util::Full;
use hyper::body::{Body, Bytes};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use serde::Serialize;

use super::Managed;
use crate::service::status::{ApiError, Stopping};

type Answer = Response<Full<Bytes>>;

/// One endpoint.
struct Route {
    path: &'static str,
    method: Method,
    answer: fn(&dyn Managed) -> Answer,
}

/// Every endpoint. A path may be there with several methods.
const ROUTES: &[Route] = &[
    Route { path: "/v1/status", method: Method::GET, answer: status },
    Route { path: "/v1/stop", method: Method::POST, answer: stop },
];

fn status(managed: &dyn Managed) -> Answer {
    json(StatusCode::OK, &managed.status())
}

fn stop(managed: &dyn Managed) -> Answer {
    managed.request_stop();
    json(StatusCode::ACCEPTED, &Stopping { stopping: true })
}

/// Finds the endpoint and asks it.
pub(super) fn answer<B: Body>(managed: &dyn Managed, request: &Request<B>) -> Answer {
    let path = request.uri().path();
    let here: Vec<&Route> = ROUTES.iter().filter(|route| route.path == path).collect();
    if here.is_empty() {
        return error(StatusCode::NOT_FOUND, "there is nothing at this path");
    }
    let Some(route) = here.iter().find(|route| route.method == request.method()) else {
        let allowed: Vec<&str> = here.iter().map(|route| route.method.as_str()).collect();
        let mut answer = error(StatusCode::METHOD_NOT_ALLOWED, "this path does not take this method");
        if let Ok(allowed) = HeaderValue::from_str(&allowed.join(", ")) {
            answer.headers_mut().insert(ALLOW, allowed);
        }
        return answer;
    };
    // Nothing here takes a body, so none is ever read: the limit on its size is zero.
    if !request.body().is_end_stream() {
        return error(StatusCode::PAYLOAD_TOO_LARGE, "this request takes no body");
    }
    (route.answer)(managed)
}

fn error(status: StatusCode, reason: &str) -> Answer {
    let body = ApiError { error: reason.to_owned() };
    json(status, &body)
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
