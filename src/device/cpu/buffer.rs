//! Buffers of a step, and the pool they come from and go back to.
//!
//! A buffer is sized for the most rows that a batch has had so far, so that steps of different lengths share buffers
//! and a steady state allocates nothing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::real::Real;

/// Which rows an activation has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Space {
    /// One a token.
    Tokens,
    /// One a sequence: its first token's.
    Firsts,
}

struct State<R> {
    free: HashMap<usize, Vec<Vec<R>>>,
    live: usize,
    peak: usize,
}

/// Free buffers by size. Clones share them.
pub struct Pool<R>(Arc<Mutex<State<R>>>);

impl<R> Clone for Pool<R> {
    fn clone(&self) -> Self {
        Pool(self.0.clone())
    }
}

impl<R> Default for Pool<R> {
    fn default() -> Self {
        Pool(Arc::new(Mutex::new(State { free: HashMap::new(), live: 0, peak: 0 })))
    }
}

impl<R: Real> Pool<R> {
    fn state(&self) -> MutexGuard<'_, State<R>> {
        // A panic elsewhere leaves the lists whole: they change in single steps.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of `len` values, of any content, with room for `room`; buffers of equal room are shared.
    pub fn take(&self, len: usize, room: usize) -> Buffer<R> {
        let room = room.max(len);
        let reused = {
            let mut state = self.state();
            state.live += room;
            state.peak = state.peak.max(state.live);
            state.free.get_mut(&room).and_then(Vec::pop)
        };
        let data = reused.unwrap_or_else(|| vec![R::ZERO; room]);
        Buffer { data, len, pool: self.clone() }
    }

    /// Drops all free buffers: after a larger batch than any before, those of the old size are of no use.
    pub fn release(&self) {
        self.state().free.clear();
    }

    /// The most bytes in use at once so far.
    pub fn peak_bytes(&self) -> usize {
        self.state().peak * size_of::<R>()
    }
}

/// Values on loan from a pool.
pub struct Buffer<R: Real> {
    data: Vec<R>,
    len: usize,
    pool: Pool<R>,
}

impl<R: Real> std::ops::Deref for Buffer<R> {
    type Target = [R];
    fn deref(&self) -> &[R] {
        &self.data[..self.len]
    }
}

impl<R: Real> std::ops::DerefMut for Buffer<R> {
    fn deref_mut(&mut self) -> &mut [R] {
        &mut self.data[..self.len]
    }
}

impl<R: Real> Drop for Buffer<R> {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        let mut state = self.pool.state();
        state.live -= data.len();
        state.free.entry(data.len()).or_default().push(data);
    }
}

/// A matrix of activations, row-major.
pub struct Mat<R: Real> {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Which rows these are.
    pub space: Space,
    /// The values.
    pub data: Buffer<R>,
}

impl<R: Real> Mat<R> {
    /// Row `i`.
    #[inline(always)]
    pub fn row(&self, i: usize) -> &[R] {
        &self.data[i * self.cols..][..self.cols]
    }

    /// Row `i`.
    #[inline(always)]
    pub fn row_mut(&mut self, i: usize) -> &mut [R] {
        &mut self.data[i * self.cols..][..self.cols]
    }
}

/// Vectors, one a group or one for all; they outlive steps and are not pooled.
#[derive(Debug, Clone)]
pub struct Vectors<R> {
    /// 1 or G.
    pub rows: usize,
    /// Length of each.
    pub n: usize,
    /// The values, row-major.
    pub data: Vec<R>,
}

impl<R: Real> Vectors<R> {
    /// The vector of group `g`, or the one that all share.
    #[inline(always)]
    pub fn of(&self, g: usize) -> &[R] {
        let g = if self.rows == 1 { 0 } else { g };
        &self.data[g * self.n..][..self.n]
    }

    /// The vector of group `g`, or the one that all share.
    #[inline(always)]
    pub fn of_mut(&mut self, g: usize) -> &mut [R] {
        let g = if self.rows == 1 { 0 } else { g };
        &mut self.data[g * self.n..][..self.n]
    }
}

/// A matrix that outlives steps: a weight (out, in), or a table (rows, hidden).
#[derive(Debug, Clone)]
pub struct Matrix<R> {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// The values, row-major.
    pub data: Vec<R>,
}

impl<R: Real> Matrix<R> {
    /// Row `i`.
    #[inline(always)]
    pub fn row(&self, i: usize) -> &[R] {
        &self.data[i * self.cols..][..self.cols]
    }
}
