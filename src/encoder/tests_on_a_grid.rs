//! The CUDA side through its own launch code, on a grid that is emulated on the CPU: whole steps of a tiny base, with
//! groups and dropout on, held to the CPU's.

use std::collections::BTreeMap;
use std::sync::Arc;

use emulated_grid::Order;

use super::engine::{Engine, Runtime, arithmetic};
use super::tests::{DROPOUT, RULE, base, batch, biases, everything, push, run};
use super::trainer::{Run, Trainer, Training};
use crate::base::base::Base;
use crate::base::delta::{Delta, Request};
use crate::device::batch::Batch;
use crate::device::cpu;
use crate::device::cuda::card::Card;
use crate::device::cuda::emulated::Emulated;
use crate::device::cuda::tests::{error, named_card};
use crate::device::cuda::{self, Cuda, Numbers};

type Grid<N> = Cuda<Emulated, N>;

fn on_cpu<P: cpu::Precision>(base: &Base, runs: &[Run]) -> Trainer<cpu::Cpu<P>> {
    let cpu = cpu::Cpu::<P>::new(arithmetic(base.config()), 1).unwrap();
    Runtime::new(cpu, base).unwrap().train(runs, None).unwrap()
}

/// A base on a card.
fn runtime<N: Numbers, C: Card>(base: &Base, card: C) -> Runtime<Cuda<C, N>> {
    let config = base.config();
    let cuda = Cuda::new(card, arithmetic(config), config.hidden_size, config.intermediate_size);
    Runtime::new(cuda.unwrap(), base).unwrap()
}

fn on_grid<N: Numbers>(base: &Base, runs: &[Run], order: Order) -> Trainer<Grid<N>> {
    let card = Emulated::new(N::PRECISION);
    card.conditions().lock().unwrap().order = order;
    runtime::<N, _>(base, card).train(runs, None).unwrap()
}

/// Losses and every gradient of every run, against the CPU's in f32: within `most` over all tensors of a run together,
/// and within `most_each` in each.
fn agrees<N: Numbers>(base: &Base, runs: &[Run], groups: &[usize], most: f64, most_each: f64) {
    let n_outputs: Vec<_> = runs.iter().map(|r| r.start.head.n_outputs).collect();
    let batch = [Arc::new(batch(groups, &n_outputs))];
    let mut expected = on_cpu::<cpu::F32>(base, runs);
    let mut found = on_grid::<N>(base, runs, Order::Forward);
    let losses = (found.accumulate(&batch, DROPOUT).unwrap(), expected.accumulate(&batch, DROPOUT).unwrap());
    for (found, expected) in losses.0.iter().zip(&losses.1) {
        assert!((found / expected - 1.0).abs() < most, "losses {losses:?}");
    }
    for g in 0..runs.len() {
        let (found, expected) = (found.gradients(g), expected.gradients(g));
        assert!(found.keys().eq(expected.keys()));
        for (name, found) in &found {
            let error = error(found, &expected[name]);
            assert!(error < most_each, "{name} of run {g}, {:?}: {error:.1e}", N::PRECISION);
        }
        let all = |of: &BTreeMap<String, Vec<f32>>| of.values().flatten().copied().collect::<Vec<_>>();
        let together = error(&all(&found), &all(&expected));
        assert!(together < most, "all of run {g}, {:?}: {together:.1e}", N::PRECISION);
    }
}

#[test]
fn a_step_of_three_runs_is_the_cpus() {
    for pooler in [true, false] {
        let base = base(pooler);
        let runs = [(10, 2), (20, 1), (30, 3)].map(|(seed, n)| run(&base, biases(&base), seed, n));
        agrees::<cuda::F32>(&base, &runs, &[0, 0, 1, 1, 1, 2], 1e-5, 1e-5);
    }
}

#[test]
fn gradients_of_every_weight_are_the_cpus() {
    let base = base(true);
    agrees::<cuda::F32>(&base, &[run(&base, everything(&base), 40, 2)], &[0; 6], 1e-5, 1e-5);
}

#[test]
fn sampled_gradients_are_the_cpus() {
    let base = base(true);
    let every_third = |n: usize| Request::Entries((0..n as u64).step_by(3).collect());
    let mut sampled = run(&base, everything(&base), 50, 2);
    sampled.start.changes.clear();
    sampled.requests = base.parameters().iter().map(|p| (p.name.clone(), every_third(p.len()))).collect();
    agrees::<cuda::F32>(&base, &[sampled], &[0; 6], 1e-5, 1e-5);
}

#[test]
fn bf16_and_tf32_are_close() {
    let base = base(true);
    let runs = [(10, 2), (20, 1), (30, 3)].map(|(seed, n)| run(&base, biases(&base), seed, n));
    agrees::<cuda::Tf32>(&base, &runs, &[0, 0, 1, 1, 1, 2], 2e-3, 5e-3);
    agrees::<cuda::Bf16>(&base, &runs, &[0, 0, 1, 1, 1, 2], 2e-2, 5e-2);
    agrees::<cuda::Bf16>(&base, &[run(&base, everything(&base), 40, 2)], &[0; 6], 2e-2, 5e-2);
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
fn steps_of_one_size_class_are_handed_over_once_each_in_equal_commands_and_equal_memory() {
    let base = base(true);
    let card = Emulated::new(cuda::F32::PRECISION);
    let handed_over = card.handed_over();
    let runtime = runtime::<cuda::F32, _>(&base, card);
    for (requests, micro_batches) in [(biases(&base), 1), (biases(&base), 2), (everything(&base), 1)] {
        let mut trainer = runtime.train(&[run(&base, requests, 10, 2)], None).unwrap();
        // Batches of other texts, and of fewer: the class is the same.
        let mut step = |n: usize| {
            handed_over.lock().unwrap().clear();
            let batches: Vec<_> = (0..micro_batches).map(|_| Arc::new(batch(&vec![0; n], &[2]))).collect();
            trainer.step(&batches, DROPOUT, &[Some(RULE)]).unwrap();
            (handed_over.lock().unwrap().clone(), trainer.peak_bytes())
        };
        // The first one sizes the buffers.
        step(6);
        let second = step(6);
        assert_eq!(second.0.len(), 1, "a step is handed over once");
        assert_eq!([step(5), step(4)], [second.clone(), second]);
    }
}

#[test]
fn a_batch_that_does_not_fit_is_refused_with_one_that_does_and_the_run_goes_on() {
    let base = base(true);
    let card = Emulated::new(cuda::F32::PRECISION);
    let (conditions, taken) = (card.conditions(), card.taken());
    let runtime = runtime::<cuda::F32, _>(&base, card);
    let mut trainer = runtime.train(&[run(&base, biases(&base), 10, 2)], None).unwrap();
    let batches = |groups: &[usize]| [Arc::new(batch(groups, &[2]))];
    // Room for the constants and little more.
    conditions.lock().unwrap().memory = 10 << 20;
    let refused = trainer.step(&batches(&[0; 6000]), DROPOUT, &[Some(RULE)]).unwrap_err().to_string();
    assert!(refused.contains("a batch of 6000 sequences, 53000 tokens, needs"), "{refused}");
    let fits: usize = refused.split("a batch of ").nth(2).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!((100..5000).contains(&fits), "{refused}");
    trainer.step(&batches(&vec![0; fits / 4]), DROPOUT, &[Some(RULE)]).unwrap();
    // What was not foreseen is told, too.
    let forward = || runtime.forward(&batches(&vec![0; 400])[0], &[None]);
    conditions.lock().unwrap().memory = taken.lock().unwrap().values().sum::<usize>() + (1 << 10);
    let message = forward().unwrap_err().to_string();
    assert!(message.contains("emulated grid has no memory left"), "{message}");
    conditions.lock().unwrap().memory = 1 << 30;
    forward().unwrap();
}

#[test]
fn a_task_that_does_not_fit_is_refused_when_it_is_attached() {
    let base = base(false);
    let card = Emulated::new(cuda::F32::PRECISION);
    let (conditions, taken) = (card.conditions(), card.taken());
    let runtime = runtime::<cuda::F32, _>(&base, card);
    // Its pooler has to lie on the card.
    let task = run(&base, biases(&base), 10, 2).start;
    conditions.lock().unwrap().memory = taken.lock().unwrap().values().sum::<usize>() + 100;
    let message = runtime.attach(&task).err().unwrap().to_string();
    assert!(message.contains("no memory left"), "{message}");
    conditions.lock().unwrap().memory = 1 << 30;
    let task = runtime.attach(&task).unwrap();
    let batch = Arc::new(batch(&[0; 6], &[2]));
    let found = runtime.forward(&batch, &[Some(task)]).unwrap();
    let cpu = Runtime::new(cpu::Cpu::<cpu::F32>::new(arithmetic(base.config()), 1).unwrap(), &base).unwrap();
    let task = cpu.attach(&run(&base, biases(&base), 10, 2).start).unwrap();
    let expected = cpu.forward(&batch, &[Some(task)]).unwrap();
    assert!(error(&found.concat(), &expected.concat()) < 1e-5);
}

#[test]
fn layers_that_are_computed_again_give_the_same_bits() {
    let base = base(true);
    let runs = [run(&base, biases(&base), 80, 2)];
    let batches = [Arc::new(batch(&[0; 6], &[2]))];
    let gradients = |memory_budget| {
        let card = Emulated::new(cuda::Bf16::PRECISION);
        let mut trainer = runtime::<cuda::Bf16, _>(&base, card).train(&runs, memory_budget).unwrap();
        trainer.accumulate(&batches, DROPOUT).map(|losses| (losses, trainer.gradients(0)))
    };
    let Err(refused) = gradients(Some(1)) else { panic!("a budget of one byte") };
    let refused = refused.to_string();
    let least: f64 = refused.split_once("needs ").unwrap().1.split(' ').next().unwrap().parse().unwrap();
    assert!(gradients(Some((least * 1e6).round() as usize)).unwrap() == gradients(None).unwrap());
}

/// Whole steps on a card, where the environment names one: `scripts/gpu_check.sh` does.
#[cfg(test)]
mod on_a_card {
    use super::*;
    use crate::base::config::Config;
    use crate::device::batch::{DropoutKey, Target};
    use crate::device::cuda::Gpu;

    fn on_card<N: Numbers>(ordinal: usize, base: &Base, runs: &[Run]) -> Trainer<Cuda<Gpu, N>> {
        runtime::<N, _>(base, Gpu::new(ordinal, N::PRECISION).unwrap()).train(runs, None).unwrap()
    }

    /// Sequences of lengths up to `longest` for each run that is named, as groups in that order.
    fn texts(base: &Base, runs: &[usize], each: usize, longest: usize) -> [Arc<Batch>; 1] {
        let mut batch = Batch::new();
        for (g, run) in runs.iter().enumerate() {
            for s in 0..each {
                let length = longest - (run * 7 + s * 13) % (longest / 2);
                let id = |i: usize| ((run * 31 + s * 17 + i * 7919 + 1013) % base.config().vocab_size) as u32;
                let ids: Vec<u32> = (0..length).map(id).collect();
                let key = DropoutKey { seed: 9 + *run as u64, step: 1, index: s as u32 };
                batch.push(&ids, &vec![0; length], g, key, Some(Target::Class((s % 2) as u32)));
            }
        }
        [Arc::new(batch)]
    }

    fn fresh(base: &Base, seed: u64) -> Run {
        let mut run = run(base, biases(base), seed, 2);
        run.start.changes.clear();
        run
    }

    fn base_step<N: Numbers>(ordinal: usize, base: &Base, most: f64) {
        let runs = [fresh(base, 10)];
        let batch = texts(base, &[0], 6, 128);
        let mut expected = on_cpu::<cpu::F32>(base, &runs);
        let mut found = on_card::<N>(ordinal, base, &runs);
        let losses = (found.accumulate(&batch, DROPOUT).unwrap()[0], expected.accumulate(&batch, DROPOUT).unwrap()[0]);
        let (found, expected) = (found.gradients(0), expected.gradients(0));
        let errors = expected.iter().filter(|(name, _)| !name.ends_with("key.bias"));
        let errors = errors.map(|(name, expected)| (error(&found[name], expected), name));
        let worst = errors.fold((0.0, ""), |worst, (error, name)| if error <= worst.0 { worst } else { (error, name) });
        println!("on the card: a step of BERT-base, {:?}: losses {losses:?}, worst gradient {worst:?}", N::PRECISION);
        assert!(worst.0 < most, "{worst:?}");
    }

    #[test]
    fn bias_gradients_of_bert_base_are_the_cpus() {
        let Some(ordinal) = named_card() else { return };
        let base = Base::random(Config::base(), 1);
        base_step::<cuda::F32>(ordinal, &base, 1e-4);
        base_step::<cuda::Tf32>(ordinal, &base, 2e-2);
        base_step::<cuda::Bf16>(ordinal, &base, 1e-1);
    }

    fn bits<N: Numbers>(ordinal: usize) {
        let base = Base::random(Config::minilm(), 2);
        let runs: Vec<Run> = (0..5).map(|g| fresh(&base, 10 * g)).collect();
        let all = [0, 1, 2, 3, 4];
        let together = trained(on_card::<N>(ordinal, &base, &runs), &texts(&base, &all, 8, 120), 5);
        let again = trained(on_card::<N>(ordinal, &base, &runs), &texts(&base, &all, 8, 120), 5);
        assert!(together == again, "other bits the second time, {:?}", N::PRECISION);
        for g in all {
            let alone = trained(on_card::<N>(ordinal, &base, &runs[g..=g]), &texts(&base, &[g], 8, 120), 1);
            assert!(alone[0] == together[g], "run {g} alone, {:?}", N::PRECISION);
        }
        println!("on the card: five runs, {:?}: the same bits twice, and alone as beside the others", N::PRECISION);
    }

    #[test]
    fn runs_get_the_same_bits_twice_and_alone_as_beside_others() {
        let Some(ordinal) = named_card() else { return };
        bits::<cuda::F32>(ordinal);
        bits::<cuda::Tf32>(ordinal);
        bits::<cuda::Bf16>(ordinal);
    }
}
