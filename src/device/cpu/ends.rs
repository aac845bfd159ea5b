//! The two ends of the network: embeddings, and pooler, classifier and loss. The second has a row a sequence, so it is
//! written for clarity: its time is nothing beside the layers'.

use std::collections::HashMap;

use super::buffer::{Mat, Vectors};
use super::precision::{Precision, Stored};
use super::product::layout::Layout;
use super::product::panels::Rows;
use super::real::{Real, dot};
use super::tables::Table;
use super::weights::Weight;
use super::{Act, Cpu, Stream};
use crate::device::batch::{Space, Target};
use crate::device::ops::{Affine, Classifier, Loss, Norm, Site, Sum, Tables, Want};

impl<P: Precision> Cpu<P> {
    pub(super) fn embed_forward(&self, tables: Tables<&P::Table>, ln: Affine<Self>) -> (Stream<P>, Norm<Self>) {
        let (ids, types) = (self.batch.ids(), self.batch.type_ids());
        self.norm_embeddings(
            tables.word.width(),
            ln,
            Site::EMBEDDINGS,
            #[inline(always)]
            |i, row, z| {
                z.fill(P::Real::ZERO);
                tables.word.add_row(ids[i] as usize, z);
                tables.position.add_row(row.position, z);
                tables.token_type.add_row(types[i] as usize, z);
            },
        )
    }

    pub(super) fn embed_backward(
        &self,
        dx: Stream<P>,
        n: Option<Norm<Self>>,
        gamma: &Vectors<P::Real>,
        tables: Option<&mut Tables<Want<Self>>>,
        dgamma: Sum<Vectors<P::Real>>,
        dbeta: Sum<Vectors<P::Real>>,
    ) {
        let dz = self.norm_embeddings_back(dx, n, gamma, Site::EMBEDDINGS, dgamma, dbeta);
        let Some(tables) = tables else { return };
        let positions: Vec<u32> = (0..dz.rows).map(|i| self.place(Space::Tokens, i).position as u32).collect();
        scatter_rows::<P>(&dz, self.batch.ids(), &mut tables.word);
        scatter_rows::<P>(&dz, &positions, &mut tables.position);
        scatter_rows::<P>(&dz, self.batch.type_ids(), &mut tables.token_type);
    }

    /// tanh(x W' + b[g]) of first rows.
    pub(super) fn pool_forward(&self, x: &Stream<P>, w: &[&Weight<P>], b: &Vectors<P::Real>) -> Act<P> {
        let h = x.cols;
        let mut pooled = self.mat(Space::Firsts, h);
        for (rows, w) in self.rows_by_pooler(w) {
            let y = Rows { data: &mut pooled.data[rows.start * h..rows.end * h], stride: h };
            let read = |i: usize, to: &mut [P::Real]| to.copy_from_slice(x.row(rows.start + i));
            w.for_forward().multiply(self.arch, rows.len(), read, y, |i, col, y: &mut [P::Stored], sums| {
                let b = &b.of(self.group(Space::Firsts, rows.start + i))[col..];
                for ((y, sum), b) in y.iter_mut().zip(sums).zip(b) {
                    *y = P::Stored::store((*sum + *b).tanh());
                }
            });
        }
        pooled
    }

    pub(super) fn pool_backward(
        &self,
        mut dp: Stream<P>,
        pooled: Act<P>,
        x: Option<&Stream<P>>,
        w: &[&Weight<P>],
        want: &mut Want<Self>,
        db: Sum<Vectors<P::Real>>,
    ) -> Stream<P> {
        let h = dp.cols;
        for (d, p) in dp.data.iter_mut().zip(pooled.data.iter()) {
            let p = p.load();
            *d *= P::Real::ONE - p * p;
        }
        self.column_sums(&dp, db);
        let mut dx = self.mat(Space::Firsts, h);
        for (k, (rows, w)) in self.rows_by_pooler(w).into_iter().enumerate() {
            let span = rows.start * h..rows.end * h;
            let y = Rows { data: &mut dx.data[span.clone()], stride: h };
            let read = |i: usize, to: &mut [P::Real]| to.copy_from_slice(dp.row(rows.start + i));
            w.for_backward().multiply(self.arch, rows.len(), read, y, |_, _, y: &mut [P::Real], sums| {
                y.copy_from_slice(sums);
            });
            if let Some(x) = x {
                self.grad_of((&dp.data[span.clone()], h), (&x.data[span], h), k, want);
            }
        }
        dx
    }

    /// The sequences that each pooler reads: all, where one is shared.
    fn rows_by_pooler<'w>(&self, w: &[&'w Weight<P>]) -> Vec<(std::ops::Range<usize>, &'w Weight<P>)> {
        match w {
            [shared] => vec![(0..self.batch.n_sequences(), *shared)],
            own => self.rows_by_group(Space::Firsts).into_iter().zip(own.iter().copied()).collect(),
        }
    }

    /// M * pooled of row `i`.
    fn dropped(&self, pooled: &Act<P>, i: usize) -> Vec<P::Real> {
        let mut m = vec![P::Real::ONE; pooled.cols];
        self.mask(self.place(Space::Firsts, i), 0, Site::POOLED, &mut m);
        m.iter().zip(pooled.row(i)).map(|(m, p)| *m * p.load()).collect()
    }

    pub(super) fn classify_forward(&self, pooled: &Act<P>, c: &Classifier<Self>) -> Stream<P> {
        let (h, widest) = (pooled.cols, c.n_outputs.iter().copied().max().unwrap_or(0));
        let mut logits: Stream<P> = self.zeros(Space::Firsts, widest);
        for i in 0..pooled.rows {
            let g = self.group(Space::Firsts, i);
            let x = self.dropped(pooled, i);
            let (weight, bias) = (&c.weight.data[c.first[g] * h..], &c.bias.data[c.first[g]..]);
            for (k, z) in logits.row_mut(i)[..c.n_outputs[g]].iter_mut().enumerate() {
                *z = dot(&x, &weight[k * h..][..h]) + bias[k];
            }
        }
        logits
    }

    /// Cross entropy or squared error; the gradient of the logits over the logits.
    pub(super) fn loss_of(&self, mut logits: Stream<P>, n_outputs: &[usize], loss: &[Loss]) -> (Stream<P>, Stream<P>) {
        let groups = self.batch.n_groups();
        let mut losses: Stream<P> =
            Mat { rows: groups, cols: 1, space: Space::Firsts, data: self.pool.take(groups, groups) };
        losses.data.fill(P::Real::ZERO);
        for i in 0..logits.rows {
            let g = self.group(Space::Firsts, i);
            let scale = P::Real::of(f64::from(loss[g].scale));
            let z = &mut logits.row_mut(i)[..n_outputs[g]];
            match self.batch.targets()[i] {
                Some(Target::Class(class)) => {
                    let top = z.iter().fold(z[0], |top, z| top.max(*z));
                    let lse = top + z.iter().map(|z| (*z - top).exp()).sum::<P::Real>().ln();
                    losses.data[g] += scale * (lse - z[class as usize]);
                    for (k, z) in z.iter_mut().enumerate() {
                        let hit = if k == class as usize { P::Real::ONE } else { P::Real::ZERO };
                        *z = scale * ((*z - lse).exp() - hit);
                    }
                }
                Some(Target::Value(value)) => {
                    let error = z[0] - P::Real::of(f64::from(value));
                    losses.data[g] += scale * error * error;
                    z[0] = scale * P::Real::of(2.0) * error;
                }
                None => z.fill(P::Real::ZERO),
            }
        }
        (losses, logits)
    }

    pub(super) fn classify_backward(
        &self,
        dlogits: Stream<P>,
        pooled: &Act<P>,
        c: &Classifier<Self>,
        dw: &mut Vectors<P::Real>,
        db: &mut Vectors<P::Real>,
    ) -> Stream<P> {
        let h = pooled.cols;
        let mut dp: Stream<P> = self.zeros(Space::Firsts, h);
        for i in 0..pooled.rows {
            let row = self.place(Space::Firsts, i);
            let x = self.dropped(pooled, i);
            let weight = &c.weight.data[c.first[row.group] * h..];
            let (dw, db) = (dw.of_mut(row.group), db.of_mut(row.group));
            for (k, dz) in dlogits.row(i)[..c.n_outputs[row.group]].iter().enumerate() {
                db[k] += *dz;
                for (dw, x) in dw[k * h..][..h].iter_mut().zip(&x) {
                    *dw = dz.mul_add(*x, *dw);
                }
                for (dp, w) in dp.row_mut(i).iter_mut().zip(&weight[k * h..][..h]) {
                    *dp = dz.mul_add(*w, *dp);
                }
            }
            if let Some(mask) = self.mask(row, 0, Site::POOLED, &mut vec![P::Real::ONE; h]) {
                for (dp, m) in dp.row_mut(i).iter_mut().zip(mask) {
                    *dp *= *m;
                }
            }
        }
        dp
    }
}

/// Adds row `i` of `dz` to row `to[i]` of a table's gradient, in order of the rows.
fn scatter_rows<P: Precision>(dz: &Stream<P>, to: &[u32], want: &mut Want<Cpu<P>>) {
    let h = dz.cols;
    match want {
        Want::Nothing => {}
        Want::Full(sums) => {
            for (i, row) in to.iter().enumerate() {
                for (sum, d) in sums.data[*row as usize * h..][..h].iter_mut().zip(dz.row(i)) {
                    *sum += *d;
                }
            }
        }
        Want::Sampled { entries, values } => {
            let mut tokens: HashMap<u32, Vec<usize>> = HashMap::new();
            for (i, row) in to.iter().enumerate() {
                tokens.entry(*row).or_default().push(i);
            }
            for (entry, sum) in entries.iter().zip(&mut values.data) {
                let (row, column) = ((entry / h as u64) as u32, (entry % h as u64) as usize);
                for i in tokens.get(&row).into_iter().flatten() {
                    *sum += dz.row(*i)[column];
                }
            }
        }
    }
}
