//! Patches that nobody trained: their values, and so their answers, follow from a number.

use bitfit::base::Base;
use bitfit::base::delta::{Change, Delta, Head};
use bitfit::patch::{Selection, delta};

/// A patch's values of what `spec` selects, decided by `seed`.
pub fn random_delta(base: &Base, spec: &str, n_outputs: usize, seed: u64) -> Delta {
    let number = |i: usize| {
        let x = (i as u64 + 1).wrapping_mul(seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        ((x >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.4
    };
    let h = base.config().hidden_size;
    let head = Head {
        n_outputs,
        weight: (0..n_outputs * h).map(number).collect(),
        bias: (0..n_outputs).map(|i| number(i + 7)).collect(),
        pooler: None,
    };
    let requests = Selection::parse(spec).unwrap().resolve(base.config(), base.has_pooler()).unwrap();
    let mut values = delta::zeros(&requests, base.parameters(), head);
    for (k, change) in values.changes.values_mut().enumerate() {
        let (Change::Dense(values) | Change::Sparse { values, .. }) = change;
        values.iter_mut().enumerate().for_each(|(i, v)| *v = number(i + 1000 * k));
    }
    values
}
