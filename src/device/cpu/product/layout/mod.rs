//! Frozen weights, packed for one direction of one precision: a file a precision.

mod bf16;
mod f32;
mod int8;
mod plain;
#[cfg(test)]
mod tests;

pub use bf16::{Bf16Layout, spin as spin_bf16};
pub use f32::F32Layout;
pub use int8::{Int8Layout, spin as spin_int8};
pub use plain::Plain;

use super::super::precision::{Stored, load};
use super::super::real::Real;
use super::super::simd::Arch;
use super::panels::Rows;

/// The left side of a product: rows that are made when they are asked for. A closure that writes one is a left side.
pub trait LeftSide<R>: Sync {
    /// Writes row `i`.
    fn write(&self, i: usize, to: &mut [R]);
    /// Row `i`, where it lies in memory as pairs of bf16.
    #[inline(always)]
    fn pairs(&self, _: usize) -> Option<&[u32]> {
        None
    }
}

impl<R, F: Fn(usize, &mut [R]) + Sync> LeftSide<R> for F {
    #[inline(always)]
    fn write(&self, i: usize, to: &mut [R]) {
        self(i, to);
    }
}

/// A left side that is read as it is stored.
pub struct AsStored<'x, E> {
    /// Row after row.
    pub data: &'x [E],
    /// Columns.
    pub cols: usize,
}

impl<E> AsStored<'_, E> {
    #[inline(always)]
    fn row(&self, i: usize) -> &[E] {
        &self.data[i * self.cols..][..self.cols]
    }
}

impl<R: Real, E: Stored<R>> LeftSide<R> for AsStored<'_, E> {
    #[inline(always)]
    fn write(&self, i: usize, to: &mut [R]) {
        load(self.row(i), to);
    }

    #[inline(always)]
    fn pairs(&self, i: usize) -> Option<&[u32]> {
        E::pairs(self.row(i))
    }
}

/// The right side of a product, (inner, columns), as a precision multiplies it.
pub trait Layout<R: Real>: Sized + Send + Sync + 'static {
    /// Packs `value(inner, column)`.
    fn pack(arch: Arch, inner: usize, cols: usize, value: impl Fn(usize, usize) -> R + Sync) -> Self;
    /// Replaces every value.
    fn repack(&mut self, value: impl Fn(usize, usize) -> R + Sync);
    /// (inner, columns).
    fn shape(&self) -> (usize, usize);
    /// A value, as it multiplies.
    fn at(&self, inner: usize, col: usize) -> R;
    /// Replaces a value, at the precision it multiplies in.
    fn set(&mut self, inner: usize, col: usize, value: R);
    /// Hands all values to `visit` as they lie, for hashing.
    fn visit(&self, visit: &mut dyn FnMut(&[u8]));
    /// y = finish(x B): `finish(row, column, y, sums)` is handed the columns of `y` from `column` on and as many sums. A
    /// row's bits do not depend on the other rows.
    fn multiply<E: Send>(
        &self,
        arch: Arch,
        m: usize,
        x: impl LeftSide<R>,
        y: Rows<'_, E>,
        finish: impl Fn(usize, usize, &mut [E], &[R]) + Sync,
    );
}
