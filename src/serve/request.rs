//! What every route reads of a request, within limits: who asks, its body, its deadline, the task that its path names.

use std::fmt;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use axum::body::{Body, to_bytes};
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::HeaderMap;
use axum::http::request::Parts;
use bytes::Bytes;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use tokio::sync::OwnedSemaphorePermit;

use super::app::App;
use super::keys::Role;
use super::name::TaskName;
use super::problem::Problem;
use super::store::MAX_PATCH_BYTES;

/// How long the body of a request may take to arrive.
const BODY_PATIENCE: Duration = Duration::from_secs(30);

/// A request's own deadline in milliseconds, where it wants a shorter one than the server's.
pub(super) const DEADLINE_HEADER: &str = "x-deadline-ms";

/// [`DEADLINE_HEADER`], for the document of the API.
#[derive(utoipa::IntoParams)]
#[into_params(parameter_in = Header)]
#[allow(dead_code, reason = "only its description is used")]
pub(super) struct DeadlineHeader {
    /// Milliseconds after which to give up (504), where the server's own deadline is longer.
    #[param(rename = "x-deadline-ms", required = false, minimum = 1, maximum = 4_294_967_295_u64)]
    ms: u32,
}

/// Proof that the request may ask.
pub(super) struct MayRead;

/// Proof that the request may change the store.
pub(super) struct MayChange;

impl FromRequestParts<App> for MayRead {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        app.check_key(&parts.headers, Role::Read).map(|()| MayRead)
    }
}

impl FromRequestParts<App> for MayChange {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        app.check_key(&parts.headers, Role::Admin)?;
        if app.options().read_only {
            let status = axum::http::StatusCode::FORBIDDEN;
            return Err(Problem::new(status, "read_only", "this server was started with --read-only"));
        }
        Ok(MayChange)
    }
}

/// The task that a path names. A name that none could have is unknown like any other.
pub(super) struct OfTask(pub TaskName);

impl FromRequestParts<App> for OfTask {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let named = Path::<String>::from_request_parts(parts, app).await;
        let Ok(Path(name)) = named else { return Err(Problem::unknown_task("")) };
        name.parse().map(OfTask).map_err(|_| Problem::unknown_task(&name))
    }
}

/// When a request is given up.
pub(super) struct Deadline(pub Instant);

impl FromRequestParts<App> for Deadline {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let most = app.options().deadline;
        let own = match parts.headers.get(DEADLINE_HEADER) {
            None => most,
            Some(value) => {
                let ms = value.to_str().ok().and_then(|text| text.parse::<u32>().ok()).filter(|ms| *ms > 0);
                let refuse = || {
                    Problem::invalid(format!(
                        "{DEADLINE_HEADER}: expected 1 to {} milliseconds, found {value:?}",
                        u32::MAX
                    ))
                };
                Duration::from_millis(ms.ok_or_else(refuse)?.into()).min(most)
            }
        };
        Ok(Deadline(Instant::now() + own))
    }
}

/// A body as JSON of type `T`, whatever its `Content-Type` says.
pub(super) struct Json<T>(pub T);

impl<T: DeserializeOwned> FromRequest<App> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &App) -> Result<Self, Problem> {
        let (_, bytes) = whole(request, app.options().max_body).await?;
        json(&bytes).map(Json)
    }
}

/// A body as JSON that may have bytes behind it, with the headers that say where they begin.
pub(super) struct Raw(pub HeaderMap, pub Bytes);

impl FromRequest<App> for Raw {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &App) -> Result<Self, Problem> {
        let (headers, bytes) = whole(request, app.options().max_body).await?;
        Ok(Raw(headers, bytes))
    }
}

/// A body that is a patch file, or nothing.
pub(super) struct PatchBytes {
    pub bytes: Bytes,
    /// Bodies that lie in memory at once are few.
    pub _place: OwnedSemaphorePermit,
}

impl FromRequest<App> for PatchBytes {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &App) -> Result<Self, Problem> {
        let place = tokio::time::timeout(BODY_PATIENCE, app.uploads().acquire_owned()).await;
        let _place = place.map_err(|_| Problem::busy_uploads())?.map_err(|_| Problem::draining())?;
        Ok(PatchBytes { bytes: whole(request, MAX_PATCH_BYTES as usize).await?.1, _place })
    }
}

/// JSON of a type: 400 where it is none, 422 where it is another.
pub(super) fn json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    let text = std::str::from_utf8(bytes).map_err(|e| Problem::malformed(format!("the body is not UTF-8: {e}")))?;
    let not_json = |e: serde_json::Error| Problem::malformed(format!("the body is not JSON: {e}"));
    serde_json::from_str(text).map(|Object(value)| value).map_err(|e| match e.classify() {
        // The wrong type came first; what follows it may still be no JSON.
        serde_json::error::Category::Data => match serde_json::from_str::<serde::de::IgnoredAny>(text) {
            Ok(_) => Problem::invalid(e.to_string()),
            Err(e) => not_json(e),
        },
        _ => not_json(e),
    })
}

/// A JSON object of a type. What serde derives would take an array of the fields' values as well.
struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct OfMap<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for OfMap<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }

        from.deserialize_map(OfMap(PhantomData))
    }
}

/// An array of objects, for `#[serde(deserialize_with)]`.
pub(super) fn objects<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Vec<T>, D::Error> {
    Vec::<Object<T>>::deserialize(from).map(|all| all.into_iter().map(|Object(value)| value).collect())
}

/// The whole body, where it comes in time and is not above the limit.
async fn whole(request: Request, limit: usize) -> Result<(HeaderMap, Bytes), Problem> {
    let (parts, body): (Parts, Body) = request.into_parts();
    let encoding = parts.headers.get(axum::http::header::CONTENT_ENCODING);
    if let Some(encoding) = encoding.filter(|encoding| *encoding != "identity") {
        let message = format!("content-encoding: bodies are taken as they are, found {encoding:?}");
        return Err(Problem::new(axum::http::StatusCode::UNSUPPORTED_MEDIA_TYPE, "encoded", message));
    }
    let too_large = || Problem::too_large(format!("expected a body of at most {limit} bytes"));
    let announced = parts.headers.get(axum::http::header::CONTENT_LENGTH).and_then(|v| v.to_str().ok());
    if announced.and_then(|n| n.parse::<u64>().ok()).is_some_and(|n| n > limit as u64) {
        return Err(too_large());
    }
    let late =
        |_| Problem::new(axum::http::StatusCode::REQUEST_TIMEOUT, "slow_body", "the body took too long to arrive");
    let read = tokio::time::timeout(BODY_PATIENCE, to_bytes(body, limit)).await.map_err(late)?;
    let bytes = read.map_err(|e| {
        let limited =
            std::error::Error::source(&e).is_some_and(|source| source.is::<http_body_util::LengthLimitError>());
        if limited { too_large() } else { Problem::malformed("the body ended before it was whole") }
    })?;
    Ok((parts.headers, bytes))
}
