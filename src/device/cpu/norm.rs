//! LayerNorm with its residual, bias and dropout, forward and backward, a row at a time.
//!
//! Ba, Kiros and Hinton 2016: x^ = (z - mean z) / sigma, h = gamma x^ + beta; backward
//! dz = (gamma dh - mean(gamma dh) - x^ mean(gamma dh x^)) / sigma.

use rayon::prelude::*;

use super::buffer::Vectors;
use super::lines::with_scratch;
use super::precision::{Precision, Stored};
use super::real::{Real, lane_sum};
use super::{Act, CHUNK, Cpu, Row, Stream};
use crate::device::batch::Space;
use crate::device::ops::{Affine, Norm, Site, Sum};

/// h = gamma x^ + beta over `z`, made from the exact x^; x^ is kept as it is stored. Gives 1/sigma.
#[inline(always)]
fn normalise<R: Real, E: Stored<R>>(z: &mut [R], epsilon: R, gamma: &[R], beta: &[R], x_hat: &mut [E]) -> R {
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
    for (((z, kept), g), b) in z.iter_mut().zip(x_hat).zip(gamma).zip(beta) {
        let x = (*z - mean) * r_sigma;
        *kept = E::store(x);
        *z = x.mul_add(*g, *b);
    }
    r_sigma
}

/// gamma x^ + beta into `h`.
#[inline(always)]
fn scale_and_shift<R: Real, E: Stored<R>>(x_hat: &[E], gamma: &[R], beta: &[R], h: &mut [E]) {
    for (((h, x), g), b) in h.iter_mut().zip(x_hat).zip(gamma).zip(beta) {
        *h = E::store(x.load().mul_add(*g, *b));
    }
}

/// dz over dh.
#[inline(always)]
fn normalise_back<R: Real, E: Stored<R>>(dh: &mut [R], x_hat: &[E], gamma: &[R], r_sigma: R) {
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
        |j, s| (dh[j] * gamma[j]).mul_add(x_hat[j].load(), s),
    ) / count;
    for j in 0..n {
        dh[j] = r_sigma * (-x_hat[j].load()).mul_add(mean_x, dh[j] * gamma[j] - mean);
    }
}

/// What a chunk of rows writes to: three matrices' rows, and room for a mask.
type State<'c, R, E> = (&'c mut [R], &'c mut [E], &'c mut [R], &'c mut [R]);

impl<P: Precision> Cpu<P> {
    fn epsilon(&self) -> P::Real {
        P::Real::of(self.arithmetic.layer_norm_eps)
    }

    /// Calls `f` for each row of up to three matrices of one row space, in chunks over the threads, with room for the
    /// row's mask.
    fn each_row(
        &self,
        (x, x_hat, r_sigma): (&mut Stream<P>, &mut Act<P>, &mut Stream<P>),
        f: impl Fn(usize, Row, &mut [P::Real], &mut [P::Stored], &mut P::Real, &mut [P::Real]) + Sync,
    ) {
        let (space, n) = (x.space, x.cols);
        x.data
            .par_chunks_mut(CHUNK * n)
            .zip(x_hat.data.par_chunks_mut(CHUNK * n))
            .zip(r_sigma.data.par_chunks_mut(CHUNK))
            .enumerate()
            .for_each(|(chunk, ((x, x_hat), r_sigma))| {
                with_scratch(n, 0, |mask: &mut [P::Real], _: &mut [u8]| {
                    self.arch.run(
                        (x, x_hat, r_sigma, mask),
                        #[inline(always)]
                        |(x, x_hat, r_sigma, mask): State<'_, P::Real, P::Stored>| {
                            let rows = x.chunks_mut(n).zip(x_hat.chunks_mut(n)).zip(r_sigma);
                            for (i, ((x, x_hat), r)) in rows.enumerate() {
                                let i = chunk * CHUNK + i;
                                f(i, self.place(space, i), x, x_hat, r, mask);
                            }
                        },
                    );
                });
            });
    }

    pub(super) fn norm_forward(
        &self,
        mut x: Stream<P>,
        a: Stream<P>,
        b: &Vectors<P::Real>,
        ln: Affine<Self>,
        site: Site,
    ) -> (Stream<P>, Norm<Self>) {
        let (mut x_hat, mut r_sigma) = (self.mat(x.space, x.cols), self.mat(x.space, 1));
        let epsilon = self.epsilon();
        self.each_row(
            (&mut x, &mut x_hat, &mut r_sigma),
            #[inline(always)]
            |i, row, x, x_hat, r, mask| {
                let (a, b) = (a.row(i), b.of(row.group));
                match self.mask(row, 0, site, mask) {
                    Some(mask) => {
                        for (((x, a), b), m) in x.iter_mut().zip(a).zip(b).zip(mask) {
                            *x = (*a + *b).mul_add(*m, *x);
                        }
                    }
                    None => {
                        for ((x, a), b) in x.iter_mut().zip(a).zip(b) {
                            *x += *a + *b;
                        }
                    }
                }
                *r = normalise(x, epsilon, ln.gamma.of(row.group), ln.beta.of(row.group), x_hat);
            },
        );
        (x, Norm { x_hat, r_sigma })
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn norm_backward(
        &self,
        mut dh: Stream<P>,
        n: Norm<Self>,
        gamma: &Vectors<P::Real>,
        site: Site,
        db: Sum<Vectors<P::Real>>,
        dgamma: Sum<Vectors<P::Real>>,
        dbeta: Sum<Vectors<P::Real>>,
    ) -> (Stream<P>, Act<P>) {
        let Norm { mut x_hat, mut r_sigma } = n;
        self.column_sums(&dh, dbeta);
        self.sum_products(&dh, &x_hat, dgamma);
        self.each_row(
            (&mut dh, &mut x_hat, &mut r_sigma),
            #[inline(always)]
            |_, row, dh, x_hat, r, mask| {
                normalise_back(dh, x_hat, gamma.of(row.group), *r);
                match self.mask(row, 0, site, mask) {
                    Some(mask) => {
                        for ((da, dz), m) in x_hat.iter_mut().zip(dh.iter()).zip(mask) {
                            *da = P::Stored::store(*m * *dz);
                        }
                    }
                    None => {
                        for (da, dz) in x_hat.iter_mut().zip(dh.iter()) {
                            *da = P::Stored::store(*dz);
                        }
                    }
                }
            },
        );
        self.column_sums(&x_hat, db);
        (dh, x_hat)
    }

    /// Column sums of the element-wise product of two matrices.
    fn sum_products(&self, a: &Stream<P>, b: &Act<P>, into: Option<&mut Vectors<P::Real>>) {
        self.sum_rows(
            a.space,
            a.cols,
            into,
            #[inline(always)]
            |i, sums| {
                for ((sum, a), b) in sums.iter_mut().zip(a.row(i)).zip(b.row(i)) {
                    *sum = a.mul_add(b.load(), *sum);
                }
            },
        );
    }

    /// M * (gamma x^ + beta), rebuilt.
    pub(super) fn norm_again(&self, n: &Norm<Self>, ln: Affine<Self>, dropout: Option<Site>) -> Act<P> {
        let (space, cols) = (n.x_hat.space, n.x_hat.cols);
        let mut h: Act<P> = self.mat(space, cols);
        h.data.par_chunks_mut(CHUNK * cols).enumerate().for_each(|(chunk, h)| {
            with_scratch(cols, 0, |mask: &mut [P::Real], _: &mut [u8]| {
                self.arch.run(
                    (h, mask),
                    #[inline(always)]
                    |(h, mask): (&mut [P::Stored], &mut [P::Real])| {
                        for (i, h) in h.chunks_mut(cols).enumerate() {
                            let i = chunk * CHUNK + i;
                            let row = self.place(space, i);
                            scale_and_shift(n.x_hat.row(i), ln.gamma.of(row.group), ln.beta.of(row.group), h);
                            if let Some(mask) = dropout.and_then(|site| self.mask(row, 0, site, mask)) {
                                for (h, m) in h.iter_mut().zip(mask) {
                                    *h = P::Stored::store(h.load() * *m);
                                }
                            }
                        }
                    },
                );
            });
        });
        h
    }

    /// M * LN(z) for the embeddings, z written by `gather`.
    pub(super) fn norm_embeddings(
        &self,
        cols: usize,
        ln: Affine<Self>,
        site: Site,
        gather: impl Fn(usize, Row, &mut [P::Real]) + Sync,
    ) -> (Stream<P>, Norm<Self>) {
        let space = Space::Tokens;
        let (mut h, mut x_hat, mut r_sigma) = (self.mat(space, cols), self.mat(space, cols), self.mat(space, 1));
        let epsilon = self.epsilon();
        self.each_row(
            (&mut h, &mut x_hat, &mut r_sigma),
            #[inline(always)]
            |i, row, h, x_hat, r, mask| {
                gather(i, row, h);
                *r = normalise(h, epsilon, ln.gamma.of(row.group), ln.beta.of(row.group), x_hat);
                if let Some(mask) = self.mask(row, 0, site, mask) {
                    for (h, m) in h.iter_mut().zip(mask) {
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
        mut dx: Stream<P>,
        n: Option<Norm<Self>>,
        gamma: &Vectors<P::Real>,
        site: Site,
        dgamma: Sum<Vectors<P::Real>>,
        dbeta: Sum<Vectors<P::Real>>,
    ) -> Stream<P> {
        let (space, cols) = (dx.space, dx.cols);
        dx.data.par_chunks_mut(CHUNK * cols).enumerate().for_each(|(chunk, dx)| {
            with_scratch(cols, 0, |mask: &mut [P::Real], _: &mut [u8]| {
                self.arch.run(
                    (dx, mask),
                    #[inline(always)]
                    |(dx, mask): (&mut [P::Real], &mut [P::Real])| {
                        for (i, dx) in dx.chunks_mut(cols).enumerate() {
                            if let Some(mask) = self.mask(self.place(space, chunk * CHUNK + i), 0, site, mask) {
                                for (d, m) in dx.iter_mut().zip(mask) {
                                    *d *= *m;
                                }
                            }
                        }
                    },
                );
            });
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
