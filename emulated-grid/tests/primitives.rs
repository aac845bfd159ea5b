//! The words of device.cuh against plain loops.

mod common;

use common::{Buffer, ORDERS, line, run};
use emulated_grid::*;

/// splitmix64, as numbers in -1..1.
fn random(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ z >> 31) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// The nearest number with so many bits of fraction, by search of both neighbours in f64.
fn nearest(v: f32, fraction_bits: u32, tie: impl Fn(u32) -> bool) -> f32 {
    let drop = 23 - fraction_bits;
    let low = v.to_bits() >> drop << drop;
    // Past the largest comes what would be 2^128.
    let value = |bits: u32| match f32::from_bits(bits) {
        v if v.is_infinite() => f64::from(2f32).powi(128).copysign(v.into()),
        v => v.into(),
    };
    let high = low + (1 << drop);
    let (below, above) = ((f64::from(v) - value(low)).abs(), (value(high) - f64::from(v)).abs());
    let up = above < below || (above == below && tie(low >> drop));
    f32::from_bits(if up { high } else { low })
}

#[test]
fn bf16_rounds_ties_to_even_and_tf32_away_from_zero() {
    let mut next = random(1);
    let mut numbers: Vec<f32> = (0..4000).map(|i| next() * f32::powi(2.0, i % 250 - 125)).collect();
    for exponent in [0u32, 1, 127, 200, 254] {
        // Every tie and its neighbours, at some fractions.
        for fraction in [0, 1, 2, 3, 0x3fe, 0x3ff] {
            for rest in [0, 1, 0xfff, 0x1000, 0x1001, 0x1fff] {
                numbers.push(f32::from_bits(exponent << 23 | fraction << 13 | rest));
            }
            for rest in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                numbers.push(f32::from_bits(exponent << 23 | (fraction & 0x7f) << 16 | rest));
            }
        }
    }
    numbers.extend([0.0, f32::MAX, f32::MIN_POSITIVE, f32::INFINITY, f32::NAN]);
    // NaNs whose bits would carry away.
    numbers.extend([0x7f80_0001, 0x7fff_ffff, 0x7f80_8000].map(f32::from_bits));
    numbers.extend(numbers.clone().iter().map(|v| -v));
    numbers.resize(numbers.len().next_multiple_of(32), 1.0);

    let n = numbers.len();
    let (from, bf16, tf32, back) =
        (Buffer::of(&numbers), Buffer::unset(2 * n), Buffer::unset(4 * n), Buffer::unset(4 * n));
    run("rounds", n as u32 / 32, 32, 0, &[from.at, bf16.at, tf32.at, back.at], Order::Forward).unwrap();
    let (bf16, tf32, back) = (bf16.read::<u16>(), tf32.read::<u32>(), back.read::<f32>());
    for (i, v) in numbers.iter().enumerate() {
        let wide = f32::from_bits(u32::from(bf16[i]) << 16);
        let tf32 = f32::from_bits(tf32[i]);
        if v.is_nan() {
            assert!(wide.is_nan() && tf32.is_nan() && back[i].is_nan(), "{:#x}", v.to_bits());
            continue;
        }
        let (to_even, away) = match v.is_infinite() {
            true => (*v, *v),
            false => (nearest(*v, 7, |low| low % 2 == 1), nearest(*v, 10, |_| true)),
        };
        assert_eq!(wide.to_bits(), to_even.to_bits(), "bf16 of {v:e}");
        assert_eq!(back[i].to_bits(), to_even.to_bits(), "Act is bf16");
        assert_eq!(tf32.to_bits(), away.to_bits(), "tf32 of {v:e}");
    }
}

#[test]
fn a_warp_sums_in_a_tree_and_every_lane_gets_the_same_bits() {
    let mut next = random(2);
    let from: Vec<f32> = (0..32).map(|_| next()).collect();
    let mut tree = from.clone();
    for half in [16, 8, 4, 2, 1] {
        tree = (0..half).map(|i| tree[i] + tree[i + half]).collect();
    }
    let most = from.iter().copied().fold(f32::MIN, f32::max);
    let source = Buffer::of(&from);
    for order in ORDERS {
        let [sum, max, other, wide] = [4, 4, 4, 8].map(|bytes| Buffer::unset(32 * bytes));
        run("reduces", 1, 32, 0, &[source.at, sum.at, max.at, other.at, wide.at], order).unwrap();
        assert_eq!(sum.read::<f32>(), [tree[0]; 32]);
        assert_eq!(max.read::<f32>(), [most; 32]);
        assert_eq!(other.read::<u32>(), std::array::from_fn::<u32, 32, _>(|i| (i as u32 + 5) % 32));
        assert_eq!(wide.read::<u64>(), std::array::from_fn::<u64, 32, _>(|i| (i as u64 ^ 3) << 40));
    }
}

#[test]
fn draws_equal_the_published_vectors() {
    // Known answers of the Random123 distribution, philox4x32 with 10 rounds.
    let cases = [
        ([0; 4], [0; 2], [0x6627_e8d5u32, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
        ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
        (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ),
    ];
    let case = |i: usize| cases[i % 3];
    let keys: Vec<[u32; 2]> = (0..32).map(|i| case(i).1).collect();
    let counters: Vec<[u32; 4]> = (0..32).map(|i| case(i).0).collect();
    let (keys, counters, to) = (Buffer::of(&keys), Buffer::of(&counters), Buffer::unset(16 * 32));
    run("draws", 1, 32, 0, &[keys.at, counters.at, to.at], Order::Forward).unwrap();
    for (i, draws) in to.read::<[u32; 4]>().iter().enumerate() {
        assert_eq!(*draws, case(i).2);
    }
}

#[test]
fn the_mathematics_is_that_of_c() {
    let to = Buffer::unset(4 * 16);
    run("knows", 1, 32, 0, &[to.at, (0.5f32).to_bits().into()], Order::Forward).unwrap();
    let expected = [
        1.648_721_3,
        -std::f32::consts::LN_2,
        0.462_117_16,
        0.479_500_12,
        std::f32::consts::FRAC_1_SQRT_2,
        0.75,
        0.5,
        3.0,
        0.5,
        -1.0,
        2.0,
        1.0,
        2.0,
        1.0,
        2.0,
        0.5,
    ];
    for (v, expected) in to.read::<f32>().iter().zip(expected) {
        assert!((v - expected).abs() < 2e-7, "{v} {expected}");
    }
}

#[test]
fn ldmatrix_gives_each_lane_two_numbers_of_a_row_or_a_column() {
    // Number 8 row + column of matrix i is 100 i + 8 row + column.
    let m: Vec<u16> = (0..256).map(|i| i / 64 * 100 + i % 64).collect();
    let from = Buffer::of(&m);
    for order in ORDERS {
        let (plain, transposed) = (Buffer::unset(512), Buffer::unset(512));
        run("fragments", 1, 32, 0, &[from.at, plain.at, transposed.at], order).unwrap();
        for lane in 0..32 {
            for i in 0..4 {
                let at = |row: usize, column: usize| (100 * i + 8 * row + column) as u16;
                let word = 4 * lane + i;
                let (line, pair) = (lane / 4, lane % 4 * 2);
                assert_eq!(plain.read::<[u16; 2]>()[word], [at(line, pair), at(line, pair + 1)]);
                assert_eq!(transposed.read::<[u16; 2]>()[word], [at(pair, line), at(pair + 1, line)]);
            }
        }
    }
}

#[test]
fn ldmatrix_wants_rows_in_shared_memory_at_multiples_of_16() {
    let (global, to) = (Buffer::of(&[0u32; 128]), Buffer::unset(128));
    let run = |shared, from, by| run("loads_rows", 1, 32, shared, &[global.at, to.at, from, by], Order::Forward);
    let at = format!("at kernels.cu:{}", line("loads_rows"));
    run(512, 1, 16).unwrap();
    assert!(
        run(512, 1, 8)
            .unwrap_err()
            .ends_with(&format!("thread 1: the row for ldmatrix {at} is not at a multiple of 16 bytes"))
    );
    assert!(
        run(512, 0, 16).unwrap_err().ends_with(&format!("thread 0: the row for ldmatrix {at} is not in shared memory"))
    );
    assert!(run(496, 1, 16).unwrap_err().contains("thread 31: the row"));
}

fn product(a: &[f32], b: &[f32], k: usize) -> Vec<f64> {
    let at = |row: usize, column: usize| (0..k).map(|i| f64::from(a[row * k + i]) * f64::from(b[i * 8 + column])).sum();
    (0..128).map(|i| at(i / 8, i % 8)).collect()
}

#[test]
fn mma_of_bf16_is_a_product_of_what_ldmatrix_loads() {
    let mut next = random(3);
    let mut numbers =
        |n: usize| -> Vec<f32> { (0..n).map(|_| f32::from_bits(next().to_bits() & 0xffff_0000)).collect() };
    let (a, b) = (numbers(256), numbers(128));
    let b_transposed: Vec<f32> = (0..128).map(|i| b[i % 16 * 8 + i / 16]).collect();
    let buffer = |v: &[f32]| Buffer::of(&v.iter().map(|v| (v.to_bits() >> 16) as u16).collect::<Vec<_>>());
    let (left, right, transposed, d) = (buffer(&a), buffer(&b), buffer(&b_transposed), Buffer::unset(4 * 128));
    let expected = product(&a, &b, 16);
    for order in ORDERS {
        for (right, is_transposed) in [(&right, 0), (&transposed, 1)] {
            run("multiplies_bf16", 1, 32, 0, &[left.at, right.at, d.at, is_transposed], order).unwrap();
            for (d, expected) in d.read::<f32>().iter().zip(&expected) {
                assert!((f64::from(*d) - 2.0 * (1.0 + expected)).abs() < 1e-5, "{d} {expected}");
            }
        }
    }
}

#[test]
fn mma_of_tf32_is_a_product_and_ignores_what_was_not_rounded_away() {
    let mut next = random(4);
    let (a, b): (Vec<f32>, Vec<f32>) = ((0..128).map(|_| next()).collect(), (0..64).map(|_| next()).collect());
    let (left, right, d) = (Buffer::of(&a), Buffer::of(&b), Buffer::unset(4 * 128));
    let as_stored = |v: &[f32], rounded: bool| -> Vec<f32> {
        let cut = |v: f32| f32::from_bits(v.to_bits() & 0xffff_e000);
        v.iter().map(|v| if rounded { nearest(*v, 10, |_| true) } else { cut(*v) }).collect()
    };
    for order in ORDERS {
        for rounded in [true, false] {
            let expected = product(&as_stored(&a, rounded), &as_stored(&b, rounded), 8);
            run("multiplies_tf32", 1, 32, 0, &[left.at, right.at, d.at, rounded.into()], order).unwrap();
            for (d, expected) in d.read::<f32>().iter().zip(&expected) {
                assert!((f64::from(*d) - expected).abs() < 1e-6, "{d} {expected}");
            }
        }
    }
}
