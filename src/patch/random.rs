//! The random control's draw: exactly N scalars over all parameters, without replacement.
//!
//! Each tensor gets its share of N by the largest remainder, and draws its positions from a generator of its own,
//! keyed by the seed and the tensor's name. So a tensor's draw does not depend on the tensors before it.

use std::collections::BTreeMap;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use sha2::{Digest, Sha256};

use crate::base::parameters::Parameter;

/// Strictly increasing positions by tensor name; tensors whose share is nothing are left out. `count` is at most the
/// number of entries of `pool`.
pub(super) fn draw(pool: &[Parameter], count: u64, seed: u64) -> BTreeMap<String, Vec<u64>> {
    let sizes: Vec<u64> = pool.iter().map(|p| p.len() as u64).collect();
    let mut drawn = BTreeMap::new();
    for (parameter, share) in pool.iter().zip(shares(&sizes, count)) {
        if share == 0 {
            continue;
        }
        let mut hash = Sha256::new();
        hash.update(b"bitfit random selection\0");
        hash.update(seed.to_le_bytes());
        hash.update(parameter.name.as_bytes());
        let mut generator = ChaCha8Rng::from_seed(hash.finalize().into());
        let positions = rand::seq::index::sample(&mut generator, parameter.len(), share as usize);
        let mut positions: Vec<u64> = positions.into_iter().map(|i| i as u64).collect();
        positions.sort_unstable();
        drawn.insert(parameter.name.clone(), positions);
    }
    drawn
}

/// Splits `count` in proportion to `sizes` by the largest remainder; ties go to the earlier tensor. No share is above
/// its size, because a remainder is only left where the exact share is below the size.
fn shares(sizes: &[u64], count: u64) -> Vec<u64> {
    let total: u128 = sizes.iter().map(|&s| s as u128).sum();
    if total == 0 {
        return vec![0; sizes.len()];
    }
    let exact = |size: u64| u128::from(size) * u128::from(count);
    let mut shares: Vec<u64> = sizes.iter().map(|&s| (exact(s) / total) as u64).collect();
    let left = count - shares.iter().sum::<u64>();
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(exact(sizes[i]) % total)); // stable: ties keep their order
    for &i in order.iter().take(left as usize) {
        shares[i] += 1;
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::parameters::Role;

    fn pool() -> Vec<Parameter> {
        [("a", 1000), ("b", 10), ("c", 1), ("d", 333)]
            .map(|(name, n)| Parameter {
                name: name.into(),
                shape: vec![n],
                layer: None,
                role: Role::Matrix(crate::base::parameters::Term::Output),
            })
            .into()
    }

    #[test]
    fn shares_follow_the_largest_remainder() {
        assert_eq!(shares(&[50, 30, 20], 10), [5, 3, 2]);
        assert_eq!(shares(&[1, 1, 1], 2), [1, 1, 0]);
        assert_eq!(shares(&[6, 3, 1], 4), [3, 1, 0]); // 2.4, 1.2, 0.4: of two equal remainders the first wins
    }

    #[test]
    fn every_count_is_drawn_exactly_without_repeats_and_within_the_tensor() {
        for count in [1, 2, 7, 500, 1343, 1344] {
            let drawn = draw(&pool(), count, 3);
            assert_eq!(drawn.values().map(Vec::len).sum::<usize>() as u64, count);
            for parameter in pool() {
                let positions = drawn.get(&parameter.name).cloned().unwrap_or_default();
                assert!(positions.is_sorted_by(|a, b| a < b));
                assert!(positions.iter().all(|&i| i < parameter.len() as u64));
            }
        }
    }

    #[test]
    fn a_seed_gives_one_draw_and_another_seed_another() {
        assert_eq!(draw(&pool(), 100, 7), draw(&pool(), 100, 7));
        assert_ne!(draw(&pool(), 100, 7), draw(&pool(), 100, 8));
    }

    #[test]
    fn positions_spread_over_the_whole_tensor() {
        let mut seen = [0u32; 10];
        for seed in 0..200 {
            for i in &draw(&pool(), 134, seed)["a"] {
                seen[(i / 100) as usize] += 1;
            }
        }
        // 200 draws of 100 of 1000 positions: 2000 a tenth, with a standard deviation below 43.
        assert!(seen.iter().all(|n| n.abs_diff(2000) < 215), "{seen:?}");
    }
}
