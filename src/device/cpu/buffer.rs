//! Buffers of a step, and the pool they come from and go back to.
//!
//! A buffer is sized for the most rows that a batch has had so far, so that steps of different lengths share buffers
//! and a steady state allocates nothing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::lines::{Element, Line, Lines, lines_of};
use crate::device::batch::Space;

#[derive(Default)]
struct State {
    free: HashMap<usize, Vec<Vec<Line>>>,
    live: usize,
    peak: usize,
}

/// Free buffers by size, whatever lay in them. Clones share them.
#[derive(Clone, Default)]
pub struct Pool(Arc<Mutex<State>>);

impl Pool {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves the lists whole: they change in single steps.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of `len` elements, of any content, with room for `room`; buffers of equal room are shared.
    pub fn take<E: Element>(&self, len: usize, room: usize) -> Buffer<E> {
        let lines = lines_of::<E>(room.max(len));
        let reused = {
            let mut state = self.state();
            state.live += lines;
            state.peak = state.peak.max(state.live);
            state.free.get_mut(&lines).and_then(Vec::pop)
        };
        let data = match reused {
            Some(lines) => Lines::from_lines(lines, len),
            None => Lines::with_room(len, lines),
        };
        Buffer { data, pool: self.clone() }
    }

    /// Drops all free buffers: after a larger batch than any before, those of the old size are of no use.
    pub fn release(&self) {
        self.state().free.clear();
    }

    /// The most bytes in use at once so far.
    pub fn peak_bytes(&self) -> usize {
        self.state().peak * size_of::<Line>()
    }
}

/// Elements on loan from a pool.
pub struct Buffer<E: Element> {
    data: Lines<E>,
    pool: Pool,
}

impl<E: Element> std::ops::Deref for Buffer<E> {
    type Target = [E];
    #[inline(always)]
    fn deref(&self) -> &[E] {
        &self.data
    }
}

impl<E: Element> std::ops::DerefMut for Buffer<E> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [E] {
        &mut self.data
    }
}

impl<E: Element> Drop for Buffer<E> {
    fn drop(&mut self) {
        let lines = self.data.take_lines();
        let mut state = self.pool.state();
        state.live -= lines.len();
        state.free.entry(lines.len()).or_default().push(lines);
    }
}

/// A matrix of activations, row-major.
pub struct Mat<E: Element> {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Which rows these are.
    pub space: Space,
    /// The values.
    pub data: Buffer<E>,
}

impl<E: Element> Mat<E> {
    /// Row `i`.
    #[inline(always)]
    pub fn row(&self, i: usize) -> &[E] {
        &self.data[i * self.cols..][..self.cols]
    }

    /// Row `i`.
    #[inline(always)]
    pub fn row_mut(&mut self, i: usize) -> &mut [E] {
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

impl<R> Vectors<R> {
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
