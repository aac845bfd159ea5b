//! A run in progress: its trainer, its rows, what it has learned to say of itself, and the files it keeps.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde_json::json;

use super::audit::{self, RowsRead};
use super::checkpoint::{Checkpoint, State};
use super::config::Keep;
use super::evaluate::evaluate;
use super::folder::RunFolder;
use super::identity::Identity;
use super::record::{DataRecord, EpochRecord, MetricsLog, RunRecord};
use super::run::{Event, Job};
use super::step::{Progress, step};
use crate::base::delta::Delta;
use crate::base::problem::Problem;
use crate::data::Sequence;
use crate::device::batch::Batch;
use crate::encoder::{Encoder, Moments, Report, Run, Training};
use crate::error::{Error, Result};
use crate::patch::{Counts, Dtype, Metadata, Method, Patch, Pooling};

/// Steps between two lines of `metrics.jsonl`.
const LOG_EVERY: u64 = 10;
/// What the patch says its metrics are of where there were no dev rows.
const NO_SPLIT: &str = "none";

/// A dev split, tokenised.
pub struct Dev {
    /// Its name.
    pub split: String,
    /// Its rows.
    pub sequences: Vec<Sequence>,
}

/// A run in progress.
pub struct Session<'a> {
    encoder: &'a Encoder,
    job: &'a Job<'a>,
    folder: &'a RunFolder,
    identity: Identity,
    parameters: Counts,
    data: BTreeMap<String, DataRecord>,
    dev: Vec<Dev>,
    /// One run: a slice, as a step takes several.
    progress: [Progress; 1],
    start: Run,
    moments: Option<Moments>,
    best: Option<Delta>,
    state: State,
    live: Option<Live>,
}

/// What a run has once it begins.
struct Live {
    trainer: Box<dyn Training>,
    log: MetricsLog,
    weights_hash: String,
    audited: bool,
    /// Since the last line of the log.
    window: Window,
    /// Seconds and tokens since the run was started or resumed.
    seconds: f64,
    tokens: u64,
}

#[derive(Default)]
struct Window {
    steps: u64,
    loss: f64,
    grad_norm: f64,
    seconds: f64,
    tokens: u64,
}

impl<'a> Session<'a> {
    /// A run that is about to begin, or to go on from a checkpoint whose values `start` holds.
    #[expect(clippy::too_many_arguments, reason = "the parts of a run, made by one caller")]
    pub fn new(
        encoder: &'a Encoder,
        job: &'a Job<'a>,
        folder: &'a RunFolder,
        identity: Identity,
        data: BTreeMap<String, DataRecord>,
        dev: Vec<Dev>,
        progress: Progress,
        start: Run,
        checkpoint: Option<Checkpoint>,
    ) -> Result<Self> {
        let base = encoder.base();
        let parameters = job.config.selection.counts(base.config(), base.has_pooler(), &job.train.problem)?;
        let (state, moments, best) = match checkpoint {
            Some(c) => (c.state, Some(c.moments), c.best),
            None => (State::default(), None, None),
        };
        let progress = [progress];
        Ok(Session {
            encoder,
            job,
            folder,
            identity,
            parameters,
            data,
            dev,
            progress,
            start,
            moments,
            best,
            state,
            live: None,
        })
    }

    /// What the trainer starts from.
    pub fn start(&self) -> &Run {
        &self.start
    }

    /// Whether all steps are done.
    pub fn is_done(&self) -> bool {
        self.progress[0].is_done()
    }

    /// Whether there is nothing to evaluate at this step, or it is done.
    pub fn is_evaluated(&self) -> bool {
        let done = self.state.evaluations.last().is_some_and(|last| last.step == self.state.step);
        done || !self.progress[0].is_at_evaluation()
    }

    /// Takes the trainer and opens the run's files.
    pub fn begin(&mut self, mut trainer: Box<dyn Training>) -> Result<()> {
        if let Some(moments) = self.moments.take() {
            trainer.restore(0, &moments)?;
        }
        self.folder.create()?;
        let log = MetricsLog::open(&self.folder.metrics(), self.state.step)?;
        self.live = Some(Live {
            trainer,
            log,
            weights_hash: self.encoder.weights_hash(),
            audited: false,
            window: Window::default(),
            seconds: 0.0,
            tokens: 0,
        });
        self.record(None).save(&self.folder.record())
    }

    /// Tells that the first step comes next.
    pub fn announce(&self, on_event: &mut dyn FnMut(Event)) {
        let (step, steps) = (self.state.step, self.progress[0].total_steps());
        on_event(Event::Started { step, steps, parameters: self.parameters, data: &self.data });
    }

    /// One optimizer step.
    pub fn step(&mut self, on_event: &mut dyn FnMut(Event)) -> Result<()> {
        let live = live(&mut self.live)?;
        let rows = (!live.audited).then(|| self.progress[0].next_rows());
        let rule = self.progress[0].config().rule(self.state.step, self.progress[0].total_steps());
        let began = Instant::now();
        let stepped = step(&mut *live.trainer, &mut self.progress)?;
        let seconds = began.elapsed().as_secs_f64();
        self.state.step = self.progress[0].step();
        let (at, report) = (self.state.step, stepped.reports[0]);
        check_finite(at, &report)?;
        if let Some(rows) = rows {
            let read = RowsRead::of(rows.iter().map(|row| self.progress[0].sequence(*row)));
            let found = live.trainer.gradients(0);
            live.audited = audit::gradients(self.encoder.base(), &self.start, &found, report.loss, &read)?;
        }
        let tokens = stepped.n_tokens as u64;
        live.seconds += seconds;
        live.tokens += tokens;
        self.state.train_seconds += seconds;
        self.state.train_tokens += tokens;
        let window = &mut live.window;
        window.steps += 1;
        window.loss += report.loss;
        window.grad_norm += report.grad_norm;
        window.seconds += seconds;
        window.tokens += tokens;
        let epoch = self.progress[0].epoch();
        if at.is_multiple_of(LOG_EVERY) || self.progress[0].is_at_evaluation() {
            live.log_window(at, epoch, rule.learning_rate)?;
        }
        let tokens_per_s = rate(live.tokens, live.seconds);
        on_event(Event::Step { step: at, epoch, loss: report.loss, tokens_per_s });
        Ok(())
    }

    /// Scores the dev splits, keeps the epoch where it is the best, and writes its patch and a checkpoint.
    ///
    /// # Errors
    ///
    /// [`Error::Interrupted`] where the stop flag is raised; nothing is then changed.
    pub fn evaluate(&mut self, on_event: &mut dyn FnMut(Event), stop: &AtomicBool) -> Result<()> {
        let live = live(&mut self.live)?;
        let (task, epoch, at) = (self.job.train, self.progress[0].epoch(), self.state.step);
        let mut found = Vec::new();
        for dev in &self.dev {
            let mut forward = |batch: &Arc<Batch>| match stop.load(Ordering::Relaxed) {
                true => Err(Error::Interrupted(String::new())),
                false => live.trainer.logits(batch),
            };
            found.push((&dev.split, evaluate(&dev.sequences, &task.problem, task.metrics, &mut forward)?));
        }
        let mut record = EpochRecord { epoch, step: at, metrics: BTreeMap::new() };
        for (split, evaluation) in found {
            let (metrics, examples) = (&evaluation.metrics, evaluation.examples);
            let line = json!({"step": at, "epoch": epoch, "split": split, "examples": examples, "metrics": metrics});
            live.log.add(&line)?;
            on_event(Event::Evaluated { step: at, epoch, split, main_metric: task.main_metric().name(), metrics });
            record.metrics.insert(split.clone(), evaluation.metrics);
        }
        self.state.evaluations.push(record);
        let newest = self.state.evaluations.len() - 1;
        let values = live.trainer.delta(0);
        if self.job.config.keep == Keep::Best && self.is_better(newest) {
            self.state.best = Some(newest);
            self.best = Some(values.clone());
        }
        if matches!(self.job.config.selection.method, Method::Bitfit | Method::Frozen) {
            self.patch(values, newest)?.save(&self.folder.epoch(epoch), Dtype::F32)?;
        }
        self.checkpoint()?;
        self.record(None).save(&self.folder.record())
    }

    /// Whether an evaluation's main metric is above the best so far.
    fn is_better(&self, newest: usize) -> bool {
        let main = self.job.train.main_metric().name();
        let split = self.dev.first().map(|dev| &dev.split);
        let of = |i: usize| split.and_then(|split| self.state.evaluations[i].metrics.get(split)?.get(main));
        match (self.state.best.map(of), of(newest)) {
            (None, _) => true,
            (Some(best), newest) => newest > best,
        }
    }

    /// Writes the state to go on from.
    fn checkpoint(&mut self) -> Result<()> {
        let live = live(&mut self.live)?;
        let (values, moments) = (live.trainer.delta(0), live.trainer.moments(0));
        let checkpoint = Checkpoint { state: self.state.clone(), values, moments, best: self.best.clone() };
        checkpoint.save(&self.folder.state(), &self.identity.to_json())
    }

    /// Writes a checkpoint at a place that the caller chose; what is returned is how to say so.
    pub fn interrupt(&mut self) -> Result<Error> {
        let (at, total, epoch) = (self.state.step, self.progress[0].total_steps(), self.progress[0].epoch());
        let learning_rate = self.progress[0].config().rule(at.saturating_sub(1), total).learning_rate;
        live(&mut self.live)?.log_window(at, epoch, learning_rate)?;
        self.checkpoint()?;
        self.record(None).save(&self.folder.record())?;
        let state = self.folder.state();
        Ok(Error::Interrupted(format!("at step {at} of {total}; {} holds all that --resume needs", state.display())))
    }

    /// Checks that nothing frozen has changed, and writes the patch and the record.
    pub fn finish(&mut self) -> Result<Patch> {
        let live = live(&mut self.live)?;
        audit::frozen(&live.weights_hash, &self.encoder.weights_hash())?;
        if matches!(self.job.config.selection.method, Method::Bitfit | Method::Frozen) {
            audit::frozen(&live.weights_hash, &live.trainer.weights_hash())?;
        }
        let last = self.state.evaluations.len().saturating_sub(1);
        let (values, kept) = match (self.state.best, self.best.take()) {
            (Some(best), Some(values)) => (values, best),
            _ => (live.trainer.delta(0), last),
        };
        let patch = self.patch(values, kept)?;
        patch.save(&self.folder.patch(), Dtype::F32)?;
        self.record(Some(&patch)).save(&self.folder.record())?;
        Ok(patch)
    }

    /// Values as the patch of one evaluation.
    fn patch(&self, values: Delta, evaluation: usize) -> Result<Patch> {
        let (base, config, task) = (self.encoder.base(), self.job.config, self.job.train);
        let record = &self.state.evaluations[evaluation];
        let split = self.dev.first().map(|dev| dev.split.clone());
        let metrics = split.as_ref().and_then(|split| record.metrics.get(split)).cloned().unwrap_or_default();
        let metadata = Metadata {
            task: task.name.clone(),
            problem: task.problem.clone(),
            texts: task.texts,
            max_length: config.max_length,
            pooling: Pooling::Cls,
            selection: config.selection.spec(),
            base_id: base.id().to_string(),
            base_fingerprint: base.fingerprint().to_string(),
            tokenizer_fingerprint: base.tokenizer()?.fingerprint().to_string(),
            training_digest: self.identity.training_digest(),
            metrics,
            split: split.unwrap_or_else(|| NO_SPLIT.to_string()),
            epoch: record.epoch,
            content_hash: String::new(),
        };
        Patch::new(metadata, values, base.config(), base.has_pooler())
    }

    /// What stands in `run.json`; with the patch once the run is done.
    pub fn record(&self, patch: Option<&Patch>) -> RunRecord {
        let (base, task, progress) = (self.encoder.base(), self.job.train, &self.progress[0]);
        let kept = self.state.best.or(self.state.evaluations.len().checked_sub(1));
        let kept = kept.and_then(|i| self.state.evaluations.get(i));
        let n = self.parameters;
        RunRecord {
            bitfit: env!("CARGO_PKG_VERSION"),
            finished: patch.is_some(),
            task: task.name.clone(),
            problem: task.problem.name(),
            labels: match &task.problem {
                Problem::Classes(labels) => labels.clone(),
                Problem::Value => Vec::new(),
            },
            texts: task.texts.count(),
            base: base.id().to_string(),
            base_fingerprint: base.fingerprint().to_string(),
            tokenizer_fingerprint: base.tokenizer().map(|t| t.fingerprint().to_string()).unwrap_or_default(),
            training_digest: self.identity.training_digest(),
            config: self.job.config.clone(),
            parameters: [("encoder", n.encoder), ("pooler", n.pooler), ("head", n.head), ("total", n.total())].into(),
            data: self.data.clone(),
            steps: progress.total_steps(),
            steps_per_epoch: progress.steps_per_epoch(),
            evaluations: self.state.evaluations.clone(),
            main_metric: task.main_metric().name(),
            split: self.dev.first().map_or(NO_SPLIT.to_string(), |dev| dev.split.clone()),
            epoch: kept.map_or(0, |kept| kept.epoch),
            metrics: kept.map(|kept| kept.metrics.clone()).unwrap_or_default(),
            patch: patch.map(|patch| patch.content_hash().to_string()).unwrap_or_default(),
            train_seconds: self.state.train_seconds,
            tokens_per_s: rate(self.state.train_tokens, self.state.train_seconds),
        }
    }
}

impl Live {
    /// Adds a line of the steps since the last one, where there are any.
    fn log_window(&mut self, step: u64, epoch: u32, learning_rate: f64) -> Result<()> {
        let window = std::mem::take(&mut self.window);
        if window.steps == 0 {
            return Ok(());
        }
        let n = window.steps as f64;
        self.log.add(&json!({
            "step": step,
            "epoch": epoch,
            "loss": window.loss / n,
            "grad_norm": window.grad_norm / n,
            "learning_rate": learning_rate,
            "tokens_per_s": rate(window.tokens, window.seconds),
        }))
    }
}

fn live(live: &mut Option<Live>) -> Result<&mut Live> {
    live.as_mut().ok_or_else(|| Error::Audit("a run takes a step before it began".into()))
}

fn rate(tokens: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 }
}

fn check_finite(step: u64, report: &Report) -> Result<()> {
    let what = match (report.loss.is_finite(), report.grad_norm.is_finite()) {
        (true, true) => return Ok(()),
        (false, _) => format!("the loss is {}", report.loss),
        (true, false) => format!("the norm of the gradients is {}", report.grad_norm),
    };
    Err(Error::Diverged(format!(
        "at step {step} {what}; try a smaller --learning-rate, or clipping (--max-grad-norm 1) where it is off"
    )))
}
