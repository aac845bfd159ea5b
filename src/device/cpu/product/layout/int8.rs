//! Bytes, for inference: a scale a column of the weight, and a scale and a zero a row of the left side.
//!
//! x W is (sum of (x_q - z) w_q) s_x s_w with w_q = round(w / s_w), s_w = max |w| / 127. Processors multiply unsigned by
//! signed bytes, so a row takes all of 0 to 255: s_x = (max x - min x) / 255, 0 among the values, and z = round(-min x / s_x)
//! stands for 0. (What GELU gives lies nearly all on one side.) z times the column's sum of w_q is taken off the sum of
//! x_q w_q. Where a processor adds two products in 16 bits (AVX2), w_q is at most 63 in size, so that no sum leaves them.
//! Sums are whole numbers: a row's bits depend on nothing but the row.

use rayon::prelude::*;

use super::super::super::bytes::{extremes, larger, quantised, rounded, scale_of};
use super::super::super::lines::with_scratch;
use super::super::super::simd::Arch;
use super::super::panels::{Panels, Rows, multiply};
use super::super::tile::{Bytes, byte_tile};
use super::{Layout, LeftSide};

/// The largest x_q.
const MOST: i32 = 255;

/// A right side in bytes.
pub struct Int8Layout {
    inner: usize,
    bytes: Bytes,
    /// Four bytes of the inner dimension, the first lowest.
    panels: Panels<u32>,
    /// s_w of each column.
    scales: Vec<f32>,
    /// The sum of each column's w_q.
    sums: Vec<i32>,
}

/// See [`Tile::spin`].
pub fn spin(arch: Arch, rounds: usize) -> Option<f64> {
    byte_tile(arch).tile.spin(rounds)
}

impl Int8Layout {
    /// Zeros.
    pub(super) fn by(bytes: Bytes, inner: usize, cols: usize) -> Self {
        let panels = Panels::zeros(inner.div_ceil(4), cols, bytes.tile.cols);
        Int8Layout { inner, bytes, panels, scales: vec![1.0; cols], sums: vec![0; cols] }
    }
}

impl Layout<f32> for Int8Layout {
    fn pack(arch: Arch, inner: usize, cols: usize, value: impl Fn(usize, usize) -> f32 + Sync) -> Self {
        let mut layout = Self::by(byte_tile(arch), inner, cols);
        layout.repack(value);
        layout
    }

    fn repack(&mut self, value: impl Fn(usize, usize) -> f32 + Sync) {
        let Int8Layout { inner, bytes: Bytes { top, .. }, panels, scales, sums } = self;
        let inner = *inner;
        scales.par_iter_mut().enumerate().for_each(|(j, scale)| {
            *scale = scale_of((0..inner).fold(0.0, |most, k| larger(most, value(k, j))), *top);
        });
        let inverses: Vec<f32> = scales.iter().map(|scale| 1.0 / scale).collect();
        let w = |k: usize, j: usize| if k < inner { quantised(value(k, j), inverses[j], *top) } else { 0 };
        panels.repack(|step, j| u32::from_le_bytes(std::array::from_fn(|i| w(4 * step + i, j) as i8 as u8)));
        let packed = &*panels;
        sums.par_iter_mut().enumerate().for_each(|(j, sum)| {
            let bytes = (0..inner.div_ceil(4)).flat_map(|step| packed.at(step, j).to_le_bytes());
            *sum = bytes.map(|w| i32::from(w as i8)).sum();
        });
    }

    fn shape(&self) -> (usize, usize) {
        (self.inner, self.scales.len())
    }

    fn at(&self, inner: usize, col: usize) -> f32 {
        let byte = self.panels.at(inner / 4, col).to_le_bytes()[inner % 4];
        f32::from(byte as i8) * self.scales[col]
    }

    fn set(&mut self, inner: usize, col: usize, value: f32) {
        // The column's scale stays, and bounds the value; training, which alone asks for this, does not run in bytes.
        let new = quantised(value, 1.0 / self.scales[col], self.bytes.top);
        let bytes = self.panels.at_mut(inner / 4, col);
        let mut all = bytes.to_le_bytes();
        let old = i32::from(all[inner % 4] as i8);
        all[inner % 4] = new as i8 as u8;
        *bytes = u32::from_le_bytes(all);
        self.sums[col] += new - old;
    }

    fn visit(&self, visit: &mut dyn FnMut(&[u8])) {
        visit(bytemuck::cast_slice(self.panels.as_laid_out()));
        visit(bytemuck::cast_slice(&self.scales));
    }

    fn multiply<E: Send>(
        &self,
        arch: Arch,
        m: usize,
        x: impl LeftSide<f32>,
        y: Rows<'_, E>,
        finish: impl Fn(usize, usize, &mut [E], &[f32]) + Sync,
    ) {
        let Int8Layout { inner, bytes: Bytes { tile, .. }, scales, sums: of_columns, .. } = self;
        let steps = inner.div_ceil(4);
        multiply(
            arch,
            (*tile, self.panels.view()),
            m,
            y,
            #[inline(always)]
            |row, to: &mut [u32]| {
                with_scratch(
                    4 * steps,
                    0,
                    #[inline(always)]
                    |wide: &mut [f32], _: &mut [u8]| {
                        wide[*inner..].fill(0.0);
                        x.write(row, &mut wide[..*inner]);
                        let (least, most) = extremes(wide);
                        let scale = scale_of(most - least, MOST as f32);
                        let inverse = 1.0 / scale;
                        let zero = rounded(-least * inverse);
                        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut to[..steps]);
                        for (byte, x) in bytes.iter_mut().zip(wide.iter()) {
                            // Both ends may be rounded up.
                            *byte = (rounded(*x * inverse) + zero).min(MOST) as u8;
                        }
                        to[steps..].copy_from_slice(&[scale.to_bits(), zero as u32]);
                    },
                );
            },
            #[inline(always)]
            |row, col, y: &mut [E], sums: &[i32], left: &[u32]| {
                let (scale, zero) = (f32::from_bits(left[steps]), left[steps + 1] as i32);
                let mut wide = [0f32; 64];
                let pieces = sums.chunks(64).zip(scales[col..].chunks(64)).zip(of_columns[col..].chunks(64));
                for (p, (((sums, scales), of_columns), y)) in pieces.zip(y.chunks_mut(64)).enumerate() {
                    let wide = &mut wide[..sums.len()];
                    for (((to, sum), s), of_column) in wide.iter_mut().zip(sums).zip(scales).zip(of_columns) {
                        *to = sum.wrapping_sub(zero.wrapping_mul(*of_column)) as f32 * (scale * *s);
                    }
                    finish(row, col + 64 * p, y, wide);
                }
            },
        );
    }
}
