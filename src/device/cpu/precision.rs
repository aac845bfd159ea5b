//! What an encoder on the CPU computes in.
//!
//! A precision says which number the residual stream, sums and vectors are, which number activations that are kept or
//! feed a product are stored as, and how weights are laid out.

use half::bf16;

use super::lines::Element;

use super::product::layout::{Bf16Layout, F32Layout, Int8Layout, Layout, Plain};
use super::product::small::Operand;
use super::real::Real;
use super::tables::{Bytes, Numbers, Table};

/// A number that activations are stored as. Rounded once, where it is made.
pub trait Stored<R: Real>: Element + Operand<R> {
    /// The value.
    fn load(self) -> R;
    /// The nearest that can be stored.
    fn store(value: R) -> Self;
    /// The values as they lie, where they are stored at full width.
    fn whole(values: &[Self]) -> Option<&[R]>;
    /// The values as they lie, two by two, where they are an even number of bf16.
    #[inline(always)]
    fn pairs(_: &[Self]) -> Option<&[u32]> {
        None
    }
}

impl Stored<f32> for f32 {
    #[inline(always)]
    fn load(self) -> f32 {
        self
    }

    #[inline(always)]
    fn store(value: f32) -> Self {
        value
    }

    fn whole(values: &[f32]) -> Option<&[f32]> {
        Some(values)
    }
}

impl Stored<f64> for f64 {
    #[inline(always)]
    fn load(self) -> f64 {
        self
    }

    #[inline(always)]
    fn store(value: f64) -> Self {
        value
    }

    fn whole(values: &[f64]) -> Option<&[f64]> {
        Some(values)
    }
}

impl Stored<f32> for bf16 {
    #[inline(always)]
    fn load(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    /// To the nearest, ties to even; what is no number stays none.
    #[inline(always)]
    fn store(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        // Rounding could carry a NaN's bits over into a number's.
        bf16::from_bits(if value.is_nan() { (bits >> 16 | 0x40) as u16 } else { rounded as u16 })
    }

    fn whole(_: &[bf16]) -> Option<&[f32]> {
        None
    }

    #[inline(always)]
    fn pairs(values: &[bf16]) -> Option<&[u32]> {
        bytemuck::try_cast_slice(values).ok()
    }
}

/// Values at full width.
#[inline(always)]
pub fn load<R: Real, E: Stored<R>>(from: &[E], to: &mut [R]) {
    for (to, x) in to.iter_mut().zip(from) {
        *to = x.load();
    }
}

/// The numbers and layouts of one encoder.
pub trait Precision: Copy + Send + Sync + 'static {
    /// The residual stream, sums and vectors.
    type Real: Real;
    /// Activations.
    type Stored: Stored<Self::Real>;
    /// Weights, packed for one direction.
    type Layout: Layout<Self::Real>;
    /// Embedding tables.
    type Table: Table<Self::Real>;
}

/// f32 throughout.
#[derive(Debug, Clone, Copy)]
pub struct F32;

impl Precision for F32 {
    type Real = f32;
    type Stored = f32;
    type Layout = F32Layout;
    type Table = Numbers<f32>;
}

/// Weights and kept activations in bf16; the stream, sums and vectors in f32.
#[derive(Debug, Clone, Copy)]
pub struct Bf16;

impl Precision for Bf16 {
    type Real = f32;
    type Stored = bf16;
    type Layout = Bf16Layout;
    type Table = Numbers<bf16>;
}

/// Products and tables of bytes, for inference; all else in f32.
#[derive(Debug, Clone, Copy)]
pub struct Int8;

impl Precision for Int8 {
    type Real = f32;
    type Stored = f32;
    type Layout = Int8Layout;
    type Table = Bytes;
}

/// f64 throughout: for tests, which hold it to finite differences.
#[derive(Debug, Clone, Copy)]
pub struct F64;

impl Precision for F64 {
    type Real = f64;
    type Stored = f64;
    type Layout = Plain<f64>;
    type Table = Numbers<f64>;
}
