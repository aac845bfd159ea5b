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

/// The least and the largest of some values and 0; no number where one of them is none. Values are compared as whole
/// numbers, in any order, which a processor does many at a time.
#[inline(always)]
pub fn extremes(values: &[f32]) -> (f32, f32) {
    // Bits of numbers below zero, all but the sign turned about, are ordered as the numbers are; twice is back again.
    let ordered = |bits: i32| bits ^ ((bits >> 31) as u32 >> 1) as i32;
    let (mut least, mut most) = (0, 0);
    for x in values {
        let key = ordered(x.to_bits() as i32);
        (least, most) = (key.min(least), key.max(most));
    }
    (f32::from_bits(ordered(least) as u32), f32::from_bits(ordered(most) as u32))
}

/// The larger size of two, and no number where one of them is none.
#[inline(always)]
pub fn larger(most: f32, x: f32) -> f32 {
    if most >= x.abs() || most.is_nan() { most } else { x.abs() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extremes_hold_zero_and_what_is_no_number() {
        assert_eq!(extremes(&[]), (0.0, 0.0));
        assert_eq!(extremes(&[3.0, 0.5]), (0.0, 3.0));
        assert_eq!(extremes(&[-0.0, -1e-40, -2.5, -0.5]), (-2.5, 0.0));
        assert_eq!(extremes(&[1.0, f32::NEG_INFINITY, f32::INFINITY]), (f32::NEG_INFINITY, f32::INFINITY));
        assert!(extremes(&[1.0, f32::NAN]).1.is_nan() && extremes(&[1.0, -f32::NAN]).0.is_nan());
    }
}
