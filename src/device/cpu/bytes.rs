//! Numbers as bytes with a common scale: x = q s, s = max |x| / 127, q rounded to the nearest.

/// The largest q.
pub const TOP: f32 = 127.0;

/// The nearest whole number, ties to even, of one whose size is below 2^22; any, where it is not.
#[inline(always)]
pub fn rounded(x: f32) -> i32 {
    // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the low bits of the sum.
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT).to_bits() as i32 - SHIFT.to_bits() as i32
}

/// round(x / scale) where `inverse` is 1 / scale, at most `top` in size; 0 for what is no number.
#[inline(always)]
pub fn quantised(x: f32, inverse: f32, top: f32) -> i32 {
    let x = x * inverse;
    if x.is_nan() { 0 } else { rounded(x.clamp(-top, top)) }
}

/// The scale at which values of size `largest` become `top`, and no number where one of them is none; 1 where all are
/// zero, or so small that the inverse of their scale would be infinite.
#[inline(always)]
pub fn scale_of(largest: f32, top: f32) -> f32 {
    if largest < top * f32::MIN_POSITIVE { 1.0 } else { largest / top }
}

/// The larger size of two, and no number where one of them is none.
#[inline(always)]
pub fn larger(most: f32, x: f32) -> f32 {
    if most >= x.abs() || most.is_nan() { most } else { x.abs() }
}
