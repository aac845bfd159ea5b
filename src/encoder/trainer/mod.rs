//! Training on a device: the values that train, their gradients and AdamW's moments, for any number of runs at once.
//!
//! Each run is a bias group of the step: it has its own rows of every vector, its own head, loss, clipping, learning
//! rate and step count, and gets the bits it would get alone. A run that trains weights (`full`, `random`) owns copies
//! of the matrices it touches and is always alone.
//!
//! What trains is the difference to the base; the value in use is `base + difference`, computed anew after each step,
//! so that what is saved, loaded and added again is what was trained.

mod tensor;

use std::collections::BTreeMap;
use std::sync::Arc;

use self::tensor::{Part, Tensor, alone};
use super::network::{AllBiases, Network, Slot, check_batch};
use super::pass::{Depth, Gradients, Heads, Pass, Plan};
use super::split_logits;
use crate::base::base::Base;
use crate::base::config::Config;
use crate::base::delta::{Change, Delta, Head, Request};
use crate::base::parameters::Role;
use crate::device::batch::{Batch, Target};
use crate::device::ops::{Classifier, Dropout, Loss, MemoryUse, Ops, Want};
use crate::error::{Error, Result};

/// One run to train: what trains, and the values it starts from.
#[derive(Debug, Clone)]
pub struct Run {
    /// Base tensors that train, by canonical name; the head always does.
    pub requests: BTreeMap<String, Request>,
    /// The values it starts from: the head, and differences of tensors that train (none: the base as it is).
    pub start: Delta,
}

/// The optimizer's settings for one run at one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    /// Learning rate of the base's tensors.
    pub learning_rate: f64,
    /// Learning rate of the head.
    pub head_learning_rate: f64,
    /// AdamW's beta_1 and beta_2.
    pub betas: (f64, f64),
    /// AdamW's epsilon.
    pub epsilon: f64,
    /// Decoupled weight decay of matrices, tables and the head's weights.
    pub weight_decay: f64,
    /// Whether biases and LayerNorm weights decay too (in transformers they do not).
    pub decay_biases: bool,
    /// Clipping: the largest norm of all of the run's gradients; infinite for none.
    pub max_grad_norm: f64,
}

/// What a step says of one run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Report {
    /// The mean loss over the run's sequences, dropout on.
    pub loss: f64,
    /// The norm of the run's gradients before clipping.
    pub grad_norm: f64,
}

/// AdamW's memory of one run: the steps taken, and both moments by tensor name; of a tensor with sampled entries,
/// those alone.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Moments {
    /// Optimizer steps taken.
    pub step: u64,
    /// First and second moment.
    pub tensors: BTreeMap<String, (Vec<f32>, Vec<f32>)>,
}

/// Training, whatever the device: what a loop above asks for. Runs are counted from 0 in the order they were given.
pub trait Training: Send {
    /// One optimizer step over micro-batches that count as one batch; group `g` of each is run `g`. A run without a
    /// rule stands still.
    ///
    /// # Errors
    ///
    /// What the device reports.
    fn step(&mut self, batches: &[Arc<Batch>], dropout: Dropout, rules: &[Option<Rule>]) -> Result<Vec<Report>>;
    /// The losses and gradients of a batch, without a step.
    ///
    /// # Errors
    ///
    /// What the device reports, and a batch with more groups than there are runs.
    fn accumulate(&mut self, batches: &[Arc<Batch>], dropout: Dropout) -> Result<Vec<f64>>;
    /// The gradients of the last step or accumulation, of run `g`, by tensor name; of a tensor with sampled entries,
    /// those alone.
    fn gradients(&mut self, g: usize) -> BTreeMap<String, Vec<f32>>;
    /// Run `g`'s values as they stand.
    fn delta(&self, g: usize) -> Delta;
    /// Run `g`'s optimizer state as it stands.
    fn moments(&self, g: usize) -> Moments;
    /// Goes on from moments that [`Trainer::moments`] gave; the values are those the run was made with.
    ///
    /// # Errors
    ///
    /// Where tensors are missing or have other sizes.
    fn restore(&mut self, g: usize, moments: &Moments) -> Result<()>;
    /// Logits with the values in use, dropout off; group `g` of the batch is run `g`. One row a sequence.
    ///
    /// # Errors
    ///
    /// What the device reports.
    fn logits(&mut self, batch: &Arc<Batch>) -> Result<Vec<Vec<f32>>>;
    /// SHA-256 over the weights in use: for a run that trains biases, those of the base.
    fn weights_hash(&self) -> String;
    /// The most bytes of pooled buffers in use at once.
    fn peak_bytes(&self) -> usize;
}

/// The state of training on one device.
pub struct Trainer<D: Ops> {
    d: D,
    /// For passes between steps: their batches are larger, and would make every buffer of a step as large.
    between: D,
    config: Config,
    network: Network<D>,
    biases: AllBiases<D>,
    heads: Heads<D>,
    tensors: Vec<Tensor<D>>,
    grads: Gradients<D>,
    squares: D::Params,
    plan: Plan,
    /// The most bytes that a step's activations may take.
    memory_budget: Option<usize>,
    /// The most tokens and sequences of a batch so far, which buffers are sized for.
    room: (usize, usize),
    steps: Vec<u64>,
}

impl<D: Ops> Trainer<D> {
    /// Lays out the runs over a network that they share.
    ///
    /// # Errors
    ///
    /// Where a tensor of the base cannot be read, a requested name is not the base's, values to start from do not fit,
    /// runs that train weights are not alone, or are given a memory budget.
    pub fn new(
        mut d: D,
        base: &Base,
        network: &Network<D>,
        runs: &[Run],
        memory_budget: Option<usize>,
    ) -> Result<Self> {
        check_names(base, runs)?;
        let (config, groups) = (base.config(), runs.len());
        let h = config.hidden_size;
        let widest = runs.iter().map(|run| run.start.head.n_outputs).max().unwrap_or(1);
        let mut network = network.clone();
        let mut biases = AllBiases::of_base(&d, base)?;
        let classifier_grads = (d.zeros(groups, widest * h), d.zeros(groups, widest));
        let mut grads = Gradients::head_only(config.num_hidden_layers, classifier_grads.0, classifier_grads.1);
        let mut tensors = Vec::new();
        for p in base.parameters() {
            if !runs.iter().any(|run| run.requests.contains_key(&p.name)) {
                continue;
            }
            if groups > 1 && !matches!(p.role, Role::Bias(_)) {
                return Err(alone(&p.name));
            }
            let whole = base.tensor(&p.name)?;
            let tensor = Tensor::of_base(&d, p, &whole, runs)?;
            tensor.ask(&d, p, &mut grads);
            // A place of the runs' own, which still holds the base's values.
            match p.role {
                Role::Bias(term) => {
                    if let Some(to) = biases.get_mut(term, p.layer) {
                        *to = d.params(groups, whole.repeat(groups));
                    }
                }
                _ => d.run(|d| network.replace(d, p, whole)),
            }
            tensors.push(tensor);
        }
        let of_base = |t: &Tensor<D>| match t.part {
            Part::Base(role, layer) => Some((role, layer)),
            _ => None,
        };
        let plan = Plan {
            depth: Depth::of(tensors.iter().filter_map(of_base)),
            weights: grads.weights.is_some() || grads.tables.is_some() || grads.gamma.is_some(),
            recomputed: 0,
        };
        if memory_budget.is_some() && plan.weights {
            let expected = "a run that trains biases or the head alone: one that trains weights keeps more";
            return Err(Error::setting("memory budget", expected, "weights among what trains"));
        }

        let rows = |f: &dyn Fn(&Head) -> Vec<f32>| runs.iter().map(|run| f(&run.start.head)).collect::<Vec<_>>();
        let weight = rows(&|head| head.weight.clone());
        tensors.push(Tensor::of_head(&d, Part::Classifier, "classifier.weight", weight, widest * h, Some(h)));
        let bias = rows(&|head| head.bias.clone());
        tensors.push(Tensor::of_head(&d, Part::ClassifierBias, "classifier.bias", bias, widest, Some(1)));
        let mut poolers = None;
        if !base.has_pooler() {
            let own = |head: &Head| head.pooler.clone().unwrap_or_else(|| (vec![0.0; h * h], vec![0.0; h]));
            let (weight, bias) = (rows(&|head| own(head).0), rows(&|head| own(head).1));
            tensors.push(Tensor::of_head(&d, Part::Pooler, "pooler.dense.weight", weight, h * h, None));
            tensors.push(Tensor::of_head(&d, Part::PoolerBias, "pooler.dense.bias", bias, h, None));
            grads.pooler_weight = Want::Full(d.zeros(groups, h * h));
            grads.pooler = Some(d.zeros(groups, h));
            let weights = |d: &mut D| (0..groups).map(|_| Arc::new(d.weight(h, h, vec![0.0; h * h]))).collect();
            poolers = Some(d.run(weights));
            biases.pooler = d.zeros(groups, h);
        }
        let classifier = Classifier {
            weight: d.zeros(groups, widest * h),
            bias: d.zeros(groups, widest),
            first: (0..groups).map(|g| g * widest).collect(),
            n_outputs: runs.iter().map(|run| run.start.head.n_outputs).collect(),
        };
        let squares = d.zeros(groups, 1);
        let heads = Heads { classifier, poolers };
        let mut trainer = Trainer {
            between: d.fork(),
            d,
            config: config.clone(),
            network,
            biases,
            heads,
            tensors,
            grads,
            squares,
            plan,
            memory_budget,
            room: (0, 0),
            steps: vec![0; groups],
        };
        trainer.put_in_use()?;
        trainer.d.finish()?;
        Ok(trainer)
    }

    /// The plan for a batch: as it is, or with as many layers recomputed as the memory budget asks for.
    fn plan_for(&mut self, batch: &Batch) -> Result<Plan> {
        let Some(budget) = self.memory_budget else {
            self.check_memory(batch)?;
            return Ok(self.plan);
        };
        // Buffers are sized for the largest batch so far.
        let (tokens, sequences) = (self.room.0.max(batch.n_tokens()), self.room.1.max(batch.n_sequences()));
        let bytes = |recomputed| Plan { recomputed, ..self.plan }.bytes::<D>(&self.config, tokens, sequences);
        let layers = self.plan.layers(&self.config);
        if let Some(recomputed) = (0..=layers).find(|n| bytes(*n) <= budget) {
            self.room = (tokens, sequences);
            return Ok(Plan { recomputed, ..self.plan });
        }
        let least = (0..=layers).map(bytes).min().unwrap_or(0);
        let [least, budget] = [least, budget].map(|bytes| bytes as f64 / 1e6);
        Err(Error::Usage(format!(
            "a batch of {tokens} tokens needs {least} MB of activations at least, and the memory budget is \
             {budget} MB: allow more, or take smaller batches (gradients of several can be accumulated)"
        )))
    }

    /// Refuses a batch that is sure not to fit a device with memory of its own.
    fn check_memory(&mut self, batch: &Batch) -> Result<()> {
        let (tokens, sequences) = (batch.n_tokens(), batch.n_sequences());
        if tokens <= self.room.0 && sequences <= self.room.1 {
            return Ok(());
        }
        let Some(MemoryUse { available, .. }) = self.d.memory() else { return Ok(()) };
        let needed = self.plan.bytes::<D>(&self.config, tokens, sequences);
        if needed <= available {
            self.room = (self.room.0.max(tokens), self.room.1.max(sequences));
            return Ok(());
        }
        let fits = (sequences as f64 * available as f64 / needed as f64) as usize;
        let [needed_gb, available_gb] = [needed, available].map(|bytes| bytes as f64 / 1e9);
        let way_out = match fits {
            0 => "--memory-budget computes layers again instead of keeping them".to_string(),
            n => format!(
                "a batch of {n} such sequences would fit (gradients of several can be accumulated), and \
                 --memory-budget computes layers again instead of keeping them"
            ),
        };
        Err(Error::Device(format!(
            "a batch of {sequences} sequences, {tokens} tokens, needs {needed_gb:.2} GB of activations, and the device \
             has {available_gb:.2} GB left: {way_out}"
        )))
    }

    /// Refuses a class that a sequence's head does not have, and more groups than runs.
    fn check_targets(&self, batch: &Batch) -> Result<()> {
        let n_outputs = &self.heads.classifier.n_outputs;
        for (target, g) in batch.targets().iter().zip(batch.groups()) {
            let Some(n) = n_outputs.get(*g) else {
                return Err(Error::setting("group of a sequence", format!("below {}", n_outputs.len()), g));
            };
            if let Some(Target::Class(class)) = target
                && *class as usize >= *n
            {
                return Err(Error::setting("class of a sequence", format!("below {n}"), class));
            }
        }
        Ok(())
    }

    /// Forward and backward of every batch; gradients are in place, and each batch's losses given, once the device
    /// gets there.
    fn passes(&mut self, batches: &[Arc<Batch>], dropout: Dropout) -> Result<Vec<D::Rows>> {
        let groups = self.steps.len();
        let mut sequences = vec![0usize; groups];
        for batch in batches {
            check_batch(&self.config, batch)?;
            self.check_targets(batch)?;
            for (n, range) in sequences.iter_mut().zip(batch.sequences_by_group()) {
                *n += range.len();
            }
        }
        // What an evaluation took is not the step's to keep.
        self.between.release();
        let plans = batches.iter().map(|batch| self.plan_for(batch)).collect::<Result<Vec<_>>>()?;
        let loss: Vec<Loss> = sequences.iter().map(|n| Loss { scale: 1.0 / (*n).max(1) as f32 }).collect();
        let Trainer { d, network, biases, heads, tensors, grads, .. } = self;
        Ok(d.run(|d| {
            for t in tensors.iter() {
                if let Some(sums) = t.sums(grads) {
                    d.clear(sums);
                }
            }
            let mut losses = Vec::with_capacity(batches.len());
            for (batch, plan) in batches.iter().zip(plans) {
                d.begin(batch.clone(), dropout);
                losses.push(Pass { network, biases }.train(d, heads, &loss, plan, grads));
            }
            for t in tensors.iter_mut() {
                t.gather(d, grads);
            }
            losses
        }))
    }

    /// Each group's loss over all batches.
    fn sum_of(&self, losses: &[D::Rows]) -> Vec<f64> {
        let mut sums = vec![0.0; self.steps.len()];
        for of_batch in losses {
            for (sum, loss) in sums.iter_mut().zip(self.d.read_rows(of_batch)) {
                *sum += loss;
            }
        }
        sums
    }

    /// Puts base + difference of every trained tensor where the passes read it.
    fn put_in_use(&mut self) -> Result<()> {
        let Trainer { d, network, biases, heads, tensors, .. } = self;
        d.run(|d| {
            for t in tensors.iter() {
                let held =
                    || Error::Audit(format!("{} is held by a prediction; drop that before the next step", t.name));
                let (base, delta) = (&t.values.base, &t.values.delta);
                let at = t.entries.as_ref().map(|(_, at)| at);
                match t.part {
                    Part::Base(Role::Bias(term), layer) => {
                        if let Some(to) = biases.get_mut(term, layer) {
                            d.sum(base, delta, at, to);
                        }
                    }
                    Part::Base(role, layer) => match network.slot(role, layer) {
                        Some(Slot::Gamma(to)) => d.sum(base, delta, at, Arc::get_mut(to).ok_or_else(held)?),
                        Some(Slot::Matrix(to)) => {
                            d.write_weight(base, delta, 0, at, Arc::get_mut(to).ok_or_else(held)?);
                        }
                        Some(Slot::Table(to)) => d.write_table(base, delta, at, Arc::get_mut(to).ok_or_else(held)?),
                        None => {}
                    },
                    Part::Classifier => d.sum(base, delta, None, &mut heads.classifier.weight),
                    Part::ClassifierBias => d.sum(base, delta, None, &mut heads.classifier.bias),
                    Part::PoolerBias => d.sum(base, delta, None, &mut biases.pooler),
                    Part::Pooler => {
                        for (g, to) in heads.poolers.iter_mut().flatten().enumerate() {
                            d.write_weight(base, delta, g, None, Arc::get_mut(to).ok_or_else(held)?);
                        }
                    }
                }
            }
            Ok(())
        })
    }
}

impl<D: Ops> Training for Trainer<D> {
    fn step(&mut self, batches: &[Arc<Batch>], dropout: Dropout, rules: &[Option<Rule>]) -> Result<Vec<Report>> {
        let losses = self.passes(batches, dropout)?;
        for (step, _) in self.steps.iter_mut().zip(rules).filter(|(_, rule)| rule.is_some()) {
            *step += 1;
        }
        let Trainer { d, tensors, grads, squares, steps, .. } = self;
        d.run(|d| {
            d.clear(squares);
            for t in tensors.iter_mut() {
                let rules = t.rules(rules, steps);
                if let Some(grad) = t.gradient(grads) {
                    d.add_squares(grad, &rules, squares);
                }
            }
            for t in tensors.iter_mut() {
                let rules = t.rules(rules, steps);
                t.adamw(d, grads, squares, &rules);
            }
        });
        self.put_in_use()?;
        // Nothing is read before all is said, so that a device waits once a step.
        let losses = self.sum_of(&losses);
        let norms = self.d.read_params(&self.squares);
        self.d.finish()?;
        let report = |(loss, square): (f64, f32)| Report { loss, grad_norm: f64::from(square).sqrt() };
        Ok(losses.into_iter().zip(norms).map(report).collect())
    }

    fn accumulate(&mut self, batches: &[Arc<Batch>], dropout: Dropout) -> Result<Vec<f64>> {
        let losses = self.passes(batches, dropout)?;
        let losses = self.sum_of(&losses);
        self.d.finish()?;
        Ok(losses)
    }

    fn gradients(&mut self, g: usize) -> BTreeMap<String, Vec<f32>> {
        let Trainer { d, tensors, grads, heads, .. } = self;
        let n_outputs = heads.classifier.n_outputs[g];
        let mut all = BTreeMap::new();
        for t in tensors.iter().filter(|t| t.runs[g]) {
            if let Some(grad) = t.gradient(grads) {
                all.insert(t.name.clone(), t.row(d, grad, g, n_outputs));
            }
        }
        all
    }

    fn delta(&self, g: usize) -> Delta {
        let n_outputs = self.heads.classifier.n_outputs[g];
        let mut head = Head { n_outputs, weight: vec![], bias: vec![], pooler: None };
        let mut changes = BTreeMap::new();
        for t in self.tensors.iter().filter(|t| t.runs[g]) {
            let values = t.row(&self.d, &t.values.delta, g, n_outputs);
            match t.part {
                Part::Classifier => head.weight = values,
                Part::ClassifierBias => head.bias = values,
                Part::Pooler => head.pooler.get_or_insert_default().0 = values,
                Part::PoolerBias => head.pooler.get_or_insert_default().1 = values,
                Part::Base(..) => {
                    let change = match &t.entries {
                        None => Change::Dense(values),
                        Some((indices, _)) => Change::Sparse { indices: indices.clone(), values },
                    };
                    changes.insert(t.name.clone(), change);
                }
            }
        }
        Delta { changes, head }
    }

    fn moments(&self, g: usize) -> Moments {
        let n_outputs = self.heads.classifier.n_outputs[g];
        let of = |t: &Tensor<D>, p: &D::Params| t.row(&self.d, p, g, n_outputs);
        let trained = self.tensors.iter().filter(|t| t.runs[g]);
        Moments {
            step: self.steps[g],
            tensors: trained.map(|t| (t.name.clone(), (of(t, &t.values.m), of(t, &t.values.v)))).collect(),
        }
    }

    fn restore(&mut self, g: usize, moments: &Moments) -> Result<()> {
        let n_outputs = self.heads.classifier.n_outputs[g];
        self.steps[g] = moments.step;
        let Trainer { d, tensors, .. } = self;
        for t in tensors.iter_mut().filter(|t| t.runs[g]) {
            let n = t.own(n_outputs);
            let (m, v) = moments
                .tensors
                .get(&t.name)
                .filter(|(m, v)| m.len() == n && v.len() == n)
                .ok_or_else(|| Error::setting(format!("moments of {}", t.name), format!("{n} values"), "others"))?;
            (t.values.m, t.values.v) = (t.with_row(d, &t.values.m, g, m), t.with_row(d, &t.values.v, g, v));
        }
        Ok(())
    }

    fn logits(&mut self, batch: &Arc<Batch>) -> Result<Vec<Vec<f32>>> {
        check_batch(&self.config, batch)?;
        self.check_targets(batch)?;
        let Trainer { between: d, network, biases, heads, .. } = self;
        let logits = d.run(|d| {
            d.begin(batch.clone(), Dropout::NONE);
            let rows = Pass { network, biases }.logits(d, heads);
            d.read_rows(&rows)
        });
        d.finish()?;
        Ok(split_logits(&logits, batch, &heads.classifier.n_outputs))
    }

    fn weights_hash(&self) -> String {
        self.network.hash(&self.d)
    }

    fn peak_bytes(&self) -> usize {
        self.d.peak_bytes()
    }
}

fn check_names(base: &Base, runs: &[Run]) -> Result<()> {
    for run in runs {
        for name in run.requests.keys() {
            if !base.parameters().iter().any(|p| &p.name == name) {
                return Err(Error::setting("tensor to train", "a tensor of the base", format_args!("`{name}`")));
            }
        }
        if let Some(name) = run.start.changes.keys().find(|name| !run.requests.contains_key(*name)) {
            return Err(Error::setting(
                "values to start from",
                "those of tensors that train",
                format_args!("`{name}`"),
            ));
        }
    }
    Ok(())
}
