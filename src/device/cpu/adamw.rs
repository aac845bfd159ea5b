//! The optimizer's arithmetic: AdamW (Loshchilov and Hutter 2019) on the difference to the base, as PyTorch computes
//! it, and clipping by the norm over all of a group's tensors (PyTorch's `clip_grad_norm_`).

use rayon::prelude::*;

use super::buffer::Vectors;
use super::precision::Precision;
use super::real::{Real, dot};
use super::{Cpu, Three};
use crate::device::ops::{AdamW, Trained};

/// Entries that one task takes; sums over an entry's block have one order whatever the threads.
const BLOCK: usize = 1 << 14;

/// What `clip_grad_norm_` adds to the norm before it divides.
const CLIP_EPSILON: f64 = 1e-6;

impl<P: Precision> Cpu<P> {
    pub(super) fn squares(&self, grad: &Vectors<P::Real>, rules: &[Option<AdamW>], sums: &mut Vectors<P::Real>) {
        for (g, _) in rules.iter().enumerate().filter(|(_, rule)| rule.is_some()) {
            let blocks: Vec<P::Real> = grad
                .of(g)
                .par_chunks(BLOCK)
                .map(|x| {
                    self.arch.run(
                        (),
                        #[inline(always)]
                        |()| dot(x, x),
                    )
                })
                .collect();
            let total: f64 = blocks.iter().map(|b| b.to_f64()).sum();
            sums.data[g] += P::Real::of(total);
        }
    }

    pub(super) fn adamw_step(
        &self,
        p: &mut Trained<Self>,
        grad: &Vectors<P::Real>,
        squares: &Vectors<P::Real>,
        rules: &[Option<AdamW>],
    ) {
        for (g, rule) in rules.iter().enumerate() {
            let Some(rule) = rule else { continue };
            let norm = squares.data[g].to_f64().sqrt();
            // As PyTorch: the factor is never above one, and a norm that is not finite is left to show itself.
            let clip = P::Real::of((rule.max_grad_norm / (norm + CLIP_EPSILON)).min(1.0));
            let (b1, b2) = (P::Real::of(rule.beta1), P::Real::of(rule.beta2));
            // 1 - beta in f64, as PyTorch: in f32 the difference loses half of its digits.
            let (rest1, rest2) = (P::Real::of(1.0 - rule.beta1), P::Real::of(1.0 - rule.beta2));
            let (rate, root) = rule.corrections();
            let (rate, root) = (P::Real::of(rate), P::Real::of(root));
            let decay = P::Real::of(rule.learning_rate * rule.weight_decay);
            let epsilon = P::Real::of(rule.epsilon);
            let base = p.base.of(g);
            let (delta, grad) = (p.delta.of_mut(g), grad.of(g));
            let (m, v) = (p.m.of_mut(g), p.v.of_mut(g));
            delta
                .par_chunks_mut(BLOCK)
                .zip(m.par_chunks_mut(BLOCK).zip(v.par_chunks_mut(BLOCK)))
                .zip(grad.par_chunks(BLOCK).zip(base.par_chunks(BLOCK)))
                .for_each(|((delta, (m, v)), (grad, base))| {
                    self.arch.run(
                        (delta, m, v),
                        #[inline(always)]
                        |(delta, m, v): Three<'_, P::Real>| {
                            for (((d, b), g), (m, v)) in
                                delta.iter_mut().zip(base).zip(grad).zip(m.iter_mut().zip(v.iter_mut()))
                            {
                                let g = *g * clip;
                                *m = b1.mul_add(*m, rest1 * g);
                                *v = b2.mul_add(*v, rest2 * g * g);
                                let step = rate * *m / (v.sqrt() / root + epsilon);
                                *d = *d - decay * (*b + *d) - step;
                            }
                        },
                    );
                });
        }
    }
}
