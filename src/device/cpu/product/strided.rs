//! Matrices as they lie, and their products by the `gemm` crate.
//!
//! In [`product`] a row's bits do not depend on how many rows there are: the crate sums over the inner dimension in an
//! order that the other two do not change, but for small products, which take other paths. Those are computed with
//! more rows than they have. [`product_alone`] has no such promise, and no such cost: it is for products whose shape
//! does not depend on what else is in the batch, as those of attention.

use super::super::lines::prefetch;
use super::super::real::Real;

/// A matrix as it lies: `rows` by `cols`, element (i, j) at `i * row_stride + j * col_stride`.
pub struct View<'a, E> {
    /// From the first element on.
    pub data: &'a [E],
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Distance of two rows.
    pub row_stride: usize,
    /// Distance of two columns.
    pub col_stride: usize,
}

impl<E> Clone for View<'_, E> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<E> Copy for View<'_, E> {}

impl<'a, E> View<'a, E> {
    /// Rows of `cols` values, `stride` apart.
    pub fn strided(data: &'a [E], rows: usize, cols: usize, stride: usize) -> Self {
        let view = View { data, rows, cols, row_stride: stride, col_stride: 1 };
        assert!(rows == 0 || cols == 0 || view.last() < data.len(), "a view lies inside its data");
        view
    }

    /// Rows of `cols` values, one after the other.
    pub fn new(data: &'a [E], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Asks for all rows to be brought near.
    pub fn prefetch(&self) {
        for i in 0..self.rows {
            prefetch(self.data[i * self.row_stride..].as_ptr(), self.cols);
        }
    }

    /// The transposed matrix, where it lies.
    pub fn t(self) -> Self {
        View { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    fn last(&self) -> usize {
        (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride
    }
}

/// Whether a product replaces what lies in its destination or is added to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// Replace.
    Store,
    /// Add.
    Add,
}

/// Fewer rows than these, at `n` columns, and the crate takes another path: dot products where the result has at most
/// 256 entries, a shorter block of the inner dimension where neither side is above 64, its own loop for a single row.
fn least_rows(n: usize) -> usize {
    (256 / n + 1).max(if n <= 64 { 65 } else { 2 })
}

/// y = a b, y in rows `stride` apart; a row's bits do not depend on the others. `threads` of the current pool take
/// part; 1 stays on this thread.
pub fn product<R: Real>(y: &mut [R], stride: usize, a: View<R>, b: View<R>, threads: usize) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    let rows = least_rows(n);
    if m >= rows || m == 0 {
        return product_alone(y, stride, Write::Store, a, b, threads);
    }
    check(y.len(), stride, a, b);
    let mut padded = vec![R::ZERO; rows * k];
    for (i, row) in padded.chunks_mut(k).take(m).enumerate() {
        for (j, x) in row.iter_mut().enumerate() {
            *x = a.data[i * a.row_stride + j * a.col_stride];
        }
    }
    let mut out = vec![R::ZERO; rows * n];
    gemm(&mut out, n, Write::Store, View::new(&padded, rows, k), b, threads);
    for (out, y) in out.chunks(n).zip(y.chunks_mut(stride)).take(m) {
        y[..n].copy_from_slice(out);
    }
}

/// y (+)= a b, as [`product`], but a row's bits may depend on how many there are.
pub fn product_alone<R: Real>(y: &mut [R], stride: usize, into: Write, a: View<R>, b: View<R>, threads: usize) {
    check(y.len(), stride, a, b);
    if a.rows > 0 && b.cols > 0 {
        gemm(y, stride, into, a, b, threads);
    }
}

/// What makes [`gemm`] sound: all of y, a and b lies inside its slice.
pub(super) fn check<E>(len: usize, stride: usize, a: View<E>, b: View<E>) {
    for view in [a, b] {
        let inside = view.rows == 0 || view.cols == 0 || view.last() < view.data.len();
        assert!(inside, "a view lies inside its data");
    }
    assert_eq!(b.rows, a.cols, "inner dimensions of a product");
    let inside = a.rows == 0 || (a.rows - 1) * stride + b.cols <= len;
    assert!(inside && b.cols <= stride, "a product lies inside its destination");
}

fn gemm<R: Real>(y: &mut [R], stride: usize, into: Write, a: View<R>, b: View<R>, threads: usize) {
    let parallelism = if threads > 1 { gemm::Parallelism::Rayon(threads) } else { gemm::Parallelism::None };
    // SAFETY: `check` asserts that every element of y, a and b lies inside its slice; y is borrowed
    // mutably, so it overlaps neither.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            y.as_mut_ptr(),
            1,
            stride as isize,
            into == Write::Add,
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
        for (k, n) in [
            (64, 1),
            (64, 2),
            (96, 3),
            (16, 16),
            (16, 24),
            (24, 16),
            (32, 64),
            (384, 384),
            (384, 1536),
            (1536, 384),
            (768, 3072),
            (3072, 768),
        ] {
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
        product_alone(&mut y, 1, Write::Add, View::new(&a, 1, 2), View::new(&b, 2, 1), 1);
        assert_eq!(y, [21.0]);
    }
}
