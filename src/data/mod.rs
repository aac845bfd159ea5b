//! Data: GLUE and a user's own tables, read into examples; tokenised, batched and scored.
//!
//! The layer holds two invariants. Nothing is dropped or repaired in silence: a row that cannot be used is refused
//! with its file and line, and the one exception (QQP's broken rows) is counted. And everything that is drawn is drawn
//! from a seed: the same file and seed give the same split and the same batches on every machine.
//!
//! Start reading at [`mod@task`], the table of GLUE tasks, or at [`table`], a user's own file; both give a [`Dataset`].

pub mod batches;
mod columnar;
mod dataset;
mod delimited;
mod draws;
mod lines;
pub mod metrics;
pub mod official;
mod part;
pub mod rows;
pub mod split;
pub mod table;
pub mod task;

pub use batches::{Encoded, Sequence, encode, evaluation_batches, training_batches};
pub use columnar::Record;
pub use dataset::{Dataset, Example};
pub use metrics::{Metric, compute, majority};
pub use part::{Part, Shard};
pub use rows::{Columns, Fields, Format, Row, Rows};
pub use split::hold_out;
pub use table::load_table;
pub use task::{GlueTask, Split, task};
