//! Products of matrices that fit into the second cache, as those of one head of attention: y = a b on this thread.
//!
//! The right side is packed a panel at a time, the left side is read as it lies. A row's bits do not depend on the
//! others where a tile multiplies. Numbers stored as bf16 are multiplied in pairs where the processor can, and are
//! widened where it cannot.

use half::bf16;

use super::super::lines::{Element, with_scratch};
use super::super::precision::load;
use super::super::real::Real;
use super::super::simd::Arch;
use super::strided::{Into, View, check, product_alone};
use super::tile::{Left, Tile, pair_tile};

/// What small products are made of; their sums are `R`.
pub trait Operand<R>: Sized {
    /// y = a b, y in rows `stride` apart.
    fn small(arch: Arch, y: &mut [R], stride: usize, a: View<Self>, b: View<Self>);
}

impl<R: Real> Operand<R> for R {
    fn small(arch: Arch, y: &mut [R], stride: usize, a: View<R>, b: View<R>) {
        let Some(tile) = R::tile(arch) else {
            return product_alone(y, stride, Into::Store, a, b, 1);
        };
        check(y.len(), stride, a, b);
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
    fn small(arch: Arch, y: &mut [f32], stride: usize, a: View<bf16>, b: View<bf16>) {
        check(y.len(), stride, a, b);
        let (m, k, n) = (a.rows, a.cols, b.cols);
        let Some(tile) = pair_tile(arch) else {
            return with_scratch(m * k, k * n, |wide_a: &mut [f32], wide_b: &mut [f32]| {
                f32::small(arch, y, stride, widened(arch, a, wide_a), widened(arch, b, wide_b));
            });
        };
        let steps = k.div_ceil(2);
        with_scratch(steps * m, 0, |pairs: &mut [u32], _: &mut [u8]| {
            let left = if a.row_stride == 1 && a.col_stride != 1 {
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
            } else if let Some(left) = as_pairs(a) {
                left
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
                (y, stride),
                (m, steps, n),
                left,
                #[inline(always)]
                |first, cols, panel: &mut [u32]| pack_pairs(b, first, cols, tile.cols, panel),
            );
        });
    }
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
    if m == 0 || n == 0 || steps == 0 {
        return;
    }
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
    let data = bytemuck::try_cast_slice(&a.data[..whole]).ok()?;
    Some(Left { data, row: a.row_stride / 2, step: 1 })
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
    use super::super::super::precision::Stored;
    use super::super::values;
    use super::*;

    /// Every way in which two matrices can lie, some of them with room between their rows.
    fn each_product<E: Stored<f32>>(check: impl Fn(Arch, &str, Vec<f32>, Vec<f64>)) {
        for arch in Arch::available() {
            for (m, k, n) in [(1, 1, 1), (3, 5, 7), (14, 32, 32), (17, 33, 40), (128, 64, 128), (31, 128, 64)] {
                let store = |x: Vec<f32>| x.into_iter().map(E::store).collect::<Vec<E>>();
                let (a, b) = (store(values((m + 1) * (k + 1) * 2, 1)), store(values((k + 1) * (n + 1) * 2, 2)));
                for room in [0, 1, 2] {
                    for (at, bt) in [(false, false), (false, true), (true, false), (true, true)] {
                        let left =
                            if at { View::strided(&a, k, m, m + room).t() } else { View::strided(&a, m, k, k + room) };
                        let right =
                            if bt { View::strided(&b, n, k, k + room).t() } else { View::strided(&b, k, n, n + room) };
                        let mut y = vec![f32::NAN; m * n];
                        E::small(arch, &mut y, n, left, right);
                        let of = |v: &View<E>, i: usize, j: usize| {
                            f64::from(v.data[i * v.row_stride + j * v.col_stride].load())
                        };
                        let exact = |i, j| (0..k).map(|s| of(&left, i, s) * of(&right, s, j)).sum();
                        let exact = (0..m * n).map(|at| exact(at / n, at % n)).collect();
                        check(arch, &format!("{} {m} {k} {n} {room} {at} {bt}", arch.name()), y, exact);
                    }
                }
            }
        }
    }

    fn are_close(what: &str, found: &[f32], exact: &[f64]) {
        for (found, exact) in found.iter().zip(exact) {
            assert!((f64::from(*found) - exact).abs() < 2e-5, "{what}: {found} {exact}");
        }
    }

    #[test]
    fn products_of_every_layout_are_those_of_their_values() {
        each_product::<f32>(|_, what, y, exact| are_close(what, &y, &exact));
        each_product::<bf16>(|_, what, y, exact| are_close(what, &y, &exact));
    }
}
