//! Sequences of one task through a forward, in batches of like length.

use std::sync::Arc;

use crate::data::{Sequence, evaluation_batches};
use crate::device::batch::{Batch, DropoutKey};
use crate::error::Result;

/// Tokens of one pass: enough that the products are large, and little memory.
pub const MAX_TOKENS: usize = 4096;

/// A forward pass of one task: logits of a batch of one group, a row a sequence, dropout off.
pub type Forward<'f> = &'f mut dyn FnMut(&Arc<Batch>) -> Result<Vec<Vec<f32>>>;

/// Batches sequences by length under a token budget, runs `forward` and restores the order.
///
/// # Errors
///
/// What `forward` reports.
pub fn logits(sequences: &[Sequence], max_tokens: usize, forward: Forward) -> Result<Vec<Vec<f32>>> {
    let lengths: Vec<usize> = sequences.iter().map(|s| s.ids.len()).collect();
    let mut all = vec![Vec::new(); sequences.len()];
    for rows in evaluation_batches(&lengths, max_tokens) {
        let mut batch = Batch::new();
        for &row in &rows {
            batch.push(&sequences[row].ids, &sequences[row].type_ids, 0, DropoutKey::default(), None);
        }
        for (row, logits) in rows.into_iter().zip(forward(&Arc::new(batch))?) {
            all[row] = logits;
        }
    }
    Ok(all)
}
