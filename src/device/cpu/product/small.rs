//! Products of matrices that fit into the second cache, as those of one head of attention: y = a b on this thread.
//!
//! The right side is packed a panel at a time, the left side is read as it lies. A row's bits do not depend on the
//! others where a tile multiplies. Numbers stored as bf16 are multiplied in pairs where the processor can, and are
//! widened where it cannot.

use half::bf16;

use super::super::lines::{Element, with_scratch};
use super::super::precision::{Stored, load};
use super::super::real::Real;
use super::super::simd::Arch;
use super::strided::{View, Write, check, product_alone};
use super::tile::{Left, Tile, pair_tile};

/// What small products are made of; their sums are `R`.
pub trait Operand<R>: Sized {
    /// y = a b, y in rows `stride` apart.
    fn multiply(arch: Arch, y: &mut [R], stride: usize, a: View<Self>, b: View<Self>);
}

impl<R: Real> Operand<R> for R {
    fn multiply(arch: Arch, y: &mut [R], stride: usize, a: View<R>, b: View<R>) {
        check(y.len(), stride, a, b);
        if is_empty(y, stride, a, b) {
            return;
        }
        let Some(tile) = R::tile(arch) else {
            return product_alone(y, stride, Write::Store, a, b, 1);
        };
        let left = Left { data: a.data, row: a.row_stride, step: a.col_stride };
        let n = b.cols;
        by_panels(
            arch,
            tile,
            (y, stride),
            (a.rows, a.cols, n),
            left,
            #[inline(always)]
            |first, cols, panel: &mut [R]| pack(b, first, cols, tile.cols, panel),
        );
    }
}

impl Operand<f32> for bf16 {
    fn multiply(arch: Arch, y: &mut [f32], stride: usize, a: View<bf16>, b: View<bf16>) {
        check(y.len(), stride, a, b);
        if is_empty(y, stride, a, b) {
            return;
        }
        let (m, k, n) = (a.rows, a.cols, b.cols);
        match pair_tile(arch) {
            Some(tile) => multiply_pairs(arch, tile, (y, stride), a, b),
            None => with_scratch(m * k, k * n, |wide_a: &mut [f32], wide_b: &mut [f32]| {
                f32::multiply(arch, y, stride, widened(arch, a, wide_a), widened(arch, b, wide_b));
            }),
        }
    }
}

/// y = a b by a tile of pairs.
fn multiply_pairs(arch: Arch, tile: &Tile<u32, u32, f32>, y: (&mut [f32], usize), a: View<bf16>, b: View<bf16>) {
    assert!([a, b].iter().all(|v| v.row_stride == 1 || v.col_stride == 1), "rows or columns that lie side by side");
    let (m, k, n) = (a.rows, a.cols, b.cols);
    let steps = k.div_ceil(2);
    let as_it_lies = as_pairs(a);
    let room = if as_it_lies.is_some() { 0 } else { steps * m };
    with_scratch(room, 0, |pairs: &mut [u32], _: &mut [u8]| {
        let left = if let Some(left) = as_it_lies {
            left
        } else if a.row_stride == 1 && a.col_stride != 1 {
            // Two rows that lie side by side make a row of pairs.
            arch.run(
                &mut *pairs,
                #[inline(always)]
                |pairs: &mut [u32]| {
                    for (s, to) in pairs.chunks_exact_mut(m).enumerate() {
                        interleave(row_of(a.t(), 2 * s, 0, m), row_of(a.t(), 2 * s + 1, 0, m), to);
                    }
                },
            );
            Left { data: &*pairs, row: 1, step: m }
        } else {
            for (i, to) in pairs.chunks_exact_mut(steps).enumerate() {
                for (s, to) in to.iter_mut().enumerate() {
                    *to = pair_at(row_of(a, i, 0, k), s);
                }
            }
            Left { data: &*pairs, row: steps, step: 1 }
        };
        by_panels(
            arch,
            tile,
            y,
            (m, steps, n),
            left,
            #[inline(always)]
            |first, cols, panel: &mut [u32]| pack_pairs(b, first, cols, tile.cols, panel),
        );
    });
}

/// Whether there is nothing to multiply: y has no entries, or is made zero.
fn is_empty<R: Real, E>(y: &mut [R], stride: usize, a: View<E>, b: View<E>) -> bool {
    if a.rows > 0 && a.cols == 0 {
        y.chunks_mut(stride.max(1)).take(a.rows).for_each(|row| row[..b.cols].fill(R::ZERO));
    }
    a.rows == 0 || a.cols == 0 || b.cols == 0
}

/// y = a b, (rows, steps, columns), b handed over a panel at a time by `pack(first column, columns, to)`.
fn by_panels<A: Element, C: Element>(
    arch: Arch,
    tile: &Tile<A, A, C>,
    (y, stride): (&mut [C], usize),
    (m, steps, n): (usize, usize, usize),
    a: Left<A>,
    pack: impl Fn(usize, usize, &mut [A]),
) {
    let width = tile.cols;
    let tiles = m.div_ceil(tile.rows);
    with_scratch(steps * width, tile.rows * width, |panel: &mut [A], sums: &mut [C]| {
        for first in (0..n).step_by(width) {
            let cols = width.min(n - first);
            arch.run(
                &mut *panel,
                #[inline(always)]
                |panel: &mut [A]| pack(first, cols, panel),
            );
            for t in 0..tiles {
                let rows = m * t / tiles..m * (t + 1) / tiles;
                let left = Left { data: &a.data[rows.start * a.row..], ..a };
                if cols == width {
                    tile.run(rows.len(), steps, left, panel, (&mut y[rows.start * stride + first..], stride), true);
                    continue;
                }
                tile.run(rows.len(), steps, left, panel, (&mut *sums, width), true);
                for (i, sums) in rows.zip(sums.chunks(width)) {
                    y[i * stride + first..][..cols].copy_from_slice(&sums[..cols]);
                }
            }
        }
    });
}

/// Columns `first..first + cols` of `b`, row after row of `width`.
#[inline(always)]
fn pack<E: Element>(b: View<E>, first: usize, cols: usize, width: usize, panel: &mut [E]) {
    if b.col_stride == 1 {
        for (k, to) in panel.chunks_mut(width).enumerate() {
            to[..cols].copy_from_slice(row_of(b, k, first, cols));
            to[cols..].fill(E::zeroed());
        }
        return;
    }
    if cols < width {
        panel.fill(E::zeroed());
    }
    for c in 0..cols {
        let from = &b.data[(first + c) * b.col_stride..];
        for (k, to) in panel.iter_mut().skip(c).step_by(width).enumerate() {
            *to = from[k * b.row_stride];
        }
    }
}

/// As [`pack`], two rows a step; where rows are odd in number, zeros make the last pair whole.
#[inline(always)]
fn pack_pairs(b: View<bf16>, first: usize, cols: usize, width: usize, panel: &mut [u32]) {
    if b.col_stride == 1 {
        for (s, to) in panel.chunks_mut(width).enumerate() {
            interleave(row_of(b, 2 * s, first, cols), row_of(b, 2 * s + 1, first, cols), &mut to[..cols]);
            to[cols..].fill(0);
        }
        return;
    }
    if cols < width {
        panel.fill(0);
    }
    for c in 0..cols {
        let from = row_of(b.t(), first + c, 0, b.rows);
        for (s, to) in panel.iter_mut().skip(c).step_by(width).enumerate() {
            *to = pair_at(from, s);
        }
    }
}

/// Columns of a row that lie side by side; none where there is no such row.
#[inline(always)]
fn row_of<E>(a: View<'_, E>, i: usize, first: usize, cols: usize) -> &[E] {
    if i < a.rows { &a.data[i * a.row_stride + first..][..cols] } else { &[] }
}

/// Pairs of `low` and `high`; zeros stand for `high` where it is empty.
#[inline(always)]
fn interleave(low: &[bf16], high: &[bf16], to: &mut [u32]) {
    let low = low.iter().map(|x| u32::from(x.to_bits()));
    if high.is_empty() {
        to.iter_mut().zip(low).for_each(|(to, low)| *to = low);
    } else {
        for ((to, low), high) in to.iter_mut().zip(low).zip(high) {
            *to = low | u32::from(high.to_bits()) << 16;
        }
    }
}

/// Pair `s` of a row.
#[inline(always)]
fn pair_at(row: &[bf16], s: usize) -> u32 {
    let high = row.get(2 * s + 1).map_or(0, |x| u32::from(x.to_bits()));
    u32::from(row[2 * s].to_bits()) | high << 16
}

/// Rows as the pairs they are, where all of them begin and end with one.
fn as_pairs(a: View<'_, bf16>) -> Option<Left<'_, u32>> {
    if a.col_stride != 1 || !a.cols.is_multiple_of(2) || !a.row_stride.is_multiple_of(2) {
        return None;
    }
    let whole = a.data.len() / 2 * 2;
    Some(Left { data: bf16::pairs(&a.data[..whole])?, row: a.row_stride / 2, step: 1 })
}

/// The same matrix at full width, as it lay.
fn widened<'w>(arch: Arch, a: View<'_, bf16>, wide: &'w mut [f32]) -> View<'w, f32> {
    let transposed = a.col_stride != 1;
    let lying = if transposed { a.t() } else { a };
    arch.run(
        &mut *wide,
        #[inline(always)]
        |wide: &mut [f32]| {
            for (i, to) in wide.chunks_exact_mut(lying.cols).enumerate() {
                load(row_of(lying, i, 0, lying.cols), to);
            }
        },
    );
    let view = View::new(wide, lying.rows, lying.cols);
    if transposed { view.t() } else { view }
}

#[cfg(test)]
mod tests {
    use super::super::tile::emulated::PAIRS;
    use super::super::values;
    use super::*;

    /// An entry of a matrix.
    fn entry<E: Stored<f32>>(a: View<E>, i: usize, j: usize) -> f64 {
        f64::from(a.data[i * a.row_stride + j * a.col_stride].load())
    }

    type Multiply<'f, E> = &'f dyn Fn(Arch, &mut [f32], usize, View<E>, View<E>);

    /// Every way in which two matrices can lie: transposed or not, with room between rows, from an odd place on.
    fn check<E: Stored<f32>>(multiply: Multiply<E>) {
        for arch in Arch::available() {
            for (m, k, n) in [(1, 1, 1), (3, 5, 7), (14, 32, 32), (17, 33, 40), (128, 64, 128), (31, 128, 64)] {
                let store = |x: Vec<f32>| x.into_iter().map(E::store).collect::<Vec<E>>();
                let (a, b) = (store(values((m + 3) * (k + 3), 1)), store(values((k + 3) * (n + 3), 2)));
                for (room, from, at, bt) in
                    (0..12).map(|case| (case / 4, case % 3 % 2, case % 2 == 0, case / 2 % 2 == 0))
                {
                    let (a, b) = (&a[from..], &b[from..]);
                    let left = |first: usize, m_own: usize| match at {
                        true => View::strided(&a[first..], k, m_own, m + room).t(),
                        false => View::strided(&a[first * (k + room)..], m_own, k, k + room),
                    };
                    let right = match bt {
                        true => View::strided(b, n, k, k + room).t(),
                        false => View::strided(b, k, n, n + room),
                    };
                    let what = format!("{} {m} {k} {n} {room} {from} {at} {bt}", arch.name());
                    let mut y = vec![f32::NAN; m * (n + 1)];
                    multiply(arch, &mut y, n + 1, left(0, m), right);
                    for (i, row) in y.chunks(n + 1).enumerate() {
                        for (j, found) in row[..n].iter().enumerate() {
                            let exact: f64 = (0..k).map(|s| entry(left(0, m), i, s) * entry(right, s, j)).sum();
                            assert!((f64::from(*found) - exact).abs() < 2e-5, "{what}: {found} {exact}");
                        }
                        assert!(row[n].is_nan(), "{what}: what lies between rows is left alone");
                    }
                    if arch == Arch::Portable {
                        continue; // the gemm crate makes no such promise
                    }
                    let mut alone = vec![0.0; n];
                    multiply(arch, &mut alone, n, left(m - 1, 1), right);
                    let same = alone.iter().zip(&y[(m - 1) * (n + 1)..]).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{what}: a row alone has other bits");
                }
            }
        }
    }

    #[test]
    fn products_of_every_layout_are_those_of_their_values_and_rows_do_not_know_each_other() {
        check::<f32>(&f32::multiply);
        check::<bf16>(&bf16::multiply);
    }

    /// A processor without the instruction takes none of the steps that make pairs, but for this.
    #[test]
    fn pairs_are_made_and_multiplied_as_by_their_emulation() {
        let emulated = |arch: Arch, y: &mut [f32], stride: usize, a: View<bf16>, b: View<bf16>| {
            multiply_pairs(arch, &PAIRS, (&mut *y, stride), a, b);
            if pair_tile(arch).is_some() {
                let mut real = y.to_vec();
                bf16::multiply(arch, &mut real, stride, a, b);
                let bits = |y: &[f32]| y.iter().map(|y| y.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&real), bits(y), "{} {} {}", a.rows, a.cols, b.cols);
            }
        };
        check::<bf16>(&emulated);
    }

    #[test]
    fn an_empty_sum_is_zero() {
        for arch in Arch::available() {
            let mut y = [1.0f32; 4];
            bf16::multiply(arch, &mut y, 2, View::new(&[], 2, 0), View::new(&[], 0, 2));
            assert_eq!(y, [0.0; 4]);
            let mut y = [1.0f32; 4];
            f32::multiply(arch, &mut y, 2, View::new(&[], 0, 3).t().t(), View::new(&[1.0; 6], 3, 2));
            assert_eq!(y, [1.0; 4]);
        }
    }
}
