//! Attention inside each sequence, a head at a time, forward and backward.
//!
//! S = Q K' / sqrt D, P = softmax S, O = (M * P) V. Kept is the log-sum-exp of each row of S, never P: the backward
//! rebuilds it (Dao et al. 2022, "FlashAttention", section 3.1 and appendix B.2, with dropout):
//! dP = M * (dO V'), dV = (M * P)' dO, dS = P * (dP - rowsum(dP * P)), dQ = dS K / sqrt D, dK = dS' Q / sqrt D.
//! M * P and dS are rounded as activations are stored.

use rayon::prelude::*;

use super::buffer::Mat;
use super::lines::with_scratch;
use super::precision::{Precision, Stored};
use super::product::panels::{Rows, Shared};
use super::product::small::Operand;
use super::product::strided::View;
use super::real::{LANES, Real, dot, lane_sum};
use super::{Act, Cpu, Row, Stream, Three};
use crate::device::batch::Space;
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
        // SAFETY: whoever made the part promised that nobody else holds these columns of these rows.
        unsafe { self.of.row(self.rows.0 + i, self.cols.0..self.cols.0 + self.cols.1) }
    }

    /// Asks for all rows to be brought near.
    fn prefetch(&self) {
        for i in 0..self.rows.1 {
            self.of.prefetch(self.rows.0 + i, self.cols.0..self.cols.0 + self.cols.1);
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

    /// A head's part of a matrix.
    ///
    /// # Safety
    ///
    /// At most one part of a head of a sequence may exist at a time. Heads have no columns, sequences no rows in common.
    unsafe fn part<'m, 's, E>(
        &self,
        of: &'s Shared<'m, E>,
        space: Space,
        head: &Head,
        width: usize,
    ) -> Part<'m, 's, E> {
        Part { of, rows: self.rows_of(space, head.sequence), cols: (head.head * width, width) }
    }

    /// The multipliers of a query's keys, written to `room`; none where nothing is dropped.
    #[inline(always)]
    fn mask_of<'r>(&self, head: &Head, position: usize, site: Site, room: &'r mut [P::Real]) -> Option<&'r [P::Real]> {
        self.mask(Row { sequence: head.sequence, group: 0, position }, head.head, site, room)
    }

    /// A head's values of a sequence, as they lie.
    fn head_of<'x, E: super::Element>(&self, x: &'x Mat<E>, head: &Head) -> View<'x, E> {
        let (first, rows) = self.rows_of(x.space, head.sequence);
        View::strided(&x.data[first * x.cols + head.head * head.d..], rows, head.d, x.cols)
    }

    pub(super) fn attention_forward(&self, q: &Act<P>, k: &Act<P>, v: &Act<P>, site: Site) -> (Act<P>, Stream<P>) {
        let h = q.cols;
        let (mut o, mut lse) = (self.mat(q.space, h), self.mat(q.space, self.arithmetic.n_heads));
        let (o_shared, lse_shared) = (share(&mut o), share(&mut lse));
        self.each_head(q.space, h, |head| {
            let Head { m, len, d, .. } = head;
            let scale = P::Real::of(1.0 / (d as f64).sqrt());
            // SAFETY: `each_head` calls this once a head of a sequence.
            let mut o = unsafe { self.part(&o_shared, q.space, &head, d) };
            // SAFETY: as above.
            let mut lse = unsafe { self.part(&lse_shared, q.space, &head, 1) };
            let (qs, ks, vs) = (self.head_of(q, &head), self.head_of(k, &head), self.head_of(v, &head));
            // A head's rows lie far apart, where the processor does not look for them by itself.
            [ks, qs, vs].iter().for_each(View::prefetch);
            with_scratch(m * len + len + m * d, m * len, |scratch: &mut [P::Real], p: &mut [P::Stored]| {
                let (scores, rest) = scratch.split_at_mut(m * len);
                let (mask, os) = rest.split_at_mut(len);
                P::Stored::multiply(self.arch, scores, len, qs, ks.t());
                self.arch.run(
                    (&mut *scores, &mut *p, &mut *mask, &mut lse),
                    #[inline(always)]
                    |(scores, p, mask, lse): Scored<'_, '_, '_, P>| {
                        for (position, (s, p)) in scores.chunks_mut(len).zip(p.chunks_mut(len)).enumerate() {
                            lse.row(position)[0] = softmax(s, scale, self.mask_of(&head, position, site, mask), p);
                        }
                    },
                );
                P::Stored::multiply(self.arch, os, d, View::new(p, m, len), vs);
                self.arch.run(
                    &mut o,
                    #[inline(always)]
                    |o: &mut Part<'_, '_, P::Stored>| o.store(os),
                );
            });
        });
        (o, lse)
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
            // SAFETY: `each_head` calls this once a head of a sequence.
            let mut q = unsafe { self.part(&q_shared, space, &head, d) };
            // SAFETY: as above.
            let mut k = unsafe { self.part(&k_shared, Space::Tokens, &head, d) };
            // SAFETY: as above.
            let mut v = unsafe { self.part(&v_shared, Space::Tokens, &head, d) };
            let (queries, keys, scores) = (m * d, len * d, m * len);
            let wide = 2 * scores + len + queries + 2 * keys;
            with_scratch(wide, queries + 2 * keys + 2 * scores, |wide: &mut [P::Real], stored: &mut [P::Stored]| {
                let [s, dp, mask, dqs, dks, dvs] = split(wide, [scores, scores, len, queries, keys, keys]);
                let [qs, ks, vs, p, ds] = split(stored, [queries, keys, keys, scores, scores]);
                [&q, &k, &v].iter().for_each(|part| part.prefetch());
                let d_os = self.head_of(d_o, &head);
                d_os.prefetch();
                for (part, to) in [(&mut q, &mut *qs), (&mut k, &mut *ks), (&mut v, &mut *vs)] {
                    for (i, to) in to.chunks_exact_mut(d).enumerate() {
                        to.copy_from_slice(part.row(i));
                    }
                }
                let (qs, ks, vs) = (View::new(qs, m, d), View::new(ks, len, d), View::new(vs, len, d));
                P::Stored::multiply(self.arch, s, len, qs, ks.t());
                P::Stored::multiply(self.arch, dp, len, d_os, vs.t());
                self.arch.run(
                    ((&mut *s, &mut *dp, &mut *mask), (&mut *p, &mut *ds)),
                    #[inline(always)]
                    |((s, dp, mask), (p, ds)): Gradients<'_, P>| {
                        let rows = s.chunks_mut(len).zip(dp.chunks_mut(len));
                        let to = p.chunks_mut(len).zip(ds.chunks_mut(len));
                        for (position, ((s, dp), (p, ds))) in rows.zip(to).enumerate() {
                            let lse = lse.row(first + position)[head.head];
                            for s in s.iter_mut() {
                                *s = s.mul_add(scale, -lse).exp();
                            }
                            score_gradient(s, dp, self.mask_of(&head, position, site, mask), scale, p, ds);
                        }
                    },
                );
                let (p, ds) = (View::new(p, m, len), View::new(ds, m, len));
                P::Stored::multiply(self.arch, dqs, d, ds, ks);
                P::Stored::multiply(self.arch, dks, d, ds.t(), qs);
                P::Stored::multiply(self.arch, dvs, d, p.t(), d_os);
                self.arch.run(
                    (&mut q, &mut k, &mut v),
                    #[inline(always)]
                    |(q, k, v): Parts<'_, '_, '_, P>| {
                        q.store(dqs);
                        k.store(dks);
                        v.store(dvs);
                    },
                );
            });
        });
        (q, k, v)
    }
}

/// Parts of so many elements each, which are all there are.
fn split<E, const N: usize>(mut all: &mut [E], lengths: [usize; N]) -> [&mut [E]; N] {
    lengths.map(|n| all.split_off_mut(..n).expect("parts are as long as the whole"))
}

/// Scores, where M * P is written, room for a mask, and where the log-sum-exp is written.
type Scored<'m, 's, 'p, P> = (
    &'p mut [<P as Precision>::Real],
    &'p mut [<P as Precision>::Stored],
    &'p mut [<P as Precision>::Real],
    &'p mut Part<'m, 's, <P as Precision>::Real>,
);

/// Scores, dO V' and room for a mask; where M * P and dS are written.
type Gradients<'p, P> =
    (Three<'p, <P as Precision>::Real>, (&'p mut [<P as Precision>::Stored], &'p mut [<P as Precision>::Stored]));

/// The three inputs of one head, and where they are written.
type Parts<'m, 's, 'p, P> = (
    &'p mut Part<'m, 's, <P as Precision>::Stored>,
    &'p mut Part<'m, 's, <P as Precision>::Stored>,
    &'p mut Part<'m, 's, <P as Precision>::Stored>,
);

/// The largest of at least one number, in lanes.
#[inline(always)]
fn largest<R: Real>(s: &[R]) -> R {
    let mut lanes = [s[0]; LANES];
    let (whole, rest) = s.as_chunks::<LANES>();
    for part in whole {
        for (lane, x) in lanes.iter_mut().zip(part) {
            *lane = lane.max(*x);
        }
    }
    lanes.iter().chain(rest).fold(s[0], |top, x| top.max(*x))
}

/// M * softmax(scale * s) to `p`; gives the log-sum-exp.
#[inline(always)]
fn softmax<R: Real, E: Stored<R>>(s: &mut [R], scale: R, mask: Option<&[R]>, p: &mut [E]) -> R {
    let top = largest(s) * scale;
    for x in s.iter_mut() {
        *x = x.mul_add(scale, -top).exp();
    }
    let sum = lane_sum(
        s.len(),
        #[inline(always)]
        |j, sum| sum + s[j],
    );
    let inverse = R::ONE / sum;
    match mask {
        Some(mask) => {
            for ((p, x), m) in p.iter_mut().zip(s.iter()).zip(mask) {
                *p = E::store(*x * inverse * *m);
            }
        }
        None => {
            for (p, x) in p.iter_mut().zip(s.iter()) {
                *p = E::store(*x * inverse);
            }
        }
    }
    top + sum.ln()
}

/// From P and dO V': M * P to `masked`, dS / sqrt D to `ds`.
#[inline(always)]
fn score_gradient<R: Real, E: Stored<R>>(
    p: &[R],
    dp: &mut [R],
    mask: Option<&[R]>,
    scale: R,
    masked: &mut [E],
    ds: &mut [E],
) {
    match mask {
        Some(mask) => {
            for (((dp, m), p), masked) in dp.iter_mut().zip(mask).zip(p).zip(masked) {
                *dp *= *m;
                *masked = E::store(*m * *p);
            }
        }
        None => {
            for (p, masked) in p.iter().zip(masked) {
                *masked = E::store(*p);
            }
        }
    }
    let c = dot(p, dp);
    for ((p, dp), ds) in p.iter().zip(dp.iter()).zip(ds) {
        *ds = E::store(*p * (*dp - c) * scale);
    }
}
