//! The encoder: forward and backward of a BERT over one frozen base, written once for every device.
//!
//! Start reading at [`layer`], an encoder layer's forward above its backward; [`pass`] is a whole pass, [`trainer`]
//! what trains, and [`Encoder`] what the layers above hold: it hides which device is underneath.

mod engine;
mod in_use;
pub mod layer;
pub mod network;
pub mod pass;
mod stages;
pub mod trainer;

#[cfg(test)]
mod tests;
#[cfg(all(test, feature = "cuda"))]
mod tests_on_a_grid;

pub use engine::{Encoder, Task};
pub use trainer::{Moments, Report, Rule, Run, Training};

use crate::device::batch::Batch;

/// Logits (S, C_max) cut into each sequence's own outputs.
fn split_logits(logits: &[f64], batch: &Batch, n_outputs: &[usize]) -> Vec<Vec<f32>> {
    let widest = logits.len() / batch.n_sequences().max(1);
    let rows = logits.chunks(widest.max(1)).zip(batch.groups());
    rows.map(|(row, g)| row[..n_outputs[*g]].iter().map(|z| *z as f32).collect()).collect()
}
