//! Training: one run from its rows to its patch, and the folder it leaves.
//!
//! Invariant: a run is decided by its settings, its rows and its base. The number of threads, an interruption followed
//! by a resume, and what else trains in the same step change no bit of the patch. Nothing here prints: what happens is
//! told through [`Event`]s.
//!
//! Start reading at [`run()`], the loop; [`Options`] become a checked [`TrainConfig`] before it begins.

pub mod audit;
mod checkpoint;
mod config;
mod evaluate;
mod folder;
mod head;
mod identity;
mod record;
mod run;
mod schedule;
mod session;
mod step;

pub use config::{Keep, Options, TrainConfig, default_learning_rate};
pub use evaluate::{Evaluation, evaluate};
pub use folder::Existing;
pub use head::start;
pub use record::{DataRecord, EpochRecord, RunRecord};
pub use run::{Event, Job, Outcome, run};
pub use schedule::Schedule;
pub use step::{Progress, Stepped, step};
