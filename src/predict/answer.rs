//! What a row of logits says.

use crate::base::problem::Problem;

/// The answer to one text, or one pair.
#[derive(Debug, Clone, PartialEq)]
pub enum Prediction {
    /// One class of the task's.
    Class {
        /// The class with the largest score, an index into the task's labels; of several, the first.
        class: usize,
        /// The score of every class: softmax of the logits, in the order of the labels.
        scores: Vec<f32>,
    },
    /// A value, on its raw scale.
    Value(f32),
}

/// The answer that logits give: softmax and the largest of them for classes, the number itself for a value.
pub fn from_logits(problem: &Problem, logits: &[f32]) -> Prediction {
    match problem {
        Problem::Value => Prediction::Value(logits.first().copied().unwrap_or(f32::NAN)),
        Problem::Classes(_) => {
            let larger = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
            let class = (0..logits.len()).reduce(larger).unwrap_or(0);
            let top = f64::from(logits.get(class).copied().unwrap_or(f32::NAN));
            let powers: Vec<f64> = logits.iter().map(|z| (f64::from(*z) - top).exp()).collect();
            let sum: f64 = powers.iter().sum();
            Prediction::Class { class, scores: powers.iter().map(|p| (p / sum) as f32).collect() }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_sum_to_one_and_a_tie_goes_to_the_first_class() {
        let problem = Problem::Classes(["a", "b", "c"].map(String::from).to_vec());
        let Prediction::Class { class, scores } = from_logits(&problem, &[1.0, 1.0, -1000.0]) else { panic!() };
        assert_eq!((class, scores), (0, vec![0.5, 0.5, 0.0]));
        let Prediction::Class { class, scores } = from_logits(&problem, &[88.0, 200.0, 1.0]) else { panic!() };
        assert_eq!((class, scores[1]), (1, 1.0));
        assert_eq!(from_logits(&Problem::Value, &[3.5]), Prediction::Value(3.5));
    }
}
