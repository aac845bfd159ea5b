//! A user's own table as a dataset: classes found in its labels, or a value.
//!
//! The training file fixes the labels and their order. Every later file (a dev file, a file to test a patch on) is
//! read with them, and a label that they do not have is refused with its line.

use std::collections::BTreeSet;
use std::path::Path;

use super::dataset::{Dataset, Example};
use super::metrics::Metric;
use super::rows::{Columns, Rows};
use crate::base::problem::{Problem, Texts};
use crate::device::batch::Target;
use crate::error::{Error, Result};

/// More different labels than this are taken for numbers, or for the wrong column.
pub const MAX_CLASSES: usize = 100;

/// Reads a whole table with labels.
///
/// The problem is a value where `regression` says so, else the classes found: in numeric order where all are whole
/// numbers, else in the order of their bytes. Where `known` is given (by the training file, or by a patch) it decides
/// instead, and its labels are the only ones taken. The dataset's name is the stem of the file's name.
///
/// Classes are scored by accuracy (the main metric) and by macro F1, which unlike plain F1 needs no class to be
/// singled out as the positive one; values by Spearman (main) and Pearson correlation.
///
/// # Errors
///
/// All of [`Rows::open`] and of reading its rows; where `columns` names no label; where a label is not one of the known
/// ones, or not a finite number for a value; where more than [`MAX_CLASSES`] different labels, or fractions, are found
/// without `regression`; where all labels are the same; where `regression` is asked of known classes.
pub fn load_table(path: &Path, columns: &Columns, regression: bool, known: Option<&Problem>) -> Result<Dataset> {
    let Some(label_column) = &columns.label else {
        return Err(Error::Usage(format!("{}: name the column of the labels (--label-column)", path.display())));
    };
    if regression && matches!(known, Some(Problem::Classes(_))) {
        return Err(Error::Usage("the task has classes; leave --regression away".to_string()));
    }
    let find_classes = !regression && known.is_none();
    let mut found = BTreeSet::new();
    let mut labels = Vec::new();
    let mut examples = Vec::new();
    for row in Rows::open(path, columns)? {
        let row = row?;
        let label = row.label.unwrap_or_default();
        if find_classes && !found.contains(&label) {
            found.insert(label.clone());
            if found.len() > MAX_CLASSES {
                let message = format!(
                    "more than {MAX_CLASSES} different labels in `{label_column}`; where they are numbers to be \
                     predicted, add --regression, else look whether this is the right column"
                );
                return Err(Error::line(path, row.line, message));
            }
        }
        labels.push((row.line, label));
        examples.push(Example { text: row.text, text_pair: row.text_pair, target: None });
    }
    let problem = match known {
        Some(problem) => problem.clone(),
        None if regression => Problem::Value,
        None => Problem::Classes(classes(found, path, label_column)?),
    };
    for (example, (line, label)) in examples.iter_mut().zip(&labels) {
        example.target = Some(target(&problem, label, path, *line, label_column)?);
    }
    Ok(Dataset {
        name: path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default(),
        texts: if columns.text_pair.is_some() { Texts::Two } else { Texts::One },
        metrics: metrics_of(&problem),
        problem,
        examples,
        skipped: 0,
    })
}

/// How a task that is not of GLUE is scored, the main metric first.
pub fn metrics_of(problem: &Problem) -> &'static [Metric] {
    match problem {
        Problem::Classes(_) => &[Metric::Accuracy, Metric::MacroF1],
        Problem::Value => &[Metric::Spearman, Metric::Pearson],
    }
}

fn classes(found: BTreeSet<String>, path: &Path, column: &str) -> Result<Vec<String>> {
    let numbers: Option<Vec<f64>> = found.iter().map(|l| l.parse().ok().filter(|x: &f64| x.is_finite())).collect();
    if let Some(fraction) = numbers.iter().flatten().find(|x| x.fract() != 0.0) {
        let message = format!(
            "the labels in `{column}` are numbers with fractions ({fraction} among them); add --regression to predict a \
             value, or write classes as words"
        );
        return Err(Error::content(path, message));
    }
    let mut labels: Vec<String> = found.into_iter().collect();
    if let [only] = &labels[..] {
        let message = format!("all labels in `{column}` are `{only}`; a task needs at least two classes");
        return Err(Error::content(path, message));
    }
    if numbers.is_some() {
        // Stable, so that `1` and `01` keep the order of their bytes.
        let number = |label: &String| label.parse::<f64>().unwrap_or_default();
        labels.sort_by(|a, b| number(a).total_cmp(&number(b)));
    }
    Ok(labels)
}

fn target(problem: &Problem, label: &str, path: &Path, line: u64, column: &str) -> Result<Target> {
    match problem {
        Problem::Classes(labels) => match labels.iter().position(|known| known == label) {
            Some(class) => Ok(Target::Class(class as u32)),
            None => {
                let known = labels.join("`, `");
                let message = format!("expected one of the task's labels `{known}` in `{column}`, found `{label}`");
                Err(Error::line(path, line, message))
            }
        },
        Problem::Value => match label.parse() {
            Ok(value) if f32::is_finite(value) => Ok(Target::Value(value)),
            _ => Err(Error::line(path, line, format!("expected a finite number in `{column}`, found `{label}`"))),
        },
    }
}
