//! Texts in, typed predictions out: written once, for evaluation, the command and a server.
//!
//! Invariant: an answer depends on its task and its text alone, to the bit, whatever else is in the call. Start reading
//! at [`predict()`]; [`json`] holds the shape of its answers on the wire.

mod answer;
mod batching;
pub mod json;
mod tasks;

pub use answer::{Prediction, from_logits};
pub use batching::{Forward, MAX_TOKENS, logits};
pub use tasks::{Input, Predictions, TaskPatch, predict};
