//! What the handlers of all routes share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use axum::http::HeaderMap;
use tokio::sync::Semaphore;

use super::answering::Answering;
use super::keys::{Keys, Role};
use super::options::Options;
use super::problem::Problem;

/// Uploads whose bodies lie in memory at once.
const UPLOADS_AT_ONCE: usize = 8;

/// What handlers share. Clones are the same.
#[derive(Clone)]
pub(super) struct App(Arc<Shared>);

struct Shared {
    answering: Answering,
    keys: Option<Keys>,
    uploads: Arc<Semaphore>,
    is_draining: AtomicBool,
    began: Instant,
}

impl App {
    pub(super) fn new(answering: Answering, keys: Option<Keys>) -> App {
        let uploads = Arc::new(Semaphore::new(UPLOADS_AT_ONCE));
        App(Arc::new(Shared { answering, keys, uploads, is_draining: AtomicBool::new(false), began: Instant::now() }))
    }

    pub(super) fn answering(&self) -> &Answering {
        &self.0.answering
    }

    pub(super) fn options(&self) -> &Options {
        &self.0.answering.options
    }

    /// Places for the bodies of uploads.
    pub(super) fn uploads(&self) -> Arc<Semaphore> {
        self.0.uploads.clone()
    }

    pub(super) fn uptime_s(&self) -> f64 {
        self.0.began.elapsed().as_secs_f64()
    }

    /// Whether a request's key allows what it asks; always where the server knows no keys.
    pub(super) fn check_key(&self, headers: &HeaderMap, needed: Role) -> Result<(), Problem> {
        self.0.keys.as_ref().map_or(Ok(()), |keys| keys.check(headers, needed))
    }

    /// From here on no new requests should come.
    pub(super) fn drain(&self) {
        self.0.is_draining.store(true, Ordering::Relaxed);
    }

    /// Whether new requests should come here.
    pub(super) fn ready(&self) -> Result<(), Problem> {
        if self.0.is_draining.load(Ordering::Relaxed) { Err(Problem::draining()) } else { Ok(()) }
    }
}
