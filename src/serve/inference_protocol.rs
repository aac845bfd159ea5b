//! `/v2`: the Open Inference Protocol, as KServe and Triton speak it, with its extension for binary tensors.
//!
//! A task is a model. Inputs are `text` and, for tasks of two, `text_pair`, BYTES of shape [N]; outputs `label`, BYTES [N]
//! of a task of classes, and `score`, FP32 [N, C], [N, 1] of a regression; `logits`, FP32 [N, C], where they are asked
//! for. A model's version is the content hash of its patch. Errors here are `{"error": ".."}`, as the protocol has them.

use std::collections::BTreeMap;

use axum::extract::{FromRequestParts, Path, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::answering::Answered;
use super::app::App;
use super::name::TaskName;
use super::problem::Problem;
use super::registry::Live;
use super::request::{self, Deadline, MayRead, Raw};
use super::routes::body;
use crate::base::problem::{Problem as Predicted, Texts};
use crate::predict::json::number;
use crate::predict::{Input, Prediction};

/// How many bytes of a body are JSON; the rest are tensors.
const JSON_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

/// The routes of this file.
pub(super) fn router() -> axum::Router<App> {
    axum::Router::new()
        .route("/v2", get(server))
        .route("/v2/health/live", get(live))
        .route("/v2/health/ready", get(ready))
        .route("/v2/models/{task}", get(model))
        .route("/v2/models/{task}/ready", get(model_ready))
        .route("/v2/models/{task}/infer", post(infer))
        .route("/v2/models/{task}/versions/{version}", get(model))
        .route("/v2/models/{task}/versions/{version}/ready", get(model_ready))
        .route("/v2/models/{task}/versions/{version}/infer", post(infer))
}

/// Gives problems the protocol's form, whatever found them: a wrong key, a body too large, a route that is not there.
pub(super) async fn in_its_form(request: Request, next: Next) -> Response {
    let is_its_own = request.uri().path() == "/v2" || request.uri().path().starts_with("/v2/");
    let mut response = next.run(request).await;
    if is_its_own && let Some(Problem { message, .. }) = response.extensions_mut().remove() {
        // The length of the other form's body goes with it.
        response.headers_mut().remove(header::CONTENT_LENGTH);
        *response.body_mut() = json!({"error": message}).to_string().into();
    }
    response
}

async fn server() -> Response {
    body(&json!({
        "name": "bitfit", "version": env!("CARGO_PKG_VERSION"), "extensions": ["binary_tensor_data"],
    }))
}

async fn live() -> StatusCode {
    StatusCode::OK
}

async fn ready(State(app): State<App>) -> Result<StatusCode, Problem> {
    app.ready().map(|()| StatusCode::OK)
}

/// A model and, where it is named, its version.
struct Named {
    task: TaskName,
    version: Option<String>,
}

impl FromRequestParts<App> for Named {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let named = Path::<BTreeMap<String, String>>::from_request_parts(parts, app).await;
        // What is no UTF-8 names nothing.
        let Ok(Path(mut named)) = named else { return Err(Problem::unknown_task("")) };
        let task = named.remove("task").unwrap_or_default();
        let task = task.parse().map_err(|_| Problem::unknown_task(&task))?;
        Ok(Named { task, version: named.remove("version") })
    }
}

impl Named {
    /// Refuses a version that is not the one at hand: the versions before are not served.
    fn check(&self, live: &Live) -> Result<(), Problem> {
        match self.version.as_deref() {
            Some(version) if version != live.patch.content_hash() => {
                let message = format!("task {} has version {}", live.patch.name(), live.patch.content_hash());
                Err(Problem::new(StatusCode::NOT_FOUND, "unknown_version", message))
            }
            _ => Ok(()),
        }
    }
}

async fn model_ready(_: MayRead, named: Named, State(app): State<App>) -> Result<StatusCode, Problem> {
    app.ready()?;
    named.check(&*app.answering().registry.inspect(&named.task).await?)?;
    Ok(StatusCode::OK)
}

async fn model(_: MayRead, named: Named, State(app): State<App>) -> Result<Response, Problem> {
    let live = app.answering().registry.inspect(&named.task).await?;
    named.check(&live)?;
    let metadata = live.patch.metadata();
    let tensor =
        |name: &str, datatype: &str, shape: Vec<i64>| json!({"name": name, "datatype": datatype, "shape": shape});
    let mut inputs = vec![tensor("text", "BYTES", vec![-1])];
    if metadata.texts == Texts::Two {
        inputs.push(tensor("text_pair", "BYTES", vec![-1]));
    }
    let n = metadata.problem.n_outputs() as i64;
    let mut outputs = Vec::new();
    if matches!(metadata.problem, Predicted::Classes(_)) {
        outputs.push(tensor("label", "BYTES", vec![-1]));
    }
    outputs.extend(["score", "logits"].map(|name| tensor(name, "FP32", vec![-1, n])));
    Ok(body(&json!({
        "name": live.patch.name(), "versions": [live.patch.content_hash()], "platform": "bitfit",
        "inputs": inputs, "outputs": outputs,
    })))
}

#[derive(Deserialize)]
struct Infer {
    id: Option<String>,
    #[serde(deserialize_with = "request::objects")]
    inputs: Vec<InputTensor>,
    #[serde(default, deserialize_with = "request::objects")]
    outputs: Vec<OutputAsked>,
    #[serde(default)]
    parameters: Map<String, Value>,
}

#[derive(Deserialize)]
struct InputTensor {
    name: String,
    datatype: String,
    shape: Vec<u64>,
    data: Option<Value>,
    #[serde(default)]
    parameters: Map<String, Value>,
}

#[derive(Deserialize)]
struct OutputAsked {
    name: String,
    #[serde(default)]
    parameters: Map<String, Value>,
}

async fn infer(
    _: MayRead,
    named: Named,
    Deadline(deadline): Deadline,
    State(app): State<App>,
    Raw(headers, bytes): Raw,
) -> Result<Response, Problem> {
    let (asked, tensors) = parse(&headers, bytes)?;
    let inputs = inputs(&asked, tensors)?;
    let answered = app.answering().answer(std::slice::from_ref(&named.task), inputs, deadline).await?;
    let [answered] = &answered[..] else { return Err(Problem::internal("one task gave several answers")) };
    // Of what has answered: another version may have come in between.
    named.check(&answered.live)?;
    respond(&asked, answered)
}

/// The JSON of a body, and the bytes behind it.
fn parse(headers: &HeaderMap, bytes: Bytes) -> Result<(Infer, Bytes), Problem> {
    let Some(length) = headers.get(JSON_LENGTH) else { return Ok((request::json(&bytes)?, Bytes::new())) };
    let length = length.to_str().ok().and_then(|text| text.parse::<usize>().ok()).filter(|n| *n <= bytes.len());
    let expected = || format!("{JSON_LENGTH}: expected at most the {} bytes of the body", bytes.len());
    let length = length.ok_or_else(|| Problem::malformed(expected()))?;
    Ok((request::json(&bytes[..length])?, bytes.slice(length..)))
}

/// The texts of a request.
fn inputs(asked: &Infer, mut tensors: Bytes) -> Result<Vec<Input>, Problem> {
    let (mut text, mut text_pair) = (None, None);
    for tensor in &asked.inputs {
        let values = strings(tensor, &mut tensors)?;
        let to = match tensor.name.as_str() {
            "text" => &mut text,
            "text_pair" => &mut text_pair,
            other => return Err(Problem::invalid(format!("inputs: expected text and text_pair, found {other:?}"))),
        };
        if to.replace(values).is_some() {
            return Err(Problem::invalid(format!("inputs: {} is there twice", tensor.name)));
        }
    }
    if !tensors.is_empty() {
        return Err(Problem::invalid(format!("{} bytes stand behind the last tensor", tensors.len())));
    }
    let text = text.ok_or_else(|| Problem::invalid("inputs: there is no text"))?;
    if let Some(pair) = text_pair.as_ref().filter(|pair| pair.len() != text.len()) {
        return Err(Problem::invalid(format!("inputs: {} of text and {} of text_pair", text.len(), pair.len())));
    }
    let mut pairs = text_pair.into_iter().flatten();
    Ok(text.into_iter().map(|text| Input { text, text_pair: pairs.next() }).collect())
}

/// The texts of a tensor, out of its JSON or the bytes behind it.
fn strings(tensor: &InputTensor, tensors: &mut Bytes) -> Result<Vec<String>, Problem> {
    let name = &tensor.name;
    let invalid = |message: String| Problem::invalid(format!("input {name:?}: {message}"));
    if tensor.datatype != "BYTES" {
        return Err(invalid(format!("expected datatype BYTES, found {:?}", tensor.datatype)));
    }
    // [N] by the protocol; clients also send [N, 1].
    let n = match tensor.shape[..] {
        [n] | [n, 1] => n,
        _ => return Err(invalid(format!("expected shape [N], found {:?}", tensor.shape))),
    };
    let values = match (&tensor.data, tensor.parameters.get("binary_data_size")) {
        (Some(data), None) => flat(data).ok_or_else(|| invalid("expected data of strings".into()))?,
        (None, Some(size)) => {
            let size = size.as_u64().filter(|size| *size <= tensors.len() as u64);
            let left = tensors.len();
            let size =
                size.ok_or_else(|| invalid(format!("binary_data_size is more than the {left} bytes there are")))?;
            framed(&tensors.split_to(size as usize)).map_err(invalid)?
        }
        _ => return Err(invalid("expected either data or binary_data_size".into())),
    };
    if values.len() as u64 != n {
        return Err(invalid(format!("its shape is {:?}, and it has {} texts", tensor.shape, values.len())));
    }
    Ok(values)
}

/// Strings out of JSON, which may be nested as the shape is.
fn flat(data: &Value) -> Option<Vec<String>> {
    let of = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(one) if one.len() == 1 => one[0].as_str().map(String::from),
        _ => None,
    };
    data.as_array()?.iter().map(of).collect()
}

/// Strings out of bytes: each behind its length, 4 bytes little-endian.
fn framed(mut bytes: &[u8]) -> Result<Vec<String>, String> {
    let mut texts = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let (text, rest) = rest.split_at_checked(length).ok_or("a text is longer than its tensor")?;
        texts.push(String::from_utf8(text.to_vec()).map_err(|_| "a text is not UTF-8")?);
        bytes = rest;
    }
    if bytes.is_empty() { Ok(texts) } else { Err("its last bytes are no text".into()) }
}

/// One output: its values as JSON, and as bytes.
struct Output {
    name: &'static str,
    datatype: &'static str,
    shape: Vec<usize>,
    json: Vec<Value>,
    bytes: Vec<u8>,
}

fn respond(asked: &Infer, answered: &Answered) -> Result<Response, Problem> {
    let patch = &answered.live.patch;
    let all = outputs(answered);
    let names: Vec<&str> = match asked.outputs.is_empty() {
        true => all.iter().map(|output| output.name).filter(|name| *name != "logits").collect(),
        false => asked.outputs.iter().map(|output| output.name.as_str()).collect(),
    };
    // There are three to ask for: a fourth is one of them again, or unknown.
    let twice = |i: &usize| names[..*i].contains(&names[*i]);
    if let Some(i) = (1..names.len().min(all.len() + 1)).find(twice) {
        return Err(Problem::invalid(format!("outputs: {} is asked for twice", names[i])));
    }
    let by_default = asked.parameters.get("binary_data_output").and_then(Value::as_bool).unwrap_or(false);
    let (mut described, mut behind) = (Vec::new(), Vec::new());
    for name in names {
        let output = all.iter().find(|output| output.name == name).ok_or_else(|| {
            let known: Vec<&str> = all.iter().map(|output| output.name).collect();
            Problem::invalid(format!("outputs: expected {}, found {name:?}", known.join(", ")))
        })?;
        let own = asked.outputs.iter().find(|asked| asked.name == name);
        let is_binary = own.and_then(|own| own.parameters.get("binary_data")).and_then(Value::as_bool);
        let mut tensor = json!({"name": name, "datatype": output.datatype, "shape": output.shape});
        if is_binary.unwrap_or(by_default) {
            tensor["parameters"] = json!({"binary_data_size": output.bytes.len()});
            behind.extend_from_slice(&output.bytes);
        } else {
            tensor["data"] = output.json.clone().into();
        }
        described.push(tensor);
    }
    let mut value = json!({"model_name": patch.name(), "model_version": patch.content_hash(), "outputs": described});
    if let Some(id) = &asked.id {
        value["id"] = id.clone().into();
    }
    if behind.is_empty() {
        return Ok(body(&value));
    }
    let mut bytes = value.to_string().into_bytes();
    let length = HeaderValue::from(bytes.len());
    bytes.extend_from_slice(&behind);
    let mut response = ([(header::CONTENT_TYPE, "application/octet-stream")], bytes).into_response();
    response.headers_mut().insert(JSON_LENGTH, length);
    Ok(response)
}

/// Every output that a task has.
fn outputs(answered: &Answered) -> Vec<Output> {
    let n = answered.predictions.len();
    let mut all = Vec::new();
    if let Predicted::Classes(labels) = &answered.live.patch.metadata().problem {
        let of = |prediction: &Prediction| match prediction {
            Prediction::Class { class, .. } => labels.get(*class).map_or("", String::as_str),
            Prediction::Value(_) => "",
        };
        let chosen: Vec<&str> = answered.predictions.iter().map(of).collect();
        let bytes =
            chosen.iter().flat_map(|label| [&(label.len() as u32).to_le_bytes()[..], label.as_bytes()].concat());
        let bytes = bytes.collect();
        all.push(Output {
            name: "label",
            datatype: "BYTES",
            shape: vec![n],
            json: chosen.iter().map(|label| json!(label)).collect(),
            bytes,
        });
    }
    let scores = answered.predictions.iter().map(|prediction| match prediction {
        Prediction::Class { scores, .. } => scores.clone(),
        Prediction::Value(value) => vec![*value],
    });
    for (name, rows) in [("score", scores.collect::<Vec<_>>()), ("logits", answered.logits.clone())] {
        let shape = vec![n, rows.first().map_or(0, Vec::len)];
        let values = rows.concat();
        all.push(Output {
            name,
            datatype: "FP32",
            shape,
            json: values.iter().map(|x| number(*x)).collect(),
            bytes: values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        });
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn framed_texts_are_read_back_and_cut_ones_refused() {
        let bytes =
            [&3u32.to_le_bytes()[..], b"abc", &0u32.to_le_bytes(), &2u32.to_le_bytes(), "é".as_bytes()].concat();
        assert_eq!(framed(&bytes).unwrap(), ["abc", "", "é"]);
        for cut in [1, 3, 5, 6, bytes.len() - 1] {
            assert!(framed(&bytes[..cut]).is_err(), "{cut}");
        }
        assert!(framed(&[&1u32.to_le_bytes()[..], &[0xff]].concat()).is_err());
        assert!(framed(&u32::MAX.to_le_bytes()).is_err());
    }
}
