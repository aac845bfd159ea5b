//! Fine-tune only the bias terms of BERT, and run many tasks from one frozen base.
//!
//! A [`base::Base`] is a pretrained BERT that never changes. An [`encoder::Encoder`] lays it out on a device. Training
//! ([`train::run()`]) makes a [`patch::Patch`] of it: differences to its biases, and a head. Prediction
//! ([`predict::predict()`]) answers texts with any number of patches in one batch, each to the bit as it would alone.
//!
//! Each module is a layer and imports only from those below: [`base`] and [`device`] from none; [`encoder`], [`patch`]
//! and [`data`] from these; then [`predict`], then [`train`] and, beside it, `serve`. Shape letters (T tokens, H hidden, ..) are defined once,
//! in [`device::batch`].
#![deny(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]

pub mod base;
pub mod data;
pub mod device;
pub mod encoder;
mod error;
pub mod patch;
pub mod predict;
#[cfg(feature = "serve")]
pub mod serve;
pub mod train;

pub use error::{Error, Kind, Result};

/// The README's Rust, compiled as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
