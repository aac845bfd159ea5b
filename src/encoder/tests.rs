//! The encoder's arithmetic held to finite differences in f64, and its promises about bits held in f32: on a tiny base,
//! with groups and dropout on. Parity with PyTorch stands in `tests/parity.rs`.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::engine::{Runtime, arithmetic};
use super::trainer::{Run, Trainer, Training};
use crate::base::base::Base;
use crate::base::config::Config;
use crate::base::delta::{Change, Delta, Head, Request};
use crate::base::parameters::{Role, parameters};
use crate::device::batch::{Batch, DropoutKey, Target};
use crate::device::cpu::{Bf16, Cpu, F32, F64, Precision};
use crate::device::ops::Dropout;
use crate::encoder::Rule;
use crate::error::Error;

pub(super) const DROPOUT: Dropout = Dropout { hidden: 0.2, attention: 0.15, classifier: 0.1 };
const LENGTHS: [usize; 6] = [1, 9, 13, 5, 17, 8];

/// Numbers around zero, the same on every machine.
fn numbers(seed: u64, n: usize, scale: f32) -> Vec<f32> {
    let mut s = seed.wrapping_mul(2_862_933_555_777_941_757).wrapping_add(3_037_000_493);
    let mut next = || {
        s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((s >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 3.4 * scale
    };
    (0..n).map(|_| next()).collect()
}

fn config() -> Config {
    Config { hidden_size: 16, num_attention_heads: 2, intermediate_size: 24, vocab_size: 23, ..Config::tiny() }
}

pub(super) fn base(pooler: bool) -> Base {
    let config = Config { max_position_embeddings: 20, num_hidden_layers: 2, ..config() };
    let tensors = parameters(&config, pooler).into_iter().enumerate().map(|(i, p)| {
        let mut values = numbers(i as u64, p.len(), 0.2);
        if matches!(p.role, Role::NormWeight(_)) {
            values.iter_mut().for_each(|v| *v += 1.0);
        }
        (p.name, values)
    });
    Base::in_memory("test/tiny", config, None, tensors.collect()).unwrap()
}

fn head(base: &Base, seed: u64, n_outputs: usize) -> Head {
    let h = base.config().hidden_size;
    Head {
        n_outputs,
        weight: numbers(seed, n_outputs * h, 0.5),
        bias: numbers(seed + 1, n_outputs, 0.5),
        pooler: (!base.has_pooler()).then(|| (numbers(seed + 2, h * h, 0.2), numbers(seed + 3, h, 0.2))),
    }
}

/// Sequences of the lengths above, dealt out to groups; classes or, where `n_outputs` is 1, values.
pub(super) fn batch(groups: &[usize], n_outputs: &[usize]) -> Batch {
    let mut batch = Batch::new();
    let mut index = BTreeMap::new();
    for (s, g) in groups.iter().enumerate() {
        push(&mut batch, s, *g, *g, n_outputs[*g], &mut index);
    }
    batch
}

/// Sequence `s` of run `run`, as group `g` of a batch.
pub(super) fn push(
    batch: &mut Batch,
    s: usize,
    run: usize,
    g: usize,
    n_outputs: usize,
    index: &mut BTreeMap<usize, u32>,
) {
    let n = LENGTHS[s % LENGTHS.len()];
    let ids: Vec<u32> = (0..n).map(|i| ((s * 7 + i * 5 + 3) % 23) as u32).collect();
    let types: Vec<u32> = (0..n).map(|i| u32::from(i * 2 > n)).collect();
    let at = index.entry(run).or_insert(0);
    let key = DropoutKey { seed: 0xfeed_0123_4567 + run as u64, step: 3, index: *at };
    *at += 1;
    let target = if n_outputs == 1 { Target::Value(s as f32 * 0.3) } else { Target::Class((s % n_outputs) as u32) };
    batch.push(&ids, &types, g, key, Some(target));
}

pub(super) fn biases(base: &Base) -> BTreeMap<String, Request> {
    let is_bias = |role| matches!(role, Role::Bias(_));
    base.parameters().iter().filter(|p| is_bias(p.role)).map(|p| (p.name.clone(), Request::Dense)).collect()
}

pub(super) fn everything(base: &Base) -> BTreeMap<String, Request> {
    base.parameters().iter().map(|p| (p.name.clone(), Request::Dense)).collect()
}

pub(super) fn run(base: &Base, requests: BTreeMap<String, Request>, seed: u64, n_outputs: usize) -> Run {
    let changes = requests.iter().map(|(name, request)| {
        let p = base.parameters().iter().find(|p| &p.name == name).unwrap();
        let change = match request {
            Request::Dense => Change::Dense(numbers(seed + p.len() as u64, p.len(), 0.05)),
            Request::Entries(at) => Change::Sparse { indices: at.clone(), values: numbers(seed, at.len(), 0.05) },
        };
        (name.clone(), change)
    });
    let start = Delta { changes: changes.collect(), head: head(base, seed, n_outputs) };
    Run { start, requests }
}

fn trainer<P: Precision>(base: &Base, runs: &[Run], threads: usize) -> Trainer<Cpu<P>> {
    let cpu = Cpu::<P>::new(arithmetic(base.config()), threads).unwrap();
    Runtime::new(cpu, base).unwrap().train(runs, None).unwrap()
}

/// Every tensor's gradient of every run against central differences of the loss.
fn differences_agree(base: &Base, runs: &[Run], groups: &[usize], entries_per_tensor: usize) {
    let n_outputs: Vec<_> = runs.iter().map(|r| r.start.head.n_outputs).collect();
    let batch = Arc::new(batch(groups, &n_outputs));
    let loss = |runs: &[Run]| trainer::<F64>(base, runs, 1).accumulate(std::slice::from_ref(&batch), DROPOUT).unwrap();
    let mut exact = trainer::<F64>(base, runs, 2);
    exact.accumulate(std::slice::from_ref(&batch), DROPOUT).unwrap();
    let (mut checked, mut worst) = (0, (0.0, String::new()));
    for g in 0..runs.len() {
        for (name, gradient) in exact.gradients(g) {
            let norm = gradient.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            if name.ends_with("key.bias") {
                assert_eq!(norm, 0.0, "{name} has no gradient");
            }
            let every = gradient.len().div_ceil(entries_per_tensor);
            for i in (0..gradient.len()).step_by(every) {
                let shifted = |by: f32| {
                    let mut runs = runs.to_vec();
                    let value = entry(&mut runs[g].start, &name, i);
                    let before = *value;
                    *value += by;
                    let actual = f64::from(*value) - f64::from(before);
                    (loss(&runs)[g], actual)
                };
                let ((up, a), (down, b)) = (shifted(1e-3), shifted(-1e-3));
                let difference = (up - down) / (a - b);
                let error = (difference - f64::from(gradient[i])).abs() / norm.max(1e-3);
                if error > worst.0 {
                    worst = (error, format!("{name}[{i}] of run {g}: {difference} against {}", gradient[i]));
                }
                checked += 1;
            }
        }
    }
    assert!(worst.0 < 2e-5, "{} entries; worst {:.1e} {}", checked, worst.0, worst.1);
}

fn entry<'d>(start: &'d mut Delta, name: &str, i: usize) -> &'d mut f32 {
    match (start.changes.get_mut(name), name) {
        (Some(Change::Dense(values) | Change::Sparse { values, .. }), _) => &mut values[i],
        (None, "classifier.weight") => &mut start.head.weight[i],
        (None, "classifier.bias") => &mut start.head.bias[i],
        (None, "pooler.dense.weight") => &mut start.head.pooler.as_mut().unwrap().0[i],
        (None, _) => &mut start.head.pooler.as_mut().unwrap().1[i],
    }
}

#[test]
fn bias_gradients_of_three_runs_at_once_agree_with_finite_differences() {
    let base = base(true);
    let runs = [(10, 2), (20, 1), (30, 3)].map(|(seed, n)| run(&base, biases(&base), seed, n));
    differences_agree(&base, &runs, &[0, 0, 1, 1, 1, 2], 6);
}

#[test]
fn a_pooler_of_the_head_trains_whole_and_a_run_each() {
    let base = base(false);
    let runs = [(10, 2), (20, 3)].map(|(seed, n)| run(&base, biases(&base), seed, n));
    differences_agree(&base, &runs, &[0, 0, 0, 1, 1, 1], 6);
}

#[test]
fn gradients_of_every_weight_agree_with_finite_differences() {
    let base = base(true);
    differences_agree(&base, &[run(&base, everything(&base), 40, 2)], &[0; 6], 12);
}

#[test]
fn sampled_gradients_are_those_entries_of_the_whole() {
    let base = base(true);
    let every_third = |n: usize| Request::Entries((0..n as u64).step_by(3).collect());
    let mut sampled = run(&base, everything(&base), 50, 2);
    sampled.start.changes.clear();
    let full = sampled.clone();
    sampled.requests = base.parameters().iter().map(|p| (p.name.clone(), every_third(p.len()))).collect();
    let batch = [Arc::new(batch(&[0; 6], &[2]))];
    let [mut full, mut sampled] = [full, sampled].map(|run| trainer::<F64>(&base, &[run], 1));
    full.accumulate(&batch, DROPOUT).unwrap();
    sampled.accumulate(&batch, DROPOUT).unwrap();
    let whole = full.gradients(0);
    for (name, values) in sampled.gradients(0) {
        if name.starts_with("classifier") {
            continue;
        }
        let expected: Vec<f32> = whole[&name].iter().copied().step_by(3).collect();
        let error = values.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(values.len() == expected.len() && error < 1e-7, "{name}: {error:e}");
    }
}

#[test]
fn a_backward_that_stops_early_gives_the_same_gradients_as_the_whole() {
    let base = base(true);
    let batch = [Arc::new(batch(&[0; 6], &[2]))];
    let gradients = |requests| {
        let mut run = run(&base, requests, 60, 2);
        run.start.changes.clear();
        let mut t = trainer::<F32>(&base, &[run], 1);
        t.accumulate(&batch, DROPOUT).unwrap();
        t.gradients(0)
    };
    for whole in [biases(&base), everything(&base)] {
        let all = gradients(whole.clone());
        for name in whole.keys() {
            let alone = gradients(BTreeMap::from([(name.clone(), Request::Dense)]));
            assert_eq!(alone[name], all[name], "{name}");
            assert_eq!(alone["classifier.weight"], all["classifier.weight"], "beside {name}");
        }
    }
}

pub(super) const RULE: Rule = Rule {
    learning_rate: 1e-2,
    head_learning_rate: 2e-2,
    betas: (0.9, 0.999),
    epsilon: 1e-6,
    weight_decay: 0.01,
    decay_biases: false,
    max_grad_norm: 0.5,
};

/// Five steps of runs side by side; `of` gives the batch of a step.
fn trained<P: Precision>(base: &Base, runs: &[Run], threads: usize, batches: &[Arc<Batch>]) -> Vec<Delta> {
    let mut trainer = trainer::<P>(base, runs, threads);
    for _ in 0..5 {
        trainer.step(batches, DROPOUT, &vec![Some(RULE); runs.len()]).unwrap();
    }
    (0..runs.len()).map(|g| trainer.delta(g)).collect()
}

#[test]
fn runs_trained_as_groups_get_the_bits_they_get_alone_with_one_thread_or_two() {
    groups_equal_runs_alone::<F32>();
    groups_equal_runs_alone::<Bf16>();
}

fn groups_equal_runs_alone<P: Precision>() {
    for pooler in [true, false] {
        let base = base(pooler);
        let n_outputs = [2, 1, 3];
        let runs: Vec<Run> = [0, 1, 2].map(|g| run(&base, biases(&base), 10 * g as u64, n_outputs[g])).to_vec();
        // Enough sequences that a group's rows begin inside another's block of 64.
        let groups: Vec<usize> = (0..27).map(|s| s / 9).collect();
        let mixed = batch(&groups, &n_outputs);
        let together = trained::<P>(&base, &runs, 2, &[Arc::new(mixed)]);
        for g in 0..3 {
            let (mut own, mut index) = (Batch::new(), BTreeMap::new());
            for s in (0..27).filter(|s| s / 9 == g) {
                push(&mut own, s, g, 0, n_outputs[g], &mut index);
            }
            for threads in [1, 2] {
                let alone = trained::<P>(&base, &runs[g..=g], threads, &[Arc::new(own.clone())]);
                assert!(alone[0] == together[g], "run {g} alone with {threads} threads, pooler {pooler}");
            }
        }
    }
}

/// Under every memory budget there is: the same gradients, and no more memory than allowed.
#[test]
fn layers_that_are_computed_again_give_the_same_bits_within_the_budget() {
    recomputed_equals_kept::<F32>();
    recomputed_equals_kept::<Bf16>();
}

/// Of a run whose backward goes through few layers or none, too, the budget holds.
#[test]
fn a_budget_counts_the_layers_that_keep_nothing() {
    let base = Base::random(Config { num_hidden_layers: 6, ..base(true).config().clone() }, 5);
    let layers = |from: &str| {
        let mut some = biases(&base);
        some.retain(|name, _| name.contains(from));
        some
    };
    for requests in [BTreeMap::new(), layers("layer.5."), layers("layer.3.attention.self.query"), layers("layer.0.")] {
        let mut run = run(&base, biases(&base), 80, 2);
        run.start.changes.clear();
        run.requests = requests;
        within_budgets::<F32>(&base, &[run]);
    }
}

fn recomputed_equals_kept<P: Precision>() {
    let base = Base::random(Config { num_hidden_layers: 6, ..base(true).config().clone() }, 5);
    let runs = [run(&base, biases(&base), 80, 2)];
    let peaks = within_budgets::<P>(&base, &runs);
    assert!(peaks[0] < peaks[1], "{peaks:?}: nothing was saved");
}

/// Gives the peaks at the least budget and without one.
fn within_budgets<P: Precision>(base: &Base, runs: &[Run]) -> [usize; 2] {
    // Long enough that activations outweigh what a step needs besides.
    let mut long = Batch::new();
    for s in 0..6u32 {
        let ids: Vec<u32> = (0..19).map(|i| (s * 7 + i * 3) % base.config().vocab_size as u32).collect();
        let key = DropoutKey { seed: 1, step: 0, index: s };
        long.push(&ids, &[0; 19], 0, key, Some(Target::Class(s % 2)));
    }
    let batch = [Arc::new(long)];
    let step = |memory_budget: Option<usize>| {
        let cpu = Cpu::<P>::new(arithmetic(base.config()), 1).unwrap();
        let mut trainer = Runtime::new(cpu, base).unwrap().train(runs, memory_budget).unwrap();
        trainer.accumulate(&batch, DROPOUT).map(|loss| (loss, trainer.gradients(0), trainer.peak_bytes()))
    };
    let (loss, gradients, most) = step(None).unwrap();
    let Err(Error::Usage(message)) = step(Some(1)) else { panic!("a budget of one byte") };
    let least: f64 = message.split_once("needs ").unwrap().1.split(' ').next().unwrap().parse().unwrap();
    let least = (least * 1e6).round() as usize;
    assert!(step(Some(least - 1)).is_err());
    let mut peaks = Vec::new();
    for budget in [least, least.midpoint(most.max(least)), 2 * most.max(least)] {
        let (again, found, peak) = step(Some(budget)).unwrap();
        assert!(again == loss && found == gradients, "within {budget} bytes");
        assert!(peak <= budget, "{peak} bytes of {budget}");
        peaks.push(peak);
    }
    assert_eq!(peaks[2], most);
    [peaks[0], most]
}

#[test]
fn micro_batches_count_as_one_batch() {
    let base = base(true);
    let runs = [run(&base, biases(&base), 70, 2)];
    let whole = batch(&[0; 6], &[2]);
    let (mut first, mut second, mut index) = (Batch::new(), Batch::new(), BTreeMap::new());
    (0..3).for_each(|s| push(&mut first, s, 0, 0, 2, &mut index));
    (3..6).for_each(|s| push(&mut second, s, 0, 0, 2, &mut index));
    let gradients = |batches: &[Arc<Batch>]| {
        let mut t = trainer::<F64>(&base, &runs, 1);
        let loss = t.accumulate(batches, DROPOUT).unwrap()[0];
        (loss, t.gradients(0))
    };
    let (loss, one) = gradients(&[Arc::new(whole)]);
    let (loss_of_two, two) = gradients(&[Arc::new(first), Arc::new(second)]);
    assert!((loss - loss_of_two).abs() < 1e-7, "{loss} {loss_of_two}");
    for (name, values) in &one {
        let error = values.iter().zip(&two[name]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(error < 1e-6, "{name}: {error:e}");
    }
}

#[test]
fn a_run_goes_on_from_its_values_and_moments_to_the_same_bits() {
    let base = base(true);
    for requests in [biases(&base), everything(&base)] {
        let start = run(&base, requests, 80, 2);
        let batches = [Arc::new(batch(&[0; 6], &[2]))];
        let step = |t: &mut Trainer<Cpu<F32>>| t.step(&batches, DROPOUT, &[Some(RULE)]).unwrap();
        let mut through = trainer::<F32>(&base, std::slice::from_ref(&start), 1);
        (0..4).for_each(|_| drop(step(&mut through)));
        let mut first = trainer::<F32>(&base, std::slice::from_ref(&start), 1);
        (0..2).for_each(|_| drop(step(&mut first)));
        let (values, moments) = (first.delta(0), first.moments(0));
        let mut second = trainer::<F32>(&base, &[Run { start: values, ..start }], 2);
        second.restore(0, &moments).unwrap();
        (0..2).for_each(|_| drop(step(&mut second)));
        assert!(through.delta(0) == second.delta(0) && through.moments(0) == second.moments(0));
    }
}

#[test]
fn frozen_weights_are_untouched_by_a_run_of_biases_and_shared_ones_by_a_run_of_weights() {
    let base = base(true);
    let cpu = Cpu::<F32>::new(arithmetic(base.config()), 1).unwrap();
    let runtime = Runtime::new(cpu, &base).unwrap();
    let batches = [Arc::new(batch(&[0; 6], &[2]))];
    let mut biased = runtime.train(&[run(&base, biases(&base), 90, 2)], None).unwrap();
    let before = biased.weights_hash();
    biased.step(&batches, DROPOUT, &[Some(RULE)]).unwrap();
    assert_eq!(before, biased.weights_hash());
    let mut whole = runtime.train(&[run(&base, everything(&base), 90, 2)], None).unwrap();
    whole.step(&batches, DROPOUT, &[Some(RULE)]).unwrap();
    assert_ne!(before, whole.weights_hash());
    assert_eq!(before, biased.weights_hash());
}

#[test]
fn buffers_are_reused_from_step_to_step() {
    let base = base(true);
    let mut t = trainer::<F32>(&base, &[run(&base, biases(&base), 5, 2)], 1);
    let batches = [Arc::new(batch(&[0; 6], &[2]))];
    t.step(&batches, DROPOUT, &[Some(RULE)]).unwrap();
    let peak = t.peak_bytes();
    t.step(&batches, DROPOUT, &[Some(RULE)]).unwrap();
    assert_eq!(peak, t.peak_bytes());
}
