//! Matrix products.
//!
//! [`layout`] is where to start: a frozen weight, packed for one direction of one precision, and the products it takes
//! part in. [`panels`] drives them, [`tile`] holds the register tiles. [`small`] are the products of attention,
//! [`strided`] a weight's gradient and all where no own tile exists.

pub mod layout;
pub mod panels;
pub mod small;
pub mod strided;
pub mod tile;

/// `n` numbers from -0.5 to 0.5 that follow from the seed: what tests multiply.
#[cfg(test)]
fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed;
    (0..n)
        .map(|_| {
            s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((s >> 40) as f32 / (1 << 24) as f32) - 0.5
        })
        .collect()
}
