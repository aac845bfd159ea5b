//! `/metrics`, for Prometheus. It needs no key: scrapers and autoscalers seldom have one, and it names no task and no text.

use std::sync::OnceLock;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use super::app::App;
use super::problem::Problem;
use crate::error::{Error, Result};

/// The recorder is the process's: servers in one process share it, as tests do.
static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();

/// How often what was recorded is worked up.
const UPKEEP: Duration = Duration::from_secs(5);
/// Seconds: from a single short text to a full queue.
const SECONDS: [f64; 14] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
/// Tokens of a batch.
const TOKENS: [f64; 11] = [16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// Starts to record, where the process does not yet.
///
/// # Errors
///
/// Where another recorder is installed.
pub(super) fn start() -> Result<()> {
    if RECORDER.get().is_some() {
        return Ok(());
    }
    let failed = |e: metrics_exporter_prometheus::BuildError| Error::Audit(format!("metrics: {e}"));
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS)
        .and_then(|builder| builder.set_buckets_for_metric(Matcher::Suffix("_tokens".into()), &TOKENS))
        .map_err(failed)?;
    let recorder = builder.build_recorder();
    let handle = recorder.handle();
    if metrics::set_global_recorder(recorder).is_err() {
        // Another server of this process was faster, or somebody else records; then there is nothing to show here.
        return Ok(());
    }
    RECORDER.get_or_init(|| handle);
    describe_histogram!("bitfit_request_seconds", Unit::Seconds, "Time to answer a request, by route and status");
    describe_histogram!("bitfit_forward_seconds", Unit::Seconds, "Time of a forward");
    describe_histogram!("bitfit_batch_tokens", "Tokens of a forward");
    describe_counter!("bitfit_questions_total", "Questions (a text of a task) that were answered");
    describe_counter!("bitfit_tokens_total", "Tokens that went through the encoder");
    describe_counter!("bitfit_questions_dropped_total", "Questions nobody waited for any more");
    describe_counter!("bitfit_patch_loads_total", "Patches that went live");
    describe_counter!("bitfit_patches_refused_total", "Patches of the store that were refused");
    describe_counter!("bitfit_patches_evicted_total", "Patches dropped for --patch-memory");
    describe_counter!("bitfit_store_errors_total", "Looks at the store that failed");
    describe_gauge!("bitfit_queue_questions", "Questions that wait or are being answered");
    describe_gauge!("bitfit_queue_tokens", "Their tokens");
    describe_gauge!("bitfit_live_tasks", "Tasks with a patch in memory");
    describe_gauge!("bitfit_patch_memory_bytes", Unit::Bytes, "Memory of live patches");
    Ok(())
}

/// Works up what was recorded, every few seconds: unread samples would pile up where nobody asks for the figures.
pub(super) async fn keep_up() {
    loop {
        tokio::time::sleep(UPKEEP).await;
        if let Some(handle) = RECORDER.get() {
            handle.run_upkeep();
        }
    }
}

/// The figures of now, in Prometheus' text format.
pub(super) async fn metrics(State(app): State<App>) -> Result<Response, Problem> {
    let answering = app.answering();
    let (questions, tokens) = answering.batcher.waiting();
    gauge!("bitfit_queue_questions").set(questions as f64);
    gauge!("bitfit_queue_tokens").set(tokens as f64);
    gauge!("bitfit_live_tasks").set(answering.registry.n_live() as f64);
    gauge!("bitfit_patch_memory_bytes").set(answering.registry.live_bytes() as f64);
    let counts = answering.batcher.counts();
    counter!("bitfit_questions_total").absolute(counts.questions.load(Ordering::Relaxed));
    counter!("bitfit_tokens_total").absolute(counts.tokens.load(Ordering::Relaxed));
    counter!("bitfit_questions_dropped_total").absolute(counts.dropped.load(Ordering::Relaxed));
    let handle = RECORDER.get().ok_or_else(|| Problem::internal("nothing is recorded in this process"))?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], handle.render()).into_response())
}
