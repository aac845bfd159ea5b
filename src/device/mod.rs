//! What an encoder needs of a device, and the devices that provide it.
//!
//! Start reading at `ops`, the trait.

pub mod batch;
