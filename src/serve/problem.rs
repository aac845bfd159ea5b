//! What a client is told when its request is not carried out: a status, a code to match on, and a sentence.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::error::{Error, Kind};

/// `{"error": {"code": .., "message": ..}}` and its status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    pub status: StatusCode,
    pub code: &'static str,
    pub message: String,
    /// Seconds after which a request that met a full queue, or too many uploads, may be tried again.
    pub retry_after_s: Option<u64>,
}

impl Problem {
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Problem { status, code, message: message.into(), retry_after_s: None }
    }

    /// 400: what came is not JSON, or no whole request.
    pub(super) fn malformed(message: impl Into<String>) -> Self {
        Problem::new(StatusCode::BAD_REQUEST, "malformed", message)
    }

    /// 404: no task of that name.
    pub(super) fn unknown_task(task: &str) -> Self {
        let shown: String = task.chars().take(64).collect();
        Problem::new(
            StatusCode::NOT_FOUND,
            "unknown_task",
            format!("there is no task {shown:?}; GET /v1/tasks lists them"),
        )
    }

    /// 413: more than a limit allows.
    pub(super) fn too_large(message: impl Into<String>) -> Self {
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message)
    }

    /// 422: well-formed, and cannot be carried out as asked.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid", message)
    }

    /// 500: a defect.
    pub(super) fn internal(message: impl Into<String>) -> Self {
        Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    }

    /// 429: the queue is full; `after_s` is when there should be room.
    pub(super) fn queue_full(after_s: u64) -> Self {
        let message = format!("the queue is full; try again in {after_s} s, or on another replica");
        let problem = Problem::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message);
        Problem { retry_after_s: Some(after_s), ..problem }
    }

    /// 429: as many uploads as there may be are on their way.
    pub(super) fn busy_uploads() -> Self {
        let problem = Problem::new(StatusCode::TOO_MANY_REQUESTS, "busy", "too many uploads at once; try again");
        Problem { retry_after_s: Some(1), ..problem }
    }

    /// 503: the server is stopping.
    pub(super) fn draining() -> Self {
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, "draining", "this server is stopping; ask another replica")
    }

    /// 504: not answered in time.
    pub(super) fn late() -> Self {
        let message = "not answered within its deadline: x-deadline-ms, at most the server's --deadline";
        Problem::new(StatusCode::GATEWAY_TIMEOUT, "deadline", message)
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let full = matches!(&error, Error::Io { reason, .. } if reason.kind() == std::io::ErrorKind::StorageFull);
        let (status, code) = match error.kind() {
            Kind::Usage => (StatusCode::UNPROCESSABLE_ENTITY, "invalid"),
            Kind::Content => (StatusCode::UNPROCESSABLE_ENTITY, "bad_patch"),
            Kind::WrongBase => (StatusCode::CONFLICT, "wrong_base"),
            Kind::Io if full => (StatusCode::INSUFFICIENT_STORAGE, "store_full"),
            Kind::Io | Kind::Hub => (StatusCode::SERVICE_UNAVAILABLE, "store_unreachable"),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, "internal"),
        };
        Problem::new(status, code, error.to_string())
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = json!({"error": {"code": self.code, "message": &self.message}}).to_string();
        let mut response = (self.status, [(header::CONTENT_TYPE, "application/json")], body).into_response();
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        // For those who give it another form.
        response.extensions_mut().insert(self);
        response
    }
}
