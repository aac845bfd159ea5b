//! Register tiles: the loop under every product.
//!
//! A tile is a few rows by a few columns of the result, held in registers while the inner dimension runs by. Each
//! entry is one chain of fused multiply-adds in order of the inner dimension, continued from memory between blocks of
//! it: so an f32 entry has the same bits from every tile, whatever its rows, its processor or the cut of the work.

use super::super::simd::Arch;

/// One kind of tile: C (rows, columns) = or += A (rows, inner) B (inner, columns).
///
/// `A` and `B` are what one step of the loop reads of a row and of a column: one number, or a few side by side.
pub struct Tile<A: 'static, B: 'static, C: 'static> {
    /// The most rows.
    pub rows: usize,
    /// Columns, always all of them.
    pub cols: usize,
    run: Run<A, B, C>,
    /// Rounds of the loop's arithmetic on registers alone; none where the compiler makes it.
    peak: Option<Peak>,
}

/// The arithmetic of a tile without its memory: what the processor can do at most.
#[derive(Clone, Copy)]
struct Peak {
    rounds: unsafe fn(usize),
    /// Multiplications and additions of a round.
    operations: usize,
}

/// (rows, steps, A, A's row stride, A's step stride, B, C, C's row stride, whether C is begun anew).
type Run<A, B, C> = unsafe fn(usize, usize, *const A, usize, usize, *const B, *mut C, usize, bool);

/// The left side of a tile: the step `k` of row `r` stands at `r * row + k * step`.
#[derive(Clone, Copy)]
pub struct Left<'a, A> {
    /// From the tile's first row and step on.
    pub data: &'a [A],
    /// Distance of two rows.
    pub row: usize,
    /// Distance of two steps.
    pub step: usize,
}

impl<A, B, C> Tile<A, B, C> {
    /// Runs over `steps` steps of `rows` rows. `b` holds all columns, step after step; `c` the result, rows `stride`
    /// apart, which is gone on from, unless this is the first block of the inner dimension.
    ///
    /// # Panics
    ///
    /// Where a side is too short, or there are more rows than the tile has.
    #[inline(always)]
    pub fn run(&self, rows: usize, steps: usize, a: Left<A>, b: &[B], (c, stride): (&mut [C], usize), first: bool) {
        let last = (rows.max(1) - 1) * a.row + (steps.max(1) - 1) * a.step;
        assert!((1..=self.rows).contains(&rows) && steps > 0 && last < a.data.len(), "a tile's left side");
        assert!(steps * self.cols <= b.len() && self.cols <= stride, "a tile's right side");
        assert!((rows - 1) * stride + self.cols <= c.len(), "a tile's result");
        // SAFETY: every element that is read or written was asserted to lie inside its slice. A tile is handed out
        // only where the processor has its instructions.
        unsafe { (self.run)(rows, steps, a.data.as_ptr(), a.row, a.step, b.as_ptr(), c.as_mut_ptr(), stride, first) }
    }

    /// Runs `rounds` rounds on registers alone; gives their multiplications and additions.
    pub fn spin(&self, rounds: usize) -> Option<f64> {
        let peak = self.peak?;
        // SAFETY: it touches no memory but its own; a tile is handed out only where the processor has its
        // instructions.
        unsafe { (peak.rounds)(rounds) };
        Some((rounds * peak.operations) as f64)
    }
}

/// The tile of f32, where there is one.
pub fn f32_tile(arch: Arch) -> Option<&'static Tile<f32, f32, f32>> {
    match arch {
        #[cfg(target_arch = "x86_64")]
        Arch::Avx512 { .. } => Some(&x86::F32_AVX512),
        #[cfg(target_arch = "x86_64")]
        Arch::Avx2 => Some(&x86::F32_AVX2),
        Arch::Portable => None,
    }
}

/// The tile of bf16 pairs, where the processor multiplies them.
pub fn pair_tile(arch: Arch) -> Option<&'static Tile<u32, u32, f32>> {
    match arch {
        #[cfg(target_arch = "x86_64")]
        Arch::Avx512 { bf16: true, .. } => Some(&x86::BF16_AVX512),
        _ => None,
    }
}

/// How a processor multiplies bytes, four a step, unsigned times signed.
#[derive(Clone, Copy)]
pub struct Bytes {
    /// The tile.
    pub tile: &'static Tile<u32, u32, i32>,
    /// The largest size of the signed ones at which no sum overflows.
    pub top: f32,
}

/// The tile of bytes.
pub fn byte_tile(arch: Arch) -> Bytes {
    match arch {
        #[cfg(target_arch = "x86_64")]
        Arch::Avx512 { vnni: true, .. } => Bytes { tile: &x86::INT8_AVX512, top: 127.0 },
        #[cfg(target_arch = "x86_64")]
        Arch::Avx512 { .. } | Arch::Avx2 => Bytes { tile: &x86::INT8_AVX2, top: 63.0 },
        Arch::Portable => Bytes { tile: &INT8_PORTABLE, top: 127.0 },
    }
}

/// Bytes on any processor.
static INT8_PORTABLE: Tile<u32, u32, i32> = Tile { rows: 4, cols: 16, run: plain::<i32, 16>, peak: None };

/// A sum that a step of both sides is added to.
trait Chain: Copy + Default {
    fn step(self, x: u32, w: u32) -> Self;
}

/// As VNNI: unsigned times signed.
impl Chain for i32 {
    #[inline(always)]
    fn step(self, x: u32, w: u32) -> i32 {
        let products = x.to_le_bytes().into_iter().zip(w.to_le_bytes()).map(|(x, w)| i32::from(x) * i32::from(w as i8));
        self + products.sum::<i32>()
    }
}

/// A tile without instructions of its own, one number after the other.
#[allow(clippy::too_many_arguments)]
unsafe fn plain<C: Chain, const COLS: usize>(
    rows: usize,
    steps: usize,
    a: *const u32,
    row: usize,
    step: usize,
    b: *const u32,
    c: *mut C,
    stride: usize,
    first: bool,
) {
    for r in 0..rows {
        let mut sums = [C::default(); COLS];
        // SAFETY: `Tile::run` asserted that rows and steps lie inside a, b and c.
        unsafe {
            let c = c.add(r * stride);
            if !first {
                sums = std::array::from_fn(|j| *c.add(j));
            }
            for k in 0..steps {
                let x = *a.add(r * row + k * step);
                for (j, sum) in sums.iter_mut().enumerate() {
                    *sum = sum.step(x, *b.add(k * COLS + j));
                }
            }
            for (j, sum) in sums.iter().enumerate() {
                *c.add(j) = *sum;
            }
        }
    }
}

#[cfg(test)]
pub mod emulated {
    //! Tiles of instructions that this processor may not have, in the same order of sums.

    use half::bf16;

    use super::super::super::precision::Stored;
    use super::{Chain, Tile, plain};

    /// As [`super::x86::BF16_AVX512`].
    pub static PAIRS: Tile<u32, u32, f32> = Tile { rows: 14, cols: 32, run: plain::<f32, 32>, peak: None };
    /// As [`super::x86::INT8_AVX512`].
    pub static BYTES: Tile<u32, u32, i32> = Tile { rows: 14, cols: 32, run: plain::<i32, 32>, peak: None };

    /// As the maker describes it: the second numbers' product is added, then the first's, each rounded once.
    impl Chain for f32 {
        fn step(self, x: u32, w: u32) -> f32 {
            let of = |pair: u32, which: u32| bf16::from_bits((pair >> (16 * which)) as u16).load();
            of(x, 0).mul_add(of(w, 0), of(x, 1).mul_add(of(w, 1), self))
        }
    }
}

/// Calls a kernel that is generic over its rows.
#[cfg(target_arch = "x86_64")]
macro_rules! by_rows {
    ($kernel:ident, $rows:expr, $args:tt, $($r:literal)*) => {
        match $rows {
            $($r => unsafe { $kernel::<$r> $args },)*
            _ => unreachable!("a tile has at least one row and at most its own"),
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! The tiles of x86-64, handed out by the functions above, which alone know that the processor has them.

    use std::arch::x86_64::*;

    use super::{Peak, Tile};

    /// f32 on AVX2: 6 by 16, twelve of sixteen registers.
    pub static F32_AVX2: Tile<f32, f32, f32> =
        Tile { rows: 6, cols: 16, run: f32_avx2::run, peak: Some(f32_avx2::PEAK) };
    /// f32 on AVX-512: 14 by 32, 28 of 32 registers.
    pub static F32_AVX512: Tile<f32, f32, f32> =
        Tile { rows: 14, cols: 32, run: f32_avx512::run, peak: Some(f32_avx512::PEAK) };
    /// Pairs of bf16 on AVX-512, the first in the low half. A step adds the product of the second, then of the first.
    pub static BF16_AVX512: Tile<u32, u32, f32> =
        Tile { rows: 14, cols: 32, run: bf16_avx512::run, peak: Some(bf16_avx512::PEAK) };
    /// Four bytes on AVX-512, unsigned times signed.
    pub static INT8_AVX512: Tile<u32, u32, i32> =
        Tile { rows: 14, cols: 32, run: int8_avx512::run, peak: Some(int8_avx512::PEAK) };
    /// Four bytes on AVX2, unsigned times signed. Two products are added in 16 bits: the signed ones must be at most 63
    /// in size (2 * 255 * 63 < 2^15).
    pub static INT8_AVX2: Tile<u32, u32, i32> =
        Tile { rows: 5, cols: 16, run: int8_avx2::run, peak: Some(int8_avx2::PEAK) };

    /// A tile of two registers a row: how its numbers are loaded, multiplied and stored.
    macro_rules! tile {
        ($name:ident, $features:literal, $a:ty, $b:ty, $c:ty, $lanes:literal, depth $depth:literal,
         one $one:expr, zero $zero:expr, load_c $load_c:expr, load_b $load_b:expr, splat $splat:expr, add $add:expr, store $store:expr,
         rows $($r:literal)*) => {
            mod $name {
                use super::*;

                /// Sums that run beside each other, enough to hide the latency of one: five numbers of the left side
                /// by two registers of the right, so that loads take no turn that a multiplication could have.
                const CHAINS: (usize, usize) = (5, 2);

                pub const PEAK: Peak =
                    Peak { rounds, operations: CHAINS.0 * CHAINS.1 * $lanes * $depth * 2 };

                #[target_feature(enable = $features)]
                unsafe fn rounds(n: usize) {
                    // Not zero, at which a processor would draw less and clock higher than at work.
                    let ones = [[$one; $lanes]; CHAINS.1];
                    // SAFETY: it reads `ones`.
                    let bs = std::hint::black_box(&ones).each_ref().map(|ones| unsafe { $load_b(ones.as_ptr()) });
                    let mut sums = [[$zero; CHAINS.1]; CHAINS.0];
                    let xs = [$splat($one); CHAINS.0];
                    for _ in 0..n {
                        // Read anew, each for itself: nothing may be known of them, or be worked out once for all.
                        for (sums, x) in sums.iter_mut().zip(std::hint::black_box(&xs)) {
                            for (s, b) in sums.iter_mut().zip(&bs) {
                                *s = $add(*s, *x, *b);
                            }
                        }
                    }
                    std::hint::black_box(sums);
                }

                #[allow(clippy::too_many_arguments)]
                pub unsafe fn run(
                    rows: usize,
                    steps: usize,
                    a: *const $a,
                    row: usize,
                    step: usize,
                    b: *const $b,
                    c: *mut $c,
                    stride: usize,
                    first: bool,
                ) {
                    // SAFETY: the caller's promise is `Tile::run`'s.
                    by_rows!(of_rows, rows, (steps, a, row, step, b, c, stride, first), $($r)*)
                }

                #[allow(clippy::too_many_arguments)]
                #[target_feature(enable = $features)]
                unsafe fn of_rows<const R: usize>(
                    steps: usize,
                    mut a: *const $a,
                    row: usize,
                    step: usize,
                    mut b: *const $b,
                    c: *mut $c,
                    stride: usize,
                    first: bool,
                ) {
                    let mut sums = [[$zero; 2]; R];
                    // SAFETY: `Tile::run` asserted that rows and steps lie inside a, b and c.
                    unsafe {
                        if !first {
                            for (r, s) in sums.iter_mut().enumerate() {
                                let c = c.add(r * stride);
                                *s = [$load_c(c), $load_c(c.add($lanes))];
                            }
                        }
                        for _ in 0..steps {
                            let (b0, b1) = ($load_b(b), $load_b(b.add($lanes)));
                            for (r, s) in sums.iter_mut().enumerate() {
                                let x = $splat(*a.add(r * row));
                                *s = [$add(s[0], x, b0), $add(s[1], x, b1)];
                            }
                            a = a.wrapping_add(step);
                            b = b.add(2 * $lanes);
                        }
                        for (r, s) in sums.iter().enumerate() {
                            let c = c.add(r * stride);
                            $store(c, s[0]);
                            $store(c.add($lanes), s[1]);
                        }
                    }
                }
            }
        };
    }

    /// The same bits, as the processor's pairs of bf16.
    #[inline(always)]
    fn pairs(bits: __m512i) -> __m512bh {
        // SAFETY: both are 64 bytes of which every bit pattern is a value.
        unsafe { std::mem::transmute(bits) }
    }

    tile!(f32_avx2, "avx2,fma", f32, f32, f32, 8, depth 1,
        one 1.0, zero _mm256_setzero_ps(), load_c _mm256_loadu_ps, load_b _mm256_loadu_ps, splat _mm256_set1_ps,
        add |s, x, b| _mm256_fmadd_ps(x, b, s), store _mm256_storeu_ps,
        rows 1 2 3 4 5 6);

    tile!(f32_avx512, "avx512f", f32, f32, f32, 16, depth 1,
        one 1.0, zero _mm512_setzero_ps(), load_c _mm512_loadu_ps, load_b _mm512_loadu_ps, splat _mm512_set1_ps,
        add |s, x, b| _mm512_fmadd_ps(x, b, s), store _mm512_storeu_ps,
        rows 1 2 3 4 5 6 7 8 9 10 11 12 13 14);

    tile!(bf16_avx512, "avx512f,avx512bf16", u32, u32, f32, 16, depth 2,
        one 0x3f80_3f80, zero _mm512_setzero_ps(), load_c _mm512_loadu_ps, load_b |b: *const u32| _mm512_loadu_si512(b.cast()),
        splat |x: u32| _mm512_set1_epi32(x as i32),
        add |s, x, b| _mm512_dpbf16_ps(s, pairs(x), pairs(b)),
        store _mm512_storeu_ps,
        rows 1 2 3 4 5 6 7 8 9 10 11 12 13 14);

    tile!(int8_avx512, "avx512f,avx512vnni", u32, u32, i32, 16, depth 4,
        one 0x0101_0101, zero _mm512_setzero_si512(), load_c |c: *mut i32| _mm512_loadu_si512(c.cast_const().cast()),
        load_b |b: *const u32| _mm512_loadu_si512(b.cast()), splat |x: u32| _mm512_set1_epi32(x as i32),
        add |s, x, b| _mm512_dpbusd_epi32(s, x, b), store |c: *mut i32, s| _mm512_storeu_si512(c.cast(), s),
        rows 1 2 3 4 5 6 7 8 9 10 11 12 13 14);

    tile!(int8_avx2, "avx2", u32, u32, i32, 8, depth 4,
        one 0x0101_0101, zero _mm256_setzero_si256(), load_c |c: *mut i32| _mm256_loadu_si256(c.cast_const().cast()),
        load_b |b: *const u32| _mm256_loadu_si256(b.cast()), splat |x: u32| _mm256_set1_epi32(x as i32),
        add |s, x, b| {
            let products = _mm256_madd_epi16(_mm256_maddubs_epi16(x, b), _mm256_set1_epi16(1));
            _mm256_add_epi32(s, products)
        },
        store |c: *mut i32, s| _mm256_storeu_si256(c.cast(), s),
        rows 1 2 3 4 5);
}
