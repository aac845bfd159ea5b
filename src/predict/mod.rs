//! Texts in, typed predictions out: written once, for evaluation, the command and a server.
//!
//! Invariant: an answer depends on its task and its text alone, to the bit, whatever else is in the call. Start reading
//! at [`predict()`], and for a file larger than memory at [`Scorer`]; [`json`] holds the shape of answers on the wire.

mod answer;
mod batching;
mod columns;
pub mod json;
mod json_writer;
mod parquet_writer;
mod partial;
mod recorded;
mod row_writer;
mod score;
mod tasks;

pub use answer::{Prediction, from_logits};
pub use batching::{Forward, MAX_TOKENS, logits};
pub use columns::{cells, names};
pub use partial::{Existing, can_resume, check_output};
pub use row_writer::Form;
pub use score::{Job, Progress, Scored, Scorer};
pub use tasks::{Input, Predictions, TaskPatch, predict, tokenise};
