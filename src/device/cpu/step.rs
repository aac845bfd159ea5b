//! The trait of ops on the CPU: what is short stands here, the rest in the files beside it.

use std::ops::Range;

use rayon::prelude::*;

use super::buffer::{Mat, Matrix, Space, Vectors};
use super::product::{Into, View, product, product_alone};
use super::real::{Real, dot};
use super::weights::Weight;
use super::{CHUNK, Cpu};
use crate::device::ops::{Activation, AdamW, Affine, Classifier, Loss, Norm, Ops, Site, Sum, Tables, Trained, Want};

/// Rows of GELU(u) that exist at a time.
const PANEL: usize = 256;

/// 1 / sqrt(2 pi), the normal density at 0.
const DENSITY: f64 = 0.398_942_280_401_432_7;

/// sqrt(2 / pi) and the cubic's factor of the tanh form.
const TANH: [f64; 2] = [0.797_884_560_802_865_4, 0.044_715];

/// The functions of a feed-forward, each beside its slope: f(u) and f'(u).
mod gelu {
    use super::{DENSITY, Real};

    #[inline(always)]
    pub fn f<R: Real>(u: R) -> R {
        u * u.normal_cdf()
    }

    #[inline(always)]
    pub fn slope<R: Real>(u: R) -> R {
        (u * R::of(DENSITY)).mul_add((R::of(-0.5) * u * u).exp(), u.normal_cdf())
    }
}

mod gelu_tanh {
    use super::{Real, TANH};

    #[inline(always)]
    pub fn f<R: Real>(u: R) -> R {
        let inner = R::of(TANH[0]) * (R::of(TANH[1]) * u * u).mul_add(u, u);
        R::of(0.5) * u * (R::ONE + inner.tanh())
    }

    #[inline(always)]
    pub fn slope<R: Real>(u: R) -> R {
        let t = (R::of(TANH[0]) * (R::of(TANH[1]) * u * u).mul_add(u, u)).tanh();
        let inner = R::of(TANH[0]) * (R::of(3.0 * TANH[1]) * u).mul_add(u, R::ONE);
        R::of(0.5) * ((R::ONE + t) + u * (R::ONE - t * t) * inner)
    }
}

mod relu {
    use super::Real;

    #[inline(always)]
    pub fn f<R: Real>(u: R) -> R {
        u.max(R::ZERO)
    }

    #[inline(always)]
    pub fn slope<R: Real>(u: R) -> R {
        if u > R::ZERO { R::ONE } else { R::ZERO }
    }
}

impl<R: Real> Cpu<R> {
    /// Adds each row's bias.
    fn add_bias(&self, y: &mut Mat<R>, b: &Vectors<R>) {
        let (space, n) = (y.space, y.cols);
        y.data.par_chunks_mut(CHUNK * n).enumerate().for_each(|(chunk, rows)| {
            self.arch.run(
                rows,
                #[inline(always)]
                |rows: &mut [R]| {
                    for (i, y) in rows.chunks_mut(n).enumerate() {
                        let b = b.of(self.place(space, chunk * CHUNK + i).group);
                        for (y, b) in y.iter_mut().zip(b) {
                            *y += *b;
                        }
                    }
                },
            );
        });
    }

    fn times(&self, x: &Mat<R>, w: View<R>, n: usize) -> Mat<R> {
        let mut y = self.mat(x.space, n);
        product(&mut y.data, n, Into::Store, View::new(&x.data, x.rows, x.cols), w, self.n_threads());
        y
    }

    fn panels(rows: usize) -> impl Iterator<Item = Range<usize>> {
        (0..rows).step_by(PANEL).map(move |first| first..rows.min(first + PANEL))
    }

    /// Calls `f` with aligned pieces of `a` and `b`, over the threads.
    fn map(&self, a: &mut [R], b: &[R], f: impl Fn(&mut R, R) + Sync) {
        let piece = 1 << 13;
        a.par_chunks_mut(piece).zip(b.par_chunks(piece)).for_each(|(a, b)| {
            self.arch.run(
                a,
                #[inline(always)]
                |a: &mut [R]| {
                    for (a, b) in a.iter_mut().zip(b) {
                        f(a, *b);
                    }
                },
            );
        });
    }

    /// into = base + delta, over the threads.
    fn sum_all(&self, base: &[R], delta: &[R], into: &mut [R]) {
        let piece = 1 << 16;
        let sums = base.par_chunks(piece).zip(delta.par_chunks(piece));
        into.par_chunks_mut(piece).zip(sums).for_each(|(into, (base, delta))| add(base, delta, None, into));
    }

    /// f(u) into `to`.
    fn activate_all(&self, to: &mut [R], u: &[R]) {
        // The choice stands outside the loops, which would not be vectorised around it.
        match self.arithmetic.activation {
            Activation::Gelu => self.map(
                to,
                u,
                #[inline(always)]
                |to, u| *to = gelu::f(u),
            ),
            Activation::GeluTanh => self.map(
                to,
                u,
                #[inline(always)]
                |to, u| *to = gelu_tanh::f(u),
            ),
            Activation::Relu => self.map(
                to,
                u,
                #[inline(always)]
                |to, u| *to = relu::f(u),
            ),
        }
    }

    /// d f'(u) over u.
    fn slope_all(&self, u: &mut [R], d: &[R]) {
        match self.arithmetic.activation {
            Activation::Gelu => self.map(
                u,
                d,
                #[inline(always)]
                |u, d| *u = d * gelu::slope(*u),
            ),
            Activation::GeluTanh => self.map(
                u,
                d,
                #[inline(always)]
                |u, d| *u = d * gelu_tanh::slope(*u),
            ),
            Activation::Relu => self.map(
                u,
                d,
                #[inline(always)]
                |u, d| *u = d * relu::slope(*u),
            ),
        }
    }

    /// dW = dy' x of the entries asked for, dy (rows, out) and x (rows, in); `g` is whose weight it is.
    pub(super) fn grad_of(&self, dy: (&[R], usize), x: (&[R], usize), g: usize, want: &mut Want<Self>) {
        let ((dy, n_out), (x, n_in)) = (dy, x);
        let rows = dy.len() / n_out;
        match want {
            Want::Nothing => {}
            Want::Full(sums) => {
                let (dy, x) = (View::new(dy, rows, n_out), View::new(x, rows, n_in));
                product_alone(sums.of_mut(g), n_in, Into::Add, dy.t(), x, self.n_threads());
            }
            Want::Sampled { entries, values } => {
                // Both sides transposed, so that an entry is one dot product over rows that lie side by side.
                let (dy, x) = (self.transposed(dy, n_out, rows), self.transposed(x, n_in, rows));
                values.data.par_chunks_mut(64).zip(entries.par_chunks(64)).for_each(|(sums, entries)| {
                    self.arch.run(
                        sums,
                        #[inline(always)]
                        |sums: &mut [R]| {
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

    fn transposed(&self, a: &[R], cols: usize, rows: usize) -> super::Buffer<R> {
        let mut t = self.pool.take(a.len(), self.room.max(rows) * cols);
        t.par_chunks_mut(rows).enumerate().for_each(|(j, t)| {
            for (i, t) in t.iter_mut().enumerate() {
                *t = a[i * cols + j];
            }
        });
        t
    }

    /// Where `dy` has first rows and `x` all: x's first rows.
    fn first_rows(&self, x: &Mat<R>) -> Mat<R> {
        let mut first = self.mat(Space::Firsts, x.cols);
        for s in 0..first.rows {
            let row = x.row(self.batch.bounds()[s]);
            first.row_mut(s).copy_from_slice(row);
        }
        first
    }
}

impl<R: Real> Ops for Cpu<R> {
    fn firsts(&mut self, x: Mat<R>) -> Mat<R> {
        match x.space {
            Space::Firsts => x,
            Space::Tokens => self.first_rows(&x),
        }
    }

    fn spread(&mut self, d: Mat<R>) -> Mat<R> {
        if d.space == Space::Tokens {
            return d;
        }
        let mut all = self.zeros(Space::Tokens, d.cols);
        for s in 0..d.rows {
            let row = self.batch.bounds()[s];
            all.row_mut(row).copy_from_slice(d.row(s));
        }
        all
    }

    fn linear(&mut self, x: &Mat<R>, w: &Weight<R>, b: &Vectors<R>) -> Mat<R> {
        let mut y = self.times(x, w.for_forward(), w.n_out());
        self.add_bias(&mut y, b);
        y
    }

    fn linear_back(&mut self, dy: Mat<R>, w: &Weight<R>, mut dx: Mat<R>) -> Mat<R> {
        let (dy, w) = (View::new(&dy.data, dy.rows, dy.cols), w.for_backward());
        let n = dx.cols;
        product(&mut dx.data, n, Into::Add, dy, w, self.n_threads());
        dx
    }

    fn product(&mut self, x: Mat<R>, w: &Weight<R>) -> Mat<R> {
        self.times(&x, w.for_forward(), w.n_out())
    }

    fn product_back(&mut self, dy: Mat<R>, w: &Weight<R>) -> Mat<R> {
        self.times(&dy, w.for_backward(), w.n_in())
    }

    fn feed_forward(&mut self, x: &Mat<R>, wi: &Weight<R>, bi: &Vectors<R>, wo: &Weight<R>) -> (Mat<R>, Mat<R>) {
        let u = self.linear(x, wi, bi);
        let (n, h) = (u.cols, wo.n_out());
        let mut y = self.mat(x.space, h);
        let mut panel = self.pool.take(PANEL.min(u.rows) * n, PANEL * n);
        for rows in Self::panels(u.rows) {
            let panel = &mut panel[..rows.len() * n];
            self.activate_all(panel, &u.data[rows.start * n..rows.end * n]);
            let (p, w) = (View::new(panel, rows.len(), n), wo.for_forward());
            product(&mut y.data[rows.start * h..rows.end * h], h, Into::Store, p, w, self.n_threads());
        }
        (u, y)
    }

    fn feed_forward_back(&mut self, dy: Mat<R>, wo: &Weight<R>, mut u: Mat<R>, dbi: Sum<Vectors<R>>) -> Mat<R> {
        let (n, h) = (u.cols, dy.cols);
        let mut panel = self.pool.take(PANEL.min(u.rows) * n, PANEL * n);
        for rows in Self::panels(u.rows) {
            let panel = &mut panel[..rows.len() * n];
            let d = View::new(&dy.data[rows.start * h..rows.end * h], rows.len(), h);
            product(panel, n, Into::Store, d, wo.for_backward(), self.n_threads());
            self.slope_all(&mut u.data[rows.start * n..rows.end * n], panel);
        }
        self.column_sums(&u, dbi);
        u
    }

    fn attention(&mut self, q: &Mat<R>, k: &Mat<R>, v: &Mat<R>, site: Site) -> (Mat<R>, Mat<R>) {
        self.attention_forward(q, k, v, site)
    }

    fn attention_back(
        &mut self,
        d_o: Mat<R>,
        qkv: (Mat<R>, Mat<R>, Mat<R>),
        lse: Mat<R>,
        site: Site,
        dbq: Sum<Vectors<R>>,
        dbv: Sum<Vectors<R>>,
    ) -> (Mat<R>, Mat<R>, Mat<R>) {
        let (dq, dk, dv) = self.attention_backward(&d_o, qkv, &lse, site);
        self.column_sums(&dq, dbq);
        self.column_sums(&dv, dbv);
        (dq, dk, dv)
    }

    fn add_norm(&mut self, x: Mat<R>, a: Mat<R>, b: &Vectors<R>, ln: Affine<Self>, site: Site) -> (Mat<R>, Norm<Self>) {
        self.norm_forward(x, a, b, ln, site)
    }

    fn add_norm_back(
        &mut self,
        dh: Mat<R>,
        n: Norm<Self>,
        gamma: &Vectors<R>,
        site: Site,
        db: Sum<Vectors<R>>,
        dgamma: Sum<Vectors<R>>,
        dbeta: Sum<Vectors<R>>,
    ) -> (Mat<R>, Mat<R>) {
        self.norm_backward(dh, n, gamma, site, db, dgamma, dbeta)
    }

    fn activate(&mut self, u: &Mat<R>) -> Mat<R> {
        let mut f = self.mat(u.space, u.cols);
        self.activate_all(&mut f.data, &u.data);
        f
    }

    fn renorm(&mut self, n: &Norm<Self>, ln: Affine<Self>, dropout: Option<Site>) -> Mat<R> {
        self.norm_again(n, ln, dropout)
    }

    fn weight_grad(&mut self, dy: &Mat<R>, x: &Mat<R>, want: &mut Want<Self>) {
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

    fn embed(&mut self, tables: Tables<&Matrix<R>>, ln: Affine<Self>) -> (Mat<R>, Norm<Self>) {
        self.embed_forward(tables, ln)
    }

    fn embed_back(
        &mut self,
        dx: Mat<R>,
        n: Option<Norm<Self>>,
        gamma: &Vectors<R>,
        tables: Option<&mut Tables<Want<Self>>>,
        dgamma: Sum<Vectors<R>>,
        dbeta: Sum<Vectors<R>>,
    ) {
        self.embed_backward(dx, n, gamma, tables, dgamma, dbeta);
    }

    fn pool(&mut self, x: &Mat<R>, w: &[&Weight<R>], b: &Vectors<R>) -> Mat<R> {
        self.pool_forward(x, w, b)
    }

    fn pool_back(
        &mut self,
        dp: Mat<R>,
        pooled: Mat<R>,
        x: Option<&Mat<R>>,
        w: &[&Weight<R>],
        want: &mut Want<Self>,
        db: Sum<Vectors<R>>,
    ) -> Mat<R> {
        self.pool_backward(dp, pooled, x, w, want, db)
    }

    fn classify(&mut self, pooled: &Mat<R>, c: &Classifier<Self>) -> Mat<R> {
        self.classify_forward(pooled, c)
    }

    fn loss(&mut self, logits: Mat<R>, n_outputs: &[usize], loss: &[Loss]) -> (Mat<R>, Mat<R>) {
        self.loss_of(logits, n_outputs, loss)
    }

    fn classify_back(
        &mut self,
        dlogits: Mat<R>,
        pooled: &Mat<R>,
        c: &Classifier<Self>,
        dw: &mut Vectors<R>,
        db: &mut Vectors<R>,
    ) -> Mat<R> {
        self.classify_backward(dlogits, pooled, c, dw, db)
    }

    fn add_squares(&mut self, grad: &Vectors<R>, rules: &[Option<AdamW>], sums: &mut Vectors<R>) {
        self.squares(grad, rules, sums);
    }

    fn adamw(&mut self, p: &mut Trained<Self>, grad: &Vectors<R>, squares: &Vectors<R>, rules: &[Option<AdamW>]) {
        self.adamw_step(p, grad, squares, rules);
    }

    fn sum(&mut self, base: &Vectors<R>, delta: &Vectors<R>, at: Option<&Vec<u64>>, into: &mut Vectors<R>) {
        for g in 0..delta.rows {
            add(base.of(g), delta.of(g), at, into.of_mut(g));
        }
    }

    fn write_weight(
        &mut self,
        base: &Vectors<R>,
        delta: &Vectors<R>,
        g: usize,
        at: Option<&Vec<u64>>,
        into: &mut Weight<R>,
    ) {
        let (base, delta) = (base.of(g), delta.of(g));
        match at {
            None => into.rewrite(|all| self.sum_all(base, delta, all)),
            Some(at) => {
                for ((at, b), d) in at.iter().zip(base).zip(delta) {
                    into.set(*at as usize, *b + *d);
                }
            }
        }
    }

    fn write_table(&mut self, base: &Vectors<R>, delta: &Vectors<R>, at: Option<&Vec<u64>>, into: &mut Matrix<R>) {
        add(base.of(0), delta.of(0), at, &mut into.data);
    }

    fn gather(&mut self, from: &Vectors<R>, at: &Vec<u64>, into: &mut Vectors<R>) {
        for (into, at) in into.data.iter_mut().zip(at) {
            *into = from.data[*at as usize];
        }
    }
}

/// into = base + delta, or into[at[i]] = base[i] + delta[i].
fn add<R: Real>(base: &[R], delta: &[R], at: Option<&Vec<u64>>, into: &mut [R]) {
    let sums = base.iter().zip(delta).map(|(b, d)| *b + *d);
    match at {
        None => into.iter_mut().zip(sums).for_each(|(into, sum)| *into = sum),
        Some(at) => at.iter().zip(sums).for_each(|(at, sum)| into[*at as usize] = sum),
    }
}
