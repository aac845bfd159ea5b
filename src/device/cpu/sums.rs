//! Column sums by group: what a bias gradient is.
//!
//! Rows are summed in blocks of 64 counted from the group's first row, and blocks are added in order, so that a
//! group's sums have the same bits alone and beside others, with any number of threads.

use std::ops::Range;

use rayon::prelude::*;

use super::Cpu;
use super::buffer::{Mat, Vectors};
use super::precision::{Precision, Stored};
use super::real::Real;
use crate::device::batch::Space;

/// Rows of a block.
const BLOCK: usize = 64;

impl<P: Precision> Cpu<P> {
    /// The rows of each group in a row space.
    pub(super) fn rows_by_group(&self, space: Space) -> Vec<Range<usize>> {
        let bounds = self.batch.bounds();
        let sequences = self.batch.sequences_by_group();
        match space {
            Space::Firsts => sequences,
            Space::Tokens => sequences.into_iter().map(|s| bounds[s.start]..bounds[s.end]).collect(),
        }
    }

    /// Adds the column sums of `y` to `into`, where somebody asked for them.
    pub(super) fn column_sums<E: Stored<P::Real>>(&self, y: &Mat<E>, into: Option<&mut Vectors<P::Real>>) {
        self.sum_rows(
            y.space,
            y.cols,
            into,
            #[inline(always)]
            |i, sums| {
                for (sum, y) in sums.iter_mut().zip(y.row(i)) {
                    *sum += y.load();
                }
            },
        );
    }

    /// As [`Cpu::column_sums`], for rows that `add` adds to the sums it is given.
    pub(super) fn sum_rows(
        &self,
        space: Space,
        cols: usize,
        into: Option<&mut Vectors<P::Real>>,
        add: impl Fn(usize, &mut [P::Real]) + Sync,
    ) {
        let Some(into) = into else { return };
        let blocks: Vec<(usize, Range<usize>)> = self
            .rows_by_group(space)
            .into_iter()
            .enumerate()
            .flat_map(|(g, rows)| {
                let end = rows.end;
                rows.step_by(BLOCK).map(move |first| (g, first..end.min(first + BLOCK)))
            })
            .collect();
        let n = blocks.len() * cols;
        let room = (self.room.div_ceil(BLOCK) + blocks.len().next_power_of_two()) * cols;
        let mut partial = self.pool.take::<P::Real>(n, room.max(n));
        partial.par_chunks_mut(cols).zip(&blocks).for_each(|(sums, (_, rows))| {
            self.arch.run(
                sums,
                #[inline(always)]
                |sums: &mut [P::Real]| {
                    sums.fill(P::Real::ZERO);
                    for i in rows.clone() {
                        add(i, sums);
                    }
                },
            );
        });
        for (sums, (g, _)) in partial.chunks(cols).zip(&blocks) {
            for (into, sum) in into.of_mut(*g).iter_mut().zip(sums) {
                *into += *sum;
            }
        }
    }
}
