//! The frozen base: a pretrained BERT's config, tensors, tokenizer and fingerprint.
//!
//! Start reading at [`parameters`], the table of names, shapes and bias terms.

pub mod config;
pub mod delta;
pub mod parameters;
pub mod problem;
