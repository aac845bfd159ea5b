//! The server itself: state, router, connections, and an end that loses nothing.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;
use tower_http::catch_panic::CatchPanicLayer;
use tracing::Instrument;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;

use super::answering::Answering;
use super::app::App;
use super::batcher::Batcher;
use super::keys::Keys;
use super::options::Options;
use super::problem::Problem;
use super::registry::{Listed, Registry};
use super::store::Store;
use super::{exposition, inference_protocol, page, routes, tei};
use crate::base::problem::Texts;
use crate::encoder::Encoder;
use crate::error::{Error, Result};

/// How long an answer may lie without its client taking any of it.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);

/// How long a client may take to send a request's head, and how long a connection may lie idle: longer than the minute
/// for which load balancers keep theirs, so that it is they who close it, and not while a request is under way.
const HEAD_PATIENCE: Duration = Duration::from_secs(75);

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// A server that listens, and is ready once [`Server::start`] gives it.
pub struct Server {
    app: App,
    listener: TcpListener,
    address: SocketAddr,
}

impl Server {
    /// Listens at `address`, opens the store's list and loads what is pinned. Call it inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// Settings out of range, an address that cannot be had, a store that does not answer, a key file that is wrong, a
    /// pinned task that does not load.
    pub async fn start(encoder: Encoder, store: Store, address: &str, options: Options) -> Result<Server> {
        options.check()?;
        exposition::start()?;
        let keys = options.api_keys.as_deref().map(Keys::load).transpose()?;
        let listener = TcpListener::bind(address).await.map_err(Error::io("listen at", address))?;
        let address = listener.local_addr().map_err(Error::io("listen at", address))?;
        let registry = Arc::new(Registry::new(store, encoder.clone(), options.patch_memory, &options.pins));
        registry.start(options.preload).await?;
        let batcher = Batcher::start(encoder.clone(), options.queue, options.batch_tokens)?;
        let tokenising = Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from));
        let answering = Answering { encoder, registry, batcher, options, tokenising };
        let app = App::new(answering, keys);
        Ok(Server { app, listener, address })
    }

    /// Where it listens: the port that was given out where 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The tasks that the store has, by name.
    pub fn tasks(&self) -> Vec<String> {
        self.app.answering().registry.list().iter().map(|listed| listed.task.to_string()).collect()
    }

    /// A task to try: its name, and how many texts it takes; the first that is live, else the first.
    pub fn example(&self) -> Option<(String, Texts)> {
        let all = self.app.answering().registry.list();
        let live = |listed: &Listed| listed.live.as_ref().map(|live| live.patch.metadata().texts);
        let first = all.iter().find(|listed| live(listed).is_some()).or(all.first())?;
        Some((first.task.to_string(), live(first).unwrap_or(Texts::One)))
    }

    /// Serves until `stop`, then answers what was accepted and ends; past `Options::drain` it ends without.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let Server { app, listener, .. } = self;
        let router = router(app.clone());
        let beside = [tokio::spawn(poll(app.clone())), tokio::spawn(exposition::keep_up())];
        let mut http = hyper::server::conn::http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(HEAD_PATIENCE);
        let graceful = GracefulShutdown::new();
        let places = Arc::new(Semaphore::new(app.options().max_connections));
        let mut stop = std::pin::pin!(stop);
        loop {
            let accepted = async {
                // A place first: what is not accepted waits in the listener's own queue.
                let place = places.clone().acquire_owned().await;
                (place, listener.accept().await)
            };
            let (place, accepted) = tokio::select! {
                accepted = accepted => accepted,
                () = &mut stop => break,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of file descriptors, or a client that went away at once: others still want in.
                    tracing::warn!(%error, "a connection was not accepted");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                }
            };
            stream.set_nodelay(true).ok();
            let service = TowerToHyperService::new(router.clone());
            // An answer that nobody reads must not keep its place for ever.
            let mut stream = TimeoutStream::new(stream);
            stream.set_write_timeout(Some(WRITE_PATIENCE));
            let connection = graceful.watch(http.serve_connection(TokioIo::new(Box::pin(stream)), service));
            tokio::spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "a connection ended");
                }
                drop(place);
            });
        }
        app.drain();
        tracing::info!("stopping: accepted requests are still answered");
        drop(listener);
        beside.iter().for_each(|task| task.abort());
        let ends = Instant::now() + app.options().drain;
        if tokio::time::timeout_at(ends.into(), graceful.shutdown()).await.is_err() {
            tracing::warn!("some connections did not end in time");
        }
        let closing = tokio::task::spawn_blocking(move || app.answering().batcher.close());
        if tokio::time::timeout_at(ends.into(), closing).await.is_err() {
            tracing::warn!("some requests were not answered in time");
        }
    }
}

/// Looks at the store every so often.
async fn poll(app: App) {
    let every = app.options().poll;
    if every.is_zero() {
        return;
    }
    loop {
        tokio::time::sleep(every).await;
        app.answering().registry.poll().await;
    }
}

#[derive(OpenApi)]
#[openapi(info(
    title = "bitfit",
    description = "Every task from one base. The Open Inference Protocol is served at /v2, metrics at /metrics."
))]
struct Document;

/// Every route over a state: a function from requests to responses, with or without a socket.
fn router(app: App) -> axum::Router {
    let (router, mut document) =
        OpenApiRouter::with_openapi(Document::openapi()).merge(routes::router()).merge(tei::router()).split_for_parts();
    document.info.version = env!("CARGO_PKG_VERSION").into();
    let document = document.to_json().unwrap_or_default();
    router
        .merge(inference_protocol::router())
        .merge(page::router())
        .route("/metrics", get(exposition::metrics))
        .route("/openapi.json", get(move || async { page::json(document) }))
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
        .layer(CatchPanicLayer::custom(|_| Problem::internal("a handler has panicked").into_response()))
        .layer(middleware::from_fn(observed))
        .layer(middleware::from_fn(inference_protocol::in_its_form))
        .with_state(app)
}

async fn no_such_route() -> Problem {
    Problem::new(StatusCode::NOT_FOUND, "unknown_route", "there is no such route; GET /docs lists them")
}

async fn no_such_method() -> Problem {
    let message = "this route does not take this method; GET /docs lists what it takes";
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, "unknown_method", message)
}

/// Gives each request an id, a line in the log and its time in the metrics.
async fn observed(matched: Option<MatchedPath>, request: Request, next: Next) -> Response {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let began = Instant::now();
    let given = request.headers().get(&REQUEST_ID).filter(|id| id.len() <= 128).cloned();
    let id = given.unwrap_or_else(|| {
        // Unique among replicas by their start and process.
        static START: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
        let start = START.get_or_init(|| {
            let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            since.as_nanos() as u64 ^ (u64::from(std::process::id()) << 40)
        });
        let text = format!("{start:016x}-{:x}", NUMBER.fetch_add(1, Ordering::Relaxed));
        HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static("none"))
    });
    // The route, not the path: what clients send must not make new series.
    let route = matched.as_ref().map_or("none", MatchedPath::as_str).to_string();
    let span = tracing::info_span!("request", id = id.to_str().unwrap_or(""), method = %request.method(), route);
    let mut response = next.run(request).instrument(span.clone()).await;
    let (status, seconds) = (response.status(), began.elapsed().as_secs_f64());
    metrics::histogram!("bitfit_request_seconds", "route" => route, "status" => status.as_u16().to_string())
        .record(seconds);
    span.in_scope(|| match status.is_server_error() {
        true => tracing::warn!(status = status.as_u16(), seconds, "answered"),
        false => tracing::info!(status = status.as_u16(), seconds, "answered"),
    });
    response.headers_mut().insert(REQUEST_ID, id);
    response
}
