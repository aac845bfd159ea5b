//! LayerNorm with its residual, bias and dropout, forward and backward, a row at a time.
//!
//! Ba, Kiros and Hinton 2016: x^ = (z - mean z) / sigma, h = gamma x^ + beta; backward
//! dz = (gamma dh - mean(gamma dh) - x^ mean(gamma dh x^)) / sigma.

use rayon::prelude::*;

use super::buffer::{Mat, Space};
use super::real::{Real, lane_sum};
use super::{CHUNK, Cpu, Row, multipliers};
use crate::device::ops::{Affine, Norm, Site, Sum};

/// x^ of `z` into `x_hat`; gives 1/sigma.
#[inline(always)]
fn normalise<R: Real>(z: &[R], epsilon: R, x_hat: &mut [R]) -> R {
    let n = z.len();
    let count = R::of(n as f64);
    let mean = lane_sum(
        n,
        #[inline(always)]
        |j, s: R| s + z[j],
    ) / count;
    let variance = lane_sum(
        n,
        #[inline(always)]
        |j, s| (z[j] - mean).mul_add(z[j] - mean, s),
    ) / count;
    let r_sigma = R::ONE / (variance + epsilon).sqrt();
    for (x, z) in x_hat.iter_mut().zip(z) {
        *x = (*z - mean) * r_sigma;
    }
    r_sigma
}

/// gamma x^ + beta into `h`.
#[inline(always)]
fn scale_and_shift<R: Real>(x_hat: &[R], gamma: &[R], beta: &[R], h: &mut [R]) {
    for (((h, x), g), b) in h.iter_mut().zip(x_hat).zip(gamma).zip(beta) {
        *h = x.mul_add(*g, *b);
    }
}

/// dz over dh.
#[inline(always)]
fn normalise_back<R: Real>(dh: &mut [R], x_hat: &[R], gamma: &[R], r_sigma: R) {
    let n = dh.len();
    let (x_hat, gamma, count) = (&x_hat[..n], &gamma[..n], R::of(n as f64));
    let mean = lane_sum(
        n,
        #[inline(always)]
        |j, s| dh[j].mul_add(gamma[j], s),
    ) / count;
    let mean_x = lane_sum(
        n,
        #[inline(always)]
        |j, s| (dh[j] * gamma[j]).mul_add(x_hat[j], s),
    ) / count;
    for j in 0..n {
        dh[j] = r_sigma * (-x_hat[j]).mul_add(mean_x, dh[j] * gamma[j] - mean);
    }
}

/// What a chunk of rows writes to: three matrices' rows, and room for a mask.
type State<'c, R> = (&'c mut [R], &'c mut [R], &'c mut [R], &'c mut [R]);

impl<R: Real> Cpu<R> {
    fn epsilon(&self) -> R {
        R::of(self.arithmetic.layer_norm_eps)
    }

    /// Calls `f` for each row of up to three matrices of one row space, in chunks over the threads, with room for the
    /// row's mask.
    fn each_row(
        &self,
        (x, x_hat, r_sigma): (&mut Mat<R>, &mut Mat<R>, &mut Mat<R>),
        f: impl Fn(usize, Row, &mut [R], &mut [R], &mut R, &mut [R]) + Sync,
    ) {
        let (space, n) = (x.space, x.cols);
        x.data
            .par_chunks_mut(CHUNK * n)
            .zip(x_hat.data.par_chunks_mut(CHUNK * n))
            .zip(r_sigma.data.par_chunks_mut(CHUNK))
            .enumerate()
            .for_each(|(chunk, ((x, x_hat), r_sigma))| {
                let mut mask = self.pool.take(n, n);
                let state = (x, x_hat, r_sigma, &mut mask[..]);
                self.arch.run(
                    state,
                    #[inline(always)]
                    |(x, x_hat, r_sigma, mask): State<'_, R>| {
                        let rows = x.chunks_mut(n).zip(x_hat.chunks_mut(n)).zip(r_sigma);
                        for (i, ((x, x_hat), r)) in rows.enumerate() {
                            let i = chunk * CHUNK + i;
                            f(i, self.place(space, i), x, x_hat, r, mask);
                        }
                    },
                );
            });
    }

    pub(super) fn norm_forward(
        &self,
        mut x: Mat<R>,
        a: Mat<R>,
        b: &super::Vectors<R>,
        ln: Affine<Self>,
        site: Site,
    ) -> (Mat<R>, Norm<Self>) {
        let (mut x_hat, mut r_sigma) = (self.mat(x.space, x.cols), self.mat(x.space, 1));
        let epsilon = self.epsilon();
        self.each_row(
            (&mut x, &mut x_hat, &mut r_sigma),
            #[inline(always)]
            |i, row, x, x_hat, r, mask| {
                let (a, b) = (a.row(i), b.of(row.group));
                match self.mask(row, 0, site) {
                    Some(m) => {
                        multipliers(&m, mask);
                        for (((x, a), b), m) in x.iter_mut().zip(a).zip(b).zip(mask.iter()) {
                            *x = (*a + *b).mul_add(*m, *x);
                        }
                    }
                    None => {
                        for ((x, a), b) in x.iter_mut().zip(a).zip(b) {
                            *x += *a + *b;
                        }
                    }
                }
                *r = normalise(x, epsilon, x_hat);
                scale_and_shift(x_hat, ln.gamma.of(row.group), ln.beta.of(row.group), x);
            },
        );
        (x, Norm { x_hat, r_sigma })
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn norm_backward(
        &self,
        mut dh: Mat<R>,
        n: Norm<Self>,
        gamma: &super::Vectors<R>,
        site: Site,
        db: Sum<super::Vectors<R>>,
        dgamma: Sum<super::Vectors<R>>,
        dbeta: Sum<super::Vectors<R>>,
    ) -> (Mat<R>, Mat<R>) {
        let Norm { mut x_hat, mut r_sigma } = n;
        self.column_sums(&dh, dbeta);
        self.sum_products(&dh, &x_hat, dgamma);
        self.each_row(
            (&mut dh, &mut x_hat, &mut r_sigma),
            #[inline(always)]
            |_, row, dh, x_hat, r, mask| {
                normalise_back(dh, x_hat, gamma.of(row.group), *r);
                match self.mask(row, 0, site) {
                    Some(m) => {
                        multipliers(&m, mask);
                        for ((da, dz), m) in x_hat.iter_mut().zip(dh.iter()).zip(mask.iter()) {
                            *da = *m * *dz;
                        }
                    }
                    None => x_hat.copy_from_slice(dh),
                }
            },
        );
        self.column_sums(&x_hat, db);
        (dh, x_hat)
    }

    /// Column sums of the element-wise product of two matrices.
    fn sum_products(&self, a: &Mat<R>, b: &Mat<R>, into: Option<&mut super::Vectors<R>>) {
        self.sum_rows(
            a.space,
            a.cols,
            into,
            #[inline(always)]
            |i, _, sums| {
                for ((sum, a), b) in sums.iter_mut().zip(a.row(i)).zip(b.row(i)) {
                    *sum = a.mul_add(*b, *sum);
                }
            },
        );
    }

    /// M * (gamma x^ + beta), rebuilt.
    pub(super) fn norm_again(&self, n: &Norm<Self>, ln: Affine<Self>, dropout: Option<Site>) -> Mat<R> {
        let (space, cols) = (n.x_hat.space, n.x_hat.cols);
        let mut h = self.mat(space, cols);
        h.data.par_chunks_mut(CHUNK * cols).enumerate().for_each(|(chunk, h)| {
            let mut mask = self.pool.take(cols, cols);
            self.arch.run(
                (h, &mut mask[..]),
                #[inline(always)]
                |(h, mask): (&mut [R], &mut [R])| {
                    for (i, h) in h.chunks_mut(cols).enumerate() {
                        let i = chunk * CHUNK + i;
                        let row = self.place(space, i);
                        scale_and_shift(n.x_hat.row(i), ln.gamma.of(row.group), ln.beta.of(row.group), h);
                        if let Some(m) = dropout.and_then(|site| self.mask(row, 0, site)) {
                            multipliers(&m, mask);
                            for (h, m) in h.iter_mut().zip(mask.iter()) {
                                *h *= *m;
                            }
                        }
                    }
                },
            );
        });
        h
    }

    /// M * LN(z) for the embeddings, z written by `gather`.
    pub(super) fn norm_embeddings(
        &self,
        cols: usize,
        ln: Affine<Self>,
        site: Site,
        gather: impl Fn(usize, Row, &mut [R]) + Sync,
    ) -> (Mat<R>, Norm<Self>) {
        let space = Space::Tokens;
        let (mut h, mut x_hat, mut r_sigma) = (self.mat(space, cols), self.mat(space, cols), self.mat(space, 1));
        let epsilon = self.epsilon();
        self.each_row(
            (&mut h, &mut x_hat, &mut r_sigma),
            #[inline(always)]
            |i, row, h, x_hat, r, mask| {
                gather(i, row, h);
                *r = normalise(h, epsilon, x_hat);
                scale_and_shift(x_hat, ln.gamma.of(row.group), ln.beta.of(row.group), h);
                if let Some(m) = self.mask(row, 0, site) {
                    multipliers(&m, mask);
                    for (h, m) in h.iter_mut().zip(mask.iter()) {
                        *h *= *m;
                    }
                }
            },
        );
        (h, Norm { x_hat, r_sigma })
    }

    /// The embeddings' way back: the mask over `dx`, the LayerNorm's gradients, and, where x^ was kept, dz over `dx`.
    pub(super) fn norm_embeddings_back(
        &self,
        mut dx: Mat<R>,
        n: Option<Norm<Self>>,
        gamma: &super::Vectors<R>,
        site: Site,
        dgamma: Sum<super::Vectors<R>>,
        dbeta: Sum<super::Vectors<R>>,
    ) -> Mat<R> {
        let (space, cols) = (dx.space, dx.cols);
        dx.data.par_chunks_mut(CHUNK * cols).enumerate().for_each(|(chunk, dx)| {
            let mut mask = self.pool.take(cols, cols);
            self.arch.run(
                (dx, &mut mask[..]),
                #[inline(always)]
                |(dx, mask): (&mut [R], &mut [R])| {
                    for (i, dx) in dx.chunks_mut(cols).enumerate() {
                        if let Some(m) = self.mask(self.place(space, chunk * CHUNK + i), 0, site) {
                            multipliers(&m, mask);
                            for (d, m) in dx.iter_mut().zip(mask.iter()) {
                                *d *= *m;
                            }
                        }
                    }
                },
            );
        });
        self.column_sums(&dx, dbeta);
        let Some(Norm { mut x_hat, mut r_sigma }) = n else { return dx };
        self.sum_products(&dx, &x_hat, dgamma);
        self.each_row(
            (&mut dx, &mut x_hat, &mut r_sigma),
            #[inline(always)]
            |_, row, dx, x_hat, r, _| {
                normalise_back(dx, x_hat, gamma.of(row.group), *r);
            },
        );
        dx
    }
}
