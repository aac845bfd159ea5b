//! The CUDA side through its own launch code, on a grid that is emulated on the CPU: whole steps of a tiny base, with
//! groups and dropout on, held to the CPU's.

use std::collections::BTreeMap;
use std::sync::Arc;

use emulated_grid::Order;

use super::engine::{Runtime, arithmetic};
use super::tests::{DROPOUT, RULE, base, batch, biases, everything, push, run};
use super::trainer::{Run, Trainer, Training};
use crate::base::base::Base;
use crate::base::delta::{Delta, Request};
use crate::device::batch::Batch;
use crate::device::cpu;
use crate::device::cuda::card::Precision;
use crate::device::cuda::emulated::Emulated;
use crate::device::cuda::{self, Cuda, Numbers};

type Grid<N> = Cuda<Emulated, N>;

fn on_cpu<P: cpu::Precision>(base: &Base, runs: &[Run]) -> Trainer<cpu::Cpu<P>> {
    let cpu = cpu::Cpu::<P>::new(arithmetic(base.config()), 1).unwrap();
    Runtime::new(cpu, base).unwrap().train(runs, None).unwrap()
}

fn on_grid<N: Numbers>(base: &Base, runs: &[Run], order: Order) -> Trainer<Grid<N>> {
    let card = Emulated::new(N::PRECISION);
    card.conditions().lock().unwrap().order = order;
    let config = base.config();
    let cuda = Cuda::<_, N>::new(card, arithmetic(config), config.hidden_size, config.intermediate_size).unwrap();
    Runtime::new(cuda, base).unwrap().train(runs, None).unwrap()
}

/// The norm of the difference over the norm.
fn error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let expected_norm = norm(&mut expected.iter().map(|x| f64::from(*x)));
    let off = norm(&mut found.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    if off == 0.0 { 0.0 } else { off / expected_norm.max(1e-30) }
}

/// Losses and every gradient of every run, against the CPU's in the same precision.
fn agrees<N: Numbers, P: cpu::Precision>(base: &Base, runs: &[Run], groups: &[usize], most: f64) {
    let n_outputs: Vec<_> = runs.iter().map(|r| r.start.head.n_outputs).collect();
    let batch = [Arc::new(batch(groups, &n_outputs))];
    let mut expected = on_cpu::<P>(base, runs);
    let mut found = on_grid::<N>(base, runs, Order::Forward);
    let losses = (found.accumulate(&batch, DROPOUT).unwrap(), expected.accumulate(&batch, DROPOUT).unwrap());
    for (found, expected) in losses.0.iter().zip(&losses.1) {
        assert!((found / expected - 1.0).abs() < most, "losses {losses:?}");
    }
    for g in 0..runs.len() {
        let (found, expected) = (found.gradients(g), expected.gradients(g));
        assert_eq!(found.len(), expected.len());
        for (name, found) in found {
            let error = error(&found, &expected[&name]);
            assert!(error < most, "{name} of run {g}: {error:.1e}");
        }
    }
}

#[test]
fn a_step_of_three_runs_is_the_cpus() {
    for pooler in [true, false] {
        let base = base(pooler);
        let runs = [(10, 2), (20, 1), (30, 3)].map(|(seed, n)| run(&base, biases(&base), seed, n));
        agrees::<cuda::F32, cpu::F32>(&base, &runs, &[0, 0, 1, 1, 1, 2], 1e-5);
    }
}

#[test]
fn gradients_of_every_weight_are_the_cpus() {
    let base = base(true);
    agrees::<cuda::F32, cpu::F32>(&base, &[run(&base, everything(&base), 40, 2)], &[0; 6], 1e-5);
}

#[test]
fn sampled_gradients_are_the_cpus() {
    let base = base(true);
    let every_third = |n: usize| Request::Entries((0..n as u64).step_by(3).collect());
    let mut sampled = run(&base, everything(&base), 50, 2);
    sampled.start.changes.clear();
    sampled.requests = base.parameters().iter().map(|p| (p.name.clone(), every_third(p.len()))).collect();
    agrees::<cuda::F32, cpu::F32>(&base, &[sampled], &[0; 6], 1e-5);
}

#[test]
fn bf16_and_tf32_are_close() {
    let base = base(true);
    let runs = [(10, 2), (20, 1), (30, 3)].map(|(seed, n)| run(&base, biases(&base), seed, n));
    agrees::<cuda::Tf32, cpu::F32>(&base, &runs, &[0, 0, 1, 1, 1, 2], 5e-3);
    agrees::<cuda::Bf16, cpu::Bf16>(&base, &runs, &[0, 0, 1, 1, 1, 2], 2e-2);
    agrees::<cuda::Bf16, cpu::Bf16>(&base, &[run(&base, everything(&base), 40, 2)], &[0; 6], 2e-2);
}

fn trained<D: crate::device::ops::Ops>(mut trainer: Trainer<D>, batches: &[Arc<Batch>], runs: usize) -> Vec<Delta> {
    for _ in 0..3 {
        trainer.step(batches, DROPOUT, &vec![Some(RULE); runs]).unwrap();
    }
    (0..runs).map(|g| trainer.delta(g)).collect()
}

#[test]
fn steps_are_the_cpus_and_the_same_bits_in_any_order_of_threads() {
    let base = base(true);
    for runs in [
        vec![run(&base, biases(&base), 10, 2), run(&base, biases(&base), 20, 1)],
        vec![run(&base, everything(&base), 10, 2)],
    ] {
        let groups: Vec<usize> = (0..6).map(|s| s * runs.len() / 6).collect();
        let n_outputs: Vec<_> = runs.iter().map(|r| r.start.head.n_outputs).collect();
        let batches = [Arc::new(batch(&groups, &n_outputs))];
        let expected = trained(on_cpu::<cpu::F32>(&base, &runs), &batches, runs.len());
        let [first, rest @ ..] = [Order::Forward, Order::Backward, Order::Shuffled(3)]
            .map(|order| trained(on_grid::<cuda::F32>(&base, &runs, order), &batches, runs.len()));
        for (found, expected) in first.iter().zip(&expected) {
            for (name, change) in &found.changes {
                let difference = |change: &crate::base::delta::Change| match change {
                    crate::base::delta::Change::Dense(values) => values.clone(),
                    crate::base::delta::Change::Sparse { values, .. } => values.clone(),
                };
                // Adam turns the noise of tiny gradients into steps as large as any.
                let error = error(&difference(change), &difference(&expected.changes[name]));
                assert!(error < 1e-2, "{name}: {error:.1e}");
            }
        }
        assert!(rest.iter().all(|other| *other == first), "an order of threads changed the bits");
    }
}

#[test]
fn runs_trained_as_groups_get_the_bits_they_get_alone() {
    groups_equal_runs_alone::<cuda::F32>();
    groups_equal_runs_alone::<cuda::Bf16>();
}

fn groups_equal_runs_alone<N: Numbers>() {
    let base = base(true);
    let n_outputs = [2, 1, 3];
    let runs: Vec<Run> = [0, 1, 2].map(|g| run(&base, biases(&base), 10 * g as u64, n_outputs[g])).to_vec();
    // Enough sequences that a group's rows begin inside another's block of 64.
    let groups: Vec<usize> = (0..27).map(|s| s / 9).collect();
    let mixed = [Arc::new(batch(&groups, &n_outputs))];
    let together = trained(on_grid::<N>(&base, &runs, Order::Forward), &mixed, 3);
    for g in 0..3 {
        let (mut own, mut index) = (Batch::new(), BTreeMap::new());
        for s in (0..27).filter(|s| s / 9 == g) {
            push(&mut own, s, g, 0, n_outputs[g], &mut index);
        }
        let alone = trained(on_grid::<N>(&base, &runs[g..=g], Order::Forward), &[Arc::new(own)], 1);
        assert!(alone[0] == together[g], "run {g} alone, {:?}", N::PRECISION);
    }
}

#[test]
fn a_step_is_handed_over_once_and_in_equal_commands() {
    let base = base(true);
    let runs = [run(&base, biases(&base), 10, 2)];
    let mut trainer = on_grid::<cuda::F32>(&base, &runs, Order::Forward);
    let batches = [Arc::new(batch(&[0; 6], &[2]))];
    let step = |t: &mut Trainer<Grid<cuda::F32>>| t.step(&batches, DROPOUT, &[Some(RULE)]).unwrap();
    step(&mut trainer);
    step(&mut trainer);
    let peak = trainer.peak_bytes();
    step(&mut trainer);
    assert_eq!(peak, trainer.peak_bytes());
    let _ = Precision::ALL;
}
