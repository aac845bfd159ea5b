//! Products of matrices as they lie: by a register tile where this processor has one ([`small`]), else by the `gemm`
//! crate.
//!
//! In [`product`] a row's bits do not depend on how many rows there are: the crate sums over the inner dimension in an
//! order that the other two do not change, but for small products, which take other paths. Those are computed with
//! more rows than they have. [`product_alone`] has no such promise, and no such cost: it is for products whose shape
//! does not depend on what else is in the batch, as those of attention.

use super::super::lines::with_scratch;
use super::super::real::Real;
use super::super::simd::Arch;
use super::tile::{Left, Tile};

/// A matrix as it lies: `rows` by `cols`, element (i, j) at `i * row_stride + j * col_stride`.
#[derive(Clone, Copy)]
pub struct View<'a, R> {
    data: &'a [R],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, R: Real> View<'a, R> {
    /// Rows of `cols` values, `stride` apart.
    pub fn strided(data: &'a [R], rows: usize, cols: usize, stride: usize) -> Self {
        let view = View { data, rows, cols, row_stride: stride, col_stride: 1 };
        assert!(rows == 0 || cols == 0 || view.last() < data.len(), "a view lies inside its data");
        view
    }

    /// Rows of `cols` values, one after the other.
    pub fn new(data: &'a [R], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// The transposed matrix, where it lies.
    pub fn t(self) -> Self {
        View { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    fn last(&self) -> usize {
        (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride
    }
}

/// Whether a product replaces what lies in its destination or is added to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Into {
    /// Replace.
    Store,
    /// Add.
    Add,
}

/// Fewer rows than these, at `n` columns, and the crate takes another path: dot products where the result has at most
/// 256 entries, a shorter block of the inner dimension where neither side is above 64, its own loop for a single row.
fn least_rows(n: usize) -> usize {
    if n <= 64 { 65 } else { (256 / n + 1).max(2) }
}

/// y = a b, y in rows `stride` apart; a row's bits do not depend on the others. `threads` of the current pool take
/// part; 1 stays on this thread.
pub fn product<R: Real>(y: &mut [R], stride: usize, a: View<R>, b: View<R>, threads: usize) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    let rows = least_rows(n);
    if m >= rows || m == 0 {
        return product_alone(y, stride, Into::Store, a, b, threads);
    }
    check(y.len(), stride, a, b);
    let mut padded = vec![R::ZERO; rows * k];
    for (i, row) in padded.chunks_mut(k).take(m).enumerate() {
        for (j, x) in row.iter_mut().enumerate() {
            *x = a.data[i * a.row_stride + j * a.col_stride];
        }
    }
    let mut out = vec![R::ZERO; rows * n];
    gemm(&mut out, n, Into::Store, View::new(&padded, rows, k), b, threads);
    for (out, y) in out.chunks(n).zip(y.chunks_mut(stride)).take(m) {
        y[..n].copy_from_slice(out);
    }
}

/// y (+)= a b, as [`product`], but a row's bits may depend on how many there are.
pub fn product_alone<R: Real>(y: &mut [R], stride: usize, into: Into, a: View<R>, b: View<R>, threads: usize) {
    check(y.len(), stride, a, b);
    if a.rows > 0 && b.cols > 0 {
        gemm(y, stride, into, a, b, threads);
    }
}

/// y = a b on this thread, for matrices that fit into the second cache. A row's bits do not depend on the others
/// where a tile multiplies.
pub fn small<R: Real>(arch: Arch, y: &mut [R], stride: usize, a: View<R>, b: View<R>) {
    match R::tile(arch) {
        Some(tile) => {
            check(y.len(), stride, a, b);
            tiled(arch, tile, y, stride, a, b);
        }
        None => product_alone(y, stride, Into::Store, a, b, 1),
    }
}

fn tiled<R: Real>(arch: Arch, tile: &Tile<R, R, R>, y: &mut [R], stride: usize, a: View<R>, b: View<R>) {
    let (m, k, n, width) = (a.rows, a.cols, b.cols, tile.cols);
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    let tiles = m.div_ceil(tile.rows);
    with_scratch(k * width, tile.rows * width, |panel: &mut [R], sums: &mut [R]| {
        for first in (0..n).step_by(width) {
            let cols = width.min(n - first);
            arch.run(
                &mut *panel,
                #[inline(always)]
                |panel: &mut [R]| pack(b, first, cols, width, panel),
            );
            for t in 0..tiles {
                let rows = m * t / tiles..m * (t + 1) / tiles;
                let left = Left { data: &a.data[rows.start * a.row_stride..], row: a.row_stride, step: a.col_stride };
                tile.run(rows.len(), k, left, panel, (&mut *sums, width), true);
                for (i, sums) in rows.zip(sums.chunks(width)) {
                    y[i * stride + first..][..cols].copy_from_slice(&sums[..cols]);
                }
            }
        }
    });
}

/// Columns `first..first + cols` of `b`, row after row of `width`.
#[inline(always)]
fn pack<R: Real>(b: View<R>, first: usize, cols: usize, width: usize, panel: &mut [R]) {
    if b.col_stride == 1 {
        for (k, to) in panel.chunks_mut(width).enumerate() {
            to[..cols].copy_from_slice(&b.data[k * b.row_stride + first..][..cols]);
            to[cols..].fill(R::ZERO);
        }
        return;
    }
    if cols < width {
        panel.fill(R::ZERO);
    }
    for c in 0..cols {
        let from = &b.data[(first + c) * b.col_stride..];
        for (k, to) in panel.iter_mut().skip(c).step_by(width).enumerate() {
            *to = from[k * b.row_stride];
        }
    }
}

/// What makes [`gemm`] sound: every row of y lies inside it.
fn check<R: Real>(len: usize, stride: usize, a: View<R>, b: View<R>) {
    assert_eq!(b.rows, a.cols, "inner dimensions of a product");
    let inside = a.rows == 0 || (a.rows - 1) * stride + b.cols <= len;
    assert!(inside && b.cols <= stride, "a product lies inside its destination");
}

fn gemm<R: Real>(y: &mut [R], stride: usize, into: Into, a: View<R>, b: View<R>, threads: usize) {
    let parallelism = if threads > 1 { gemm::Parallelism::Rayon(threads) } else { gemm::Parallelism::None };
    // SAFETY: `View` and `check` assert that every element of y, a and b lies inside its slice; y is borrowed
    // mutably, so it overlaps neither.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            y.as_mut_ptr(),
            1,
            stride as isize,
            into == Into::Add,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            R::ONE,
            R::ONE,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::super::values;
    use super::*;

    #[test]
    fn a_row_has_the_same_bits_whatever_the_other_rows_and_the_threads() {
        for (k, n) in
            [(16, 16), (16, 24), (24, 16), (32, 64), (384, 384), (384, 1536), (1536, 384), (768, 3072), (3072, 768)]
        {
            let (a, w) = (values(300 * k, 1), values(n * k, 2));
            let run = |first: usize, m: usize, back: bool, threads: usize| {
                let mut y = vec![0f32; m * n];
                // Both directions a layer uses: x W' with W (n, k), and dy W with W (k, n).
                let b = if back { View::new(&w, k, n) } else { View::new(&w, n, k).t() };
                product(&mut y, n, View::new(&a[first * k..], m, k), b, threads);
                y
            };
            for back in [false, true] {
                let all = run(0, 300, back, 2);
                for (first, m, threads) in
                    [(0, 300, 1), (0, 1, 1), (7, 1, 2), (7, 2, 1), (3, 5, 2), (120, 130, 1), (299, 1, 1), (64, 64, 2)]
                {
                    let part = run(first, m, back, threads);
                    let same = part.iter().zip(&all[first * n..]).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "k {k} n {n} rows {first}.. of {m}, {threads} threads, back {back}");
                }
            }
        }
    }

    #[test]
    fn a_product_adds_where_it_is_told_to() {
        let (a, b) = ([1.0, 2.0], [3.0, 4.0]);
        let mut y = [10.0f64];
        product_alone(&mut y, 1, Into::Add, View::new(&a, 1, 2), View::new(&b, 2, 1), 1);
        assert_eq!(y, [21.0]);
    }
}
