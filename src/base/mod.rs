//! The frozen base: a pretrained BERT's config, tensors, tokenizer and fingerprint.
//!
//! Start reading at [`parameters`], the table of names, shapes and bias terms, then at [`Base`], which everything else
//! in this folder serves. Invariant: what [`Base::load`] returns has been checked, config against tensors against
//! tokenizer, and never changes.

#[expect(clippy::module_inception, reason = "the layer is named after the one type that it exists for")]
pub mod base;
mod checkpoint;
pub mod config;
pub mod dataset;
pub mod delta;
mod fingerprint;
mod hub;
pub mod parameters;
pub mod problem;
pub mod spec;
pub mod tokenizer;

pub use base::Base;
pub use config::Config;
pub(crate) use fingerprint::hex;
pub use hub::Download;
pub use spec::BaseSpec;
pub use tokenizer::{Encoding, Tokenizer};
