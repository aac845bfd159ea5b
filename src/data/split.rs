//! The stratified hold-out: what is tested on where the user gives no dev file.

use rand::RngExt;
use rand::seq::SliceRandom;

use super::dataset::{Dataset, Example};
use super::draws::{Purpose, draws};
use crate::base::problem::Problem;
use crate::device::batch::Target;
use crate::error::{Error, Result};

/// Splits a dataset into (what is trained on, what is held out), both in the order of the file.
///
/// `share` is the share held out, above 0 and below 1 (0.1 by default in `train`). Of each class that share is held
/// out, rounded, at least one example and never all. Values are sorted and cut into as many strata as rows are held
/// out, and one row is drawn of each. The same dataset, share and seed give the same split.
///
/// # Errors
///
/// Where the share is out of range, a class has a single example (it cannot stand on both sides) or the dataset has a
/// single row, and where a row has no target.
pub fn hold_out(dataset: &Dataset, share: f64, seed: u64) -> Result<(Dataset, Dataset)> {
    if !(share > 0.0 && share < 1.0) {
        return Err(Error::setting("held-out share", "above 0 and below 1", share));
    }
    let n_held = |n: usize| ((n as f64 * share).round() as usize).clamp(1, n - 1);
    let mut rng = draws(seed, Purpose::HoldOut);
    let mut held = vec![false; dataset.examples.len()];
    match &dataset.problem {
        Problem::Classes(labels) => {
            let mut rows = vec![Vec::new(); labels.len()];
            for (i, example) in dataset.examples.iter().enumerate() {
                match example.target {
                    Some(Target::Class(class)) if (class as usize) < rows.len() => rows[class as usize].push(i),
                    _ => return Err(without_target(dataset, i)),
                }
            }
            for (rows, label) in rows.iter_mut().zip(labels) {
                match rows.len() {
                    0 => continue,
                    1 => {
                        let message = format!(
                            "{}: the class `{label}` has one example, which cannot be both trained on and held out; \
                             add examples of it, remove it, or give a dev file (--dev)",
                            dataset.name
                        );
                        return Err(Error::Usage(message));
                    }
                    n => {
                        rows.shuffle(&mut rng);
                        rows[..n_held(n)].iter().for_each(|&i| held[i] = true);
                    }
                }
            }
        }
        Problem::Value => {
            let mut rows = Vec::new();
            for (i, example) in dataset.examples.iter().enumerate() {
                match example.target {
                    Some(Target::Value(value)) => rows.push((value, i)),
                    _ => return Err(without_target(dataset, i)),
                }
            }
            let n = rows.len();
            if n < 2 {
                let message = format!(
                    "{}: {n} row(s) cannot be split into rows to train on and rows held out; give a dev file (--dev)",
                    dataset.name
                );
                return Err(Error::Usage(message));
            }
            rows.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            let n_held = n_held(n);
            for stratum in 0..n_held {
                let drawn = rng.random_range(stratum * n / n_held..(stratum + 1) * n / n_held);
                held[rows[drawn].1] = true;
            }
        }
    }
    let side = |wanted: bool| -> Vec<Example> {
        let rows = dataset.examples.iter().zip(&held).filter(|&(_, &held)| held == wanted);
        rows.map(|(example, _)| example.clone()).collect()
    };
    Ok((dataset.with(side(false)), dataset.with(side(true))))
}

fn without_target(dataset: &Dataset, row: usize) -> Error {
    Error::Usage(format!("{}: row {} has no label, so it cannot be split by labels", dataset.name, row + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::problem::Texts;
    use crate::data::table::metrics_of;

    fn dataset(problem: Problem, targets: impl IntoIterator<Item = Target>) -> Dataset {
        let example = |(i, target)| Example { text: format!("row {i}"), text_pair: None, target: Some(target) };
        Dataset {
            name: "mine".into(),
            metrics: metrics_of(&problem),
            problem,
            texts: Texts::One,
            examples: targets.into_iter().enumerate().map(example).collect(),
            skipped: 0,
        }
    }

    fn classes(counts: &[usize]) -> Dataset {
        let labels = (0..counts.len()).map(|i| format!("class {i}")).collect();
        let most = counts.iter().copied().max().unwrap_or(0);
        let targets = (0..most).flat_map(|i| (0..counts.len()).filter(move |&c| i < counts[c]));
        dataset(Problem::Classes(labels), targets.map(|c| Target::Class(c as u32)).collect::<Vec<_>>())
    }

    fn count(dataset: &Dataset, class: u32) -> usize {
        dataset.examples.iter().filter(|e| e.target == Some(Target::Class(class))).count()
    }

    #[test]
    fn a_tenth_of_each_class_is_held_out_and_nothing_is_lost() {
        let all = classes(&[100, 31, 4, 2]);
        let (train, held) = hold_out(&all, 0.1, 7).unwrap();
        assert_eq!([0, 1, 2, 3].map(|c| count(&held, c)), [10, 3, 1, 1]);
        let mut rows: Vec<&Example> = train.examples.iter().chain(&held.examples).collect();
        rows.sort_by_key(|e| e.text["row ".len()..].parse::<usize>().unwrap());
        assert!(rows.into_iter().eq(&all.examples));
        assert!(held.examples.is_sorted_by_key(|e| e.text["row ".len()..].parse::<usize>().unwrap()));
    }

    #[test]
    fn a_large_share_leaves_each_class_something_to_train_on() {
        let (train, _) = hold_out(&classes(&[2, 3]), 0.99, 0).unwrap();
        assert_eq!([0, 1].map(|c| count(&train, c)), [1, 1]);
    }

    #[test]
    fn the_seed_decides_the_split() {
        let all = classes(&[50, 50]);
        assert_eq!(hold_out(&all, 0.1, 3).unwrap(), hold_out(&all, 0.1, 3).unwrap());
        assert_ne!(hold_out(&all, 0.1, 3).unwrap(), hold_out(&all, 0.1, 4).unwrap());
    }

    #[test]
    fn values_are_held_out_over_their_whole_range() {
        let all = dataset(Problem::Value, (0..100).rev().map(|i| Target::Value(i as f32)));
        let (train, held) = hold_out(&all, 0.1, 1).unwrap();
        assert_eq!((train.examples.len(), held.examples.len()), (90, 10));
        for tenth in 0..10 {
            let range = tenth as f32 * 10.0..tenth as f32 * 10.0 + 10.0;
            let inside = |e: &&Example| matches!(e.target, Some(Target::Value(v)) if range.contains(&v));
            assert_eq!(held.examples.iter().filter(inside).count(), 1, "one value of {range:?}");
        }
    }

    #[test]
    fn a_class_with_one_example_is_refused_by_name() {
        let error = hold_out(&classes(&[9, 1]), 0.1, 0).unwrap_err().to_string();
        assert!(error.contains("`class 1` has one example"), "{error}");
        let one = dataset(Problem::Value, [Target::Value(1.0)]);
        assert!(hold_out(&one, 0.1, 0).unwrap_err().to_string().contains("cannot be split"));
    }

    #[test]
    fn a_share_outside_its_range_is_refused() {
        for share in [0.0, 1.0, -0.1, f64::NAN, f64::INFINITY] {
            let error = hold_out(&classes(&[5, 5]), share, 0).unwrap_err().to_string();
            assert!(error.contains("held-out share: expected above 0 and below 1"), "{error}");
        }
    }
}
