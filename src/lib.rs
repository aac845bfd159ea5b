//! Fine-tune only the bias terms of BERT, and run many tasks from one frozen base.
#![deny(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]

pub mod base;
pub mod data;
pub mod device;
pub mod encoder;
mod error;
pub mod patch;
pub mod predict;
pub mod train;

pub use error::{Error, Kind, Result};
