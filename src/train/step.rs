//! One optimizer step of any number of runs, each a group of the packed batch.
//!
//! A [`Progress`] holds what is a run's own: its rows, their order, and how far it is. Which rows a step takes follows
//! from the seed and the step's number alone, so a resumed run needs nothing but that number, and a run takes the same
//! rows under the same dropout keys whether it trains alone or beside others.

use std::ops::Range;
use std::sync::Arc;

use super::config::TrainConfig;
use crate::data::{Sequence, training_batches};
use crate::device::batch::{Batch, DropoutKey};
use crate::encoder::{Report, Rule, Training};
use crate::error::{Error, Result};

/// A run's rows and how far it has come.
#[derive(Debug)]
pub struct Progress {
    config: TrainConfig,
    sequences: Vec<Sequence>,
    lengths: Vec<usize>,
    step: u64,
    /// The rows of each step of an epoch, kept while the epoch lasts.
    epoch: Option<(u64, Vec<Vec<usize>>)>,
}

impl Progress {
    /// A run over these rows, which have targets; `step` steps of it are done.
    ///
    /// # Errors
    ///
    /// Where there are no rows, or more steps than dropout can number.
    pub fn new(config: &TrainConfig, sequences: Vec<Sequence>, step: u64) -> Result<Self> {
        if sequences.is_empty() {
            return Err(Error::Usage("there are no rows to train on".into()));
        }
        let lengths: Vec<usize> = sequences.iter().map(|s| s.ids.len()).collect();
        let total = config.total_steps(lengths.len());
        if total > 1 << 32 {
            return Err(Error::setting("steps of a run", "at most 4294967296", total));
        }
        Ok(Progress { config: config.clone(), sequences, lengths, step, epoch: None })
    }

    /// The run's settings.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// Optimizer steps done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Optimizer steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        self.config.total_steps(self.lengths.len())
    }

    /// Optimizer steps in which all rows are gone through once.
    pub fn steps_per_epoch(&self) -> u64 {
        self.config.steps_per_epoch(self.lengths.len())
    }

    /// Whether all steps are done.
    pub fn is_done(&self) -> bool {
        self.step >= self.total_steps()
    }

    /// The epoch, counted from 1, in which the last step was done; 0 before the first.
    pub fn epoch(&self) -> u32 {
        self.step.div_ceil(self.steps_per_epoch()) as u32
    }

    /// Whether the last step ended an epoch or the run: the places to evaluate at.
    pub fn is_at_evaluation(&self) -> bool {
        self.step > 0 && (self.step.is_multiple_of(self.steps_per_epoch()) || self.is_done())
    }

    /// The optimizer's rule for the next step; `None` once all are done.
    fn rule(&self) -> Option<Rule> {
        (!self.is_done()).then(|| self.config.rule(self.step, self.total_steps()))
    }

    /// The rows of the next step, in order; none once all steps are done.
    pub fn next_rows(&mut self) -> Vec<usize> {
        if self.is_done() {
            return Vec::new();
        }
        let per_epoch = self.steps_per_epoch();
        let (epoch, at) = (self.step / per_epoch, (self.step % per_epoch) as usize);
        if self.epoch.as_ref().is_none_or(|(drawn, _)| *drawn != epoch) {
            let rows = self.config.rows_per_step();
            let (group, seed) = (self.config.group_by_length, self.config.seed);
            let batches = training_batches(&self.lengths, rows, group, seed, epoch as u32);
            self.epoch = Some((epoch, batches));
        }
        self.epoch.as_ref().map_or_else(Vec::new, |(_, batches)| batches[at].clone())
    }

    /// A row.
    ///
    /// # Panics
    ///
    /// Where there is no such row.
    pub fn sequence(&self, row: usize) -> &Sequence {
        &self.sequences[row]
    }

    /// Adds rows `places` of the next step's `rows` to a batch, as group `group`.
    fn push(&self, rows: &[usize], places: Range<usize>, group: usize, batch: &mut Batch) {
        let (seed, step) = (self.config.seed, self.step as u32);
        for place in places {
            let sequence = &self.sequences[rows[place]];
            let key = DropoutKey { seed, step, index: place as u32 };
            batch.push(&sequence.ids, &sequence.type_ids, group, key, sequence.target);
        }
    }
}

/// What a step did.
#[derive(Debug, Clone, PartialEq)]
pub struct Stepped {
    /// Loss and gradient norm of each run; of a run that was done before, zeros.
    pub reports: Vec<Report>,
    /// Token rows that went through the encoder.
    pub n_tokens: usize,
}

/// One optimizer step of every run that is not done; run `g` of the trainer is `runs[g]`. The runs share the dropout
/// probabilities.
///
/// # Errors
///
/// Where the runs' dropout differs, and what the device reports.
pub fn step(trainer: &mut dyn Training, runs: &mut [Progress]) -> Result<Stepped> {
    let Some(dropout) = runs.first().map(|run| run.config.dropout) else {
        return Err(Error::Usage("a step has a run".into()));
    };
    if runs.iter().any(|run| run.config.dropout != dropout) {
        return Err(Error::Usage("runs that train in one step have the same dropout".into()));
    }
    let rows: Vec<Vec<usize>> = runs.iter_mut().map(Progress::next_rows).collect();
    let passes = runs.iter().zip(&rows).map(|(run, rows)| rows.len().div_ceil(run.config.batch_size));
    let n_passes = passes.max().unwrap_or(0);
    let mut batches = Vec::with_capacity(n_passes);
    for pass in 0..n_passes {
        let mut batch = Batch::new();
        for (g, (run, rows)) in runs.iter().zip(&rows).enumerate() {
            let (size, n) = (run.config.batch_size, rows.len());
            run.push(rows, (pass * size).min(n)..((pass + 1) * size).min(n), g, &mut batch);
        }
        batches.push(Arc::new(batch));
    }
    let n_tokens = batches.iter().map(|batch| batch.n_tokens()).sum();
    let rules: Vec<Option<Rule>> = runs.iter().map(Progress::rule).collect();
    let reports = trainer.step(&batches, dropout, &rules)?;
    for (run, _) in runs.iter_mut().zip(&rules).filter(|(_, rule)| rule.is_some()) {
        run.step += 1;
    }
    Ok(Stepped { reports, n_tokens })
}
