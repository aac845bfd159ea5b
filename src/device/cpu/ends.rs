//! The two ends of the network: embeddings, and pooler, classifier and loss. The second has a row a sequence, so it is
//! written for clarity: its time is nothing beside the layers'.

use std::collections::HashMap;

use super::buffer::{Mat, Matrix, Space, Vectors};
use super::product::{Into, View, product};
use super::real::{Real, dot};
use super::weights::Weight;
use super::{Cpu, multipliers};
use crate::device::batch::Target;
use crate::device::ops::{Affine, At, Classifier, Loss, Norm, Site, Sum, Tables, Want};

const EMBEDDINGS: Site = Site { layer: 0, at: At::Embeddings };
const POOLED: Site = Site { layer: 0, at: At::Pooled };

impl<R: Real> Cpu<R> {
    pub(super) fn embed_forward(&self, tables: Tables<&Matrix<R>>, ln: Affine<Self>) -> (Mat<R>, Norm<Self>) {
        let (ids, types) = (self.batch.ids(), self.batch.type_ids());
        self.norm_embeddings(
            tables.word.cols,
            ln,
            EMBEDDINGS,
            #[inline(always)]
            |i, row, z| {
                let word = tables.word.row(ids[i] as usize);
                let position = tables.position.row(row.position);
                let token_type = tables.token_type.row(types[i] as usize);
                for (((z, w), p), t) in z.iter_mut().zip(word).zip(position).zip(token_type) {
                    *z = *w + *p + *t;
                }
            },
        )
    }

    pub(super) fn embed_backward(
        &self,
        dx: Mat<R>,
        n: Option<Norm<Self>>,
        gamma: &Vectors<R>,
        tables: Option<&mut Tables<Want<Self>>>,
        dgamma: Sum<Vectors<R>>,
        dbeta: Sum<Vectors<R>>,
    ) {
        let dz = self.norm_embeddings_back(dx, n, gamma, EMBEDDINGS, dgamma, dbeta);
        let Some(tables) = tables else { return };
        let positions: Vec<u32> = (0..dz.rows).map(|i| self.place(Space::Tokens, i).position as u32).collect();
        scatter_rows(&dz, self.batch.ids(), &mut tables.word);
        scatter_rows(&dz, &positions, &mut tables.position);
        scatter_rows(&dz, self.batch.type_ids(), &mut tables.token_type);
    }

    /// tanh(x W' + b[g]) of first rows.
    pub(super) fn pool_forward(&self, x: &Mat<R>, w: &[&Weight<R>], b: &Vectors<R>) -> Mat<R> {
        let h = x.cols;
        let mut pooled = self.mat(Space::Firsts, h);
        for (rows, w) in self.rows_by_pooler(w) {
            let (x, y) = (&x.data[rows.start * h..rows.end * h], &mut pooled.data[rows.start * h..rows.end * h]);
            product(y, h, Into::Store, View::new(x, rows.len(), h), w.for_forward(), self.n_threads());
        }
        for i in 0..pooled.rows {
            let g = self.place(Space::Firsts, i).group;
            for (p, b) in pooled.row_mut(i).iter_mut().zip(b.of(g)) {
                *p = (*p + *b).tanh();
            }
        }
        pooled
    }

    pub(super) fn pool_backward(
        &self,
        mut dp: Mat<R>,
        pooled: Mat<R>,
        x: Option<&Mat<R>>,
        w: &[&Weight<R>],
        want: &mut Want<Self>,
        db: Sum<Vectors<R>>,
    ) -> Mat<R> {
        let h = dp.cols;
        for (d, p) in dp.data.iter_mut().zip(pooled.data.iter()) {
            *d *= R::ONE - *p * *p;
        }
        self.column_sums(&dp, db);
        let mut dx = pooled;
        for (k, (rows, w)) in self.rows_by_pooler(w).into_iter().enumerate() {
            let span = rows.start * h..rows.end * h;
            let d = View::new(&dp.data[span.clone()], rows.len(), h);
            product(&mut dx.data[span.clone()], h, Into::Store, d, w.for_backward(), self.n_threads());
            if let Some(x) = x {
                self.grad_of((&dp.data[span.clone()], h), (&x.data[span], h), k, want);
            }
        }
        dx
    }

    /// The sequences that each pooler reads: all, where one is shared.
    fn rows_by_pooler<'w>(&self, w: &[&'w Weight<R>]) -> Vec<(std::ops::Range<usize>, &'w Weight<R>)> {
        match w {
            [shared] => vec![(0..self.batch.n_sequences(), *shared)],
            own => self.rows_by_group(Space::Firsts).into_iter().zip(own.iter().copied()).collect(),
        }
    }

    /// M * pooled of row `i`.
    fn dropped(&self, pooled: &Mat<R>, i: usize) -> Vec<R> {
        let mut m = vec![R::ONE; pooled.cols];
        if let Some(mask) = self.mask(self.place(Space::Firsts, i), 0, POOLED) {
            multipliers(&mask, &mut m);
        }
        m.iter().zip(pooled.row(i)).map(|(m, p)| *m * *p).collect()
    }

    pub(super) fn classify_forward(&self, pooled: &Mat<R>, c: &Classifier<Self>) -> Mat<R> {
        let (h, widest) = (pooled.cols, c.bias.n);
        let mut logits = self.zeros(Space::Firsts, widest);
        for i in 0..pooled.rows {
            let g = self.place(Space::Firsts, i).group;
            let x = self.dropped(pooled, i);
            let (weight, bias) = (c.weight.of(g), c.bias.of(g));
            for (k, z) in logits.row_mut(i)[..c.n_outputs[g]].iter_mut().enumerate() {
                *z = dot(&x, &weight[k * h..][..h]) + bias[k];
            }
        }
        logits
    }

    /// Cross entropy or squared error; the gradient of the logits over the logits.
    pub(super) fn loss_of(&self, mut logits: Mat<R>, n_outputs: &[usize], loss: &[Loss]) -> (Mat<R>, Mat<R>) {
        let groups = self.batch.n_groups();
        let mut losses = Mat { rows: groups, cols: 1, space: Space::Firsts, data: self.pool.take(groups, groups) };
        losses.data.fill(R::ZERO);
        for i in 0..logits.rows {
            let g = self.place(Space::Firsts, i).group;
            let scale = R::of(f64::from(loss[g].scale));
            let z = &mut logits.row_mut(i)[..n_outputs[g]];
            match self.batch.targets()[i] {
                Some(Target::Class(class)) => {
                    let top = z.iter().fold(z[0], |top, z| top.max(*z));
                    let lse = top + z.iter().map(|z| (*z - top).exp()).sum::<R>().ln();
                    losses.data[g] += scale * (lse - z[class as usize]);
                    for (k, z) in z.iter_mut().enumerate() {
                        let hit = if k == class as usize { R::ONE } else { R::ZERO };
                        *z = scale * ((*z - lse).exp() - hit);
                    }
                }
                Some(Target::Value(value)) => {
                    let error = z[0] - R::of(f64::from(value));
                    losses.data[g] += scale * error * error;
                    z[0] = scale * R::of(2.0) * error;
                }
                None => z.fill(R::ZERO),
            }
        }
        (losses, logits)
    }

    pub(super) fn classify_backward(
        &self,
        dlogits: Mat<R>,
        pooled: &Mat<R>,
        c: &Classifier<Self>,
        dw: &mut Vectors<R>,
        db: &mut Vectors<R>,
    ) -> Mat<R> {
        let h = pooled.cols;
        let mut dp = self.zeros(Space::Firsts, h);
        for i in 0..pooled.rows {
            let row = self.place(Space::Firsts, i);
            let x = self.dropped(pooled, i);
            let (weight, dw, db) = (c.weight.of(row.group), dw.of_mut(row.group), db.of_mut(row.group));
            for (k, dz) in dlogits.row(i)[..c.n_outputs[row.group]].iter().enumerate() {
                db[k] += *dz;
                for (dw, x) in dw[k * h..][..h].iter_mut().zip(&x) {
                    *dw = dz.mul_add(*x, *dw);
                }
                for (dp, w) in dp.row_mut(i).iter_mut().zip(&weight[k * h..][..h]) {
                    *dp = dz.mul_add(*w, *dp);
                }
            }
            if let Some(mask) = self.mask(row, 0, POOLED) {
                let mut m = vec![R::ONE; h];
                multipliers(&mask, &mut m);
                for (dp, m) in dp.row_mut(i).iter_mut().zip(&m) {
                    *dp *= *m;
                }
            }
        }
        dp
    }
}

/// Adds row `i` of `dz` to row `to[i]` of a table's gradient, in order of the rows.
fn scatter_rows<R: Real>(dz: &Mat<R>, to: &[u32], want: &mut Want<Cpu<R>>) {
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
