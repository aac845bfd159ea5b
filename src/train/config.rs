//! Settings as they are asked for ([`Options`]), and as they are once checked and resolved ([`TrainConfig`]).

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use super::schedule::Schedule;
use crate::base::Base;
use crate::device::ops::Dropout;
use crate::encoder::Rule;
use crate::error::{Error, Result};
use crate::patch::{Method, Selection};

/// Which epoch's values become the patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// Those of the epoch with the best main metric on the first dev split; of several, the first.
    #[default]
    Best,
    /// Those of the last step.
    Last,
}

impl fmt::Display for Keep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Keep::Best => "best",
            Keep::Last => "last",
        })
    }
}

impl FromStr for Keep {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "best" => Ok(Keep::Best),
            "last" => Ok(Keep::Last),
            _ => Err(Error::setting("--keep", "best or last", format_args!("`{s}`"))),
        }
    }
}

/// Settings of a run, as asked for; [`Options::check`] makes a [`TrainConfig`] of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Which parameters train beside the head. Its seed is the run's, whatever stands there. Default: every bias.
    pub selection: Selection,
    /// Times that the training rows are gone through; default 10.
    pub epochs: u32,
    /// Optimizer steps, in place of `epochs`: rows then repeat, or end in mid-epoch.
    pub max_steps: Option<u64>,
    /// Sequences in one pass through the encoder; default 16.
    pub batch_size: usize,
    /// Passes whose gradients make one optimizer step; default 1. Together they count as one batch, drawn as a batch of
    /// `batch_size * gradient_accumulation_steps` rows: memory is saved and nothing else changes.
    pub gradient_accumulation_steps: usize,
    /// The largest learning rate of the base's tensors, above 0; default by method ([`default_learning_rate`]).
    pub learning_rate: Option<f64>,
    /// The same of the head; default `learning_rate`.
    pub head_learning_rate: Option<f64>,
    /// The learning rate's course; default linear.
    pub schedule: Schedule,
    /// The share of the steps over which the learning rate rises, 0 to 1, rounded down; default 0.06.
    pub warmup: f64,
    /// AdamW's beta_1 and beta_2, each from 0 to below 1; default 0.9 and 0.999.
    pub betas: (f64, f64),
    /// AdamW's epsilon, above 0; default 1e-6.
    pub epsilon: f64,
    /// Decoupled weight decay, 0 or more; default 0. Biases and LayerNorms do not decay.
    pub weight_decay: f64,
    /// Gradients are scaled down to this norm; default 1, and 0 turns clipping off.
    pub max_grad_norm: f64,
    /// Dropout at every place, from 0 to below 1; default what the base's config says.
    pub dropout: Option<f32>,
    /// Texts are cut to this many tokens; default 128, or the base's positions where those are fewer.
    pub max_length: Option<usize>,
    /// Batches of rows of like length, as in transformers; default off. Batches are packed, so it saves nothing, and
    /// lengths that tell of labels make its steps one-sided: on MRPC two of four seeds never left the majority class.
    pub group_by_length: bool,
    /// Train on the first rows alone, this many.
    pub limit: Option<usize>,
    /// Decides the head's start, the order of the rows, dropout, and what `random` draws; default 0.
    pub seed: u64,
    /// Which epoch's values become the patch; default the best.
    pub keep: Keep,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            selection: Selection::new(Method::Bitfit),
            epochs: 10,
            max_steps: None,
            batch_size: 16,
            gradient_accumulation_steps: 1,
            learning_rate: None,
            head_learning_rate: None,
            schedule: Schedule::Linear,
            warmup: 0.06,
            betas: (0.9, 0.999),
            epsilon: 1e-6,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            dropout: None,
            max_length: None,
            group_by_length: false,
            limit: None,
            seed: 0,
            keep: Keep::Best,
        }
    }
}

/// The learning rate of a method where none is asked for.
pub fn default_learning_rate(method: Method) -> f64 {
    match method {
        Method::Full => 5e-5,
        Method::Bitfit | Method::Frozen | Method::Random => 3e-3,
    }
}

/// Settings of a run, checked against the base and complete: made by [`Options::check`] alone. Serialised, it is what
/// `run.json` holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct TrainConfig {
    /// See [`Options::selection`]; its seed is the run's.
    #[serde(serialize_with = "as_spec")]
    pub selection: Selection,
    /// See [`Options::epochs`].
    pub epochs: u32,
    /// See [`Options::max_steps`].
    pub max_steps: Option<u64>,
    /// See [`Options::batch_size`].
    pub batch_size: usize,
    /// See [`Options::gradient_accumulation_steps`].
    pub gradient_accumulation_steps: usize,
    /// See [`Options::learning_rate`].
    pub learning_rate: f64,
    /// See [`Options::head_learning_rate`].
    pub head_learning_rate: f64,
    /// See [`Options::schedule`].
    pub schedule: Schedule,
    /// See [`Options::warmup`].
    pub warmup: f64,
    /// See [`Options::betas`].
    pub betas: (f64, f64),
    /// See [`Options::epsilon`].
    pub epsilon: f64,
    /// See [`Options::weight_decay`].
    pub weight_decay: f64,
    /// See [`Options::max_grad_norm`].
    pub max_grad_norm: f64,
    /// Dropout of hidden states, attention probabilities and the head's input.
    #[serde(serialize_with = "as_list")]
    pub dropout: Dropout,
    /// See [`Options::max_length`].
    pub max_length: usize,
    /// See [`Options::group_by_length`].
    pub group_by_length: bool,
    /// See [`Options::limit`].
    pub limit: Option<usize>,
    /// See [`Options::seed`].
    pub seed: u64,
    /// See [`Options::keep`].
    pub keep: Keep,
}

fn as_spec<S: Serializer>(selection: &Selection, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&selection.spec())
}

fn as_list<S: Serializer>(dropout: &Dropout, to: S) -> Result<S::Ok, S::Error> {
    [dropout.hidden, dropout.attention, dropout.classifier].serialize(to)
}

/// A step's rows are numbered in dropout's counter by 20 bits.
const MAX_ROWS_A_STEP: usize = 1 << 20;
/// A step's number is 32 bits of dropout's counter.
const MAX_STEPS: u64 = 1 << 32;

impl Options {
    /// Checks every setting, against the base where it matters, and fills in what depends on others.
    ///
    /// # Errors
    ///
    /// The first setting that is outside its range or not finite, as [`Error::Setting`], named by its flag.
    pub fn check(&self, base: &Base) -> Result<TrainConfig> {
        let config = base.config();
        let selection = Selection { seed: self.seed, ..self.selection.clone() };
        selection.check(config, base.has_pooler())?;
        counted("--epochs", u64::from(self.epochs), 1..=1_000_000)?;
        if let Some(steps) = self.max_steps {
            counted("--max-steps", steps, 1..=MAX_STEPS)?;
        }
        let most = MAX_ROWS_A_STEP as u64;
        counted("--batch-size", self.batch_size as u64, 1..=most)?;
        counted("--gradient-accumulation-steps", self.gradient_accumulation_steps as u64, 1..=most)?;
        let rows = self.batch_size.saturating_mul(self.gradient_accumulation_steps);
        counted("--batch-size times --gradient-accumulation-steps", rows as u64, 1..=most)?;
        let learning_rate = self.learning_rate.unwrap_or_else(|| default_learning_rate(selection.method));
        let head_learning_rate = self.head_learning_rate.unwrap_or(learning_rate);
        for (flag, rate) in [("--learning-rate", learning_rate), ("--head-learning-rate", head_learning_rate)] {
            number(flag, rate, rate > 0.0 && rate <= 10.0, "above 0, at most 10")?;
        }
        number("--warmup", self.warmup, (0.0..=1.0).contains(&self.warmup), "a share of the steps, from 0 to 1")?;
        for (what, beta) in [("beta_1", self.betas.0), ("beta_2", self.betas.1)] {
            number(what, beta, (0.0..1.0).contains(&beta), "from 0 to below 1")?;
        }
        number("epsilon", self.epsilon, self.epsilon > 0.0, "above 0")?;
        number("--weight-decay", self.weight_decay, (0.0..=1.0).contains(&self.weight_decay), "from 0 to 1")?;
        number("--max-grad-norm", self.max_grad_norm, self.max_grad_norm >= 0.0, "above 0, or 0 for no clipping")?;
        let dropout = match self.dropout {
            Some(p) => {
                number("--dropout", f64::from(p), (0.0..1.0).contains(&p), "from 0 to below 1")?;
                Dropout { hidden: p, attention: p, classifier: p }
            }
            None => Dropout {
                hidden: config.hidden_dropout_prob,
                attention: config.attention_probs_dropout_prob,
                classifier: config.classifier_dropout(),
            },
        };
        let positions = config.max_position_embeddings;
        let max_length = self.max_length.unwrap_or(positions.min(128));
        if !(3..=positions).contains(&max_length) {
            let expected = format!("3 to {positions}, the positions of this model");
            return Err(Error::setting("--max-length", expected, max_length));
        }
        if let Some(limit) = self.limit {
            counted("--limit", limit as u64, 1..=u64::MAX)?;
        }
        Ok(TrainConfig {
            selection,
            epochs: self.epochs,
            max_steps: self.max_steps,
            batch_size: self.batch_size,
            gradient_accumulation_steps: self.gradient_accumulation_steps,
            learning_rate,
            head_learning_rate,
            schedule: self.schedule,
            warmup: self.warmup,
            betas: self.betas,
            epsilon: self.epsilon,
            weight_decay: self.weight_decay,
            max_grad_norm: self.max_grad_norm,
            dropout,
            max_length,
            group_by_length: self.group_by_length,
            limit: self.limit,
            seed: self.seed,
            keep: self.keep,
        })
    }
}

impl TrainConfig {
    /// Optimizer steps in which `n_rows` training rows are gone through once.
    pub fn steps_per_epoch(&self, n_rows: usize) -> u64 {
        n_rows.div_ceil(self.rows_per_step()) as u64
    }

    /// Optimizer steps of the whole run.
    pub fn total_steps(&self, n_rows: usize) -> u64 {
        self.max_steps.unwrap_or(u64::from(self.epochs) * self.steps_per_epoch(n_rows))
    }

    /// Rows that make one optimizer step.
    pub fn rows_per_step(&self) -> usize {
        self.batch_size * self.gradient_accumulation_steps
    }

    /// What the optimizer does at step `step` of `total`, counted from 0.
    pub fn rule(&self, step: u64, total: u64) -> Rule {
        let warmup_steps = (self.warmup * total as f64).floor() as u64;
        let factor = self.schedule.factor(step, warmup_steps, total);
        Rule {
            learning_rate: self.learning_rate * factor,
            head_learning_rate: self.head_learning_rate * factor,
            betas: self.betas,
            epsilon: self.epsilon,
            weight_decay: self.weight_decay,
            decay_biases: false,
            max_grad_norm: if self.max_grad_norm == 0.0 { f64::INFINITY } else { self.max_grad_norm },
        }
    }
}

fn counted(flag: &str, found: u64, range: RangeInclusive<u64>) -> Result<()> {
    if range.contains(&found) {
        return Ok(());
    }
    let expected = match *range.end() {
        u64::MAX => format!("at least {}", range.start()),
        most => format!("{} to {most}", range.start()),
    };
    Err(Error::setting(flag, expected, found))
}

fn number(flag: &str, found: f64, fits: bool, expected: &str) -> Result<()> {
    if fits && found.is_finite() { Ok(()) } else { Err(Error::setting(flag, expected, found)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Config;

    fn check(options: Options) -> Result<TrainConfig> {
        options.check(&Base::random(Config::tiny(), 0))
    }

    #[test]
    fn the_default_is_complete_and_follows_the_base() {
        let config = check(Options::default()).unwrap();
        assert_eq!((config.learning_rate, config.head_learning_rate), (3e-3, 3e-3));
        assert_eq!(config.max_length, 128.min(Config::tiny().max_position_embeddings));
        let full = Options { selection: Selection::new(Method::Full), ..Options::default() };
        assert_eq!(check(full).unwrap().learning_rate, 5e-5);
    }

    #[test]
    fn every_value_outside_its_range_is_refused_by_its_flag() {
        let default = Options::default;
        let nan = f64::NAN;
        let wrong: Vec<(&str, Options)> = vec![
            ("--epochs", Options { epochs: 0, ..default() }),
            ("--max-steps", Options { max_steps: Some(0), ..default() }),
            ("--max-steps", Options { max_steps: Some(1 << 33), ..default() }),
            ("--batch-size", Options { batch_size: 0, ..default() }),
            ("--batch-size", Options { batch_size: usize::MAX, ..default() }),
            ("--gradient-accumulation-steps", Options { gradient_accumulation_steps: 0, ..default() }),
            ("--batch-size times", Options { gradient_accumulation_steps: 1 << 20, ..default() }),
            ("--learning-rate", Options { learning_rate: Some(0.0), ..default() }),
            ("--learning-rate", Options { learning_rate: Some(-1.0), ..default() }),
            ("--learning-rate", Options { learning_rate: Some(nan), ..default() }),
            ("--learning-rate", Options { learning_rate: Some(f64::INFINITY), ..default() }),
            ("--head-learning-rate", Options { head_learning_rate: Some(0.0), ..default() }),
            ("--warmup", Options { warmup: -0.1, ..default() }),
            ("--warmup", Options { warmup: 1.1, ..default() }),
            ("--warmup", Options { warmup: nan, ..default() }),
            ("beta_2", Options { betas: (0.9, 1.0), ..default() }),
            ("epsilon", Options { epsilon: 0.0, ..default() }),
            ("--weight-decay", Options { weight_decay: -0.1, ..default() }),
            ("--max-grad-norm", Options { max_grad_norm: -1.0, ..default() }),
            ("--max-grad-norm", Options { max_grad_norm: f64::INFINITY, ..default() }),
            ("--dropout", Options { dropout: Some(1.0), ..default() }),
            ("--max-length", Options { max_length: Some(513), ..default() }),
            ("--max-length", Options { max_length: Some(2), ..default() }),
            ("--limit", Options { limit: Some(0), ..default() }),
        ];
        for (flag, options) in wrong {
            let message = check(options.clone()).expect_err(flag).to_string();
            assert!(message.starts_with(flag), "{flag}: {message}");
        }
    }

    #[test]
    fn max_steps_take_the_place_of_epochs() {
        let config = check(Options { epochs: 2, batch_size: 4, ..Options::default() }).unwrap();
        assert_eq!((config.steps_per_epoch(10), config.total_steps(10)), (3, 6));
        let config = check(Options { max_steps: Some(7), ..Options::default() }).unwrap();
        assert_eq!(config.total_steps(10), 7);
    }

    #[test]
    fn the_warm_up_is_a_share_rounded_down_and_clipping_can_be_off() {
        let config = check(Options { max_grad_norm: 0.0, warmup: 0.06, ..Options::default() }).unwrap();
        assert_eq!(config.rule(0, 16).learning_rate, 3e-3); // 0.96 steps of warm-up are none
        assert_eq!(config.rule(0, 17).learning_rate, 0.0);
        assert_eq!(config.rule(0, 17).max_grad_norm, f64::INFINITY);
    }
}
