//! Matrix products.
//!
//! [`layout`] is where to start: a frozen weight, packed for one direction of one precision, and the products it takes
//! part in. [`panels`] drives them, [`tile`] holds the register tiles, [`strided`] the products of matrices as they
//! lie: attention's, a weight's gradient, and all where no own tile exists.

pub mod layout;
pub mod panels;
pub mod strided;
pub mod tile;
