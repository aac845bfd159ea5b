//! Frozen weights, laid out so that a product reads them as they lie: once a direction, for x W' and for dy W. The
//! second is made when the first backward, or the first run that trains weights, asks for it: inference never does.

use std::sync::OnceLock;

use super::precision::Precision;
use super::product::layout::Layout;
use super::simd::Arch;

/// A weight of a linear layer, (out, in).
pub struct Weight<P: Precision> {
    arch: Arch,
    n_out: usize,
    n_in: usize,
    /// (in, out).
    forward: P::Layout,
    /// (out, in).
    backward: OnceLock<P::Layout>,
}

impl<P: Precision> Weight<P> {
    /// Lays out row-major values (out, in) for the forward.
    pub fn new(arch: Arch, n_out: usize, n_in: usize, values: &[P::Real]) -> Self {
        assert_eq!(values.len(), n_out * n_in, "a weight has out * in values");
        let forward = P::Layout::pack(arch, n_in, n_out, |i, o| values[o * n_in + i]);
        Weight { arch, n_out, n_in, forward, backward: OnceLock::new() }
    }

    /// Output features.
    pub fn n_out(&self) -> usize {
        self.n_out
    }

    /// Input features.
    pub fn n_in(&self) -> usize {
        self.n_in
    }

    /// W', for x W'.
    pub fn for_forward(&self) -> &P::Layout {
        &self.forward
    }

    /// W, for dy W; laid out where it is not yet.
    pub fn for_backward(&self) -> &P::Layout {
        if let Some(backward) = self.backward.get() {
            return backward;
        }
        // Outside the cell's lock: a thread that packs under it could be handed a job that waits for this very cell.
        let packed = P::Layout::pack(self.arch, self.n_out, self.n_in, |o, i| self.forward.at(i, o));
        self.backward.get_or_init(|| packed)
    }
}

/// What training writes over: values at flat, row-major positions.
pub trait Values<R> {
    /// Replaces all values.
    fn rewrite(&mut self, value: impl Fn(usize) -> R + Sync);
    /// Replaces the value at a position.
    fn set(&mut self, at: usize, value: R);
}

impl<R> Values<R> for [R] {
    fn rewrite(&mut self, value: impl Fn(usize) -> R + Sync) {
        self.iter_mut().enumerate().for_each(|(at, to)| *to = value(at));
    }

    fn set(&mut self, at: usize, value: R) {
        self[at] = value;
    }
}

/// Positions are (out, in).
impl<P: Precision> Values<P::Real> for Weight<P> {
    fn rewrite(&mut self, value: impl Fn(usize) -> P::Real + Sync) {
        let n_in = self.n_in;
        self.forward.repack(|i, o| value(o * n_in + i));
        if let Some(backward) = self.backward.get_mut() {
            backward.repack(|o, i| value(o * n_in + i));
        }
    }

    fn set(&mut self, at: usize, value: P::Real) {
        let (o, i) = (at / self.n_in, at % self.n_in);
        self.forward.set(i, o, value);
        if let Some(backward) = self.backward.get_mut() {
            backward.set(o, i, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::precision::Stored;
    use super::super::precision::{Bf16, F32, F64};
    use super::super::real::Real;
    use super::*;

    fn check<P: Precision>() {
        let (n_out, n_in) = (70, 45);
        let values: Vec<P::Real> = (0..n_out * n_in).map(|i| P::Real::of(i as f64)).collect();
        let mut w = Weight::<P>::new(Arch::detect(), n_out, n_in, &values);
        // At the precision it multiplies in.
        let stored = |x: f64| P::Stored::store(P::Real::of(x)).load().to_f64();
        let both =
            |w: &Weight<P>, o: usize, i: usize| (w.for_forward().at(i, o).to_f64(), w.for_backward().at(o, i).to_f64());
        for (o, i) in [(0, 0), (69, 44), (3, 7), (32, 31)] {
            let value = stored((o * n_in + i) as f64);
            assert_eq!(both(&w, o, i), (value, value));
        }
        w.set(3 * n_in + 7, P::Real::of(-1.0));
        assert_eq!(both(&w, 3, 7), (-1.0, -1.0));
        w.rewrite(|at| P::Real::of(2.0 * at as f64));
        assert_eq!(both(&w, 1, 2), (stored(94.0), stored(94.0)));
    }

    #[test]
    fn both_layouts_hold_the_same_weight_after_every_way_of_writing_it() {
        check::<F32>();
        check::<F64>();
        check::<Bf16>();
    }
}
