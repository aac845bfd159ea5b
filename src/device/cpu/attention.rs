//! Attention inside each sequence, a head at a time, forward and backward.
//!
//! S = Q K' / sqrt D, P = softmax S, O = (M * P) V. Kept is the log-sum-exp of each row of S, never P: the backward
//! rebuilds it (Dao et al. 2022, "FlashAttention", section 3.1 and appendix B.2, with dropout):
//! dP = M * (dO V'), dV = (M * P)' dO, dS = P * (dP - rowsum(dP * P)), dQ = dS K / sqrt D, dK = dS' Q / sqrt D.

use rayon::prelude::*;

use super::buffer::{Mat, Space};
use super::lines::with_scratch;
use super::precision::{Precision, Stored};
use super::product::panels::{Rows, Shared};
use super::product::strided::{View, small};
use super::real::{Real, dot, lane_sum};
use super::{Act, Cpu, Row, Stream, Three, multipliers};
use crate::device::ops::Site;

/// The part of a matrix that one task has to itself: a head's columns of a sequence's rows.
struct Part<'m, 's, E> {
    of: &'s Shared<'m, E>,
    /// First row, rows.
    rows: (usize, usize),
    /// First column, columns.
    cols: (usize, usize),
}

impl<E> Part<'_, '_, E> {
    #[inline(always)]
    fn row(&mut self, i: usize) -> &mut [E] {
        assert!(i < self.rows.1, "a row of the part");
        // SAFETY: `each_head` makes one part a head of a sequence, and heads have no columns, sequences no rows in
        // common.
        unsafe { self.of.row(self.rows.0 + i, self.cols.0..self.cols.0 + self.cols.1) }
    }

    /// All values, row after row.
    #[inline(always)]
    fn load<R: Real>(&mut self, to: &mut [R])
    where
        E: Stored<R>,
    {
        let cols = self.cols.1;
        for (i, to) in to.chunks_exact_mut(cols).enumerate() {
            for (to, x) in to.iter_mut().zip(self.row(i)) {
                *to = x.load();
            }
        }
    }

    /// Replaces all values.
    #[inline(always)]
    fn store<R: Real>(&mut self, from: &[R])
    where
        E: Stored<R>,
    {
        let cols = self.cols.1;
        for (i, from) in from.chunks_exact(cols).enumerate() {
            for (to, x) in self.row(i).iter_mut().zip(from) {
                *to = E::store(*x);
            }
        }
    }
}

/// One head of one sequence: `m` queries, `len` keys, `d` values each.
struct Head {
    sequence: usize,
    head: usize,
    m: usize,
    len: usize,
    d: usize,
}

fn share<E: super::Element>(m: &mut Mat<E>) -> Shared<'_, E> {
    Shared::new(Rows { data: &mut m.data, stride: m.cols })
}

impl<P: Precision> Cpu<P> {
    /// First row and rows of a sequence.
    fn rows_of(&self, space: Space, s: usize) -> (usize, usize) {
        match space {
            Space::Tokens => {
                let rows = self.batch.tokens_of(s);
                (rows.start, rows.len())
            }
            Space::Firsts => (s, 1),
        }
    }

    /// Calls `f` for every head of every sequence, over the threads. `queries` is the row space of the queries; keys
    /// have all rows.
    fn each_head(&self, queries: Space, h: usize, f: impl Fn(Head) + Sync) {
        let heads = self.arithmetic.n_heads;
        (0..self.batch.n_sequences() * heads).into_par_iter().for_each(|i| {
            let (sequence, head) = (i / heads, i % heads);
            let (m, len) = (self.rows_of(queries, sequence).1, self.rows_of(Space::Tokens, sequence).1);
            f(Head { sequence, head, m, len, d: h / heads });
        });
    }

    fn part<'m, 's, E>(&self, of: &'s Shared<'m, E>, space: Space, head: &Head, width: usize) -> Part<'m, 's, E> {
        Part { of, rows: self.rows_of(space, head.sequence), cols: (head.head * width, width) }
    }

    /// M * P of one head over P, row by row.
    #[inline(always)]
    fn drop_probabilities(&self, head: &Head, site: Site, p: &mut [P::Real], mask: &mut [P::Real]) {
        for (position, p) in p.chunks_mut(head.len).enumerate() {
            let row = Row { sequence: head.sequence, group: 0, position };
            if let Some(m) = self.mask(row, head.head, site) {
                multipliers(&m, mask);
                for (p, m) in p.iter_mut().zip(mask.iter()) {
                    *p *= *m;
                }
            }
        }
    }

    pub(super) fn attention_forward(&self, q: &Act<P>, k: &Act<P>, v: &Act<P>, site: Site) -> (Act<P>, Stream<P>) {
        let h = q.cols;
        let (mut o, mut lse) = (self.mat(q.space, h), self.mat(q.space, self.arithmetic.n_heads));
        let (o_shared, lse_shared) = (share(&mut o), share(&mut lse));
        self.each_head(q.space, h, |head| {
            let Head { m, len, d, .. } = head;
            let scale = P::Real::of(1.0 / (d as f64).sqrt());
            let mut o = self.part(&o_shared, q.space, &head, d);
            let mut lse = self.part(&lse_shared, q.space, &head, 1);
            let of = |x: &Act<P>, to: &mut [P::Real]| self.head_of(x, &head, to);
            with_scratch(2 * len * d + m * len + len, 2 * m * d, |keys: &mut [P::Real], queries: &mut [P::Real]| {
                let (ks, rest) = keys.split_at_mut(len * d);
                let (vs, rest) = rest.split_at_mut(len * d);
                let (p, mask) = rest.split_at_mut(m * len);
                let (qs, os) = queries.split_at_mut(m * d);
                self.arch.run(
                    (&mut *qs, &mut *ks, &mut *vs),
                    #[inline(always)]
                    |(qs, ks, vs): Three<'_, P::Real>| {
                        of(q, qs);
                        of(k, ks);
                        of(v, vs);
                    },
                );
                let (qs, ks, vs) = (View::new(qs, m, d), View::new(ks, len, d), View::new(vs, len, d));
                small(self.arch, p, len, qs, ks.t());
                self.arch.run(
                    (&mut *p, &mut *mask, &mut lse),
                    #[inline(always)]
                    |(p, mask, lse): Scored<'_, '_, '_, P>| {
                        for (i, row) in p.chunks_mut(len).enumerate() {
                            lse.row(i)[0] = softmax(row, scale);
                        }
                        self.drop_probabilities(&head, site, p, mask);
                    },
                );
                small(self.arch, os, d, View::new(p, m, len), vs);
                self.arch.run(
                    &mut o,
                    #[inline(always)]
                    |o: &mut Part<'_, '_, P::Stored>| o.store(os),
                );
            });
        });
        (o, lse)
    }

    /// A head's values of a sequence, row after row.
    #[inline(always)]
    fn head_of(&self, x: &Act<P>, head: &Head, to: &mut [P::Real]) {
        let (first, _) = self.rows_of(x.space, head.sequence);
        for (i, to) in to.chunks_exact_mut(head.d).enumerate() {
            for (to, x) in to.iter_mut().zip(&x.row(first + i)[head.head * head.d..]) {
                *to = x.load();
            }
        }
    }

    pub(super) fn attention_backward(
        &self,
        d_o: &Act<P>,
        (mut q, mut k, mut v): (Act<P>, Act<P>, Act<P>),
        lse: &Stream<P>,
        site: Site,
    ) -> (Act<P>, Act<P>, Act<P>) {
        let (h, space) = (q.cols, q.space);
        let (q_shared, k_shared, v_shared) = (share(&mut q), share(&mut k), share(&mut v));
        self.each_head(space, h, |head| {
            let Head { sequence, m, len, d, .. } = head;
            let scale = P::Real::of(1.0 / (d as f64).sqrt());
            let first = self.rows_of(space, sequence).0;
            let mut q = self.part(&q_shared, space, &head, d);
            let mut k = self.part(&k_shared, Space::Tokens, &head, d);
            let mut v = self.part(&v_shared, Space::Tokens, &head, d);
            let scores = 2 * m * len + len;
            with_scratch(scores, 3 * (m + len) * d, |scores: &mut [P::Real], rows: &mut [P::Real]| {
                let (p, rest) = scores.split_at_mut(m * len);
                let (dp, mask) = rest.split_at_mut(m * len);
                let (of_queries, of_keys) = rows.split_at_mut(3 * m * d);
                let (qs, rest) = of_queries.split_at_mut(m * d);
                let (d_os, dqs) = rest.split_at_mut(m * d);
                let (ks, rest) = of_keys.split_at_mut(len * d);
                let (vs, dks) = rest.split_at_mut(len * d);
                self.arch.run(
                    ((&mut *qs, &mut q), (&mut *ks, &mut k), (&mut *vs, &mut v), &mut *d_os),
                    #[inline(always)]
                    |((qs, q), (ks, k), (vs, v), d_os): Loaded<'_, '_, '_, P>| {
                        q.load(qs);
                        k.load(ks);
                        v.load(vs);
                        self.head_of(d_o, &head, d_os);
                    },
                );
                {
                    let (qs, ks) = (View::new(qs, m, d), View::new(ks, len, d));
                    let (vs, d_os) = (View::new(vs, len, d), View::new(d_os, m, d));
                    small(self.arch, p, len, qs, ks.t());
                    small(self.arch, dp, len, d_os, vs.t());
                }
                self.arch.run(
                    (&mut *p, &mut *dp, &mut *mask),
                    #[inline(always)]
                    |(p, dp, mask): Three<'_, P::Real>| {
                        for (position, (p, dp)) in p.chunks_mut(len).zip(dp.chunks_mut(len)).enumerate() {
                            let lse = lse.row(first + position)[head.head];
                            for p in p.iter_mut() {
                                *p = p.mul_add(scale, -lse).exp();
                            }
                            let row = Row { sequence, group: 0, position };
                            match self.mask(row, head.head, site) {
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
                let (p, dp) = (View::new(p, m, len), View::new(dp, m, len));
                small(self.arch, dqs, d, p, View::new(ks, len, d));
                small(self.arch, dks, d, p.t(), View::new(qs, m, d));
                small(self.arch, vs, d, dp.t(), View::new(d_os, m, d));
                self.arch.run(
                    (&mut q, &mut k, &mut v),
                    #[inline(always)]
                    |(q, k, v): Parts<'_, '_, '_, P>| {
                        q.store(dqs);
                        k.store(dks);
                        v.store(vs);
                    },
                );
            });
        });
        (q, k, v)
    }
}

/// Scores, room for a mask, and where the log-sum-exp is written.
type Scored<'m, 's, 'p, P> =
    (&'p mut [<P as Precision>::Real], &'p mut [<P as Precision>::Real], &'p mut Part<'m, 's, <P as Precision>::Real>);

/// The three inputs of one head, and where they are written.
type Parts<'m, 's, 'p, P> = (
    &'p mut Part<'m, 's, <P as Precision>::Stored>,
    &'p mut Part<'m, 's, <P as Precision>::Stored>,
    &'p mut Part<'m, 's, <P as Precision>::Stored>,
);

/// As [`Parts`], each beside the memory it is loaded to, and the memory of dO.
type Loaded<'m, 's, 'p, P> = (
    (&'p mut [<P as Precision>::Real], &'p mut Part<'m, 's, <P as Precision>::Stored>),
    (&'p mut [<P as Precision>::Real], &'p mut Part<'m, 's, <P as Precision>::Stored>),
    (&'p mut [<P as Precision>::Real], &'p mut Part<'m, 's, <P as Precision>::Stored>),
    &'p mut [<P as Precision>::Real],
);

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
