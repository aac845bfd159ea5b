//! Many tasks over one base: each text through every task, mixed in one batch.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use super::answer::{Prediction, from_logits};
use super::batching::MAX_TOKENS;
use crate::base::problem::Texts;
use crate::base::tokenizer::{Encoding, Tokenizer};
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
    name: Arc<str>,
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
        let metadata = patch.metadata().clone();
        Ok(TaskPatch { name: metadata.task.as_str().into(), metadata: Arc::new(metadata), task })
    }

    /// The same under another name, as a store of patches gives its own.
    pub fn named(self, name: &str) -> Self {
        TaskPatch { name: name.into(), ..self }
    }

    /// The name that answers and errors carry: the patch's own, unless [`TaskPatch::named`] gave another.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the patch says of itself.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The patch's identity: SHA-256 over its metadata, tensor table and data, in hexadecimal.
    pub fn content_hash(&self) -> &str {
        &self.metadata.content_hash
    }

    /// Its values, as the encoder holds them.
    pub fn task(&self) -> &Task {
        &self.task
    }

    /// Whether an input, the `i`th of a call from 0, is one that this task can answer.
    ///
    /// # Errors
    ///
    /// A task of two texts that is given one, or the reverse.
    pub fn check(&self, input: &Input, i: usize) -> Result<()> {
        let texts = if input.text_pair.is_some() { Texts::Two } else { Texts::One };
        if self.metadata.texts != texts {
            let (wants, has) = (self.metadata.texts.count(), texts.count());
            let what = format!("texts of input {} for task {}", i + 1, self.name());
            return Err(Error::setting(what, format!("{wants}, as it was trained"), has));
        }
        Ok(())
    }

    /// What logits say, computed in `precision` for the `i`th input of a call, from 0.
    ///
    /// # Errors
    ///
    /// Where one is not finite.
    pub fn prediction(&self, logits: &[f32], precision: PrecisionName, i: usize) -> Result<Prediction> {
        if logits.iter().all(|z| z.is_finite()) {
            return Ok(from_logits(&self.metadata.problem, logits));
        }
        let advice = match precision {
            PrecisionName::F32 => "the patch's values are too large for this base; leave it out, or train it anew",
            _ => "the patch's values may be too large for this precision; try --precision f32, or leave it out",
        };
        let (name, hash, input) = (self.name(), &self.content_hash()[..8], i + 1);
        Err(Error::Device(format!(
            "{name} (patch {hash}) gives an output that is not finite for input {input}: {advice}"
        )))
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

impl Input {
    /// Whether there are words in it; it is the `i`th of a call, from 0.
    ///
    /// # Errors
    ///
    /// Where a text is empty or of white space alone.
    pub fn check(&self, i: usize) -> Result<()> {
        let blank = |text: &str| text.trim().is_empty();
        if blank(&self.text) || self.text_pair.as_deref().is_some_and(blank) {
            return Err(Error::setting(format!("text of input {}", i + 1), "words", "none"));
        }
        Ok(())
    }
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
    predict_from(encoder, tasks, inputs, 0)
}

/// [`predict`] of a part of many inputs, of which `first` came before: an error counts them.
pub(super) fn predict_from(
    encoder: &Encoder,
    tasks: &[TaskPatch],
    inputs: &[Input],
    first: usize,
) -> Result<Predictions> {
    for (i, input) in (first..).zip(inputs) {
        input.check(i)?;
        tasks.iter().try_for_each(|task| task.check(input, i))?;
    }
    let encodings = tokenise(encoder.base().tokenizer()?, inputs, tasks.iter().map(|t| t.metadata().max_length))?;
    let of_task = |t: &TaskPatch| &encodings[&t.metadata().max_length];

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
                let Encoding { ids, type_ids, .. } = &*of_task(&tasks[t])[i];
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
        let precision = encoder.precision();
        let of_task = (first..).zip(logits).map(|(i, z)| task.prediction(z, precision, i));
        of_tasks.push(of_task.collect::<Result<_>>()?);
    }
    let truncated = tasks.iter().map(|t| of_task(t).iter().filter(|e| e.truncated).count()).collect();
    Ok(Predictions { of_tasks, truncated })
}

/// The inputs as tasks of these maximum lengths read them: once a length, not once a task.
///
/// # Errors
///
/// What the tokenizer reports.
pub fn tokenise(
    tokenizer: &Tokenizer,
    inputs: &[Input],
    lengths: impl IntoIterator<Item = usize>,
) -> Result<BTreeMap<usize, Vec<Arc<Encoding>>>> {
    let of_length = |length| {
        let of = |input: &Input| tokenizer.encode(&input.text, input.text_pair.as_deref(), length).map(Arc::new);
        Ok((length, inputs.iter().map(of).collect::<Result<_>>()?))
    };
    lengths.into_iter().collect::<BTreeSet<_>>().into_iter().map(of_length).collect()
}
