//! How good a task's values are on rows with labels.

use std::collections::BTreeMap;

use crate::base::problem::Problem;
use crate::data::{Metric, Sequence, compute};
use crate::device::batch::Target;
use crate::error::{Error, Result};
use crate::predict::{self, Forward};

/// A split's figures.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// Rows that were scored.
    pub examples: usize,
    /// The metrics by name, as [`compute`] gives them.
    pub metrics: BTreeMap<String, f64>,
}

/// Scores a task on sequences that all have targets. `forward` gives one row of logits a sequence of a batch of one
/// group, dropout off: of an encoder with the task attached, or of a trainer.
///
/// # Errors
///
/// Where a sequence has no target, there is none at all, a logit is not finite, and whatever `forward` reports.
pub fn evaluate(sequences: &[Sequence], problem: &Problem, metrics: &[Metric], forward: Forward) -> Result<Evaluation> {
    let without = || Error::Usage("there are rows without a label, which cannot be scored".into());
    let targets: Vec<Target> = sequences.iter().map(|s| s.target.ok_or_else(without)).collect::<Result<_>>()?;
    let logits = predict::logits(sequences, predict::MAX_TOKENS, forward)?;
    if logits.iter().flatten().any(|z| !z.is_finite()) {
        return Err(Error::Diverged("an output on the dev rows is not finite; try a smaller learning rate".into()));
    }
    let predictions: Vec<Target> = logits.iter().map(|row| predict::from_logits(problem, row).into()).collect();
    Ok(Evaluation { examples: targets.len(), metrics: compute(metrics, &predictions, &targets)? })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::device::batch::Batch;

    fn sequences(targets: &[u32]) -> Vec<Sequence> {
        let of = |(i, class): (usize, &u32)| Sequence {
            ids: vec![1; 3 + i % 2],
            type_ids: vec![0; 3 + i % 2],
            target: Some(Target::Class(*class)),
        };
        targets.iter().enumerate().map(of).collect()
    }

    #[test]
    fn a_split_is_scored_in_the_order_of_its_rows_and_ties_go_to_the_first_class() {
        let problem = Problem::Classes(vec!["a".into(), "b".into()]);
        let rows = sequences(&[0, 1, 0, 1]);
        // Rows of three tokens answer class 0 by a tie, those of four class 1.
        let mut forward = |batch: &Arc<Batch>| {
            let of = |s| if batch.tokens_of(s).len() == 3 { vec![0.5, 0.5] } else { vec![0.0, 1.0] };
            Ok((0..batch.n_sequences()).map(of).collect())
        };
        let found = evaluate(&rows, &problem, &[Metric::Accuracy], &mut forward).unwrap();
        assert_eq!((found.examples, found.metrics["accuracy"]), (4, 1.0));
    }

    #[test]
    fn an_output_that_is_not_finite_is_refused() {
        let mut forward = |batch: &Arc<Batch>| Ok(vec![vec![f32::NAN, 0.0]; batch.n_sequences()]);
        let problem = Problem::Classes(vec!["a".into(), "b".into()]);
        let error = evaluate(&sequences(&[0]), &problem, &[Metric::Accuracy], &mut forward).unwrap_err();
        assert!(error.to_string().contains("diverged"), "{error}");
    }
}
