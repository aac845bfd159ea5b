//! A task as a patch over a frozen base: which parameters train, their values, and the file that holds them.
//!
//! Invariant: a [`Patch`] has been checked as if it came from an enemy, whether it was read or just trained, and two
//! equal patches are two equal files. Whether it fits a base at hand is asked once, by [`Patch::check_base`].
//!
//! Start reading at [`selection`] (which parameters train), then [`delta`] (their values) and [`mod@file`] (the format,
//! whose specification is `docs/patch-format.md`). [`merge`] and [`candle`] carry a patch to other programs.

pub mod candle;
pub mod delta;
pub mod file;
pub mod merge;
pub mod metadata;
pub mod selection;

mod applied;
mod aside;
mod header;
mod random;
mod spec;
mod tensors;
mod untrained;

#[cfg(feature = "serve")]
pub(crate) use aside::sync_folder;
pub use aside::write_aside;
pub(crate) use aside::{destination, rename};
pub use file::{Dtype, Patch};
pub use metadata::{Metadata, Pooling, check_problem, check_task_name};
pub use selection::{Counts, Method, Selection, TermsMatch};
pub use spec::{parse_layers, parse_terms};
