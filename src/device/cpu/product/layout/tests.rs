//! Every layout, on every instruction set of this processor, against loops that sum in the order it promises.

use half::bf16;

use super::super::super::precision::Stored;
use super::super::super::real::Real;
use super::super::super::simd::Arch;
use super::super::panels::Rows;
use super::super::tile::{Bytes, emulated};
use super::super::values;
use super::{Bf16Layout, F32Layout, Int8Layout, Layout, Plain};

/// (rows, inner, columns): tiles whole and cut short, one and several blocks of the inner dimension, few rows.
const SHAPES: [(usize, usize, usize); 9] = [
    (1, 7, 3),
    (2, 16, 16),
    (5, 33, 40),
    (13, 64, 64),
    (40, 96, 33),
    (57, 48, 600),
    (150, 384, 96),
    (29, 1024, 64),
    (31, 3072, 48),
];

fn threads(n: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap()
}

/// x (m, inner) times `w`, rows one after the other.
fn product<L: Layout<f32>>(arch: Arch, n_threads: usize, w: &L, x: &[f32], (inner, cols): (usize, usize)) -> Vec<f32> {
    let m = x.len() / inner;
    let mut y = vec![0.0f32; m * cols];
    threads(n_threads).install(|| {
        let rows = Rows { data: &mut y, stride: cols };
        let read = |i: usize, to: &mut [f32]| to.copy_from_slice(&x[i * inner..][..inner]);
        w.multiply(arch, m, read, rows, |_, _, y: &mut [f32], sums| y.copy_from_slice(sums));
    });
    y
}

fn pack<L: Layout<f32>>(arch: Arch, w: &[f32], inner: usize, cols: usize) -> L {
    threads(1).install(|| L::pack(arch, inner, cols, |k, j| w[k * cols + j]))
}

/// Whether rows have the same bits in any company, with any number of threads: more than there are tiles, too.
fn is_batch_invariant<L: Layout<f32>>(arch: Arch) {
    for (m, inner, cols) in SHAPES {
        let (x, w) = (values(m * inner, 1), values(inner * cols, 2));
        let layout: L = pack(arch, &w, inner, cols);
        let all = product(arch, 2, &layout, &x, (inner, cols));
        let parts = [
            (0, 1, 1),
            (m - 1, 1, 2),
            (m / 2, m - m / 2, 1),
            (0, m, 1),
            (0, m, 3),
            (0, m, 7),
            (0, m, 64),
            (m / 3, 1, 2),
            (0, m.min(14), 3),
            (0, m.min(15), 2),
            (m / 3, m.min(29).div_ceil(2), 7),
        ];
        for (first, n, n_threads) in parts {
            let part = product(arch, n_threads, &layout, &x[first * inner..][..n * inner], (inner, cols));
            let same = part.iter().zip(&all[first * cols..]).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{} {m} x {inner} x {cols}, rows {first}.. of {n}", arch.name());
        }
    }
}

#[test]
fn a_row_has_the_same_bits_whatever_the_other_rows_and_the_threads() {
    for arch in Arch::available() {
        is_batch_invariant::<F32Layout>(arch);
        is_batch_invariant::<Bf16Layout>(arch);
        is_batch_invariant::<Int8Layout>(arch);
        is_batch_invariant::<Plain<f32>>(arch);
    }
}

#[test]
fn an_f32_tile_sums_in_one_chain_of_fused_multiply_adds() {
    for arch in Arch::available().into_iter().filter(|arch| f32::tile(*arch).is_some()) {
        for (m, inner, cols) in SHAPES {
            let (x, w) = (values(m * inner, 3), values(inner * cols, 4));
            let found = product(arch, 2, &pack::<F32Layout>(arch, &w, inner, cols), &x, (inner, cols));
            for (i, row) in found.chunks(cols).enumerate() {
                for (j, found) in row.iter().enumerate() {
                    let chain = (0..inner).fold(0.0f32, |sum, k| x[i * inner + k].mul_add(w[k * cols + j], sum));
                    assert_eq!(found.to_bits(), chain.to_bits(), "{} {m} x {inner} x {cols} at {i}, {j}", arch.name());
                }
            }
        }
    }
}

#[test]
fn bf16_multiplies_what_both_sides_round_to() {
    for arch in Arch::available() {
        for (m, inner, cols) in SHAPES {
            let (x, w) = (values(m * inner, 5), values(inner * cols, 6));
            let layout: Bf16Layout = pack(arch, &w, inner, cols);
            let round = |x: f32| f64::from(<bf16 as Stored<f32>>::load(bf16::store(x)));
            let found = product(arch, 2, &layout, &x, (inner, cols));
            for (i, row) in found.chunks(cols).enumerate() {
                for (j, found) in row.iter().enumerate() {
                    let products = (0..inner).map(|k| round(x[i * inner + k]) * round(w[k * cols + j]));
                    let (exact, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                    // f32 sums of `inner` exact products.
                    let allowed = 1e-7 * (inner as f64).sqrt() * size + 1e-30;
                    assert!((f64::from(*found) - exact).abs() <= allowed, "{} {found} {exact}", arch.name());
                }
            }
        }
    }
}

/// Fails where two layouts of one weight give other bits.
fn are_equal<L: Layout<f32>>(found: (Arch, L), expected: (Arch, L), x: &[f32], size: (usize, usize)) {
    let (found, expected) = (product(found.0, 2, &found.1, x, size), product(expected.0, 2, &expected.1, x, size));
    let same = found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
    assert!(same, "{size:?}, {} rows", x.len() / size.0);
}

/// The emulations run everywhere; where the processor has their instructions, they are held to them.
#[test]
fn pairs_and_bytes_are_summed_in_the_order_of_their_emulation() {
    for (m, inner, cols) in SHAPES {
        let (x, w) = (values(m * inner, 11), values(inner * cols, 12));
        let value = |k: usize, j: usize| w[k * cols + j];
        let mut pairs = Bf16Layout::of_pairs(&emulated::PAIRS, inner, cols);
        let mut bytes = Int8Layout::by(Bytes { tile: &emulated::BYTES, top: 127.0 }, inner, cols);
        threads(1).install(|| (pairs.repack(value), bytes.repack(value)));

        let store = <bf16 as Stored<f32>>::store;
        let found = product(Arch::Portable, 2, &pairs, &x, (inner, cols));
        for (at, found) in found.iter().enumerate() {
            let (i, j) = (at / cols, at % cols);
            let of = |k: usize| {
                if k < inner { (store(x[i * inner + k]).load(), store(value(k, j)).load()) } else { (0.0, 0.0) }
            };
            let sum = (0..inner.div_ceil(2)).fold(0.0f32, |sum, s| {
                let (first, second) = (of(2 * s), of(2 * s + 1));
                first.0.mul_add(first.1, second.0.mul_add(second.1, sum))
            });
            assert_eq!(found.to_bits(), sum.to_bits(), "{m} x {inner} x {cols} at {i}, {j}");
        }
        let portable = pack::<Int8Layout>(Arch::Portable, &w, inner, cols);
        are_equal((Arch::Portable, bytes), (Arch::Portable, portable), &x, (inner, cols));
        let mut pairs = Some(pairs);
        for arch in Arch::available().into_iter().rev() {
            if arch.multiplies_bf16()
                && let Some(pairs) = pairs.take()
            {
                are_equal((arch, pack(arch, &w, inner, cols)), (Arch::Portable, pairs), &x, (inner, cols));
            }
            if arch.multiplies_bytes() {
                let [here, portable] = [arch, Arch::Portable].map(|of| (of, pack::<Int8Layout>(of, &w, inner, cols)));
                are_equal(here, portable, &x, (inner, cols));
            }
        }
        if pairs.is_some() {
            println!("not run, but for its emulation: this processor does not multiply bf16");
        }
    }
}

#[test]
fn int8_sums_bytes_exactly() {
    for arch in Arch::available() {
        for (m, inner, cols) in SHAPES {
            let (mut x, w) = (values(m * inner, 7), values(inner * cols, 8));
            // The largest products there are, side by side: where 16 bits would overflow.
            x[..inner].fill(0.5);
            let w: Vec<f32> = w.iter().enumerate().map(|(i, w)| if i % cols == 0 { 0.5 } else { *w }).collect();
            let mut layout: Int8Layout = pack(arch, &w, inner, cols);
            multiplies_its_bytes(arch, &layout, &x, (inner, cols));
            // And no sum leaves 16 bits where a value is replaced, however large.
            layout.set(inner / 2, 0, 9.0);
            layout.set(0, cols - 1, -0.01);
            multiplies_its_bytes(arch, &layout, &x, (inner, cols));
        }
    }
}

/// Fails where a product is not that of x's bytes and the layout's.
fn multiplies_its_bytes(arch: Arch, layout: &Int8Layout, x: &[f32], (inner, cols): (usize, usize)) {
    let found = product(arch, 2, layout, x, (inner, cols));
    for (x, row) in x.chunks(inner).zip(found.chunks(cols)) {
        let least = x.iter().fold(0.0f32, |least, x| least.min(*x));
        let scale = (x.iter().fold(0.0f32, |most, x| most.max(*x)) - least) / 255.0;
        let zero = (-least * (1.0 / scale)).round_ties_even();
        let byte = |x: &f32| ((x * (1.0 / scale)).round_ties_even() + zero).min(255.0);
        for (j, found) in row.iter().enumerate() {
            let products = x.iter().enumerate().map(|(k, x)| {
                assert!((0.0..=255.0).contains(&byte(x)), "a byte");
                f64::from((byte(x) - zero) * scale) * f64::from(layout.at(k, j))
            });
            let (exact, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
            assert!((f64::from(*found) - exact).abs() <= 1e-6 * size, "{} {found} {exact}", arch.name());
        }
    }
}

#[test]
fn int8_weights_are_within_half_a_step_of_their_column() {
    for arch in Arch::available() {
        let (inner, cols) = (33, 40);
        let mut w = values(inner * cols, 13);
        // A column too small for a scale of its own.
        (0..inner).for_each(|k| w[k * cols + 5] = 1e-38);
        let layout: Int8Layout = pack(arch, &w, inner, cols);
        let top = if arch.multiplies_bytes() || arch == Arch::Portable { 127.0 } else { 63.0 };
        for j in 0..cols {
            let largest = (0..inner).fold(0.0f32, |most, k| most.max(w[k * cols + j].abs()));
            for k in 0..inner {
                let off = (layout.at(k, j) - w[k * cols + j]).abs();
                assert!(off <= largest / top * 0.50001 + 1e-37, "{} {k} {j}: {off}", arch.name());
            }
        }
        multiplies_its_bytes(arch, &layout, &values(3 * inner, 14), (inner, cols));
    }
}

#[test]
fn no_number_stays_none_in_every_precision() {
    fn check<L: Layout<f32>>(arch: Arch) {
        let (inner, cols) = (20, 3);
        let (mut x, w) = (values(2 * inner, 9), values(inner * cols, 10));
        x[7] = f32::NAN;
        let found = product(arch, 1, &pack::<L>(arch, &w, inner, cols), &x, (inner, cols));
        assert!(found[..cols].iter().all(|y| y.is_nan()) && found[cols..].iter().all(|y| y.is_finite()), "{found:?}");
        let mut w = w;
        w[4 * cols + 1] = f32::NAN;
        let found = product(arch, 1, &pack::<L>(arch, &w, inner, cols), &x[inner..], (inner, cols));
        assert!(found[1].is_nan() && found[0].is_finite() && found[2].is_finite(), "{found:?}");
    }
    for arch in Arch::available() {
        check::<F32Layout>(arch);
        check::<Bf16Layout>(arch);
        check::<Int8Layout>(arch);
    }
}

#[test]
fn bf16_rounds_to_the_nearest_even_and_keeps_what_is_no_number() {
    for (x, expected) in [
        (1.0, 0x3f80),
        (f32::from_bits(0x3f80_8000), 0x3f80),
        (f32::from_bits(0x3f81_8000), 0x3f82),
        (f32::from_bits(0x3f80_8001), 0x3f81),
        (f32::MAX, 0x7f80),
        (f32::NEG_INFINITY, 0xff80),
        (-0.0, 0x8000),
    ] {
        assert_eq!(<bf16 as Stored<f32>>::store(x).to_bits(), expected, "{x}");
    }
    let nan = <bf16 as Stored<f32>>::store(f32::from_bits(0x7fff_ffff));
    assert!(nan.is_nan());
    for bits in 0..=u16::MAX {
        let x = bf16::from_bits(bits);
        let back = <bf16 as Stored<f32>>::store(x.load());
        assert!(back == x || x.is_nan() && back.is_nan(), "{bits:x}");
    }
}
