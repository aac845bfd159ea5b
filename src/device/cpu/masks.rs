//! Dropout masks, a row at a time: the scale for every element that is kept, 0 for the others.
//!
//! The draws are those of [`crate::device::philox`]. On x86-64 they are made in the processor's vectors by hand, as the
//! compiler moves words from lane to lane and spills them, which took three times as long with AVX2. A word stands in
//! the low half of a 64-bit lane: a multiplication of low halves is all that a round needs, and what gathers in the high
//! half is ignored.

use super::real::Real;
use super::simd::Arch;
use crate::device::philox::MaskRow;

/// Writes a row's multipliers, in any width of number and by any processor.
#[inline(always)]
pub fn write_plain<R: Real>(mask: &MaskRow, out: &mut [R]) {
    let (cut, scale, n) = (mask.cut(), R::of(mask.scale()), out.len());
    mask.blocks(
        n,
        #[inline(always)]
        |at, draws| {
            for (out, draw) in out[at..].iter_mut().zip(draws) {
                *out = if u32::from(*draw) >= cut { scale } else { R::ZERO };
            }
        },
    );
}

/// As [`write_plain`], by the processor's own vectors where it has some.
#[inline(always)]
pub fn write(arch: Arch, mask: &MaskRow, out: &mut [f32]) {
    match arch {
        // SAFETY: a value of `Arch` promises the instructions.
        #[cfg(target_arch = "x86_64")]
        Arch::Avx512 { .. } => unsafe { avx512::write(mask, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Arch::Avx2 => unsafe { avx2::write(mask, out) },
        Arch::Portable => write_plain(mask, out),
    }
}

/// Masks by vectors of `lanes` calls. Lane 2 i has call i and lane 2 i + 1 call `lanes` / 2 + i: interleaving the
/// words of the even lanes, then of the odd ones, gives all draws in order.
#[cfg(target_arch = "x86_64")]
macro_rules! masks {
    ($name:ident, $features:literal, $vector:ty, lanes $lanes:literal, numbers $numbers:expr, splat $splat:expr,
     add $add:expr, multiply $multiply:expr, high $high:expr, xor $xor:expr, join $join:expr, even $even:expr,
     odd $odd:expr, put $put:expr) => {
        mod $name {
            use std::arch::x86_64::*;

            use crate::device::philox::{MULTIPLIERS, MaskRow, ROUNDS, WEYL};

            /// Draws of a vector of calls.
            const DRAWS: usize = 8 * $lanes;

            /// Writes a row's multipliers.
            #[target_feature(enable = $features)]
            pub fn write(mask: &MaskRow, out: &mut [f32]) {
                // Two vectors at a time hide most of a round's latency, and fit the registers.
                for (i, out) in out.chunks_mut(2 * DRAWS).enumerate() {
                    let (first, n) = ((2 * $lanes * i) as u64, out.len());
                    if n == 2 * DRAWS {
                        block::<2>(mask, first, out);
                        continue;
                    }
                    let mut room = [0.0; 2 * DRAWS];
                    if n > DRAWS {
                        block::<2>(mask, first, &mut room);
                    } else {
                        block::<1>(mask, first, &mut room[..DRAWS]);
                    }
                    out.copy_from_slice(&room[..n]);
                }
            }

            /// Multipliers of all draws of `N` vectors of calls, the first of them number `first`.
            #[inline]
            #[target_feature(enable = $features)]
            fn block<const N: usize>(mask: &MaskRow, first: u64, out: &mut [f32]) {
                assert_eq!(out.len(), N * DRAWS, "an element a draw");
                let [m0, m1] = MULTIPLIERS.map(|m| $splat(m));
                let [w0, w1] = WEYL.map(|w| $splat(u64::from(w)));
                let [mut k0, mut k1] = mask.key().map(|k| $splat(u64::from(k)));
                let mut c0: [$vector; N] = std::array::from_fn(|v| $add($splat(first + (v * $lanes) as u64), $numbers));
                let [mut c1, mut c2, mut c3] = mask.counter().map(|word| [$splat(u64::from(word)); N]);
                for _ in 0..ROUNDS {
                    for v in 0..N {
                        let (p0, p1) = ($multiply(c0[v], m0), $multiply(c2[v], m1));
                        c0[v] = $xor($high(p1), c1[v], k0);
                        c2[v] = $xor($high(p0), c3[v], k1);
                        (c1[v], c3[v]) = (p1, p0);
                    }
                    (k0, k1) = ($add(k0, w0), $add(k1, w1));
                }
                // Draws are compared as unsigned, whatever the type of the vector's elements.
                let (cut, scale) = (mask.cut() as i16, mask.scale() as f32);
                for (v, out) in out.chunks_exact_mut(DRAWS).enumerate() {
                    let (low, high) = ($join(c0[v], c1[v]), $join(c2[v], c3[v]));
                    let (first, second) = out.split_at_mut(DRAWS / 2);
                    // SAFETY: each half has room for what half the draws give.
                    unsafe {
                        $put($even(low, high), cut, scale, first.as_mut_ptr());
                        $put($odd(low, high), cut, scale, second.as_mut_ptr());
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
masks!(avx2, "avx2", __m256i, lanes 4, numbers _mm256_set_epi64x(3, 1, 2, 0),
splat |word: u64| _mm256_set1_epi64x(word as i64),
add _mm256_add_epi32, multiply _mm256_mul_epu32, high |x| _mm256_srli_epi64::<32>(x),
xor |a, b, c| _mm256_xor_si256(a, _mm256_xor_si256(b, c)),
join |low, high| _mm256_blend_epi32::<0xaa>(low, _mm256_slli_epi64::<32>(high)),
even _mm256_unpacklo_epi64, odd _mm256_unpackhi_epi64,
put |draws: __m256i, cut: i16, scale: f32, to: *mut f32| {
    let kept = _mm256_cmpeq_epi16(_mm256_max_epu16(draws, _mm256_set1_epi16(cut)), draws);
    let halves = [_mm256_castsi256_si128(kept), _mm256_extracti128_si256::<1>(kept)];
    for (i, half) in halves.into_iter().enumerate() {
        let kept = _mm256_castsi256_ps(_mm256_cvtepi16_epi32(half));
        _mm256_storeu_ps(to.add(8 * i), _mm256_and_ps(_mm256_set1_ps(scale), kept));
    }
});

#[cfg(target_arch = "x86_64")]
masks!(avx512, "avx512f,avx512bw", __m512i, lanes 8, numbers _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0),
splat |word: u64| _mm512_set1_epi64(word as i64),
add _mm512_add_epi32, multiply _mm512_mul_epu32, high |x| _mm512_srli_epi64::<32>(x),
xor |a, b, c| _mm512_ternarylogic_epi64::<0x96>(a, b, c),
join |low, high| _mm512_mask_blend_epi32(0xaaaa, low, _mm512_slli_epi64::<32>(high)),
even _mm512_unpacklo_epi64, odd _mm512_unpackhi_epi64,
put |draws: __m512i, cut: i16, scale: f32, to: *mut f32| {
    let kept = _mm512_cmpge_epu16_mask(draws, _mm512_set1_epi16(cut));
    for (i, kept) in [kept as u16, (kept >> 16) as u16].into_iter().enumerate() {
        _mm512_storeu_ps(to.add(16 * i), _mm512_maskz_mov_ps(kept, _mm512_set1_ps(scale)));
    }
});

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::batch::DropoutKey;
    use crate::device::ops::{At, Site};

    #[test]
    fn every_processor_path_writes_the_multipliers_of_the_draws() {
        let site = |layer| Site { layer, at: At::Probabilities };
        for n in (0..70).chain([127, 128, 129, 200, 255, 256, 257, 511, 768]) {
            for (seed, p) in [(0, 0.1), (u64::MAX, 0.5), (0x1234_5678_9abc_def0, 0.999)] {
                let key = DropoutKey { seed, step: 3 + n as u32, index: 77 };
                let mask = MaskRow::new(key, site(n as u32 % 24), 5 << 16 | n as u32, p);
                let mut expected = vec![f32::NAN; n];
                write_plain(&mask, &mut expected);
                for arch in Arch::available() {
                    let mut found = vec![f32::NAN; n + 1];
                    write(arch, &mask, &mut found[..n]);
                    assert_eq!(found[..n], expected, "{} {n} {p}", arch.name());
                    assert!(found[n].is_nan(), "{} {n}: what lies behind is left alone", arch.name());
                }
            }
        }
    }
}
