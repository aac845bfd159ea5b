//! The ops of a step, one by one, on the threads that are there:
//!
//! ```text
//! cargo bench --bench kernels [-- FILTER]
//! ```
//!
//! Criterion prints each op's time. Below it stands the share of what the processor was measured to do at most, on
//! registers alone in the best of many windows, that the op's fastest call reached; of an op that does not multiply, the
//! nanoseconds an element.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bitfit::device::PrecisionName;
use bitfit::device::batch::{Batch, DropoutKey};
use bitfit::device::cpu::{self, Bf16, Cpu, F32, Int8, Precision};
use bitfit::device::ops::{Activation, Affine, Arithmetic, At, Device, Dropout, Ops, Site};
use criterion::Criterion;

/// Sequences and tokens of each: those of the comparison with other trainers.
const BATCH: (usize, usize) = (16, 128);

/// Hidden and intermediate size, heads.
const SHAPES: [(&str, usize, usize, usize); 2] = [("minilm", 384, 1536, 12), ("base", 768, 3072, 12)];

fn main() {
    let mut criterion = Criterion::default().sample_size(10).configure_from_args();
    measure::<F32>(&mut criterion, PrecisionName::F32, true);
    measure::<Bf16>(&mut criterion, PrecisionName::Bf16, true);
    measure::<Int8>(&mut criterion, PrecisionName::Int8, false);
    criterion.final_summary();
}

/// `n` numbers around zero.
fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| (((i * 2_654_435_761) >> 8) % 1024) as f32 / 1024.0 - 0.5).collect()
}

fn measure<P: Precision>(criterion: &mut Criterion, name: PrecisionName, trains: bool) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    // Measured anew beside each op, as others take turns on a machine; the best of all counts.
    let mut peaks = [(name, None), (PrecisionName::F32, None)];
    for (shape, h, i, heads) in SHAPES {
        let arithmetic = Arithmetic { n_heads: heads, layer_norm_eps: 1e-12, activation: Activation::Gelu };
        let mut d = Cpu::<P>::new(arithmetic, threads).expect("threads");
        let (sequences, length) = BATCH;
        let mut batch = Batch::new();
        for s in 0..sequences {
            let key = DropoutKey { seed: 1, step: 0, index: s as u32 };
            batch.push(&vec![1; length], &vec![0; length], 0, key, None);
        }
        d.begin(Arc::new(batch), Dropout { hidden: 0.1, attention: 0.1, classifier: 0.1 });
        let tokens = (sequences * length) as f64;
        // `f` prepares, and gives the time of the op alone.
        let mut op = |what: &str, operations: f64, elements: f64, f: &mut dyn FnMut() -> Duration| {
            let id = format!("{shape} {name} {what}");
            // In bytes, attention runs in f32.
            let of_f32 = what == "attention" && name == PrecisionName::Int8;
            let (precision, peak) = &mut peaks[usize::from(of_f32)];
            let mut fastest = f64::INFINITY;
            criterion.bench_function(&id, |b| {
                b.iter_custom(|n| {
                    let mut call = |_| {
                        let took = f();
                        fastest = fastest.min(took.as_secs_f64());
                        took
                    };
                    (0..n).map(&mut call).sum()
                });
            });
            if fastest.is_infinite() {
                return;
            }
            if operations == 0.0 {
                println!("{id}: at best {:.2} ns an element", 1e9 * fastest / elements);
                return;
            }
            let rate = operations / fastest / 1e9;
            *peak = cpu::peak(*precision, threads).ok().flatten().map(|found| found.max(peak.unwrap_or(0.0)));
            match *peak {
                Some(peak) => {
                    let (peak, share) = (peak / 1e9, 100.0 * rate / (peak / 1e9));
                    println!("{id}: at best {rate:.0} GFLOP/s, {share:.0} % of {peak:.0} on {threads} threads")
                }
                None => println!("{id}: at best {rate:.0} GFLOP/s"),
            }
        };

        let square = d.weight(h, h, values(h * h));
        let up = d.weight(i, h, values(i * h));
        let down = d.weight(h, i, values(h * i));
        let (of_h, of_i, ones) = (d.params(1, values(h)), d.params(1, values(i)), d.params(1, vec![1.0; h]));
        let table = d.table(h, values(2 * h * length));
        let tables = || bitfit::device::ops::Tables { word: &table, position: &table, token_type: &table };
        let affine = || Affine { gamma: &ones, beta: &of_h };
        let (x, _) = d.run(|d| d.embed(tables(), affine()));
        let site = |at| Site { layer: 0, at };

        let products = [("h x h", &square, &of_h, h * h), ("h x i", &up, &of_i, h * i)];
        for (what, w, b, size) in products {
            op(&format!("product {what}"), 2.0 * tokens * size as f64, 1.0, &mut || {
                d.run(|d| timed(|| d.linear(&x, w, b)))
            });
        }
        let act = |d: &mut Cpu<P>| d.linear(&x, &square, &of_h);
        op("product i x h", 2.0 * tokens * (h * i) as f64, 1.0, &mut || {
            d.run(|d| {
                let u = d.linear(&x, &up, &of_i);
                timed(|| d.product(u, &down))
            })
        });
        op("feed-forward", 4.0 * tokens * (h * i) as f64, 1.0, &mut || {
            d.run(|d| timed(|| d.feed_forward(&x, &up, &of_i, &down)))
        });
        let scores = tokens * length as f64 * heads as f64;
        op("attention", 4.0 * tokens * (length * h) as f64, scores, &mut || {
            d.run(|d| {
                let [q, k, v] = [0; 3].map(|_| act(d));
                timed(|| d.attention(&q, &k, &v, site(At::Probabilities)))
            })
        });
        op("add and norm", 0.0, tokens * h as f64, &mut || {
            d.run(|d| {
                let (x, a) = (d.copy(&x), d.copy(&x));
                timed(|| d.add_norm(x, a, &of_h, affine(), site(At::Output)))
            })
        });
        if !trains {
            continue;
        }
        op("attention, back", 10.0 * tokens * (length * h) as f64, scores, &mut || {
            d.run(|d| {
                let [q, k, v, d_o] = [0; 4].map(|_| act(d));
                let (_, lse) = d.attention(&q, &k, &v, site(At::Probabilities));
                timed(|| d.attention_back(d_o, (q, k, v), lse, site(At::Probabilities), None, None))
            })
        });
        op("add and norm, back", 0.0, tokens * h as f64, &mut || {
            d.run(|d| {
                let (x, a) = (d.copy(&x), d.copy(&x));
                let (dh, n) = d.add_norm(x, a, &of_h, affine(), site(At::Output));
                timed(|| d.add_norm_back(dh, n, &ones, site(At::Output), None, None, None))
            })
        });
    }
}

/// How long `f` takes, without dropping what it gives.
fn timed<T>(f: impl FnOnce() -> T) -> Duration {
    let began = Instant::now();
    let result = f();
    let took = began.elapsed();
    drop(result);
    took
}
