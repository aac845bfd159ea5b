//! `/v1`: asking tasks, and changing which there are.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{IntoResponses, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::app::App;
use super::name::TaskName;
use super::problem::Problem;
use super::registry::{Listed, Live};
use super::request::{Deadline, DeadlineHeader, Json, MayChange, MayRead, OfTask, PatchBytes, objects};
use crate::base::problem::Problem as Predicted;
use crate::predict::{Input, json as wire};

/// The routes of this file.
pub(super) fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(predict_task))
        .routes(routes!(predict_many))
        .routes(routes!(list))
        .routes(routes!(inspect, upload, remove))
        .routes(routes!(versions))
        .routes(routes!(roll_back))
}

/// A text, or two for a task of two.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Text {
    /// The text, or the first of two. Not blank.
    #[schema(pattern = r"\S")]
    text: String,
    /// The second text. Not blank.
    #[schema(pattern = r"\S")]
    text_pair: Option<String>,
}

impl From<Text> for Input {
    fn from(text: Text) -> Self {
        Input { text: text.text, text_pair: text.text_pair }
    }
}

/// Texts for one task.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"inputs": [{"text": "The shares fell on Tuesday."}]}))]
pub(super) struct PredictTask {
    /// At least one.
    #[schema(min_items = 1)]
    #[serde(deserialize_with = "objects")]
    inputs: Vec<Text>,
}

/// The same texts for many tasks.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"tasks": ["sst2", "topic"], "inputs": [{"text": "The shares fell on Tuesday."}]}))]
pub(super) struct PredictMany {
    /// At least one, none twice.
    #[schema(min_items = 1)]
    tasks: Vec<String>,
    /// At least one.
    #[schema(min_items = 1)]
    #[serde(deserialize_with = "objects")]
    inputs: Vec<Text>,
}

/// A task's answers.
#[derive(Serialize, ToSchema)]
#[allow(dead_code)]
pub(super) struct TaskAnswers {
    task: String,
    /// The content hash of the patch that answered.
    patch: String,
    /// One an input, in order.
    predictions: Vec<Prediction>,
}

/// Many tasks' answers.
#[derive(Serialize, ToSchema)]
#[allow(dead_code)]
pub(super) struct ManyAnswers {
    /// One a task, in the order asked.
    results: Vec<TaskAnswers>,
}

/// An answer: a class, or a value.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[allow(dead_code)]
pub(super) enum Prediction {
    /// Of a task of classes.
    Class {
        /// The class with the largest score.
        label: String,
        /// Its score, 0 to 1.
        score: f32,
        /// Every class's score; they sum to 1.
        scores: std::collections::BTreeMap<String, f32>,
    },
    /// Of a regression.
    Value {
        /// On the scale of the training data.
        value: f32,
    },
}

/// What went wrong.
#[derive(Serialize, ToSchema)]
#[allow(dead_code)]
pub(super) struct ErrorBody {
    error: ErrorText,
}

/// A code to match on and a sentence to read.
#[derive(Serialize, ToSchema)]
#[allow(dead_code)]
pub(super) struct ErrorText {
    #[schema(example = "unknown_task")]
    code: String,
    message: String,
}

/// Why a request for answers is refused.
#[derive(IntoResponses)]
#[allow(dead_code)]
pub(super) enum AskRefused {
    /// Not JSON
    #[response(status = 400)]
    Malformed(ErrorBody),
    /// Key missing or wrong
    #[response(status = 401)]
    Unauthorized(ErrorBody),
    /// Unknown task
    #[response(status = 404)]
    UnknownTask(ErrorBody),
    /// The body took too long to arrive
    #[response(status = 408)]
    SlowBody(ErrorBody),
    /// A task's patch is for another base
    #[response(status = 409)]
    WrongBase(ErrorBody),
    /// Too large
    #[response(status = 413)]
    TooLarge(ErrorBody),
    /// A compressed body
    #[response(status = 415)]
    Encoded(ErrorBody),
    /// Well-formed but invalid
    #[response(status = 422)]
    Invalid(ErrorBody),
    /// Queue full, see Retry-After
    #[response(status = 429)]
    QueueFull(ErrorBody),
    /// Stopping, or the store does not answer
    #[response(status = 503)]
    Unavailable(ErrorBody),
    /// Deadline passed
    #[response(status = 504)]
    Late(ErrorBody),
}

/// Why a request about the store is refused.
#[derive(IntoResponses)]
#[allow(dead_code)]
pub(super) enum LookRefused {
    /// Key missing or wrong
    #[response(status = 401)]
    Unauthorized(ErrorBody),
    /// Unknown task
    #[response(status = 404)]
    UnknownTask(ErrorBody),
    /// Its patch is for another base
    #[response(status = 409)]
    WrongBase(ErrorBody),
    /// Its patch is refused
    #[response(status = 422)]
    Invalid(ErrorBody),
    /// The store does not answer
    #[response(status = 503)]
    Unavailable(ErrorBody),
}

/// Why a change of the store is refused.
#[derive(IntoResponses)]
#[allow(dead_code)]
pub(super) enum ChangeRefused {
    /// Not JSON, or no whole body
    #[response(status = 400)]
    Malformed(ErrorBody),
    /// Key missing or wrong
    #[response(status = 401)]
    Unauthorized(ErrorBody),
    /// Key without the right, or --read-only
    #[response(status = 403)]
    Forbidden(ErrorBody),
    /// No such task, or version
    #[response(status = 404)]
    UnknownTask(ErrorBody),
    /// The body took too long to arrive
    #[response(status = 408)]
    SlowBody(ErrorBody),
    /// A patch for another base
    #[response(status = 409)]
    WrongBase(ErrorBody),
    /// Too large
    #[response(status = 413)]
    TooLarge(ErrorBody),
    /// A compressed body
    #[response(status = 415)]
    Encoded(ErrorBody),
    /// Not a patch that a server takes, or a task that is pinned
    #[response(status = 422)]
    Invalid(ErrorBody),
    /// Too many uploads at once, see Retry-After
    #[response(status = 429)]
    Busy(ErrorBody),
    /// The store does not answer
    #[response(status = 503)]
    Unavailable(ErrorBody),
    /// The store is full
    #[response(status = 507)]
    Full(ErrorBody),
}

/// A version to go back to.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Rollback {
    /// Its content hash, as `GET /v1/tasks/{task}/versions` lists it.
    patch: String,
}

/// Answer texts with one task.
#[utoipa::path(
    post, path = "/v1/tasks/{task}/predict", tag = "predict",
    params(("task" = String, Path), DeadlineHeader),
    request_body = PredictTask,
    responses(
        (status = 200, body = TaskAnswers),
        AskRefused,
    )
)]
async fn predict_task(
    _: MayRead,
    OfTask(task): OfTask,
    Deadline(deadline): Deadline,
    State(app): State<App>,
    Json(asked): Json<PredictTask>,
) -> Result<Response, Problem> {
    let inputs = asked.inputs.into_iter().map(Input::from).collect();
    let answered = app.answering().answer(&[task], inputs, deadline).await?;
    let [answered] = &answered[..] else { return Err(Problem::internal("one task gave several answers")) };
    Ok(body(&wire::task(&answered.live.patch, &answered.predictions)))
}

/// Answer the same texts with many tasks, in one batch.
#[utoipa::path(
    post, path = "/v1/predict", tag = "predict",
    params(DeadlineHeader),
    request_body = PredictMany,
    responses(
        (status = 200, body = ManyAnswers),
        AskRefused,
    )
)]
async fn predict_many(
    _: MayRead,
    Deadline(deadline): Deadline,
    State(app): State<App>,
    Json(asked): Json<PredictMany>,
) -> Result<Response, Problem> {
    let named = |name: &String| name.parse().map_err(|_| Problem::unknown_task(name));
    let tasks: Vec<TaskName> = asked.tasks.iter().map(named).collect::<Result<_, _>>()?;
    let inputs = asked.inputs.into_iter().map(Input::from).collect();
    let answered = app.answering().answer(&tasks, inputs, deadline).await?;
    let results: Vec<Value> = answered.iter().map(|a| wire::task(&a.live.patch, &a.predictions)).collect();
    Ok(body(&json!({"results": results})))
}

/// List the tasks.
#[utoipa::path(
    get, path = "/v1/tasks", tag = "tasks",
    responses((status = 200, body = Value), (status = 401, description = "Key missing or wrong", body = ErrorBody))
)]
async fn list(_: MayRead, State(app): State<App>) -> Response {
    let tasks: Vec<Value> = app.answering().registry.list().iter().map(|listed| described(listed, None)).collect();
    body(&json!({"tasks": tasks}))
}

/// What a task is: its labels, metrics, patch and state.
#[utoipa::path(
    get, path = "/v1/tasks/{task}", tag = "tasks", params(("task" = String, Path)),
    responses(
        (status = 200, body = Value),
        LookRefused,
    )
)]
async fn inspect(_: MayRead, OfTask(task): OfTask, State(app): State<App>) -> Result<Response, Problem> {
    let found = app.answering().registry.inspect(&task).await?;
    described_now(&app, &task, &found).map(|value| body(&value))
}

/// Upload a patch (the bytes of its file), or with an empty body load what the store holds.
#[utoipa::path(
    put, path = "/v1/tasks/{task}", tag = "tasks", params(("task" = String, Path)),
    request_body(content = Option<Vec<u8>>, content_type = "application/octet-stream"),
    responses(
        (status = 200, description = "Replaced, or loaded", body = Value),
        (status = 201, description = "New", body = Value),
        ChangeRefused,
    )
)]
async fn upload(
    _: MayChange,
    OfTask(task): OfTask,
    State(app): State<App>,
    PatchBytes { bytes, .. }: PatchBytes,
) -> Result<Response, Problem> {
    let registry = &app.answering().registry;
    let (live, is_new) = match bytes.is_empty() {
        true => (registry.reload(&task).await?, false),
        false => registry.replace(&task, bytes).await?,
    };
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, body(&described_now(&app, &task, &live)?)).into_response())
}

/// Take a task out of the store. Its versions stay, so that a rollback brings it back.
#[utoipa::path(
    delete, path = "/v1/tasks/{task}", tag = "tasks", params(("task" = String, Path)),
    responses(
        (status = 204, description = "Removed"),
        ChangeRefused,
    )
)]
async fn remove(_: MayChange, OfTask(task): OfTask, State(app): State<App>) -> Result<StatusCode, Problem> {
    app.answering().registry.remove(&task).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The versions of a task that the store keeps, the newest first.
#[utoipa::path(
    get, path = "/v1/tasks/{task}/versions", tag = "tasks", params(("task" = String, Path)),
    responses(
        (status = 200, body = Value),
        LookRefused,
    )
)]
async fn versions(_: MayRead, OfTask(task): OfTask, State(app): State<App>) -> Result<Response, Problem> {
    let registry = &app.answering().registry;
    let live = registry.listed(&task).and_then(|listed| listed.live);
    let live = live.as_ref().map(|live| live.patch.content_hash());
    let of = |version: &super::store::Version| {
        let stored = version.stored.duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.as_secs());
        json!({"patch": version.patch, "stored_unix_s": stored, "live": live == Some(version.patch.as_str())})
    };
    let versions: Vec<Value> = registry.versions(&task).await?.iter().map(of).collect();
    Ok(body(&json!({"task": task.as_str(), "versions": versions})))
}

/// Put a kept version back in place.
#[utoipa::path(
    post, path = "/v1/tasks/{task}/rollback", tag = "tasks", params(("task" = String, Path)), request_body = Rollback,
    responses(
        (status = 200, body = Value),
        ChangeRefused,
    )
)]
async fn roll_back(
    _: MayChange,
    OfTask(task): OfTask,
    State(app): State<App>,
    Json(asked): Json<Rollback>,
) -> Result<Response, Problem> {
    let live = app.answering().registry.roll_back(&task, &asked.patch).await?;
    described_now(&app, &task, &live).map(|value| body(&value))
}

/// A task with what its patch says of itself.
fn described_now(app: &App, task: &TaskName, found: &Live) -> Result<Value, Problem> {
    let listed = app.answering().registry.listed(task).ok_or_else(|| Problem::unknown_task(task.as_str()))?;
    Ok(described(&listed, Some(found)))
}

/// A task as JSON; `found` describes it where it is not live.
fn described(listed: &Listed, found: Option<&Live>) -> Value {
    let mut value = json!({
        "task": listed.task.as_str(),
        "state": match (&listed.live, &listed.error) {
            (Some(_), _) => "live",
            (None, Some(_)) => "refused",
            (None, None) => "stored",
        },
        "pinned": listed.is_pinned,
    });
    if let Some(live) = listed.live.as_deref().or(found) {
        let metadata = live.patch.metadata();
        value["patch"] = live.patch.content_hash().into();
        value["problem"] = match &metadata.problem {
            Predicted::Classes(_) => "classification".into(),
            Predicted::Value => "regression".into(),
        };
        if let Predicted::Classes(labels) = &metadata.problem {
            value["labels"] = labels.clone().into();
        }
        value["texts"] = metadata.texts.count().into();
        value["max_length"] = metadata.max_length.into();
        value["selection"] = metadata.selection.clone().into();
        value["metrics"] = json!(metadata.metrics);
        value["split"] = metadata.split.clone().into();
        value["size_bytes"] = live.patch.task().size_bytes().into();
    }
    if let Some(error) = &listed.error {
        value["error"] = error.clone().into();
    }
    value
}

/// JSON as a response.
pub(super) fn body(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}
