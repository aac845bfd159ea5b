//! Bytes, for inference: a scale a column of the weight and a scale a row of the left side, both symmetric.
//!
//! x W is (sum of x_q w_q) s_x s_w with x_q = round(x / s_x), s_x = max |x| / 127, and likewise w_q. Processors multiply
//! unsigned by signed bytes: x_q is moved up by 128, and 128 times the column's sum of w_q is taken off. Where one adds two
//! products in 16 bits besides (AVX2), w_q is at most 63 in size, so that no sum leaves them. Sums are whole numbers: a
//! row's bits depend on nothing but the row.

use rayon::prelude::*;

use super::super::super::bytes::{TOP, larger, quantised, rounded, scale_of};
use super::super::super::lines::with_scratch;
use super::super::super::simd::Arch;
use super::super::panels::{Panels, Rows, multiply};
use super::super::tile::{self, Tile};
use super::{Layout, LeftSide};

/// What x_q is moved up by.
const SHIFT: i32 = 128;

/// A right side in bytes.
pub struct Int8Layout {
    inner: usize,
    kind: Kind,
    /// Four bytes of the inner dimension, the first lowest.
    panels: Panels<u32>,
    /// s_w of each column.
    scales: Vec<f32>,
    /// [`SHIFT`] times the sum of each column's w_q.
    moved: Vec<i32>,
}

/// How a processor multiplies bytes.
#[derive(Clone, Copy)]
pub(super) struct Kind {
    pub tile: &'static Tile<u32, u32, i32>,
    /// The largest w_q.
    pub top: f32,
}

impl Kind {
    fn of(arch: Arch) -> Self {
        match arch {
            #[cfg(target_arch = "x86_64")]
            Arch::Avx512 { vnni: true, .. } => Kind { tile: &tile::x86::INT8_AVX512, top: 127.0 },
            #[cfg(target_arch = "x86_64")]
            Arch::Avx512 { .. } | Arch::Avx2 => Kind { tile: &tile::x86::INT8_AVX2, top: 63.0 },
            Arch::Portable => Kind { tile: &tile::INT8_PORTABLE, top: 127.0 },
        }
    }
}

/// See [`Tile::spin`].
pub fn spin(arch: Arch, rounds: usize) -> Option<f64> {
    Kind::of(arch).tile.spin(rounds)
}

impl Int8Layout {
    /// Zeros.
    pub(super) fn of_kind(kind: Kind, inner: usize, cols: usize) -> Self {
        let panels = Panels::zeros(inner.div_ceil(4), cols, kind.tile.cols);
        Int8Layout { inner, kind, panels, scales: vec![1.0; cols], moved: vec![0; cols] }
    }
}

impl Layout<f32> for Int8Layout {
    fn pack(arch: Arch, inner: usize, cols: usize, value: impl Fn(usize, usize) -> f32 + Sync) -> Self {
        let mut layout = Self::of_kind(Kind::of(arch), inner, cols);
        layout.repack(value);
        layout
    }

    fn repack(&mut self, value: impl Fn(usize, usize) -> f32 + Sync) {
        let Int8Layout { inner, kind: Kind { top, .. }, panels, scales, moved } = self;
        let inner = *inner;
        scales.par_iter_mut().enumerate().for_each(|(j, scale)| {
            *scale = scale_of((0..inner).fold(0.0, |most, k| larger(most, value(k, j))), *top);
        });
        let inverses: Vec<f32> = scales.iter().map(|scale| 1.0 / scale).collect();
        let w = |k: usize, j: usize| if k < inner { quantised(value(k, j), inverses[j], *top) } else { 0 };
        panels.repack(|step, j| u32::from_le_bytes(std::array::from_fn(|i| w(4 * step + i, j) as i8 as u8)));
        let packed = &*panels;
        moved.par_iter_mut().enumerate().for_each(|(j, moved)| {
            let bytes = (0..inner.div_ceil(4)).flat_map(|step| packed.at(step, j).to_le_bytes());
            *moved = SHIFT * bytes.map(|w| i32::from(w as i8)).sum::<i32>();
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
        let new = quantised(value, 1.0 / self.scales[col], self.kind.top);
        let bytes = self.panels.at_mut(inner / 4, col);
        let mut all = bytes.to_le_bytes();
        let old = i32::from(all[inner % 4] as i8);
        all[inner % 4] = new as i8 as u8;
        *bytes = u32::from_le_bytes(all);
        self.moved[col] += SHIFT * (new - old);
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
        let Int8Layout { inner, kind: Kind { tile, .. }, scales, moved, .. } = self;
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
                        let scale = scale_of(largest(wide), TOP);
                        let inverse = 1.0 / scale;
                        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut to[..steps]);
                        for (byte, x) in bytes.iter_mut().zip(wide.iter()) {
                            *byte = (rounded(*x * inverse) + SHIFT) as u8;
                        }
                        to[steps] = scale.to_bits();
                    },
                );
            },
            #[inline(always)]
            |row, col, y: &mut [E], sums: &[i32], left: &[u32]| {
                let scale = f32::from_bits(left[steps]);
                let mut wide = [0f32; 64];
                let pieces = sums.chunks(64).zip(scales[col..].chunks(64)).zip(moved[col..].chunks(64));
                for (p, (((sums, scales), moved), y)) in pieces.zip(y.chunks_mut(64)).enumerate() {
                    let wide = &mut wide[..sums.len()];
                    for (((to, sum), s), moved) in wide.iter_mut().zip(sums).zip(scales).zip(moved) {
                        *to = (sum - moved) as f32 * (scale * *s);
                    }
                    finish(row, col + 64 * p, y, wide);
                }
            },
        );
    }
}

/// The largest size of a row's values, and no number where one of them is none: sizes are ordered as their bits are.
#[inline(always)]
fn largest(row: &[f32]) -> f32 {
    f32::from_bits(row.iter().map(|x| x.abs().to_bits()).fold(0, u32::max))
}
