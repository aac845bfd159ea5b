//! The two widths of number the CPU computes in: f32 for work, f64 so that tests can hold the same text to finite
//! differences.
//!
//! The f32 functions are written without branches over plain arithmetic, so that a loop over them is vectorised for
//! whatever instruction set it is compiled for.

use std::fmt::Debug;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

use super::lines::Element;
use super::masks;
use super::precision::Stored;
use super::product::tile::{Tile, f32_tile};
use super::simd::Arch;
use crate::device::philox::MaskRow;

/// f32 or f64.
pub trait Real:
    Copy
    + Default
    + PartialOrd
    + Debug
    + Send
    + Sync
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + MulAssign
    + Sum
    + Element
    + Stored<Self>
{
    /// Zero.
    const ZERO: Self;
    /// One.
    const ONE: Self;
    /// The nearest value.
    fn of(x: f64) -> Self;
    /// The same value.
    fn to_f64(self) -> f64;
    /// self * a + b, rounded once.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// The square root.
    fn sqrt(self) -> Self;
    /// The natural logarithm.
    fn ln(self) -> Self;
    /// The hyperbolic tangent.
    fn tanh(self) -> Self;
    /// e^self; f32: within 2 units in the last place, flushed to zero below -87.
    fn exp(self) -> Self;
    /// The standard normal distribution's cumulative function; f32: within 1e-7, and within 2e-5 of its own size down
    /// to -6.
    fn normal_cdf(self) -> Self;
    /// The larger of two numbers.
    fn max(self, other: Self) -> Self;
    /// The register tile that multiplies it here; `None` where the `gemm` crate does.
    fn tile(arch: Arch) -> Option<&'static Tile<Self, Self, Self>>;
    /// Writes a dropout mask's multipliers.
    fn write_mask(arch: Arch, mask: &MaskRow, out: &mut [Self]);
    /// The same values; f32 are handed over as they are.
    fn from_f32(values: Vec<f32>) -> Vec<Self>;
}

macro_rules! shared {
    ($t:ty) => {
        const ZERO: Self = 0.0;
        const ONE: Self = 1.0;
        #[inline(always)]
        fn of(x: f64) -> Self {
            x as $t
        }
        #[inline(always)]
        fn to_f64(self) -> f64 {
            f64::from(self)
        }
        #[inline(always)]
        fn mul_add(self, a: Self, b: Self) -> Self {
            <$t>::mul_add(self, a, b)
        }
        #[inline(always)]
        fn sqrt(self) -> Self {
            <$t>::sqrt(self)
        }
        #[inline(always)]
        fn ln(self) -> Self {
            <$t>::ln(self)
        }
        #[inline(always)]
        fn tanh(self) -> Self {
            <$t>::tanh(self)
        }
        #[inline(always)]
        fn max(self, other: Self) -> Self {
            if other > self { other } else { self }
        }
    };
}

impl Real for f64 {
    shared!(f64);
    fn tile(_: Arch) -> Option<&'static Tile<f64, f64, f64>> {
        None
    }
    fn write_mask(_: Arch, mask: &MaskRow, out: &mut [f64]) {
        masks::write_plain(mask, out);
    }
    fn exp(self) -> Self {
        f64::exp(self)
    }
    fn normal_cdf(self) -> Self {
        0.5 * libm::erfc(-self * std::f64::consts::FRAC_1_SQRT_2)
    }
    fn from_f32(values: Vec<f32>) -> Vec<Self> {
        values.into_iter().map(f64::from).collect()
    }
}

/// ln 2 in two parts: the first has few enough bits that its product with a small integer is exact.
const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];

/// Minimax fit of -ln(erfc(a / sqrt 2)) / a over 0..6, highest power first (largest error 9e-9, by Chebyshev nodes in
/// 40 digits: `scripts/fit_normal_cdf.py`).
const LOG_TAIL: [f32; 12] = [
    1.728_656_1e-10,
    -7.604_844e-9,
    1.517_861_6e-7,
    -1.813_186_8e-6,
    1.430_002e-5,
    -7.586_929e-5,
    2.425_857_3e-4,
    -6.320_099e-5,
    -4.768_184e-3,
    3.633_159_5e-2,
    3.183_103_6e-1,
    7.978_846e-1,
];

impl Real for f32 {
    shared!(f32);

    fn tile(arch: Arch) -> Option<&'static Tile<f32, f32, f32>> {
        f32_tile(arch)
    }

    #[inline(always)]
    fn write_mask(arch: Arch, mask: &MaskRow, out: &mut [f32]) {
        masks::write(arch, mask, out);
    }

    fn from_f32(values: Vec<f32>) -> Vec<Self> {
        values
    }

    #[inline(always)]
    fn exp(self) -> Self {
        // e^x = 2^n e^r with |r| <= ln 2 / 2, and Taylor's series to the seventh power (next term 5e-9). Adding SHIFT
        // rounds to an integer, which then stands in the low bits of the sum.
        const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23
        let x = self.clamp(-87.0, 88.0);
        let shifted = x.mul_add(std::f32::consts::LOG2_E, SHIFT);
        let n = shifted - SHIFT;
        let r = n.mul_add(-LN2[1], n.mul_add(-LN2[0], x));
        let mut p: f32 = 1.0 / 5040.0;
        for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = p.mul_add(r, c);
        }
        let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1f32.to_bits()));
        if self < -87.0 { 0.0 } else { p * power }
    }

    #[inline(always)]
    fn normal_cdf(self) -> Self {
        // Phi(-a) = e^(-a Q(a)) / 2 keeps its relative precision far into the tail, where 1 - erf would have none.
        let a = self.abs().min(6.0);
        // Even and odd powers beside each other: half as long a chain.
        let (squared, (pairs, _)) = (a * a, LOG_TAIL.as_chunks::<2>());
        let [mut odd, mut even] = pairs[0];
        for c in &pairs[1..] {
            (odd, even) = (odd.mul_add(squared, c[0]), even.mul_add(squared, c[1]));
        }
        let q = odd.mul_add(a, even);
        let tail = 0.5 * Real::exp(-q * a);
        if self < 0.0 { tail } else { 1.0 - tail }
    }
}

/// Values a reduction keeps side by side, so that it is vectorised in a fixed order of sums whatever the instruction
/// set: lane `i` sums elements i, i + 16, .., and the lanes are added in pairs.
pub const LANES: usize = 16;

/// The sum of f(0) .. f(n - 1), in lanes.
#[inline(always)]
pub fn lane_sum<R: Real>(n: usize, f: impl Fn(usize, R) -> R) -> R {
    let mut lanes = [R::ZERO; LANES];
    let whole = n - n % LANES;
    for j in (0..whole).step_by(LANES) {
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane = f(j + i, *lane);
        }
    }
    for j in whole..n {
        lanes[j - whole] = f(j, lanes[j - whole]);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The sum of products of two rows, in lanes.
#[inline(always)]
pub fn dot<R: Real>(a: &[R], b: &[R]) -> R {
    let b = &b[..a.len()];
    lane_sum(
        a.len(),
        #[inline(always)]
        |j, sum| a[j].mul_add(b[j], sum),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worst(from: i32, to: i32, f: impl Fn(f32) -> f64) -> f64 {
        (from..to).map(|i| f(i as f32 * 1e-3)).fold(0.0, f64::max)
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let error = worst(-86_000, 87_000, |x| (f64::from(Real::exp(x)) / f64::from(x).exp() - 1.0).abs());
        assert!(error < 2.4e-7, "{error:e}");
        assert_eq!(Real::exp(-100.0f32), 0.0);
    }

    #[test]
    fn the_normal_cdf_is_close_in_the_middle_and_in_the_tail() {
        let cdf = |x: f32| 0.5 * libm::erfc(-f64::from(x) * std::f64::consts::FRAC_1_SQRT_2);
        let absolute = worst(-8_000, 8_000, |x| (f64::from(x.normal_cdf()) - cdf(x)).abs());
        let relative = worst(-5_900, 0, |x| (f64::from(x.normal_cdf()) / cdf(x) - 1.0).abs());
        assert!(absolute < 1e-7 && relative < 2e-5, "{absolute:e} {relative:e}");
    }

    #[test]
    fn a_lane_sum_counts_every_element_once() {
        for n in [0, 1, 15, 16, 17, 100] {
            assert_eq!(
                lane_sum::<f64>(
                    n,
                    #[inline(always)]
                    |j, s| s + j as f64
                ),
                (n * n.saturating_sub(1) / 2) as f64
            );
        }
    }
}
