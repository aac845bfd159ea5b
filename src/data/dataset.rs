//! What every source of rows gives: examples, and what the task asks of them.

use super::metrics::Metric;
use crate::base::problem::{Problem, Texts};
use crate::device::batch::Target;

/// One row: its texts, and what should be predicted where that is known.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// The first text, or the only one.
    pub text: String,
    /// The second text; present exactly where the dataset has two texts.
    pub text_pair: Option<String>,
    /// The class (an index into the dataset's labels) or the value; `None` in GLUE's test files.
    pub target: Option<Target>,
}

/// The rows of one file, in its order, and the task that they belong to.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// The task's name: of GLUE, or the stem of the user's file.
    pub name: String,
    /// Classes, with their labels in the order of the classifier's rows, or a value.
    pub problem: Problem,
    /// One text or two.
    pub texts: Texts,
    /// How predictions are scored; the first is the main metric, by which the best epoch is chosen.
    pub metrics: &'static [Metric],
    /// The rows.
    pub examples: Vec<Example>,
    /// Rows of the file that were left out because they are broken; above 0 for QQP alone.
    pub skipped: usize,
}

impl Dataset {
    /// The same task with other examples.
    pub fn with(&self, examples: Vec<Example>) -> Dataset {
        Dataset { name: self.name.clone(), problem: self.problem.clone(), examples, ..*self }
    }

    /// The metric by which the best epoch is chosen.
    pub fn main_metric(&self) -> Metric {
        self.metrics[0]
    }
}
