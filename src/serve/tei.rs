//! What clients of text-embeddings-inference know: `POST /predict`, `GET /health`, `GET /info`.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::atomic::Ordering;
use utoipa::ToSchema;
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, OneOfBuilder, Schema, Type};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::app::App;
use super::problem::Problem;
use super::request::{Deadline, DeadlineHeader, Json, MayRead};
use super::routes::{AskRefused, ErrorBody, body};
use crate::base::problem::Problem as Predicted;
use crate::predict::json::number;
use crate::predict::{Input, Prediction};

/// The routes of this file.
pub(super) fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(predict)).routes(routes!(health)).routes(routes!(info))
}

/// As text-embeddings-inference takes it, and the task, which has no default: a second task in the store must not
/// change what the first one's clients get.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"inputs": "The shares fell on Tuesday.", "task": "topic"}))]
pub(super) struct PredictLike {
    #[schema(schema_with = inputs_schema)]
    inputs: Inputs,
    task: String,
    /// Logits instead of scores.
    #[serde(default)]
    raw_scores: bool,
    /// Texts are always cut to the task's length; taken and not looked at.
    #[serde(default)]
    #[allow(dead_code)]
    truncate: Option<bool>,
    /// As `truncate`.
    #[serde(default)]
    #[allow(dead_code)]
    truncation_direction: Option<String>,
}

/// A text, a pair, or a batch: `"a"`, `["a", "b"]`, `[["a"], ["b", "c"]]`.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Inputs {
    /// A text.
    One(String),
    /// A text, or a pair of texts.
    Pair(Vec<String>),
    /// Texts and pairs.
    Batch(Vec<Vec<String>>),
}

/// What [`Inputs`] takes; its variants cannot say of how many texts, and that none is blank.
fn inputs_schema() -> Schema {
    let text = || ObjectBuilder::new().schema_type(Type::String).pattern(Some(r"\S"));
    let texts = || ArrayBuilder::new().items(text()).min_items(Some(1)).max_items(Some(2));
    let batch = ArrayBuilder::new().items(texts()).min_items(Some(1));
    OneOfBuilder::new().item(text()).item(texts()).item(batch).into()
}

impl Inputs {
    /// The texts, and whether they came as a batch.
    fn into_inputs(self) -> Result<(Vec<Input>, bool), Problem> {
        let input = |texts: Vec<String>| {
            let n = texts.len();
            let mut texts = texts.into_iter();
            match (texts.next(), texts.next(), n) {
                (Some(text), text_pair, 1 | 2) => Ok(Input { text, text_pair }),
                _ => Err(Problem::invalid(format!("inputs: expected a text or a pair of texts, found {n}"))),
            }
        };
        Ok(match self {
            Inputs::One(text) => (vec![input(vec![text])?], false),
            Inputs::Pair(texts) => (vec![input(texts)?], false),
            Inputs::Batch(batch) => (batch.into_iter().map(input).collect::<Result<_, _>>()?, true),
        })
    }
}

/// Answer with one task: labels with their scores, the largest first.
#[utoipa::path(
    post, path = "/predict", tag = "text-embeddings-inference", request_body = PredictLike,
    params(DeadlineHeader),
    responses(
        (status = 200, body = Value),
        AskRefused,
    )
)]
async fn predict(
    _: MayRead,
    Deadline(deadline): Deadline,
    State(app): State<App>,
    Json(asked): Json<PredictLike>,
) -> Result<Response, Problem> {
    let task = asked.task.parse().map_err(|_| Problem::unknown_task(&asked.task))?;
    let (inputs, is_batch) = asked.inputs.into_inputs()?;
    let answered = app.answering().answer(&[task], inputs, deadline).await?;
    let mut rows = Vec::new();
    for answered in &answered {
        let labels = match &answered.live.patch.metadata().problem {
            Predicted::Classes(labels) => labels.clone(),
            Predicted::Value => vec!["value".into()],
        };
        for (prediction, logits) in answered.predictions.iter().zip(&answered.logits) {
            let mut scores: Vec<(f32, &String)> = match prediction {
                Prediction::Class { scores, .. } if !asked.raw_scores => scores.iter().copied().zip(&labels).collect(),
                _ => logits.iter().copied().zip(&labels).collect(),
            };
            scores.sort_by(|a, b| b.0.total_cmp(&a.0));
            let row = scores.iter().map(|(score, label)| json!({"score": number(*score), "label": label}));
            rows.push(Value::Array(row.collect()));
        }
    }
    let one = |rows: Vec<Value>| rows.into_iter().next().unwrap_or_default();
    Ok(body(&if is_batch { Value::Array(rows) } else { one(rows) }))
}

/// Whether this server answers.
#[utoipa::path(
    get, path = "/health", tag = "text-embeddings-inference",
    responses((status = 200, description = "Ready"), (status = 503, description = "Not ready, or stopping", body = ErrorBody))
)]
async fn health(State(app): State<App>) -> Result<StatusCode, Problem> {
    app.ready().map(|()| StatusCode::OK)
}

/// What runs here, its limits, and what it has done.
#[utoipa::path(
    get, path = "/info", tag = "text-embeddings-inference",
    responses((status = 200, body = Value), (status = 401, description = "Key missing or wrong", body = ErrorBody))
)]
async fn info(_: MayRead, State(app): State<App>) -> Response {
    let (answering, options) = (app.answering(), app.options());
    let base = answering.encoder.base();
    let (questions, tokens) = answering.batcher.waiting();
    let counts = answering.batcher.counts();
    let of = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::Relaxed);
    body(&json!({
        "model_id": base.id(),
        "model_sha": base.fingerprint(),
        "model_dtype": answering.encoder.precision().to_string(),
        "model_type": {"classifier": {}},
        "max_input_length": base.config().max_position_embeddings,
        "max_batch_tokens": options.batch_tokens,
        "max_client_batch_size": options.max_inputs,
        "max_queued_questions": options.queue,
        "version": env!("CARGO_PKG_VERSION"),
        "live_tasks": answering.registry.n_live(),
        "patch_memory_bytes": answering.registry.live_bytes(),
        "read_only": options.read_only,
        "queue": {"questions": questions, "tokens": tokens},
        "done": {
            "questions": of(&counts.questions),
            "tokens": of(&counts.tokens),
            "batches": of(&counts.batches),
            "forward_us": of(&counts.forward_us),
            "dropped": of(&counts.dropped),
        },
        "uptime_s": app.uptime_s(),
    }))
}
