//! The state of a run on disk: values, moments and how far it is, so that a resumed run takes the same steps.
//!
//! One safetensors file, `checkpoint/state.safetensors`: `values/NAME`, `m/NAME` and `v/NAME` (AdamW's moments), and
//! `best/NAME` where an epoch is kept for being the best; the rest is JSON in its metadata.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use safetensors::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::record::EpochRecord;
use crate::base::delta::{Change, Delta, Head, Request};
use crate::encoder::{Moments, Run};
use crate::error::{Error, Result};
use crate::patch::write_aside;

/// The metadata's key of [`State`] and of the run's identity.
const STATE: &str = "bitfit_state";
const IDENTITY: &str = "bitfit_identity";

/// How far a run is, without its tensors.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Optimizer steps done.
    pub step: u64,
    /// Every evaluation so far.
    pub evaluations: Vec<EpochRecord>,
    /// Which of them is kept for being the best.
    pub best: Option<usize>,
    /// Seconds spent in training steps.
    pub train_seconds: f64,
    /// Tokens that went through training steps.
    pub train_tokens: u64,
}

/// All that a run goes on from.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// How far it is.
    pub state: State,
    /// The values as they stand.
    pub values: Delta,
    /// The optimizer's memory.
    pub moments: Moments,
    /// The values of the best epoch, where one is kept.
    pub best: Option<Delta>,
}

/// A vector of f32 to be written, flat: whoever reads it knows the shape from the base.
struct Vector<'a> {
    values: &'a [f32],
    shape: [usize; 1],
}

impl View for Vector<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        bytemuck::cast_slice(self.values).into()
    }
    fn data_len(&self) -> usize {
        size_of_val(self.values)
    }
}

impl Checkpoint {
    /// Writes the file: aside, synced, renamed over the one before.
    ///
    /// # Errors
    ///
    /// What the operating system reports; the file before is then still there.
    pub fn save(&self, path: &Path, identity: &Value) -> Result<()> {
        let mut tensors: Vec<(String, Vector)> = Vec::new();
        let mut add = |kind: &str, name: &str, values| {
            tensors.push((format!("{kind}/{name}"), Vector { values, shape: [values.len()] }));
        };
        named(&self.values, |name, values| add("values", name, values));
        for (name, (m, v)) in &self.moments.tensors {
            add("m", name, m);
            add("v", name, v);
        }
        if let Some(best) = &self.best {
            named(best, |name, values| add("best", name, values));
        }
        let invalid = |e: serde_json::Error| Error::Audit(format!("the state of the run cannot be written: {e}"));
        let state = serde_json::to_string(&self.state).map_err(invalid)?;
        let about = HashMap::from([(STATE.to_string(), state), (IDENTITY.to_string(), identity.to_string())]);
        // Not `serialize_to_file`: it renames a file of its own over ours, which is then neither synced nor readable by
        // whom the umask says.
        let bytes = safetensors::serialize(tensors, Some(about))
            .map_err(|e| Error::Audit(format!("the state of the run cannot be written: {e}")))?;
        write_aside(path, |file| file.write_all(&bytes))
    }
}

/// A checkpoint's file, read and not yet believed: its identity is asked for first.
pub struct Stored<'p> {
    path: &'p Path,
    bytes: Vec<u8>,
    identity: Value,
    state: State,
}

impl<'p> Stored<'p> {
    /// Reads a checkpoint; `None` where there is none.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or is damaged.
    pub fn read(path: &'p Path) -> Result<Option<Self>> {
        if !path.exists() {
            return Ok(None);
        }
        let bytes = fs::read(path).map_err(Error::io("read", path))?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| damaged(path, &e.to_string()))?;
        let about = header.metadata().as_ref();
        let text = |key: &str| about.and_then(|about| about.get(key)).ok_or_else(|| damaged(path, "no state in it"));
        let state = serde_json::from_str(text(STATE)?).map_err(|e| damaged(path, &e.to_string()))?;
        let identity = serde_json::from_str(text(IDENTITY)?).map_err(|e| damaged(path, &e.to_string()))?;
        Ok(Some(Stored { path, bytes, identity, state }))
    }

    /// The identity of the run that wrote it.
    pub fn identity(&self) -> &Value {
        &self.identity
    }

    /// The checkpoint, for the run that starts as `run`.
    ///
    /// # Errors
    ///
    /// A tensor that is missing or of another size than the run's.
    pub fn into_checkpoint(self, run: &Run) -> Result<Checkpoint> {
        let tensors = SafeTensors::deserialize(&self.bytes).map_err(|e| damaged(self.path, &e.to_string()))?;
        let vector = |name: &str, n: usize| -> Result<Vec<f32>> {
            let found = tensors.tensor(name).ok().filter(|t| t.dtype() == Dtype::F32 && t.data().len() == 4 * n);
            let found = found.ok_or_else(|| damaged(self.path, &format!("no tensor {name} of {n} values")))?;
            let value = |bytes: &[u8]| bytes.try_into().map_or(f32::NAN, f32::from_le_bytes);
            Ok(found.data().chunks_exact(4).map(value).collect())
        };
        let delta = |kind: &str| filled(run, &mut |name, n| vector(&format!("{kind}/{name}"), n));
        let mut moments = Moments { step: self.state.step, ..Moments::default() };
        let mut names = Vec::new();
        named(&run.start, |name, values| names.push((name.to_string(), values.len())));
        for (name, n) in names {
            let pair = (vector(&format!("m/{name}"), n)?, vector(&format!("v/{name}"), n)?);
            moments.tensors.insert(name, pair);
        }
        let best = self.state.best.map(|_| delta("best")).transpose()?;
        if self.state.best.is_some_and(|best| best >= self.state.evaluations.len()) {
            return Err(damaged(self.path, "its best epoch is none of its epochs"));
        }
        let values = delta("values")?;
        Ok(Checkpoint { values, moments, best, state: self.state })
    }
}

fn damaged(path: &Path, why: &str) -> Error {
    Error::content(path, format!("this checkpoint is damaged ({why}); start anew with --overwrite"))
}

/// Every vector of a task's values, by the name that moments and gradients have too.
fn named<'d>(delta: &'d Delta, mut each: impl FnMut(&str, &'d [f32])) {
    for (name, change) in &delta.changes {
        match change {
            Change::Dense(values) | Change::Sparse { values, .. } => each(name, values),
        }
    }
    each("classifier.weight", &delta.head.weight);
    each("classifier.bias", &delta.head.bias);
    if let Some((weight, bias)) = &delta.head.pooler {
        each("pooler.dense.weight", weight);
        each("pooler.dense.bias", bias);
    }
}

/// Values in the form of a run's start, each vector given by its name and length.
fn filled(run: &Run, of: &mut dyn FnMut(&str, usize) -> Result<Vec<f32>>) -> Result<Delta> {
    let mut changes = BTreeMap::new();
    for (name, change) in &run.start.changes {
        let change = match (change, run.requests.get(name)) {
            (Change::Dense(start), _) => Change::Dense(of(name, start.len())?),
            (Change::Sparse { .. }, Some(Request::Entries(indices))) | (Change::Sparse { indices, .. }, _) => {
                Change::Sparse { indices: indices.clone(), values: of(name, indices.len())? }
            }
        };
        changes.insert(name.clone(), change);
    }
    let start = &run.start.head;
    let mut pair = |weight: &str, bias: &str, (w, b): (usize, usize)| Ok((of(weight, w)?, of(bias, b)?));
    let (weight, bias) = pair("classifier.weight", "classifier.bias", (start.weight.len(), start.bias.len()))?;
    let pooler = start.pooler.as_ref().map(|(w, b)| (w.len(), b.len()));
    let pooler = pooler.map(|sizes| pair("pooler.dense.weight", "pooler.dense.bias", sizes)).transpose()?;
    Ok(Delta { changes, head: Head { n_outputs: start.n_outputs, weight, bias, pooler } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::{Base, Config};
    use crate::patch::{Method, Selection};
    use crate::train::start;

    fn example(method: Method, best: bool) -> (Run, Checkpoint) {
        let base = Base::random(Config::tiny(), 0);
        let run = start(&base, &Selection::new(method), 2, 7).unwrap();
        let mut moments = Moments { step: 5, ..Moments::default() };
        named(&run.start, |name, values| {
            moments.tensors.insert(name.to_string(), (vec![0.5; values.len()], vec![0.25; values.len()]));
        });
        let evaluation = EpochRecord { epoch: 1, step: 4, metrics: BTreeMap::new() };
        let best_values = best.then(|| run.start.clone());
        let state = State { step: 5, evaluations: vec![evaluation], best: best.then_some(0), ..State::default() };
        let checkpoint = Checkpoint { state, values: run.start.clone(), moments, best: best_values };
        (run, checkpoint)
    }

    #[test]
    fn a_checkpoint_reads_back_to_the_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        for (method, best) in [(Method::Bitfit, true), (Method::Random, false), (Method::Full, true)] {
            let (run, checkpoint) = example(method, best);
            checkpoint.save(&path, &serde_json::json!({"seed": 7})).unwrap();
            let stored = Stored::read(&path).unwrap().unwrap();
            assert_eq!(stored.identity(), &serde_json::json!({"seed": 7}));
            assert_eq!(stored.into_checkpoint(&run).unwrap(), checkpoint, "{method}");
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
        }
    }

    #[test]
    fn where_there_is_none_there_is_none() {
        assert!(Stored::read(Path::new("no/such/file")).unwrap().is_none());
    }

    #[test]
    fn a_truncated_checkpoint_is_refused_at_every_length() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        let (run, checkpoint) = example(Method::Frozen, false);
        checkpoint.save(&path, &Value::Null).unwrap();
        let bytes = fs::read(&path).unwrap();
        for n in 0..bytes.len() {
            fs::write(&path, &bytes[..n]).unwrap();
            let read = Stored::read(&path).and_then(|stored| stored.unwrap().into_checkpoint(&run).map(|_| ()));
            assert!(read.unwrap_err().to_string().contains("damaged"), "{n} bytes");
        }
    }
}
