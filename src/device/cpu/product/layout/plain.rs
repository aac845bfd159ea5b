//! Any number on any processor, by the `gemm` crate.

use rayon::prelude::*;

use super::super::super::lines::with_scratch;
use super::super::super::real::Real;
use super::super::super::simd::Arch;
use super::super::panels::Rows;
use super::super::strided::{View, product};
use super::{Layout, LeftSide};

/// Rows of a block where the `gemm` crate multiplies.
const GEMM_ROWS: usize = 64;

/// A right side as the `gemm` crate reads it, (inner, columns), row-major: what every processor runs.
pub struct Plain<R> {
    inner: usize,
    cols: usize,
    data: Vec<R>,
}

impl<R: Real> Layout<R> for Plain<R> {
    fn pack(_: Arch, inner: usize, cols: usize, value: impl Fn(usize, usize) -> R + Sync) -> Self {
        let mut plain = Plain { inner, cols, data: vec![R::ZERO; inner * cols] };
        plain.repack(value);
        plain
    }

    fn repack(&mut self, value: impl Fn(usize, usize) -> R + Sync) {
        self.data.par_chunks_mut(self.cols).enumerate().for_each(|(k, row)| {
            for (j, to) in row.iter_mut().enumerate() {
                *to = value(k, j);
            }
        });
    }

    fn shape(&self) -> (usize, usize) {
        (self.inner, self.cols)
    }

    fn at(&self, inner: usize, col: usize) -> R {
        self.data[inner * self.cols + col]
    }

    fn set(&mut self, inner: usize, col: usize, value: R) {
        self.data[inner * self.cols + col] = value;
    }

    fn visit(&self, visit: &mut dyn FnMut(&[u8])) {
        visit(bytemuck::cast_slice(&self.data));
    }

    fn multiply<E: Send>(
        &self,
        arch: Arch,
        m: usize,
        x: impl LeftSide<R>,
        y: Rows<'_, E>,
        finish: impl Fn(usize, usize, &mut [E], &[R]) + Sync,
    ) {
        by_gemm(arch, View::new(&self.data, self.inner, self.cols), m, x, y, finish);
    }
}

/// As [`Layout::multiply`], by the `gemm` crate, in fixed blocks of rows.
pub(super) fn by_gemm<R: Real, E: Send>(
    arch: Arch,
    b: View<'_, R>,
    m: usize,
    x: impl LeftSide<R>,
    y: Rows<'_, E>,
    finish: impl Fn(usize, usize, &mut [E], &[R]) + Sync,
) {
    let (inner, cols, stride) = (b.rows, b.cols, y.stride);
    let n_threads = rayon::current_num_threads();
    let block = |first: usize, y: &mut [E], threads: usize| {
        let rows = GEMM_ROWS.min(m - first);
        with_scratch::<R, R, _>(rows * inner, rows * cols, |left, sums| {
            arch.run(
                &mut *left,
                #[inline(always)]
                |left: &mut [R]| left.chunks_mut(inner).enumerate().for_each(|(i, to)| x.write(first + i, to)),
            );
            product(sums, cols, View::new(left, rows, inner), b, threads);
            arch.run(
                y,
                #[inline(always)]
                |y: &mut [E]| {
                    for (i, (y, sums)) in y.chunks_mut(stride).zip(sums.chunks(cols)).enumerate() {
                        finish(first + i, 0, &mut y[..cols], sums);
                    }
                },
            );
        });
    };
    let blocks = m.div_ceil(GEMM_ROWS);
    let y = &mut y.data[..if m == 0 { 0 } else { (m - 1) * stride + cols }];
    if blocks >= n_threads {
        y.par_chunks_mut(GEMM_ROWS * stride).enumerate().for_each(|(i, y)| block(i * GEMM_ROWS, y, 1));
    } else {
        y.chunks_mut(GEMM_ROWS * stride).enumerate().for_each(|(i, y)| block(i * GEMM_ROWS, y, n_threads));
    }
}
