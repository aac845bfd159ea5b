//! bf16: sums in f32 of products that are exact in it.
//!
//! With the processor's own dot product of pairs, the left side is rounded as its rows are made. Without it, weights
//! are stored in bf16 and widened for each product, which then runs as f32's does, over the same rounded left side.

use half::bf16;
use rayon::prelude::*;

use super::super::super::lines::with_scratch;
use super::super::super::precision::{Stored, load};
use super::super::super::real::Real;
use super::super::super::simd::Arch;
use super::super::panels::{Panels, Rows, multiply};
use super::super::strided::View;
use super::super::tile::{Tile, pair_tile};
use super::f32::by_tile;
use super::plain::by_gemm;
use super::{Layout, LeftSide};

/// A right side in bf16.
pub struct Bf16Layout {
    inner: usize,
    kind: Kind,
}

enum Kind {
    /// Pairs of the inner dimension, for a tile that multiplies them.
    Pairs(&'static Tile<u32, u32, f32>, Panels<u32>),
    /// For widening: in a f32 tile's panels, or in a single one, which is row-major, where there is no tile.
    Stored(Option<&'static Tile<f32, f32, f32>>, Panels<bf16>),
}

/// The value of a half of a pair.
fn half_of(pair: u32, which: usize) -> bf16 {
    bf16::from_bits((pair >> (16 * which)) as u16)
}

/// Two numbers as a pair, rounded; the second is zero where there is none.
#[inline(always)]
fn pair(a: f32, b: f32) -> u32 {
    u32::from(bf16::store(a).to_bits()) | u32::from(bf16::store(b).to_bits()) << 16
}

/// Gives a closure back: a `let` cannot carry the attribute that inlines it.
#[inline(always)]
fn inlined<F: Fn(usize, &mut [f32]) + Sync>(f: F) -> F {
    f
}

/// See [`Tile::spin`]: of pairs, else in f32, as which it is computed.
pub fn spin(arch: Arch, rounds: usize) -> Option<f64> {
    match pair_tile(arch) {
        Some(tile) => tile.spin(rounds),
        None => f32::tile(arch).and_then(|tile| tile.spin(rounds)),
    }
}

impl Bf16Layout {
    /// Zeros, for a tile of pairs.
    pub(super) fn of_pairs(tile: &'static Tile<u32, u32, f32>, inner: usize, cols: usize) -> Self {
        Bf16Layout { inner, kind: Kind::Pairs(tile, Panels::zeros(inner.div_ceil(2), cols, tile.cols)) }
    }
}

impl Layout<f32> for Bf16Layout {
    fn pack(arch: Arch, inner: usize, cols: usize, value: impl Fn(usize, usize) -> f32 + Sync) -> Self {
        let mut layout = match pair_tile(arch) {
            Some(tile) => Self::of_pairs(tile, inner, cols),
            None => {
                let tile = f32::tile(arch);
                let panels = Panels::zeros(inner, cols, tile.map_or(cols, |tile| tile.cols));
                Bf16Layout { inner, kind: Kind::Stored(tile, panels) }
            }
        };
        layout.repack(value);
        layout
    }

    fn repack(&mut self, value: impl Fn(usize, usize) -> f32 + Sync) {
        let inner = self.inner;
        match &mut self.kind {
            Kind::Pairs(_, panels) => panels.repack(|step, col| {
                let second = 2 * step + 1;
                pair(value(2 * step, col), if second < inner { value(second, col) } else { 0.0 })
            }),
            Kind::Stored(_, panels) => panels.repack(|k, col| bf16::store(value(k, col))),
        }
    }

    fn shape(&self) -> (usize, usize) {
        match &self.kind {
            Kind::Pairs(_, panels) => (self.inner, panels.cols()),
            Kind::Stored(_, panels) => (self.inner, panels.cols()),
        }
    }

    fn at(&self, inner: usize, col: usize) -> f32 {
        match &self.kind {
            Kind::Pairs(_, panels) => half_of(panels.at(inner / 2, col), inner % 2).load(),
            Kind::Stored(_, panels) => panels.at(inner, col).load(),
        }
    }

    fn set(&mut self, inner: usize, col: usize, value: f32) {
        let value = bf16::store(value);
        match &mut self.kind {
            Kind::Pairs(_, panels) => {
                let (pair, shift) = (panels.at_mut(inner / 2, col), 16 * (inner % 2));
                *pair = *pair & !(0xffff << shift) | u32::from(value.to_bits()) << shift;
            }
            Kind::Stored(_, panels) => *panels.at_mut(inner, col) = value,
        }
    }

    fn visit(&self, visit: &mut dyn FnMut(&[u8])) {
        match &self.kind {
            Kind::Pairs(_, panels) => visit(bytemuck::cast_slice(panels.as_laid_out())),
            Kind::Stored(_, panels) => visit(bytemuck::cast_slice(panels.as_laid_out())),
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
        let inner = self.inner;
        if m == 0 {
            return;
        }
        match &self.kind {
            Kind::Pairs(tile, panels) => multiply(
                arch,
                (tile, panels.view()),
                m,
                y,
                #[inline(always)]
                |row, to: &mut [u32]| {
                    if let Some(pairs) = x.pairs(row) {
                        to[..pairs.len()].copy_from_slice(pairs);
                        return;
                    }
                    with_scratch(
                        inner.next_multiple_of(2),
                        0,
                        #[inline(always)]
                        |wide: &mut [f32], _: &mut [u8]| {
                            wide[inner..].fill(0.0);
                            x.write(row, &mut wide[..inner]);
                            for (to, of) in to.iter_mut().zip(wide.chunks_exact(2)) {
                                *to = pair(of[0], of[1]);
                            }
                        },
                    );
                },
                #[inline(always)]
                |row, col, y: &mut [E], sums: &[f32], _: &[u32]| finish(row, col, y, sums),
            ),
            Kind::Stored(tile, panels) => {
                let x = inlined(
                    #[inline(always)]
                    |row: usize, to: &mut [f32]| {
                        x.write(row, to);
                        to.iter_mut().for_each(|x| *x = bf16::store(*x).load());
                    },
                );
                let stored = panels.as_laid_out();
                with_scratch::<f32, u8, _>(stored.len(), 0, |wide, _| {
                    let piece = 1 << 14;
                    wide.par_chunks_mut(piece).zip(stored.par_chunks(piece)).for_each(|(wide, stored)| {
                        arch.run(
                            wide,
                            #[inline(always)]
                            |wide: &mut [f32]| load(stored, wide),
                        );
                    });
                    match tile {
                        Some(tile) => by_tile(arch, tile, panels.view().over(wide), m, x, y, finish),
                        None => by_gemm(arch, View::new(wide, inner, panels.cols()), m, x, y, finish),
                    }
                });
            }
        }
    }
}
