//! Frozen weights, laid out so that a product reads them as they lie.
//!
//! The product is fastest where the weight's rows run along the inner dimension. That is a layout a direction:
//! (in, out) for x W' and (out, in) for dy W. The second is made when the first backward, or the first run that trains
//! weights, asks for it: inference never does.

use std::sync::OnceLock;

use rayon::prelude::*;

use super::product::View;
use super::real::Real;

/// Rows and columns of a tile of a transposition: two tiles fit in the first cache.
const TILE: usize = 32;

/// A weight of a linear layer, (out, in).
pub struct Weight<R> {
    n_out: usize,
    n_in: usize,
    /// (in, out).
    forward: Vec<R>,
    /// (out, in).
    backward: OnceLock<Vec<R>>,
}

impl<R: Real> Weight<R> {
    /// Lays out row-major values (out, in) for the forward.
    pub fn new(n_out: usize, n_in: usize, values: &[R]) -> Self {
        assert_eq!(values.len(), n_out * n_in, "a weight has out * in values");
        let mut forward = vec![R::ZERO; values.len()];
        transpose(values, n_in, &mut forward);
        Weight { n_out, n_in, forward, backward: OnceLock::new() }
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
    pub fn for_forward(&self) -> View<'_, R> {
        View::new(&self.forward, self.n_in, self.n_out)
    }

    /// W, for dy W.
    pub fn for_backward(&self) -> View<'_, R> {
        View::new(self.backward(), self.n_out, self.n_in)
    }

    /// Lays it out for the backward, where it is not yet.
    pub fn backward(&self) -> &[R] {
        // On this thread alone: a pool thread that waited here could be handed a job that waits for this very cell.
        self.backward.get_or_init(|| {
            let mut w = vec![R::ZERO; self.forward.len()];
            let band = TILE * self.n_in;
            w.chunks_mut(band).enumerate().for_each(|(b, to)| transpose_band(&self.forward, self.n_out, b, to));
            w
        })
    }

    /// The values as they lie, (in, out).
    pub fn as_laid_out(&self) -> &[R] {
        &self.forward
    }

    /// Replaces all values: `write` is handed them row-major, (out, in).
    pub fn rewrite(&mut self, write: impl FnOnce(&mut [R])) {
        let mut w = self.backward.take().unwrap_or_else(|| vec![R::ZERO; self.forward.len()]);
        write(&mut w);
        transpose(&w, self.n_in, &mut self.forward);
        self.backward = OnceLock::from(w);
    }

    /// Replaces the value at a flat, row-major position.
    pub fn set(&mut self, at: usize, value: R) {
        let (o, i) = (at / self.n_in, at % self.n_in);
        self.forward[i * self.n_out + o] = value;
        if let Some(w) = self.backward.get_mut() {
            w[at] = value;
        }
    }
}

/// Rows of `cols` values in `from` to columns in `to`, over the threads of the current pool.
fn transpose<R: Real>(from: &[R], cols: usize, to: &mut [R]) {
    let rows = from.len() / cols;
    to.par_chunks_mut(TILE * rows).enumerate().for_each(|(band, to)| transpose_band(from, cols, band, to));
}

/// `TILE` columns of `from`, from column `band * TILE` on, to rows in `to`, tile by tile.
fn transpose_band<R: Real>(from: &[R], cols: usize, band: usize, to: &mut [R]) {
    let rows = from.len() / cols;
    for first in (0..rows).step_by(TILE) {
        for (j, to) in to.chunks_mut(rows).enumerate() {
            for i in first..rows.min(first + TILE) {
                to[i] = from[i * cols + band * TILE + j];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_layouts_hold_the_same_weight_after_every_way_of_writing_it() {
        let (n_out, n_in) = (70, 45);
        let values: Vec<f64> = (0..n_out * n_in).map(|i| i as f64).collect();
        let mut w = Weight::new(n_out, n_in, &values);
        assert_eq!(w.backward(), values);
        w.set(3 * n_in + 7, -1.0);
        assert_eq!((w.backward()[3 * n_in + 7], w.as_laid_out()[7 * n_out + 3]), (-1.0, -1.0));
        w.rewrite(|all| all.iter_mut().for_each(|v| *v *= 2.0));
        assert_eq!((w.backward()[n_in + 2], w.as_laid_out()[2 * n_out + 1]), (94.0, 94.0));
    }
}
