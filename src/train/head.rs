//! What a run starts from: the base as it is, and a head drawn from the seed.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::base::Base;
use crate::base::delta::{Delta, Head};
use crate::encoder::Run;
use crate::error::Result;
use crate::patch::Selection;
use crate::patch::delta::zeros;

/// Streams of the seed's generator. Rows are shuffled from the other end of the same numbers, so no two overlap.
const CLASSIFIER: u64 = u64::MAX;
const POOLER: u64 = u64::MAX - 1;

/// The run of a selection at its start: differences of zero, and a head of `n_outputs` drawn as transformers does
/// (normal with the config's `initializer_range`; biases zero), its own pooler too where the base has none.
///
/// The head follows from the seed and its shape alone, so all methods at one seed start equal.
///
/// # Errors
///
/// As [`Selection::check`].
pub fn start(base: &Base, selection: &Selection, n_outputs: usize, seed: u64) -> Result<Run> {
    let (config, h) = (base.config(), base.config().hidden_size);
    let draw = |stream: u64, n: usize| -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        let normal = |z: f64| (z * config.initializer_range) as f32;
        (0..n).map(|_| normal(StandardNormal.sample(&mut rng))).collect()
    };
    let head = Head {
        n_outputs,
        weight: draw(CLASSIFIER, n_outputs * h),
        bias: vec![0.0; n_outputs],
        pooler: (!base.has_pooler()).then(|| (draw(POOLER, h * h), vec![0.0; h])),
    };
    let requests = selection.resolve(config, base.has_pooler())?;
    let start: Delta = zeros(&requests, base.parameters(), head);
    Ok(Run { requests, start })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Config;
    use crate::patch::Method;

    #[test]
    fn all_methods_at_one_seed_start_equal() {
        let base = Base::random(Config::tiny(), 1);
        let of = |method, seed| start(&base, &Selection::new(method), 3, seed).unwrap().start.head;
        assert_eq!(of(Method::Bitfit, 5), of(Method::Full, 5));
        assert_eq!(of(Method::Bitfit, 5), of(Method::Frozen, 5));
        assert_ne!(of(Method::Bitfit, 5), of(Method::Bitfit, 6));
    }

    #[test]
    fn the_head_is_normal_with_the_initializer_range() {
        let base = Base::random(Config::minilm(), 1);
        let head = start(&base, &Selection::new(Method::Frozen), 100, 0).unwrap().start.head;
        let n = head.weight.len() as f64;
        let mean = head.weight.iter().map(|w| f64::from(*w)).sum::<f64>() / n;
        let deviation = (head.weight.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>() / n).sqrt();
        assert!(mean.abs() < 0.001, "{mean}");
        assert!((deviation - 0.02).abs() < 0.001, "{deviation}");
        assert!(head.bias.iter().all(|b| *b == 0.0));
    }
}
