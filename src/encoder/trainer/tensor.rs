//! One trained tensor of a step's runs: its values and moments, where they are read, and its gradient.

use super::{Rule, Run};
use crate::base::delta::{Change, Request};
use crate::base::parameters::{Parameter, Role};
use crate::device::ops::{AdamW, Ops, Trained, Want};
use crate::encoder::pass::Gradients;
use crate::error::{Error, Result};

/// What a trained tensor is a part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The base: a difference to its tensor of this role, in this layer.
    Base(Role, Option<usize>),
    /// `classifier.weight`.
    Classifier,
    /// `classifier.bias`.
    ClassifierBias,
    /// `pooler.dense.weight`, where it belongs to the head.
    Pooler,
    /// `pooler.dense.bias`, where it belongs to the head.
    PoolerBias,
}

impl Part {
    /// Whether it belongs to the head, which has a learning rate of its own.
    pub fn is_head(self) -> bool {
        !matches!(self, Part::Base(..))
    }

    /// Whether it decays as weights do in transformers: all but biases and LayerNorms.
    fn is_weight(self) -> bool {
        matches!(self, Part::Base(Role::Matrix(_) | Role::Table(_), _) | Part::Classifier | Part::Pooler)
    }
}

/// One trained tensor, a row a run.
pub struct Tensor<D: Ops> {
    /// Canonical name; the head's as in the patch file.
    pub name: String,
    /// What it is a part of.
    pub part: Part,
    /// Which runs train it.
    pub runs: Vec<bool>,
    /// The flat positions that train, where not all do; `values` then has one row of these alone.
    pub entries: Option<(Vec<u64>, D::Index)>,
    /// Values and moments.
    pub values: Trained<D>,
    /// Length of a row of `values`.
    n: usize,
    /// Values an output of the head, where the tensor has rows for as many outputs as the widest head.
    per_output: Option<usize>,
    /// A sampled vector's gradient, gathered from the whole.
    gathered: Option<D::Params>,
}

impl<D: Ops> Tensor<D> {
    /// Lays out a tensor of the base, whose values are `whole`, for the runs that ask for it.
    pub fn of_base(d: &D, p: &Parameter, whole: &[f32], runs: &[Run]) -> Result<Self> {
        let groups = runs.len();
        let requests: Vec<_> = runs.iter().map(|run| run.requests.get(&p.name)).collect();
        let entries = match requests[..] {
            [Some(Request::Entries(entries))] => Some(entries.clone()),
            _ if requests.iter().any(|r| matches!(r, Some(Request::Entries(_)))) => return Err(alone(&p.name)),
            _ => None,
        };
        let base_values: Vec<f32> = match &entries {
            Some(at) => at.iter().map(|i| whole[*i as usize]).collect(),
            None => whole.to_vec(),
        };
        let n = base_values.len();
        let mut delta = Vec::with_capacity(groups * n);
        for run in runs {
            match (run.start.changes.get(&p.name), &entries) {
                (None, _) => delta.resize(delta.len() + n, 0.0),
                (Some(Change::Dense(values)), None) if values.len() == n => delta.extend(values),
                (Some(Change::Sparse { indices, values }), Some(at)) if indices == at => delta.extend(values),
                _ => {
                    return Err(Error::setting(
                        format!("values to start {} from", p.name),
                        "one value an entry that trains",
                        "others",
                    ));
                }
            }
        }
        let is_vector = !matches!(p.role, Role::Matrix(_) | Role::Table(_));
        Ok(Tensor {
            gathered: (is_vector && entries.is_some()).then(|| d.zeros(1, n)),
            part: Part::Base(p.role, p.layer),
            runs: requests.iter().map(Option::is_some).collect(),
            entries: entries.map(|at| (at.clone(), d.index(&at))),
            values: trained(d, d.params(1, base_values), groups, n, &delta),
            n,
            per_output: None,
            name: p.name.clone(),
        })
    }

    /// Lays out a tensor of the head, which is a difference to nothing: one row a run, padded with zeros to `n`.
    pub fn of_head(d: &D, part: Part, name: &str, rows: Vec<Vec<f32>>, n: usize, per_output: Option<usize>) -> Self {
        let groups = rows.len();
        let mut delta = Vec::with_capacity(groups * n);
        for (g, row) in rows.into_iter().enumerate() {
            delta.extend(row);
            delta.resize((g + 1) * n, 0.0);
        }
        Tensor {
            name: name.to_string(),
            part,
            runs: vec![true; groups],
            entries: None,
            values: trained(d, d.zeros(1, n), groups, n, &delta),
            n,
            per_output,
            gathered: None,
        }
    }

    /// Asks the backward for this tensor's gradient.
    pub fn ask(&self, d: &D, p: &Parameter, grads: &mut Gradients<D>) {
        let want = match (&self.entries, &self.gathered) {
            (Some((at, _)), None) => Want::Sampled { entries: d.index(at), values: d.zeros(1, at.len()) },
            _ => Want::Full(d.zeros(self.runs.len(), p.len())),
        };
        grads.ask(p.role, p.layer, want);
    }

    /// Its gradient as the pass sums it, before [`Tensor::gather`].
    pub fn sums<'g>(&self, grads: &'g mut Gradients<D>) -> Option<&'g mut D::Params> {
        match self.part {
            Part::Base(role, layer) => grads.sums_mut(role, layer),
            Part::Classifier => Some(&mut grads.classifier),
            Part::ClassifierBias => Some(&mut grads.classifier_bias),
            Part::Pooler => match &mut grads.pooler_weight {
                Want::Full(sums) => Some(sums),
                _ => None,
            },
            Part::PoolerBias => grads.pooler.as_mut(),
        }
    }

    /// Picks a sampled vector's entries from its whole gradient.
    pub fn gather(&mut self, d: &mut D, grads: &mut Gradients<D>) {
        let sums = self.sums(grads);
        if let (Some(sums), Some((_, at)), Some(gathered)) = (sums, &self.entries, &mut self.gathered) {
            d.gather(sums, at, gathered);
        }
    }

    /// Its gradient, after [`Tensor::gather`]: as many values as train.
    pub fn gradient<'g>(&'g self, grads: &'g mut Gradients<D>) -> Option<&'g D::Params> {
        match &self.gathered {
            Some(gathered) => Some(gathered),
            None => self.sums(grads).map(|sums| &*sums),
        }
    }

    /// One step of AdamW.
    pub fn adamw(&mut self, d: &mut D, grads: &mut Gradients<D>, squares: &D::Params, rules: &[Option<AdamW>]) {
        let sums = self.sums(grads);
        if let Some(grad) = self.gathered.as_ref().or(sums.map(|sums| &*sums)) {
            d.adamw(&mut self.values, grad, squares, rules);
        }
    }

    /// AdamW's settings for this tensor, a run.
    pub fn rules(&self, rules: &[Option<Rule>], steps: &[u64]) -> Vec<Option<AdamW>> {
        let of_run = |((rule, trains), step): ((&Option<Rule>, &bool), &u64)| {
            rule.as_ref().filter(|_| *trains).map(|rule| AdamW {
                learning_rate: if self.part.is_head() { rule.head_learning_rate } else { rule.learning_rate },
                beta1: rule.betas.0,
                beta2: rule.betas.1,
                epsilon: rule.epsilon,
                weight_decay: if self.part.is_weight() || rule.decay_biases { rule.weight_decay } else { 0.0 },
                step: *step,
                max_grad_norm: rule.max_grad_norm,
            })
        };
        rules.iter().zip(&self.runs).zip(steps).map(of_run).collect()
    }

    /// The values of run `g`, without the padding of a narrower head.
    pub fn row(&self, d: &D, of: &D::Params, g: usize, n_outputs: usize) -> Vec<f32> {
        let own = self.own(n_outputs);
        d.read_params(of)[g * self.n..][..own].to_vec()
    }

    /// `of` with run `g`'s row replaced.
    pub fn with_row(&self, d: &D, of: &D::Params, g: usize, row: &[f32]) -> D::Params {
        let mut all = d.read_params(of);
        all[g * self.n..][..row.len()].copy_from_slice(row);
        d.params(self.runs.len(), all)
    }

    /// How many values of a row are a run's own.
    pub fn own(&self, n_outputs: usize) -> usize {
        self.per_output.map_or(self.n, |per_output| per_output * n_outputs)
    }
}

/// The error for runs that train weights beside others.
pub fn alone(name: &str) -> Error {
    Error::Usage(format!("{name} trains as a weight: runs that train weights are trained alone, not beside others"))
}

fn trained<D: Ops>(d: &D, base: D::Params, groups: usize, n: usize, delta: &[f32]) -> Trained<D> {
    Trained { base, delta: d.params(groups, delta.to_vec()), m: d.zeros(groups, n), v: d.zeros(groups, n) }
}
