//! The pages for people: `/` to try the tasks by hand, `/docs` to read the API. They carry all they need.

use axum::Router;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use super::app::App;

/// Nothing from elsewhere, no frame around: a page that holds a key must not be steered by others.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The routes of this file.
pub(super) fn router() -> Router<App> {
    const HTML: &str = "text/html; charset=utf-8";
    const SCRIPT: &str = "text/javascript; charset=utf-8";
    const STYLE: &str = "text/css; charset=utf-8";
    Router::new()
        .route("/", get(|| async { file(HTML, include_str!("page/index.html")) }))
        .route("/docs", get(|| async { file(HTML, include_str!("page/docs.html")) }))
        .route("/page/try.js", get(|| async { file(SCRIPT, include_str!("page/try.js")) }))
        .route("/page/docs.js", get(|| async { file(SCRIPT, include_str!("page/docs.js")) }))
        .route("/page/style.css", get(|| async { file(STYLE, include_str!("page/style.css")) }))
}

/// A JSON document.
pub(super) fn json(text: String) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], text).into_response()
}

fn file(kind: &'static str, text: &'static str) -> Response {
    let mut response = ([(header::CONTENT_TYPE, kind)], text).into_response();
    let headers = [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::CACHE_CONTROL, "no-cache"),
        (HeaderName::from_static("x-content-type-options"), "nosniff"),
    ];
    for (name, value) in headers {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}
