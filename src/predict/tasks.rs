//! Many tasks over one base: each text through every task, mixed in one batch.

use std::path::Path;
use std::sync::Arc;

use super::answer::{Prediction, from_logits};
use super::batching::MAX_TOKENS;
use crate::base::problem::Texts;
use crate::base::tokenizer::Encoding;
use crate::data::evaluation_batches;
use crate::device::PrecisionName;
use crate::device::batch::{Batch, DropoutKey};
use crate::encoder::{Encoder, Task};
use crate::error::{Error, Result};
use crate::patch::{Metadata, Patch};

/// A patch, checked against the base and attached to its encoder. Of the patch itself only what names and describes it
/// stays: its values live in the encoder's task, and a thousand tasks do not hold theirs twice.
#[derive(Clone)]
pub struct TaskPatch {
    metadata: Arc<Metadata>,
    task: Task,
}

impl TaskPatch {
    /// Reads a patch and attaches it.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or is no patch, and a patch for another base.
    pub fn load(path: &Path, encoder: &Encoder) -> Result<Self> {
        Self::attach(Patch::load(path)?, encoder)
    }

    /// Attaches a patch.
    ///
    /// # Errors
    ///
    /// A patch for another base.
    pub fn attach(patch: Patch, encoder: &Encoder) -> Result<Self> {
        patch.check_base(encoder.base())?;
        let task = encoder.attach(patch.delta())?;
        Ok(TaskPatch { metadata: Arc::new(patch.metadata().clone()), task })
    }

    /// The task's name.
    pub fn name(&self) -> &str {
        &self.metadata.task
    }

    /// What the patch says of itself.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The patch's identity: SHA-256 over its metadata, tensor table and data, in hexadecimal.
    pub fn content_hash(&self) -> &str {
        &self.metadata.content_hash
    }
}

/// A text, or a pair of texts, to be answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    /// The text, or the first of two.
    pub text: String,
    /// The second text.
    pub text_pair: Option<String>,
}

/// The answers to a call.
#[derive(Debug, Clone, PartialEq)]
pub struct Predictions {
    /// For each task, in the order given, the answer to each input, in order.
    pub of_tasks: Vec<Vec<Prediction>>,
    /// For each task, how many inputs were longer than its maximum length and were cut.
    pub truncated: Vec<usize>,
}

/// Answers every input with every task. Tasks share batches, ordered by task inside each; tasks with weights of their
/// own run in batches of their own.
///
/// # Errors
///
/// A task of two texts that is given one, or the reverse, and a blank text: nothing is answered then. What tokenizer and
/// device report; an output that is not finite.
pub fn predict(encoder: &Encoder, tasks: &[TaskPatch], inputs: &[Input]) -> Result<Predictions> {
    predict_named(encoder, tasks, inputs, &|i| format!("input {}", i + 1))
}

/// [`predict`] of inputs that have names in an error.
pub(super) fn predict_named(
    encoder: &Encoder,
    tasks: &[TaskPatch],
    inputs: &[Input],
    name: &dyn Fn(usize) -> String,
) -> Result<Predictions> {
    for (i, input) in inputs.iter().enumerate() {
        check(tasks, input, || name(i))?;
    }
    let tokenizer = encoder.base().tokenizer()?;
    // Texts are tokenised once a maximum length, not once a task.
    let mut lengths: Vec<usize> = tasks.iter().map(|t| t.metadata().max_length).collect();
    lengths.sort_unstable();
    lengths.dedup();
    let encode = |max_length: &usize| -> Result<Vec<Encoding>> {
        let of = |input: &Input| tokenizer.encode(&input.text, input.text_pair.as_deref(), *max_length);
        inputs.iter().map(of).collect()
    };
    let encodings: Vec<Vec<Encoding>> = lengths.iter().map(encode).collect::<Result<_>>()?;
    let of_task = |t: &TaskPatch| {
        let at = lengths.partition_point(|length| *length < t.metadata().max_length);
        &encodings[at]
    };

    let mut logits = vec![vec![Vec::new(); inputs.len()]; tasks.len()];
    let (alone, shared): (Vec<usize>, Vec<usize>) = (0..tasks.len()).partition(|t| tasks[*t].task.is_alone());
    for group in alone.into_iter().map(|t| vec![t]).chain([shared]) {
        let rows: Vec<(usize, usize)> = group.iter().flat_map(|t| (0..inputs.len()).map(|i| (*t, i))).collect();
        let lengths: Vec<usize> = rows.iter().map(|(t, i)| of_task(&tasks[*t])[*i].ids.len()).collect();
        for mut batch_rows in evaluation_batches(&lengths, MAX_TOKENS) {
            batch_rows.sort_unstable_by_key(|row| rows[*row]);
            let (mut batch, mut present): (Batch, Vec<usize>) = (Batch::new(), Vec::new());
            for row in &batch_rows {
                let (t, i) = rows[*row];
                if present.last() != Some(&t) {
                    present.push(t);
                }
                let Encoding { ids, type_ids, .. } = &of_task(&tasks[t])[i];
                batch.push(ids, type_ids, present.len() - 1, DropoutKey::default(), None);
            }
            let attached: Vec<Option<Task>> = present.iter().map(|t| Some(tasks[*t].task.clone())).collect();
            for (row, found) in batch_rows.iter().zip(encoder.forward(&Arc::new(batch), &attached)?) {
                let (t, i) = rows[*row];
                logits[t][i] = found;
            }
        }
    }

    let mut of_tasks = Vec::with_capacity(tasks.len());
    for (task, logits) in tasks.iter().zip(&logits) {
        if let Some(i) = logits.iter().position(|z| z.iter().any(|z| !z.is_finite())) {
            return Err(not_finite(encoder, task, &name(i)));
        }
        of_tasks.push(logits.iter().map(|z| from_logits(&task.metadata().problem, z)).collect());
    }
    let truncated = tasks.iter().map(|t| of_task(t).iter().filter(|e| e.truncated).count()).collect();
    Ok(Predictions { of_tasks, truncated })
}

/// What is wrong where an answer is no number.
fn not_finite(encoder: &Encoder, task: &TaskPatch, input: &str) -> Error {
    let (name, hash) = (task.name(), &task.content_hash()[..8]);
    let advice = match encoder.precision() {
        PrecisionName::F32 => "the patch's values are too large for this base; leave it out, or train it anew",
        _ => "the patch's values may be too large for this precision; try --precision f32, or leave it out",
    };
    Error::Device(format!("{name} (patch {hash}) gives an output that is not finite for {input}: {advice}"))
}

/// Whether an input is one that every task can answer.
fn check(tasks: &[TaskPatch], input: &Input, name: impl Fn() -> String) -> Result<()> {
    let texts = if input.text_pair.is_some() { Texts::Two } else { Texts::One };
    if let Some(task) = tasks.iter().find(|task| task.metadata().texts != texts) {
        let (wants, has) = (task.metadata().texts.count(), texts.count());
        let what = format!("texts of an input for task {}", task.name());
        return Err(Error::setting(what, format!("{wants}, as it was trained"), has));
    }
    let blank = |text: &str| text.trim().is_empty();
    if blank(&input.text) || input.text_pair.as_deref().is_some_and(blank) {
        return Err(Error::setting(format!("text of {}", name()), "words", "none"));
    }
    Ok(())
}
