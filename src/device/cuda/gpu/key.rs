//! What products have in common that one algorithm is fixed for.

use crate::device::cuda::card::{Number, Precision, Product};

/// At addresses that are multiples of this, every algorithm can load what it wants to.
pub const ALIGNMENT: u64 = 16;

/// What an algorithm is fixed for: a product without the one length that varies from batch to batch. That is m; where
/// the left side lies transposed, as for the gradient of a weight, it is k. The other's place holds 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub left_transposed: bool,
    pub right_transposed: bool,
    pub precision: Precision,
    pub number: Number,
    pub accumulate: bool,
    /// Of all addresses, at most [`ALIGNMENT`].
    pub alignment: u32,
}

impl Key {
    /// And the length that varies.
    pub fn of(product: &Product) -> (Self, usize) {
        let Product { m, n, k, precision, left, right, to, number, accumulate } = *product;
        let (m, k, length) = if left.transposed { (m, 0, k) } else { (0, k, m) };
        let alignment = 1 << (left.at | right.at | to | ALIGNMENT).trailing_zeros();
        let (left_transposed, right_transposed) = (left.transposed, right.transposed);
        (Self { m, n, k, left_transposed, right_transposed, precision, number, accumulate, alignment }, length)
    }

    /// m, n and k.
    pub fn shape(&self, length: usize) -> (usize, usize, usize) {
        if self.left_transposed { (self.m, self.n, length) } else { (length, self.n, self.k) }
    }
}
