//! Attention inside each sequence, a head at a time, forward and backward.
//!
//! S = Q K' / sqrt D, P = softmax S, O = (M * P) V. Kept is the log-sum-exp of each row of S, never P: the backward
//! rebuilds it (Dao et al. 2022, "FlashAttention", section 3.1 and appendix B.2, with dropout):
//! dP = M * (dO V'), dV = (M * P)' dO, dS = P * (dP - rowsum(dP * P)), dQ = dS K / sqrt D, dK = dS' Q / sqrt D.

use std::ops::Range;

use rayon::prelude::*;

use super::buffer::{Mat, Space};
use super::product::{Into, View, product_alone};
use super::real::{Real, dot, lane_sum};
use super::{Cpu, Row, multipliers};
use crate::device::ops::Site;

/// Cuts a matrix into each sequence's own rows.
fn by_sequence<'m, R: Real>(m: &'m mut Mat<R>, rows: &[Range<usize>]) -> Vec<&'m mut [R]> {
    let cols = m.cols;
    let mut rest = &mut m.data[..];
    rows.iter()
        .map(|r| {
            let (own, after) = std::mem::take(&mut rest).split_at_mut(r.len() * cols);
            rest = after;
            own
        })
        .collect()
}

impl<R: Real> Cpu<R> {
    fn rows_by_sequence(&self, space: Space) -> Vec<Range<usize>> {
        (0..self.batch.n_sequences())
            .map(|s| match space {
                Space::Tokens => self.batch.tokens_of(s),
                Space::Firsts => s..s + 1,
            })
            .collect()
    }

    /// M * P of one head over P, row by row.
    #[inline(always)]
    fn drop_probabilities(&self, s: usize, head: usize, site: Site, p: &mut [R], len: usize, mask: &mut [R]) {
        for (position, p) in p.chunks_mut(len).enumerate() {
            let row = Row { sequence: s, group: 0, position };
            if let Some(m) = self.mask(row, head, site) {
                multipliers(&m, mask);
                for (p, m) in p.iter_mut().zip(mask.iter()) {
                    *p *= *m;
                }
            }
        }
    }

    pub(super) fn attention_forward(&self, q: &Mat<R>, k: &Mat<R>, v: &Mat<R>, site: Site) -> (Mat<R>, Mat<R>) {
        let (h, heads) = (q.cols, self.arithmetic.n_heads);
        let d = h / heads;
        let scale = R::of(1.0 / (d as f64).sqrt());
        let (mut o, mut lse) = (self.mat(q.space, h), self.mat(q.space, heads));
        let (queries, keys) = (self.rows_by_sequence(q.space), self.rows_by_sequence(k.space));
        // A power of two, so that batches of many lengths share a few sizes of scratch.
        let longest = keys.iter().map(Range::len).max().unwrap_or(0).next_power_of_two();
        let room = (longest + 1) * longest;
        by_sequence(&mut o, &queries).into_par_iter().zip(by_sequence(&mut lse, &queries)).enumerate().for_each(
            |(s, (o, lse))| {
                let (m, len) = (queries[s].len(), keys[s].len());
                let mut scratch = self.pool.take(room, room);
                let (p, mask) = scratch.split_at_mut(longest * longest);
                let (p, mask) = (&mut p[..m * len], &mut mask[..len]);
                for head in 0..heads {
                    let q = View::strided(&q.data[queries[s].start * h + head * d..], m, d, h);
                    let k = View::strided(&k.data[keys[s].start * h + head * d..], len, d, h);
                    let v = View::strided(&v.data[keys[s].start * h + head * d..], len, d, h);
                    product_alone(p, len, Into::Store, q, k.t(), 1);
                    let state = (&mut *p, &mut *lse, &mut *mask);
                    self.arch.run(
                        state,
                        #[inline(always)]
                        |(p, lse, mask): (&mut [R], &mut [R], &mut [R])| {
                            for (row, lse) in p.chunks_mut(len).zip(lse.chunks_mut(heads)) {
                                lse[head] = softmax(row, scale);
                            }
                            self.drop_probabilities(s, head, site, p, len, mask);
                        },
                    );
                    product_alone(&mut o[head * d..], h, Into::Store, View::new(p, m, len), v, 1);
                }
            },
        );
        (o, lse)
    }

    pub(super) fn attention_backward(
        &self,
        d_o: &Mat<R>,
        (mut q, mut k, mut v): (Mat<R>, Mat<R>, Mat<R>),
        lse: &Mat<R>,
        site: Site,
    ) -> (Mat<R>, Mat<R>, Mat<R>) {
        let (h, heads) = (q.cols, self.arithmetic.n_heads);
        let d = h / heads;
        let scale = R::of(1.0 / (d as f64).sqrt());
        let (queries, keys) = (self.rows_by_sequence(q.space), self.rows_by_sequence(k.space));
        // A power of two, so that batches of many lengths share a few sizes of scratch.
        let longest = keys.iter().map(Range::len).max().unwrap_or(0).next_power_of_two();
        let room = longest * (2 * longest + 2 * d + 1);
        let q_rows = by_sequence(&mut q, &queries);
        let k_rows = by_sequence(&mut k, &keys);
        let v_rows = by_sequence(&mut v, &keys);
        q_rows.into_par_iter().zip(k_rows).zip(v_rows).enumerate().for_each(|(s, ((q, k), v))| {
            let (m, len) = (queries[s].len(), keys[s].len());
            let mut scratch = self.pool.take(room, room);
            let (p, rest) = scratch.split_at_mut(longest * longest);
            let (dp, rest) = rest.split_at_mut(longest * longest);
            let (dq, rest) = rest.split_at_mut(longest * d);
            let (dk, mask) = rest.split_at_mut(longest * d);
            let (p, dp, mask) = (&mut p[..m * len], &mut dp[..m * len], &mut mask[..len]);
            let (dq, dk) = (&mut dq[..m * d], &mut dk[..len * d]);
            for head in 0..heads {
                let at = head * d;
                let d_o = View::strided(&d_o.data[queries[s].start * h + at..], m, d, h);
                let qs = View::strided(&q[at..], m, d, h);
                let ks = View::strided(&k[at..], len, d, h);
                product_alone(p, len, Into::Store, qs, ks.t(), 1);
                product_alone(dp, len, Into::Store, d_o, View::strided(&v[at..], len, d, h).t(), 1);
                let state = (&mut *p, &mut *dp, &mut *mask);
                self.arch.run(
                    state,
                    #[inline(always)]
                    |(p, dp, mask): (&mut [R], &mut [R], &mut [R])| {
                        for (position, (p, dp)) in p.chunks_mut(len).zip(dp.chunks_mut(len)).enumerate() {
                            let lse = lse.data[(queries[s].start + position) * heads + head];
                            for p in p.iter_mut() {
                                *p = p.mul_add(scale, -lse).exp();
                            }
                            let row = Row { sequence: s, group: 0, position };
                            match self.mask(row, head, site) {
                                Some(m) => {
                                    multipliers(&m, mask);
                                    score_gradient(p, dp, Some(mask), scale);
                                }
                                None => score_gradient(p, dp, None, scale),
                            }
                        }
                    },
                );
                // `p` holds dS / sqrt D now, `dp` holds M * P.
                product_alone(dq, d, Into::Store, View::new(p, m, len), ks, 1);
                product_alone(dk, d, Into::Store, View::new(p, m, len).t(), qs, 1);
                product_alone(&mut v[at..], h, Into::Store, View::new(dp, m, len).t(), d_o, 1);
                for (to, from) in q.chunks_mut(h).zip(dq.chunks(d)) {
                    to[at..at + d].copy_from_slice(from);
                }
                for (to, from) in k.chunks_mut(h).zip(dk.chunks(d)) {
                    to[at..at + d].copy_from_slice(from);
                }
            }
        });
        (q, k, v)
    }
}

/// softmax(scale * s) over s; gives the log-sum-exp.
#[inline(always)]
fn softmax<R: Real>(s: &mut [R], scale: R) -> R {
    let top = s.iter().fold(s[0], |top, x| top.max(*x)) * scale;
    for x in s.iter_mut() {
        *x = x.mul_add(scale, -top).exp();
    }
    let sum = lane_sum(
        s.len(),
        #[inline(always)]
        |j, sum| sum + s[j],
    );
    let inverse = R::ONE / sum;
    for x in s.iter_mut() {
        *x *= inverse;
    }
    top + sum.ln()
}

/// From P and dO V': dS / sqrt D over P, and M * P over dO V'.
#[inline(always)]
fn score_gradient<R: Real>(p: &mut [R], dp: &mut [R], mask: Option<&[R]>, scale: R) {
    match mask {
        Some(mask) => {
            for (dp, m) in dp.iter_mut().zip(mask) {
                *dp *= *m;
            }
            let c = dot(p, dp);
            for ((p, dp), m) in p.iter_mut().zip(dp.iter_mut()).zip(mask) {
                let (probability, gradient) = (*p, *dp);
                *p = probability * (gradient - c) * scale;
                *dp = *m * probability;
            }
        }
        None => {
            let c = dot(p, dp);
            for (p, dp) in p.iter_mut().zip(dp.iter_mut()) {
                let (probability, gradient) = (*p, *dp);
                *p = probability * (gradient - c) * scale;
                *dp = probability;
            }
        }
    }
}
