//! The values of one task over a frozen base: differences to base tensors, and the head.
//!
//! Plain data that every layer above can hold: the encoder runs it, a patch file stores it, training changes it.

use std::collections::BTreeMap;

use crate::error::{Error, Result};

/// What is wanted of one base tensor in training.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Every entry trains.
    Dense,
    /// Only these flat positions train: strictly increasing, within the tensor.
    Entries(Vec<u64>),
}

/// A difference to one base tensor: the tensor in use is `base + difference`.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// One value for each entry of the tensor, row-major.
    Dense(Vec<f32>),
    /// Values at flat positions (strictly increasing); zero elsewhere.
    Sparse {
        /// Flat, row-major positions.
        indices: Vec<u64>,
        /// One value a position.
        values: Vec<f32>,
    },
}

impl Change {
    /// Adds it to its tensor (row-major, all of its entries), in f32; `name` is the tensor's, for the error.
    ///
    /// # Errors
    ///
    /// Where it is not for a tensor of this length.
    pub fn add_to(&self, name: &str, tensor: &mut [f32]) -> Result<()> {
        let same = |expected: usize, found: usize| match expected == found {
            true => Ok(()),
            false => Err(Error::setting(name, format!("{expected} values"), found)),
        };
        match self {
            Change::Dense(values) => {
                same(tensor.len(), values.len())?;
                tensor.iter_mut().zip(values).for_each(|(entry, value)| *entry += *value);
            }
            Change::Sparse { indices, values } => {
                same(indices.len(), values.len())?;
                for (i, value) in indices.iter().zip(values) {
                    let n = tensor.len();
                    let at = usize::try_from(*i).ok().filter(|at| *at < n);
                    let beyond = || Error::setting(name, format!("a position below {n}"), i);
                    tensor[at.ok_or_else(beyond)?] += *value;
                }
            }
        }
        Ok(())
    }
}

/// A task's head: the classifier and, where the base has none to share, its own pooler.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    /// Rows of the classifier (classes, or 1 for a value).
    pub n_outputs: usize,
    /// `classifier.weight`, (n_outputs, hidden), row-major.
    pub weight: Vec<f32>,
    /// `classifier.bias`, (n_outputs).
    pub bias: Vec<f32>,
    /// `pooler.dense.weight` (hidden, hidden) and `pooler.dense.bias` (hidden), whole, where the checkpoint has no
    /// pooler; `None` where the base's pooler is shared (its bias difference is then in [`Delta::changes`]).
    pub pooler: Option<(Vec<f32>, Vec<f32>)>,
}

/// All values of one task.
#[derive(Debug, Clone, PartialEq)]
pub struct Delta {
    /// Differences by canonical tensor name.
    pub changes: BTreeMap<String, Change>,
    /// The head, as it is.
    pub head: Head,
}
