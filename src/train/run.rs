//! One run, from its rows to the patch in its folder.
//!
//! Everything that can be wrong with what was asked is found before the folder is touched. Then the loop: a step, at
//! the end of an epoch an evaluation and a checkpoint, and whenever the caller raises the stop flag a checkpoint and
//! [`Error::Interrupted`].

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::checkpoint::{Checkpoint, Stored};
use super::config::{Keep, TrainConfig};
use super::folder::{Existing, RunFolder};
use super::head::start;
use super::identity::Identity;
use super::record::{DataRecord, RunRecord};
use super::session::{Dev, Session};
use super::step::Progress;
use crate::base::problem::{Problem, Texts};
use crate::data::{Dataset, Sequence, encode};
use crate::device::batch::Target;
use crate::encoder::{Encoder, Run, Training};
use crate::error::{Error, Result};
use crate::patch::{Counts, Patch, check_problem, check_task_name};

/// What to train, on what, and where it goes.
#[derive(Debug, Clone, Copy)]
pub struct Job<'a> {
    /// The settings.
    pub config: &'a TrainConfig,
    /// The rows to train on, all with targets; its name is the task's.
    pub train: &'a Dataset,
    /// The splits to evaluate on, by name; the first chooses the best epoch, and its metrics stand in the patch.
    pub dev: &'a [(String, Dataset)],
    /// The run's folder; made where it is not there.
    pub out: &'a Path,
    /// What to do where it already holds a run.
    pub existing: Existing,
    /// The most bytes that a step's activations may take; it changes no result. See [`Encoder::trainer_within`].
    pub memory_budget: Option<usize>,
}

/// What happens in a run, as it happens.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The first step comes next.
    Started {
        /// Steps already done, where a run is resumed.
        step: u64,
        /// Steps of the whole run.
        steps: u64,
        /// What trains.
        parameters: Counts,
        /// What was read, by split.
        data: &'a BTreeMap<String, DataRecord>,
    },
    /// A step is done.
    Step {
        /// Steps done.
        step: u64,
        /// The epoch, counted from 1.
        epoch: u32,
        /// The step's mean loss, dropout on.
        loss: f64,
        /// Tokens a second, over the run's steps since it was started or resumed.
        tokens_per_s: f64,
    },
    /// A dev split was scored.
    Evaluated {
        /// Steps done.
        step: u64,
        /// The epoch, counted from 1.
        epoch: u32,
        /// The split.
        split: &'a str,
        /// The metric that epochs are compared by.
        main_metric: &'static str,
        /// The split's metrics.
        metrics: &'a BTreeMap<String, f64>,
    },
}

/// A finished run.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The task, as it stands in the folder's `patch.safetensors`.
    pub patch: Patch,
    /// What stands in `run.json`.
    pub record: RunRecord,
    /// Whether the folder held the finished run already, so that nothing was left to do.
    pub was_finished: bool,
}

/// Trains a task and writes its run folder.
///
/// The same base, settings and rows give the same patch, to the byte. Raising `stop` ends the run after the step or the
/// batch it is at, with a checkpoint. A run that fails before its first checkpoint leaves no files.
///
/// # Errors
///
/// Rows or settings that do not fit the base or each other, a folder that cannot be used as asked, a resume with other
/// settings or data, [`Error::Interrupted`], [`Error::Diverged`], [`Error::Audit`], and whatever device and disk report.
pub fn run(encoder: &Encoder, job: &Job, on_event: &mut dyn FnMut(Event), stop: &AtomicBool) -> Result<Outcome> {
    run_with(encoder, job, on_event, stop, &|run| encoder.trainer_within(std::slice::from_ref(run), job.memory_budget))
}

/// [`run`], over a trainer that the caller makes: how a test breaks a gradient on purpose.
pub(super) fn run_with(
    encoder: &Encoder,
    job: &Job,
    on_event: &mut dyn FnMut(Event),
    stop: &AtomicBool,
    trainer: &dyn Fn(&Run) -> Result<Box<dyn Training>>,
) -> Result<Outcome> {
    let folder = RunFolder::new(job.out);
    folder.check(job.existing)?;
    check_rows(job)?;
    let (base, config) = (encoder.base(), job.config);
    let limit = config.limit.unwrap_or(usize::MAX).min(job.train.examples.len());
    let train = job.train.with(job.train.examples[..limit].to_vec());
    let identity = Identity::of(base, encoder.precision(), config, &train, job.dev)?;
    let mut run = start(base, &config.selection, train.problem.n_outputs(), config.seed)?;

    let state_path = folder.state();
    let stored = if job.existing == Existing::Resume { Stored::read(&state_path)? } else { None };
    if let Some(stored) = &stored {
        identity.check_same(stored.identity(), folder.path())?;
    }
    if job.existing == Existing::Resume && stored.is_none() && folder.patch().exists() {
        return Err(Error::Usage(format!(
            "{} holds a patch but no {}, so there is nothing to go on from; --overwrite trains anew in its place",
            folder.path().display(),
            state_path.display()
        )));
    }
    let checkpoint = stored.map(|stored| stored.into_checkpoint(&run)).transpose()?;

    let mut data = BTreeMap::new();
    let mut sequences = |split: &str, dataset: &Dataset| -> Result<Vec<Sequence>> {
        let encoded = encode(&dataset.examples, base.tokenizer()?, config.max_length)?;
        let (examples, truncated, skipped) = (dataset.examples.len(), encoded.truncated, dataset.skipped);
        data.insert(split.to_string(), DataRecord { examples, truncated, skipped });
        Ok(encoded.sequences)
    };
    let train_sequences = sequences("train", &train)?;
    let mut dev = Vec::new();
    for (split, dataset) in job.dev {
        dev.push(Dev { split: split.clone(), sequences: sequences(split, dataset)? });
    }
    let step = checkpoint.as_ref().map_or(0, |c| c.state.step);
    let progress = Progress::new(config, train_sequences, step)?;

    let resumed = checkpoint.is_some();
    if let Some(Checkpoint { values, .. }) = &checkpoint {
        run.start = values.clone();
    }
    let mut session = Session::new(encoder, job, &folder, identity, data, dev, progress, run, checkpoint)?;
    if session.is_done() && session.is_evaluated() && folder.patch().exists() {
        let patch = Patch::load(&folder.patch())?;
        return Ok(Outcome { record: session.record(Some(&patch)), patch, was_finished: true });
    }
    let trainer = trainer(session.start())?;
    if !resumed {
        folder.remove_run()?;
    }
    let outcome = session.begin(trainer).and_then(|()| looped(&mut session, on_event, stop));
    // A run without a checkpoint cannot be gone on with, so it leaves nothing; one that was stopped has one.
    if outcome.is_err() && !state_path.exists() {
        folder.remove_run().ok();
    }
    let patch = outcome?;
    Ok(Outcome { record: session.record(Some(&patch)), patch, was_finished: false })
}

fn looped(session: &mut Session, on_event: &mut dyn FnMut(Event), stop: &AtomicBool) -> Result<Patch> {
    session.announce(on_event);
    loop {
        let stopped = match session.is_evaluated() {
            true => Ok(()),
            false => session.evaluate(on_event, stop),
        };
        match stopped {
            Err(Error::Interrupted(_)) => {}
            Err(error) => return Err(error),
            Ok(()) if session.is_done() => return session.finish(),
            Ok(()) => {}
        }
        if stop.load(Ordering::Relaxed) {
            return Err(session.interrupt()?);
        }
        session.step(on_event)?;
    }
}

/// Refuses rows that the settings or the task cannot use.
fn check_rows(job: &Job) -> Result<()> {
    check_task_name(&job.train.name)?;
    check_problem(&job.train.problem)?;
    if job.dev.is_empty() && job.config.keep == Keep::Best {
        return Err(Error::Usage(
            "there are no dev rows to choose the best epoch by; give some, or use --keep last".into(),
        ));
    }
    let splits = job.dev.iter().map(|(split, dataset)| (split.as_str(), dataset));
    for (split, dataset) in splits.chain([("train", job.train)]) {
        if dataset.examples.is_empty() {
            return Err(Error::Usage(format!("{}: there are no rows in {split}", job.train.name)));
        }
        if (&dataset.problem, dataset.texts) != (&job.train.problem, job.train.texts) {
            return Err(Error::Usage(format!("{}: {split} is of another task than train", job.train.name)));
        }
        for (i, example) in dataset.examples.iter().enumerate() {
            let fits = match (&dataset.problem, example.target) {
                (Problem::Classes(labels), Some(Target::Class(class))) => (class as usize) < labels.len(),
                (Problem::Value, Some(Target::Value(value))) => value.is_finite(),
                _ => false,
            };
            if !fits || example.text_pair.is_some() != (dataset.texts == Texts::Two) {
                let task = &job.train.name;
                return Err(Error::Usage(format!(
                    "{task}: row {} of {split} has no label or text of this task",
                    i + 1
                )));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::base::Base;
    use crate::base::delta::Delta;
    use crate::data::{Example, Metric};
    use crate::device::Placement;
    use crate::device::batch::Batch;
    use crate::device::ops::Dropout;
    use crate::encoder::{Moments, Report, Rule};
    use crate::train::Options;

    /// A trainer that works, but for one tensor whose gradient is cut, or frozen weights that change.
    struct Broken {
        inner: Box<dyn Training>,
        cut: &'static str,
        changed: bool,
    }

    impl Training for Broken {
        fn step(&mut self, batches: &[Arc<Batch>], d: Dropout, rules: &[Option<Rule>]) -> Result<Vec<Report>> {
            self.inner.step(batches, d, rules)
        }
        fn accumulate(&mut self, batches: &[Arc<Batch>], dropout: Dropout) -> Result<Vec<f64>> {
            self.inner.accumulate(batches, dropout)
        }
        fn gradients(&mut self, g: usize) -> BTreeMap<String, Vec<f32>> {
            let mut all = self.inner.gradients(g);
            if let Some(gradient) = all.get_mut(self.cut) {
                gradient.fill(0.0);
            }
            all
        }
        fn delta(&self, g: usize) -> Delta {
            self.inner.delta(g)
        }
        fn moments(&self, g: usize) -> Moments {
            self.inner.moments(g)
        }
        fn restore(&mut self, g: usize, moments: &Moments) -> Result<()> {
            self.inner.restore(g, moments)
        }
        fn logits(&mut self, batch: &Arc<Batch>) -> Result<Vec<Vec<f32>>> {
            self.inner.logits(batch)
        }
        fn weights_hash(&self) -> String {
            let hash = self.inner.weights_hash();
            if self.changed { hash.chars().rev().collect() } else { hash }
        }
        fn peak_bytes(&self) -> usize {
            self.inner.peak_bytes()
        }
    }

    fn rows() -> Dataset {
        let example = |i: u32| Example {
            text: format!("the {} was good", if i.is_multiple_of(2) { "cat" } else { "plot" }),
            text_pair: None,
            target: Some(Target::Class(i % 2)),
        };
        Dataset {
            name: "small".into(),
            problem: Problem::Classes(vec!["a".into(), "b".into()]),
            texts: Texts::One,
            metrics: &[Metric::Accuracy],
            examples: (0..20).map(example).collect(),
            skipped: 0,
        }
    }

    fn run_broken(cut: &'static str, changed: bool) -> (Result<Outcome>, bool) {
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny");
        let encoder =
            Encoder::new(&Base::from_folder(&tiny).unwrap(), Placement { n_threads: 1, ..Placement::default() })
                .unwrap();
        let config = Options { epochs: 1, ..Options::default() }.check(encoder.base()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("run");
        let (train, dev) = (rows(), [("dev".to_string(), rows())]);
        let job = Job {
            config: &config,
            train: &train,
            dev: &dev,
            out: &out,
            existing: Existing::Refuse,
            memory_budget: None,
        };
        let trainer = |run: &Run| -> Result<Box<dyn Training>> {
            Ok(Box::new(Broken { inner: encoder.trainer(std::slice::from_ref(run))?, cut, changed }))
        };
        let outcome = run_with(&encoder, &job, &mut |_| (), &AtomicBool::new(false), &trainer);
        (outcome, out.join("patch.safetensors").exists())
    }

    #[test]
    fn a_whole_run_passes_its_audit() {
        let (outcome, patch) = run_broken("", false);
        assert!(outcome.unwrap().record.finished && patch);
    }

    #[test]
    fn a_gradient_that_is_cut_ends_the_run_and_is_named() {
        for cut in ["encoder.layer.0.intermediate.dense.bias", "pooler.dense.bias", "classifier.weight"] {
            let (outcome, patch) = run_broken(cut, false);
            let error = outcome.unwrap_err();
            assert_eq!(error.kind(), crate::Kind::Audit);
            assert!(error.to_string().contains(&format!("{cut} received no gradient")), "{error}");
            assert!(!patch);
        }
    }

    #[test]
    fn frozen_weights_that_change_leave_no_patch() {
        let (outcome, patch) = run_broken("", true);
        assert!(outcome.unwrap_err().to_string().contains("the frozen weights changed"));
        assert!(!patch);
    }
}
