//! The metrics of GLUE and of users' tables, in f64, as scikit-learn and scipy define them.
//!
//! Where those leave a metric undefined (they warn, or answer NaN), the answer here is 0: a constant prediction has no
//! correlation with anything, and a result that holds NaN is not JSON.

use std::collections::BTreeMap;

use super::dataset::Dataset;
use crate::base::problem::Problem;
use crate::device::batch::Target;
use crate::error::{Error, Result};

/// A figure for how good predictions are; larger is better for every one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Metric {
    /// The share of right classes, 0 to 1 (`accuracy_score`).
    Accuracy,
    /// The harmonic mean of precision and recall of class 1, 0 to 1 (`f1_score` of two classes); 0 where class 1 is
    /// neither predicted nor right anywhere.
    F1,
    /// The mean of every class's F1, 0 to 1, over the classes that are predicted or right somewhere
    /// (`f1_score(average="macro")`).
    MacroF1,
    /// Matthews' correlation, -1 to 1, for any number of classes (`matthews_corrcoef`; Gorodkin 2004); 0 where all
    /// predictions, or all targets, are one class.
    Matthews,
    /// Pearson's correlation, -1 to 1 (`scipy.stats.pearsonr`); 0 where one side is constant.
    Pearson,
    /// Spearman's rank correlation, -1 to 1, ties sharing their mean rank (`scipy.stats.spearmanr`); 0 where one side
    /// is constant.
    Spearman,
}

impl Metric {
    /// The key in JSON and in a patch's metadata.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Accuracy => "accuracy",
            Metric::F1 => "f1",
            Metric::MacroF1 => "macro_f1",
            Metric::Matthews => "matthews",
            Metric::Pearson => "pearson",
            Metric::Spearman => "spearman",
        }
    }
}

/// Scores predictions against targets; the keys are the metrics' names.
///
/// # Errors
///
/// Where there is nothing to score, the two differ in length or in kind (classes, values), a metric is for the other
/// kind, or a value is not finite, as after a training run that diverged.
pub fn compute(metrics: &[Metric], predictions: &[Target], targets: &[Target]) -> Result<BTreeMap<String, f64>> {
    if predictions.len() != targets.len() {
        let message = format!("{} predictions for {} targets", predictions.len(), targets.len());
        return Err(Error::Audit(message));
    }
    if targets.is_empty() {
        return Err(Error::Usage("there is no example with a label to score predictions on".to_string()));
    }
    let classes = || -> Result<Counts> { Ok(Counts::new(&classes_of(predictions)?, &classes_of(targets)?)) };
    let values = || -> Result<[Vec<f64>; 2]> { Ok([values_of(predictions)?, values_of(targets)?]) };
    let score = |metric: Metric| -> Result<f64> {
        Ok(match metric {
            Metric::Accuracy => classes()?.accuracy(),
            Metric::F1 => classes()?.f1(1),
            Metric::MacroF1 => classes()?.macro_f1(),
            Metric::Matthews => classes()?.matthews(),
            Metric::Pearson => values().map(|[p, t]| pearson(&p, &t))?,
            Metric::Spearman => values().map(|[p, t]| pearson(&ranks(&p), &ranks(&t)))?,
        })
    };
    metrics.iter().map(|&metric| Ok((metric.name().to_string(), score(metric)?))).collect()
}

/// What to predict for every row without reading it: the commonest class of `train` (of several, the first label), or
/// the mean of its values.
///
/// # Errors
///
/// Where no row has a target.
pub fn majority(train: &Dataset) -> Result<Target> {
    let targets: Vec<Target> = train.examples.iter().filter_map(|e| e.target).collect();
    if targets.is_empty() {
        return Err(Error::Usage(format!("{}: no row has a label", train.name)));
    }
    match &train.problem {
        Problem::Classes(labels) => {
            let mut counts = vec![0usize; labels.len()];
            for class in classes_of(&targets)? {
                counts[class] += 1;
            }
            let most = counts.iter().max();
            Ok(Target::Class(counts.iter().position(|n| Some(n) == most).unwrap_or(0) as u32))
        }
        Problem::Value => {
            let values = values_of(&targets)?;
            Ok(Target::Value((values.iter().sum::<f64>() / values.len() as f64) as f32))
        }
    }
}

fn classes_of(targets: &[Target]) -> Result<Vec<usize>> {
    let class = |target: &Target| match target {
        Target::Class(class) => Ok(*class as usize),
        Target::Value(value) => Err(Error::Audit(format!("a class is scored here, found the value {value}"))),
    };
    targets.iter().map(class).collect()
}

fn values_of(targets: &[Target]) -> Result<Vec<f64>> {
    let value = |target: &Target| match target {
        Target::Value(value) if value.is_finite() => Ok(f64::from(*value)),
        Target::Value(value) => {
            let message = format!("a predicted value is {value}; the training diverged, try a smaller learning rate");
            Err(Error::Usage(message))
        }
        Target::Class(class) => Err(Error::Audit(format!("a value is scored here, found class {class}"))),
    };
    targets.iter().map(value).collect()
}

/// How often each class was predicted, was right, and was predicted rightly: all that the metrics of classes need.
struct Counts {
    predicted: Vec<usize>,
    target: Vec<usize>,
    both: Vec<usize>,
}

impl Counts {
    fn new(predictions: &[usize], targets: &[usize]) -> Self {
        let n_classes = predictions.iter().chain(targets).max().map_or(0, |class| class + 1);
        let mut counts = Counts { predicted: vec![0; n_classes], target: vec![0; n_classes], both: vec![0; n_classes] };
        for (&predicted, &target) in predictions.iter().zip(targets) {
            counts.predicted[predicted] += 1;
            counts.target[target] += 1;
            counts.both[target] += usize::from(predicted == target);
        }
        counts
    }

    fn accuracy(&self) -> f64 {
        self.both.iter().sum::<usize>() as f64 / self.target.iter().sum::<usize>() as f64
    }

    fn f1(&self, class: usize) -> f64 {
        // A class beyond all that occurred was neither predicted nor right.
        let (Some(predicted), Some(target)) = (self.predicted.get(class), self.target.get(class)) else { return 0.0 };
        match predicted + target {
            0 => 0.0,
            either => 2.0 * self.both[class] as f64 / either as f64,
        }
    }

    fn macro_f1(&self) -> f64 {
        let occurring: Vec<usize> =
            (0..self.target.len()).filter(|&c| self.predicted[c] + self.target[c] > 0).collect();
        occurring.iter().map(|&c| self.f1(c)).sum::<f64>() / occurring.len() as f64
    }

    /// Gorodkin's R_K, which for two classes is Matthews' phi.
    fn matthews(&self) -> f64 {
        let product = |a: &[usize], b: &[usize]| a.iter().zip(b).map(|(&a, &b)| a as f64 * b as f64).sum::<f64>();
        let n = self.target.iter().sum::<usize>() as f64;
        let n_right = self.both.iter().sum::<usize>() as f64;
        let covariance = n_right * n - product(&self.target, &self.predicted);
        let spread =
            (n * n - product(&self.predicted, &self.predicted)) * (n * n - product(&self.target, &self.target));
        if spread == 0.0 { 0.0 } else { covariance / spread.sqrt() }
    }
}

fn pearson(a: &[f64], b: &[f64]) -> f64 {
    // Asked of the values, because the mean of equal values need not equal them once rounded.
    let constant = |x: &[f64]| x.iter().all(|v| *v == x[0]);
    if constant(a) || constant(b) {
        return 0.0;
    }
    let centred = |x: &[f64]| {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        x.iter().map(|v| v - mean).collect::<Vec<f64>>()
    };
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let (a, b) = (centred(a), centred(b));
    // The roots are taken apart: the product of two small spreads could vanish.
    let spread = product(&a, &a).sqrt() * product(&b, &b).sqrt();
    if spread == 0.0 { 0.0 } else { (product(&a, &b) / spread).clamp(-1.0, 1.0) }
}

/// Ranks from 1; equal values share the mean of theirs.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut first = 0;
    // Equal by value, not by bits: 0 and -0 share a rank.
    for run in order.chunk_by(|&a, &b| values[a] == values[b]) {
        let mean = first as f64 + (run.len() as f64 + 1.0) / 2.0;
        run.iter().for_each(|&i| ranks[i] = mean);
        first += run.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    const ALL_OF_CLASSES: [Metric; 4] = [Metric::Accuracy, Metric::F1, Metric::MacroF1, Metric::Matthews];

    #[test]
    fn every_metric_is_that_of_scikit_learn_and_scipy() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/metrics.json");
        let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let mut n_figures = 0;
        for case in golden["cases"].as_array().unwrap() {
            let class = |v: &Value| v.as_u64().map(|c| Target::Class(c as u32));
            let value = |v: &Value| Some(Target::Value(v.as_f64()? as f32));
            let read = |side: &str, one: &dyn Fn(&Value) -> Option<Target>| -> Vec<Target> {
                case[side].as_array().unwrap().iter().map(|v| one(v).unwrap()).collect()
            };
            let found = if case["kind"] == "classes" {
                compute(&ALL_OF_CLASSES, &read("predictions", &class), &read("targets", &class))
            } else {
                let metrics = [Metric::Pearson, Metric::Spearman];
                compute(&metrics, &read("predictions", &value), &read("targets", &value))
            };
            let found = found.unwrap();
            for (name, expected) in case["expected"].as_object().unwrap() {
                let (expected, found) = (expected.as_f64().unwrap(), found[name]);
                assert!((found - expected).abs() <= 1e-12, "{}: {name} {found} is not {expected}", case["name"]);
                n_figures += 1;
            }
        }
        assert!(n_figures >= 40, "only {n_figures} figures compared");
    }

    #[test]
    fn an_undefined_metric_is_zero() {
        let constant = [0.1f32; 7].map(Target::Value);
        let rising = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0].map(Target::Value);
        for (p, t) in [(constant, rising), (rising, constant), (constant, constant)] {
            let found = compute(&[Metric::Pearson, Metric::Spearman], &p, &t).unwrap();
            assert!(found.values().all(|&v| v == 0.0), "{found:?}");
        }
        let zeros = [0, 0, 0].map(Target::Class);
        let found = compute(&ALL_OF_CLASSES, &zeros, &zeros).unwrap();
        assert_eq!(
            found.into_iter().collect::<Vec<_>>(),
            [
                ("accuracy".to_string(), 1.0),
                ("f1".to_string(), 0.0),
                ("macro_f1".to_string(), 1.0),
                ("matthews".to_string(), 0.0),
            ]
        );
    }

    #[test]
    fn what_cannot_be_scored_is_refused() {
        let (class, value) = ([Target::Class(0)], [Target::Value(0.5)]);
        assert!(compute(&[Metric::Accuracy], &class, &[]).is_err());
        assert!(compute(&[Metric::Accuracy], &[], &[]).unwrap_err().to_string().contains("no example"));
        assert!(compute(&[Metric::Accuracy], &value, &value).is_err());
        assert!(compute(&[Metric::Pearson], &class, &class).is_err());
        let error = compute(&[Metric::Pearson], &[Target::Value(f32::NAN)], &value).unwrap_err().to_string();
        assert!(error.contains("NaN") && error.contains("smaller learning rate"), "{error}");
    }
}
