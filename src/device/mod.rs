//! What an encoder needs of a device, and the devices that provide it.
//!
//! Start reading at [`ops`], the traits; [`batch`] is what a step runs over, [`philox`] where dropout comes from,
//! [`cpu`] the first device.

pub mod batch;
pub mod cpu;
pub mod ops;
pub mod philox;
