//! f32, by a register tile.

use super::super::super::real::Real;
use super::super::super::simd::Arch;
use super::super::panels::{Panels, PanelsView, Rows, multiply};
use super::super::tile::Tile;
use super::{Layout, LeftSide, Plain};

/// A right side in f32: in a tile's panels, or plain where this processor has no tile.
pub enum F32Layout {
    /// For a tile.
    Panels(&'static Tile<f32, f32, f32>, Panels<f32>),
    /// For the `gemm` crate.
    Plain(Plain<f32>),
}

impl Layout<f32> for F32Layout {
    fn pack(arch: Arch, inner: usize, cols: usize, value: impl Fn(usize, usize) -> f32 + Sync) -> Self {
        match f32::tile(arch) {
            Some(tile) => {
                let mut panels = Panels::zeros(inner, cols, tile.cols);
                panels.repack(value);
                F32Layout::Panels(tile, panels)
            }
            None => F32Layout::Plain(Plain::pack(arch, inner, cols, value)),
        }
    }

    fn repack(&mut self, value: impl Fn(usize, usize) -> f32 + Sync) {
        match self {
            F32Layout::Panels(_, panels) => panels.repack(value),
            F32Layout::Plain(plain) => plain.repack(value),
        }
    }

    fn shape(&self) -> (usize, usize) {
        match self {
            F32Layout::Panels(_, panels) => (panels.view().steps, panels.cols()),
            F32Layout::Plain(plain) => plain.shape(),
        }
    }

    fn at(&self, inner: usize, col: usize) -> f32 {
        match self {
            F32Layout::Panels(_, panels) => panels.at(inner, col),
            F32Layout::Plain(plain) => plain.at(inner, col),
        }
    }

    fn set(&mut self, inner: usize, col: usize, value: f32) {
        match self {
            F32Layout::Panels(_, panels) => *panels.at_mut(inner, col) = value,
            F32Layout::Plain(plain) => plain.set(inner, col, value),
        }
    }

    fn visit(&self, visit: &mut dyn FnMut(&[u8])) {
        match self {
            F32Layout::Panels(_, panels) => visit(bytemuck::cast_slice(panels.as_laid_out())),
            F32Layout::Plain(plain) => plain.visit(visit),
        }
    }

    fn multiply<E: Send>(
        &self,
        arch: Arch,
        m: usize,
        x: impl LeftSide<f32>,
        y: Rows<'_, E>,
        finish: impl Fn(usize, usize, &mut [E], &[f32]) + Sync,
    ) {
        match self {
            F32Layout::Panels(tile, panels) => by_tile(arch, tile, panels.view(), m, x, y, finish),
            F32Layout::Plain(plain) => plain.multiply(arch, m, x, y, finish),
        }
    }
}

/// As [`Layout::multiply`], by a tile.
pub(super) fn by_tile<E: Send>(
    arch: Arch,
    tile: &Tile<f32, f32, f32>,
    b: PanelsView<'_, f32>,
    m: usize,
    x: impl LeftSide<f32>,
    y: Rows<'_, E>,
    finish: impl Fn(usize, usize, &mut [E], &[f32]) + Sync,
) {
    let steps = b.steps;
    multiply(
        arch,
        (tile, b),
        m,
        y,
        #[inline(always)]
        |row, to: &mut [f32]| x.write(row, &mut to[..steps]),
        #[inline(always)]
        |row, col, y: &mut [E], sums: &[f32], _: &[f32]| finish(row, col, y, sums),
    );
}
