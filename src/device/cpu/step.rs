//! The trait of ops on the CPU: what is short stands here, the rest in the files beside it.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::activation::{Function, Gelu, GeluTanh, Relu};
use super::buffer::{Buffer, Mat, Vectors};
use super::precision::{Precision, Stored, load};
use super::product::layout::{AsStored, Layout};
use super::product::panels::Rows;
use super::product::strided::{View, Write, product_alone};
use super::real::{Real, dot};
use super::weights::{Values, Weight};
use super::{Act, Cpu, Stream};
use crate::device::batch::{Batch, Space};
use crate::device::ops::{
    Activation, AdamW, Affine, Classifier, Device, Dropout, Loss, Norm, Ops, Site, Sum, Tables, Trained, Want,
};

impl<P: Precision> Cpu<P> {
    /// finish(x W) for rows that are read as they lie.
    fn times<X: Stored<P::Real>, E: super::Element>(
        &self,
        x: &Mat<X>,
        w: &P::Layout,
        y: &mut Mat<E>,
        finish: impl Fn(usize, usize, &mut [E], &[P::Real]) + Sync,
    ) {
        assert_eq!((x.cols, y.cols), w.shape(), "both sides of a product fit its weight");
        let to = Rows { stride: y.cols, data: &mut y.data };
        w.multiply(self.arch, x.rows, AsStored { data: &x.data, cols: x.cols }, to, finish);
    }

    /// f(u) W'.
    fn activated_times<F: Function>(&self, u: &Act<P>, w: &Weight<P>) -> Stream<P> {
        let mut y = self.mat(u.space, w.n_out());
        assert_eq!(u.cols, w.n_in(), "both sides of a product fit its weight");
        let to = Rows { stride: y.cols, data: &mut y.data };
        w.for_forward().multiply(
            self.arch,
            u.rows,
            #[inline(always)]
            |i, to: &mut [P::Real]| {
                for (to, u) in to.iter_mut().zip(u.row(i)) {
                    *to = F::value(u.load());
                }
            },
            to,
            #[inline(always)]
            |_, _, y: &mut [P::Real], sums| y.copy_from_slice(sums),
        );
        y
    }

    /// (dy W) * f'(u) over u.
    fn times_slope<F: Function>(&self, dy: &Act<P>, w: &Weight<P>, u: &mut Act<P>) {
        self.times(
            dy,
            w.for_backward(),
            u,
            #[inline(always)]
            |_, _, u: &mut [P::Stored], sums| {
                for (u, sum) in u.iter_mut().zip(sums) {
                    *u = P::Stored::store(*sum * F::slope(u.load()));
                }
            },
        );
    }

    /// f(u).
    fn activated<F: Function>(&self, u: &Act<P>) -> Act<P> {
        let mut to: Act<P> = self.mat(u.space, u.cols);
        let piece = 1 << 13;
        to.data.par_chunks_mut(piece).zip(u.data.par_chunks(piece)).for_each(|(to, u)| {
            self.arch.run(
                to,
                #[inline(always)]
                |to: &mut [P::Stored]| {
                    for (to, u) in to.iter_mut().zip(u) {
                        *to = P::Stored::store(F::value(u.load()));
                    }
                },
            );
        });
        to
    }

    /// dW = dy' x of the entries asked for, dy (rows, out) and x (rows, in); `g` is whose weight it is.
    pub(super) fn grad_of<Y: Stored<P::Real>, X: Stored<P::Real>>(
        &self,
        dy: (&[Y], usize),
        x: (&[X], usize),
        g: usize,
        want: &mut Want<Self>,
    ) {
        let ((dy, n_out), (x, n_in)) = (dy, x);
        let rows = dy.len() / n_out;
        match want {
            Want::Nothing => {}
            Want::Full(sums) => {
                let (wide_dy, wide_x);
                let dy = match Y::whole(dy) {
                    Some(dy) => dy,
                    None => {
                        wide_dy = self.widened(dy, n_out);
                        &wide_dy
                    }
                };
                let x = match X::whole(x) {
                    Some(x) => x,
                    None => {
                        wide_x = self.widened(x, n_in);
                        &wide_x
                    }
                };
                let (dy, x) = (View::new(dy, rows, n_out), View::new(x, rows, n_in));
                product_alone(sums.of_mut(g), n_in, Write::Add, dy.t(), x, self.n_threads());
            }
            Want::Sampled { entries, values } => {
                // Both sides transposed, so that an entry is one dot product over rows that lie side by side.
                let (dy, x) = (self.transposed(dy, n_out, rows), self.transposed(x, n_in, rows));
                values.data.par_chunks_mut(64).zip(entries.par_chunks(64)).for_each(|(sums, entries)| {
                    self.arch.run(
                        sums,
                        #[inline(always)]
                        |sums: &mut [P::Real]| {
                            for (sum, entry) in sums.iter_mut().zip(entries) {
                                let (o, i) = (*entry as usize / n_in, *entry as usize % n_in);
                                *sum += dot(&dy[o * rows..][..rows], &x[i * rows..][..rows]);
                            }
                        },
                    );
                });
            }
        }
    }

    /// Rows of activations at full width.
    fn widened<X: Stored<P::Real>>(&self, a: &[X], cols: usize) -> Buffer<P::Real> {
        let mut wide = self.pool.take(a.len(), self.room.max(a.len() / cols) * cols);
        wide.par_chunks_mut(cols).zip(a.par_chunks(cols)).for_each(|(to, from)| load(from, to));
        wide
    }

    fn transposed<X: Stored<P::Real>>(&self, a: &[X], cols: usize, rows: usize) -> Buffer<P::Real> {
        let mut t = self.pool.take::<P::Real>(a.len(), self.room.max(rows) * cols);
        t.par_chunks_mut(rows).enumerate().for_each(|(j, t)| {
            for (i, t) in t.iter_mut().enumerate() {
                *t = a[i * cols + j].load();
            }
        });
        t
    }

    /// x's first rows.
    fn first_rows<E: super::Element>(&self, x: &Mat<E>) -> Mat<E> {
        let mut first = self.mat(Space::Firsts, x.cols);
        for s in 0..first.rows {
            let row = x.row(self.batch.bounds()[s]);
            first.row_mut(s).copy_from_slice(row);
        }
        first
    }
}

impl<P: Precision> Ops for Cpu<P> {
    fn copy(&mut self, x: &Stream<P>) -> Stream<P> {
        let mut y = self.mat(x.space, x.cols);
        let piece = 1 << 16;
        y.data.par_chunks_mut(piece).zip(x.data.par_chunks(piece)).for_each(|(y, x)| y.copy_from_slice(x));
        y
    }

    fn firsts(&mut self, x: Stream<P>) -> Stream<P> {
        match x.space {
            Space::Firsts => x,
            Space::Tokens => self.first_rows(&x),
        }
    }

    fn spread(&mut self, d: Stream<P>) -> Stream<P> {
        if d.space == Space::Tokens {
            return d;
        }
        let mut all: Stream<P> = self.zeros(Space::Tokens, d.cols);
        for s in 0..d.rows {
            let row = self.batch.bounds()[s];
            all.row_mut(row).copy_from_slice(d.row(s));
        }
        all
    }

    fn branch(&mut self, x: Stream<P>, batch: Arc<Batch>, from: &[usize]) -> Stream<P> {
        let before = std::mem::replace(&mut self.batch, batch.clone());
        self.begin(batch, Dropout::NONE);
        let mut y: Stream<P> = self.mat(x.space, x.cols);
        for (s, from) in from.iter().enumerate() {
            let (to, from) = match x.space {
                Space::Tokens => (self.batch.tokens_of(s), before.tokens_of(*from)),
                Space::Firsts => (s..s + 1, *from..from + 1),
            };
            let of = |rows: Range<usize>| rows.start * x.cols..rows.end * x.cols;
            y.data[of(to)].copy_from_slice(&x.data[of(from)]);
        }
        y
    }

    fn linear(&mut self, x: &Stream<P>, w: &Weight<P>, b: &Vectors<P::Real>) -> Act<P> {
        let mut y = self.mat(x.space, w.n_out());
        self.times(
            x,
            w.for_forward(),
            &mut y,
            #[inline(always)]
            |i, col, y: &mut [P::Stored], sums| {
                let b = &b.of(self.group(x.space, i))[col..];
                for ((y, sum), b) in y.iter_mut().zip(sums).zip(b) {
                    *y = P::Stored::store(*sum + *b);
                }
            },
        );
        y
    }

    fn linear_back(&mut self, dy: Act<P>, w: &Weight<P>, mut dx: Stream<P>) -> Stream<P> {
        self.times(
            &dy,
            w.for_backward(),
            &mut dx,
            #[inline(always)]
            |_, _, dx: &mut [P::Real], sums| dx.iter_mut().zip(sums).for_each(|(dx, sum)| *dx += *sum),
        );
        dx
    }

    fn product(&mut self, x: Act<P>, w: &Weight<P>) -> Stream<P> {
        let mut y = self.mat(x.space, w.n_out());
        self.times(
            &x,
            w.for_forward(),
            &mut y,
            #[inline(always)]
            |_, _, y: &mut [P::Real], sums| y.copy_from_slice(sums),
        );
        y
    }

    fn product_back(&mut self, dy: Act<P>, w: &Weight<P>) -> Act<P> {
        let mut dx = self.mat(dy.space, w.n_in());
        self.times(
            &dy,
            w.for_backward(),
            &mut dx,
            #[inline(always)]
            |_, _, dx: &mut [P::Stored], sums| {
                dx.iter_mut().zip(sums).for_each(|(dx, sum)| *dx = P::Stored::store(*sum));
            },
        );
        dx
    }

    fn feed_forward(
        &mut self,
        x: &Stream<P>,
        wi: &Weight<P>,
        bi: &Vectors<P::Real>,
        wo: &Weight<P>,
    ) -> (Act<P>, Stream<P>) {
        let u = self.linear(x, wi, bi);
        let y = match self.arithmetic.activation {
            Activation::Gelu => self.activated_times::<Gelu>(&u, wo),
            Activation::GeluTanh => self.activated_times::<GeluTanh>(&u, wo),
            Activation::Relu => self.activated_times::<Relu>(&u, wo),
        };
        (u, y)
    }

    fn feed_forward_back(&mut self, dy: Act<P>, wo: &Weight<P>, mut u: Act<P>, dbi: Sum<Vectors<P::Real>>) -> Act<P> {
        match self.arithmetic.activation {
            Activation::Gelu => self.times_slope::<Gelu>(&dy, wo, &mut u),
            Activation::GeluTanh => self.times_slope::<GeluTanh>(&dy, wo, &mut u),
            Activation::Relu => self.times_slope::<Relu>(&dy, wo, &mut u),
        }
        self.column_sums(&u, dbi);
        u
    }

    fn attention(&mut self, q: &Act<P>, k: &Act<P>, v: &Act<P>, site: Site) -> (Act<P>, Stream<P>) {
        self.attention_forward(q, k, v, site)
    }

    fn attention_back(
        &mut self,
        d_o: Act<P>,
        qkv: (Act<P>, Act<P>, Act<P>),
        lse: Stream<P>,
        site: Site,
        dbq: Sum<Vectors<P::Real>>,
        dbv: Sum<Vectors<P::Real>>,
    ) -> (Act<P>, Act<P>, Act<P>) {
        let (dq, dk, dv) = self.attention_backward(&d_o, qkv, &lse, site);
        self.column_sums(&dq, dbq);
        self.column_sums(&dv, dbv);
        (dq, dk, dv)
    }

    fn add_norm(
        &mut self,
        x: Stream<P>,
        a: Stream<P>,
        b: &Vectors<P::Real>,
        ln: Affine<Self>,
        site: Site,
    ) -> (Stream<P>, Norm<Self>) {
        self.norm_forward(x, a, b, ln, site)
    }

    fn add_norm_back(
        &mut self,
        dh: Stream<P>,
        n: Norm<Self>,
        gamma: &Vectors<P::Real>,
        site: Site,
        db: Sum<Vectors<P::Real>>,
        dgamma: Sum<Vectors<P::Real>>,
        dbeta: Sum<Vectors<P::Real>>,
    ) -> (Stream<P>, Act<P>) {
        self.norm_backward(dh, n, gamma, site, db, dgamma, dbeta)
    }

    fn activate(&mut self, u: &Act<P>) -> Act<P> {
        match self.arithmetic.activation {
            Activation::Gelu => self.activated::<Gelu>(u),
            Activation::GeluTanh => self.activated::<GeluTanh>(u),
            Activation::Relu => self.activated::<Relu>(u),
        }
    }

    fn renorm(&mut self, n: &Norm<Self>, ln: Affine<Self>, dropout: Option<Site>) -> Act<P> {
        self.norm_again(n, ln, dropout)
    }

    fn weight_grad(&mut self, dy: &Act<P>, x: &Act<P>, want: &mut Want<Self>) {
        if matches!(want, Want::Nothing) {
            return;
        }
        let first;
        let x = if dy.space == x.space {
            x
        } else {
            first = self.first_rows(x);
            &first
        };
        self.grad_of((&dy.data, dy.cols), (&x.data, x.cols), 0, want);
    }

    fn embed(&mut self, tables: Tables<&P::Table>, ln: Affine<Self>) -> (Stream<P>, Norm<Self>) {
        self.embed_forward(tables, ln)
    }

    fn embed_back(
        &mut self,
        dx: Stream<P>,
        n: Option<Norm<Self>>,
        gamma: &Vectors<P::Real>,
        tables: Option<&mut Tables<Want<Self>>>,
        dgamma: Sum<Vectors<P::Real>>,
        dbeta: Sum<Vectors<P::Real>>,
    ) {
        self.embed_backward(dx, n, gamma, tables, dgamma, dbeta);
    }

    fn pool(&mut self, x: &Stream<P>, w: &[&Weight<P>], b: &Vectors<P::Real>) -> Act<P> {
        self.pool_forward(x, w, b)
    }

    fn pool_back(
        &mut self,
        dp: Stream<P>,
        pooled: Act<P>,
        x: Option<&Stream<P>>,
        w: &[&Weight<P>],
        want: &mut Want<Self>,
        db: Sum<Vectors<P::Real>>,
    ) -> Stream<P> {
        self.pool_backward(dp, pooled, x, w, want, db)
    }

    fn classify(&mut self, pooled: &Act<P>, c: &Classifier<Self>) -> Stream<P> {
        self.classify_forward(pooled, c)
    }

    fn loss(&mut self, logits: Stream<P>, n_outputs: &[usize], loss: &[Loss]) -> (Stream<P>, Stream<P>) {
        self.loss_of(logits, n_outputs, loss)
    }

    fn classify_back(
        &mut self,
        dlogits: Stream<P>,
        pooled: &Act<P>,
        c: &Classifier<Self>,
        dw: &mut Vectors<P::Real>,
        db: &mut Vectors<P::Real>,
    ) -> Stream<P> {
        self.classify_backward(dlogits, pooled, c, dw, db)
    }

    fn add_squares(&mut self, grad: &Vectors<P::Real>, rules: &[Option<AdamW>], sums: &mut Vectors<P::Real>) {
        self.squares(grad, rules, sums);
    }

    fn adamw(
        &mut self,
        p: &mut Trained<Self>,
        grad: &Vectors<P::Real>,
        squares: &Vectors<P::Real>,
        rules: &[Option<AdamW>],
    ) {
        self.adamw_step(p, grad, squares, rules);
    }

    fn sum(
        &mut self,
        base: &Vectors<P::Real>,
        delta: &Vectors<P::Real>,
        at: Option<&Vec<u64>>,
        into: &mut Vectors<P::Real>,
    ) {
        for g in 0..delta.rows {
            add(base.of(g), delta.of(g), at, into.of_mut(g));
        }
    }

    fn write_weight(
        &mut self,
        base: &Vectors<P::Real>,
        delta: &Vectors<P::Real>,
        g: usize,
        at: Option<&Vec<u64>>,
        into: &mut Weight<P>,
    ) {
        add(base.of(g), delta.of(g), at, into);
    }

    fn write_table(
        &mut self,
        base: &Vectors<P::Real>,
        delta: &Vectors<P::Real>,
        at: Option<&Vec<u64>>,
        into: &mut P::Table,
    ) {
        add(base.of(0), delta.of(0), at, into);
    }

    fn gather(&mut self, from: &Vectors<P::Real>, at: &Vec<u64>, into: &mut Vectors<P::Real>) {
        for (into, at) in into.data.iter_mut().zip(at) {
            *into = from.data[*at as usize];
        }
    }
}

/// into = base + delta, or into[at[i]] = base[i] + delta[i].
fn add<R: Real>(base: &[R], delta: &[R], at: Option<&Vec<u64>>, into: &mut (impl Values<R> + ?Sized)) {
    match at {
        None => into.rewrite(|at| base[at] + delta[at]),
        Some(at) => {
            for ((at, b), d) in at.iter().zip(base).zip(delta) {
                into.set(*at as usize, *b + *d);
            }
        }
    }
}
