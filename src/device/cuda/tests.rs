//! Every op on the emulated grid against the same op of the CPU in f64, in several orders of threads; and bugs planted
//! into kernels and launches, each of which must show.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use emulated_grid::{Order, barriers, without_barrier};
use half::bf16;

use super::card::{Card, Launch, Number};
use super::emulated::{Emulated, Tamper};
use super::memory::{Mat, Stream};
use super::{Bf16, Cuda, F32, Numbers, Tf32, to_bytes};
use crate::device::DeviceName;
use crate::device::batch::{Batch, DropoutKey, Space, Target};
use crate::device::cpu::{self, Cpu, F64};
use crate::device::filled::Filled;
use crate::device::ops::{
    Activation, AdamW, Affine, Arithmetic, At, Classifier, Dropout, Loss, Norm, Ops, Site, Tables, Trained, Want,
};

impl<C: Card, N: Numbers> Filled for Cuda<C, N> {
    fn stream_of(&self, space: Space, cols: usize, values: &[f32]) -> Stream<C> {
        let stream = self.stream(space, cols);
        self.fill(&stream.wide, values, Number::F32);
        stream
    }

    fn act_of(&self, space: Space, cols: usize, values: &[f32]) -> Mat<C> {
        let act = self.act(space, cols);
        self.fill(&act, values, N::STORED);
        act
    }
}

impl<C: Card, N: Numbers> Cuda<C, N> {
    /// Writes values to the batch's rows, and zeros to those beyond.
    fn fill(&self, to: &Mat<C>, values: &[f32], number: Number) {
        assert_eq!(values.len(), to.n * to.cols);
        let mut all = values.to_vec();
        all.resize(to.rows * to.cols, 0.0);
        self.put(&to.data, &to_bytes(&all, number));
    }
}

const DROPOUT: Dropout = Dropout { hidden: 0.2, attention: 0.15, classifier: 0.3 };

/// A network's shape and what it computes.
#[derive(Clone, Copy)]
struct Shape {
    hidden: usize,
    heads: usize,
    activation: Activation,
}

const SHAPES: [Shape; 5] = [
    Shape { hidden: 64, heads: 2, activation: Activation::Gelu },
    Shape { hidden: 64, heads: 1, activation: Activation::GeluTanh },
    Shape { hidden: 16, heads: 2, activation: Activation::Relu },
    Shape { hidden: 48, heads: 2, activation: Activation::Gelu },
    Shape { hidden: 80, heads: 2, activation: Activation::Gelu },
];

impl Shape {
    fn arithmetic(self) -> Arithmetic {
        Arithmetic { n_heads: self.heads, layer_norm_eps: 1e-12, activation: self.activation }
    }

    fn on_cpu<P: cpu::Precision>(self) -> Cpu<P> {
        Cpu::new(self.arithmetic(), 1).unwrap()
    }

    fn on_grid<N: Numbers>(self, order: Order, tamper: Option<Tamper>) -> Cuda<Emulated, N> {
        let card = Emulated::new(N::PRECISION);
        *card.conditions().lock().unwrap() = super::emulated::Conditions { order, tamper, ..Default::default() };
        Cuda::new(card, self.arithmetic(), self.hidden, 2 * self.hidden).unwrap()
    }
}

/// Texts shorter and longer than a tile, in three groups; one is skipped.
fn batch() -> Arc<Batch> {
    let mut batch = Batch::new();
    for (s, (length, g)) in [(3usize, 0), (70, 0), (1, 1), (129, 3), (9, 3)].into_iter().enumerate() {
        let ids: Vec<u32> = (0..length).map(|i| ((s * 7 + i * 5 + 3) % 23) as u32).collect();
        let types: Vec<u32> = (0..length).map(|i| u32::from(i * 2 > length)).collect();
        let key = DropoutKey { seed: 0xfeed_0123_4567_89ab + g as u64, step: 3, index: s as u32 };
        let target = if g == 1 { Target::Value(0.7) } else { Target::Class((s % 2) as u32) };
        batch.push(&ids, &types, g, key, (s != 4).then_some(target));
    }
    Arc::new(batch)
}

const GROUPS: usize = 4;
/// Outputs of each group's head: one predicts a value, one has no head.
const OUTPUTS: [usize; GROUPS] = [2, 1, 0, 3];

/// Numbers around zero that bf16 holds exactly, so that precisions differ by arithmetic alone.
fn numbers(seed: u64, n: usize, scale: f32) -> Vec<f32> {
    let mut s = seed.wrapping_mul(2_862_933_555_777_941_757).wrapping_add(3_037_000_493);
    let mut next = || {
        s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bf16::from_f32(((s >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 3.4 * scale).to_f32()
    };
    (0..n).map(|_| next()).collect()
}

/// What ops gave, by name.
type Results = Vec<(String, Vec<f32>)>;

/// Runs ops one after the other, each on fresh inputs, and keeps what they give.
struct Exercise<'d, D: Filled> {
    d: &'d mut D,
    h: usize,
    seed: u64,
    results: Results,
}

impl<D: Filled + Ops> Exercise<'_, D> {
    fn rows(&self, space: Space) -> usize {
        let batch = batch();
        match space {
            Space::Tokens => batch.n_tokens(),
            Space::Firsts => batch.n_sequences(),
        }
    }

    fn numbers(&mut self, n: usize, scale: f32) -> Vec<f32> {
        self.seed += 1;
        numbers(self.seed, n, scale)
    }

    fn stream(&mut self, space: Space, cols: usize) -> D::Stream {
        let values = self.numbers(self.rows(space) * cols, 1.0);
        self.d.stream_of(space, cols, &values)
    }

    fn act(&mut self, space: Space, cols: usize) -> D::Act {
        let values = self.numbers(self.rows(space) * cols, 1.0);
        self.d.act_of(space, cols, &values)
    }

    fn params(&mut self, rows: usize, n: usize) -> D::Params {
        let values = self.numbers(rows * n, 0.5);
        self.d.params(rows, values)
    }

    fn weight(&mut self, n_out: usize, n_in: usize) -> D::Weight {
        let values = self.numbers(n_out * n_in, 0.2);
        self.d.weight(n_out, n_in, values)
    }

    fn sums(&mut self, n: usize) -> D::Params {
        self.params(GROUPS, n)
    }

    fn keep(&mut self, name: &str, values: Vec<f32>) {
        self.results.push((name.into(), values));
    }

    fn keep_stream(&mut self, name: &str, x: &D::Stream) {
        let values = self.d.read_stream(x);
        self.keep(name, values);
    }

    fn keep_act(&mut self, name: &str, x: &D::Act) {
        let values = self.d.read_act(x);
        self.keep(name, values);
    }

    fn keep_rows(&mut self, name: &str, x: &D::Rows) {
        let values = self.d.read_rows(x).into_iter().map(|x| x as f32).collect();
        self.keep(name, values);
    }

    fn keep_params(&mut self, name: &str, x: &D::Params) {
        let values = self.d.read_params(x);
        self.keep(name, values);
    }

    fn rows_and_products(&mut self) {
        let (h, i) = (self.h, 2 * self.h);
        let x = self.stream(Space::Tokens, h);
        let y = self.d.copy(&x);
        self.keep_stream("copy", &y);
        let y = self.d.firsts(x);
        self.keep_stream("firsts", &y);
        let y = self.d.spread(y);
        self.keep_stream("spread", &y);
        for space in [Space::Tokens, Space::Firsts] {
            let (w, b, x) = (self.weight(i, h), self.params(GROUPS, i), self.stream(space, h));
            let y = self.d.linear(&x, &w, &b);
            self.keep_act("linear", &y);
            let b = self.params(1, i);
            let y = self.d.linear(&x, &w, &b);
            self.keep_act("linear, one bias", &y);
            let dy = self.act(space, i);
            let dx = self.d.linear_back(dy, &w, x);
            self.keep_stream("linear_back", &dx);
            let x = self.act(space, h);
            let y = self.d.product(x, &w);
            self.keep_stream("product", &y);
            let dy = self.act(space, i);
            let dx = self.d.product_back(dy, &w);
            self.keep_act("product_back", &dx);
            let (wi, bi, wo, x) = (self.weight(i, h), self.params(GROUPS, i), self.weight(h, i), self.stream(space, h));
            let (u, y) = self.d.feed_forward(&x, &wi, &bi, &wo);
            self.keep_act("feed_forward u", &u);
            self.keep_stream("feed_forward y", &y);
            let (dy, u, mut dbi) = (self.act(space, h), self.act(space, i), self.sums(i));
            let du = self.d.feed_forward_back(dy, &wo, u, Some(&mut dbi));
            self.keep_act("feed_forward_back", &du);
            self.keep_params("feed_forward_back dbi", &dbi);
            let u = self.act(space, i);
            let f = self.d.activate(&u);
            self.keep_act("activate", &f);
        }
    }

    fn attention(&mut self) {
        let h = self.h;
        let site = Site { layer: 1, at: At::Probabilities };
        for space in [Space::Tokens, Space::Firsts] {
            let (q, k, v) = (self.act(space, h), self.act(Space::Tokens, h), self.act(Space::Tokens, h));
            let (o, lse) = self.d.attention(&q, &k, &v, site);
            self.keep_act("attention", &o);
            self.keep_rows("attention lse", &lse);
            let (d_o, mut dbq, mut dbv) = (self.act(space, h), self.sums(h), self.sums(h));
            let (dq, dk, dv) = self.d.attention_back(d_o, (q, k, v), lse, site, Some(&mut dbq), Some(&mut dbv));
            self.keep_act("attention_back dq", &dq);
            self.keep_act("attention_back dk", &dk);
            self.keep_act("attention_back dv", &dv);
            self.keep_params("attention_back dbq", &dbq);
            self.keep_params("attention_back dbv", &dbv);
        }
    }

    fn norms(&mut self) {
        let h = self.h;
        for space in [Space::Tokens, Space::Firsts] {
            let site = Site { layer: 2, at: At::Output };
            let (x, a, b) = (self.stream(space, h), self.stream(space, h), self.params(GROUPS, h));
            let (gamma, beta) = (self.params(1, h), self.params(GROUPS, h));
            let ln = || Affine { gamma: &gamma, beta: &beta };
            let (y, n) = self.d.add_norm(x, a, &b, ln(), site);
            self.keep_stream("add_norm", &y);
            self.keep_act("add_norm x^", &n.x_hat);
            self.keep_rows("add_norm 1/sigma", &n.r_sigma);
            let again = self.d.renorm(&n, ln(), Some(site));
            self.keep_act("renorm", &again);
            let (dh, mut sums) = (self.stream(space, h), [self.sums(h), self.sums(h), self.sums(h)]);
            let [db, dgamma, dbeta] = &mut sums;
            let (dz, da) = self.d.add_norm_back(dh, n, &gamma, site, Some(db), Some(dgamma), Some(dbeta));
            self.keep_stream("add_norm_back dz", &dz);
            self.keep_act("add_norm_back da", &da);
            for (name, sums) in ["db", "dgamma", "dbeta"].iter().zip(&sums) {
                self.keep_params(&format!("add_norm_back {name}"), sums);
            }
        }
        let table = |of: &mut Self, rows: usize| {
            let values = of.numbers(rows * h, 1.0);
            of.d.table(h, values)
        };
        let tables = [table(self, 23), table(self, 130), table(self, 2)];
        let [word, position, token_type] = &tables;
        let (gamma, beta) = (self.params(1, h), self.params(GROUPS, h));
        let (x, n) = self.d.embed(Tables { word, position, token_type }, Affine { gamma: &gamma, beta: &beta });
        self.keep_stream("embed", &x);
        self.keep_act("embed x^", &n.x_hat);
        let (mut dgamma, mut dbeta) = (self.sums(h), self.sums(h));
        let every_fifth: Vec<u64> = (0..130 * h as u64).step_by(5).collect();
        let mut wants = Tables {
            word: Want::Full(self.params(1, 23 * h)),
            position: Want::Sampled { entries: self.d.index(&every_fifth), values: self.params(1, every_fifth.len()) },
            token_type: Want::Nothing,
        };
        let dx = self.stream(Space::Tokens, h);
        self.d.embed_back(dx, Some(n), &gamma, Some(&mut wants), Some(&mut dgamma), Some(&mut dbeta));
        self.keep_params("embed_back dgamma", &dgamma);
        self.keep_params("embed_back dbeta", &dbeta);
        for want in [wants.word, wants.position] {
            match want {
                Want::Nothing => {}
                Want::Full(sums) | Want::Sampled { values: sums, .. } => self.keep_params("embed_back table", &sums),
            }
        }
    }

    fn weights(&mut self) {
        let (h, i) = (self.h, 2 * self.h);
        for (over_dy, over_x) in
            [(Space::Tokens, Space::Tokens), (Space::Firsts, Space::Tokens), (Space::Firsts, Space::Firsts)]
        {
            let (dy, x) = (self.act(over_dy, i), self.act(over_x, h));
            let mut want = Want::Full(self.params(1, i * h));
            self.d.weight_grad(&dy, &x, &mut want);
            let every_third: Vec<u64> = (0..(i * h) as u64).step_by(3).collect();
            let mut some =
                Want::Sampled { entries: self.d.index(&every_third), values: self.params(1, every_third.len()) };
            self.d.weight_grad(&dy, &x, &mut some);
            for (name, want) in [("weight_grad", want), ("weight_grad, sampled", some)] {
                if let Want::Full(sums) | Want::Sampled { values: sums, .. } = want {
                    self.keep_params(name, &sums);
                }
            }
        }
        let (base, delta, at) = (self.params(1, 40), self.params(1, 40), (0..40).map(|i| i * 7).collect::<Vec<u64>>());
        let at = self.d.index(&at);
        let mut into = self.params(1, 280);
        self.d.sum(&base, &delta, Some(&at), &mut into);
        self.keep_params("sum of entries", &into);
        let mut picked = self.params(1, 40);
        self.d.gather(&into, &at, &mut picked);
        self.keep_params("gather", &picked);
        let mut w = self.weight(20, 16);
        self.d.write_weight(&base, &delta, 0, Some(&at), &mut w);
        let (whole_base, whole_delta) = (self.params(1, 24 * 16), self.params(GROUPS, 24 * 16));
        let mut whole = self.weight(24, 16);
        self.d.write_weight(&whole_base, &whole_delta, 2, None, &mut whole);
        let (x, none) = (self.stream(Space::Firsts, 16), self.d.zeros(1, 24));
        let y = self.d.linear(&x, &whole, &none);
        self.keep_act("write_weight", &y);
        let none = self.d.zeros(1, 20);
        let y = self.d.linear(&x, &w, &none);
        self.keep_act("write_weight of entries", &y);
    }

    fn heads(&mut self) {
        let h = self.h;
        for own in [false, true] {
            let w: Vec<D::Weight> = (0..if own { GROUPS } else { 1 }).map(|_| self.weight(h, h)).collect();
            let w: Vec<&D::Weight> = w.iter().collect();
            let (x, b) = (self.stream(Space::Firsts, h), self.params(GROUPS, h));
            let pooled = self.d.pool(&x, &w, &b);
            self.keep_act("pool", &pooled);
            let (dp, mut db) = (self.stream(Space::Firsts, h), self.sums(h));
            let mut want = Want::Full(self.params(if own { GROUPS } else { 1 }, h * h));
            let dx = self.d.pool_back(dp, pooled, Some(&x), &w, &mut want, Some(&mut db));
            self.keep_stream("pool_back", &dx);
            self.keep_params("pool_back db", &db);
            if let Want::Full(sums) = want {
                self.keep_params("pool_back dw", &sums);
            }
        }
        // Padded to the widest, as where they train.
        let widest = 3;
        let c = Classifier {
            weight: self.params(GROUPS, widest * h),
            bias: self.params(GROUPS, widest),
            first: (0..GROUPS).map(|g| g * widest).collect(),
            n_outputs: OUTPUTS.to_vec(),
        };
        let pooled = self.act(Space::Firsts, h);
        let logits = self.d.classify(&pooled, &c);
        self.keep_rows("classify", &logits);
        let loss: Vec<Loss> = (0..GROUPS).map(|g| Loss { scale: 0.25 * (g + 1) as f32 }).collect();
        let (losses, dlogits) = self.d.loss(logits, &OUTPUTS, &loss);
        self.keep_rows("loss", &losses);
        let (mut dw, mut db) = (self.sums(widest * h), self.sums(widest));
        let dp = self.d.classify_back(dlogits, &pooled, &c, &mut dw, &mut db);
        self.keep_stream("classify_back", &dp);
        self.keep_params("classify_back dw", &dw);
        self.keep_params("classify_back db", &db);
    }

    fn optimizer(&mut self) {
        let rule = |g: usize| AdamW {
            learning_rate: 0.01 * (g + 1) as f64,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-6,
            weight_decay: 0.1,
            step: 3 + g as u64,
            max_grad_norm: if g == 0 { f64::INFINITY } else { 0.5 },
        };
        let rules: Vec<Option<AdamW>> = (0..GROUPS).map(|g| (g != 2).then(|| rule(g))).collect();
        let mut squares = self.d.zeros(GROUPS, 1);
        // More numbers than a chunk, and fewer.
        let sizes = [5000, 96];
        let mut trained = Vec::new();
        for n in sizes {
            let v = self.numbers(GROUPS * n, 0.5).iter().map(|x| x * x).collect();
            trained.push((
                Trained {
                    base: self.params(1, n),
                    delta: self.params(GROUPS, n),
                    m: self.params(GROUPS, n),
                    v: self.d.params(GROUPS, v),
                },
                self.params(GROUPS, n),
            ));
        }
        for (_, grad) in &trained {
            self.d.add_squares(grad, &rules, &mut squares);
        }
        self.keep_params("add_squares", &squares);
        let mut cleared = [self.params(GROUPS, 1500), self.params(1, 7)];
        cleared.iter_mut().for_each(|p| self.d.clear(p));
        cleared.iter().for_each(|p| self.keep_params("clear", p));
        for (p, grad) in &mut trained {
            self.d.adamw(p, grad, &squares, &rules);
        }
        for (p, _) in &trained {
            let mut into = self.d.zeros(GROUPS, self.d.read_params(&p.base).len());
            self.d.sum(&p.base, &p.delta, None, &mut into);
            for (name, values) in [("delta", &p.delta), ("m", &p.m), ("v", &p.v), ("in use", &into)] {
                self.keep_params(&format!("adamw {name}"), values);
            }
        }
    }

    fn branches(&mut self) {
        let h = self.h;
        let (x, mut other) = (self.stream(Space::Tokens, h), Batch::new());
        let before = batch();
        let from = [1, 1, 4];
        for (g, s) in from.into_iter().enumerate() {
            let of = before.tokens_of(s);
            other.push(&before.ids()[of.clone()], &before.type_ids()[of], g, DropoutKey::default(), None);
        }
        let y = self.d.branch(x, Arc::new(other), &from);
        self.keep_stream("branch", &y);
    }
}

/// The ops in parts, each with a batch of its own.
const PARTS: [&str; 7] = ["norms", "products", "attention", "weights", "heads", "optimizer", "branches"];

/// Runs some parts on a device, for a network `h` wide.
fn exercise<D: Filled + Ops>(d: &mut D, h: usize, parts: &[&str]) -> Result<Results, String> {
    let mut results = Vec::new();
    for part in parts {
        d.begin(batch(), DROPOUT);
        let mut e = Exercise { d, h, seed: 0, results };
        match *part {
            "norms" => e.norms(),
            "products" => e.rows_and_products(),
            "attention" => e.attention(),
            "weights" => e.weights(),
            "heads" => e.heads(),
            "optimizer" => e.optimizer(),
            "branches" => e.branches(),
            part => panic!("no part {part}"),
        }
        results = e.results;
        d.finish().map_err(|e| e.to_string())?;
    }
    Ok(results)
}

/// The card that the environment names for tests.
#[cfg(test)]
pub(crate) fn named_card() -> Option<usize> {
    let device = std::env::var("BITFIT_TEST_DEVICE").ok().map(|name| name.parse::<DeviceName>().unwrap());
    match device {
        Some(DeviceName::Cuda(ordinal)) => Some(ordinal),
        _ => {
            println!("skipped: BITFIT_TEST_DEVICE names no GPU");
            None
        }
    }
}

/// The norm of the difference over the norm.
pub(crate) fn error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let off = norm(&mut found.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    // What is no number is off by anything.
    if off == 0.0 { 0.0 } else { off / norm(&mut expected.iter().map(|x| f64::from(*x))).max(1e-30) }
}

fn agrees<N: Numbers>(shape: Shape, parts: &[&str], most: f64) {
    let expected = exercise(&mut shape.on_cpu::<F64>(), shape.hidden, parts).unwrap();
    let run = |order| exercise(&mut shape.on_grid::<N>(order, None), shape.hidden, parts).unwrap();
    let found = run(Order::Forward);
    assert_eq!(found.len(), expected.len());
    for ((name, found), (_, expected)) in found.iter().zip(&expected) {
        let error = error(found, expected);
        assert!(error <= most, "{name}, {:?}, {} wide: {error:.1e}", N::PRECISION, shape.hidden);
    }
    for order in [Order::Backward, Order::Shuffled(1), Order::Shuffled(2)] {
        for ((name, first), (_, found)) in found.iter().zip(run(order)) {
            let same = first.iter().zip(&found).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{name}, {:?}: other bits by {order:?}", N::PRECISION);
        }
    }
}

#[test]
fn every_op_is_the_cpus_in_f64_whatever_the_order_of_threads() {
    for shape in SHAPES {
        agrees::<F32>(shape, &PARTS, 1e-5);
        agrees::<Tf32>(shape, &PARTS, 2e-3);
        agrees::<Bf16>(shape, &PARTS, 2e-2);
    }
}

#[test]
fn rows_of_every_width_are_normalised() {
    for hidden in [8, 256, 264, 512, 520, 1024, 1032, 2048] {
        let shape = Shape { hidden, heads: hidden / 8, activation: Activation::Gelu };
        agrees::<F32>(shape, &PARTS[..1], 1e-5);
        agrees::<Bf16>(shape, &PARTS[..1], 2e-2);
    }
}

#[test]
fn masks_are_the_cpus_to_the_bit() {
    // M * (0 x^ + 1) is the mask.
    let h = 64;
    fn mask<D: Filled + Ops>(d: &mut D, h: usize) -> Vec<f32> {
        d.begin(batch(), DROPOUT);
        let rows = batch().n_tokens();
        let x = d.stream_of(Space::Tokens, h, &numbers(1, rows * h, 1.0));
        let a = d.stream_of(Space::Tokens, h, &numbers(2, rows * h, 1.0));
        let (zeros, ones) = (d.zeros(1, h), d.params(1, vec![1.0; h]));
        let ln = || Affine { gamma: &zeros, beta: &ones };
        let (_, n): (_, Norm<D>) = d.add_norm(x, a, &zeros, ln(), Site { layer: 0, at: At::Output });
        let mask = d.renorm(&n, ln(), Some(Site { layer: 11, at: At::AttentionOutput }));
        let values = d.read_act(&mask);
        d.finish().unwrap();
        values
    }
    let shape = SHAPES[0];
    let expected = mask(&mut shape.on_cpu::<cpu::F32>(), h);
    let dropped = expected.iter().filter(|m| **m == 0.0).count() as f64 / expected.len() as f64;
    assert!((dropped - 0.2).abs() < 0.02, "{dropped}");
    assert_eq!(mask(&mut shape.on_grid::<F32>(Order::Forward, None), h), expected);

    // With equal scores, and values that are unit vectors for some of the keys, attention's output is the mask of these
    // keys, divided by the length.
    fn of_attention<D: Filled + Ops>(d: &mut D, heads: usize) -> Vec<bool> {
        const H: usize = 64;
        let width = H / heads;
        let lengths = [1, 9, 70, 129];
        let mut batch = Batch::new();
        for (s, length) in lengths.into_iter().enumerate() {
            let key = DropoutKey { seed: 5 << s, step: 7, index: s as u32 };
            batch.push(&vec![1; length], &vec![0; length], 0, key, None);
        }
        let batch = Arc::new(batch);
        let mut masks = Vec::new();
        for first in (0..129).step_by(width) {
            d.begin(batch.clone(), DROPOUT);
            let zeros = || d.act_of(Space::Tokens, H, &vec![0.0; batch.n_tokens() * H]);
            let mut unit = vec![0.0; batch.n_tokens() * H];
            for rows in (0..lengths.len()).map(|s| batch.tokens_of(s)) {
                for (j, row) in rows.skip(first).take(width).enumerate() {
                    (0..heads).for_each(|head| unit[row * H + head * width + j] = 1.0);
                }
            }
            let (q, k, v) = (zeros(), zeros(), d.act_of(Space::Tokens, H, &unit));
            let (o, _) = d.attention(&q, &k, &v, Site { layer: 3, at: At::Probabilities });
            masks.extend(d.read_act(&o).iter().map(|o| *o != 0.0));
            d.finish().unwrap();
        }
        masks
    }
    for shape in &SHAPES[..2] {
        let expected = of_attention(&mut shape.on_cpu::<cpu::F32>(), shape.heads);
        assert!(expected.iter().any(|kept| *kept));
        assert!(of_attention(&mut shape.on_grid::<F32>(Order::Forward, None), shape.heads) == expected);
        assert!(of_attention(&mut shape.on_grid::<Tf32>(Order::Forward, None), shape.heads) == expected);
        assert!(of_attention(&mut shape.on_grid::<Bf16>(Order::Forward, None), shape.heads) == expected);
    }
}

/// Whether a bug shows: results differ, or a launch fails.
fn shows(expected: &Results, found: &Result<Results, String>) -> bool {
    let Ok(found) = found else { return true };
    let bits = |of: &Results| of.iter().flat_map(|(_, values)| values.iter().map(|x| x.to_bits())).collect::<Vec<_>>();
    bits(found) != bits(expected)
}

#[test]
fn a_barrier_that_is_missing_shows() {
    let shape = SHAPES[2];
    let run = |part: &'static str, order| exercise(&mut shape.on_grid::<F32>(order, None), shape.hidden, &[part]);
    let expected: Vec<Results> = PARTS.iter().map(|part| run(part, Order::Forward).unwrap()).collect();
    let own = barriers().into_iter().filter(|barrier| barrier.file.ends_with(".cu"));
    let own: Vec<_> = own.filter(|barrier| super::compiler::SOURCES.iter().any(|(f, _)| *f == barrier.file)).collect();
    let text = super::compiler::SOURCES.iter().filter(|(file, _)| file.ends_with(".cu")).map(|(_, text)| text);
    let written = text.flat_map(|text| text.lines()).filter(|line| line.trim_start().starts_with("__sync")).count();
    assert_eq!(own.len(), written, "every barrier is passed");
    for barrier in own {
        let of_part = |(part, expected): (&&'static str, &Results)| {
            let orders = [Order::Forward, Order::Backward, Order::Shuffled(5)];
            // A part is named as the file whose kernels it is mostly made of, where these have barriers.
            let parts = PARTS.contains(&barrier.file.trim_end_matches(".cu"));
            let other = parts && barrier.file.trim_end_matches(".cu") != *part;
            !other && orders.into_iter().any(|order| shows(expected, &without_barrier(&barrier, || run(part, order))))
        };
        assert!(PARTS.iter().zip(&expected).any(of_part), "nothing shows that {barrier} is missing");
    }
}

/// What a planted bug is to change: `KERNEL` is read by the function that changes it.
static KERNEL: Mutex<&str> = Mutex::new("");

#[test]
fn arguments_in_another_order_and_smaller_grids_show() {
    let mut launched = planted::<F32>(SHAPES[2]);
    launched.extend(planted::<Bf16>(SHAPES[1]));
    let known = emulated_grid::kernels(emulated_grid::Variant::F32).into_iter().map(|kernel| kernel.name);
    // Rows of other widths have a test of their own.
    let wide = |name: &str| {
        let of_rows = ["add_norm_", "norm_back_", "embed_"].iter().find_map(|of| name.strip_prefix(of));
        of_rows.is_some_and(|width| ["2", "4", "8"].contains(&width))
    };
    let missed: Vec<_> = known.filter(|name| !launched.contains(name.as_str()) && !wide(name)).collect();
    assert!(missed.is_empty(), "no op launches {missed:?}");
}

/// Plants bugs into the launches of every kernel of a shape; gives which were launched.
fn planted<N: Numbers>(shape: Shape) -> BTreeSet<&'static str> {
    static LAUNCHED: Mutex<BTreeMap<&str, [u32; 3]>> = Mutex::new(BTreeMap::new());
    let run =
        |part: &'static str, tamper| exercise(&mut shape.on_grid::<N>(Order::Forward, tamper), shape.hidden, &[part]);
    // Each kernel in the first part that launches it.
    let mut all: BTreeMap<&str, ([u32; 3], &str)> = BTreeMap::new();
    let mut expected = BTreeMap::new();
    for part in PARTS {
        LAUNCHED.lock().unwrap().clear();
        let results = run(
            part,
            Some(|launch, _| {
                LAUNCHED.lock().unwrap().entry(launch.kernel).or_insert(launch.grid);
            }),
        );
        expected.insert(part, results.unwrap());
        for (kernel, grid) in LAUNCHED.lock().unwrap().iter() {
            all.entry(kernel).or_insert((*grid, part));
        }
    }
    let swap: Tamper = |launch: &mut Launch, args: &mut Vec<u64>| {
        if launch.kernel == *KERNEL.lock().unwrap() {
            // The last two addresses beside each other: the first two of a product may be exchanged.
            let address = |i: usize| args[i] > u64::from(u32::MAX);
            let at = (1..args.len()).rev().find(|i| address(*i) && address(*i - 1) && args[*i] != args[*i - 1]);
            let at = at.expect("a kernel has two addresses");
            args.swap(at - 1, at);
        }
    };
    let shrink: Tamper = |launch: &mut Launch, _: &mut Vec<u64>| {
        if launch.kernel == *KERNEL.lock().unwrap() {
            let longest = (0..3).max_by_key(|axis| launch.grid[*axis]).unwrap();
            launch.grid[longest] = 1;
        }
    };
    for (kernel, (grid, part)) in &all {
        *KERNEL.lock().unwrap() = kernel;
        let expected = &expected[part];
        assert!(shows(expected, &run(part, Some(swap))), "nothing shows that {kernel} got other arguments");
        if *grid != [1, 1, 1] {
            assert!(shows(expected, &run(part, Some(shrink))), "nothing shows that {kernel} has a grid that is cut");
        }
    }
    all.into_keys().collect()
}

/// The same on a card, where the environment names one: `scripts/gpu_check.sh` does.
#[cfg(test)]
mod on_a_card {
    use super::*;
    use crate::device::cuda::Gpu;

    fn agrees<N: Numbers>(ordinal: usize, shape: Shape, parts: &[&str], most: f64) {
        let expected = exercise(&mut shape.on_cpu::<F64>(), shape.hidden, parts).unwrap();
        let card = Gpu::new(ordinal, N::PRECISION).unwrap();
        let mut cuda = Cuda::<_, N>::new(card, shape.arithmetic(), shape.hidden, 2 * shape.hidden).unwrap();
        let found = exercise(&mut cuda, shape.hidden, parts).unwrap();
        let again = exercise(&mut cuda, shape.hidden, parts).unwrap();
        assert!(!shows(&found, &Ok(again)), "other bits the second time, {:?}", N::PRECISION);
        let errors =
            found.iter().zip(&expected).map(|((name, found), (_, expected))| (error(found, expected), &name[..]));
        let worst = errors.fold((0.0, ""), |worst, (error, name)| if error <= worst.0 { worst } else { (error, name) });
        let (hidden, ops) = (shape.hidden, found.len());
        println!("on the card: {ops} results, {:?}, {hidden} wide: worst {:.1e}, {}", N::PRECISION, worst.0, worst.1);
        for ((name, found), (_, expected)) in found.iter().zip(&expected) {
            let error = error(found, expected);
            assert!(error <= most, "{name}, {:?}, {hidden} wide: {error:.1e}", N::PRECISION);
        }
    }

    #[test]
    fn every_op_is_the_cpus_in_f64() {
        let Some(ordinal) = named_card() else { return };
        let tiny = std::env::var_os("BITFIT_TEST_TINY").is_some();
        for shape in if tiny { &SHAPES[1..3] } else { &SHAPES[..] } {
            agrees::<F32>(ordinal, *shape, &PARTS, 1e-5);
            agrees::<Tf32>(ordinal, *shape, &PARTS, 2e-3);
            agrees::<Bf16>(ordinal, *shape, &PARTS, 2e-2);
        }
        for hidden in if tiny { &[264][..] } else { &[8, 256, 264, 512, 520, 1024, 1032, 2048][..] } {
            let shape = Shape { hidden: *hidden, heads: hidden / 8, activation: Activation::Gelu };
            agrees::<F32>(ordinal, shape, &PARTS[..1], 1e-5);
            agrees::<Bf16>(ordinal, shape, &PARTS[..1], 2e-2);
        }
    }
}
