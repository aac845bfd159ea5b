//! Where weights train, and the optimizer's arithmetic.

use std::collections::BTreeMap;

use super::card::{Address, Card, Number};
use super::memory::{Buffer, Index, Mat, Stream, Vectors};
use super::queue::{Numbers as Vector, Step, Sum, args};
use super::{Cuda, Numbers, bytes_of};
use crate::device::batch::Space;
use crate::device::ops::{AdamW, Trained, Want};

/// Threads of a block in `weights.cu`.
const WEIGHT_THREADS: usize = 128;
/// Rows and columns of a block that transposes.
const SQUARE: usize = 32;

impl<C: Card, N: Numbers> Cuda<C, N> {
    /// Bytes of a number as activations are stored.
    pub(super) const fn stored_bytes() -> u64 {
        bytes_of(N::STORED) as u64
    }

    /// dW = dy' x of the entries asked for, dy (rows, out) and x (rows, in); `g` is whose weight it is.
    pub(super) fn grad_of(
        &self,
        rows: usize,
        ((dy, n_out), (x, n_in)): ((Address, usize), (Address, usize)),
        number: Number,
        g: usize,
        want: &mut Want<Self>,
    ) {
        match want {
            Want::Nothing => {}
            Want::Full(sums) => {
                let precision = if number == N::STORED { N::PRECISION } else { Self::FULL_WIDTH };
                let shape = (n_out, n_in, rows);
                self.multiply(shape, precision, (dy, true), (x, false), sums.of(g), Number::F32, true);
            }
            Want::Sampled { entries, values } => {
                // Both sides transposed, so that an entry is one dot product over rows that lie side by side.
                let (dy, x) = (self.transposed(dy, rows, n_out, number), self.transposed(x, rows, n_in, number));
                let args = args![dy.at(), x.at(), rows, entries.data.at(), n_in, values.at(), entries.n];
                let grid = [entries.n.div_ceil(WEIGHT_THREADS / 32), 1, 1];
                self.launch("sampled_products", grid, WEIGHT_THREADS as u32, args);
            }
        }
    }

    fn transposed(&self, from: Address, rows: usize, columns: usize, number: Number) -> Buffer<C> {
        let to = self.take(rows * columns * size_of::<f32>());
        let kernel = if number == Number::F32 { "transpose_stream" } else { "transpose_act" };
        let grid = [columns.div_ceil(SQUARE), rows.div_ceil(SQUARE), 1];
        self.launch(kernel, grid, 256, args![from, to.at(), rows, columns]);
        to
    }

    pub(super) fn weight_gradient(&self, dy: &Mat<C>, x: &Mat<C>, want: &mut Want<Self>) {
        let first;
        let x = if dy.space == Space::Firsts && x.space == Space::Tokens {
            first = self.first_rows(x);
            &first
        } else {
            x
        };
        self.grad_of(dy.rows, ((dy.at(), dy.cols), (x.at(), x.cols)), N::STORED, 0, want);
    }

    /// The rows of first tokens.
    pub(super) fn first_rows(&self, x: &Mat<C>) -> Mat<C> {
        let first = self.act(Space::Firsts, x.cols);
        let args = args![x.at(), first.at(), self.lists().first_rows, x.cols];
        self.launch("gather_act", [first.rows, 1, 1], 128, args);
        first
    }

    /// Adds row `i` of dz to row `to[i]` of a table's gradient, in order of the rows.
    pub(super) fn scatter_rows(&self, dz: &Stream<C>, to: &[u32], want: &mut Want<Self>) {
        if matches!(want, Want::Nothing) {
            return;
        }
        let mut readers: BTreeMap<u32, Vec<i32>> = BTreeMap::new();
        for (i, row) in to.iter().enumerate() {
            readers.entry(*row).or_default().push(i as i32);
        }
        let order: Vec<i32> = readers.values().flatten().copied().collect();
        let mut first = 0;
        let of_row = |(row, of): (&u32, &Vec<i32>)| {
            let from = first;
            first += of.len() as i32;
            [*row as i32, from, first, 0]
        };
        let lists: Vec<[i32; 4]> = readers.iter().map(of_row).collect();
        // As long as the size class: the launch is the same for every batch of it.
        let rows = dz.wide.rows;
        let (lists, n_lists, order) = {
            let count = [lists.len() as i32];
            let padded = |list: &[u8], bytes: usize| {
                let mut all = list.to_vec();
                all.resize(bytes, 0);
                all
            };
            let (lists, order) =
                (padded(bytemuck::cast_slice(&lists), rows * 16), padded(bytemuck::cast_slice(&order), rows * 4));
            let mut queue = self.queue();
            queue.reserve(lists.len() + order.len() + 64);
            (queue.constants(&lists), queue.constants(bytemuck::cast_slice(&count)), queue.constants(&order))
        };
        let (dz, n) = (dz.wide.at(), dz.wide.cols);
        match want {
            Want::Nothing => {}
            Want::Full(sums) => {
                let args = args![dz, lists, n_lists, order, sums.at(), n];
                self.launch("scatter_rows", [rows, 1, 1], WEIGHT_THREADS as u32, args);
            }
            Want::Sampled { entries, values } => {
                let args = args![dz, lists, n_lists, order, entries.data.at(), values.at(), entries.n, n];
                let grid = [entries.n.div_ceil(WEIGHT_THREADS), 1, 1];
                self.launch("scatter_entries", grid, WEIGHT_THREADS as u32, args);
            }
        }
    }

    pub(super) fn squares(&self, grad: &Vectors<C>, rules: &[Option<AdamW>], sums: &mut Vectors<C>) {
        for (g, _) in rules.iter().enumerate().filter(|(_, rule)| rule.is_some()) {
            let gradient = Vector { at: grad.of(g), n: grad.n as u64 };
            self.queue().add_square(sums.at(), sums.rows, g, gradient);
        }
    }

    pub(super) fn step_of(
        &self,
        p: &mut Trained<Self>,
        grad: &Vectors<C>,
        squares: &Vectors<C>,
        rules: &[Option<AdamW>],
    ) {
        for (g, rule) in rules.iter().enumerate() {
            let Some(rule) = rule else { continue };
            let (rate, root) = rule.corrections();
            self.queue().add_step(Step {
                base: p.base.of(g),
                gradient: grad.of(g),
                squares: squares.at() + (g * size_of::<f32>()) as u64,
                delta: p.delta.of(g),
                m: p.m.of(g),
                v: p.v.of(g),
                n: p.delta.n as u64,
                max_norm: rule.max_grad_norm,
                // In f64, as PyTorch: in f32 the differences lose half of their digits.
                b1: rule.beta1 as f32,
                rest1: (1.0 - rule.beta1) as f32,
                b2: rule.beta2 as f32,
                rest2: (1.0 - rule.beta2) as f32,
                rate: rate as f32,
                root: root as f32,
                decay: (rule.learning_rate * rule.weight_decay) as f32,
                epsilon: rule.epsilon as f32,
            });
        }
    }

    pub(super) fn put_in_use(
        &self,
        base: &Vectors<C>,
        delta: &Vectors<C>,
        at: Option<&Index<C>>,
        into: &mut Vectors<C>,
    ) {
        for g in 0..delta.rows {
            let at = at.map_or(0, |at| at.data.at());
            let sum = Sum { base: base.of(g), delta: delta.of(g), at, into: into.of(g), n: delta.n as u64 };
            self.queue().add_sum(sum);
        }
    }

    /// into = base + delta, stored as weights are; or the entries at some positions.
    pub(super) fn write_stored(
        &self,
        base: Address,
        delta: Address,
        n: usize,
        at: Option<&Index<C>>,
        into: &Buffer<C>,
    ) {
        let at = at.map_or(0, |at| at.data.at());
        self.each_number("write_weight", n, &[base, delta, at, into.at()]);
    }
}
